"""The acceptance of a draft, measured and in closed form."""

import pytest
import torch
from branches import table
from torch import Tensor

from fewstep.exact import MarkovChain
from fewstep.language.acceptance import measure_acceptance
from fewstep.language.decoding import Decoding
from fewstep.language.speculative import acceptance_of, speculative_decode
from fewstep.language_models import NetworkLanguageModel
from fewstep.networks.causal import GRULanguageModel
from fewstep.randomness import Rng


def exact_acceptance(
    target: MarkovChain, draft: MarkovChain, prompt: Tensor, length: int, writer: MarkovChain | None = None
) -> list[float]:
    """``1 - E TVD`` at each place after a prompt, over the joint law of what the target writes, or another writer."""
    places = []
    for count in range(length):
        law = (writer or target).law(prompt, count)
        tails = torch.cartesian_prod(*[torch.arange(4)] * max(count, 1)).reshape(-1, max(count, 1))[: law.numel()]
        whole = torch.cat([prompt.expand(len(tails), -1), tails[:, :count]], dim=1)
        p, q = (model(whole)[:, -1].exp() for model in (target, draft))
        places.append(float((law.flatten() * acceptance_of(p, q)).sum()))
    return places


def test_it_is_the_one_in_closed_form() -> None:
    """Means over 4000 texts of numbers in [0, 1]: standard errors of at most 0.5 / sqrt(4000)."""
    target, draft = MarkovChain(table(0, order=2)), MarkovChain(table(1))
    prompt = torch.tensor([1, 3])
    found = measure_acceptance(target, draft, prompt.expand(4000, -1), Rng(0), 3)
    expected = exact_acceptance(target, draft, prompt, 3)
    assert found.tokens == 12000
    assert found.by_place == pytest.approx(expected, abs=4 * 0.5 / 4000**0.5)
    assert found.by_place[0] == pytest.approx(expected[0], rel=1e-12)  # the prompts are all the same
    assert found.rate == pytest.approx(sum(found.by_place) / 3, rel=1e-12)


def test_the_loss_on_the_drafts_own_texts_bounds_it() -> None:
    """Theorem of the paper: where the mean total variation on the draft's texts of T tokens is eps, alpha is at least
    1 - T eps.  Without the T it is not so: the target goes where the draft is worse."""
    prompt, length, beyond = torch.tensor([1]), 3, 0
    for seed in range(12):
        p = table(seed)
        target, draft = MarkovChain(p), MarkovChain(0.9 * p + 0.1 * table(100 + seed))
        eps = 1 - sum(exact_acceptance(target, draft, prompt, length, draft)) / length
        alpha = sum(exact_acceptance(target, draft, prompt, length)) / length
        assert alpha >= 1 - length * eps > 0.5
        beyond += alpha < 1 - eps
    assert beyond > 0


def test_it_is_the_part_that_speculative_decoding_accepts() -> None:
    """A block of one: each of some 200 examined tokens is accepted with the mean probability alpha."""
    target, draft = MarkovChain(table(0), 500), MarkovChain(table(1), 500)
    found = measure_acceptance(target, draft, torch.zeros(64, 1, dtype=torch.long), Rng(0), 50)
    run = speculative_decode(target, draft, torch.tensor([0]), Rng(1), 300, gamma=1).statistics
    assert run.acceptance == pytest.approx(found.rate, abs=4 * 0.5 / sum(run.examined) ** 0.5)


def test_a_draft_equal_to_the_target_has_acceptance_one_and_the_decoding_counts() -> None:
    target, draft = MarkovChain(table(0)), MarkovChain(table(1))
    prompts = torch.tensor([[0], [1], [2], [3]])
    assert measure_acceptance(target, target, prompts, Rng(0), 5).rate == pytest.approx(1, abs=1e-12)
    greedy = measure_acceptance(target, draft, prompts, Rng(0), 1, decoding=Decoding(0.0)).rate
    agreeing = (table(0).argmax(-1) == table(1).argmax(-1)).double().mean()
    assert greedy == float(agreeing)


def test_prompts_of_different_lengths_and_ends_count_only_what_was_written() -> None:
    """Every row alone, weighted by what was written there, gives the whole."""
    torch.manual_seed(0)
    target, draft = (NetworkLanguageModel(GRULanguageModel(5, 20, width=w), 5, 20).double() for w in (16, 4))
    prompts, mask = torch.tensor([[1, 2, 3], [4, 0, 0]]), torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    whole = measure_acceptance(target, draft, prompts, Rng(5), 12, end=0, prompt_mask=mask)
    rows = [
        measure_acceptance(target, draft, prompts[i : i + 1, : (3, 1)[i]], Rng(5, part=i, parts=2), 12, end=0)
        for i in range(2)
    ]
    assert whole.tokens == rows[0].tokens + rows[1].tokens < 24
    assert whole.rate == pytest.approx(sum(row.rate * row.tokens for row in rows) / whole.tokens, rel=1e-12)
    long, short = sorted((row.by_place for row in rows), key=len, reverse=True)
    both = [(a + b) / 2 for a, b in zip(long, short, strict=False)]
    assert len(long) > len(short)
    assert whole.by_place == pytest.approx([*both, *long[len(short) :]], rel=1e-12)
