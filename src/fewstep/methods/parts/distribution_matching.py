"""What DMD and its successors share: a student beside a critic that learns the score of its samples, and the loss of
the difference of two scores (Yin et al. 2023 and 2024), which takes samples of any generator."""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from fewstep.conditions import Cond
from fewstep.denoisers import Denoiser
from fewstep.flow_maps import Jump
from fewstep.methods.method import Optimizer
from fewstep.methods.parts.score_matching import denoising_loss, matching_vector, surrogate
from fewstep.methods.parts.times import Own, TimeLaw
from fewstep.methods.start import Start
from fewstep.randomness import Rng

#: Where DMD and DMD2 compare the two scores: not at the first and last 2 % of the noise levels.
INNER = Own(0.02, 0.98)


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
    x: Tensor, teacher: Denoiser, critic: Denoiser, cond: Cond, rng: Rng, law: TimeLaw = INNER
) -> tuple[Tensor, dict[str, Tensor]]:
    """The surrogate loss of samples ``x`` at times of ``law``, and what there is to record.

    Its gradient reaches the generator through ``x`` only, not through the two scores.
    """
    t = law.draw(teacher.schedule, len(x), rng)
    x_t = teacher.schedule.add_noise(x.detach(), rng.normal_like(x), t)
    g = matching_vector(x.detach(), x_t, t, teacher, critic, cond)
    return surrogate(x, g), {"matching_norm": g.square().mean().sqrt(), "sample_std": x.detach().std()}


def critic_loss(critic: Denoiser, x: Tensor, cond: Cond, rng: Rng) -> Tensor:
    """The teacher's own training loss on samples ``x`` without a graph, at all noise levels."""
    return denoising_loss(critic, x, Own(0.0, 1.0).draw(critic.schedule, len(x), rng), cond, rng)
