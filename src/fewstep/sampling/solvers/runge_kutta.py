"""Runge-Kutta solvers: a Butcher tableau, and the variable in which the flow is integrated.

In the frame :data:`RATIO` the probability-flow ODE reads ``d(x / alpha) / d(sigma / alpha) = eps`` on every schedule
(Song et al. 2021, DDIM, eq. 14; rhoRK of DEIS): there Heun's method is EDM's sampler (Karras et al. 2022, algorithm
1).  In the frame :data:`NATIVE` it is ``dx/dt = velocity`` in the schedule's own time, in which straight flows are
sampled.

Both right-hand sides are linear in the state and the data prediction, so each stage is a row on the start of the step
and the outputs so far, and the tableau is composed into rows in float64 before sampling starts.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.sampling.coefficients import DATA, Levels, Point, tensor
from fewstep.sampling.engine import Solver, Stage, Step, Table
from fewstep.sampling.rows import Row
from fewstep.sampling.solvers.stochastic import NO_CHURN, Churn
from fewstep.schedules import Schedule


@dataclass(frozen=True)
class Tableau:
    """An explicit Butcher tableau: stage ``j`` sits at ``nodes[j]`` and starts from the slopes before it with
    ``inner[j]``; the step is ``weights``."""

    order: int
    nodes: tuple[float, ...]
    inner: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        stages = len(self.nodes)
        shape_fits = len(self.weights) == len(self.inner) == stages and all(
            len(row) == j for j, row in enumerate(self.inner)
        )
        if not shape_fits or self.nodes[0] != 0:
            raise ValueError(f"an explicit tableau of {stages} nodes needs as many weights and inner rows of 0, 1, ...")


EULER = Tableau(1, (0,), ((),), (1,))
MIDPOINT = Tableau(2, (0, 1 / 2), ((), (1 / 2,)), (0, 1))
HEUN2 = Tableau(2, (0, 1), ((), (1,)), (1 / 2, 1 / 2))
KUTTA3 = Tableau(3, (0, 1 / 2, 1), ((), (1 / 2,), (-1, 2)), (1 / 6, 4 / 6, 1 / 6))
HEUN3 = Tableau(3, (0, 1 / 3, 2 / 3), ((), (1 / 3,), (0, 2 / 3)), (1 / 4, 0, 3 / 4))
RALSTON3 = Tableau(3, (0, 1 / 2, 3 / 4), ((), (1 / 2,), (0, 3 / 4)), (2 / 9, 1 / 3, 4 / 9))
HOUWEN3 = Tableau(3, (0, 8 / 15, 2 / 3), ((), (8 / 15,), (1 / 4, 5 / 12)), (1 / 4, 0, 3 / 4))
SSP3 = Tableau(3, (0, 1, 1 / 2), ((), (1,), (1 / 4, 1 / 4)), (1 / 6, 1 / 6, 2 / 3))
RK4 = Tableau(4, (0, 1 / 2, 1 / 2, 1), ((), (1 / 2,), (0, 1 / 2), (0, 0, 1)), (1 / 6, 1 / 3, 1 / 3, 1 / 6))


class Frame(ABC):
    """Variables ``y = scale(t) x`` and ``u = clock(t)`` in which the flow is integrated, ``dy/du = p x + q D``."""

    @abstractmethod
    def clock(self, schedule: Schedule, t: Tensor) -> Tensor:
        """``u`` at time ``t``."""

    @abstractmethod
    def time(self, schedule: Schedule, u: Tensor) -> Tensor:
        """The inverse of :meth:`clock`."""

    @abstractmethod
    def scale(self, schedule: Schedule, t: Tensor) -> Tensor:
        """``y / x`` at time ``t``."""

    @abstractmethod
    def slope(self, schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
        """``(p, q)`` at time ``t``."""


@dataclass(frozen=True)
class Ratio(Frame):
    """``y = x / alpha``, ``u = sigma / alpha``, ``dy/du = eps = (x - alpha D) / sigma``."""

    def clock(self, schedule: Schedule, t: Tensor) -> Tensor:
        return schedule.ratio(t)

    def time(self, schedule: Schedule, u: Tensor) -> Tensor:
        return schedule.time_at(-u.log())

    def scale(self, schedule: Schedule, t: Tensor) -> Tensor:
        return 1 / schedule.alpha(t)

    def slope(self, schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = schedule.sigma(t)
        return 1 / sigma, -schedule.alpha(t) / sigma


@dataclass(frozen=True)
class Native(Frame):
    """``y = x``, ``u = t``, ``dx/dt = alpha' D + sigma' eps``."""

    def clock(self, schedule: Schedule, t: Tensor) -> Tensor:
        return t

    def time(self, schedule: Schedule, u: Tensor) -> Tensor:
        return u

    def scale(self, schedule: Schedule, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def slope(self, schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
        growth = schedule.d_sigma(t) / schedule.sigma(t)
        return growth, schedule.d_alpha(t) - growth * schedule.alpha(t)


RATIO, NATIVE = Ratio(), Native()


@dataclass(frozen=True)
class RungeKutta(Solver):
    """A tableau in a frame; ``churn`` raises the noise before each step (EDM's stochastic sampler, algorithm 2).

    ``calls`` is stages times steps.  A step that ends at pure data, or in the ratio frame starts at pure noise, is the
    exact first-order step and costs one call: EDM's Heun on a grid that ends at 0 makes ``2 steps - 1`` calls.
    """

    tableau: Tableau
    frame: Frame = RATIO
    churn: Churn = NO_CHURN

    @property
    def order(self) -> int:
        return self.tableau.order

    def calls(self, steps: int) -> int:
        return len(self.tableau.nodes) * steps

    def table(self, levels: Levels) -> Table:
        starts, lifts = self.churn.lifts(levels)
        times, rows = self._stages(levels, starts)
        steps = []
        for i in range(levels.steps):
            from_noise = levels.log_snr[i] == -math.inf and self.frame == RATIO
            if from_noise or levels.log_snr[i + 1] == math.inf:
                a, c = DATA.exact(_point(levels.schedule, starts[i]), levels.point(i + 1))
                stages: tuple[Stage, ...] = (Stage(starts[i], Row(a, (c,))),)
            else:
                stages = tuple(Stage(t, row) for t, row in zip(times[i], rows[i], strict=True))
            steps.append(Step(stages, lifts[i]))
        return Table(levels, steps)

    def _stages(self, levels: Levels, starts: tuple[float, ...]) -> tuple[list[list[float]], list[list[Row]]]:
        """Times and rows ``[steps][stages]``; not finite at the singular levels, which :meth:`table` replaces.

        ``form[j] = [steps, 1 + stages]`` writes the state at stage ``j`` as a combination of the start of the step and
        the stages' data predictions.
        """
        schedule, frame, tableau = levels.schedule, self.frame, self.tableau
        start, end = tensor(starts), tensor(levels.times[1:])
        first, last = frame.clock(schedule, start), frame.clock(schedule, end)
        du, scale_start = last - first, frame.scale(schedule, start)
        width = 1 + len(tableau.nodes)

        def unit(j: int) -> Tensor:
            return torch.nn.functional.one_hot(torch.tensor(j), width).double()

        def moved(weights: tuple[float, ...], t: Tensor) -> Tensor:
            y = scale_start[:, None] * unit(0)
            for b, slope in zip(weights, slopes, strict=True):
                y = y + (b * du)[:, None] * slope
            return y / frame.scale(schedule, t)[:, None]

        slopes: list[Tensor] = []
        forms, times = [], []
        for j, node in enumerate(tableau.nodes):
            # the ends of the step are used as they are given, not through clock and back
            ends = {0: start, 1: end}
            t = ends[int(node)] if node in (0, 1) else frame.time(schedule, first + node * du)
            form = moved(tableau.inner[j], t)
            p, q = frame.slope(schedule, t)
            slopes.append(p[:, None] * form + q[:, None] * unit(1 + j))
            forms.append(form)
            times.append(t)
        forms.append(moved(tableau.weights, end))
        values = torch.stack(forms[1:], dim=1).tolist()  # [steps][stages][1 + stages]
        rows = [
            [Row(form[0], tuple(form[j + 1 : 0 : -1])) for j, form in enumerate(step)] for step in values
        ]  # the outputs so far, newest first
        return torch.stack(times, dim=1).tolist(), rows


def _point(schedule: Schedule, t: float) -> Point:
    """The level of a time that need not be on the grid (churn)."""
    time = torch.tensor(t, dtype=torch.float64)
    return Point(float(schedule.alpha(time)), float(schedule.sigma(time)), float(schedule.log_snr(time)))
