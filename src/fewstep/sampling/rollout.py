"""Rollouts: drive a few-step student along its times.

One primitive covers every few-step sampler.  From time ``t`` the student jumps to a time ``r <= s`` and fresh noise
lifts the state from ``r`` to the next time ``s``::

    x_s = a jump(x, t, r) + sd n,   (a, sd) the forward kernel r -> s

``gamma = 0`` is deterministic (``r = s``, no noise), ``gamma = 1`` re-noises from clean data (``r = t_min``: the
multistep sampling of consistency models and DMD2), between lies CTM's gamma-sampling, ``sigma_r = sqrt(1 - gamma^2)
sigma_s``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from fewstep.denoisers import Cond, GradientMode, check_prediction, gradients
from fewstep.extras import Input, check_given
from fewstep.flow_maps import FlowMap
from fewstep.grids import Grid
from fewstep.randomness import Noise
from fewstep.sampling.inputs import Generators, Numbers, evaluating, start_of
from fewstep.schedules import Schedule, align
from fewstep.values import real, whole


@dataclass(frozen=True)
class Plan:
    """How a student is sampled: the times at which it is called, noisiest first, and ``gamma`` in [0, 1].

    ``inner`` gives the time that every call but the last jumps to, where that is not the same share of the noise level
    everywhere (TCD undercuts by a share of the *time*); None is by ``gamma``.  The last call always goes to the data
    (``t_min`` of its schedule), without noise.  ``extras`` are further inputs of the network that belong to the plan
    (the number of steps), by name.
    """

    times: tuple[float, ...]
    gamma: float = 1.0
    inner: tuple[float, ...] | None = None
    extras: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        falling = all(b < a for a, b in pairwise(self.times))
        if not self.times or not falling or not (self.times[-1] >= 0 and self.times[0] < math.inf):
            raise ValueError(f"a plan needs at least one time, strictly decreasing and not negative, got {self.times}")
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma={self.gamma} must lie in [0, 1] (0 deterministic, 1 re-noising)")
        lifted = self.times[1:]
        if self.inner is not None and (
            len(self.inner) != len(lifted) or any(r > s for r, s in zip(self.inner, lifted, strict=True))
        ):
            raise ValueError(f"inner={self.inner} must be one time per re-noising, none above {lifted}")
        if self.inner is not None and not all(r >= 0 for r in self.inner):
            raise ValueError(f"inner={self.inner}: times are not negative")
        kept = {name: real(f"extras: {name}", value) for name, value in self.extras.items()}
        object.__setattr__(self, "extras", kept)

    def inner_at(self, schedule: Schedule, i: int) -> float:
        """The time that call ``i`` jumps to, before noise lifts the state back to the next time."""
        return inner_time(schedule, self.times[i + 1], self.gamma) if self.inner is None else self.inner[i]


def plans_along(grid: Grid, schedule: Schedule, steps: Iterable[int], gamma: float) -> dict[int, Plan]:
    """A plan for each of the numbers of ``steps``, called at the times of the grid of so many."""
    return {k: Plan(tuple(grid(schedule, k)[:-1].tolist()), gamma) for k in steps}


def inner_time(schedule: Schedule, s: float, gamma: float) -> float:
    """The time ``r`` to jump to before noise lifts the state back to ``s``."""
    if gamma == 0:
        return s
    if gamma == 1:
        return schedule.t_min
    level = torch.tensor([s, schedule.t_min], dtype=torch.float64)
    ratio, floor = schedule.ratio(level)
    inner = max(float((1 - gamma**2) ** 0.5 * ratio), float(floor))
    return float(schedule.time_at(-torch.tensor(inner, dtype=torch.float64).log()))


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a rollout, as it was made: number ``i`` of the plan, from the state ``x`` at time ``t`` to ``out`` at
    time ``r``, which noise lifts to ``next`` at the plan's next time ``s`` (None after the last call: ``next`` is
    ``out``).

    ``x0`` is the data prediction whose DDIM move the jump is, whatever the flow map is made of (``out`` itself where
    ``r`` has no noise), and ``begun`` what the map was told in every call of this rollout (:meth:`FlowMap.begin
    <fewstep.flow_maps.FlowMap.begin>`).
    """

    i: int
    t: float
    r: float
    s: float | None
    x: Tensor
    x0: Tensor
    out: Tensor
    next: Tensor
    begun: Mapping[str, Tensor]


def rollout(
    flow_map: FlowMap,
    noise: Tensor | None,
    plan: Plan,
    cond: Cond = None,
    rng: Noise | None = None,
    *,
    start: tuple[int, Tensor] | None = None,
    stop: int | None = None,
    end: float | None = None,
    grad_at: int | None = None,
    checkpoint: bool = False,
    extras: Mapping[str, Any] | None = None,
    begun: Mapping[str, Tensor] | None = None,
    calls: list[Call] | None = None,
) -> Tensor:
    """Sample with a student: standard normal ``noise`` in, data out.  ``extras`` set further inputs of the student by
    name, each a number or one a sample ``[B]``, over those of the plan and the defaults.  ``rng`` is needed when
    ``gamma > 0`` and there is more than one call.

    ``start = (k, state)`` enters at the plan's ``k``-th time with a state at that time; ``noise`` is None then.

    ``stop`` (an index into ``plan.times``) makes that call the last one: with ``stop = j`` the result is the
    student's clean prediction at its ``j``-th time, reached exactly as inference reaches it (DMD2's backward
    simulation).  ``end`` lets the last call go to that time instead of ``t_min``, for what goes on from there.

    With ``grad_at = i`` parameters are differentiated in call ``i`` only: no graph before it, and later calls pass the
    gradient on through their input (None: whatever mode the caller is in).  ``checkpoint`` keeps of every call its
    input only and makes it again in the backward pass, during which the flow map must be in the mode, training or
    evaluation, that it is in now.

    ``begun`` stands for what the map finds at the start of a rollout, in place of asking it.  Every :class:`Call` is
    appended to ``calls``.  ValueError for what contradicts the plan.
    """
    schedule = flow_map.schedule
    first, x = _entered(schedule, noise, plan, start)
    last = len(plan.times) - 1 if stop is None else stop
    if not first <= last < len(plan.times):
        since = f" from the start at {first} on" if first else ""
        raise ValueError(f"stop={stop} is not an index into the {len(plan.times)} times of the plan{since}")
    if end is not None and not schedule.t_min <= end < plan.times[last]:
        raise ValueError(
            f"end={end} must lie in [{schedule.t_min:g}, {plan.times[last]:g}), below the last call's time"
        )
    inputs = flow_map.inputs(x, {**plan.extras, **(extras or {})})
    if begun is None:
        with gradients(flow_map, "all" if grad_at is None else "none" if first < grad_at else "input"):
            begun = flow_map.begin(x, plan.times[first], cond)
    inputs |= begun
    for i in range(first, last + 1):
        mode: GradientMode = "all" if grad_at is None or grad_at == i else "none" if i < grad_at else "input"
        t, s = plan.times[i], None if i == last else plan.times[i + 1]
        r = plan.inner_at(schedule, i) if s is not None else schedule.t_min if end is None else end
        if checkpoint and mode != "none":
            out = recomputed(jumped, flow_map, x, t, r, cond, inputs, mode, use_reentrant=False)
        else:
            out = jumped(flow_map, x, t, r, cond, inputs, mode)
        check_prediction(out, x, "student")
        after = out if s is None or r == s else renoise(out, r, s, schedule, rng)
        if calls is not None:
            calls.append(Call(i, t, r, s, x, data_prediction(x, out, t, r, schedule), out, after, begun))
        x = after
    return x


def _entered(
    schedule: Schedule, noise: Tensor | None, plan: Plan, start: tuple[int, Tensor] | None
) -> tuple[int, Tensor]:
    """The first call of a rollout and the state that it gets."""
    if start is not None and noise is None:
        return whole("start", start[0], 0, len(plan.times) - 1), start[1]
    if start is not None or noise is None:
        raise ValueError("a rollout starts from noise, or from start=(k, state) with noise=None: give one of them")
    time = torch.tensor(plan.times[0], dtype=torch.float64, device=noise.device)
    return 0, align(schedule.sigma(time), noise) * noise


def jumped(
    flow_map: FlowMap,
    x: Tensor,
    t: float,
    r: float,
    cond: Cond,
    inputs: Mapping[str, Tensor],
    mode: GradientMode = "all",
) -> Tensor:
    """One call: ``x`` at ``t`` moved to ``r``.  The gradient mode is set in here, so that it holds as well where the
    call is made again in the backward pass."""
    with gradients(flow_map, mode):
        if r == flow_map.schedule.t_min:
            return flow_map.to_data(x, t, cond, **inputs)
        return flow_map.jump(x, t, r, cond, **inputs)


def data_prediction(x: Tensor, out: Tensor, t: float, r: float, schedule: Schedule) -> Tensor:
    """The ``x0`` whose DDIM move from ``x`` at ``t`` to a cleaner ``r`` is ``out``."""
    time = torch.tensor([t, r], dtype=torch.float64, device=x.device)
    alpha, sigma = schedule.alpha(time), schedule.sigma(time)
    carry = sigma[1] / sigma[0]
    scale = alpha[1] - carry * alpha[0]
    return align(1 / scale, x) * out - align(carry / scale, x) * x


def log_prob(flow_map: FlowMap, plan: Plan, call: Call, cond: Cond = None, **extras: Any) -> Tensor:
    """The log-density of what a call was followed by, float64 ``[B]``: of ``call.next`` under the Gaussian around the
    jump of ``flow_map`` from ``call.x``, the mean over dimensions::

        -1/2 mean((next - a jump)^2) / sd^2 - log sd - 1/2 log 2 pi,   (a, sd) the forward kernel r -> s

    As in the policies of preference tuning (PSO, DPO): ``flow_map`` may be another than the one that made the call;
    ``plan``, conditions and ``extras`` are those of the rollout.  Differentiable.  ValueError for a call that no noise
    follows: what it makes has no density.
    """
    if call.s is None or call.r == call.s:
        raise ValueError(f"call {call.i} of the rollout is followed by no noise: what it makes has no density")
    inputs = {**flow_map.inputs(call.x, {**plan.extras, **extras}), **call.begun}
    out = jumped(flow_map, call.x, call.t, call.r, cond, inputs)
    r, s = torch.tensor([call.r, call.s], dtype=torch.float64, device=out.device)
    a, sd = flow_map.schedule.transition(r, s)
    gap = (call.next.double() - a * out.double()) / sd
    return -0.5 * gap.square().flatten(1).mean(1) - torch.log(sd) - 0.5 * math.log(2 * math.pi)


def renoise(x: Tensor, inner: float, outer: float, schedule: Schedule, rng: Noise | None) -> Tensor:
    """Lift the output of a call from its inner time to the next time of the plan with fresh noise."""
    if rng is None:
        raise ValueError(f"the plan jumps to {inner:g} and re-noises to {outer:g}: pass rng")
    r, s = torch.tensor([inner, outer], dtype=torch.float64, device=x.device)
    a, sd = schedule.transition(r, s)
    return align(a, x) * x + align(sd, x) * rng.normal_like(x)


def greedy_times(grid: Sequence[float], steps: int, score: Callable[[tuple[float, ...]], float]) -> tuple[float, ...]:
    """The times of a plan, one after the other: each is the one on ``grid`` with the lowest ``score`` of the times so
    far, found by ternary search (Song et al. 2023, "Consistency Models", section 3, which scores by FID).

    ``grid`` falls from the noisiest time, which is always the first one.  A score is asked for once per sequence,
    about ``5 log(len(grid))`` times a step; the search finds the lowest if the score falls, then rises, along the grid.
    Raises ValueError when the grid has fewer than ``steps`` times.
    """
    if not 1 <= steps <= len(grid):
        raise ValueError(f"steps={steps} must lie in 1 .. {len(grid)}, the number of times of the grid")
    chosen: tuple[float, ...] = (grid[0],)
    last = 0
    for left in range(steps - 2, -1, -1):
        scored = cache(lambda i, so_far=chosen: score((*so_far, grid[i])))
        low, high = last + 1, len(grid) - 1 - left  # the times that are still to come need room
        while high - low > 2:
            third = (high - low) // 3
            a, b = low + third, high - third
            low, high = (low, b) if scored(a) <= scored(b) else (a, high)
        last = min(range(low, high + 1), key=scored)
        chosen = (*chosen, grid[last])
    return chosen


class Student(nn.Module):
    """A flow map with the plans that it was trained for: what distillation gives back.

    ``plans`` maps a number of steps to a :class:`Plan`; ``sample`` takes any of them.
    """

    def __init__(self, flow_map: FlowMap, plans: dict[int, Plan]) -> None:
        super().__init__()
        if not plans:
            raise ValueError("a student needs at least one sampling plan")
        for steps, plan in plans.items():
            if len(plan.times) != steps:
                raise ValueError(f"the plan for {steps} steps has {len(plan.times)} times")
            if plan.times[0] > flow_map.schedule.t_max:
                raise ValueError(f"the plan for {steps} steps starts at {plan.times[0]}, above {flow_map.schedule}")
            if not float(flow_map.schedule.sigma(torch.tensor(plan.times[-1], dtype=torch.float64))) > 0:
                raise ValueError(
                    f"the plan for {steps} steps calls at {plan.times[-1]}, where there is no noise to take"
                )
            try:
                check_given(flow_map.extras, plan.extras)
            except ValueError as error:
                raise ValueError(f"the plan for {steps} steps: {error}") from None
        self.flow_map = flow_map
        self.plans = dict(sorted(plans.items()))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.flow_map.shape

    @property
    def classes(self) -> int | None:
        return self.flow_map.classes

    @property
    def extras(self) -> dict[str, Input]:
        """The further inputs that sampling may set, by name."""
        return self.flow_map.extras

    @property
    def only_to_data(self) -> bool:
        """Whether it maps to data only: its flow map knows no other jumps, or was trained for none of its plans'."""
        if self.flow_map.two_times:
            return False
        return self.flow_map.only_to_data or all(plan.gamma == 1 and plan.inner is None for plan in self.plans.values())

    def forward(
        self, noise: Tensor, cond: Cond = None, steps: int | None = None, rng: Noise | None = None, **extras: Any
    ) -> Tensor:
        """Data from standard normal ``noise`` in ``steps`` calls (default: the fewest); ``extras`` are those of
        :meth:`sample`."""
        return rollout(self.flow_map, noise, self.plan(steps), cond, rng, extras=extras)

    def plan(self, steps: int | None = None) -> Plan:
        """The plan for ``steps`` calls (default: the fewest); ValueError where there is none."""
        steps = next(iter(self.plans)) if steps is None else whole("steps", steps)
        if steps not in self.plans:
            raise ValueError(f"steps={steps}: this student has plans for {sorted(self.plans)} steps")
        return self.plans[steps]

    @torch.no_grad()
    def sample(
        self,
        n: int,
        cond: Cond = None,
        *,
        steps: int | None = None,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        generator: Generators | None = None,
        **extras: float | Numbers,
    ) -> Tensor:
        """``n`` samples ``[n, *shape]`` in the type and on the device of the weights.

        ``extras`` set further inputs of the student (:attr:`extras`), as in ``student.sample(8, w=3.0)``: each a number
        or one a sample ``[n]``.  The others are those of the plan, or the defaults.  An unknown name and a value that
        cannot be raise ValueError (TypeError for what is no number) listing the inputs that there are.

        Class labels are cycled when the student is conditional and ``cond`` is None; ``seed``, ``seeds`` and
        ``generator`` are those of :func:`~fewstep.sampling.sample`, and so are the errors.
        """
        start = start_of(self.flow_map, n, cond, seed=seed, seeds=seeds, generator=generator)
        with evaluating(self):
            return self(start.noise, start.cond, steps, start.fresh, **extras)
