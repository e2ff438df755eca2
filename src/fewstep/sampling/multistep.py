"""Multistep solvers in data prediction: DPM-Solver++ 2M and UniPC.

One model call a step; the row reaches back into the history.  A solver gives the row of step ``i`` for the number of
outputs that may be used there; the warm-up, the end and the two singular levels are handled once, in
:class:`Multistep`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from fewstep.sampling.coefficients import Levels, first_order, psi, vandermonde
from fewstep.sampling.engine import Row, Solver, Stage, Step, Table


def usable_outputs(levels: Levels, i: int, most: int, lower_order_final: bool) -> int:
    """How many outputs the row of step ``i`` may use: what the history holds, 1 on a step of infinite length.

    An output made at pure noise (lambda = -inf) is infinitely far away and carries no slope.  ``lower_order_final``
    falls to first order over the last steps.
    """
    if math.isinf(levels.h(i)):
        return 1
    first = 1 if levels.log_snr[0] == -math.inf else 0
    return min(most, i + 1 - first, levels.steps - i if lower_order_final else most)


@dataclass(frozen=True)
class Multistep(Solver):
    """A solver with one call a step.

    ``lower_order_final`` lets the last steps use 2 and then 1 outputs: steadier with few steps, one order lost
    asymptotically from order 3 on.
    """

    lower_order_final: bool = False

    @property
    @abstractmethod
    def outputs(self) -> int:
        """The most model outputs that a row uses."""

    @abstractmethod
    def row(self, levels: Levels, i: int, outputs: int) -> Row:
        """Step ``i`` from the latest ``outputs`` model outputs; ``outputs = 1`` must hold at singular levels too."""

    def table(self, levels: Levels) -> Table:
        steps = []
        for i in range(levels.steps):
            row = self.row(levels, i, usable_outputs(levels, i, self.outputs, self.lower_order_final))
            steps.append(Step((Stage(levels.times[i], row),)))
        return Table(levels, steps, self.output)


@dataclass(frozen=True)
class DPMSolverPP2M(Multistep):
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), its "dpmsolver" kind::

        x_t = (sigma_t / sigma_s) x_s + alpha_t psi_0 (m_0 + (m_0 - m_1) / (2 r)),   r = h_last / h

    With :class:`DPMSolverPP2MTaylor` it is the "midpoint" of diffusers; k-diffusion's ``dpmpp_2m`` is this one.
    """

    centre: ClassVar[float] = 1.0

    @property
    def order(self) -> int:
        return 2

    @property
    def outputs(self) -> int:
        return 2

    def slope_weight(self, h: float) -> float:
        """The weight of ``h dD/dlambda``."""
        return psi(0, h)[0] / 2

    def row(self, levels: Levels, i: int, outputs: int) -> Row:
        a, c = first_order(levels, i)
        if outputs == 1:
            return Row(a, (c,))
        h, h_last = levels.h(i), levels.h(i - 1)
        slope = levels.alpha[i + 1] * self.slope_weight(h) * h / h_last
        return Row(a, (c + slope, -slope))


@dataclass(frozen=True)
class DPMSolverPP2MTaylor(DPMSolverPP2M):
    """DPM-Solver++(2M), "taylor" kind ("heun" in diffusers): the slope is integrated exactly, with ``psi_1`` in the
    place of ``psi_0 / 2``."""

    def slope_weight(self, h: float) -> float:
        return psi(1, h)[1]


@dataclass(frozen=True)
class UniPC(Multistep):
    """UniPC-p in data prediction (Zhao et al. 2023, algorithms 5 to 8), p = 1, 2, 3, ...

    The predictor extrapolates the last p outputs; when the next output is there, the corrector redoes the step with it
    and the model is *not* called again, so p + 1 orders cost one call a step.  ``variant`` is the paper's B(h): "bh1"
    is h, "bh2" is exp(h) - 1 (h negative here).  The linear systems are solved as in the paper but for its two
    shortcuts, weight 1/2 where there is a single node, which are all that tells the variants apart.
    The last step, and a step of infinite length, are not corrected.
    """

    centre: ClassVar[float] = 1.0

    p: int = 2
    variant: Literal["bh1", "bh2"] = "bh2"
    corrector: bool = True
    lower_order_final: bool = True

    def __post_init__(self) -> None:
        if self.p < 1:
            raise ValueError(f"UniPC: p={self.p} must be at least 1")
        if self.variant not in ("bh1", "bh2"):
            raise ValueError(f"UniPC: variant={self.variant!r} must be 'bh1' or 'bh2'")

    @property
    def order(self) -> int:
        return self.p + 1 if self.corrector else self.p

    @property
    def outputs(self) -> int:
        return self.p

    def row(self, levels: Levels, i: int, outputs: int) -> Row:
        """The predictor."""
        return self._rows(levels, i, outputs)[0]

    def _rows(self, levels: Levels, i: int, outputs: int) -> tuple[Row, Row | None]:
        """Predictor and corrector of step ``i``; no corrector where the step has infinite length."""
        a, c = first_order(levels, i)
        h = levels.h(i)
        if math.isinf(h):
            return Row(a, (c,)), None
        scale = h if self.variant == "bh1" else -math.expm1(-h)
        # where the older outputs lie, in steps from the current one (negative), and what the weights must integrate
        nodes = [(levels.log_snr[i - j] - levels.log_snr[i]) / h for j in range(1, outputs)]
        moments = [math.factorial(k) * value / scale for k, value in enumerate(psi(outputs, h))][1:]

        def weights(nodes: list[float]) -> list[float]:
            """The coefficients of ``m_j - m_0`` for outputs at ``nodes``."""
            solved = [0.5] if len(nodes) == 1 else vandermonde(nodes, moments[: len(nodes)])
            return [levels.alpha[i + 1] * scale * w / r for w, r in zip(solved, nodes, strict=True)]

        past = weights(nodes)
        predictor = Row(a, (c - sum(past), *past))
        if not self.corrector:
            return predictor, None
        *past, new = weights([*nodes, 1.0])
        return predictor, Row(a, (new, c - sum(past) - new, *past))

    def table(self, levels: Levels) -> Table:
        steps: list[Step] = []
        correct: Row | None = None
        for i in range(levels.steps):
            outputs = usable_outputs(levels, i, self.p, self.lower_order_final)
            row, correct_next = self._rows(levels, i, outputs)
            steps.append(Step((Stage(levels.times[i], row, correct),)))
            correct = correct_next
        return Table(levels, steps)
