"""What a student sees on its way: the state that every call gets, and what it takes the data to be."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.conditions import Cond
from fewstep.hub.models import pictures
from fewstep.sampling.inputs import Numbers, evaluating, start_of
from fewstep.sampling.rollout import Call, Student, rollout
from fewstep.schedules import Schedule, align


@torch.no_grad()
def looked_at(
    student: Student,
    n: int,
    cond: Cond = None,
    *,
    steps: int | None = None,
    seed: int = 0,
    extras: dict[str, float | Numbers] | None = None,
) -> list[Call]:
    """The calls of ``n`` samples, which are those of :meth:`Student.sample <fewstep.sampling.Student.sample>` with the
    same arguments; ValueError as there."""
    start, calls = start_of(student.flow_map, n, cond, seed=seed), list[Call]()
    with evaluating(student):
        plan = student.plan(steps)
        rollout(student.flow_map, start.noise, plan, start.cond, start.fresh, extras=extras, calls=calls)
    return calls


def as_pictures(student: Student, calls: list[Call]) -> Tensor:
    """A row a sample: state and data prediction of every call, then the sample; ``[n (2 K + 1), ...]`` in [-1, 1], not
    clipped.  States are divided by ``sqrt(alpha^2 + sigma^2)``, so that they can be looked at beside data."""
    schedule = student.flow_map.schedule
    columns = [column for call in calls for column in (at_unit_scale(call, schedule), call.x0)]
    shown = torch.stack([*columns, calls[-1].out], dim=1)
    return pictures(student, shown.flatten(0, 1)).float().cpu()


def at_unit_scale(call: Call, schedule: Schedule) -> Tensor:
    """The state of a call, at a scale of about 1."""
    time = torch.tensor(call.t, dtype=torch.float64, device=call.x.device)
    return call.x / align(torch.sqrt(schedule.alpha(time) ** 2 + schedule.sigma(time) ** 2), call.x)


def in_words(calls: list[Call]) -> list[str]:
    """One line a call: its time, where it goes, and the noise after it."""
    lines = []
    for call in calls:
        noise = "" if call.s is None or call.r == call.s else f", noise lifts it to {call.s:.4g}"
        lines.append(f"call {call.i + 1}: from time {call.t:.4g} to {call.r:.4g}{noise}")
    return lines
