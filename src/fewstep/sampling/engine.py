"""The sampling engine: a table of coefficients, a history of model outputs, one fused update per model call.

Every training-free solver is ``x' = a x + sum_j c_j m_j + n z``: the state at the start of a step, the latest model
outputs ``m`` (data or noise predictions) and fresh noise ``z``.  The coefficients depend on the schedule and the grid
only, so a solver is a function that makes a float64 :class:`Table`, and :func:`run` is the one loop:

* a multistep solver has one :class:`Stage` a step, whose row reaches back into the history;
* a Runge-Kutta solver has several stages a step, all moving from the same start;
* a predictor-corrector has one more row, applied to the *last* step's start as soon as the new output is there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from fewstep.denoisers import Cond, Denoiser
from fewstep.randomness import Rng
from fewstep.sampling.coefficients import Levels
from fewstep.sampling.hooks import NO_HOOKS, Hooks

OutputKind = Literal["x0", "eps"]


class Row(NamedTuple):
    """``x' = a x + sum_j c[j] m_j + n z`` with the outputs ``m`` newest first."""

    a: float
    c: tuple[float, ...] = ()
    n: float = 0.0


class Stage(NamedTuple):
    """One model call at ``time`` and the row that moves the start of the step on.

    ``correct`` replaces the start of this step before the move: a row on the start of the step before, with the
    output just made as its newest.
    """

    time: float
    row: Row
    correct: Row | None = None


class Step(NamedTuple):
    """The stages of one step; ``lift`` (churn) first raises the state to the noisier time of the first stage."""

    stages: tuple[Stage, ...]
    lift: Row | None = None


class Table:
    """The steps of a solver on one grid.  ``output`` says what is kept in the history: ``"x0"`` or ``"eps"``.

    ``calls`` is the exact number of model calls, ``memory`` the number of outputs kept, ``noisy`` whether fresh
    noise is drawn.
    """

    def __init__(self, levels: Levels, steps: Iterable[Step], output: OutputKind = "x0") -> None:
        self.schedule = levels.schedule
        self.steps = tuple(steps)
        self.output = output
        stages = [stage for step in self.steps for stage in step.stages]
        self._rows = [row for step in self.steps for row in _in_order(step) if row is not None]
        self.calls = len(stages)
        self.memory = max(len(row.c) for row in self._rows)
        self.noisy = any(row.n for row in self._rows)
        self._times = torch.tensor([stage.time for stage in stages], dtype=torch.float64)
        alpha, sigma = self.schedule.alpha(self._times), self.schedule.sigma(self._times)
        self._to_eps = list(zip((1 / sigma).tolist(), (-alpha / sigma).tolist(), strict=True))

    def times(self, x: Tensor) -> tuple[Tensor, ...]:
        """The time of every call as a float64 vector ``[B]`` on the device of ``x``."""
        return self._times.to(x.device).unsqueeze(1).repeat(1, len(x)).unbind(0)

    def scales(self, x: Tensor) -> Iterator[Tensor]:
        """The ``a`` of every row in the order of use, as 0-d tensors: multiplying by one takes half the time that
        wrapping a Python number takes.  At least float32, also for states in half precision."""
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        return iter(torch.tensor([row.a for row in self._rows], dtype=kind).unbind(0))

    def stored(self, k: int, x0: Tensor, x: Tensor) -> Tensor:
        """What call ``k``, which predicted ``x0`` from ``x``, leaves in the history."""
        if self.output == "x0":
            return x0
        on_x, on_x0 = self._to_eps[k]
        return (x * on_x).add_(x0, alpha=on_x0)


def _in_order(step: Step) -> Iterator[Row | None]:
    """The rows of a step in the order of use."""
    yield step.lift
    for stage in step.stages:
        yield stage.correct
        yield stage.row


def update(row: Row, scale: Tensor, x: Tensor, outputs: Iterable[Tensor], rng: Rng | None) -> Tensor:
    """The state that ``row`` makes; ``scale`` is its ``a``."""
    new = x * scale
    for c, m in zip(row.c, outputs, strict=False):
        new.add_(m, alpha=c)
    if row.n:
        assert rng is not None  # run() refuses noisy tables without rng
        new.add_(rng.normal_like(x), alpha=row.n)
    return new


class Solver(ABC):
    """A frozen dataclass that makes a table.

    ``order`` is the order of convergence on the probability-flow ODE (1 for the stochastic ones); ``calls(steps)``
    the model calls of ``steps`` steps, one less per extra stage for every step that starts at pure noise or ends at
    pure data (``Table.calls`` is exact).  ``centre`` is the noise level ``sigma / alpha`` at the middle of the
    solver's default grid, measured (see :func:`fewstep.sampling.sample.balanced`).
    """

    output: ClassVar[OutputKind] = "x0"
    centre: ClassVar[float] = 2.0

    @property
    @abstractmethod
    def order(self) -> int:
        """The declared order of convergence."""

    def calls(self, steps: int) -> int:
        """The model calls of ``steps`` steps."""
        return steps

    @abstractmethod
    def table(self, levels: Levels) -> Table:
        """The coefficients on a grid."""


def run(
    denoiser: Denoiser,
    x: Tensor,
    table: Table,
    cond: Cond = None,
    rng: Rng | None = None,
    hooks: Hooks = NO_HOOKS,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Move ``x`` ``[B, ...]`` along a table; ``progress(done, steps)`` is told after every step.

    Differentiable in ``x`` and the denoiser's parameters in whatever gradient mode the caller is in.  Raises
    ValueError when the table was made for another schedule, or draws noise and ``rng`` is None.
    """
    if table.schedule != denoiser.schedule:
        raise ValueError(f"the table is for {table.schedule}, the denoiser lives on {denoiser.schedule}")
    if table.noisy and rng is None:
        raise ValueError("this solver draws fresh noise at its steps: pass rng")
    if hooks.start is not None:
        x = hooks.start(x)
    times, scales = table.times(x), table.scales(x)
    history: deque[Tensor] = deque(maxlen=table.memory)
    base, k = x, 0
    for i, step in enumerate(table.steps):
        if step.lift is not None:
            x = update(step.lift, next(scales), x, (), rng)
        before, base = base, x
        for stage in step.stages:
            shown, t = (x, times[k]) if hooks.input is None else hooks.input(k, x, times[k])
            m = denoiser(shown, t, cond)
            if hooks.output is not None:
                m = hooks.output(k, m, shown, t)
            m = table.stored(k, m, x)
            if hooks.history is not None:
                m = hooks.history(k, m, history)
            history.appendleft(m)
            if stage.correct is not None:
                base = update(stage.correct, next(scales), before, history, rng)
                if hooks.after is not None:
                    base = hooks.after(i - 1, base)
            x = update(stage.row, next(scales), base, history, rng)
            k += 1
        if hooks.after is not None:
            x = hooks.after(i, x)
        if progress is not None:
            progress(i + 1, len(table.steps))
    return x


def solve(
    denoiser: Denoiser,
    x: Tensor,
    times: Tensor,
    solver: Solver,
    cond: Cond = None,
    rng: Rng | None = None,
    hooks: Hooks = NO_HOOKS,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Move the state ``x`` from ``times[0]`` to ``times[-1]`` (strictly decreasing, in the schedule's own time).

    ``x`` is a state, not noise: at ``times[0]`` it has the scale of ``alpha x_0 + sigma eps``.  Raises ValueError on a
    bad grid, see :meth:`Levels.of`.
    """
    return run(denoiser, x, solver.table(Levels.of(denoiser.schedule, times)), cond, rng, hooks, progress)
