"""Choosing samples: counts that add up, the best of every class also under ties, and draws with given marginals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fewstep.condense.select import (
    best_per_class,
    budgets,
    class_sizes,
    marginals,
    pivotal,
    random_counts,
    stratified,
    uniform,
)
from fewstep.randomness import Rng

LABELS = torch.tensor([0, 1, 0, 2, 1, 0, 0, 2, 0, 1])


def test_budgets_follow_the_classes() -> None:
    assert class_sizes(LABELS).tolist() == [5, 3, 2]
    assert budgets(LABELS, 10).tolist() == [5, 3, 2]
    assert budgets(LABELS, 5).tolist() == [3, 1, 1]  # shares 2.5, 1.5, 1: the first of two equal remainders
    for total in range(11):
        found = budgets(LABELS, total)
        assert int(found.sum()) == total and bool((found <= class_sizes(LABELS)).all())


def test_the_best_of_every_class_have_exact_counts_under_ties() -> None:
    """Where all scores are equal, the first of each class; class after class."""
    scores = torch.tensor([0.1, 5.0, 0.9, 2.0, 7.0, 0.9, 0.3, 3.0, -1.0, 5.0])
    assert best_per_class(scores, LABELS, 2).tolist() == [2, 5, 4, 1, 7, 3]
    assert best_per_class(-scores, LABELS, torch.tensor([3, 0, 1])).tolist() == [8, 0, 6, 3]
    tied = best_per_class(torch.zeros(10), LABELS, 2)
    assert tied.tolist() == [0, 2, 1, 4, 3, 7] and tied.dtype == torch.int64


def test_uniform_and_stratified_choices_take_everyone_equally_often() -> None:
    """4,000 draws: frequencies within four standard errors of the chance; counts exact in every draw."""
    rng, draws = Rng(0), 4000
    one, each = torch.zeros(10), torch.zeros(10)
    for _ in range(draws):
        found = uniform(10, 3, rng)
        assert len(set(found.tolist())) == 3
        one[found] += 1
        found = stratified(LABELS, 2, rng)
        assert LABELS[found].tolist() == [0, 0, 1, 1, 2, 2] and len(set(found.tolist())) == 6
        each[found] += 1
    for counts, chance in ((one, torch.full((10,), 0.3)), (each, torch.tensor([0.4, 2 / 3, 1.0])[LABELS])):
        assert bool(((counts / draws - chance).abs() <= 4 * (chance * (1 - chance) / draws).sqrt()).all())


def test_a_choice_is_the_same_for_every_part_of_a_run() -> None:
    chances = torch.full((10,), 0.3)
    first, second = (
        [uniform(10, 3, rng), stratified(LABELS, 1, rng), pivotal(chances, rng)]
        for rng in (Rng(5), Rng(5, part=1, parts=3))
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def water_filled(weights: Tensor, count: int) -> Tensor:
    """``min(1, c w)`` by bisection on ``c``."""
    low, high = 0.0, 1e12
    for _ in range(200):
        c = math.sqrt(low * high) if low > 0 else high / 2
        low, high = (c, high) if float((c * weights).clamp_max(1).sum()) < count else (low, c)
    return (high * weights).clamp_max(1)


def test_marginals_are_proportional_where_they_can_be() -> None:
    for seed in range(20):
        weights = torch.rand(12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 4
        for count in (1, 5, 11):
            q = marginals(weights, count)
            assert float(q.sum()) == pytest.approx(count, abs=1e-12) and float(q.max()) <= 1
            assert torch.allclose(q, water_filled(weights, count), atol=1e-9)
    assert torch.equal(marginals(torch.ones(4), 4), torch.ones(4, dtype=torch.float64))
    assert marginals(torch.tensor([0.0, 2.0, 1.0]), 2).tolist() == [0, 1, 1]
    assert marginals(torch.tensor([0.0, 2.0, 2.0]), 1).tolist() == [0, 0.5, 0.5]
    assert marginals(torch.tensor([3.0, 1.0]), 0).tolist() == [0, 0]


def test_pivotal_sampling_has_its_marginals_its_size_and_its_prefixes() -> None:
    """20,000 draws: every frequency within four standard errors; each draw of the right size, and of the first k, for
    every k, the sum of their chances rounded up or down."""
    q = torch.tensor([0.2, 0.9, 0.5, 0.0, 1.0, 0.3, 0.75, 0.35], dtype=torch.float64)
    before, draws, rng = q.cumsum(0), 20000, Rng(1)
    seen = torch.zeros(8)
    for _ in range(draws):
        found = pivotal(q, rng)
        taken = torch.zeros(8)
        taken[found] = 1
        assert len(found) == 4
        assert bool(((taken.cumsum(0) - before).abs() < 1 + 1e-9).all())
        seen += taken
    assert bool(((seen / draws - q).abs() <= 4 * (q * (1 - q) / draws).sqrt()).all())


def test_pivotal_sampling_of_many_small_chances_has_its_size() -> None:
    """A thousand chances of a thousandth: what rounding leaves of the last one is decided rightly."""
    rng = Rng(2)
    assert all(len(pivotal(torch.full((1000,), 0.001), rng)) == 1 for _ in range(20))
    assert len(pivotal(torch.zeros(5), rng)) == 0 and len(pivotal(torch.ones(5), rng)) == 5


def test_random_counts_give_every_member_the_same_chance() -> None:
    """3,000 draws: each count is the share rounded up or down, the mean is the share."""
    sizes, rng = torch.tensor([13, 13, 4, 0, 7]), Rng(3)
    share = 9 * sizes / 37
    total = torch.zeros(5)
    for _ in range(3000):
        counts = random_counts(sizes, 9, rng)
        assert int(counts.sum()) == 9 and bool(((counts - share).abs() < 1).all())
        total += counts
    part = share - share.floor()
    assert bool(((total / 3000 - share).abs() <= 4 * (part * (1 - part) / 3000).sqrt()).all())
    assert torch.equal(random_counts(sizes, 37, rng), sizes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: budgets(LABELS, 11), r"total=11 must lie in \[0, 10\]"),
        (lambda: class_sizes(torch.tensor([0, -1])), "label -1"),
        (lambda: best_per_class(torch.zeros(10), LABELS, 3), r"per_class=3 of class 2 must lie in \[0, 2\]"),
        (lambda: best_per_class(torch.zeros(9), LABELS, 1), r"must both be \[N\]"),
        (lambda: best_per_class(torch.full((10,), math.nan), LABELS, 1), "NaN"),
        (lambda: uniform(3, 4, Rng(0)), r"count=4 must lie in \[0, 3\]"),
        (lambda: marginals(torch.tensor([1.0, 0.0]), 2), r"count=2 must lie in \[0, 1\]"),
        (lambda: marginals(torch.tensor([1.0, -1.0]), 1), "none negative"),
        (lambda: pivotal(torch.tensor([0.5, 0.7]), Rng(0)), "sum to 1.2"),
        (lambda: pivotal(torch.tensor([1.5, 0.5]), Rng(0)), r"in \[0, 1\]"),
        (lambda: random_counts(torch.tensor([2, 3]), 6, Rng(0)), r"total=6 must lie in \[0, 5\]"),
    ],
)
def test_what_cannot_be_chosen_is_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
