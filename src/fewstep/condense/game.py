"""Which points to ask a teacher about that is often wrong: a game with a closed-form solution.

Point ``i`` is worth ``g_i > 0`` to the student if the teacher answers it rightly.  We choose a distribution ``p`` over
the points; an adversary who knows it chooses the ``K`` points that the teacher gets wrong.  What we are left with is

    min over |W| = K of   sum_{i not in W} p_i g_i - (c - 1) sum_{i in W} p_i g_i

with ``c = 1`` where a wrong answer is worth nothing and ``c = 2`` where it costs what a right one brings.  With
``g_1 >= ... >= g_n`` and ``H_k = sum_{j <= k} 1 / g_j`` the best we can be sure of is

    value = max_k (k - c K) / H_k,    p_i = (1 / g_i) / H_k  for i <= k,  0 for the others

so that ``p_i g_i`` is the same for all chosen points and the adversary gains nothing by his choice: among the chosen,
the *less* informative get *more* probability.  (With ``w_i = p_i g_i`` the payoff is ``sum w - c (sum of the K largest
w)``.  What lies above the K-th largest is wasted, so ``w_i <= t`` with at least K of them equal to ``t``; filling up in
the order of ``g`` is a fractional knapsack with costs ``1 / g_i``, and the payoff is linear-fractional between its
break points.)  ``K = 0`` is margin sampling, all on the largest gain; a large ``K`` spreads over everything.

A batch of ``b`` points drawn without replacement has *marginals* ``q`` in [0, 1] that sum to ``b``, and the same
payoff.  :func:`dependent_rounding` draws exactly ``b`` points with these marginals (Baykal et al. 2022, arXiv
2210.01213; the solution was derived again and is held to linear programs).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.condense.select import pivotal
from fewstep.randomness import Rng

#: Gains are at least this much of the largest: a point that is worth nothing would make ``H`` infinite.
LEAST = 1e-6
#: A payoff that is larger by less than this share is no larger: rounding makes no difference to which points are taken.
SAME = 1e-12
#: Halvings (in golden sections) of the range of ``t``: 0.618^90 = 2e-19.
SECTIONS = 90


class Strategy(NamedTuple):
    """``marginals`` ``[n]``, float64: the probability that a point is asked about; and the ``value``, the payoff that
    no adversary can push below."""

    marginals: Tensor
    value: float


def one_query(gains: Tensor, wrong: float, cost: float = 1.0) -> Strategy:
    """The best distribution over ``n`` points for one query, in closed form.

    ``gains`` ``[n]`` are 0 or more, ``wrong`` is the number ``K`` of points that the teacher gets wrong (any real
    number from 0 to n), ``cost`` is ``c``.  The smallest prefix that attains the maximum is taken.  Where ``c K >= n``
    nothing can be won, and every point is asked about in proportion to ``1 / g_i``.

    ValueError for gains that are negative or not finite, and for an impossible ``wrong`` or ``cost``.
    """
    g, order = falling(gains, wrong, cost)
    n = len(g)
    h, k = (1 / g).cumsum(0), torch.arange(1, n + 1, dtype=torch.float64)
    payoff = (k - cost * wrong) / h
    best = n - 1
    if cost * wrong < n:
        best = int((payoff >= payoff.max() * (1 - SAME)).nonzero()[0])
    marginals = torch.zeros(n, dtype=torch.float64)
    marginals[order[: best + 1]] = (1 / g[: best + 1]) / h[best]
    return Strategy(marginals, float(payoff[best]))


def batch(gains: Tensor, wrong: float, queries: int, cost: float = 1.0) -> Strategy:
    """The best marginals in [0, 1] that sum to ``queries``; arguments as of :func:`one_query`, the case of one.

    For a level ``t`` the best filling asks for ``w_i = q_i g_i <= min(t, g_i)`` in the order of ``g`` until the queries
    are used, and what is left after that goes above the level, to the least informative points first.  The payoff is
    concave in ``t``; its maximum is found by golden sections, the largest ``t`` of several (the fewest points).

    ValueError also for more queries than points.
    """
    g, order = falling(gains, wrong, cost)
    n = len(g)
    if not 1 <= queries <= n:
        raise ValueError(f"queries={queries} must be from 1 to the {n} points there are")

    def payoff(t: float) -> float:  # a lower bound that is met where t is the K-th largest w, and concave
        w = filled(g, t, queries) * g
        return float(w.sum() - cost * (wrong * t + (w - t).clamp_min(0).sum()))

    marginals = torch.zeros(n, dtype=torch.float64)
    t = level_of_all(g, queries) if cost * wrong >= n else largest_maximiser(payoff, 0.0, float(g[0]))
    marginals[order] = filled(g, t, queries)
    return Strategy(marginals, worst_case(marginals, gains, wrong, cost))


def worst_case(marginals: Tensor, gains: Tensor, wrong: float, cost: float = 1.0) -> float:
    """What an adversary leaves of the payoff who chooses ``wrong`` points: those where ``q_i g_i`` is largest; of a
    number with a fraction, that share of one more."""
    g = torch.as_tensor(gains, dtype=torch.float64)
    return payoff_of(torch.as_tensor(marginals, dtype=torch.float64) * g, wrong, cost)


def dependent_rounding(marginals: Tensor, rng: Rng) -> Tensor:
    """A set of points, each in it with the probability of its marginal: int64 indices, rising.

    Where the marginals ``[n]`` sum to a whole number ``b``, exactly ``b`` points are drawn.  The pivotal method: of two
    points with a fraction, one is decided, and the other carries on what is left of both
    (:func:`~fewstep.condense.select.pivotal`).  Points meet in random order, so that any two of them may be drawn
    together.  ValueError for marginals outside of [0, 1] or whose sum is no whole number.
    """
    q = torch.as_tensor(marginals, dtype=torch.float64)
    order = rng.shuffled(len(q)).cpu()
    near = torch.where((q - q.round()).abs() <= SAME, q.round(), q)
    return order[pivotal(near[order], rng)].sort().values


def falling(gains: Tensor, wrong: float, cost: float) -> tuple[Tensor, Tensor]:
    """The gains from the largest on in float64, at least a little above 0, and the points in this order."""
    g = torch.as_tensor(gains, dtype=torch.float64).cpu()
    if g.ndim != 1 or not len(g) or not bool((g.isfinite() & (g >= 0)).all()):
        raise ValueError(f"gains [n] must be finite and 0 or more, got shape {list(g.shape)}")
    if not 0 <= wrong <= len(g):
        raise ValueError(f"wrong={wrong:g} must lie in [0, {len(g)}], the number of points")
    if cost < 1:
        raise ValueError(f"cost={cost:g} must be at least 1")
    order = g.argsort(descending=True, stable=True)
    g = g[order]
    return g.clamp_min(LEAST * float(g[0]) if g[0] else LEAST), order


def payoff_of(w: Tensor, wrong: float, cost: float) -> float:
    """``sum w - c (sum of the K largest w)``."""
    whole, w = int(wrong), w.sort(descending=True).values
    last = (wrong - whole) * w[whole] if whole < len(w) else 0.0
    return float(w.sum() - cost * (w[:whole].sum() + last))


def filled(g: Tensor, t: float, queries: int) -> Tensor:
    """The best marginals of falling gains when ``w_i`` beyond ``t`` is worthless (or costs): each point up to ``t`` in
    the order of the gains, and then, if queries are left, beyond it in the order back."""
    q = poured((t / g).clamp_max(1), float(queries))
    left = queries - float(q.sum())
    return q + poured((1 - q).flip(0), left).flip(0)


def poured(room: Tensor, amount: float) -> Tensor:
    """An amount poured into rooms in order, each as full as it gets before the next."""
    before = room.cumsum(0) - room
    return torch.minimum(room, (amount - before).clamp_min(0))


def level_of_all(g: Tensor, queries: int) -> float:
    """The ``t`` at which ``q_i = min(1, t / g_i)`` uses the queries: all points, the less informative the more."""
    low, high = 0.0, float(g[0])
    for _ in range(SECTIONS):
        t = (low + high) / 2
        low, high = (t, high) if float((t / g).clamp_max(1).sum()) < queries else (low, t)
    return high


def largest_maximiser(payoff: Callable[[float], float], low: float, high: float) -> float:
    """The largest point at which a concave function on an interval is maximal."""
    ratio = (5**0.5 - 1) / 2
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    at_a, at_b = payoff(a), payoff(b)
    for _ in range(SECTIONS):
        if at_a > at_b + SAME * abs(at_b):
            high, b, at_b = b, a, at_a
            a = high - ratio * (high - low)
            at_a = payoff(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + ratio * (high - low)
            at_b = payoff(b)
    return high
