"""Log-probabilities of tokens: against the sum over all sequences, and what they do not depend on."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from fewstep.language.log_probs import (
    response_lengths,
    response_log_probs,
    response_mean,
    response_sum,
    token_entropy,
    token_log_prob,
)

TOKENS = torch.tensor([[0, 2, 1, 3, 0], [1, 1, 3, 2, 0]])
MASK = torch.tensor([[False, False, True, True, False], [False, True, True, True, False]])


def logits(seed: int = 0, length: int = 5) -> Tensor:
    return torch.randn(2, length, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_every_token_has_the_probability_of_the_law_before_it() -> None:
    laws, found = logits().softmax(-1), token_log_prob(logits(), TOKENS, MASK)
    for row, t in itertools.product(range(2), range(5)):
        expected = math.log(laws[row, t - 1, TOKENS[row, t]]) if MASK[row, t] else 0.0
        assert abs(float(found[row, t]) - expected) < 1e-15


def test_responses_have_a_law() -> None:
    """The probabilities of all responses of three tokens sum to 1, for laws that depend on what came before."""
    table = torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tokens = torch.tensor([(2, *rest) for rest in itertools.product(range(4), repeat=3)])
    mask = torch.tensor([False, True, True, True]).expand(len(tokens), -1)
    found = response_log_probs(table[tokens], tokens, mask)
    assert abs(float(found.total.exp().sum()) - 1) < 1e-14
    assert torch.allclose(found.mean, found.total / 3, rtol=1e-15)


def test_padding_and_prompt_change_nothing() -> None:
    """Tokens outside of the response, more of them on either side, and logits there: no difference in a bit, nor a
    gradient; lengths count tokens of the response alone."""
    before = response_log_probs(logits(), TOKENS, MASK)
    other = torch.where(MASK, TOKENS, -100)
    assert torch.equal(response_log_probs(logits(), other, MASK).total, before.total)

    wider = torch.cat([logits(1, 3), logits(), logits(2, 2)], 1).requires_grad_()
    around = torch.full((2, 3), 3), torch.full((2, 2), 3)
    tokens = torch.cat([around[0], TOKENS, around[1]], 1)
    mask = nn_pad(MASK, 3, 2)
    after = response_log_probs(wider, tokens, mask)
    assert torch.equal(after.total, before.total) and torch.equal(after.mean, before.mean)
    (gradient,) = torch.autograd.grad(after.total.sum(), wider)
    asked = torch.roll(mask, -1, 1)
    assert bool((gradient[~asked] == 0).all()) and bool((gradient[asked] != 0).all())
    assert response_lengths(mask).tolist() == [2, 3]


def nn_pad(mask: Tensor, left: int, right: int) -> Tensor:
    return torch.nn.functional.pad(mask, (left, right), value=False)


def test_the_first_token_has_no_law() -> None:
    whole = torch.ones_like(MASK)
    assert response_lengths(whole).tolist() == [4, 4]
    assert token_log_prob(logits(), TOKENS, whole)[:, 0].tolist() == [0, 0]
    assert torch.equal(response_sum(torch.ones(2, 5), whole), torch.full((2,), 4.0))


def test_impossible_tokens_and_empty_responses() -> None:
    """A logit of -inf outside of the response is no NaN, inside it is -inf; a response without tokens has mean 0."""
    outside, inside = logits(), logits()
    outside[0, 0] = -torch.inf
    outside[0, 0, 0] = 0.0
    assert torch.isfinite(token_log_prob(outside, TOKENS, MASK)).all()
    inside[0, 1, 1] = -torch.inf
    assert float(response_log_probs(inside, TOKENS, MASK).total[0]) == -torch.inf
    assert response_mean(torch.ones(2, 5), torch.zeros_like(MASK)).tolist() == [0, 0]


def test_half_precision_is_summed_in_single() -> None:
    half = logits().bfloat16()
    found = token_log_prob(half, TOKENS, MASK)
    assert found.dtype == torch.float32
    assert torch.equal(found, token_log_prob(half.float(), TOKENS, MASK))


def test_entropy() -> None:
    """Uniform laws have ``log V``, certain ones 0, and the mean of ``-log p`` under the law is its entropy."""
    mask = torch.ones_like(MASK)
    assert torch.allclose(token_entropy(torch.zeros(2, 5, 4), mask)[:, 1:], torch.tensor(math.log(4)))
    certain = torch.full((2, 5, 4), -torch.inf)
    certain[..., 1] = 0
    assert bool((token_entropy(certain, mask) == 0).all())
    expected = torch.zeros(2, dtype=torch.float64)
    for v in range(4):
        tokens = torch.full((2, 5), v)
        expected -= (logits().softmax(-1)[:, 1, v]) * token_log_prob(logits(), tokens, mask)[:, 2]
    assert torch.allclose(token_entropy(logits(), mask)[:, 2], expected, rtol=1e-14)
    assert token_entropy(logits(), MASK)[0].tolist()[:2] == [0, 0]
