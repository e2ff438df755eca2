"""Self-conditioning and asymmetric time intervals (Chen, Zhang & Hinton 2022, arXiv 2208.04202).

A self-conditioned network takes a second sample beside the state, its own last estimate of the data: ``D(x, x~, t)`` is
called as ``model(x, t, cond, beside=x~)`` and None stands for zeros.  Three ways to sample it:

* :class:`SelfConditioning`: ``x~`` is the prediction of the call before, clipped to ``[-bound, bound]``; with
  ``momentum`` an exponential average of all of them.  No extra calls.  The memory belongs to one run.
* :class:`SelfGuided`: two passes a call, ``unc = D(x, 0, t)`` and ``con = D(x, unc, t)``, combined as
  ``unc + w (con - unc)``.  A plain denoiser without memory.
* without either, the model as it is: ``x~ = 0``.

Asymmetric time intervals are about the time that the network is told.  :func:`told_later` adds a constant to it and
leaves the solver alone.  :class:`Asymmetric` is the authors' sampler, where the step itself reads the state at the told
time as well.  The two agree at 0, the plain sampler.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewstep.denoisers import Cond, Denoiser, NetworkDenoiser, View
from fewstep.randomness import Noise
from fewstep.sampling.coefficients import Levels
from fewstep.sampling.engine import Solver, Step, Table, solve
from fewstep.sampling.hooks import NO_HOOKS, Hooks
from fewstep.sampling.solvers.stochastic import DDIM
from fewstep.schedules import Schedule


@dataclass
class Memory:
    """The estimate that one run feeds back; None before the first call."""

    estimate: Tensor | None = None

    def forget(self) -> None:
        self.estimate = None

    def keep(self, x0: Tensor, momentum: float) -> None:
        if momentum == 0:
            self.estimate = x0
        else:  # the average starts from zeros
            past = torch.zeros_like(x0) if self.estimate is None else self.estimate
            self.estimate = momentum * past + (1 - momentum) * x0


class Remembering(View):
    """A self-conditioned model that is given what a :class:`Memory` holds."""

    def __init__(self, inner: NetworkDenoiser, memory: Memory) -> None:
        super().__init__(inner)
        self.memory = memory

    def forward(self, x: Tensor, t: Tensor | float, cond: Cond = None) -> Tensor:
        if self.memory.estimate is None:
            return self.inner(x, t, cond)
        return self.inner(x, t, cond, beside=self.memory.estimate.to(x.dtype))


@dataclass(frozen=True)
class SelfConditioning:
    """Feeds every prediction back to the next call.

    ``bound`` clips predictions to ``[-bound, bound]`` before the solver and the next call see them, so that a noise
    prediction is derived from the clipped one (None: no clip).  ``momentum`` in [0, 1) is the paper's remedy for many
    steps, ``x~ <- momentum x~ + (1 - momentum) D``; 0 feeds the last prediction alone.  ValueError outside.
    """

    bound: float | None = 1.0
    momentum: float = 0.0

    def __post_init__(self) -> None:
        if self.bound is not None and not self.bound > 0:
            raise ValueError(f"SelfConditioning: bound={self.bound} must be positive, or None for no clip")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"SelfConditioning: momentum={self.momentum} must lie in [0, 1)")

    def attached(self, model: NetworkDenoiser, hooks: Hooks = NO_HOOKS) -> tuple[Denoiser, Hooks]:
        """The model with a memory of its own, and the hooks that fill it, for ``run`` and ``solve``.

        The hooks empty the memory when a run starts.  Guidance goes around the returned denoiser: both of its branches
        are then given the same estimate, and the guided prediction is what is fed back.  Given ``hooks`` act first, so
        that an edited prediction is fed back as edited.
        """
        memory = Memory()

        def start(x: Tensor) -> Tensor:
            memory.forget()
            return x if hooks.start is None else hooks.start(x)

        def output(k: int, x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
            if hooks.output is not None:
                x0 = hooks.output(k, x0, x, t)
            if self.bound is not None:
                x0 = x0.clamp(-self.bound, self.bound)
            memory.keep(x0, self.momentum)
            return x0

        return Remembering(model, memory), Hooks(start, hooks.input, output, hooks.history, hooks.after)

    def solve(
        self,
        model: NetworkDenoiser,
        x: Tensor,
        times: Tensor,
        solver: Solver,
        cond: Cond = None,
        rng: Noise | None = None,
        hooks: Hooks = NO_HOOKS,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """:func:`fewstep.sampling.solve` with self-conditioning, a pure function of its arguments."""
        denoiser, filled = self.attached(model, hooks)
        return solve(denoiser, x, times, solver, cond, rng, filled, progress)


class SelfGuided(View):
    """Self-guidance (the paper's appendix G): ``unc + w (con - unc)`` with the estimate of the same time.

    ``unc = D(x, 0, t)``, clipped to ``[-bound, bound]`` before it is fed back; ``con = D(x, unc, t)``.  ``scale`` is w
    (3 to 5 in the paper; 1 is a second pass without guidance).  Twice the calls.  The result is clipped too.
    """

    def __init__(self, inner: NetworkDenoiser, scale: float = 3.0, bound: float = 1.0) -> None:
        super().__init__(inner)
        if not bound > 0:
            raise ValueError(f"SelfGuided: bound={bound} must be positive")
        self.scale, self.bound = scale, bound

    def forward(self, x: Tensor, t: Tensor | float, cond: Cond = None) -> Tensor:
        unc = self.inner(x, t, cond).clamp(-self.bound, self.bound)
        con = self.inner(x, t, cond, beside=unc)
        return torch.lerp(unc, con, self.scale).clamp(-self.bound, self.bound)


def told_later(schedule: Schedule, shift: float, hooks: Hooks = NO_HOOKS) -> Hooks:
    """Hooks under which the network is told a time larger by ``shift``, at most ``t_max``: the paper's
    ``f(x_t, t + xi)``.

    ``shift`` is in the schedule's own time; td steps of a uniform grid are ``td (t_max - t_min) / steps``.  The solver
    goes on with the state's time, so any solver will do.  ValueError for a negative shift.
    """
    if not (math.isfinite(shift) and shift >= 0):
        raise ValueError(f"told_later: shift={shift} must be finite and not negative")

    def told(k: int, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        if hooks.input is not None:
            x, t = hooks.input(k, x, t)
        return x, (t + shift).clamp_max(schedule.t_max)

    return Hooks(hooks.start, told, hooks.output, hooks.history, hooks.after)


@dataclass(frozen=True)
class Asymmetric(Solver):
    """The authors' asymmetric time intervals: step i of ``inner`` goes from ``t_i`` to ``t_(i+1+td)``, and the next one
    starts from ``t_(i+1)`` all the same.

    ``td`` counts steps along the grid and need not be whole; beyond its end is its end.  A step thus removes the noise
    of ``1 + td`` steps, ``x' = alpha' D + sigma' (x - alpha_i D) / sigma_i`` for DDIM.  With many steps this does *not*
    tend to the probability flow but to ``dx/dt = (1 + td) v(x, t)``: td is for few steps.  ``inner`` is ``DDIM()``,
    ``DDIM(eta=1.0)`` (DDPM) or ``DDPMLarge()``.  ValueError for a negative td.
    """

    inner: DDIM = field(default_factory=DDIM)
    td: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.td < 0:
            raise ValueError(f"Asymmetric: td={self.td} must not be negative")

    @property
    def order(self) -> int:
        """Towards the faster flow."""
        return 1

    def table(self, levels: Levels) -> Table:
        steps: list[Step] = []
        for i in range(levels.steps):
            steps += self.inner.table(self.alone(levels, i)).steps
        return Table(levels, steps)

    def alone(self, levels: Levels, i: int) -> Levels:
        """The two levels of step ``i``: of its time and of that at ``i + 1 + td`` steps along the grid."""
        place = min(i + 1 + self.td, levels.steps)
        right = math.ceil(place)
        before, after = levels.times[right - 1], levels.times[right]
        if place == right or after < 0:  # there are no times on the way to a time of -1, which stands for pure data
            ends = [(v[i], v[right]) for v in (levels.times, levels.alpha, levels.sigma, levels.log_snr)]
            return Levels(levels.schedule, *ends)
        end = before + (place - (right - 1)) * (after - before)
        return Levels.of(levels.schedule, torch.tensor([levels.times[i], end], dtype=torch.float64))
