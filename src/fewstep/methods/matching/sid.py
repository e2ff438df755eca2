"""SiD: Score identity Distillation (Zhou et al. 2024, arXiv 2404.04057).

Two ways to write the Fisher divergence between the noised laws of student and teacher, one that a critic makes
computable and one that needs the critic to be right, are combined with a weight that counts the second one against the
first::

    loss = w (D_teacher - D_critic)^T [ (D_teacher - x) - alpha (D_teacher - D_critic) ],   w = 1 / mean|x - D_teacher|

``alpha = 1`` is the gradient of score-implicit matching with the squared distance; the paper's ``alpha = 1.2``, found
by experiment, is the gradient of no distance between scores.  The gradient reaches the student through ``x`` and,
through the inputs of both networks, through ``x_t``.  Read against the official repository (mingyuanzhou/SiD).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from fewstep.methods.method import Batch, Networks, Paper, System
from fewstep.methods.parts.one_step import OneStep, two_scores
from fewstep.methods.parts.times import Own
from fewstep.ranges import Within


def identity_loss(x: Tensor, real: Tensor, fake: Tensor, alpha: float) -> Tensor:
    """``(real - fake)^T [(real - x) - alpha (real - fake)]`` ``[B]``, with the predictions of teacher and critic at
    ``x_t``."""
    gap = real - fake
    return (gap * ((real - x) - alpha * gap)).flatten(1).sum(1)


def normaliser(x: Tensor, real: Tensor) -> Tensor:
    """``1 / mean|x - real|`` ``[B]``, without a graph; the mean is at least 1e-5."""
    return 1 / (x - real).detach().abs().flatten(1).mean(1).clamp_min(1e-5)


@dataclass(frozen=True)
class SiD(OneStep):
    """Score identity distillation: one step from a teacher alone.

    ``alpha`` is 1.2 in the paper, 1 on AFHQ.
    """

    name: ClassVar[str] = "sid"
    paper: ClassVar[Paper] = Paper(
        "Score identity Distillation: Exponentially Fast Distillation of Pretrained Diffusion Models for One-Step "
        "Generation", "2404.04057", "verified",
        ("`lr` and `critic_lr` suit networks of a million parameters and runs of minutes (1e-5 for both there)",
         "sampling uses a power-function average (the official one has a half-life of 500k samples)",
         "the critic's samples are not augmented",
         "the factor 100 on the student's loss is left out: it served half precision, and Adam does not see it",
         "a gradient that is no number stops the run (there it is set to 0)",
         "critic and student see the same labels in one iteration (there, fresh ones)",
         "the data, where there are any, give their conditions only"),
    )  # fmt: skip
    system: ClassVar[System] = System(
        "SiD", 2024, "matching", "teacher", "1",
        "two ways to write the Fisher divergence of the noised laws, weighed against each other", real="witnesses",
    )  # fmt: skip

    alpha: Annotated[float, "weight of the squared gap of the scores against the projected one"] = 1.2
    level_max: Annotated[
        float, Within(0.01, 1), "share of the noise levels, from data to noise, that the student's loss looks at"
    ] = 0.8

    def student_loss(self, nets: Networks, batch: Batch, x: Tensor) -> tuple[Tensor, Tensor]:
        schedule, rng = nets.teacher.schedule, batch.rng
        t = Own(0.0, self.level_max).draw(schedule, len(x), rng)
        x_t = schedule.add_noise(x, rng.normal_like(x), t)
        real, fake = two_scores(self.target(nets), nets.critic, x_t, t, batch.cond)
        return (normaliser(x, real) * identity_loss(x, real, fake, self.alpha)).mean(), fake - real
