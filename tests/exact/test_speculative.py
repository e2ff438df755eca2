"""Speculative decoding against laws in closed form: the real code is walked through every branch that it can take."""

import itertools

import pytest
import torch
from branches import law_tensor, table, walk

from fewstep.exact import MarkovChain
from fewstep.language.decoding import Decoding
from fewstep.language.speculative import (
    LOSSLESS,
    Lenience,
    Statistics,
    acceptance_of,
    accepted_with,
    law_of_one_token,
    residual,
    speculative_decode,
    speed_up,
    tokens_per_call,
)
from fewstep.language_models import FunctionLanguageModel, LanguageModel, NetworkLanguageModel
from fewstep.networks.causal import CausalTransformer, GRULanguageModel
from fewstep.randomness import Rng

LENIENT = [Lenience(kind, 0.5) for kind in ("linear", "square", "power")]


def test_one_step_is_exact_and_the_acceptance_is_one_minus_the_total_variation() -> None:
    p, q = table(0, 50), table(1, 50)
    assert float((law_of_one_token(p, q) - p).abs().max()) <= 3 * 2**-53  # 3e-16
    variation = (p - q).abs().sum(-1) / 2
    torch.testing.assert_close(acceptance_of(p, q), 1 - variation, rtol=0, atol=4e-16)
    torch.testing.assert_close((q * accepted_with(p, q)).sum(-1), 1 - variation, rtol=0, atol=4e-16)


@pytest.mark.parametrize("gamma", [0, 1, 2])
def test_the_law_of_three_tokens_is_the_targets(gamma: int) -> None:
    """Every branch of the algorithm, with what it has cached and cut back between two blocks, on a pair of chains of
    four letters, order 2 and order 1."""
    target, draft = MarkovChain(table(0, order=2)), MarkovChain(table(1))
    prompt = torch.tensor([1, 3])
    law = walk(lambda rng: speculative_decode(target, draft, prompt, rng, 3, gamma=gamma))
    torch.testing.assert_close(law_tensor(law, 4, 3), target.law(prompt, 3), rtol=0, atol=1e-15)


@pytest.mark.parametrize("decoding", [Decoding(0.0), Decoding(0.7, top_k=2), Decoding(1.3, top_p=0.8)], ids=str)
def test_with_another_decoding_the_law_is_that_of_the_target_decoded_so(decoding: Decoding) -> None:
    p, q = table(0), table(1)
    target, draft, decoded = MarkovChain(p), MarkovChain(q), MarkovChain(decoding.law(p.log()))
    prompt = torch.tensor([2])
    law = walk(lambda rng: speculative_decode(target, draft, prompt, rng, 3, gamma=2, decoding=decoding))
    torch.testing.assert_close(law_tensor(law, 4, 3), decoded.law(prompt, 3), rtol=0, atol=1e-15)


@pytest.mark.parametrize("lenience", LENIENT, ids=str)
def test_a_lenient_law_of_two_tokens_by_hand(lenience: Lenience) -> None:
    """With one token drafted of two, the first has the law of one lenient step; the second is the target's own after
    an acceptance, and starts a block of none after a rejection: the target's own too."""
    p, q = table(0), table(1)
    prompt = torch.tensor([0])
    law = walk(
        lambda rng: speculative_decode(MarkovChain(p), MarkovChain(q), prompt, rng, 2, gamma=1, lenience=lenience)
    )
    expected = law_of_one_token(p[0], q[0], lenience)[:, None] * p
    torch.testing.assert_close(law_tensor(law, 4, 2), expected, rtol=0, atol=1e-15)
    assert float((expected - p[0][:, None] * p).abs().max()) > 1e-2


def test_a_sequence_ends_with_the_end_token_and_has_the_targets_law() -> None:
    target, draft = MarkovChain(table(0)), MarkovChain(table(1))
    law = walk(lambda rng: speculative_decode(target, draft, torch.tensor([1]), rng, 3, gamma=2, end=2))
    full = target.law(torch.tensor([1]), 3)
    expected: dict[tuple[int, ...], float] = {}
    for tokens in itertools.product(range(4), repeat=3):
        stop = tokens.index(2) + 1 if 2 in tokens else 3
        expected[tokens[:stop]] = expected.get(tokens[:stop], 0.0) + float(full[tokens])
    assert law.keys() == expected.keys()
    assert all(law[key] == pytest.approx(expected[key], abs=1e-15) for key in law)


def test_lenience_of_one_is_lossless_square_is_linear_squared_and_acceptance_falls_with_eps() -> None:
    p, q = table(0, 20), table(1, 20)
    for kind in ("linear", "square", "power"):
        assert torch.equal(law_of_one_token(p, q, Lenience(kind, 1.0)), law_of_one_token(p, q, LOSSLESS))  # type: ignore[arg-type]
        rates = [acceptance_of(p, q, Lenience(kind, eps)) for eps in (1e-6, 0.1, 0.4, 0.7, 1.0)]  # type: ignore[arg-type]
        assert all(bool((a >= b).all()) for a, b in itertools.pairwise(rates))
        assert bool((rates[1] > rates[-1]).all())
    assert torch.equal(Lenience("square", 0.3).of(p), Lenience("linear", 0.3**2).of(p))


@pytest.mark.parametrize("lenience", LENIENT, ids=str)
def test_lenience_pays_for_what_it_accepts_in_total_variation(lenience: Lenience) -> None:
    """TV(out, p) is the acceptance gained: where p >= q all is accepted already, and what a rejection would have given
    there, (1 - acceptance) max(0, p - q) / TVD, is all that is lost."""
    p, q = table(0, 20), table(1, 20)
    away = (law_of_one_token(p, q, lenience) - p).abs().sum(-1) / 2
    gained = acceptance_of(p, q, lenience) - acceptance_of(p, q)
    torch.testing.assert_close(away, gained, rtol=0, atol=1e-15)
    assert float(gained.min()) > 1e-3


@pytest.mark.parametrize("kind", ["linear", "square", "power"])
def test_as_eps_goes_to_zero_the_law_goes_to_the_drafts(kind: str) -> None:
    p, q = table(0, 20), table(1, 20)
    whole = (p - q).abs().sum(-1) / 2
    away = []
    for eps in (0.5, 0.1, 1e-3, 1e-12):
        out = law_of_one_token(p, q, Lenience(kind, eps))  # type: ignore[arg-type]
        away.append(float(((out - p).abs().sum(-1) / 2 - whole).abs().max()))
    assert away == sorted(away, reverse=True)
    assert away[-1] < 1e-10


def test_a_draft_equal_to_the_target_is_always_accepted_and_nothing_is_divided_by_zero() -> None:
    p = table(0)
    assert torch.equal(residual(p, p), p)
    assert torch.equal(accepted_with(p, p), torch.ones_like(p))
    chain = MarkovChain(p)
    out = speculative_decode(chain, chain, torch.tensor([0]), Rng(0), 24, gamma=5)
    assert out.statistics == Statistics(24, 4, 20, (4,) * 5, (4,) * 5, (4,) * 5)
    assert out.statistics.block_efficiency == tokens_per_call(1.0, 5) == 6
    assert not out.rejected


def test_a_token_that_one_of_the_two_never_takes() -> None:
    p, q = torch.tensor([0.0, 0.5, 0.5]).double(), torch.tensor([0.5, 0.0, 0.5]).double()
    assert accepted_with(p, q).tolist() == [0.0, 1.0, 1.0]
    assert residual(p, q).tolist() == [0.0, 1.0, 0.0]
    assert torch.equal(law_of_one_token(p, q), p)


def test_tokens_per_call() -> None:
    assert tokens_per_call(0.7, 5) == pytest.approx(2.9412, abs=5e-5)
    assert tokens_per_call(0.7, 5) == pytest.approx((1 - 0.7**6) / (1 - 0.7), rel=1e-15)
    assert tokens_per_call(0.3, 0) == 1
    assert tokens_per_call(1.0, 7) == 8
    assert speed_up(0.7, 5, 0.1) == pytest.approx(2.9412 / 1.5, abs=5e-5)


def test_block_efficiency_is_tau_where_acceptance_is_independent() -> None:
    """Two chains of order 1 whose rows are all the same: every token is accepted with probability alpha.  The mean of
    blocks of 1 to 6 tokens, over 200 calls or more, has a standard error of at most 2.5 / sqrt(200)."""
    p, q = table(0)[0].expand(4, 4), table(1)[0].expand(4, 4)
    alpha = float(acceptance_of(p, q)[0])
    out = speculative_decode(MarkovChain(p, 501), MarkovChain(q, 501), torch.tensor([0]), Rng(0), 500, gamma=5)
    assert out.statistics.block_efficiency == pytest.approx(tokens_per_call(alpha, 5), abs=4 * 2.5 / 200**0.5)
    assert out.statistics.acceptance == pytest.approx(alpha, abs=4 * 0.5 / sum(out.statistics.examined) ** 0.5)


def pair() -> tuple[LanguageModel, LanguageModel]:
    torch.manual_seed(0)
    target = NetworkLanguageModel(CausalTransformer(6, 40, width=16, blocks=2, heads=2), 6, 40)
    return target.double(), NetworkLanguageModel(GRULanguageModel(6, 40, width=8), 6, 40).double()


@pytest.mark.parametrize("decoding", [Decoding(), Decoding(0.0)], ids=str)
def test_with_caches_the_same_tokens_come_out_as_without(decoding: Decoding) -> None:
    target, draft = pair()
    prompt = torch.tensor([1, 2, 3])
    cached = speculative_decode(target, draft, prompt, Rng(3), 30, gamma=4, decoding=decoding)
    bare = [FunctionLanguageModel(lambda x, model=model: model(x), 6, 40) for model in (target, draft)]
    plain = speculative_decode(*bare, prompt, Rng(3), 30, gamma=4, decoding=decoding)
    assert cached.statistics == plain.statistics
    assert torch.equal(cached.tokens, plain.tokens)
    assert 0 < sum(cached.statistics.accepted) < sum(cached.statistics.examined)


def test_greedy_decoding_is_the_targets_own_greedy_text() -> None:
    target, draft = pair()
    out = speculative_decode(target, draft, torch.tensor([1]), Rng(0), 30, gamma=3, decoding=Decoding(0.0))
    tokens = torch.tensor([[1]])
    for _ in range(30):
        tokens = torch.cat([tokens, target(tokens)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(out.tokens, tokens[0, 1:])


def test_what_was_kept_and_what_was_rejected_is_told() -> None:
    target, draft = pair()
    out = speculative_decode(target, draft, torch.tensor([1]), Rng(1), 30, gamma=4)
    assert len(out.tokens) == len(out.accepted) == 30 == out.statistics.tokens
    assert int(out.accepted.sum()) == sum(out.statistics.accepted)
    assert len(out.rejected) == sum(out.statistics.examined) - sum(out.statistics.accepted)
    assert all(not out.accepted[place] for place in out.rejected)
    assert out.statistics.target_calls == 30 - int(out.accepted.sum())


def test_statistics_add_up() -> None:
    both = Statistics.of_block(3, 1, 2) + Statistics.of_block(2, 2, 3)
    assert both == Statistics(5, 2, 5, (2, 2, 1), (2, 2, 0), (2, 1, 0))
    assert both.by_position[:2] == (1.0, 0.5)
    assert both.acceptance == 0.75


def test_lenience_is_written_and_read() -> None:
    for text in ("lossless", "linear:0.5", "square:0.25", "power:0.1"):
        assert str(Lenience.parse(text)) == text
    for wrong in ("linear", "cubic:0.5", "linear:0", "linear:1.5"):
        with pytest.raises(ValueError, match="lossless, linear:EPS"):
            Lenience.parse(wrong)


def test_what_does_not_fit_is_said_in_one_line() -> None:
    four, three = MarkovChain(table(0), 8), MarkovChain(table(0, 3), 8)
    with pytest.raises(ValueError, match="the draft has 3 tokens, the target 4"):
        speculative_decode(four, three, torch.tensor([0]), Rng(0), 2)
    with pytest.raises(ValueError, match="at least one token"):
        speculative_decode(four, four, torch.tensor([], dtype=torch.long), Rng(0), 2)
    with pytest.raises(ValueError, match="read at most 8"):
        speculative_decode(four, four, torch.tensor([0]), Rng(0), 8)
    with pytest.raises(ValueError, match="gamma=-1"):
        speculative_decode(four, four, torch.tensor([0]), Rng(0), 2, gamma=-1)
