"""DPM-Solver-12 and -23: steps as long as the error allows.

Every step is made by two single-step updates that share their calls, of order p - 1 and p (Lu et al. 2022,
"DPM-Solver", appendix C).  Their difference is the error of the lower one; the higher one goes on.  There is no table:
where the network is called depends on what it says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.denoisers import Cond, Denoiser, check_prediction
from fewstep.grids import check_grid, reach
from fewstep.randomness import Noise
from fewstep.sampling.coefficients import DATA, NOISE, Form, Levels, Point
from fewstep.sampling.engine import HALF, Solver, Table, in_half, moved
from fewstep.sampling.hooks import NO_HOOKS, Hooks
from fewstep.sampling.rows import Row
from fewstep.sampling.solvers.dpm_solver import inner_rows
from fewstep.schedules import LOG_SNR_BOUND, Schedule
from fewstep.values import real

#: More refusals in a row than any error that falls with the step asks for.
MOST_TRIES = 100


@dataclass(frozen=True)
class AdaptiveDPMSolver(Solver):
    """DPM-Solver-12 (``p = 2``) and -23 (``p = 3``); with ``form=DATA`` the same of DPM-Solver++.

    A step is accepted when the error of every sample, ``|x_high - x_low| / max(atol, rtol |x|)`` in root mean square,
    is at most 1, and the next is ``safety error^(-1/p)`` times as long; ``first`` is the first, in lambda.  A tried
    step costs p calls, p - 1 after a refusal.  All samples take the steps that the worst one needs, so sample k depends
    on those drawn with it.

    The times of a grid are stops; its own grid has none on the way, and ``steps`` is left out.  A step from pure noise
    or to pure data is the exact first order one.
    """

    usual_steps: ClassVar[int] = 1
    adaptive: ClassVar[bool] = True

    p: int = 3
    form: Form = NOISE
    rtol: float = 0.05
    atol: float = 0.0078
    first: float = 0.05
    safety: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.p not in (2, 3):
            raise ValueError(f"AdaptiveDPMSolver: p={self.p} must be 2 (DPM-Solver-12) or 3 (DPM-Solver-23)")
        for name, most in (("rtol", 1.0), ("atol", 1.0), ("first", 10.0), ("safety", 1.0)):
            real(f"AdaptiveDPMSolver: {name}", getattr(self, name), 1e-12, most)

    @property
    def order(self) -> int:
        """Of the steps."""
        return self.p

    def calls(self, steps: int) -> int:
        """The model calls of ``steps`` accepted steps."""
        return self.p * steps

    def grid(self, schedule: Schedule, steps: int, shift: float = 1.0) -> Tensor:
        """Pure noise, the noise levels 80 and 0.002, pure data: those of them that the schedule reaches."""
        if steps != self.usual_steps:
            raise ValueError(
                f"steps={steps}: DPM-Solver-{self.p - 1}{self.p} finds its own; leave steps out and set rtol and atol"
            )
        ends = torch.tensor([schedule.t_max, schedule.t_min], dtype=torch.float64)
        finite = schedule.log_snr(ends).abs() < LOG_SNR_BOUND
        inner = torch.where(finite, ends, schedule.time_at(-reach(schedule, None).log()))
        start = inner[:1] if bool(finite[0]) else torch.stack([ends[0], inner[0]])
        return check_grid(torch.cat([start, inner[1:], ends.new_tensor([schedule.data_time])]))

    def table(self, levels: Levels) -> Table:
        raise ValueError(
            f"DPM-Solver-{self.p - 1}{self.p} finds its steps as it goes and has no table: fs.sample and solve() take "
            "it, schedulers and searches do not"
        )

    def judged(self, error: float, h: float) -> tuple[bool, float]:
        """Whether a step of length ``h`` is accepted, and how long the next one is."""
        return error <= 1, self.safety * h * max(error, 1e-10) ** (-1 / self.p)

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
        """``progress(done, 100)`` is told the share of the way in lambda, in hundredths, after every step."""
        levels = Levels.of(denoiser.schedule, times)
        levels = levels.denoised() if denoise else levels
        finite = [value for value in levels.log_snr if math.isfinite(value)]
        calls = Calls(denoiser, x, cond, hooks)
        x, h, done = calls.start, self.first, 0
        for i in range(levels.steps):
            at, low = Place(levels, i, 0.0), x
            while not at.arrived:
                if math.isinf(levels.h(i)):
                    at, x = at.end, self.leap(at, x, calls)
                else:
                    at, x, low, h = self.stepped(at, x, low, h, calls)
                x = x if hooks.after is None else hooks.after(done, x)
                done += 1
                if progress is not None:
                    share = (at.point.log_snr - finite[0]) / max(finite[-1] - finite[0], 1e-9)
                    progress(round(100 * min(max(share, 0.0), 1.0)), 100)
        return x.to(calls.kind)

    def leap(self, at: Place, x: Tensor, calls: Calls) -> Tensor:
        """The exact step of first order from pure noise, or to pure data."""
        form = DATA if at.point.log_snr == -math.inf else self.form
        a, c = form.exact(at.point, at.end.point)
        return applied(Row(a, (c,)), x, [calls.output(x, at, form, [])])

    def stepped(self, at: Place, x: Tensor, low: Tensor, h: float, calls: Calls) -> tuple[Place, Tensor, Tensor, float]:
        """The next place, with the states of higher and lower order there, and the length of the step after it."""
        here = calls.output(x, at, self.form, [])
        for _ in range(MOST_TRIES):
            length = min(h, at.left)
            inner = [at.further(length * r / self.p) for r in range(1, self.p)]
            end, outputs = at.further(length), [here]
            rows = self.rows(at, [*inner, end])
            for row, place in zip(rows, inner, strict=False):
                outputs.insert(0, calls.output(applied(row, x, outputs), place, self.form, outputs))
            higher = applied(rows[-1], x, outputs)
            lower = applied(self.rows(at, [*inner[:-1], end])[-1], x, outputs[1:])
            error = self.error(lower, higher, low)
            if not math.isfinite(error):
                raise ValueError(f"the step from time {at.time:g} is not finite: the denoiser's predictions are not")
            accepted, h = self.judged(error, length)
            if accepted:
                return end, higher, lower, h
        raise ValueError(f"no step from time {at.time:g} is short enough: raise rtol={self.rtol} or atol={self.atol}")

    def rows(self, start: Place, others: Sequence[Place]) -> list[Row]:
        """The rows of a single step through these places."""
        return inner_rows([start.point, *(place.point for place in others)], self.form, "dpmsolver")

    def error(self, lower: Tensor, higher: Tensor, before: Tensor) -> float:
        """The largest of the samples' root mean square errors, in units of what is tolerated."""
        tolerated = (self.rtol * torch.maximum(lower.abs(), before.abs())).clamp_min(self.atol)
        return float(((higher - lower) / tolerated).flatten(1).square().mean(1).sqrt().max())


@dataclass(frozen=True)
class Place:
    """Where a run stands: so far in lambda beyond time ``i`` of its grid."""

    levels: Levels
    i: int
    way: float

    @property
    def left(self) -> float:
        """What is left in lambda up to the next time of the grid."""
        return self.levels.h(self.i) - self.way

    @property
    def arrived(self) -> bool:
        return self.way == self.levels.h(self.i)

    @property
    def end(self) -> Place:
        """The next time of the grid."""
        return Place(self.levels, self.i, self.levels.h(self.i))

    def further(self, length: float) -> Place:
        """The place that is so much cleaner; the end when it is as good as there."""
        return self.end if length >= self.left * (1 - 1e-9) else Place(self.levels, self.i, self.way + length)

    @cached_property
    def level(self) -> tuple[float, Point]:
        """Time and noise level."""
        if self.way == 0 or self.arrived:
            k = self.i + self.arrived
            return self.levels.times[k], self.levels.point(k)
        return self.levels.inside(self.i, self.way / self.levels.h(self.i))

    @property
    def time(self) -> float:
        return self.level[0]

    @property
    def point(self) -> Point:
        return self.level[1]


class Calls:
    """The calls of one run, under its hooks; states in half precision are kept in float32 (see
    :func:`~fewstep.sampling.run`)."""

    def __init__(self, denoiser: Denoiser, x: Tensor, cond: Cond, hooks: Hooks) -> None:
        self.start = x if hooks.start is None else hooks.start(x)
        self.kind, self.cond, self.hooks, self.made = self.start.dtype, cond, hooks, 0
        self.denoiser: Callable[[Tensor, Tensor, Cond], Tensor] = denoiser
        if self.kind in HALF:
            self.start, self.denoiser = self.start.float(), in_half(denoiser, self.kind)

    def output(self, x: Tensor, at: Place, form: Form, past: Sequence[Tensor]) -> Tensor:
        """What a call leaves for the rows of a step: a data or a noise prediction."""
        hooks, k = self.hooks, self.made
        t = torch.full((len(x),), at.time, dtype=torch.float64, device=x.device)
        shown, t = (x, t) if hooks.input is None else hooks.input(k, x, t)
        x0 = self.denoiser(shown, t, self.cond)
        check_prediction(x0, x)
        if hooks.output is not None:
            x0 = hooks.output(k, x0, shown, t)
        self.made += 1
        m = x0 if form == DATA else (x - at.point.alpha * x0) / at.point.sigma
        return m if hooks.history is None else hooks.history(k, m, past)


def applied(row: Row, x: Tensor, outputs: Sequence[Tensor]) -> Tensor:
    """The state that a row makes of ``x``."""
    return moved((row, torch.tensor(row.a, dtype=x.dtype), None), x, outputs, None, None)
