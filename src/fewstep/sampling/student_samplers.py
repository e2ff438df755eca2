"""The samplers that few-step students of other people are known by: consistency, LCM and TCD, as plans.

========================  =============================================  =======================================
name                      times                                          between two calls
========================  =============================================  =======================================
``"consistency"``         every n-th of CM's 40 Karras levels            to data, then noise up to the next time
``"lcm"``                 every n-th of 50 even times of a table         the same
``"tcd"``                 LCM's                                          to the time ``(1 - eta) s``, then noise
                                                                         up to the next time ``s``
========================  =============================================  =======================================

The first two (Song et al. 2023, algorithm 1; Luo et al. 2023, algorithm 3) are plans with ``gamma = 1`` and
need a student that maps to data.  The third, strategic stochastic sampling (Zheng et al. 2024, "Trajectory Consistency
Distillation", algorithm 2), needs jumps to times in between: a student that maps to data only leaves the law of the
data there, by a Kolmogorov-Smirnov distance of 0.1 to 0.2 for ``eta = 0``.

LCM re-noises from, and ends at, clean data, which a table of betas does not contain; :func:`ending_clean` puts it
there.  TCD ends on the table's first level, as this library does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from fewstep import grids
from fewstep.denoisers import Cond
from fewstep.discrete_vp import DiscreteVP
from fewstep.flow_maps import FlowMap
from fewstep.randomness import Noise
from fewstep.sampling.inputs import Numbers, evaluating, given_conditions, states_for
from fewstep.sampling.rollout import Plan, Student, rollout
from fewstep.schedules import Schedule
from fewstep.values import real, whole


def consistency(schedule: Schedule, steps: int, levels: int = 40) -> Plan:
    """Multistep consistency sampling on the grid of training, ``levels`` Karras levels, every ``levels // steps``-th.

    Equal to CMStochasticIterativeScheduler on EDM's schedule.
    """
    _check_steps(steps, whole("levels", levels, 1))
    times = grids.karras(schedule, levels - 1).tolist() if levels > 1 else [schedule.t_max]
    stride = levels // steps
    return Plan(tuple(times[: stride * steps : stride]), gamma=1.0)


def lcm(schedule: Schedule, steps: int, original_steps: int = 50) -> Plan:
    """Consistency sampling at LCM's times (see :func:`skipping_times`)."""
    return Plan(skipping_times(schedule, steps, original_steps), gamma=1.0)


def tcd(schedule: Schedule, steps: int, original_steps: int = 50, eta: float = 0.3) -> Plan:
    """TCD's strategic stochastic sampling at LCM's times: jumps to the step ``floor((1 - eta) s)`` of the table, with
    ``eta`` (the paper's gamma) from 0, deterministic, to 1, consistency sampling."""
    real("eta", eta, 0, 1)
    times = skipping_times(schedule, steps, original_steps)
    return Plan(times, inner=tuple(float(math.floor((1 - eta) * s)) for s in times[1:]))


def skipping_times(schedule: Schedule, steps: int, original_steps: int = 50) -> tuple[float, ...]:
    """The times of LCM and TCD: of the ``original_steps`` even times that the student was distilled on, ``k i - 1``
    with ``k = N // original_steps``, about every ``original_steps / steps``-th, from the last one down.

    ValueError unless the schedule is a table, and there are as many times.
    """
    n = schedule.table_length
    if n is None:
        raise ValueError(f"LCM's and TCD's times are steps of a table of betas, the schedule is {schedule}")
    _check_steps(original_steps, n, "original_steps")
    _check_steps(steps, original_steps)
    stride = n // original_steps
    skipped = [math.floor(i * original_steps / steps) for i in range(steps)]
    return tuple(float(stride * (original_steps - i) - 1) for i in skipped)


def _check_steps(steps: int, most: int, name: str = "steps") -> None:
    if not 1 <= whole(name, steps) <= most:
        raise ValueError(f"{name}={steps} must lie in 1 .. {most}, the number of times there are")


def ending_clean(schedule: Any) -> Any:
    """The same table with clean data (``sigma = 1e-8``) in the place of its first level, at time 0; another schedule is
    left as it is.

    From time 1 on nothing changes, so ``Jump(denoiser.on(ending_clean(schedule)))`` is the same student with LCM's end:
    its map to data is the network's own data prediction.
    """
    if schedule.table_length is None:
        return schedule
    return DiscreteVP(alphas_cumprod=(1 - 2.0**-53, *schedule.alphas_cumprod[1:]))


#: Samplers by name: functions of a schedule, a number of steps and the sampler's own settings.
STUDENT_SAMPLERS: dict[str, Callable[..., Plan]] = {
    "consistency": consistency,
    "lcm": lcm,
    "tcd": tcd,
    "tcd-deterministic": partial(tcd, eta=0.0),
}


def student_plan(student: Student | FlowMap, sampler: str, steps: int, **settings: Any) -> Plan:
    """The plan of a sampler by name for a student.

    Raises ValueError with the choices on an unknown name, and when TCD is asked of a student that maps to data only:
    one whose flow map has no other jumps, or whose own plans all re-noise from data (CM, sCM, DMD2).  A bare flow map
    is taken at its word.  Further inputs that belong to a plan (the number of steps) are those of the student's own
    plan for ``steps``; where it has none, they are left to the caller.
    """
    flow_map, plans = parts_of(student)
    if sampler not in STUDENT_SAMPLERS:
        raise ValueError(f"sampler={sampler!r} is not known; choose one of {', '.join(STUDENT_SAMPLERS)}")
    plan = STUDENT_SAMPLERS[sampler](flow_map.schedule, steps, **settings)
    jumps = plan.inner is not None and any(r > flow_map.schedule.t_min for r in plan.inner)
    if jumps and student.only_to_data:
        raise ValueError(
            f"sampler={sampler!r} jumps to times between noise and data, this student maps to data only; "
            "take 'consistency' or 'lcm', or eta=1"
        )
    return replace(plan, extras=plans[steps].extras) if steps in plans else plan


def _check_told(student: Student | FlowMap, plan: Plan, steps: int, given: Mapping[str, Any]) -> None:
    """ValueError for an input that belongs to the student's own plans and that nothing sets for ``steps``."""
    _, told = parts_of(student)
    for name in dict.fromkeys(name for own in told.values() for name in own.extras):
        if name not in plan.extras and name not in given:
            raise ValueError(
                f"steps={steps}: the input {name} belongs to the student's own plans, for {sorted(told)} steps: take "
                f"one of those, or extras={{'{name}': ...}} {student.extras[name]}"
            )


def parts_of(student: Student | FlowMap) -> tuple[FlowMap, Mapping[int, Plan]]:
    """The flow map of a student and its own plans, of which a bare flow map has none; TypeError for what is neither."""
    if isinstance(student, Student):
        return student.flow_map, student.plans
    if not isinstance(student, FlowMap):
        raise TypeError(f"student is a {type(student).__name__}: give a Student or a FlowMap")
    return student, {}


def sample_student(
    student: Student | FlowMap,
    noise: Numbers,
    sampler: str,
    steps: int,
    cond: Cond = None,
    rng: Noise | None = None,
    *,
    extras: Mapping[str, float | Numbers] | None = None,
    **settings: Any,
) -> Tensor:
    """Data from standard normal ``noise`` with a sampler by name, as in ``sample_student(student, noise, "lcm", 4,
    rng=rng)``; ``settings`` are the sampler's own.  ``extras`` set further inputs of the student, as in
    :meth:`Student.sample <fewstep.sampling.Student.sample>`.

    The samples have the type of the student's weights; without ``cond`` it is called without a label.  Dropout is off
    meanwhile.  ValueError as in :func:`student_plan`, and for noise and conditions as in
    :func:`~fewstep.sampling.sample`.
    """
    plan = student_plan(student, sampler, steps, **settings)
    _check_told(student, plan, steps, extras or {})
    flow_map, _ = parts_of(student)
    x = states_for(flow_map, "noise", noise)
    with evaluating(flow_map):
        return rollout(flow_map, x, plan, given_conditions(flow_map, x, cond), rng, extras=extras)
