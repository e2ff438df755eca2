"""f-distill: One-step Diffusion Models with f-Divergence Distribution Matching (Xu et al. 2025, arXiv 2502.15681).

DMD2 for any f-divergence ``D_f(p || q) = E_q f(r)`` of the noised laws, ``r = p_t / q_t`` of data over the student's
samples.  Its gradient is the difference of scores with one more factor, a number for each sample::

    grad D_f = -E_q[ h(r) (s_p - s_q) d x_t / d theta ],    h(r) = f''(r) r^2

which is 1 for the reverse KL divergence, where this is DMD2.  The ratio is in the discriminator's logit at ``x_t``,
``r = exp(l)``, taken from the same pass that predicts there::

    r      <- clip(exp(l))                        g = w (D_critic(x_t) - D_teacher(x_t)) / mean|x - D_teacher(x_t)|
    r      <- r / mean of r at like noise levels
    w       = h(r) / mean of h                    student:  surrogate(x, g) + gan_weight softplus(-l)

Both means are those of the whole batch.  Read against NVIDIA's FastGen (NVlabs/FastGen, Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from fewstep.denoisers import Denoiser
from fewstep.methods.alarm import Alarm
from fewstep.methods.method import Batch, Mean, Method, Networks, Paper, Progress, Question, System, Update
from fewstep.methods.parts.adversary import Adversary
from fewstep.methods.parts.distribution_matching import (
    LOST_MODES,
    RUNAWAY_CRITIC,
    WON_GAME,
    critic_loss,
    renoising_plan,
    simulated,
    three_networks,
    two_optimizers,
    vector_loss,
)
from fewstep.methods.parts.score_matching import by_distance, weighted_difference
from fewstep.methods.parts.shared_pass import Body, scores_and_logits, tapped_discriminator
from fewstep.methods.parts.times import Segments
from fewstep.methods.start import Start
from fewstep.ranges import Count, Least, NonNegative, Positive, Share
from fewstep.sampling.rollout import Plan, Student
from fewstep.schedules import Schedule

Name = Literal["rkl", "soft-rkl", "js", "hellinger", "kl", "jeffreys", "neyman", "pearson"]
Ratio = Callable[[Tensor], Tensor]
#: Logits beyond this are no ratio of two densities that a batch could tell.
MOST_LOGIT = 10.0


@dataclass(frozen=True)
class Divergence:
    """``E_q f(r)`` and ``h(r) = f''(r) r^2``, both of positive ratios of any shape; ``f(1) = 0``."""

    f: Ratio
    h: Ratio


#: The first two seek modes, the next two lie between, the KL and Jeffreys divergences and the last cover them.
DIVERGENCES: dict[Name, Divergence] = {
    "rkl": Divergence(lambda r: -r.log(), torch.ones_like),
    "soft-rkl": Divergence(lambda r: (r + 1) * (0.5 + 0.5 / r).log(), lambda r: 1 / (r + 1)),
    "js": Divergence(lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(), lambda r: r / (r + 1)),
    "hellinger": Divergence(lambda r: 1 - r.sqrt(), lambda r: r.sqrt() / 4),  # sqrt(r) in FastGen
    "kl": Divergence(lambda r: r * r.log(), lambda r: r),
    "jeffreys": Divergence(lambda r: (r - 1) * r.log(), lambda r: r + 1),
    "neyman": Divergence(lambda r: (1 - r).square() / r, lambda r: 2 / r),  # 1 / r in FastGen
    "pearson": Divergence(lambda r: (1 - r).square(), lambda r: 2 * r.square()),  # not in FastGen
}


class RatioLevels(nn.Module):
    """The mean ratio at each part of the noise levels, as the student's updates left it; 1 before the first."""

    def __init__(self, parts: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(parts))

    mean: Tensor


def ratio_of(logits: Tensor, low: float, high: float) -> Tensor:
    """The clipped density ratio ``[B]``, data over samples, that logits ``[B, ...]`` tell; the mean of several heads'
    logits counts.  In float32 at least, without gradient."""
    told = logits.detach().flatten(1).mean(1) if logits.ndim > 1 else logits.detach()
    told = told.to(torch.promote_types(told.dtype, torch.float32))
    return told.clamp(-MOST_LOGIT, MOST_LOGIT).exp().clamp(low, high)


def relative_ratio(
    ratio: Tensor, t: Tensor, schedule: Schedule, before: Tensor, decay: float
) -> Generator[Mean, Tensor, tuple[Tensor, Tensor]]:
    """The ratios ``[B]`` at times ``t`` over their mean at like noise levels, and these means ``[parts]``: of the whole
    batch, mixed with those ``before`` of which a share ``decay`` stays; where the batch has no time they stay."""
    parts = len(before)
    part = Segments(parts).of(schedule, t)
    member = one_hot(part, parts).to(ratio)
    total, count = yield Mean(torch.stack([(member * ratio[:, None]).mean(0), member.mean(0)]))
    old = before.to(ratio)
    seen = torch.where(count > 0, torch.lerp(total / count.clamp_min(1e-12), old, decay), old)
    return ratio / seen[part], seen


@dataclass(frozen=True)
class FDistill(Method):
    """DMD2 under any f-divergence, in ``steps`` calls.

    ``discriminator`` is the network whose features it sees, ``heads`` of their layers.  On the teacher its term in the
    student's loss is at the states of the matching; on the critic it has noise levels of its own, and with ``divergence
    = "rkl"`` all is DMD2.  ValueError unless ``ratio_min <= 1 <= ratio_max``.
    """

    name: ClassVar[str] = "f-distill"
    paper: ClassVar[Paper] = Paper(
        "One-step Diffusion Models with f-Divergence Distribution Matching", "2502.15681", "verified",
        ("read against NVIDIA's FastGen, which the authors' group publishes; there is no other code of theirs",
         "weights by the exact h, which differs from FastGen's by factors that the normalisation takes out; Pearson's "
         "divergence is not in FastGen",
         "parts of the noise levels are equal in the family's own index (there in time, where on EDM most samples lie "
         "in the first); no constant of 1e-6 is added to what is divided by, so that equal ratios are exactly DMD2",
         "the critic and the discriminator move in every iteration (there in those without an update of the student), "
         "by one optimizer with one bound on their gradients, at times of their own",
         "`lr` and `critic_lr` suit networks of a million parameters and runs of minutes (2e-6 for all on ImageNet-64 "
         "there), and the critic's is higher than the student's",
         "short runs: `decay` of the student's rate to 0 over the budget (constant there), `warmup` of 20 steps (none "
         "there)",
         "sampling uses power-function averages of the student (exponential ones there)",
         "the heads are DMD2's, sized for small bottlenecks",
         "a student of several steps trains on states of its own rollout (there on noised data)"),
    )  # fmt: skip
    system: ClassVar[System] = System(
        "f-distill", 2025, "matching", "teacher, data", "1",
        "distribution matching for any f-divergence, by a weight on each sample",
    )  # fmt: skip
    healthy: ClassVar[dict[str, str]] = {
        "critic/denoising": "stays level: its target moves with the student, a fall is not the goal",
        "critic/discriminator_accuracy": "between 0.5 and 0.8; near 1 ratios are at their bounds: raise r1 or lower "
        "critic_lr",
        "student/divergence": "of the ratios as the discriminator sees them: falls slowly, and is 0 where it is blind",
        "student/weight_max": "largest weight of a sample in the batch, whose mean is 1: single digits; dozens mean "
        "that few samples move the student",
        "student/sample_std": "of samples among themselves: rises to about the data's; a slide to 0 is collapse",
    }

    unstable: ClassVar[dict[str, Alarm]] = {
        "critic/denoising": RUNAWAY_CRITIC,
        "critic/discriminator_accuracy": WON_GAME,
        "student/sample_std": LOST_MODES,
    }
    roles: ClassVar[tuple[str, ...]] = ("student",)

    divergence: Annotated[Name, "which divergence is minimised: js and kl in the paper, rkl is DMD2's"] = "js"
    steps: Annotated[Count, "network calls that the student is made for"] = 1
    critic_steps: Annotated[Count, "critic updates for each of the student's"] = 5
    gan_weight: Annotated[NonNegative, "weight of the adversarial term; 0 leaves only the discriminator's ratio"] = 3e-3
    discriminator_weight: Annotated[Positive, "weight of the discriminator's loss beside the critic's own"] = 1.0
    discriminator: Annotated[Body, "whose features the discriminator sees; DMD2's is on the critic"] = "teacher"
    heads: Annotated[Count, "layers that it sees: the bottleneck, or so many over the depth"] = 1
    r1: Annotated[NonNegative, "weight of the approximate R1 penalty of the discriminator, 0 for none"] = 0.0
    ratio_min: Annotated[Positive, "least ratio of data to samples that counts"] = 0.1
    ratio_max: Annotated[Positive, "largest ratio of data to samples that counts"] = 20.0
    parts: Annotated[Count, "parts of the noise levels in which ratios are compared"] = 10
    ratio_decay: Annotated[Share, "share of a part's mean ratio that stays in an update; 0.5 on ImageNet-64"] = 0.0
    guidance: Annotated[float, "scale of the teacher's classifier-free guidance, 1 for none"] = 1.0
    lr: Annotated[NonNegative, "learning rate of the student"] = 3e-4
    critic_lr: Annotated[NonNegative, "learning rate of the critic and the discriminator"] = 1e-3
    clip: Annotated[Positive, "bound on the gradient norm"] = 10.0
    warmup: Annotated[int, Least(0), "steps over which the learning rate rises from 0"] = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ratio_min <= 1 <= self.ratio_max:
            bounds = f"ratio_min={self.ratio_min:g}, ratio_max={self.ratio_max:g}"
            raise ValueError(f"{bounds}: the ratio of equal laws, 1, must lie between")

    def networks(self, start: Start) -> Networks:
        rules = Adversary(blocks=self.heads, r1=self.r1)
        game = {"discriminator": tapped_discriminator(rules, start.teacher.native(), start.condition())}
        modules = {**three_networks(start), **game, "levels": RatioLevels(self.parts)}
        groups = two_optimizers(self.lr, self.critic_lr, self.clip, self.warmup, ("critic", "discriminator"))
        return Networks(modules, groups, ema=("student",), moved=("levels",))

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update | Question]:
        x = simulated(nets.student, self.plan(nets), batch, progress.step % self.critic_steps == 0)
        if x.requires_grad:
            with nets.held("critic"):
                yield (yield from self.student_update(nets, batch, x))
        loss, logs = self.critic_loss(nets, batch, x.detach())
        yield Update("critic", loss, logs)

    def plan(self, nets: Networks) -> Plan:
        """The student's times, DMD2's."""
        return renoising_plan(nets.student.schedule, self.steps)

    def student_update(self, nets: Networks, batch: Batch, x: Tensor) -> Generator[Question, Tensor, Update]:
        """Weighted distribution matching of the samples ``x`` plus the adversarial term; the gradient reaches the
        student through ``x`` only."""
        found, told = scores_and_logits(nets, self.discriminator, x, batch.cond, batch.rng, self.guidance)
        weight, relative, seen = yield from self.weights(told, found.t, found.schedule, nets.levels.mean)
        loss, logs = vector_loss(x, weighted_difference(found, lambda scores: by_distance(scores) * weight))
        logs["divergence"] = DIVERGENCES[self.divergence].f(relative).mean()
        logs |= {"weight_min": weight.amin(), "weight_max": weight.amax()}
        if self.gan_weight:
            fake = nets.discriminator.rules.loss.generator(told)
            if self.discriminator == "critic":
                fake = nets.discriminator.student_loss(nets.critic, x, batch.cond, batch.rng)
            loss, logs["gan"] = loss + self.gan_weight * fake, fake.detach()
        return Update("student", loss, logs, then=lambda: nets.levels.mean.copy_(seen))

    def weights(
        self, logits: Tensor, t: Tensor, schedule: Schedule, before: Tensor
    ) -> Generator[Question, Tensor, tuple[Tensor, Tensor, Tensor]]:
        """The weights ``[B]`` of samples with ``logits`` ``[B, ...]`` at times ``t``, whose mean over the whole batch
        is 1; their ratios over the mean at like noise levels; and those means, given as they were ``before``."""
        ratio = ratio_of(logits, self.ratio_min, self.ratio_max)
        relative, seen = yield from relative_ratio(ratio, t, schedule, before, self.ratio_decay)
        h = DIVERGENCES[self.divergence].h(relative)
        return h / (yield Mean(h.mean())), relative, seen

    def critic_loss(self, nets: Networks, batch: Batch, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The critic learns the score of the student's samples, and the discriminator to tell them from data."""
        denoising = critic_loss(nets.critic, x, batch.cond, batch.rng)
        body: Denoiser = getattr(nets, self.discriminator)
        told, logs = nets.discriminator.loss(body, batch.x, x, batch.cond, batch.rng)
        return denoising + self.discriminator_weight * told, {"denoising": denoising.detach(), **logs}

    def student(self, nets: Networks) -> Student:
        return Student(nets.student, {self.steps: self.plan(nets)})
