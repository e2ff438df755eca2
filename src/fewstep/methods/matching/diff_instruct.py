"""Diff-Instruct (Luo et al. 2023, arXiv 2305.18455).

The student minimises the KL divergence between its noised samples and the teacher's, integrated over noise levels::

    grad = E  w(t) ( s_critic(x_t) - s_teacher(x_t) )  d x_t / d theta

which needs no gradient of either score.  With ``w = sigma^2 / alpha^2``, the official code's choice, the vector is
``g = D_critic - D_teacher``: that of DMD, which came after, before it is divided by its size.  Read against the
official repository (pkulwj1994/diff_instruct).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from fewstep.methods.method import Batch, Networks, Paper, System
from fewstep.methods.parts.one_step import OneStep, two_scores
from fewstep.methods.parts.score_matching import surrogate
from fewstep.methods.parts.times import LogNormal
from fewstep.ranges import NonNegative, Positive


@dataclass(frozen=True)
class DiffInstruct(OneStep):
    """Integral KL divergence between the noised laws, from a teacher alone."""

    name: ClassVar[str] = "diff-instruct"
    paper: ClassVar[Paper] = Paper(
        "Diff-Instruct: A Universal Approach for Transferring Knowledge From Pre-trained Diffusion Models",
        "2305.18455", "verified",
        ("`lr` and `critic_lr` suit networks of a million parameters and runs of minutes (1e-5 for both there)",
         "sampling uses a power-function average (the official one has a half-life of 500k samples)",
         "the critic's samples are not augmented",
         "dropout is off in both scores (there it is on, with one mask for both)",
         "a gradient that is no number stops the run (there it is set to 0)",
         "the data, where there are any, give their conditions only"),
    )  # fmt: skip
    system: ClassVar[System] = System(
        "Diff-Instruct", 2023, "matching", "teacher", "1",
        "the integral KL divergence between the noised laws, by the difference of two scores", real="witnesses",
    )  # fmt: skip

    init_sigma: Annotated[Positive, "noise level sigma / alpha at which the student is called"] = 1.0
    noise_mean: Annotated[float, "mean of log(sigma / alpha) at the times that the student's loss looks at"] = -1.2
    noise_std: Annotated[NonNegative, "standard deviation of log(sigma / alpha) at those times"] = 1.2
    # twice as much ends in samples far from the data after some thousand steps in batches of 64
    lr: Annotated[NonNegative, "learning rate"] = 5e-5

    def student_loss(self, nets: Networks, batch: Batch, x: Tensor) -> tuple[Tensor, Tensor]:
        schedule, rng = nets.teacher.schedule, batch.rng
        t = LogNormal(self.noise_mean, self.noise_std).draw(schedule, len(x), rng)
        with torch.no_grad():
            x_t = schedule.add_noise(x, rng.normal_like(x), t)
            real, fake = two_scores(self.target(nets), nets.critic, x_t, t, batch.cond)
        return surrogate(x, fake - real), fake - real
