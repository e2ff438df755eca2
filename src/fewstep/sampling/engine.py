"""The sampling engine: a table of coefficients, a history of model outputs, one fused update per model call.

Every training-free solver is ``x' = a x + sum_j c_j m_j + n z``: the state at the start of a step, the latest model
outputs ``m`` (data or noise predictions) and fresh noise ``z``.  The coefficients depend on the schedule and the grid
only, so a solver is a function that makes a float64 :class:`Table`, and :func:`run` is the one loop:

* a multistep solver has one :class:`Stage` a step, whose row reaches back into the history;
* a Runge-Kutta or single-step solver has several stages a step, all moving from the same start;
* a predictor-corrector's row also puts right the step before, now that the output at its end is there
  (:meth:`Row.corrected`);
* a solver whose coefficients differ from pixel to pixel has a :class:`FieldTable`.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from typing import ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor

from fewstep.denoisers import Cond, Denoiser, check_prediction
from fewstep.grids import balanced, check_grid
from fewstep.randomness import Noise
from fewstep.sampling.coefficients import Levels, OutputKind
from fewstep.sampling.hooks import NO_HOOKS, Hooks
from fewstep.sampling.rows import AnyRow, FieldRow, Row
from fewstep.schedules import Schedule
from fewstep.values import check_fields

#: What a call leaves in the history: ``p x + q D`` for ``(p, q)``, ``x + q D`` for ``q``, ``D`` for None.
Kept = tuple[Tensor, float] | float | None
#: Which noise prediction is kept beside the history: the first one, or that of the call before.
Anchor = Literal["first", "previous"]
Interval = tuple[float, float] | None


class Stage(NamedTuple):
    """One model call at ``time`` and the row that moves the start of the step on."""

    time: float
    row: AnyRow


class Step(NamedTuple):
    """The stages of one step; ``lift`` (churn) first raises the state to the noisier time of the first stage."""

    stages: tuple[Stage, ...]
    lift: Row | None = None


#: A row made ready for a state: the row, its ``a`` as a tensor, and the two values of lambda between which its noise is
#: drawn (None: apart from all else).
Move = tuple[AnyRow, Tensor, Interval]


class Table:
    """The steps of a solver on one grid.

    ``output`` says what is kept in the history: ``"x0"``, ``"eps"`` (the data prediction all the same at pure noise,
    which says nothing about it), or one :data:`Kept` per call.  Noise predictions are kept as ``sigma eps``, which
    takes one operation, and the rows in use (``rows``) are for those.  ``calls`` is the exact number of model calls,
    ``memory`` the number of outputs kept, ``noisy`` whether fresh noise is drawn.
    """

    #: Whether coefficients differ from element to element of a sample.
    by_element: ClassVar[bool] = False

    def __init__(
        self,
        levels: Levels,
        steps: Iterable[Step],
        output: OutputKind | Sequence[Kept] = "x0",
        anchor: Anchor | None = None,
    ) -> None:
        self.schedule = levels.schedule
        self.steps = tuple(steps)
        self.anchor = anchor
        stages = [stage for step in self.steps for stage in step.stages]
        self.rows = [row for step in self.steps for row in _in_order(step)]
        self.calls = len(stages)
        self.memory = max(len(row.c) for row in self.rows)
        self.noisy = any(row.n for row in self.rows)
        self._output = output
        self._last_log_snr = levels.log_snr[-1]
        self._times = torch.tensor([stage.time for stage in stages], dtype=torch.float64)
        if output == "eps":
            self.rows = self._on_scaled_noise()
        self._scales: dict[torch.dtype, tuple[Tensor, ...]] = {}

    def to(self, device: torch.device | str) -> Table:
        """The same table with everything made that a run needs, on a device: :func:`run` then copies nothing between
        devices and makes nothing on the way, which a captured or compiled trajectory needs."""
        table = copy.copy(self)
        table._times = self._times.to(device)
        table.place_rows(torch.device(device))
        vars(table)["_to_eps"] = [(on_x.to(device), on_x0) for on_x, on_x0 in self._to_eps]
        vars(table)["_kept"] = [(k[0].to(device), k[1]) if isinstance(k, tuple) else k for k in self._kept]
        vars(table)["_intervals"] = self._intervals
        return table

    def times(self, x: Tensor) -> tuple[Tensor, ...]:
        """The time of every call as a float64 vector ``[B]`` on the device of ``x``."""
        return self._times.to(x.device).unsqueeze(1).repeat(1, len(x)).unbind(0)

    def moves(self, x: Tensor) -> Iterator[Move]:
        """The rows in the order of use.  A scale is a 0-d tensor, because multiplying by one takes half the time that
        wrapping a Python number takes."""
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        intervals = self._intervals if self.noisy else [None] * len(self.rows)
        return zip(*self.rows_for(kind, x.device), intervals, strict=True)

    def rows_for(self, kind: torch.dtype, device: torch.device) -> tuple[Sequence[AnyRow], Sequence[Tensor]]:
        """The rows in the order of use, and their scales in the type of a state."""
        return self.rows, self._scale(kind)

    def place_rows(self, device: torch.device) -> None:
        """Bring what :meth:`rows_for` gives to a device."""
        kinds = (torch.float32, torch.float64)
        self._scales = {kind: torch.stack(self._scale(kind)).to(device).unbind(0) for kind in kinds}

    def _scale(self, kind: torch.dtype) -> tuple[Tensor, ...]:
        if kind not in self._scales:
            self._scales[kind] = torch.tensor([row.a for row in self.rows], dtype=kind).unbind(0)
        return self._scales[kind]

    @cached_property
    def _to_eps(self) -> list[tuple[Tensor, float]]:
        alpha, sigma = self.schedule.alpha(self._times), self.schedule.sigma(self._times)
        return list(zip((1 / sigma).unbind(0), (-alpha / sigma).tolist(), strict=True))

    @cached_property
    def _kept(self) -> list[Kept]:
        if self._output == "x0":
            return [None] * self.calls
        if self._output == "eps":
            return [-alpha or None for alpha in self.schedule.alpha(self._times).tolist()]
        return list(self._output)

    def _on_scaled_noise(self) -> list[AnyRow]:
        """The rows for a history of ``sigma eps`` in place of ``eps``."""
        found: list[AnyRow] = []
        scales: list[float] = []  # of the outputs in the history, the newest first
        sigmas, kept = iter(self.schedule.sigma(self._times).tolist()), iter(self._kept)
        for step in self.steps:
            if step.lift is not None:
                found.append(step.lift)
            for stage in step.stages:
                sigma = next(sigmas)
                scales.insert(0, 1.0 if next(kept) is None else sigma)
                found.append(stage.row.on_scaled(scales))
        return found

    @cached_property
    def _intervals(self) -> list[Interval]:
        """Between which values of lambda each row moves: from the start of its step to the next stage or the end.  None
        for lifts, which go back over levels that have had their noise."""
        found: list[Interval] = []
        log_snr = deque([*self.schedule.log_snr(self._times).tolist(), self._last_log_snr])
        for step in self.steps:
            start = log_snr[0]
            if step.lift is not None:
                found.append(None)
            for _ in step.stages:
                log_snr.popleft()  # the next stage, the next step, or the end
                found.append((start, log_snr[0]))
        return found

    def stored(self, k: int, x0: Tensor, x: Tensor) -> Tensor:
        """What call ``k``, which predicted ``x0`` from ``x``, leaves in the history."""
        kept = self._kept[k]
        if kept is None:
            return x0
        if isinstance(kept, float):
            return x.add(x0, alpha=kept)
        on_x, on_x0 = kept
        return (x * on_x.to(x)).add_(x0, alpha=on_x0)

    def eps(self, k: int, x0: Tensor, x: Tensor) -> Tensor:
        """The noise prediction of call ``k``."""
        on_x, on_x0 = self._to_eps[k]
        return (x * on_x).add_(x0, alpha=on_x0)


class FieldTable(Table):
    """A table of :class:`FieldRow` rows."""

    by_element: ClassVar[bool] = True
    rows: list[FieldRow]  # type: ignore[assignment]

    def rows_for(self, kind: torch.dtype, device: torch.device) -> tuple[Sequence[AnyRow], Sequence[Tensor]]:
        rows = [row.placed(kind, device) for row in self.rows]
        return rows, [row.a for row in rows]

    def place_rows(self, device: torch.device) -> None:
        self.rows = [row.placed(torch.float64, device) for row in self.rows]


def _in_order(step: Step) -> Iterator[AnyRow]:
    """The rows of a step in the order of use."""
    if step.lift is not None:
        yield step.lift
    for stage in step.stages:
        yield stage.row


def moved(how: Move, x: Tensor, outputs: Iterable[Tensor], noise: Noise | None, anchor: Tensor | None) -> Tensor:
    """The state that a row makes of ``x``."""
    row, scale, interval = how
    new = row.add_to(x * scale, outputs)
    if row.anchor:
        assert anchor is not None  # the row was made for a table that keeps one
        new.add_(anchor, alpha=row.anchor)
    if row.n:
        assert noise is not None  # run() refuses noisy tables without noise
        new.add_(noise.normal_like(x) if interval is None else noise.increment(x, *interval), alpha=row.n)
    return new


class Solver(ABC):
    """A frozen dataclass that makes a table.

    ``order`` is the order of convergence of a whole run on the probability-flow ODE, on any grid (1 for the stochastic
    ones): a step of low order at the start or the end counts, although a start at pure noise hides it for long.
    ``calls(steps)`` are the model calls of ``steps`` steps, one less per extra stage for every step that starts at pure
    noise or ends at pure data (``Table.calls`` is exact).  ``centre`` is the noise level ``sigma / alpha`` at the
    middle of the solver's own grid, measured.
    """

    centre: ClassVar[float] = 2.0
    #: Whether it finds its steps as it goes, and so has no table.
    adaptive: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """ValueError for a hyper-parameter of another type than its field's, or not finite."""
        check_fields(self)

    @property
    @abstractmethod
    def order(self) -> int:
        """The declared order of convergence."""

    @property
    def least_steps(self) -> int:
        """The fewest steps in which the solver is what its name says."""
        return 1

    def calls(self, steps: int) -> int:
        """The model calls of ``steps`` steps."""
        return steps

    @property
    def usual_steps(self) -> int:
        """The steps of a run where nobody says how many."""
        return 10

    def grid(self, schedule: Schedule, steps: int, shift: float = 1.0) -> Tensor:
        """The times ``[steps + 1]`` of the solver's own grid; ``shift`` multiplies its noise levels, as flow pipelines
        ask for."""
        return balanced(schedule, steps, self.centre * shift)

    def fitted_to(self, model: Denoiser) -> Self:
        """The same solver with what it leaves open filled in for a model."""
        return self

    def for_noise_prediction(self) -> Self:
        """The same solver with what it leaves open filled in for a network that predicts noise and of which nothing
        else is known."""
        return self

    @abstractmethod
    def table(self, levels: Levels) -> Table:
        """The coefficients on a grid."""

    def move(
        self,
        denoiser: Denoiser,
        x: Tensor,
        times: Tensor,
        cond: Cond = None,
        rng: Noise | None = None,
        hooks: Hooks = NO_HOOKS,
        progress: Callable[[int, int], None] | None = None,
        denoise: bool = False,
    ) -> Tensor:
        """Move the state ``x`` along the times of a grid, here along the solver's table; ``denoise`` adds a step to
        pure data.  Otherwise as :func:`run`."""
        table = table_for(self, denoiser.schedule, tuple(times.tolist()), denoise)
        return run(denoiser, x, table, cond, rng, hooks, progress)


def run(
    denoiser: Denoiser,
    x: Tensor,
    table: Table,
    cond: Cond = None,
    rng: Noise | None = None,
    hooks: Hooks = NO_HOOKS,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Move ``x`` ``[B, ...]`` along a table; ``progress(done, steps)`` is told after every step.  ``rng`` is where
    fresh noise comes from: an :class:`~fewstep.randomness.Rng`, or a :class:`~fewstep.sampling.brownian.BrownianPath`.

    Differentiable in ``x`` and the denoiser's parameters in whatever gradient mode the caller is in.  Raises
    ValueError when the table was made for another schedule, or draws noise and ``rng`` is None.

    A state in half precision is kept in float32 between the calls, as its fresh noise and the hooks' tensors are; the
    denoiser is called in half precision, and the end is given back in it.
    """
    if table.schedule != denoiser.schedule:
        raise ValueError(f"the table is for {table.schedule}, the denoiser lives on {denoiser.schedule}")
    if table.noisy and rng is None:
        raise ValueError("this solver draws fresh noise at its steps: pass rng")
    if hooks.start is not None:
        x = hooks.start(x)
    kind = x.dtype
    call: Callable[[Tensor, Tensor, Cond], Tensor] = denoiser
    if kind in HALF:
        x, call = x.float(), in_half(denoiser, kind)
    times, moves = table.times(x), table.moves(x)
    history: deque[Tensor] = deque(maxlen=table.memory)
    anchor: Tensor | None = None
    k = 0
    for i, step in enumerate(table.steps):
        if step.lift is not None:
            x = moved(next(moves), x, (), rng, None)
        base = x
        for _ in step.stages:
            shown, t = (x, times[k]) if hooks.input is None else hooks.input(k, x, times[k])
            x0 = call(shown, t, cond)
            if k == 0:
                check_prediction(x0, x)
            if hooks.output is not None:
                x0 = hooks.output(k, x0, shown, t)
            m = table.stored(k, x0, x)
            if hooks.history is not None:
                m = hooks.history(k, m, history)
            history.appendleft(m)
            new = moved(next(moves), base, history, rng, anchor)
            if table.anchor is not None and (k == 0 or table.anchor == "previous"):
                anchor = table.eps(k, x0, x)
            x = new
            k += 1
        if hooks.after is not None:
            x = hooks.after(i, x)
        if progress is not None:
            progress(i + 1, len(table.steps))
    return x.to(kind)


#: Coefficients of noise predictions leave float16 at both ends of a grid, and cancel there to less than its rounding.
HALF = (torch.float16, torch.bfloat16)


def in_half(denoiser: Denoiser, kind: torch.dtype) -> Callable[[Tensor, Tensor, Cond], Tensor]:
    """A denoiser that is called in half precision, for states in float32."""

    def called(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        x0 = denoiser(x.to(kind), t, cond)
        check_prediction(x0, x)
        return x0.float()

    return called


@lru_cache(maxsize=64)
def table_for(solver: Solver, schedule: Schedule, times: tuple[float, ...], denoise: bool = False) -> Table:
    """The table of a solver on a grid, made once for equal arguments; ``denoise`` adds a step to pure data."""
    levels = Levels.of(schedule, torch.tensor(times, dtype=torch.float64))
    return solver.table(levels.denoised() if denoise else levels)


def solve(
    denoiser: Denoiser,
    x: Tensor,
    times: Tensor,
    solver: Solver,
    cond: Cond = None,
    rng: Noise | None = None,
    hooks: Hooks = NO_HOOKS,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Move the state ``x`` from ``times[0]`` to ``times[-1]`` (strictly decreasing, in the schedule's own time).

    ``x`` is a state, not noise: at ``times[0]`` it has the scale of ``alpha x_0 + sigma eps``.  Raises ValueError on a
    bad grid, see :meth:`Levels.of`.
    """
    return solver.move(denoiser, x, check_grid(times), cond, rng, hooks, progress)
