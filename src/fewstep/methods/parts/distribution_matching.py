"""What DMD and its successors share: a student beside a critic that learns the score of its samples, and the loss of
the difference of two scores (Yin et al. 2023 and 2024), which takes samples of any generator."""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from fewstep.conditions import Cond
from fewstep.denoisers import Denoiser
from fewstep.flow_maps import Jump
from fewstep.methods.alarm import Falls, Grows, Stays
from fewstep.methods.method import Optimizer
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
    g = matching_vector(x.detach(), x_t, t, teacher, critic, cond, weight)
    return surrogate(x, g), {"matching_norm": g.square().mean().sqrt(), "sample_std": sample_std(x)}


def critic_loss(critic: Denoiser, x: Tensor, cond: Cond, rng: Rng) -> Tensor:
    """The teacher's own training loss on samples ``x`` without a graph, at all noise levels."""
    return denoising_loss(critic, x, Own(0.0, 1.0).draw(critic.schedule, len(x), rng), cond, rng)
