"""TBCM: consistency distillation on the teacher's own trajectories, without data (2025, arXiv 2511.20410).

sCM (:mod:`fewstep.methods.consistency.scm`) looks at noised data.  Here the states are those that the teacher's sampler
visits, from noise down, under guidance; so there are no samples, and no encoder that makes latents of them::

    x_0 = sigma_data z at t_0 = t_max;   v_i = teacher velocity at (x_i, t_i);   x_{i+1} = the DDIM step along v_i

The ``v_i`` that moved a state is the velocity that the tangent needs there: a trajectory costs the teacher one call a
state, and the loss none.  All states but the first, where the tangent is 0, make one batch and one update.  Their times
are drawn anew for every trajectory, one in each gap of a reference grid (:func:`reference_times`).  The loss is sCM's
as it stands; guidance is drawn from a set for every trajectory and is an input ``w`` of the student.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import torch
from torch import Tensor

from fewstep import grids
from fewstep.conditions import Cond, repeat
from fewstep.denoisers import Denoiser
from fewstep.flow_maps import Jump
from fewstep.methods.alarm import Alarm, Grows
from fewstep.methods.consistency.scm import tangent_update, trig_like
from fewstep.methods.method import Batch, Method, Networks, Optimizer, Paper, Progress, System, Update
from fewstep.methods.parts.identities import TimeWeight
from fewstep.methods.parts.teacher_steps import guidance_input, guided_by_choice
from fewstep.methods.start import Start
from fewstep.methods.teachers.retime import check_time_input
from fewstep.randomness import Rng
from fewstep.ranges import Least, NonNegative, Positive, Share
from fewstep.sampling.rollout import Plan, Student, plans_along
from fewstep.schedules import Schedule

#: The last time of a table of 1000, where the reference grid begins to be shifted.
LAST = 1e-3
#: The second time of the plan of two calls.
SECOND = 1.0


def shifted(t: Tensor, shift: float) -> Tensor:
    """``k t / (1 + (k - 1) t)``, the time of flow matching that is spent more in noise."""
    return shift * t / (1 + (shift - 1) * t)


def reference_times(steps: int, shift: float) -> Tensor:
    """``steps`` falling angles from pi/2: times of flow matching, evenly from 1 to the shifted last time of a table of
    1000, shifted as a whole, as angles ``atan(t / (1 - t))``.  (The last time is thus shifted twice, as published.)"""
    last = shifted(torch.tensor(LAST, dtype=torch.float64), shift)
    t = shifted(torch.linspace(1.0, float(last), steps, dtype=torch.float64), shift)
    return torch.atan2(t, 1 - t)


def jittered_times(schedule: Schedule, steps: int, shift: float, n: int, rng: Rng) -> Tensor:
    """Falling times of ``n`` trajectories, float64 ``[K, n]``: ``t_max`` first, then one uniformly in each gap of the
    reference grid, of which times above ``t_max`` are left out."""
    reference = reference_times(steps, shift)
    low = reference[reference < schedule.t_max].to(rng.device)
    high = torch.cat([low.new_tensor([schedule.t_max]), low[:-1]])
    inner = low + (high - low) * rng.uniform(n, len(low))
    return torch.cat([inner.new_full((1, n), schedule.t_max), inner.T])


class Trajectory(NamedTuple):
    """What a sampler visited: states ``x`` ``[K, B, ...]``, their times ``t`` ``[K, B]`` and velocities ``v``."""

    x: Tensor
    t: Tensor
    v: Tensor


@torch.no_grad()
def walk(teacher: Denoiser, x: Tensor, times: Tensor, cond: Cond = None) -> Trajectory:
    """The states of DDIM steps from ``x`` ``[B, ...]`` along falling ``times`` ``[K, B]``: K calls of the teacher."""
    states: list[Tensor] = []
    velocities: list[Tensor] = []
    for i, t in enumerate(times):
        if i:
            x = teacher.schedule.move(x, velocities[-1], times[i - 1], t)
        states.append(x)
        velocities.append(teacher.velocity(x, t, cond))
    return Trajectory(torch.stack(states), times, torch.stack(velocities))


@dataclass(frozen=True)
class TBCM(Method):
    """The trajectory-backward consistency model.

    ``route`` is the number of states of a trajectory, of which all but the first are trained on: a batch of B
    conditions makes an update of ``(route - 1) B`` states, so that small batches are the rule.  ``guidances`` are the
    scales of the teacher's guidance that are drawn from; the student takes the scale as an input ``w`` where there are
    several, the middle one for samples that ask for none.  The tangent's unstable part is turned up over
    ``tangent_warmup``, the first share of the budget, and down to ``calm_level`` over ``calm_down``, the last one: at a
    level below 1 the solution is not exactly consistent.
    """

    name: ClassVar[str] = "tbcm"
    paper: ClassVar[Paper] = Paper(
        "Image-Free Timestep Distillation via Continuous-Time Consistency with Trajectory-Sampled Pairs",
        "2511.20410", "verified",
        ("`lr`, `betas`, `eps`, `clip`: Adam as in sCM here, at 1e-4 for runs of minutes and without clipping (the "
         "official code has CAME at 1e-5, clipped at 0.1)",
         "`guidances` are 1, 1.5 and 2, for small models; the official code draws from 4, 4.5 and 5",
         "the tangent's warm-up is half of the budget (4000 iterations in the official code)",
         "calming down to 0.75 is off, because the fixed point is then not consistent; the official code begins it at "
         "iteration 15000, over 2000",
         "no further factor 1 / (sigma_data tan t) on the loss, which the learned weight would take up",
         "a network that is told another time than the angle is refused; retiming it is a training of its own "
         "(retime)",
         "trajectories that come out black are not left out",
         "`steps`: four and eight calls too, at equal angles (one and two in the official code)"),
    )  # fmt: skip
    system: ClassVar[System] = System(
        "TBCM", 2025, "consistency", "teacher", "1, 2, 4, 8",
        "continuous-time consistency on states of the teacher's own trajectories: no images",
    )  # fmt: skip
    healthy: ClassVar[dict[str, str]] = {
        "student/loss": "stays near (||G|| / (||G|| + c))^2 - w by construction: it says nothing about quality",
        "student/tangent_norm": "falls over the run; growth to many times its first value is the instability that "
        "tangent normalisation and warm-up prevent",
    }
    unstable: ClassVar[dict[str, Alarm]] = {
        "student/tangent_norm": Grows(
            "give the tangent a longer warm-up (tangent_warmup), lower lr, or retime the network"
        )
    }
    roles: ClassVar[tuple[str, ...]] = ("student",)

    lr: Annotated[NonNegative, "learning rate"] = 1e-4
    sigma_data: Annotated[Positive, "TrigFlow's scale, the teacher's own"] = 0.5
    c: Annotated[Positive, "constant of the tangent normalization G / (|G| + c)"] = 0.1
    route: Annotated[int, Least(2), "states of a trajectory, all but the first of which are trained on"] = 16
    shift: Annotated[Positive, "shift of the times of a trajectory; above 1 more of them are in noise"] = 2.5
    guidances: Annotated[tuple[float, ...], "scales of the teacher's guidance, one drawn for each trajectory"] = (
        1.0,
        1.5,
        2.0,
    )
    tangent_warmup: Annotated[Share, "share of the budget over which the tangent's unstable part rises to 1"] = 0.5
    calm_down: Annotated[Share, "share of the budget, its last, over which that part falls to calm_level"] = 0.0
    calm_level: Annotated[Share, "where the tangent's unstable part ends with calm_down"] = 0.75
    steps: Annotated[tuple[Annotated[int, Least(1)], ...], "network calls that the student is made for"] = (1, 2, 4, 8)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.guidances:
            raise ValueError("tbcm: guidances=() must name at least one scale, such as 1")
        if self.tangent_warmup + self.calm_down > 1:
            raise ValueError(
                f"tbcm: tangent_warmup={self.tangent_warmup:g} and calm_down={self.calm_down:g} are shares of one "
                "budget, and together more than 1"
            )

    def networks(self, start: Start) -> Networks:
        schedule = trig_like(start.teacher.schedule, self.sigma_data)
        inputs = guidance_input(start.teacher, self.guidances)
        student = Jump(start.network("student", extras=tuple(inputs), on=schedule), extras=inputs)
        check_time_input(student.denoiser)
        return Networks(
            {"student": student, "weight": TimeWeight(), "teacher": start.teacher.on(schedule)},
            {
                "student": Optimizer(
                    ("student", "weight"), self.lr, betas=(0.9, 0.99), eps=1e-11, warmup=10, decay="cosine"
                )
            },
            ema=("student",),
        )

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        schedule, n = nets.student.schedule, batch.n
        teacher, w = guided_by_choice(nets.teacher, self.guidances, n, batch.rng)
        times = jittered_times(schedule, self.route, self.shift, n, batch.rng)
        x, t, v = (part[1:].flatten(0, 1) for part in walk(teacher, schedule.prior(batch.normal()), times, batch.cond))
        count = len(times) - 1
        extras = {name: w.repeat(count).to(x) for name in nets.student.extras}
        r = self.tangent_share(progress.fraction)
        yield tangent_update(nets, x, t, v, repeat(batch.cond, count), r=r, c=self.c, **extras)

    def tangent_share(self, fraction: float) -> float:
        """``r``, the share of the tangent's unstable part, when this part of the budget is used."""
        risen = min(1.0, fraction / self.tangent_warmup) if self.tangent_warmup else 1.0
        into = (fraction - (1 - self.calm_down)) / self.calm_down if self.calm_down else 0.0
        return risen + (self.calm_level - 1) * max(0.0, into)

    def student(self, nets: Networks) -> Student:
        schedule = nets.student.schedule
        plans = plans_along(grids.uniform, schedule, self.steps, 1.0)
        if 2 in plans:
            second = SECOND if schedule.t_max > SECOND else schedule.t_max / 2
            plans[2] = Plan((schedule.t_max, second), gamma=1.0)
        return Student(nets.student, plans)
