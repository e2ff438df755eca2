"""DPM-Solver++ and DPM-Solver: exponential integrators in lambda, multistep and single-step, ODE and SDE.

A step integrates a Taylor polynomial of the prediction exactly, ``x_t = a x_s + sum_k w_k h^k m^(k)``, with ``a`` and
``w_k`` of the chosen :class:`~fewstep.sampling.coefficients.Form`: data prediction is DPM-Solver++ (Lu et al. 2022,
"Fast Solver for Guided Sampling"), noise prediction DPM-Solver (Lu et al. 2022).  Solvers differ in how they estimate
the derivatives: from past outputs (:class:`DPMSolver1` and its children) or from outputs inside the step
(:class:`Single`).  The "dpmsolver" kind of the official code puts ``w_0 / 2`` in the place of ``w_1``, the "taylor"
kind is exact ("midpoint" and "heun" in diffusers).

With ``eta > 0`` the multistep solvers follow the reverse SDE: the exponent is ``(1 + eta) h``, and fresh noise of
standard deviation ``sigma_t sqrt(1 - exp(-2 eta h))`` keeps the marginals exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from fewstep.sampling.coefficients import DATA, NOISE, Form, Levels, Point
from fewstep.sampling.engine import Solver, Stage, Step, Table
from fewstep.sampling.rows import Row
from fewstep.sampling.solvers.multistep import Multistep
from fewstep.sampling.solvers.stochastic import check_eta

Kind = Literal["dpmsolver", "taylor"]


@dataclass(frozen=True)
class DPMSolver1(Multistep):
    """First order: DDIM for ``eta = 0``, the ancestral step of DDPM for ``eta = 1``.  In between it is not DDIM(eta),
    which shares the noise out differently.

    The base of the multistep family: derivatives from past outputs, ``eta`` the share of the reverse SDE (1: all of
    it).  The official code has ``lower_order_final`` True, in runs of fewer than ten steps.
    """

    centre: ClassVar[float] = 1.0

    form: Form = DATA
    eta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_eta(type(self).__name__, self.eta)
        if self.eta and self.form == NOISE:
            raise ValueError(f"{type(self).__name__}: eta={self.eta} needs form=DATA, the SDE solvers predict data")

    @property
    def order(self) -> int:
        return 1 if self.eta else super().order

    @property
    def outputs(self) -> int:
        return 1

    def derivatives(self, levels: Levels, i: int, outputs: int, w: list[float]) -> list[float]:
        """What ``sum_k w_k h^k m^(k)``, k >= 1, gives to each of the latest ``outputs`` outputs, two or more."""
        return [0.0] * outputs  # the polynomial of first order is a constant

    def row(self, levels: Levels, i: int, outputs: int) -> Row:
        s, t, h = levels.point(i), levels.point(i + 1), levels.h(i)
        if math.isinf(h):  # eta = 0 must not meet 0 * inf; the SDE forgets x_s altogether
            a, c = self.form.exact(s, t) if self.eta == 0 else (0.0, t.alpha)
            return Row(a, (c,), t.sigma if self.eta else 0.0)
        a, w = self.form.step(s, t, outputs - 1, self.eta)
        first, *older = [0.0] if outputs == 1 else self.derivatives(levels, i, outputs, w)
        return Row(a, (w[0] + first, *older), t.sigma * math.sqrt(-math.expm1(-2 * self.eta * h)))


@dataclass(frozen=True)
class DPMSolverPP2M(DPMSolver1):
    """DPM-Solver++(2M) (algorithm 2), its "dpmsolver" kind::

        x_t = (sigma_t / sigma_s) x_s + alpha_t psi_0 (m_0 + (m_0 - m_1) / (2 r)),   r = h_last / h

    The "midpoint" of diffusers; k-diffusion's ``dpmpp_2m`` is this one, and with ``eta`` its ``dpmpp_2m_sde``.
    """

    @property
    def outputs(self) -> int:
        return 2

    def slope_weight(self, w: list[float]) -> float:
        """The weight of ``h dm/dlambda``."""
        return w[0] / 2

    def derivatives(self, levels: Levels, i: int, outputs: int, w: list[float]) -> list[float]:
        slope = self.slope_weight(w) * levels.h(i) / levels.h(i - 1)
        return [slope, -slope]


@dataclass(frozen=True)
class DPMSolverPP2MTaylor(DPMSolverPP2M):
    """DPM-Solver++(2M), "taylor" kind ("heun" in diffusers): the slope is integrated exactly, with ``w_1``."""

    def slope_weight(self, w: list[float]) -> float:
        return w[1]


@dataclass(frozen=True)
class DPMSolverPP3M(DPMSolverPP2MTaylor):
    """DPM-Solver++(3M) with the second derivative of the Taylor expansion, ``2 (d_0 - d_1) / (r_0 + r_1)``.

    The official code leaves out the 2 and is of second order (:class:`DPMSolverPP3MPublished`); this is of third, and
    equal to UniP-3.
    """

    curvature: ClassVar[float] = 2.0

    @property
    def outputs(self) -> int:
        return 3

    def derivatives(self, levels: Levels, i: int, outputs: int, w: list[float]) -> list[float]:
        if outputs == 2:
            return super().derivatives(levels, i, outputs, w)
        r0, r1 = levels.h(i - 1) / levels.h(i), levels.h(i - 2) / levels.h(i)
        # d_0 = (m_0 - m_1) / r_0 and d_1 = (m_1 - m_2) / r_1, in units of h
        slope, bend = w[1], w[2] * self.curvature / (r0 + r1)
        on_d0 = slope * (1 + r0 / (r0 + r1)) + bend
        on_d1 = -slope * r0 / (r0 + r1) - bend
        return [on_d0 / r0, on_d1 / r1 - on_d0 / r0, -on_d1 / r1]


@dataclass(frozen=True)
class DPMSolverPP3MPublished(DPMSolverPP3M):
    """DPM-Solver++(3M) as the official code and its ports compute it, for reproduction: the second derivative is half
    of the Taylor one, and the warm-up step is of the "dpmsolver" kind.  Second order."""

    curvature: ClassVar[float] = 1.0

    def slope_weight(self, w: list[float]) -> float:
        return w[0] / 2


def inner_rows(points: Sequence[Point], form: Form, kind: Kind) -> list[Row]:
    """The rows of one single-step update through ``points``: the start, no or one or two inner levels, the end.

    Orders 1, 2 and 3 (DPM-Solver, algorithms 1 to 3; DPM-Solver++, algorithm 1).  Each row moves the start on; outputs
    newest first.
    """
    s, *inner, t = points
    if not inner:
        a, c = form.exact(s, t)
        return [Row(a, (c,))]
    h = t.log_snr - s.log_snr
    r = [(p.log_snr - s.log_snr) / h for p in inner]
    rows = inner_rows([s, inner[0]], form, kind)
    a, w = form.step(s, t, 2)
    if len(inner) == 1:
        slope = (w[0] / 2 if kind == "dpmsolver" else w[1]) / r[0]
        return [*rows, Row(a, (slope, w[0] - slope))]
    a2, w2 = form.step(s, inner[1], 1)
    slope = w2[1] * r[1] / r[0]
    rows.append(Row(a2, (slope, w2[0] - slope)))
    if kind == "dpmsolver":
        slope = w[1] / r[1]
        return [*rows, Row(a, (slope, 0.0, w[0] - slope))]
    # D' and D'' of the parabola through the three outputs, from d_k = (m_k - m_s) / r_k
    gap = r[1] - r[0]
    on_d1, on_d2 = (w[1] * r[1] - 2 * w[2]) / gap, (2 * w[2] - w[1] * r[0]) / gap
    return [*rows, Row(a, (on_d2 / r[1], on_d1 / r[0], w[0] - on_d1 / r[0] - on_d2 / r[1]))]


@dataclass(frozen=True)
class Single(Solver):
    """Single-step solvers of order p = 2 or 3, with p calls a step at equal distances in lambda.

    ``Single(2)`` and ``Single(3)`` are DPM-Solver++(2S) and (3S), with ``form=NOISE`` DPM-Solver-2 and -3;
    ``Single(2, NOISE)`` is k-diffusion's and diffusers' DPM2.  A step from pure noise or to pure data is the exact
    first order one and costs one call.
    """

    p: int = 2
    form: Form = DATA
    kind: Kind = "dpmsolver"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.p not in (2, 3):
            raise ValueError(f"{type(self).__name__}: p={self.p} must be 2 or 3")

    @property
    def order(self) -> int:
        return self.p

    def calls(self, steps: int) -> int:
        return self.p * steps

    def table(self, levels: Levels) -> Table:
        steps = []
        for i in range(levels.steps):
            inside = [] if math.isinf(levels.h(i)) else [levels.inside(i, k / self.p) for k in range(1, self.p)]
            points = [levels.point(i), *(point for _, point in inside), levels.point(i + 1)]
            form = DATA if levels.log_snr[i] == -math.inf else self.form
            times = [levels.times[i], *(time for time, _ in inside)]
            steps.append(Step(tuple(map(Stage, times, inner_rows(points, form, self.kind)))))
        return Table(levels, steps, self.form.output)


@dataclass(frozen=True)
class Fast(Single):
    """Single-step updates on the points of the grid itself, so that N steps make N calls: the official driver
    "singlestep".

    Steps are taken p at a time, the rest at lower orders at the end: K mod 3 = 0, 1, 2 ends in [2, 1], [1], [2].  A
    step from pure noise or to pure data stands alone.
    """

    p: int = 3

    @property
    def order(self) -> int:
        """Of a run, whose last step may be of first order."""
        return 2

    def calls(self, steps: int) -> int:
        return steps

    @property
    def least_steps(self) -> int:
        return self.p

    def groups(self, levels: Levels) -> list[int]:
        """How many steps of the grid each update covers."""
        from_noise = int(levels.log_snr[0] == -math.inf)
        to_data = int(levels.log_snr[-1] == math.inf and levels.steps > from_noise)
        whole, rest = divmod(levels.steps - from_noise - to_data, self.p)
        tail = [rest] if rest else []
        if self.p == 3 and not rest and whole and not to_data:
            whole, tail = whole - 1, [2, 1]
        return [1] * from_noise + [self.p] * whole + tail + [1] * to_data

    def table(self, levels: Levels) -> Table:
        steps, i = [], 0
        for size in self.groups(levels):
            points = [levels.point(j) for j in range(i, i + size + 1)]
            form = DATA if levels.log_snr[i] == -math.inf else self.form
            steps.append(Step(tuple(map(Stage, levels.times[i : i + size], inner_rows(points, form, self.kind)))))
            i += size
        return Table(levels, steps, self.form.output)


def ancestral(s: Point, t: Point, eta: float) -> tuple[Point, float]:
    """The level below ``t`` that a step goes down to, and the noise that lifts it back: k-diffusion's ancestral split,
    in units of ``rho = sigma / alpha``, ``up = eta rho_t sqrt(1 - rho_t^2 / rho_s^2)``."""
    share = -math.expm1(2 * (s.log_snr - t.log_snr))
    rho = t.sigma / t.alpha
    up = min(rho, eta * rho * math.sqrt(share))
    down = math.sqrt(max(rho**2 - up**2, 0.0))
    return Point(t.alpha, t.alpha * down, -math.log(down) if down else math.inf), t.alpha * up


@dataclass(frozen=True)
class Ancestral(Solver):
    """A second-order single step down to a level below the next one, then noise up to it: k-diffusion's
    ``dpmpp_2s_ancestral``, and ``dpm_2_ancestral`` with ``form=NOISE``.  Two calls a step, one to pure data."""

    form: Form = DATA
    eta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_eta(type(self).__name__, self.eta)

    @property
    def order(self) -> int:
        return 1 if self.eta else 2

    def calls(self, steps: int) -> int:
        return 2 * steps

    def table(self, levels: Levels) -> Table:
        steps = []
        for i in range(levels.steps):
            s, t = levels.point(i), levels.point(i + 1)
            down, up = ancestral(s, t, self.eta)
            if s.log_snr == -math.inf or down.log_snr == math.inf:
                a, c = (DATA if s.log_snr == -math.inf else self.form).exact(s, down)
                stages: tuple[Stage, ...] = (Stage(levels.times[i], Row(a, (c,), up)),)
            else:
                stages = self.stages(levels, i, down, up)
            steps.append(Step(stages))
        return Table(levels, steps, self.form.output)

    def stages(self, levels: Levels, i: int, down: Point, up: float) -> tuple[Stage, ...]:
        """The two calls of step ``i``, of finite length: its middle lies half way to the lower level."""
        s = levels.point(i)
        time, middle = levels.inside(i, (down.log_snr - s.log_snr) / levels.h(i) / 2)
        first, last = inner_rows([s, middle, down], self.form, "dpmsolver")
        return Stage(levels.times[i], first), Stage(time, last._replace(n=up))


@dataclass(frozen=True)
class DPMSolverPPSDE(Ancestral):
    """DPM-Solver++ SDE, k-diffusion's ``dpmpp_sde`` with r = 1/2: both halves are ancestral."""

    def stages(self, levels: Levels, i: int, down: Point, up: float) -> tuple[Stage, ...]:
        s = levels.point(i)
        time, middle = levels.inside(i, 0.5)
        lower, lift = ancestral(s, middle, self.eta)
        (first,) = inner_rows([s, lower], self.form, "dpmsolver")
        a, c = self.form.exact(s, down)
        return Stage(levels.times[i], first._replace(n=lift)), Stage(time, Row(a, (c, 0.0), up))
