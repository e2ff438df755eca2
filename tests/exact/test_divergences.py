"""Divergences between laws of logits: limits, symmetries and the cases that are known in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.divergences import Divergence, jsd, kl, masked_mean, reverse_kl, sequence_means, total_variation
from fewstep.randomness import Rng

P, Q = Rng(0, "p").normal(6, 5, dtype=torch.float64), Rng(0, "q").normal(6, 5, dtype=torch.float64)


def test_two_outcomes_by_hand() -> None:
    """p = (3/4, 1/4), q = (1/2, 1/2)."""
    p, q = torch.tensor([math.log(3.0), 0.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    assert float(kl(p, q)) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-15)
    assert float(reverse_kl(p, q)) == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2), abs=1e-15)
    assert float(total_variation(p, q)) == pytest.approx(0.25, abs=1e-15)
    m = 0.5 * (0.75 + 0.5)
    half = 0.75 * math.log(0.75 / m) + 0.25 * math.log(0.25 / (1 - m)) + 0.5 * math.log(0.25 / (m * (1 - m)))
    assert float(jsd(p, q)) == pytest.approx(half / 2, abs=1e-15)


def test_the_ends_of_jsd() -> None:
    """Over beta it is the forward KL as beta goes to 0, over 1 - beta the reverse one as it goes to 1, linearly; the
    raw value vanishes at both ends."""
    for beta in (1e-3, 1e-4):
        assert (jsd(P, Q, beta) / beta - kl(P, Q)).abs().max() < 8 * beta
        assert (jsd(P, Q, 1 - beta) / beta - reverse_kl(P, Q)).abs().max() < 40 * beta  # 38 measured
        assert jsd(P, Q, beta).max() < 10 * beta


@pytest.mark.parametrize("name", ["kl", "reverse-kl", "jsd:0.3", "tvd"])
def test_zero_where_they_agree_positive_elsewhere(name: str) -> None:
    measure = Divergence.parse(name)
    assert str(measure) == name
    assert measure(P, P + 3.0).abs().max() < 1e-14  # logits are defined up to a constant
    assert measure(P, Q).min() > 0
    warm = measure(P, Q, temperature=4.0)
    assert torch.allclose(warm, measure(P / 4, Q / 4), atol=1e-15)


def test_what_the_teacher_never_says_counts_nothing() -> None:
    p = torch.tensor([0.0, 0.0, -math.inf])
    assert float(kl(p, torch.zeros(3))) == pytest.approx(math.log(1.5), abs=1e-6)
    assert math.isfinite(float(jsd(p, torch.zeros(3))))


@pytest.mark.parametrize("name", ["reverse-kl", "jsd:0.3", "tvd"])
def test_what_the_student_never_says_leaves_gradients_that_are_those_of_a_law_on_the_rest(name: str) -> None:
    """A draft of a few tokens of a vocabulary: token 1 is never its own, token 3 nobody's.  Central differences of a
    step of 1e-4 in the logits that are there err by 1e-8 / 6 of the third derivative, which is below 1 here."""
    p = torch.tensor([0.3, -0.2, 1.1, -math.inf], dtype=torch.float64)
    some = torch.tensor([0.5, -0.7], dtype=torch.float64, requires_grad=True)

    def loss(some: torch.Tensor) -> torch.Tensor:
        q = torch.full((4,), -math.inf, dtype=torch.float64).index_copy(0, torch.tensor([0, 2]), some)
        return Divergence.parse(name)(p, q)

    (gradient,) = torch.autograd.grad(loss(some), some)
    step = 1e-4
    for i in range(2):
        way = step * torch.eye(2, dtype=torch.float64)[i]
        slope = (loss(some.detach() + way) - loss(some.detach() - way)) / (2 * step)
        assert float(gradient[i]) == pytest.approx(float(slope), abs=1e-8)
    assert math.isinf(float(kl(p, torch.tensor([0.0, -math.inf, 0.0, 0.0], dtype=torch.float64))))


def test_half_precision_is_computed_wide() -> None:
    """Laws far out: bf16 logits keep what float32 keeps of their values."""
    p, q = (40 * P).bfloat16(), (40 * Q).bfloat16()
    assert torch.equal(kl(p, q), kl(p.float(), q.float()))


def test_a_mean_over_tokens_then_sequences() -> None:
    """A long sequence counts no more than a short one, and what the mask leaves out nothing."""
    values = torch.tensor([[1.0, 3.0, 5.0], [7.0, 100.0, 100.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert sequence_means(values, mask).tolist() == [3.0, 7.0]
    assert float(masked_mean(values, mask)) == 5.0
    assert sequence_means(values, torch.zeros_like(mask)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("word", ["js", "jsd:0", "jsd:1", "jsd:nan", "kl:0.5", ""])
def test_words_that_are_none(word: str) -> None:
    with pytest.raises(ValueError):
        Divergence.parse(word)
