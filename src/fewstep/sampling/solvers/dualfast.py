"""DualFast: a solver whose zeroth-order term uses a noise prediction extrapolated away from a noisier one.

    eps_new = (1 + c) eps(x_t, t) - c eps(x_tau, tau),      tau noisier than t, on the trajectory

(Yu et al. 2025, "DualFast: Dual-Speedup Framework for Fast Sampling of Diffusion Models", from the abstract and
second-hand accounts; there is no public code.)  The exact first-order step moves the state by ``e`` times the noise
prediction, ``e = sigma_t - (alpha_t / alpha_s) sigma_s``, in either form, so on top of any solver the method is one
more term: ``e c (eps_t - eps_tau)``.

What the authors call less approximation error is, for a perfect network, an Adams-Bashforth correction: with the
previous prediction and ``c = 1/2`` DDIM becomes iPNDM-2.  Which ``c`` helps depends on the base solver, the number of
steps and the network's bias, so the defaults are measured on an exact mixture, and zero for second-order solvers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from fewstep.sampling.coefficients import DATA, NOISE, Levels
from fewstep.sampling.engine import Anchor, Solver, Stage, Step, Table
from fewstep.sampling.rows import Row
from fewstep.sampling.solvers.multistep import Multistep
from fewstep.sampling.solvers.stochastic import DDIM
from fewstep.values import real

#: The best constant ``c`` with the previous prediction on DDIM, by number of steps; it tends to 1/2.
BEST = {5: 0.8, 10: 0.65, 20: 0.55}


def best_weight(steps: int) -> float:
    """The measured weight for DDIM and the previous prediction, log-linear between 5, 10 and 20 steps, towards 1/2
    beyond."""
    if steps <= 5:
        return BEST[5]
    if steps >= 20:
        return 0.5 + (BEST[20] - 0.5) * 20 / steps
    low = 5 if steps < 10 else 10
    share = math.log(steps / low) / math.log(2)
    return BEST[low] + share * (BEST[2 * low] - BEST[low])


@dataclass(frozen=True)
class DualFast(Solver):
    """``base`` with the mixed noise prediction in its zeroth-order term.

    ``anchor`` is the noisier prediction: that of the call before ("previous") or the very first ("first").  ``ramp``
    says how the weight ``c`` runs over the steps: "constant", or "linear" from 0 at the first step to ``weight`` at the
    last; None is constant with the previous prediction, linear with the first.  ``weight``, -10 to 10, is ``c``; None
    takes the measured one for DDIM (with the first prediction ``4 / steps``) and 0 for other bases.  The first step, a
    step from pure noise and one to pure data are the base's own.
    """

    base: Multistep = field(default_factory=DDIM)
    anchor: Anchor = "previous"
    weight: float | None = None
    ramp: Literal["constant", "linear"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight is not None:
            real("DualFast: weight", self.weight, -10, 10)

    @property
    def order(self) -> int:
        """First on DDIM, where its own weights tend to Adams-Bashforth 2, which is of second for equal steps.  A fixed
        weight breaks a higher order, and on the first prediction, which does not come closer as the steps become many,
        convergence itself."""
        if self.weight:
            return 1 if self.anchor == "previous" else 0
        return self.base.order

    def weights(self, steps: int) -> list[float]:
        """``c`` of every step."""
        top = self.weight
        if top is None:
            top = 0.0 if type(self.base) is not DDIM else 4 / steps if self.anchor == "first" else best_weight(steps)
        linear = self.anchor == "first" if self.ramp is None else self.ramp == "linear"
        return [0.0, *(top * (i / (steps - 1) if linear else 1.0) for i in range(1, steps))]

    def table(self, levels: Levels) -> Table:
        steps = []
        for i, (row, c) in enumerate(zip(self.base.chain(levels), self.weights(levels.steps), strict=True)):
            mixed = row if not c or math.isinf(levels.h(i)) else self.mixed(row, levels, i, c)
            steps.append(Step((Stage(levels.times[i], mixed),)))
        return Table(levels, steps, self.base.form.output, self.anchor)

    def mixed(self, row: Row, levels: Levels, i: int, c: float) -> Row:
        """``row`` plus ``e c (eps_i - anchor)``, with ``eps_i`` written in what the history holds."""
        s = levels.point(i)
        _, e = NOISE.exact(s, levels.point(i + 1))
        first, *older = row.c
        if self.base.form == DATA:  # eps = (x - alpha D) / sigma
            return Row(row.a + e * c / s.sigma, (first - e * c * s.alpha / s.sigma, *older), row.n, -e * c)
        return Row(row.a, (first + e * c, *older), row.n, -e * c)
