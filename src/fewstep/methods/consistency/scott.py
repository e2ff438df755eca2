"""SCott: Stochastic Consistency Distillation (Liu et al. 2024, arXiv 2403.01505).

Latent consistency distillation (:mod:`fewstep.methods.consistency.lcm`) whose teacher walks from ``t`` to ``s`` by
``substeps`` of a *stochastic* solver, with fresh noise in each, and a game for what the regression loses::

    x_s   = noisy sub-steps of the guided teacher from t to s,   s = t - k in the teacher's own index
    loss  = E || f_theta(x_t, t, w) - sg f_target(x_s, s, w) ||^2  -  gan_weight l(f_theta(x_t, t, w))

A squared distance to a noisy target is smallest at its mean.  With the noise scale ``eta`` the fixed point is the mean
over the *stochastic* paths: on data N(0, c^2), in the noise level ``r``::

    f(y, r) = (c^2 / (c^2 + r^2))^((1 + eta^2) / 2) y

from the flow's own map at ``eta = 0`` to the denoiser at ``eta = 1``, whose one call has no variety left.  So the noise
is small, and a discriminator (hinge loss, on the features of a frozen network) puts the variance back.

No code of the authors is public.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from fewstep.denoisers import Denoiser
from fewstep.methods.alarm import Alarm
from fewstep.methods.consistency.lcm import LatentConsistencyDistillation
from fewstep.methods.method import Batch, Networks, Optimizer, Paper, Progress, System, Update
from fewstep.methods.parts.adversary import Adversary, Hinge
from fewstep.methods.parts.distribution_matching import LOST_MODES, WON_GAME
from fewstep.methods.parts.score_matching import sample_std
from fewstep.methods.parts.teacher_steps import DDIMNoise, StepNoise, stochastic_steps, times_between
from fewstep.methods.parts.trained_decoder import body_and_heads
from fewstep.methods.start import Start, denoiser_in
from fewstep.ranges import Count, Least, NonNegative
from fewstep.schedules import Schedule

#: Weak enough to keep the variety of one call, and among what the paper compares.
WEAK = DDIMNoise(0.1)


@dataclass(frozen=True)
class StochasticConsistencyDistillation(LatentConsistencyDistillation):
    """LCM with a stochastic teacher and an adversary; without noise, in one sub-step and without the game it is LCM.

    The discriminator looks at the features of the teacher, or of another denoiser of the same samples in the role
    "guide": at its bottleneck, or at the ``layers`` that are named, or at the end of a copy that trains weights of
    ``discriminator_rank`` in its decoder.  ``gan_weight = 0`` leaves it out altogether.  ValueError for layers and a
    rank.
    """

    name: ClassVar[str] = "scott"
    paper: ClassVar[Paper] = Paper(
        "SCott: Accelerating Diffusion Models with Stochastic Consistency Distillation", "2403.01505", "reconstructed",
        ("no code of the authors is public, and the accounts of the paper differ; what is here is from its abstract, "
         "from two summaries and from ER-SDE's own code",
         "the discriminator sees frozen features, unless `discriminator_rank` asks for the paper's low-rank weights in "
         "the decoder of the teacher's U-Net",
         "the discriminator looks at noised samples, at all levels (at the latents themselves there)",
         "one update of the discriminator for each of the student's (the paper's ratio is not known)",
         "`lr` and `critic_lr` suit networks of a million parameters and runs of minutes (8e-6 and 2e-5 there)",
         "`gan_weight` is smaller than the paper's 0.4, for distances that are means over a sample",
         "the learning rate falls linearly to 0 over the budget (not known there)",
         "the range of guidance is LCM's here, 1 to 4; the paper's is not known",
         "the last step of the teacher's solver goes to clean data, as LCM's sampler takes it",
         "sampling uses a power-function average of the weights"),
    )  # fmt: skip
    system: ClassVar[System] = System(
        "SCott", 2024, "consistency", "teacher, data", "1, 2, 4",
        "latent consistency distillation with a stochastic teacher of several sub-steps, and a GAN",
    )  # fmt: skip
    healthy: ClassVar[dict[str, str]] = {
        "student/consistency": "falls, and stays above 0: its least value is the variance that the teacher's noise "
        "gives the target",
        "student/gan": "wanders around 0; a steady rise says that the discriminator wins",
        "discriminator/discriminator_accuracy": "between 0.5 and 0.8",
        "student/sample_std": "of predictions from all noise levels; a fall says that samples become alike",
    }
    unstable: ClassVar[dict[str, Alarm]] = {
        "discriminator/discriminator_accuracy": WON_GAME,
        "student/sample_std": LOST_MODES,
    }
    roles: ClassVar[tuple[str, ...]] = ("student", "guide")

    skip: Annotated[Count, "steps of the teacher's table between the two states, thousandths without one"] = 24
    steps: Annotated[tuple[Count, ...], "network calls that the student is made for, one plan each"] = (1, 2, 4)
    noise: Annotated[StepNoise, "noise of the teacher's steps: DDIM's eta, or ER-SDE's phi"] = WEAK
    substeps: Annotated[Count, "steps of the teacher between the two states"] = 3
    gan_weight: Annotated[NonNegative, "weight of the adversarial term; 0 leaves the discriminator out"] = 0.02
    layers: Annotated[
        tuple[str, ...] | None, "layers whose features the discriminator sees; none for the bottleneck"
    ] = None
    discriminator_rank: Annotated[
        int, Least(0), "rank of the weights that the discriminator trains in its decoder; 0 for a head alone"
    ] = 0
    critic_lr: Annotated[NonNegative, "learning rate of the discriminator"] = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers and self.discriminator_rank:
            raise ValueError(
                f"scott: discriminator_rank={self.discriminator_rank} trains what the discriminator sees at the end of "
                f"the network, and layers={self.layers} name others: ask for one of the two"
            )

    def check(self, teacher: Denoiser) -> None:
        super().check(teacher)
        self.noise.check_levels(teacher.schedule.ratio(self.walked(teacher.schedule)))

    def walked(self, schedule: Schedule) -> Tensor:
        """All times that the teacher's solver comes by, falling."""
        grid = self.times(schedule)
        inner = [times_between(schedule, t, s, self.substeps)[:-1] for t, s in pairwise(grid[:, None])]
        return torch.cat([*inner, grid[-1:, None]]).flatten()

    def networks(self, start: Start) -> Networks:
        nets = super().networks(start)
        if not self.gan_weight:
            return nets
        body = denoiser_in(start.model("guide"), "guide").native()
        if body.shape != start.teacher.shape:
            raise ValueError(f"the guide makes samples {list(body.shape)}, the teacher {list(start.teacher.shape)}")
        rules = Adversary(Hinge(), layers=self.layers or ())
        game, trained = body_and_heads(rules, body, self.discriminator_rank, start)
        group = Optimizer(trained, self.critic_lr, kind="adamw", clip=1.0)
        return Networks(
            {**dict(nets.named_children()), **game}, {**nets.groups, "discriminator": group}, nets.ema, nets.moved
        )

    def ahead(self, teacher: Denoiser, x: Tensor, t: Tensor, s: Tensor, batch: Batch) -> Tensor:
        times = times_between(teacher.schedule, t, s, self.substeps)
        # draws of its own: runs that differ in the walk share all others
        return stochastic_steps(teacher, x, times, self.noise, batch.rng.stream("teacher"), batch.cond)

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        made, aim, _ = self.both_ends(nets, batch)
        loss = nets.distance(made, aim).mean()
        logs = {"consistency": loss.detach(), "sample_std": sample_std(made)}
        if not self.gan_weight:
            yield Update("student", loss, logs, self.moves(nets))
            return
        with nets.held("discriminator"):
            told = nets.discriminator.student_loss(nets.body, made, batch.cond, batch.rng)
            logs["gan"] = told.detach()
            yield Update("student", loss + self.gan_weight * told, logs, self.moves(nets))
        judged, more = nets.discriminator.loss(nets.body, batch.x, made.detach(), batch.cond, batch.rng)
        yield Update("discriminator", judged, more)
