"""Roll-outs: prompts of different lengths, ends, the transforms of the law, and independence of how work is split."""

import pytest
import torch

from fewstep.exact import MarkovChain
from fewstep.language.decoding import Decoding, drawn
from fewstep.language.rollouts import rollout
from fewstep.language_models import NetworkLanguageModel
from fewstep.networks.causal import CausalTransformer
from fewstep.randomness import Rng


def policy() -> NetworkLanguageModel:
    torch.manual_seed(0)
    return NetworkLanguageModel(CausalTransformer(6, 16, width=16, blocks=2, heads=2), 6, 16).double()


PROMPTS = torch.tensor([[1, 2, 3, 4], [5, 0, 0, 0], [2, 3, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]).bool()


def test_prompts_of_different_lengths_are_followed_as_each_would_be_alone() -> None:
    """The draws of a row are its own: part ``i`` of 3 draws what row ``i`` of the whole batch does."""
    model = policy()
    tokens, mask = rollout(model, PROMPTS, Rng(0), 8, prompt_mask=MASK)
    for row, length in enumerate(MASK.sum(1).tolist()):
        alone = rollout(model, PROMPTS[row : row + 1, :length], Rng(0, part=row, parts=3), 8)
        assert torch.equal(alone.tokens[0], tokens[row, : length + 8])
        assert torch.equal(tokens[row, :length], PROMPTS[row, :length])
        assert mask[row].nonzero()[:, 0].tolist() == list(range(length, length + 8))
        assert not bool(tokens[row, length + 8 :].any())


def test_with_temperature_0_every_token_is_the_most_likely_one() -> None:
    model = policy()
    tokens, mask = rollout(model, PROMPTS, Rng(0), 8, temperature=0.0, prompt_mask=MASK)
    likely = model(tokens).argmax(-1)
    assert torch.equal(tokens[:, 1:][mask[:, 1:]], likely[:, :-1][mask[:, 1:]])


def test_a_sequence_stops_behind_its_end_token() -> None:
    tokens, mask = rollout(policy(), PROMPTS[:, :1], Rng(1), 12, end=3)
    for row, written in zip(tokens[:, 1:], mask[:, 1:], strict=True):
        count = int(written.sum())
        assert bool(written[:count].all())
        assert not bool(row[count:].any())
        assert 3 not in row[: count - 1].tolist()
        assert count == 12 or row[count - 1] == 3
    assert not bool(mask.all())


def test_the_end_may_stand_in_a_prompt() -> None:
    prompts, given = torch.tensor([[1, 3, 1], [2, 0, 0]]), torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    mask = rollout(policy(), prompts, Rng(1), 3, end=3, prompt_mask=given).mask
    assert bool(mask[0, 3])


def test_a_limit_cuts_the_text_of_a_long_prompt_first() -> None:
    """And changes nothing else."""
    whole = rollout(policy(), PROMPTS, Rng(0), 8, prompt_mask=MASK)
    tokens, mask = rollout(policy(), PROMPTS, Rng(0), 8, prompt_mask=MASK, limit=6)
    assert tokens.shape == (3, 6)
    assert mask.sum(1).tolist() == [2, 5, 4]
    assert torch.equal(tokens, whole.tokens[:, :6])
    assert not bool(rollout(policy(), PROMPTS, Rng(0), 8, limit=4).mask.any())


def test_the_counts_are_those_of_the_law() -> None:
    """4000 draws of two tokens of a chain; each count within 5 standard deviations."""
    table = torch.rand(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1)
    chain = MarkovChain(table)
    tokens, _ = rollout(chain, torch.zeros(4000, 1, dtype=torch.long), Rng(0), 2)
    count = torch.bincount(tokens[:, 1] * 3 + tokens[:, 2], minlength=9).double()
    law = chain.law(torch.tensor([0]), 2).flatten()
    assert bool(((count - 4000 * law).abs() < 5 * (4000 * law * (1 - law)).sqrt()).all())


def test_no_gradient_flows_through_a_rollout() -> None:
    assert not rollout(policy(), PROMPTS[:, :1], Rng(0), 2).tokens.requires_grad


def test_the_law_that_temperature_top_k_and_top_p_leave() -> None:
    logits = torch.tensor([0.5, 0.2, 0.2, 0.1], dtype=torch.float64).log()
    assert Decoding(0.0).law(logits).tolist() == [1, 0, 0, 0]
    torch.testing.assert_close(Decoding(0.5).law(logits), logits.exp() ** 2 / (logits.exp() ** 2).sum())
    assert Decoding(top_k=1).law(logits).tolist() == [1, 0, 0, 0]
    torch.testing.assert_close(Decoding(top_k=2).law(logits) * 9, torch.tensor([5.0, 2, 2, 0], dtype=torch.float64))
    torch.testing.assert_close(Decoding(top_p=0.6).law(logits)[0].item(), 5 / 7)
    assert Decoding(top_p=0.3).law(logits).tolist() == [1, 0, 0, 0]
    assert Decoding(top_p=0.0).law(logits).tolist() == [1, 0, 0, 0]
    torch.testing.assert_close(Decoding(top_k=9).law(logits), logits.exp())


def test_a_draw_at_either_edge_is_possible() -> None:
    law = torch.tensor([[0.0, 0.5, 0.5, 0.0]] * 2)
    assert drawn(law, torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)).tolist() == [1, 2]


def test_what_does_not_fit_is_said_in_one_line() -> None:
    with pytest.raises(ValueError, match="the model reads at most 16"):
        rollout(policy(), PROMPTS, Rng(0), 13)
    with pytest.raises(ValueError, match="a prompt is empty"):
        rollout(policy(), PROMPTS, Rng(0), 2, prompt_mask=torch.zeros(3, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="temperature"):
        Decoding(-1.0)
