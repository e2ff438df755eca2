"""The game of robust active distillation: its closed form against linear programs, its guarantee against every
adversary, and what dependent rounding draws."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor

from fewstep.condense.game import LEAST, batch, dependent_rounding, one_query, worst_case
from fewstep.randomness import Rng

F64 = torch.float64


def games(count: int) -> list[tuple[Tensor, float, int, float]]:
    """Random gains, numbers of wrong answers (whole and not), queries, and both costs of a wrong answer."""
    draw = np.random.default_rng(0)
    found = []
    for i in range(count):
        n, cost = int(draw.integers(3, 15)), float(draw.choice([1.0, 2.0]))
        gains = torch.tensor(draw.uniform(0.01, 1, n))
        wrong = float(draw.uniform(0, n / cost)) if i % 2 else float(draw.integers(0, int(np.ceil(n / cost))))
        found.append((gains, wrong, int(draw.integers(1, n + 1)), cost))
    return found


def by_linear_program(gains: Tensor, wrong: float, queries: int, cost: float, cap: float | None) -> float:
    """``max g.q - c (K t + sum u)`` over ``q, t, u >= 0`` with ``u >= g q - t`` and ``sum q = queries``."""
    g, n = gains.numpy(), len(gains)
    found = linprog(
        np.concatenate([-g, [cost * wrong], cost * np.ones(n)]),
        A_ub=np.hstack([np.diag(g), -np.ones((n, 1)), -np.eye(n)]), b_ub=np.zeros(n),
        A_eq=np.concatenate([np.ones(n), np.zeros(n + 1)])[None], b_eq=[queries],
        bounds=[(0, cap)] * n + [(None, None)] + [(0, None)] * n,
    )  # fmt: skip
    return -float(found.fun)


def test_the_closed_form_is_the_linear_program() -> None:
    """200 games; 5e-16 was seen, and the solver's own rounding may double that."""
    for gains, wrong, _, cost in games(200):
        value = one_query(gains, wrong, cost).value
        assert abs(value - by_linear_program(gains, wrong, 1, cost, None)) < 2e-15


def test_a_batch_is_the_linear_program() -> None:
    """200 games with caps; the search over ``t`` stops at payoffs that agree to 1e-12: 2e-11 was seen."""
    for gains, wrong, queries, cost in games(200):
        found = batch(gains, wrong, queries, cost)
        assert abs(found.value - by_linear_program(gains, wrong, queries, cost, 1.0)) < 1e-10
        assert abs(float(found.marginals.sum()) - queries) < 1e-12 * queries + 1e-12
        assert float(found.marginals.min()) >= 0 and float(found.marginals.max()) <= 1 + 1e-15


def test_a_batch_of_one_is_one_query() -> None:
    for gains, wrong, _, cost in games(50):
        alone, together = one_query(gains, wrong, cost), batch(gains, wrong, 1, cost)
        assert torch.allclose(alone.marginals, together.marginals, rtol=0, atol=1e-8)


def test_a_teacher_that_is_never_wrong_is_asked_about_the_largest_gains() -> None:
    """Margin sampling: one point, or the first b of them, whatever a wrong answer would cost."""
    gains = torch.rand(30, generator=torch.Generator().manual_seed(0), dtype=F64)
    for cost in (1.0, 2.0):
        assert one_query(gains, 0, cost).marginals.nonzero().flatten().tolist() == [int(gains.argmax())]
        taken = batch(gains, 0, 7, cost).marginals
        assert torch.allclose(taken, torch.zeros(30, dtype=F64).index_fill(0, gains.topk(7).indices, 1.0), atol=1e-9)


def test_equal_gains_are_asked_about_alike() -> None:
    """Uniform, with value ``g (n - K) / n`` for one query and ``g (n - K) b / n`` for b."""
    gains = torch.full((12,), 0.6, dtype=F64)
    one, many = one_query(gains, 3), batch(gains, 3, 4)
    assert torch.allclose(one.marginals, torch.full((12,), 1 / 12, dtype=F64), rtol=1e-14)
    assert torch.allclose(many.marginals, torch.full((12,), 4 / 12, dtype=F64), rtol=1e-10)
    assert one.value == pytest.approx(0.6 * 9 / 12, rel=1e-14)
    assert many.value == pytest.approx(0.6 * 9 / 12 * 4, rel=1e-10)


def test_more_wrong_answers_spread_over_more_points() -> None:
    """The size of the support is non-decreasing in K; the less informative of the chosen get more."""
    for seed in range(50):
        gains = torch.rand(20, generator=torch.Generator().manual_seed(seed), dtype=F64) + 0.01
        sizes = [int((one_query(gains, wrong).marginals > 0).sum()) for wrong in range(20)]
        assert sizes == sorted(sizes) and sizes[0] == 1
        p = one_query(gains, 5).marginals
        chosen = p > 0
        assert torch.allclose((p * gains)[chosen], (p * gains)[chosen][0], rtol=1e-12)


def test_no_adversary_pushes_the_payoff_below_the_value() -> None:
    """Every set of K points, and equality for each that lies inside the support."""
    gains = torch.tensor([1.0, 0.9, 0.8, 0.5, 0.45, 0.1, 0.05], dtype=F64)
    for wrong in (1, 2, 3):
        p, value = one_query(gains, wrong)
        support = set(p.nonzero().flatten().tolist())
        assert len(support) > wrong
        for adversary in combinations(range(7), wrong):
            kept = float((p * gains).sum() - (p * gains)[list(adversary)].sum())
            assert kept >= value - 1e-15
            assert set(adversary) <= support or kept > value + 1e-3
            assert not set(adversary) <= support or kept == pytest.approx(value, rel=1e-14)
        assert worst_case(p, gains, wrong) == pytest.approx(value, rel=1e-14)


def test_the_largest_gains_alone_are_worth_nothing_at_worst() -> None:
    """Deterministic margin selection has a worst-case payoff of 0 as soon as K >= b."""
    gains = torch.rand(10, generator=torch.Generator().manual_seed(0), dtype=F64)
    taken = torch.zeros(10, dtype=F64).index_fill(0, gains.topk(4).indices, 1.0)
    assert worst_case(taken, gains, 3) > 0
    assert worst_case(taken, gains, 4) == worst_case(taken, gains, 6) == 0
    assert batch(gains, 4, 4).value > 0.1


def test_of_equal_prefixes_the_smallest_is_taken() -> None:
    """``(k - 1) / H_k`` is 0, 1/2, 1/2 for gains 1, 1, 1/2: two points do as well as three; and of equal points the
    first."""
    gains = torch.tensor([1.0, 0.5, 1.0])
    assert one_query(gains, 1).marginals.tolist() == [0.5, 0, 0.5]
    assert batch(gains, 1, 1).marginals.tolist() == pytest.approx([0.5, 0, 0.5], abs=1e-9)
    assert one_query(torch.full((1000,), 0.5), 0).marginals[0] == 1


def test_a_teacher_that_is_always_wrong_is_asked_about_everything() -> None:
    """``c K >= n``: no strategy wins anything; all points, in inverse proportion to their gain."""
    gains = torch.tensor([0.8, 0.4, 0.2, 0.1], dtype=F64)
    for wrong, cost in ((4.0, 1.0), (2.0, 2.0), (3.0, 2.0)):
        p = one_query(gains, wrong, cost).marginals
        assert torch.allclose(p, (1 / gains) / (1 / gains).sum(), rtol=1e-14)
        q = batch(gains, wrong, 2, cost).marginals
        assert float(q.sum()) == pytest.approx(2) and float(q.min()) > 0
        free = q < 1 - 1e-9  # two are certain, the others still in proportion
        assert torch.allclose((q * gains)[free], (q * gains)[free][0], rtol=1e-9)


def test_points_that_are_worth_nothing_are_clipped() -> None:
    """They get next to nothing of the payoff and everything stays finite."""
    p, value = one_query(torch.tensor([0.5, 0.0, 0.4, 0.0]), 1)
    assert p[1] == p[3] == 0 and value > 0
    q = batch(torch.tensor([0.5, 0.0, 0.4, 0.0]), 1, 3).marginals
    assert float(q.sum()) == pytest.approx(3) and bool(q.isfinite().all())
    assert one_query(torch.zeros(3), 1).marginals.tolist() == pytest.approx([1 / 3] * 3)
    assert one_query(torch.tensor([1.0, 0.0]), 1.5).value == pytest.approx(0.5 / (1 + 1 / LEAST))


def test_rounding_draws_exactly_b_points_with_these_marginals() -> None:
    """1e4 draws: within 4.5 standard errors at each of 8 points, and never another number of points."""
    q = torch.tensor([0.3, 0.9, 0.5, 0.2, 0.6, 0.5, 1.0, 0.0], dtype=F64)
    counts, n, rng = torch.zeros(8, dtype=F64), 10_000, Rng(0)
    for _ in range(n):
        drawn = dependent_rounding(q, rng)
        assert len(drawn) == 4
        counts[drawn] += 1
    assert bool(((counts / n - q).abs() <= 4.5 * (q * (1 - q) / n).sqrt()).all())
    assert counts[6] == n and counts[7] == 0


def test_rounding_can_draw_any_two_points_together() -> None:
    """In a fixed order neighbours would exclude each other."""
    drawn = {tuple(dependent_rounding(torch.full((4,), 0.5), Rng(seed)).tolist()) for seed in range(100)}
    assert drawn == set(combinations(range(4), 2))


def test_rounding_leaves_certain_points_alone_and_says_what_it_cannot_do() -> None:
    assert dependent_rounding(torch.tensor([0.0, 1.0, 0.0, 1.0]), Rng(0)).tolist() == [1, 3]
    assert (
        dependent_rounding(torch.full((10,), 0.3), Rng(1)).tolist()
        == dependent_rounding(torch.full((10,), 0.3), Rng(1)).tolist()
    )
    with pytest.raises(ValueError, match=r"the chances sum to 1\.5"):
        dependent_rounding(torch.tensor([0.5, 1.0]), Rng(0))
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        dependent_rounding(torch.tensor([1.5, 0.5]), Rng(0))


@pytest.mark.parametrize(
    ("gains", "wrong", "cost", "queries", "said"),
    [
        ([0.5, -0.1], 0, 1, 1, "gains"),
        ([0.5, float("nan")], 0, 1, 1, "gains"),
        ([0.5, 0.1], 3, 1, 1, r"wrong=3 must lie in \[0, 2\]"),
        ([0.5, 0.1], 1, 0.5, 1, r"cost=0\.5"),
        ([0.5, 0.1], 1, 1, 3, "queries=3 must be from 1 to the 2 points"),
    ],
)
def test_impossible_games_are_refused(gains: list[float], wrong: float, cost: float, queries: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        batch(torch.tensor(gains), wrong, queries, cost)
