"""LADD: Latent Adversarial Diffusion Distillation (Sauer et al. 2024, arXiv 2403.12015).

The student goes from a noised sample to its own data prediction in one call, at one of four noise levels, and small
heads on the features of the frozen teacher tell it from samples, both noised again to a level ``s``::

    x        = f_student(x_t, t),     x_t a sample noised to  t in {1, 3/4, 1/2, 1/4}  of the schedule
    s        ~ logit-normal(noise_mean, noise_std),     l_k(x) = head_k(features of block k of the teacher at x_s, s)
    heads:     (relu(1 - l(sample)) + relu(1 + l(x))) / 2        student:   -l(x)

mean over blocks, places and samples.  Nothing else: the samples are the teacher's own, made once under guidance, so
that neither data nor a distance to the teacher's prediction are needed.  What a head sees is decided by the law of
``s``: much noise shows the whole picture, little noise its texture.

No code of the authors is public: reconstructed from descriptions of the paper, with the head of StyleGAN-T and ADD.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from fewstep import grids
from fewstep.data.dataset import Samples
from fewstep.flow_maps import Jump
from fewstep.methods.alarm import Alarm
from fewstep.methods.method import Batch, Method, Networks, Optimizer, Paper, Progress, System, Update
from fewstep.methods.parts.adversary import Adversary, Discriminator, Hinge
from fewstep.methods.parts.distribution_matching import LOST_MODES, WON_GAME
from fewstep.methods.parts.heads import PatchHead
from fewstep.methods.parts.score_matching import sample_std
from fewstep.methods.parts.stores import teacher_pairs
from fewstep.methods.parts.times import LogNormal
from fewstep.methods.start import Start
from fewstep.ranges import Count, Least, NonNegative, Positive, Share
from fewstep.sampling.rollout import Plan, Student
from fewstep.schedules import Schedule


@dataclass(frozen=True)
class LADD(Method):
    """A student that only an adversary teaches.

    The first ``first_share`` of the budget draws the noise levels with ``first_probabilities``, the rest with
    ``probabilities``; there are as many levels as probabilities, the noisiest first.  ``pairs`` samples are made by the
    teacher under ``guidance``, in ``ode_steps`` Heun steps; with 0 of them the data are the samples.  ``blocks`` is how
    many of the teacher's blocks have a head, and ``layers`` names them where that is wanted otherwise.
    """

    name: ClassVar[str] = "ladd"
    paper: ClassVar[Paper] = Paper(
        "Fast High-Resolution Image Synthesis with Latent Adversarial Diffusion Distillation", "2403.12015",
        "reconstructed",
        ("no code of the authors is public: from descriptions of the paper, whose numbers for levels and laws were not "
         "checked against its text; heads as in StyleGAN-T, which ADD and LADD build on",
         "heads are normalised over the sample (over virtual batches of 8 there), and their spectral norms follow the "
         "weights once an update",
         "learning rates and optimizers suit networks of a million parameters and runs of minutes",
         "the first phase is a twentieth of the budget (500 iterations there)",
         "levels are equally spaced in the schedule, on EDM in TrigFlow's angle; they are not shifted with resolution",
         "the teacher is asked for 4096 samples by Heun steps of a Karras grid",
         "no preference optimization (DPO) of a low-rank adapter afterwards",
         "calls re-noise what the one before made"),
    )  # fmt: skip
    system: ClassVar[System] = System(
        "LADD", 2024, "matching", "teacher", "1, 2, 4",
        "an adversary on the features of the frozen teacher, and nothing else, on samples that the teacher made",
    )  # fmt: skip
    healthy: ClassVar[dict[str, str]] = {
        "student/loss": "minus the mean logit of samples: swings about 0; a steady rise says that the heads win",
        "discriminator/loss": "1 where the heads know nothing; falls at first, then rises as the student catches up",
        "discriminator/discriminator_accuracy": "between 0.5 and 0.8; near 1 the student is taught nothing",
        "student/sample_std": "of samples among themselves: stays near the data's; a slide to 0 is collapse",
    }
    unstable: ClassVar[dict[str, Alarm]] = {
        "discriminator/discriminator_accuracy": WON_GAME,
        "student/sample_std": LOST_MODES,
    }
    roles: ClassVar[tuple[str, ...]] = ("student",)

    steps: Annotated[tuple[Count, ...], "network calls that the student is made for, one plan each"] = (1, 2, 4)
    probabilities: Annotated[tuple[NonNegative, ...], "of the noise levels, the noisiest first"] = (0.7, 0.1, 0.1, 0.1)
    first_probabilities: Annotated[tuple[NonNegative, ...], "the same in the first phase"] = (0.0, 0.0, 0.5, 0.5)
    first_share: Annotated[Share, "share of the budget that is the first phase"] = 0.05
    noise_mean: Annotated[float, "mean of log(sigma / alpha) at the times that heads look at"] = 1.0
    noise_std: Annotated[NonNegative, "standard deviation of log(sigma / alpha) at those times"] = 1.0
    blocks: Annotated[Count, "blocks of the teacher that have a head, spread over its depth; 1 for the bottleneck"] = 24
    layers: Annotated[tuple[str, ...] | None, "names of the layers that have a head, in place of blocks"] = None
    projection: Annotated[
        int, Least(0), "channels that heads project on time and condition, 0 to tell them nothing"
    ] = 64
    pairs: Annotated[int, Least(0), "samples that the teacher makes before training; 0 takes the data"] = 4096
    ode_steps: Annotated[Count, "Heun steps of the teacher for each"] = 18
    guidance: Annotated[float, "scale of the teacher's classifier-free guidance, 1 for none"] = 1.0
    r1: Annotated[NonNegative, "weight of the gradient penalty of the heads at samples"] = 0.0
    lr: Annotated[NonNegative, "learning rate of the student"] = 1e-4
    discriminator_lr: Annotated[NonNegative, "learning rate of the heads"] = 1e-3
    clip: Annotated[Positive, "bound on the gradient norm"] = 1.0
    warmup: Annotated[int, Least(0), "steps over which the learning rate rises from 0"] = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        n = len(self.probabilities)
        if len(self.first_probabilities) != n or not sum(self.probabilities) or not sum(self.first_probabilities):
            raise ValueError(
                f"ladd: probabilities={self.probabilities} and first_probabilities={self.first_probabilities} must be "
                "of as many levels, not all 0"
            )
        if max(self.steps, default=1) > n:
            raise ValueError(f"ladd: steps={self.steps} asks for more calls than there are levels, {n}")

    def sources(self, start: Start) -> Mapping[str, Samples]:
        return teacher_pairs(start, self.pairs, self.ode_steps, self.guidance) if self.pairs else {"data": start.data}

    def networks(self, start: Start) -> Networks:
        teacher, cond = start.teacher.native(), start.condition()
        rules = Adversary(
            Hinge(), LogNormal(self.noise_mean, self.noise_std), self.layers or (), self.blocks, PatchHead, grids=True,
            projection=self.projection, r1=self.r1,
        )  # fmt: skip
        student = Optimizer(
            ("student",), self.lr, betas=(0.0, 0.99), clip=self.clip, warmup=self.warmup, decay="linear"
        )
        heads = Optimizer(("discriminator",), self.discriminator_lr, betas=(0.0, 0.99), clip=self.clip)
        return Networks(
            {
                "student": Jump(start.network("student", on=teacher.schedule)),
                "discriminator": Discriminator(rules, teacher, cond),
                "teacher": teacher,
            },
            {"student": student, "discriminator": heads},
            ema=("student",),
        )

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        x = self.draw(nets, batch, progress)
        with nets.held("discriminator"):
            loss = nets.discriminator.student_loss(nets.teacher, x, batch.cond, batch.rng)
            yield Update("student", loss, {"sample_std": sample_std(x)})
        loss, logs = nets.discriminator.loss(nets.teacher, batch.x, x.detach(), batch.cond, batch.rng)
        yield Update("discriminator", loss, logs, nets.discriminator.follow)

    def draw(self, nets: Networks, batch: Batch, progress: Progress) -> Tensor:
        """The student's data predictions of the batch's samples, each noised to a level of its own."""
        schedule, rng = nets.student.schedule, batch.rng
        weights = self.first_probabilities if progress.fraction < self.first_share else self.probabilities
        t = self.levels(schedule).to(rng.device)[rng.choice(batch.n, weights)]
        x_t = schedule.add_noise(batch.x, rng.normal_like(batch.x), t)
        made: Tensor = nets.student.to_data(x_t, t, batch.cond)
        return made

    def levels(self, schedule: Schedule) -> Tensor:
        """The times of the student, the noisiest first: 1, 0.75, 0.5, 0.25 on flow matching."""
        times: Tensor = grids.student_grid(schedule, len(self.probabilities))[:-1]
        return times.to(torch.float64)

    def student(self, nets: Networks) -> Student:
        times = self.levels(nets.student.schedule).tolist()
        chosen = {k: [times[math.floor(i * len(times) / k)] for i in range(k)] for k in self.steps}
        return Student(nets.student, {k: Plan(tuple(found), gamma=1.0) for k, found in chosen.items()})
