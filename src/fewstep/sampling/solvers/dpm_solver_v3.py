"""DPM-Solver-v3: an exponential integrator whose linear term is fitted to the model, number by number.

Noise and data prediction are two choices of what a solver integrates exactly.  DPM-Solver-v3 (Zheng et al. 2023,
"DPM-Solver-v3: Improved Diffusion ODE Solver with Empirical Model Statistics") takes the choice that makes the
first-order error smallest.  All products are element-wise, ``l``, ``s``, ``b`` have the shape of one sample at every
lambda, and

    f = (sigma eps - l x) / alpha = (1 - l) x / alpha - D          d/dlambda (e^L x / alpha) = -e^L f,  L = int l
    g = e^(S_0 - S) f - int e^(S_0 - S) b dlambda                  constant in lambda where f' = s f + b,  S = int s

from which a step is (eq. 14; every exponent is a difference from the start of the step, so none is large)

    x_t / alpha_t = e^(L_s - L_t) [ x_s / alpha_s - sum_k E_k g^(k) - int e^(L + S) int e^-S b ],
    E_k = int e^(L + S) (lambda - lambda_s)^k / k! dlambda

``l = 1, s = b = 0`` is DPM-Solver++, ``l = 0, s = -1, b = 0`` DPM-Solver (appendix A.2).  The statistics are estimated
by :mod:`fewstep.sampling.solvers.model_statistics`.  Being about ``x / alpha`` and lambda, they are the same on every
schedule.

The engine's history holds ``f``, an affine map of the state and the prediction, so that keeping ``N = sigma eps - l x``
through a correction, as the paper does, is keeping what is stored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewstep.discrete_vp import DiscreteVP
from fewstep.sampling.coefficients import DATA, Levels
from fewstep.sampling.engine import FieldTable, Solver, Stage, Step
from fewstep.sampling.rows import FieldRow
from fewstep.sampling.solvers.multistep import usable_outputs
from fewstep.schedules import LOG_SNR_BOUND, Schedule

Corrector = Literal["off", "on", "half", "first-half"]

#: Levels this close in lambda are the same.
SAME = 1e-6


def statistics_grid(schedule: Schedule, grid: int = 120, noisiest: float = 80.0, cleanest: float = 0.002) -> Tensor:
    """``grid + 1`` equally spaced lambdas from ``t_max`` to ``t_min``; from and to these noise levels ``sigma / alpha``
    where the schedule reaches pure noise or pure data.  ValueError for fewer than 2 intervals."""
    if grid < 2:
        raise ValueError(f"grid={grid}: the statistics need at least 2 intervals")
    ends = schedule.log_snr(torch.tensor([schedule.t_max, schedule.t_min], dtype=torch.float64))
    reach = -torch.tensor([noisiest, cleanest], dtype=torch.float64).log()
    first, last = torch.where(ends.abs() < LOG_SNR_BOUND, ends, reach)
    return first + torch.linspace(0, 1, grid + 1, dtype=torch.float64) * (last - first)


@dataclass(frozen=True, eq=False)
class Statistics:
    """Empirical model statistics: ``l``, ``s`` and ``b`` ``[G + 1, *shape]`` at ``G + 1`` equally spaced, rising values
    ``log_snr`` of lambda.

    Integrals are cumulative trapezoids with their end correction ``h^2 / 12 (y'_0 - y'_1)``, of fourth order in the
    spacing (the paper has plain trapezoids).  ValueError when the shapes differ, a number is not finite, or the grid is
    not such a one.
    """

    log_snr: Tensor
    l: Tensor  # noqa: E741
    s: Tensor
    b: Tensor

    def __post_init__(self) -> None:
        n = len(self.log_snr)
        if self.log_snr.ndim != 1 or n < 3:
            raise ValueError(f"statistics: log_snr of shape {list(self.log_snr.shape)} must be a vector, 3 at least")
        gaps = self.log_snr.double().diff()
        if not bool((gaps > 0).all()) or float(gaps.max() - gaps.min()) > SAME:
            raise ValueError("statistics: log_snr must rise in equal steps")
        for name, value in (("l", self.l), ("s", self.s), ("b", self.b)):
            if value.shape != self.l.shape or len(value) != n:
                raise ValueError(
                    f"statistics: {name} {list(value.shape)} does not fit {n} levels and l {list(self.l.shape)}"
                )
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"statistics: {name} holds NaN or infinity; estimate them again")

    @classmethod
    def data_prediction(cls, log_snr: Tensor, shape: tuple[int, ...]) -> Statistics:
        """``l = 1, s = b = 0``: the solver is DPM-Solver++."""
        ones = torch.ones(len(log_snr), *shape, dtype=torch.float64)
        return cls(log_snr, ones, torch.zeros_like(ones), torch.zeros_like(ones))

    @classmethod
    def noise_prediction(cls, log_snr: Tensor, shape: tuple[int, ...]) -> Statistics:
        """``l = 0, s = -1, b = 0``: the solver is DPM-Solver."""
        ones = torch.ones(len(log_snr), *shape, dtype=torch.float64)
        return cls(log_snr, torch.zeros_like(ones), -ones, torch.zeros_like(ones))

    def tensors(self) -> dict[str, Tensor]:
        """What makes the statistics again: ``Statistics(**tensors)``."""
        return {"log_snr": self.log_snr, "l": self.l, "s": self.s, "b": self.b}

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return tuple(self.l.shape[1:])

    @cached_property
    def spacing(self) -> float:
        """The distance of neighbouring levels in lambda."""
        return float(self.log_snr[-1].double() - self.log_snr[0].double()) / (len(self.log_snr) - 1)

    @cached_property
    def _l_integral(self) -> Tensor:
        values = self.l.double()
        return self._cumulative(values, self._slope(values))

    @cached_property
    def _s_integral(self) -> Tensor:
        values = self.s.double()
        return self._cumulative(values, self._slope(values))

    @cached_property
    def _b_slope(self) -> Tensor:
        return self._slope(self.b.double())

    def _slope(self, values: Tensor) -> Tensor:
        return torch.gradient(values, spacing=self.spacing, dim=0, edge_order=2)[0]

    def _cumulative(self, values: Tensor, slopes: Tensor) -> Tensor:
        """The integral from the first level to each, zero at the first."""
        h = self.spacing
        cells = h / 2 * (values[1:] + values[:-1]) + h**2 / 12 * (slopes[:-1] - slopes[1:])
        return torch.cat([torch.zeros_like(values[:1]), cells.cumsum(0)])

    def decay(self, s: int, t: int) -> Tensor:
        """``e^(L_s - L_t)`` between two levels of the grid."""
        return torch.exp(self._l_integral[s] - self._l_integral[t])

    def _offsets(self, s: int, t: int) -> Tensor:
        """``int_s^r e^(S_s - S) b dlambda`` at every level ``r`` from ``s`` to ``t > s``."""
        shrunk = torch.exp(self._s_integral[s] - self._s_integral[s : t + 1])
        b, rate = self.b[s : t + 1].double(), self.s[s : t + 1].double()
        return self._cumulative(shrunk * b, shrunk * (self._b_slope[s : t + 1] - rate * b))

    def seen_from(self, s: int, i: int) -> tuple[Tensor, Tensor]:
        """``(c, d)`` of ``g = c f_i + d``: what ``f`` at level ``i`` says about a step from ``s``."""
        c = torch.exp(self._s_integral[s] - self._s_integral[i])
        if i < s:
            return c, c * self._offsets(i, s)[-1]
        return c, -self._offsets(s, i)[-1]

    def step(self, s: int, t: int, n: int) -> tuple[list[Tensor], Tensor]:
        """The integrals of the step from level ``s`` to ``t``: ``int e^(L + S) (lambda - lambda_s)^k`` for ``k = 0 ..
        n-1``, and ``int e^(L + S) int e^-S b``, with L and S counted from ``s``."""
        total = self._l_integral[s : t + 1] + self._s_integral[s : t + 1]
        grown = torch.exp(total - total[0])
        rate = self.l[s : t + 1].double() + self.s[s : t + 1].double()
        gone = self.spacing * torch.arange(t + 1 - s, dtype=torch.float64).to(grown.device)
        gone = gone.reshape(-1, *[1] * (grown.ndim - 1))
        moments = []
        for k in range(n):
            slopes = grown * (rate * gone**k + (k * gone ** (k - 1) if k else 0.0))
            moments.append(self._cumulative(grown * gone**k, slopes)[-1])
        offsets = self._offsets(s, t)
        shrunk_b = torch.exp(self._s_integral[s] - self._s_integral[s : t + 1]) * self.b[s : t + 1].double()
        return moments, self._cumulative(grown * offsets, grown * (rate * offsets + shrunk_b))[-1]


def taylor(nodes: Sequence[float]) -> Tensor:
    """``[n, n]``: row ``k`` gives ``g^(k)(0) / k!`` of the polynomial through the values at ``nodes``."""
    at = torch.tensor(nodes, dtype=torch.float64)
    unit = float(at.abs().max()) or 1.0
    powers = torch.arange(len(at), dtype=torch.float64)
    return torch.linalg.inv((at[:, None] / unit) ** powers) / unit ** powers[:, None]


def divided_differences(nodes: Sequence[float]) -> Tensor:
    """``[n, n]``: row ``k`` gives ``g[nodes_0 .. nodes_k]``, which the pseudo-order solver takes for ``g^(k) / k!``."""
    n = len(nodes)
    weights = torch.zeros(n, n, dtype=torch.float64)
    for k in range(n):
        for j in range(k + 1):
            weights[k, j] = 1 / math.prod(nodes[j] - nodes[i] for i in range(k + 1) if i != j)
    return weights


@dataclass(frozen=True)
class DPMSolverV3(Solver):
    """DPM-Solver-v3 of order ``p`` = 1, 2 or 3, one call a step (paper: 2 under guidance, 3 without).

    The times of a sampling grid are moved to the nearest level of the statistics' grid; both ends must be such levels,
    unless they are pure noise or pure data, where the exact first-order step is taken.

    ``corrector`` redoes a step when the next prediction is there, without another call: "on", "off", or "half", which
    is for large guidance and corrects only at noise levels up to that of t = 0.5 on Stable Diffusion's schedule (the
    paper's text; "first-half" corrects above it, which is what the published code does).  The last step is not
    corrected.  ``pseudo_predictor`` and ``pseudo_corrector`` estimate derivatives by divided differences, steadier with
    few steps; a pseudo-order corrector has one output more than the predictor, the other one as many.  (Paper:
    predictor 3 with corrector 3 on CIFAR-10, a pseudo-order predictor at 5 calls; pseudo-order correctors elsewhere.)
    """

    centre: ClassVar[float] = 1.0

    statistics: Statistics
    p: int = 2
    corrector: Corrector = "on"
    pseudo_predictor: bool = False
    pseudo_corrector: bool = True
    lower_order_final: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.p not in (1, 2, 3):
            raise ValueError(f"DPMSolverV3: p={self.p} must be 1, 2 or 3")

    @property
    def order(self) -> int:
        predicted = min(self.p, 2) if self.pseudo_predictor else self.p
        corrected = 2 if self.pseudo_corrector else self.p
        if self.corrector in ("off", "on"):
            return predicted if self.corrector == "off" else corrected
        return min(predicted, corrected)

    def table(self, levels: Levels) -> FieldTable:
        """Raises ValueError when the grid does not fit that of the statistics, see :func:`snapped`."""
        levels, places = snapped(levels, self.statistics)
        kept = [self.kept(levels, i, places[i]) for i in range(levels.steps)]
        steps: list[Step] = []
        before: tuple[FieldRow, FieldRow] | None = None  # predictor and corrector of the last step
        for i in range(levels.steps):
            if math.isinf(levels.h(i)):
                predictor, corrector = self.exact(levels, i, kept[i]), None
            else:
                n = usable_outputs(levels, i, self.p, self.lower_order_final)
                past = list(range(i - 1, i - n, -1))
                predictor = self.row(levels, places, i, [i, *past], self.pseudo_predictor)
                corrector = self.correction(levels, places, i, past)
            row = predictor if before is None else predictor.corrected(*before)
            steps.append(Step((Stage(levels.times[i], row),)))
            before = None if corrector is None else (predictor, corrector)
        return FieldTable(levels, steps, kept)

    def kept(self, levels: Levels, i: int, place: int) -> tuple[Tensor, float] | None:
        """``f = (1 - l) x / alpha - D``; ``D`` at pure noise, where there is no ``f``."""
        if levels.log_snr[i] == -math.inf:
            return None
        return (1 - self.statistics.l[place].double()) / levels.alpha[i], -1.0

    def exact(self, levels: Levels, i: int, kept: tuple[Tensor, float] | None) -> FieldRow:
        """The step ``x_t = a x_s + c D`` from pure noise, or to pure data with ``D = p x - f``."""
        a, c = DATA.exact(levels.point(i), levels.point(i + 1))
        one = torch.ones(self.statistics.shape, dtype=torch.float64)
        if kept is None:
            return FieldRow(a * one, (c * one,), 0 * one)
        return FieldRow(a + c * kept[0], (-c * one,), 0 * one)

    def correction(self, levels: Levels, places: Sequence[int], i: int, past: Sequence[int]) -> FieldRow | None:
        """What redoes step ``i``, predicted with the outputs ``i`` and ``past``, when output ``i + 1`` is there."""
        nodes = [i, i + 1, *(past if self.pseudo_corrector else past[:-1])]
        last = i + 1 == levels.steps
        if last or not self.corrects(levels.log_snr[i + 1]) or (not self.pseudo_corrector and not past):
            return None
        again = self.row(levels, places, i, nodes, self.pseudo_corrector)
        start, new, *older = again.c
        return again._replace(c=(new, start, *older))

    def corrects(self, log_snr: float) -> bool:
        """Whether the state at this level is corrected."""
        if self.corrector in ("off", "on"):
            return self.corrector == "on"
        return (log_snr >= half_way()) == (self.corrector == "half")

    def row(self, levels: Levels, places: Sequence[int], i: int, nodes: Sequence[int], pseudo: bool) -> FieldRow:
        """Step ``i`` by the outputs at ``nodes``, the first of which is its start; coefficients in their order."""
        statistics, (s, t) = self.statistics, (places[i], places[i + 1])
        at = [statistics.spacing * (places[j] - s) for j in nodes]
        weights = divided_differences(at) if pseudo else taylor(at)
        moments, offset = statistics.step(s, t, len(nodes))
        front = levels.alpha[i + 1] * statistics.decay(s, t)
        outputs = []
        for j, node in enumerate(nodes):
            on_g = sum((moments[k] * float(weights[k, j]) for k in range(len(nodes))), torch.zeros_like(front))
            c, d = (1.0, 0.0) if node == i else statistics.seen_from(s, places[node])
            outputs.append(-front * on_g * c)
            offset = offset + on_g * d
        return FieldRow(front / levels.alpha[i], tuple(outputs), -front * offset)


def half_way() -> float:
    """Lambda at t = 0.5 of Stable Diffusion's schedule, on which the paper corrects one half of the steps: step 500 of
    1000.  A level rather than a time, so that it means the same on every schedule."""
    return float(DiscreteVP.scaled_linear().log_snr(torch.tensor(499.0, dtype=torch.float64)))


def snapped(levels: Levels, statistics: Statistics) -> tuple[Levels, list[int]]:
    """``levels`` with every finite one moved to the nearest level of the statistics' grid, and its place there (-1 at
    pure noise and pure data).

    Raises ValueError when a level lies outside of the grid, an end is not on it, or two steps meet on one level.
    """
    schedule, first, h = levels.schedule, float(statistics.log_snr[0]), statistics.spacing
    most = len(statistics.log_snr) - 1
    times, alphas, sigmas, log_snrs = map(list, (levels.times, levels.alpha, levels.sigma, levels.log_snr))
    places: list[int] = []
    for i, log_snr in enumerate(levels.log_snr):
        if math.isinf(log_snr):
            places.append(-1)
            continue
        place = round((log_snr - first) / h)
        if not 0 <= place <= most:
            raise ValueError(
                f"time {levels.times[i]:g} has half log-SNR {log_snr:.4g}, the statistics reach from {first:.4g} to "
                f"{first + most * h:.4g}: sample within, or estimate them over this range"
            )
        there = first + place * h
        if i and places[-1] == place:
            raise ValueError(
                f"times {levels.times[i - 1]:g} and {levels.times[i]:g} fall on one of the statistics' {most + 1} "
                "levels: take fewer steps, or estimate on a finer grid"
            )
        places.append(place)
        if abs(log_snr - there) <= SAME:
            continue
        time = schedule.time_at(torch.tensor(there, dtype=torch.float64))
        if i in (0, levels.steps):
            verb = "end" if i else "start"
            raise ValueError(
                f"the grid {verb}s at time {levels.times[i]:g}, which is not one of the statistics' levels: {verb} at "
                f"{float(time):g}, or at an end of the schedule"
            )
        times[i], log_snrs[i] = float(time), there
        alphas[i], sigmas[i] = float(schedule.alpha(time)), float(schedule.sigma(time))
    return Levels(schedule, tuple(times), tuple(alphas), tuple(sigmas), tuple(log_snrs)), places
