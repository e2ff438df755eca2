"""ABM: Adams-Bashforth-Moulton in a variable that is finite at both ends of every schedule.

With ``rho = sigma / alpha`` and ``v = rho / (rho + c)``, ``c`` about the scale of the data, the probability flow has
the exact solution

    x_t = (sigma_t / sigma_s) x_s + sigma_t / c  int_v_t^v_s D(v) / v^2 dv        (data prediction)
    x_t = (alpha_t / alpha_s) x_s + alpha_t c  int_v_s^v_t eps(v) / (1 - v)^2 dv     (noise prediction)

on every schedule.  ``v`` is 1 at pure noise and 0 at pure data (with ``c = 1`` it is flow matching's own time), so the
prediction at either end is an ordinary point of the polynomial; in lambda, where DPM-Solver++ and UniPC have theirs,
it is infinitely far away.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from torch import Tensor

from fewstep.denoisers import Denoiser, half_level_of, predicts_noise
from fewstep.grids import balanced
from fewstep.guidance import guidance_scale
from fewstep.sampling.coefficients import DATA, NOISE, Form, Levels, Point, gauss_legendre, vandermonde
from fewstep.sampling.rows import Row
from fewstep.sampling.solvers.multistep import PredictorCorrector
from fewstep.sampling.solvers.stochastic import check_eta
from fewstep.schedules import Schedule

#: The half level where it is not known (see :func:`fewstep.sampling.search.half_level`).
USUAL = 1.4
#: What counts as the half level of a network that predicts noise, where it is not known.
NOISE_PREDICTION_LEVEL = 6.0


def order_for(steps: int, guidance: float = 1.0) -> int:
    """The order ``p`` that did best for a number of steps and a guidance scale, measured (``docs/systems/abm.md``):
    extrapolation needs steps that are short beside the scale on which the prediction changes, and guidance makes that
    scale shorter."""
    w = max(guidance, 1.0)
    return 1 if steps < 3 * w**0.5 else 2 if steps < 12.5 * w**0.3 else 4


def too_large(weights: list[float]) -> bool:
    """Whether an extrapolation multiplies errors by more than 7.  Equal steps have 6.7 at order 4, the solver's own
    grid 6.3; grids whose steps in ``v`` grow have 10 to 30, and a lower order there when ``p`` is left open."""
    return sum(map(abs, weights)) > 7 * abs(sum(weights))


def scale_for(half_level: float | None, guidance: float = 1.0, guided: float | None = None) -> float:
    """``c`` for a model: the geometric mean of its half levels without guidance and with it (``guided``).  One that is
    not known counts as 1.4, and as 1.4 times the guidance scale."""
    w = max(guidance, 1.0)
    if w == 1:
        return half_level or USUAL
    return math.sqrt((half_level or USUAL) * (guided or USUAL * w))


@dataclass(frozen=True)
class ABM(PredictorCorrector):
    """The polynomial in ``v`` through the latest ``p`` = 1 to 4 predictions, integrated exactly; when the next one is
    there, the step is made again with the polynomial through ``p + 1``, at no further call.

    ``c`` is the noise level ``sigma / alpha`` at ``v = 1/2``; it should be that at which half of the prediction is
    decided (:func:`fewstep.sampling.search.half_level`).  ``p`` and ``c`` that are None are chosen for the number of
    steps and the ``guidance`` scale that the model is sampled with (:func:`order_for`, :func:`scale_for`), the order
    for the grid too (:func:`too_large`).  ``eta`` is the share of the reverse SDE (data prediction, no corrector): the
    weight becomes ``(1 + eta) (rho_t / rho)^eta`` of the above, and fresh noise keeps the marginals.  A step to pure
    data is the prediction itself.

    Ours.  The construction is UniPC's (Zhao et al. 2023) with another variable; its nearest published relative is CAB
    (Roy & Nair 2026, arXiv 2605.16736), Adams-Bashforth on the velocity in the time of ``c = 1``.
    """

    p: int | None = None
    c: float | None = None
    corrector: bool = True
    form: Form = DATA
    eta: float = 0.0
    guidance: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.p not in (None, 1, 2, 3, 4):
            raise ValueError(f"ABM: p={self.p} must be 1, 2, 3, 4 or None (by the number of steps)")
        if self.c is not None and not self.c > 0:
            raise ValueError(f"ABM: c={self.c} must be a positive noise level sigma / alpha, or None")
        check_eta("ABM", self.eta)
        if self.eta and (self.form == NOISE or self.corrector):
            raise ValueError(f"ABM: eta={self.eta} needs form=DATA and corrector=False")

    @property
    def scale(self) -> float:
        """``c``, or what stands in for it."""
        return scale_for(None, self.guidance) if self.c is None else self.c

    def fitted_to(self, model: Denoiser) -> Self:
        """What is left open is the guidance that the model is under, and its scale."""
        solver = replace(self, guidance=max(self.guidance, guidance_scale(model)))
        if self.c is not None:
            return solver
        if half_level_of(model) is None and predicts_noise(model):
            return solver.for_noise_prediction()
        return replace(solver, c=scale_for(half_level_of(model), solver.guidance))

    def for_noise_prediction(self) -> Self:
        """Data predictions of such a network have large errors at high noise, which calls spent there correct and high
        orders multiply: a scale of 6 and order 2 did best (``benchmarks/beta_grids.py``)."""
        if self.c is not None:
            return self
        return replace(self, c=scale_for(NOISE_PREDICTION_LEVEL, self.guidance), p=self.p or 2)

    @property
    def order(self) -> int:
        """Of a run: a start of lower order holds the third order and above back, and an open order changes with the
        grid."""
        if self.eta:
            return 1
        if self.p is None:
            return 2
        return min(self.p + 1, 3) if self.corrector else min(self.p, 2)

    def grid(self, schedule: Schedule, steps: int, shift: float = 1.0) -> Tensor:
        """``v`` falls as a square."""
        return balanced(schedule, steps, self.scale * shift, kappa=2.0)

    @property
    def outputs(self) -> int:
        return 2 if self.p is None else self.p

    def usable(self, levels: Levels, i: int) -> int:
        """Predictions of the data count at pure noise too; those of the noise say nothing there."""
        if self.form == NOISE:
            return super().usable(levels, i)
        p = order_for(levels.steps, self.guidance) if self.p is None else self.p
        if levels.sigma[i + 1] == 0:
            return 1
        return min(p, i + 1, levels.steps - i if self.lower_order_final else p)

    def rows(self, levels: Levels, i: int, outputs: int) -> tuple[Row, Row | None]:
        s, t = levels.point(i), levels.point(i + 1)
        if t.sigma == 0 and self.form == DATA:
            return Row(0.0, (t.alpha,)), None
        v, end = self.v(s), self.v(t)
        nodes = [(v - self.v(levels.point(i - j))) / (v - end) for j in range(outputs)]  # 0 now, 1 at the end
        a, moments = self.moments(s, t, outputs + 1)
        while self.p is None and outputs > 2 and too_large(vandermonde(nodes, moments[:outputs])):
            outputs -= 1
            nodes, moments = nodes[:outputs], moments[: outputs + 1]
        if self.eta:  # exp(-inf) at pure noise: the SDE forgets the state
            decay = math.exp(-self.eta * levels.h(i))
            a *= decay
            moments[0] = t.alpha - a * s.alpha  # what a constant prediction gives, exactly
            fresh = t.sigma * math.sqrt(1 - decay**2)
            return Row(a, tuple(vandermonde(nodes, moments[:outputs])), fresh), None
        predictor = Row(a, tuple(vandermonde(nodes, moments[:outputs])))
        if not self.corrector:
            return predictor, None
        return predictor, Row(a, tuple(vandermonde([1.0, *nodes], moments)))

    def v(self, point: Point) -> float:
        """The variable of the polynomial at a level."""
        return point.sigma / (point.sigma + self.scale * point.alpha)

    def moments(self, s: Point, t: Point, n: int) -> tuple[float, list[float]]:
        """``a`` of the step, and its integrals with ``u^k``, k < n, in the place of the prediction: ``u`` is 0 at ``s``
        and 1 at ``t``.

        Quadrature in ``log v`` (data) or ``log (1 - v)`` (noise), where the integrands are sums of exponentials.
        """
        v, end = self.v(s), self.v(t)
        nodes, weights = gauss_legendre()
        if self.form == DATA:
            a, length = t.sigma / s.sigma, math.log(v / end)
            level = end * np.exp(length * nodes)
            density = (t.sigma / self.scale * length) * weights / level
            if self.eta:
                ratio = end / (1 - end) * (1 - level) / level  # rho_t / rho
                density = density * (1 + self.eta) * ratio**self.eta
        else:
            a, length = t.alpha / s.alpha, math.log((1 - end) / (1 - v))
            level = 1 - (1 - end) * np.exp(-length * nodes)
            density = (-t.alpha * self.scale * length) * weights / (1 - level)
        u, found = (v - level) / (v - end), []
        for _ in range(n):
            found.append(float(density.sum()))
            density = density * u
        return a, found
