"""Align Your Flow (Sabour et al. 2025, arXiv 2506.14603): flow maps distilled in continuous time.

``x_s = x_t + (s - t) F(x_t, t, s)`` on flow matching, between any two times.  Two objectives move ``F`` against a
direction ``g`` that is zero at the teacher's map, with the student's own ``F^-`` held::

    Eulerian (EMD)      g = (F^- - v(x_t, t)) + r (t - s) dF^-/dt        one jvp along (v, 1, 0) in (x, t, s)
    Lagrangian (LMD)    g = F^- + r (s - t) dF^-/ds - v(x_s, s)          along (0, 0, 1); v at the student's own x_s
    loss                || F - sg(F^- - g / (||g|| + c)) ||^2            tangents normalised, c = 0.1
    warm-up             r = min(0.99, progress): first velocity matching, never without a little of it

``v`` is the teacher's, led away from a worse version of it (autoguidance) or from the unconditional one, by a weight
that is drawn for every sample and that the student is told: sampling chooses it.  Pairs of times by the length of the
jump first, ``d = sigmoid(gap_mean + gap_std n)``, ``s`` uniform where it fits.

No official code is public; equations from the paper as two summaries and a re-implementation give them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fewstep import grids
from fewstep.conditions import Cond, repeat
from fewstep.denoisers import Denoiser
from fewstep.extras import Input
from fewstep.flow_maps import Jump
from fewstep.guidance import Autoguided, Guided
from fewstep.methods.alarm import Alarm, Grows
from fewstep.methods.method import Batch, Method, Networks, Optimizer, Paper, Progress, Question, System, Update
from fewstep.methods.parts.adversarial_phase import AdversarialPhase
from fewstep.methods.parts.adversary import Adversary, Relativistic
from fewstep.methods.parts.balance import Balanced, balance_losses
from fewstep.methods.parts.distribution_matching import WON_GAME
from fewstep.methods.parts.identities import Direction, eulerian, lagrangian, regression, sizes
from fewstep.methods.parts.times import GapFirst, PairLaw
from fewstep.methods.start import Start, denoiser_in
from fewstep.methods.teachers.retime import check_time_input
from fewstep.ranges import Count, NonNegative, Positive, Share
from fewstep.sampling.rollout import Student, plans_along
from fewstep.schedules import FlowMatching


class Asked(NamedTuple):
    """The jumps of a batch: from states ``x`` ``[B, ...]`` at times ``t`` to ``s``, ``[B]`` each, under conditions and
    the guidance weights that the student is told."""

    x: Tensor
    t: Tensor
    s: Tensor
    cond: Cond
    weights: Mapping[str, Any]


@dataclass(frozen=True)
class _AlignYourFlow(Method):
    """What the two objectives share.

    ``guidance_low`` and ``guidance_high`` bound the guidance weight of training, ``guidance`` is that of samples unless
    they ask for another; where the bounds are equal the weight is no input.  With the role "guide" it is autoguidance.
    """

    healthy: ClassVar[dict[str, str]] = {
        "student/loss": "stays near (||g|| / (||g|| + c))^2 / d by construction: it says nothing about quality",
        "student/tangent_norm": "falls, may rise while the warm-up lasts and falls again; growth to many times its "
        "first value is the instability that normalization and warm-up prevent",
    }
    unstable: ClassVar[dict[str, Alarm]] = {
        "student/tangent_norm": Grows(
            "give the tangent a longer warm-up (tangent_warmup), lower lr, or retime the network"
        ),
        "discriminator/discriminator_accuracy": WON_GAME,
    }
    roles: ClassVar[tuple[str, ...]] = ("student", "guide")

    lr: Annotated[NonNegative, "learning rate"] = 5e-4
    c: Annotated[Positive, "constant of the tangent normalization g / (|g| + c)"] = 0.1
    tangent_warmup: Annotated[Share, "share of the budget in which the tangent's weight r would rise to 1"] = 0.5
    r_max: Annotated[Share, "greatest weight of the tangent: below 1 a little velocity matching stays"] = 0.99
    gap_mean: Annotated[float, "mean of logit(t - s)"] = -0.6
    gap_std: Annotated[NonNegative, "standard deviation of logit(t - s)"] = 1.6
    guidance: Annotated[float, "guidance weight of samples that ask for none"] = 2.0
    guidance_low: Annotated[float, "least guidance weight that the student learns, 1 for none"] = 1.0
    guidance_high: Annotated[float, "greatest guidance weight that the student learns"] = 3.0
    gan_share: Annotated[Share, "last share of the budget, in which a discriminator joins; 0 for none"] = 0.0
    gan_lr: Annotated[NonNegative, "learning rate of the discriminator"] = 1e-3
    gamma: Annotated[Share, "noise put back between calls: 0 deterministic, 1 all of it"] = 0.0
    steps: Annotated[tuple[Count, ...], "network calls that the student is made for, one plan each"] = (1, 2, 4, 8)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.guidance_low <= self.guidance <= self.guidance_high:
            raise ValueError(
                f"guidance={self.guidance:g} must lie between guidance_low={self.guidance_low:g} and "
                f"guidance_high={self.guidance_high:g}"
            )

    @property
    def weights(self) -> dict[str, Input]:
        """The guidance weight as an input of the student; nothing where it is fixed."""
        if self.guidance_low == self.guidance_high:
            return {}
        return {"w": Input(self.guidance, self.guidance_low, self.guidance_high, unguided=1.0)}

    def networks(self, start: Start) -> Networks:
        schedule = FlowMatching()
        network = start.network("student", extras=("s", *self.weights), on=schedule)
        check_time_input(network)
        modules: dict[str, nn.Module] = {
            "student": Jump(network, two_times=True, extras=self.weights),
            "teacher": start.teacher.on(schedule),
        }
        if "guide" in {**start.made, **start.given}:
            modules["guide"] = denoiser_in(start.model("guide"), "guide").on(schedule)
        optimizer = Optimizer(("student",), self.lr, betas=(0.9, 0.99), warmup=20, decay="cosine")
        modules |= self.phase.modules(start.teacher.on(schedule), start.condition())
        nets = Networks(modules, {"student": optimizer, **self.phase.optimizers()}, ema=("student",))
        self.teacher(nets, self.guidance_high)  # ValueError for a guide or a teacher that cannot guide
        return nets

    def teacher(self, nets: Networks, w: float | Tensor) -> Denoiser:
        """The teacher under the guidance weight ``w``, a number or one a sample ``[B]``."""
        if self.guidance_low == self.guidance_high == 1:
            return nets.teacher
        if "guide" in dict(nets.named_children()):
            return Autoguided(nets.teacher, nets.guide, w)
        if nets.teacher.null is None:
            raise ValueError(
                f"guidance_low={self.guidance_low:g}, guidance_high={self.guidance_high:g}: this teacher is "
                "unconditional, or knows no empty condition; give a guide, or set both and guidance to 1"
            )
        return Guided(nets.teacher, w)

    @property
    def phase(self) -> AdversarialPhase:
        """Its penalties are the published ``0.05 |dl/dx|^2``, by differences over 0.1."""
        return AdversarialPhase(self.gan_share, self.gan_lr, Adversary(Relativistic(), r1=5.0, r2=5.0))

    def times(self) -> PairLaw:
        """The law of ``(t, s)``."""
        return GapFirst(self.gap_mean, self.gap_std)

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update | Question]:
        student, rng, phase = nets.student, batch.rng, self.phase
        if phase.discriminates(progress):
            with torch.no_grad():
                end, told = self.one_jump(student, batch)
                fake = student(*end, batch.cond, **told)
            yield phase.discriminate(nets, batch.x, fake, batch.cond, rng)
            return
        t, s = self.times().draw(student.schedule, batch.n, rng)
        x = student.schedule.add_noise(batch.x, batch.normal(), t)
        w = rng.stream("guidance").uniform(batch.n, low=self.guidance_low, high=self.guidance_high)
        teacher = self.teacher(nets, w if self.weights else self.guidance_low)
        told = {name: w.to(torch.promote_types(x.dtype, torch.float32)) for name in self.weights}
        r = min(self.r_max, progress.fraction / self.tangent_warmup) if self.tangent_warmup else self.r_max
        own = self.direction(student, teacher, Asked(x, t, s, batch.cond, told), r)
        logs: dict[str, Tensor | float] = {"tangent_norm": sizes(own.g).mean(), "warmup": r}
        if not phase.joins(progress):
            f = student.mean_velocity(x, t, s, batch.cond, **told)
            yield Update("student", regression(f, own, c=self.c).mean(), logs)
            return
        # both losses from one call of the student
        (z, one, zero), further = self.one_jump(student, batch)
        told = {name: torch.cat([w, further[name]]) for name, w in told.items()}
        times = torch.cat([t, one]), torch.cat([s, zero])
        f = student.mean_velocity(torch.cat([x, z]), *times, repeat(batch.cond, 2), **told)
        loss = regression(f[: batch.n], own, c=self.c).mean()
        fake = student.schedule.move(z, f[batch.n :], one, zero)
        with nets.held("discriminator"):
            gan = phase.student_loss(nets, fake, batch.cond, rng, batch.x)
            logs["gan"], adversarial = gan.detach(), Balanced(gan, 1.0, phase.least, phase.most)
            loss, (logs["gan_weight"],) = yield from balance_losses(loss, adversarial, at=f)
            yield Update("student", loss, logs)

    def one_jump(self, student: Jump, batch: Batch) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Tensor]]:
        """Noise and the two ends of the whole range, ``[B]``, with the guidance weight of samples that ask for none."""
        z = batch.normal()
        one = torch.full((batch.n,), student.schedule.t_max, dtype=torch.float64, device=z.device)
        weight = {name: torch.full_like(one, given.default).to(z.dtype) for name, given in self.weights.items()}
        return (z, one, torch.full_like(one, student.schedule.t_min)), weight

    @abstractmethod
    def direction(self, student: Jump, teacher: Denoiser, asked: Asked, r: float) -> Direction:
        """The student's own ``F^-`` and what it is wrong by, with the tangent's weight ``r``."""

    def student(self, nets: Networks) -> Student:
        schedule = nets.student.schedule
        return Student(
            nets.student,
            plans_along(grids.uniform, schedule, self.steps, self.gamma),
        )


@dataclass(frozen=True)
class AlignYourFlow(_AlignYourFlow):
    """Eulerian map distillation: the start of the jump moves along the teacher's velocity.

    Its tangent is the less stable one: with a warm-up over half of the budget one run of three went wrong on
    Fashion-MNIST after 200 iterations.
    """

    name: ClassVar[str] = "ayf"
    paper: ClassVar[Paper] = Paper(
        "Align Your Flow: Scaling Continuous-Time Flow Map Distillation", "2506.14603", "from paper text",
        ("no official code: equations and constants from two summaries of the paper and from code of third parties",
         "the adversarial finetuning (gan_share; about 3000 iterations there) is off by default; its discriminator "
         "sees features of the frozen teacher (StyleGAN2's, of pixels, there) and samples of one jump from noise, and "
         "its gradient penalties R1 and R2 are differences",
         "the warm-up counts shares of the budget, the learning rate falls to 0 over it; the Lagrangian objective has "
         "the Eulerian one's warm-up and laws",
         "without a guide, classifier-free guidance in its place (the paper's ablation, worse there)",
         "samples have guidance weight 2 unless they ask for another (tuned for each number of calls there)",
         "a network that is told a time that changes fast, a logarithm or a count of steps, is refused (the paper "
         "first adapts it to t itself; retime does)",
         "the target time and the guidance weight are inputs that start at zero"),
    )  # fmt: skip
    system: ClassVar[System] = System(
        "Align Your Flow", 2025, "flow maps", "teacher, data", "1, 2, 4, 8",
        "flow maps distilled in continuous time, under autoguidance", page="align-your-flow",
    )  # fmt: skip

    tangent_warmup: Annotated[Share, "share of the budget in which the tangent's weight r would rise to 1"] = 0.9

    def direction(self, student: Jump, teacher: Denoiser, asked: Asked, r: float) -> Direction:
        with torch.no_grad():
            v = teacher.velocity(asked.x, asked.t, asked.cond)
        return eulerian(student, asked.x, asked.t, asked.s, v, asked.cond, r=r, **asked.weights)


@dataclass(frozen=True)
class LagrangianAlignYourFlow(_AlignYourFlow):
    """Lagrangian map distillation: the end of the jump moves as the teacher's velocity says there.

    It looks better than the Eulerian objective in two dimensions and blurs pictures (in the paper a Fréchet distance of
    6.7 in four calls, against 1.7).
    """

    name: ClassVar[str] = "ayf-lmd"
    paper: ClassVar[Paper] = AlignYourFlow.paper

    def direction(self, student: Jump, teacher: Denoiser, asked: Asked, r: float) -> Direction:
        return lagrangian(student, asked.x, asked.t, asked.s, teacher, asked.cond, r=r, **asked.weights)
