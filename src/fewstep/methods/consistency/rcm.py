"""rCM: score-regularized continuous-time consistency (Zheng et al. 2025, arXiv 2510.08431).

sCM (:mod:`fewstep.methods.consistency.scm`) teaches from small noise to large; its errors add up on the way, and where
``cos t`` is small what a student says is taught by itself.  A second term looks at the samples that its whole rollout
ends with, and moves them along the difference of two scores (DMD): mode-seeking where the first is mode-covering.  On
TrigFlow, with ``F`` the student's velocity and ``f = cos t x - sin t F``::

    g      = cos t sqrt(1 - r^2 sin^2 t) (F^- - v) + r [cos t sin t x + J],   J = cos t sin t dF^-/dt along (v, 1)
    L_sCM  = || F - sg F^- + g / (||g|| + c) ||^2                     t ~ p_G, v the teacher's velocity
    x      = the last of n calls of the student, n in 1 .. rollout_steps, the calls before it without a gradient:
             t_1 = t_max, t_k = min(t'_k, t_{k-1}), t'_k ~ p_D;  x_{t_k} = cos t_k f(x_{t_{k-1}}) + sin t_k z
    q      = (D_critic - D_teacher)(x_tau) / mean|x - D_teacher(x_tau)|,      tau ~ p_D
    L_DMD  = || x - sg(x - q) ||^2
    student:   L_sCM + matching_weight L_DMD
    critic:    || F_critic(x_tau) - (cos tau eps - sin tau x) ||^2 = || x - D_critic(x_tau) ||^2 / sin^2 tau

Norms are sums over a sample.  Up to ``tangent_warmup`` the student learns from the first term alone, ``r`` rising to 1;
then one iteration of ``student_every`` is the student's, the others are the critic's.  At ``r = 1`` the first term is
sCM's without its learned weight.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from fewstep.conditions import Cond
from fewstep.flow_maps import FlowMap, Jump
from fewstep.methods.alarm import Alarm, Falls, Grows
from fewstep.methods.method import Batch, Method, Networks, Optimizer, Paper, Progress, System, Update
from fewstep.methods.parts.distribution_matching import RUNAWAY_CRITIC, matching_loss
from fewstep.methods.parts.identities import Direction, eulerian, regression, sizes
from fewstep.methods.parts.score_matching import velocity_loss
from fewstep.methods.parts.teacher_steps import guided
from fewstep.methods.parts.times import LogNormal, ShiftedUniform, TimeLaw
from fewstep.methods.start import Start
from fewstep.methods.teachers.retime import check_time_input
from fewstep.randomness import Rng
from fewstep.ranges import Count, NonNegative, Positive, Share
from fewstep.sampling.inputs import evaluating
from fewstep.sampling.rollout import Plan, Student
from fewstep.schedules import Schedule, TrigFlow, align
from fewstep.tangents import semi_continuous, tangent

#: The times of a plan after its first.
LATER = (1.3, 1.0, 0.6)
#: The shift of the times at which samples with frames are matched.
FRAME_SHIFT = 5.0


def trig_reach(schedule: Schedule, sigma_data: float) -> TrigFlow:
    """TrigFlow up to the noise level at which another schedule begins."""
    trig = TrigFlow(t_max=math.pi / 2, sigma_data=sigma_data)
    top = trig.time_at(schedule.log_snr(torch.tensor(schedule.t_max, dtype=torch.float64)))
    return TrigFlow(t_max=float(top), sigma_data=sigma_data)


def frames(shape: tuple[int, ...]) -> int:
    """The number of frames of samples ``[C, F, H, W]``, 1 of any others."""
    return shape[1] if len(shape) == 4 else 1


def student_direction(
    student: FlowMap, x: Tensor, t: Tensor, v: Tensor, cond: Cond, *, r: float, difference: float = 0.0
) -> Direction:
    """The student's velocity and its ``g`` at the states ``x`` ``[B, ...]``, times ``t`` ``[B]`` and velocities ``v``:
    sCM's at ``r = 1``, whose warm-up leaves the first term at its weight ``cos^2 t``."""
    engine = partial(semi_continuous, step=difference) if difference else tangent
    s, cos = torch.full_like(t, student.schedule.t_min), t.cos()
    f, g = eulerian(student, x, t, s, v, cond, r=r, scale=cos, engine=engine)
    more = cos * ((cos.square() + (1 - r**2) * t.sin().square()).sqrt() - cos)  # 0 at r = 1, to the last bit
    return Direction(f, g + align(more, x) * (f - v))


@torch.no_grad()
def last_call(
    student: FlowMap, noise: Tensor, calls: int, law: TimeLaw, rng: Rng, cond: Cond = None
) -> tuple[Tensor, Tensor]:
    """The states ``[B, ...]`` and times ``[B]`` at which the last of ``calls`` calls is made: those before it go to the
    data from ``t_max`` on, and noise lifts what they give to a time of ``law``, at most that of the call."""
    schedule = student.schedule
    x, t = schedule.prior(noise), torch.full((len(noise),), schedule.t_max, dtype=torch.float64, device=noise.device)
    for _ in range(calls - 1):
        clean = student.to_data(x, t, cond)
        t = torch.minimum(law.draw(schedule, len(clean), rng), t)
        x = schedule.add_noise(clean, rng.normal_like(clean), t)
    return x, t


@dataclass(frozen=True)
class RCM(Method):
    """Continuous-time consistency with distribution matching on the student's own rollouts.

    ``matching_weight = 0`` leaves the critic out: sCM distillation without its learned weight;
    ``consistency_weight = 0`` leaves the tangent out: distribution matching, which needs no data.  Both norms are sums
    over a sample: that of the first term is about 1 whatever the size of a sample, that of the second grows with it, so
    that ``matching_weight`` weighs more in pictures of many numbers.  Samples with frames, ``[C, F, H, W]``, have the
    noise levels of both log-normal laws times ``sqrt(F)``, and are matched at flow-matching times of shift 5 unless
    ``matching_shift`` says otherwise (0: log-normal).  ``sigma_max`` is where sampling starts, as far as the teacher
    reaches; training starts rollouts at the teacher's noisiest level.  ``difference`` is the step of the tangent's
    derivative in time, 0 for the exact one.
    """

    name: ClassVar[str] = "rcm"
    paper: ClassVar[Paper] = Paper(
        "Large Scale Diffusion Distillation via Score-Regularized Continuous-Time Consistency", "2510.08431",
        "verified",
        ("`lr` and `critic_lr` suit networks of a million parameters and runs of minutes, and the critic's is higher "
         "than the student's (2e-6 and 4e-7 there, for Wan of 1.3B parameters)",
         "`tangent_warmup` is half of the budget (1000 of 10k iterations for Wan there, none for Cosmos)",
         "`sigma_data` is that of the bundled teachers (1, of latents, there)",
         "`guidance` is 1, for small models (its code adds the 5 that it sets for Wan to 1)",
         "the student's rate follows a cosine over the budget",
         "how many calls a rollout has is drawn, not counted through in turn",
         "rollouts in training start at the teacher's noisiest level (at pi/2 there, which flow matching reaches); "
         "what divides q is kept from 0 by 1e-8 (1e-5 there)",
         "the tangent is taken in float32 whatever the precision of training (time path alone there); samples that are "
         "not finite stop the run (masked there)",
         "no context parallelism and no layer-wise pairs of value and tangent: networks are differentiated as they "
         "are, their attention by a rule of its own",
         "small teachers of digits, points and tiny video tensors only; no Cosmos or Wan was distilled"),
    )  # fmt: skip
    system: ClassVar[System] = System(
        "rCM", 2025, "consistency", "teacher, data", "1-4",
        "continuous-time consistency regularised by score distillation of the student's own rollouts",
    )  # fmt: skip
    healthy: ClassVar[dict[str, str]] = {
        "student/consistency": "stays near (||g|| / (||g|| + c))^2 by construction: it says nothing about quality",
        "student/tangent_norm": "falls over the run; growth to many times its first value is the instability that "
        "tangent normalisation and warm-up prevent",
        "student/matching_norm": "starts near 0 when the warm-up ends (the critic is a copy of the teacher), rises as "
        "the critic turns to the student's samples, then falls slowly",
        "student/sample_std": "stays near the data's; a slide to 0 is collapse",
        "critic/denoising": "stays level: its target moves with the student, a fall is not the goal",
    }
    unstable: ClassVar[dict[str, Alarm]] = {
        "student/tangent_norm": Grows(
            "give the tangent a longer warm-up (tangent_warmup), lower lr, or retime the network"
        ),
        "student/sample_std": Falls("samples become alike, modes are lost: lower matching_weight, or raise critic_lr"),
        "critic/denoising": RUNAWAY_CRITIC,
    }
    roles: ClassVar[tuple[str, ...]] = ("student",)

    lr: Annotated[NonNegative, "learning rate of the student"] = 3e-4
    critic_lr: Annotated[NonNegative, "learning rate of the critic"] = 1e-3
    sigma_data: Annotated[Positive, "TrigFlow's scale, the teacher's own"] = 0.5
    c: Annotated[Positive, "constant of the tangent normalization g / (|g| + c)"] = 0.1
    guidance: Annotated[float, "scale of the teacher's classifier-free guidance, 1 for none"] = 1.0
    consistency_weight: Annotated[NonNegative, "weight of the consistency term; 0 leaves it out"] = 1.0
    matching_weight: Annotated[NonNegative, "weight of the distribution matching; 0 leaves it and its critic out"] = (
        0.01
    )
    tangent_warmup: Annotated[
        Share, "share of the budget over which the tangent's unstable part rises to 1, before any matching"
    ] = 0.5
    student_every: Annotated[Count, "after it, one iteration of so many is the student's, the rest the critic's"] = 5
    rollout_steps: Annotated[Count, "most calls of the rollouts whose ends are matched"] = 4
    noise_mean: Annotated[float, "mean of log(sigma / alpha) at the times of the consistency term"] = -0.8
    noise_std: Annotated[NonNegative, "standard deviation of log(sigma / alpha) at those times"] = 1.6
    matching_mean: Annotated[float, "mean of log(sigma / alpha) at the times of rollouts, matching and critic"] = 0.0
    matching_std: Annotated[NonNegative, "standard deviation of log(sigma / alpha) at those times"] = 1.6
    matching_shift: Annotated[
        NonNegative | None, "shift of flow-matching times in their place; 0 for none, by default 5 with frames"
    ] = None
    frame_noise: Annotated[bool, "noise levels times the root of the number of frames"] = True
    difference: Annotated[NonNegative, "step of the tangent's derivative in time, 0 for the exact one"] = 0.0
    sigma_max: Annotated[Positive, "noise level sigma / alpha at which sampling starts"] = 80.0
    steps: Annotated[tuple[Count, ...], "network calls that the student is made for, one plan each"] = (1, 2, 3, 4)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.consistency_weight or self.matching_weight):
            raise ValueError("rcm: consistency_weight=0 and matching_weight=0 leave nothing to train on")
        if max(self.steps, default=0) > len(LATER) + 1:
            raise ValueError(f"rcm: steps={self.steps} must be at most {len(LATER) + 1}, the calls of the longest plan")

    def networks(self, start: Start) -> Networks:
        schedule = trig_reach(start.teacher.schedule, self.sigma_data)
        student = Jump(start.network("student", on=schedule))
        if self.consistency_weight:
            check_time_input(student.denoiser)
        guided(start.teacher, self.guidance)
        modules: dict[str, nn.Module] = {"student": student, "teacher": start.teacher.on(schedule)}
        group = Optimizer(("student",), self.lr, "adamw", betas=(0.0, 0.999), weight_decay=0.01, warmup=10)
        groups = {"student": dataclasses.replace(group, decay="cosine")}
        if self.matching_weight:
            modules["critic"] = start.network("critic", on=schedule)
            groups["critic"] = dataclasses.replace(group, modules=("critic",), lr=self.critic_lr)
        return Networks(modules, groups, ema=("student",))

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        r = self.tangent_share(progress.fraction)
        if not self.matching_weight or r < 1 or progress.step % self.student_every == 0:
            yield Update("student", *self.student_loss(nets, batch, r))
        else:
            with evaluating(nets.student), torch.no_grad():
                x = self.rollout(nets, batch)
            t = self.matching_law(nets.student.shape).draw(nets.critic.schedule, len(x), batch.rng)
            loss = velocity_loss(nets.critic, x, t, batch.cond, batch.rng)
            yield Update("critic", loss, {"denoising": loss.detach()})

    def tangent_share(self, fraction: float) -> float:
        """``r`` when this part of the budget is used; 1 from the start where there is no tangent."""
        warm = self.consistency_weight and self.tangent_warmup
        return min(1.0, fraction / self.tangent_warmup) if warm else 1.0

    def student_loss(self, nets: Networks, batch: Batch, r: float) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The sum of both terms, of the first alone while ``r`` rises."""
        terms: list[Tensor] = []
        logs: dict[str, Tensor | float] = {"warmup": r}
        if self.consistency_weight:
            loss, found = self.consistency(nets, batch, r)
            terms.append(self.consistency_weight * loss)
            logs |= found
        if self.matching_weight and r == 1:
            loss, found = self.matching(nets, batch)
            terms.append(self.matching_weight * loss)
            logs |= found
        return sum(terms[1:], start=terms[0]), logs

    def consistency(self, nets: Networks, batch: Batch, r: float) -> tuple[Tensor, dict[str, Tensor]]:
        """``L_sCM`` on noised data."""
        student, schedule, rng = nets.student, nets.student.schedule, batch.rng
        t = self.consistency_law(student.shape).draw(schedule, len(batch.x), rng)
        x_t = schedule.add_noise(batch.x, rng.normal_like(batch.x), t)
        with torch.no_grad():
            v = guided(nets.teacher, self.guidance).velocity(x_t, t, batch.cond)
        own = student_direction(student, x_t, t, v, batch.cond, r=r, difference=self.difference)
        f = student.mean_velocity(x_t, t, torch.full_like(t, schedule.t_min), batch.cond)
        loss = math.prod(student.shape) * regression(f / schedule.sigma_data, own, c=self.c).mean()
        return loss, {"consistency": loss.detach(), "tangent_norm": sizes(own.g).mean()}

    def matching(self, nets: Networks, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """``L_DMD`` of the ends of rollouts; :func:`matching_loss` is half of its mean."""
        x, law = self.rollout(nets, batch), self.matching_law(nets.student.shape)
        teacher = guided(nets.teacher, self.guidance)
        with evaluating(nets.critic):
            half, logs = matching_loss(x, teacher, nets.critic, batch.cond, batch.rng, law)
        return 2 * math.prod(nets.student.shape) * half, logs

    def rollout(self, nets: Networks, batch: Batch) -> Tensor:
        """Student samples, with a gradient through their last call; how many calls they take is drawn for the batch."""
        calls = 1 + batch.rng.shared_integer(0, self.rollout_steps)
        law = self.matching_law(nets.student.shape)
        x, t = last_call(nets.student, batch.normal(), calls, law, batch.rng, batch.cond)
        return nets.student.to_data(x, t, batch.cond)

    def consistency_law(self, shape: tuple[int, ...]) -> TimeLaw:
        """``p_G`` for samples of a shape."""
        return LogNormal(self.noise_mean + self.raised(shape), self.noise_std)

    def matching_law(self, shape: tuple[int, ...]) -> TimeLaw:
        """``p_D`` for samples of a shape."""
        shift = FRAME_SHIFT * (frames(shape) > 1) if self.matching_shift is None else self.matching_shift
        return ShiftedUniform(shift) if shift else LogNormal(self.matching_mean + self.raised(shape), self.matching_std)

    def raised(self, shape: tuple[int, ...]) -> float:
        """What the log of noise levels is raised by for frames, which tell of each other: ``log sqrt(F)``."""
        return math.log(frames(shape)) / 2 if self.frame_noise else 0.0

    def student(self, nets: Networks) -> Student:
        return Student(nets.student, {k: self.plan(nets.student.schedule, k) for k in self.steps})

    def plan(self, schedule: Schedule, steps: int) -> Plan:
        """``sigma_max`` and the first of the times after it, closer together for a teacher that ends below them."""
        first = float(schedule.time_at(torch.tensor(-math.log(self.sigma_max), dtype=torch.float64)))
        shrink = 1.0 if first > LATER[0] else first / (math.pi / 2)
        return Plan((first, *(shrink * t for t in LATER[: steps - 1])), gamma=1.0)
