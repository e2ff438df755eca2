"""What multistep solvers share: one model call a step, and a row that reaches back into the history.

A solver gives the row of step ``i`` for the number of outputs that may be used there; the warm-up, the end and the two
singular levels are handled once, in :class:`Multistep`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

from fewstep.sampling.coefficients import DATA, NOISE, Form, Levels
from fewstep.sampling.engine import Solver, Stage, Step, Table
from fewstep.sampling.rows import Row


def usable_outputs(levels: Levels, i: int, most: int, lower_order_final: bool) -> int:
    """How many outputs a polynomial in lambda may use at step ``i``: what the history holds, 1 on a step of infinite
    length.

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
    asymptotically from order 3 on.  ``form`` says what the history holds, data or noise predictions.
    """

    lower_order_final: bool = False

    @property
    def form(self) -> Form:
        """How the step is written; a field where a solver comes in both forms."""
        return DATA

    @property
    def least_steps(self) -> int:
        """The length of the history.  A single step of a solver that looks one back is DDIM, and often asked for."""
        return self.outputs if self.outputs > 2 else 1

    @property
    def order(self) -> int:
        """Of a run: the first step has one output, and a single step of first order holds a run at second."""
        return min(self.outputs, 2)

    @property
    @abstractmethod
    def outputs(self) -> int:
        """The most model outputs that a row uses."""

    @abstractmethod
    def row(self, levels: Levels, i: int, outputs: int) -> Row:
        """Step ``i`` from the latest ``outputs`` model outputs; ``outputs = 1`` must hold at singular levels too."""

    def usable(self, levels: Levels, i: int) -> int:
        """How many outputs the row of step ``i`` may use."""
        return usable_outputs(levels, i, self.outputs, self.lower_order_final)

    def step(self, levels: Levels, i: int) -> Row:
        """The row of step ``i``; from pure noise, where a noise prediction says nothing, that of the data form."""
        if self.form == NOISE and levels.log_snr[i] == -math.inf:
            a, c = DATA.exact(levels.point(i), levels.point(i + 1))
            return Row(a, (c,))
        return self.row(levels, i, self.usable(levels, i))

    def chain(self, levels: Levels) -> list[Row]:
        """The rows of all steps."""
        return [self.step(levels, i) for i in range(levels.steps)]

    def table(self, levels: Levels) -> Table:
        steps = [Step((Stage(t, row),)) for t, row in zip(levels.times[:-1], self.chain(levels), strict=True)]
        return Table(levels, steps, self.form.output)


@dataclass(frozen=True)
class PredictorCorrector(Multistep):
    """A multistep predictor whose step is made again, from where it started, once the next output is there: one order
    more at no further call.  The last step is not corrected."""

    @abstractmethod
    def rows(self, levels: Levels, i: int, outputs: int) -> tuple[Row, Row | None]:
        """Predictor and corrector of step ``i``, which must hold at singular levels too and scale the state alike;
        None leaves a step as it is."""

    def row(self, levels: Levels, i: int, outputs: int) -> Row:
        """The predictor."""
        return self.rows(levels, i, outputs)[0]

    def chain(self, levels: Levels) -> list[Row]:
        found: list[Row] = []
        before: tuple[Row, Row] | None = None  # predictor and corrector of the last step
        for i in range(levels.steps):
            corrector: Row | None = None
            if self.form == NOISE and levels.log_snr[i] == -math.inf:
                predictor = self.step(levels, i)
            else:
                predictor, corrector = self.rows(levels, i, self.usable(levels, i))
            found.append(predictor if before is None else predictor.corrected(*before))
            before = None if corrector is None else (predictor, corrector)
        return found
