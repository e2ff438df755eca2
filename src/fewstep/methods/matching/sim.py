"""SIM: One-Step Diffusion Distillation through Score Implicit Matching (Luo et al. 2024, arXiv 2410.16794).

The student is to minimise a distance ``d`` between the score of its noised samples and the teacher's, which cannot be
differentiated, because nobody knows the student's score as a function of its weights.  A theorem gives another loss
with the same gradient, in which a critic stands for that score and its weights are held::

    y    = s_critic(x_t) - s_teacher(x_t)
    loss = -w(t) d'(y)^T ( s_critic(x_t) - grad log q(x_t | x) )

The gradient reaches the student through ``x`` *and* through ``x_t``, so through the inputs of both scores.  In data
predictions ``s_critic - s_teacher = alpha / sigma^2 (D_critic - D_teacher)`` and the bracket is ``alpha / sigma^2
(D_critic - x)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from fewstep.methods.method import Batch, Networks, Paper, System
from fewstep.methods.parts.one_step import OneStep, two_scores
from fewstep.methods.parts.times import Own
from fewstep.ranges import Positive, Within
from fewstep.schedules import align

Slope = Callable[[Tensor, float], Tensor]  # d'(y) of differences y [B, ...] and c, of the shape of y


def pseudo_huber_slope(y: Tensor, c: float) -> Tensor:
    """``y / sqrt(||y||^2 + c^2 n)``, of ``d = sqrt(||y||^2 + c^2 n) - c sqrt(n)`` over the whole sample of ``n``
    numbers."""
    size = (y.square().flatten(1).sum(1) + c**2 * y[0].numel()).sqrt()
    return y / align(size, y)


def l2_slope(y: Tensor, c: float) -> Tensor:
    """``2 y``, of ``d = ||y||^2``, Fisher's divergence; ``c`` is not used."""
    return 2 * y


def l4_slope(y: Tensor, c: float) -> Tensor:
    """``4 y^3``, of ``d = sum y^4``; ``c`` is not used."""
    return 4 * y.pow(3)


SLOPES: dict[str, Slope] = {"pseudo-huber": pseudo_huber_slope, "l2": l2_slope, "l4": l4_slope}


def implicit_loss(x: Tensor, real: Tensor, fake: Tensor, slope: Slope, c: float, scale: Tensor | None = None) -> Tensor:
    """The theorem's loss ``[B]`` of samples ``x`` with the predictions of teacher and critic at ``x_t``.

    ``scale`` ``[B]`` is what the gap ``fake - real`` is multiplied by before the distance is taken: ``alpha / sigma^2``
    makes it the difference of the scores, None leaves it in the units of the data.
    """
    k = torch.ones_like(x[:1]) if scale is None else align(scale, x)
    return -(slope(k * (fake - real), c) * k * (fake - x)).flatten(1).sum(1)


@dataclass(frozen=True)
class SIM(OneStep):
    """Score-implicit matching: any distance between scores, with a gradient that can be computed.

    The paper's choice is pseudo-huber.
    """

    name: ClassVar[str] = "sim"
    paper: ClassVar[Paper] = Paper(
        "One-Step Diffusion Distillation through Score Implicit Matching", "2410.16794", "reconstructed",
        ("no training code is public: the theorem is the paper's; noise levels, optimisers and the order of updates "
         "are those of SiD, whose code the authors acknowledge",
         "the paper leaves w(t) and c open: distances are taken in units of the data, which is w(t) = (sigma^2 / "
         "alpha)^p for a distance of degree p, and c is iCT's",
         "`lr` and `critic_lr` suit networks of a million parameters and runs of minutes (1e-5 for both in SiD)",
         "sampling uses a power-function average (SiD's has a half-life of 500k samples)",
         "the data, where there are any, give their conditions only"),
    )  # fmt: skip
    system: ClassVar[System] = System(
        "SIM", 2024, "matching", "teacher", "1",
        "score-implicit matching: distances between scores with a tractable gradient", real="witnesses",
    )  # fmt: skip

    distance: Annotated[Literal["pseudo-huber", "l2", "l4"], "distance between the two scores"] = "pseudo-huber"
    c: Annotated[Positive, "where pseudo-Huber bends, in units of the data and for each number of a sample"] = 0.00054
    level_max: Annotated[
        float, Within(0.01, 1), "share of the noise levels, from data to noise, that the student's loss looks at"
    ] = 0.8

    def student_loss(self, nets: Networks, batch: Batch, x: Tensor) -> tuple[Tensor, Tensor]:
        schedule, rng = nets.teacher.schedule, batch.rng
        t = Own(0.0, self.level_max).draw(schedule, len(x), rng)
        x_t = schedule.add_noise(x, rng.normal_like(x), t)
        real, fake = two_scores(self.target(nets), nets.critic, x_t, t, batch.cond)
        return implicit_loss(x, real, fake, SLOPES[self.distance], self.c).mean(), fake - real
