"""Which noise levels a pipeline asks a scheduler for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.hub.scheduler_config import ORIGINAL
from fewstep.hub.schedulers import FLOW, Reading
from fewstep.sampling.coefficients import Levels
from fewstep.sampling.engine import Solver
from fewstep.sampling.named import named_times

#: Schedulers that keep no noise levels, only the steps of the table that they visit.
TIMESTEPS_ONLY = (
    "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler",
    "DDPMParallelScheduler", "LCMScheduler", "PNDMScheduler", "TCDScheduler",
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """A solver's grid, or what is asked for in its place, as the times of ``original``, the scheduler of diffusers that
    is replaced.  ``grid`` and ``clean`` as in :func:`fewstep.hub.as_scheduler`."""

    original: Any
    reading: Reading
    solver: Solver
    grid: str | list[float] | None
    clean: bool

    @property
    def training_steps(self) -> int:
        """How many steps the network was trained on."""
        return int(self.original.config.num_train_timesteps)

    def levels(
        self, steps: int, timesteps: Sequence[float] | None, sigmas: Sequence[float] | None, mu: float | None
    ) -> Levels:
        """The grid of ``steps`` steps, or of the ``timesteps`` or ``sigmas`` that a pipeline was called with; ``mu`` is
        its resolution-dependent shift."""
        if timesteps is not None:
            return self._through(self.time(timesteps))
        flow = type(self.original).__name__ in FLOW  # only these shift given sigmas in ways of their own
        asked = sigmas is not None and not _uniform(sigmas, self.training_steps)
        if self.grid == ORIGINAL and (flow or not asked):
            return self._through(self._original_times(steps, sigmas if flow else None, mu))
        if sigmas is not None and asked:
            given = torch.as_tensor(sigmas).cpu().double()
            return self._through(self.reading.times_at(given, self.shift(mu)))
        schedule = self.reading.schedule
        if self.grid is None:
            times = self.solver.grid(schedule, steps, self.shift(mu))
        else:
            grid = self.grid if isinstance(self.grid, str) else torch.tensor(self.grid, dtype=torch.float64)
            times = named_times(schedule, self.solver, steps, grid)
        return self._to_end(times[:-1], float(times[-1]))

    def _through(self, calls: Tensor) -> Levels:
        return self._to_end(calls.double(), self.reading.schedule.t_min)

    def _to_end(self, calls: Tensor, last: float) -> Levels:
        """The levels that are called at ``calls``, and the end: pure data or, with ``clean=False``, the time ``last``
        (on a table of betas its first level, where that is pure data)."""
        schedule = self.reading.schedule
        end = schedule.data_time if self.clean else last
        if not self.clean and schedule.data_time < 0:
            end = max(last, schedule.t_min)
        calls = calls[calls > end]
        return Levels.of(schedule, torch.cat([calls, calls.new_tensor([end])]))

    def shift(self, mu: float | None) -> float:
        """The factor by which the pipeline wants its noise levels ``t / (1 - t)`` larger (flow matching)."""
        config = self.original.config
        if mu is None or not config.get("use_dynamic_shifting"):
            return self.reading.shift
        return math.exp(mu) if config.time_shift_type == "exponential" else mu

    def time(self, timestep: Tensor | Sequence[float] | float) -> Tensor:
        """The schedule's time, float64, of a time as the network sees it, in float32."""
        time = self.reading.time(torch.as_tensor(timestep).cpu().double())
        for end in (self.reading.schedule.t_min, self.reading.schedule.t_max):
            time = torch.where((time - end).abs() <= 1e-6 * end, end, time)
        return time

    def _original_times(self, steps: int, sigmas: Sequence[float] | None, mu: float | None) -> Tensor:
        """The times at which the replaced scheduler would call the network."""
        name, config, made = type(self.original).__name__, self.original.config, self.original
        extra: dict[str, Any] = {"mu": mu} if config.get("use_dynamic_shifting") else {}
        if sigmas is not None:
            made.set_timesteps(sigmas=sigmas, **extra)
        else:
            made.set_timesteps(steps, **extra)
        if name in TIMESTEPS_ONLY:
            return made.timesteps.double().unique().flip(0)
        levels = made.sigmas[:-1].double().unique_consecutive()
        levels = levels[levels > 0]
        return self.reading.times_at(levels)

    def unshifted(self, timesteps: Any, sigmas: Any) -> bool:
        """Whether ``timesteps`` are flow matching's ``sigmas`` as the network sees them."""
        if type(self.original).__name__ not in FLOW or len(timesteps) != len(sigmas):
            return False
        return bool(torch.allclose(self.time(timesteps), torch.as_tensor(sigmas).double().cpu(), atol=1e-6))


def _uniform(sigmas: Sequence[float], steps: int) -> bool:
    """Whether ``sigmas`` are what flow pipelines pass when nobody gave any, before any shift: ``1 .. 1/n``, or ``1`` to
    the first of the ``steps`` of training, in whole steps."""
    n, given = len(sigmas), torch.as_tensor(sigmas).double().cpu()
    ends = {1 / n: 1e-6, 1 / steps: 1.001 / steps}
    return any(
        torch.allclose(given, torch.linspace(1, end, n, dtype=torch.float64), rtol=0, atol=slack)
        for end, slack in ends.items()
    )
