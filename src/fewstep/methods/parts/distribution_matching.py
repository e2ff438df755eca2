"""What DMD and its successors share: a student beside a critic that learns the score of its samples, and the loss of
the difference of two scores (Yin et al. 2023 and 2024), which takes samples of any generator."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from fewstep import grids
from fewstep.conditions import Cond
from fewstep.denoisers import Denoiser, gradients
from fewstep.flow_maps import FlowMap, Jump
from fewstep.methods.alarm import Falls, Grows, Stays
from fewstep.methods.method import Batch, Optimizer
from fewstep.methods.parts.score_matching import (
    Weight,
    by_distance,
    denoising_loss,
    matching_vector,
    sample_std,
    surrogate,
)
from fewstep.methods.parts.times import Own, TimeLaw
from fewstep.methods.start import Start
from fewstep.randomness import Rng
from fewstep.sampling.rollout import Plan
from fewstep.sampling.student_generator import StudentGenerator
from fewstep.schedules import Schedule

#: DMD's times: 2 % to 98 % of the noise levels.
IN_THE_MIDDLE = Own(0.02, 0.98)


#: When distribution matching goes wrong, and what to change then.
RUNAWAY_CRITIC = Grows("the critic runs away from the samples: lower critic_lr, or give it more data (batch)", 10.0)
LOST_MODES = Falls("samples become alike, modes are lost: lower lr, raise critic_lr or critic_steps")
WON_GAME = Stays("the discriminator has won and teaches nothing: lower its weight or its learning rate")


def three_networks(start: Start) -> dict[str, nn.Module]:
    """The frozen teacher, and the student and the critic as trainable copies on its schedule."""
    teacher = start.teacher.native()
    return {
        "student": Jump(start.network("student", on=teacher.schedule)),
        "critic": start.network("critic", on=teacher.schedule),
        "teacher": teacher,
    }


def two_optimizers(
    lr: float, critic_lr: float, clip: float, warmup: int, critic: tuple[str, ...] = ("critic",)
) -> dict[str, Optimizer]:
    """The student's optimizer, whose rate falls to 0, and that of the critic (of the modules ``critic``), which keeps
    its rate."""
    student = Optimizer(("student",), lr, "adamw", weight_decay=0.01, clip=clip, warmup=warmup, decay="linear")
    return {
        "student": student,
        "critic": dataclasses.replace(student, modules=critic, lr=critic_lr, decay="constant"),
    }


def matching_loss(
    x: Tensor,
    teacher: Denoiser,
    critic: Denoiser,
    cond: Cond,
    rng: Rng,
    law: TimeLaw = IN_THE_MIDDLE,
    weight: Weight = by_distance,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The surrogate loss of samples ``x`` at times of ``law``, and what there is to record.

    Its gradient reaches the generator through ``x`` only, not through the two scores.
    """
    t = law.draw(teacher.schedule, len(x), rng)
    x_t = teacher.schedule.add_noise(x.detach(), rng.normal_like(x), t)
    return vector_loss(x, matching_vector(x.detach(), x_t, t, teacher, critic, cond, weight))


def vector_loss(x: Tensor, g: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The surrogate loss of samples ``x`` along a vector ``g``, and what there is to record."""
    return surrogate(x, g), {"matching_norm": g.square().mean().sqrt(), "sample_std": sample_std(x)}


def check_first_level(first_level: float, steps: int) -> None:
    """ValueError for a first time that a plan of so many steps cannot have."""
    if first_level <= 0:
        raise ValueError(f"first_level={first_level:g} must lie above 0: there must be noise to take")
    if first_level < 1 < steps:
        raise ValueError(f"first_level={first_level:g} is for a student of one step, and steps={steps}: set it to 1")


def renoising_plan(schedule: Schedule, steps: int, first_level: float = 1.0) -> Plan:
    """DMD2's times: equally spaced, noisiest first (999, 749, 499 and 249 of 1000 for four).

    A single one may lie lower, at the share ``first_level`` of the family's own index (399 of a table of 1000 for 0.4).
    """
    if first_level == 1:
        return Plan(tuple(grids.student_grid(schedule, steps)[:-1].tolist()), gamma=1.0)
    length = schedule.table_length
    place = grids.last_index(schedule) * first_level if length is None else max(round(length * first_level) - 1, 0)
    return Plan((float(grids.at_index(schedule, torch.tensor(place, dtype=torch.float64))),), gamma=1.0)


def simulated(student: FlowMap, plan: Plan, batch: Batch, trainable: bool) -> Tensor:
    """Student samples as inference makes them, from a random call of the plan (DMD2's backward simulation)."""
    with gradients(student, "all" if trainable else "none"):
        return StudentGenerator(student, plan).draw(batch.n, batch.rng, batch.cond)[0]


def critic_loss(critic: Denoiser, x: Tensor, cond: Cond, rng: Rng) -> Tensor:
    """The teacher's own training loss on samples ``x`` without a graph, at all noise levels."""
    return denoising_loss(critic, x, Own(0.0, 1.0).draw(critic.schedule, len(x), rng), cond, rng)
