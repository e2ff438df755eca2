"""SANA-Sprint: continuous-time consistency beside a latent adversary (Chen et al. 2025, arXiv 2503.09641).

A flow-matching teacher is a TrigFlow one without training (``teacher.on(TrigFlow(...))``, exact), so that the student
can be trained by sCM's loss; heads on features of the frozen teacher add what local consistency does not see::

    x' = f(cos t' x_0 + sin t' z', t'),    t' as in sCM's law, but t_max with probability max_time
    student:  sCM's loss at (x_t, t, v under a guidance that it is told)  -  adversary_weight E l(x'_s, s)
    heads:    (relu(1 - l(x_0 at s)) + relu(1 + l(x' at s))) / 2,         log(sigma_s / alpha_s) ~ N(-0.6, 1)

``x'`` is made of fresh noise; looking at ``t_max`` half of the time is what one call needs.  Where there are
conditions, data under those of another sample count as generated.  Student and heads move in turn.  Before all this
(``retime``, a share of the budget) the network learns to be told a time that changes slowly: a tangent is a thousand
times as large where it counts a thousand steps.

Read against NVlabs/Sana, train_scripts/train_scm_ladd.py (Apache-2.0).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from fewstep.conditions import Cond, leaves
from fewstep.denoisers import Denoiser
from fewstep.flow_maps import Jump
from fewstep.grids import uniform
from fewstep.methods.alarm import Alarm, Grows
from fewstep.methods.consistency.scm import tangent_update, trig_like
from fewstep.methods.method import (
    Batch,
    Method,
    Networks,
    Optimizer,
    Paper,
    Progress,
    Question,
    Rows,
    Stage,
    System,
    Update,
)
from fewstep.methods.parts.adversary import Adversary, Discriminator, Hinge
from fewstep.methods.parts.distribution_matching import LOST_MODES, WON_GAME
from fewstep.methods.parts.from_noise import ends_in_noise
from fewstep.methods.parts.heads import PatchHead
from fewstep.methods.parts.identities import TimeWeight
from fewstep.methods.parts.score_matching import sample_std
from fewstep.methods.parts.teacher_steps import guidance_input, guided_by_choice
from fewstep.methods.parts.times import LogNormal
from fewstep.methods.start import Start
from fewstep.methods.teachers.retime import Retime, check_time_input
from fewstep.ranges import Count, NonNegative, Positive, Share
from fewstep.sampling.inputs import evaluating
from fewstep.sampling.rollout import Plan, Student, plans_along
from fewstep.schedules import Schedule, TrigFlow

#: The angles of calls after the first, found greedily by the authors.
LATER = {2: (1.3,), 4: (1.3, 1.1, 0.6)}


def wrapping(schedule: Schedule, sigma_data: float) -> TrigFlow:
    """TrigFlow over the noise levels of a schedule, up to ``pi / 2`` where that ends in pure noise."""
    return (
        TrigFlow(t_max=math.pi / 2, sigma_data=sigma_data)
        if ends_in_noise(schedule)
        else trig_like(schedule, sigma_data)
    )


@dataclass(frozen=True)
class SanaSprint(Method):
    """sCM and a latent adversary, for one to four calls.

    ``guidances`` are the scales of the teacher's guidance that are drawn from; the student takes the scale as an input
    ``w`` where there are several.  ``noise_mean`` and ``noise_std`` are sCM's law of ``log(sigma / alpha)``,
    ``heads_mean`` and ``heads_std`` that of the heads.  ``adversary_weight = 0`` is sCM.
    """

    name: ClassVar[str] = "sana-sprint"
    paper: ClassVar[Paper] = Paper(
        "SANA-Sprint: One-Step Diffusion with Continuous-Time Consistency Distillation", "2503.09641", "verified",
        ("`lr`, `discriminator_lr`: Adam at rates for runs of minutes, which fall to 0 along a cosine for the student "
         "(`decay`; CAME at 2e-6 for both there)",
         "`guidances` are 1, 1.5 and 2, for small models (4, 4.5 and 5 there)",
         "`tangent_warmup` is nine tenths of the budget, as for sCM here (4000 of 20000 iterations there)",
         "`retime` is off unless asked for, because a network that is told a slow time needs none; it tells the angle "
         "and regresses on the teacher's own outputs (5000 iterations of the denoising loss on t in [0, 1] there)",
         "RMS norms of queries and keys are not added to networks that lack them: give a teacher that has them",
         "no further factor 1 / (sigma_data tan t) on sCM's loss, which the learned weight would take up",
         "student and heads see the same samples in one iteration, with draws of their own (another batch each there)",
         "a sample whose condition is its neighbour's makes no mismatched pair: the student's own sample stands for it",
         "heads are normalised over the sample (over virtual batches of 8 there)",
         "the guidance is embedded by a linear layer that starts at 0 (times 0.1, added to the time there)",
         "time weight on its own small embedding (a linear layer on the network's there)"),
    )  # fmt: skip
    system: ClassVar[System] = System(
        "SANA-Sprint", 2025, "consistency", "flow teacher, data", "1, 2, 4",
        "a flow-matching teacher as a TrigFlow one, continuous-time consistency and a latent adversary",
    )  # fmt: skip
    healthy: ClassVar[dict[str, str]] = {
        "student/tangent_norm": "falls over the run; growth to many times its first value is an instability",
        "student/adversary": "minus the mean logit of samples: swings about 0",
        "discriminator/loss": "1 where the heads know nothing; falls at first, then rises as the student catches up",
        "discriminator/discriminator_accuracy": "between 0.5 and 0.8; near 1 the student is taught nothing",
        "student/sample_std": "of samples among themselves: stays near the data's; a slide to 0 is collapse",
    }
    unstable: ClassVar[dict[str, Alarm]] = {
        "student/tangent_norm": Grows("give the tangent a longer warm-up (tangent_warmup), lower lr, or retime"),
        "discriminator/discriminator_accuracy": WON_GAME,
        "student/sample_std": LOST_MODES,
    }
    roles: ClassVar[tuple[str, ...]] = ("student",)

    lr: Annotated[NonNegative, "learning rate of the student"] = 1e-4
    discriminator_lr: Annotated[NonNegative, "learning rate of the heads"] = 1e-3
    sigma_data: Annotated[Positive, "TrigFlow's scale, the teacher's own"] = 0.5
    c: Annotated[Positive, "constant of the tangent normalization G / (|G| + c)"] = 0.1
    tangent_warmup: Annotated[Share, "share of the budget over which the tangent's unstable part rises to 1"] = 0.9
    guidances: Annotated[tuple[float, ...], "scales of the teacher's guidance, one drawn for each sample"] = (
        1.0,
        1.5,
        2.0,
    )
    noise_mean: Annotated[float, "mean of log(sigma / alpha) at the times of sCM's loss"] = 0.0
    noise_std: Annotated[NonNegative, "standard deviation of log(sigma / alpha) at those times"] = 1.6
    adversary_weight: Annotated[NonNegative, "weight of the adversarial term; 0 leaves it out altogether"] = 0.5
    max_time: Annotated[Share, "share of the adversary's samples that start from pure noise"] = 0.5
    heads_mean: Annotated[float, "mean of log(sigma / alpha) at the times that heads look at"] = -0.6
    heads_std: Annotated[NonNegative, "standard deviation of log(sigma / alpha) at those times"] = 1.0
    mismatched: Annotated[bool, "whether data under another sample's condition count as generated"] = True
    blocks: Annotated[Count, "blocks of the teacher that have a head, spread over its depth; 1 for the bottleneck"] = 4
    layers: Annotated[tuple[str, ...] | None, "names of the layers that have a head, in place of blocks"] = None
    clip: Annotated[Positive, "bound on the gradient norm"] = 0.1
    retime: Annotated[Share, "share of the budget in which the network first learns to be told the angle"] = 0.0
    steps: Annotated[tuple[Count, ...], "network calls that the student is made for, one plan each"] = (1, 2, 4)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.guidances:
            raise ValueError("sana-sprint: guidances=() must name at least one scale, such as 1")
        if self.retime == 1:
            raise ValueError("sana-sprint: retime=1 leaves nothing of the budget for the distillation itself")

    def stages(self) -> list[Stage]:
        if not self.retime:
            return [Stage(self)]
        return [Stage(Retime(sigma_data=self.sigma_data), self.retime), Stage(self, 1 - self.retime)]

    def networks(self, start: Start) -> Networks:
        schedule = wrapping(start.teacher.schedule, self.sigma_data)
        inputs = guidance_input(start.teacher, self.guidances)
        student = Jump(start.network("student", extras=tuple(inputs), on=schedule), extras=inputs)
        check_time_input(student.denoiser)
        teacher = start.teacher.on(schedule)
        modules: dict[str, nn.Module] = {"student": student, "weight": TimeWeight(), "teacher": teacher}
        # an update without numbers is left out, as in the official loop
        first = Optimizer(
            ("student", "weight"), self.lr, betas=(0.9, 0.99), eps=1e-11, clip=self.clip, warmup=10, decay="cosine",
            nonfinite="skip",
        )  # fmt: skip
        groups = {"student": first}
        if self.adversary_weight:
            rules = Adversary(
                Hinge(), LogNormal(self.heads_mean, self.heads_std), self.layers or (), self.blocks, PatchHead,
                apart=True,
            )  # fmt: skip
            modules["discriminator"] = Discriminator(rules, teacher, start.condition())
            groups["discriminator"] = Optimizer(
                ("discriminator",), self.discriminator_lr, betas=(0.0, 0.99), clip=self.clip, nonfinite="skip"
            )
        return Networks(modules, groups, ema=("student",))

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update | Question]:
        schedule, rng = nets.student.schedule, batch.rng
        t = LogNormal(self.noise_mean, self.noise_std).draw(schedule, batch.n, rng)
        x_t = schedule.add_noise(batch.x, rng.normal_like(batch.x), t)
        teacher, told = self.led(nets, batch)
        with torch.no_grad():
            v = teacher.velocity(x_t, t, batch.cond)
        r = min(1.0, progress.fraction / self.tangent_warmup) if self.tangent_warmup else 1.0
        update = tangent_update(nets, x_t, t, v, batch.cond, r=r, c=self.c, **told)
        if not self.adversary_weight:
            yield update
            return
        x = self.draw(nets, batch, told)
        with nets.held("discriminator"):
            fooled = nets.discriminator.student_loss(nets.teacher, x, batch.cond, rng)
            logs = {**update.logs, "adversary": fooled.detach(), "sample_std": sample_std(x)}
            yield dataclasses.replace(update, loss=update.loss + self.adversary_weight * fooled, logs=logs)
        with torch.no_grad(), evaluating(nets.student):
            x = self.draw(nets, batch, self.led(nets, batch)[1])
        wrong = (yield from mismatched_pairs(batch, x)) if self.mismatched else None
        loss, logs = nets.discriminator.loss(nets.teacher, batch.x, x, batch.cond, rng, wrong)
        yield Update("discriminator", loss, logs, nets.discriminator.follow)

    def led(self, nets: Networks, batch: Batch) -> tuple[Denoiser, dict[str, Tensor]]:
        """The guided teacher, and what the student is told of it."""
        teacher, w = guided_by_choice(nets.teacher, self.guidances, batch.n, batch.rng)
        return teacher, {name: w.to(batch.x) for name in nets.student.extras}

    def draw(self, nets: Networks, batch: Batch, told: dict[str, Tensor]) -> Tensor:
        """The student's data predictions of samples noised anew, ``max_time`` of them to pure noise."""
        schedule, rng = nets.student.schedule, batch.rng
        t = LogNormal(self.noise_mean, self.noise_std).draw(schedule, batch.n, rng)
        t = torch.where(rng.uniform(batch.n) < self.max_time, schedule.t_max, t)
        x_t = schedule.add_noise(batch.x, rng.normal_like(batch.x), t)
        made: Tensor = nets.student.to_data(x_t, t, batch.cond, **told)
        return made

    def student(self, nets: Networks) -> Student:
        schedule = nets.student.schedule
        plans = plans_along(uniform, schedule, self.steps, 1.0)
        for k in plans.keys() & LATER.keys():
            if LATER[k][0] < schedule.t_max:
                plans[k] = Plan((schedule.t_max, *LATER[k]), gamma=1.0)
        return Student(nets.student, plans)


def mismatched_pairs(batch: Batch, otherwise: Tensor) -> Generator[Question, Tensor, Any]:
    """Every sample's successor in the whole batch, which is a sample of another condition: ``[b, ...]`` for this part.

    Where both have one condition, ``otherwise`` stands in.  None where there are no conditions, or no other sample.
    """
    if batch.cond is None:
        return None
    place = batch.rng.part * batch.n + torch.arange(batch.n, dtype=torch.float64, device=batch.x.device)
    places = yield Rows(place)
    everyone = yield Rows(batch.x)
    if len(everyone) < 2:
        return None
    next_one = places.argsort()[((place + 1) % len(everyone)).long()]
    wrong = everyone[next_one]
    own = fingerprints(batch.cond)
    told = yield Rows(own)
    same = torch.isclose(told[next_one], own, rtol=1e-9, atol=0).all(1)
    return torch.where(same.reshape(-1, *[1] * (wrong.ndim - 1)), otherwise, wrong)


def fingerprints(cond: Cond) -> Tensor:
    """A few numbers ``[B, leaves]`` of every row of a condition, the same where the rows are."""
    flat = [leaf.double().reshape(len(leaf), -1) for leaf in leaves(cond).values()]
    return torch.stack([(1 + leaf.mul(torch.arange(1.0, leaf.shape[1] + 1).to(leaf).cos())).sum(1) for leaf in flat], 1)
