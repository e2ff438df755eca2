"""Hyper-SD: Trajectory Segmented Consistency Model (Ren et al. 2024, arXiv 2404.13686).

Three things in turn, each going on from the student of the last, with the same teacher throughout:

* *trajectory segmented consistency* (:mod:`fewstep.methods.consistency.tscd`) with 8, 4, 2 and 1 segments, weights of
  its two terms for each;
* *feedback*: samples of the student, decoded to pictures, are pushed until a reward is content::

      loss = mean sum_d relu(margin_d - r_d(picture, condition))

* *score distillation* of the one call from pure noise: its samples ``x`` move along the difference of two scores (DMD),
  beside a regression on the teacher's own output ``y`` for noise ``z``, the feedback's loss, and the consistency at all
  times, so that one student samples in 1, 2, 4 and 8 calls by TCD's rule::

      student:  surrogate(x, g) + a d(J(z), y) + b feedback + c consistency,   g = (D_critic - D_teacher) / mean|x - D|
      critic:   denoising loss on x

There is no training code of the authors: what the paper's text leaves open is ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import nn

from fewstep.data.dataset import Samples
from fewstep.methods.alarm import Alarm
from fewstep.methods.consistency.tscd import PAPER, SegmentedConsistency, check_etas, tcd_plan
from fewstep.methods.method import (
    Batch,
    Method,
    Networks,
    Optimizer,
    Paper,
    Progress,
    Question,
    Recipe,
    Stage,
    System,
    Update,
)
from fewstep.methods.parts.distances import L2, Distance
from fewstep.methods.parts.distribution_matching import (
    LOST_MODES,
    RUNAWAY_CRITIC,
    critic_loss,
    matching_loss,
    two_optimizers,
)
from fewstep.methods.parts.feedback import FEW_CLASSES, NO_FEEDBACK, ROLE, Feedback, feedback_loss
from fewstep.methods.parts.score_matching import sample_std
from fewstep.methods.parts.stores import pairs_of
from fewstep.methods.parts.teacher_steps import guided
from fewstep.methods.start import Start
from fewstep.ranges import Count, Least, NonNegative, Share
from fewstep.sampling.rollout import Student, rollout
from fewstep.sampling.student_generator import StudentGenerator

#: TSCD with one segment.
CONSISTENCY = SegmentedConsistency()


@dataclass(frozen=True)
class RewardTuning(Method):
    """Feedback: the student that ``consistency`` makes is run along one of its plans down to a random call, whose clean
    prediction is decoded and rated."""

    name: ClassVar[str] = "hyper-sd-feedback"
    paper: ClassVar[Paper] = PAPER
    healthy: ClassVar[dict[str, str]] = {
        "student/reward": "rises towards the margin and stays there; past it there is no gradient",
        "student/class_entropy": "stays level; a fall says that the reward is met by fewer kinds of samples",
        "student/sample_std": "stays level; a slide to 0 is collapse",
    }
    unstable: ClassVar[dict[str, Alarm]] = {"student/class_entropy": FEW_CLASSES, "student/sample_std": LOST_MODES}
    roles: ClassVar[tuple[str, ...]] = ("student", ROLE)

    consistency: SegmentedConsistency = CONSISTENCY
    feedback: Feedback = NO_FEEDBACK
    margins: tuple[float, ...] = (-0.1,)
    lr: float = 1e-4

    def networks(self, start: Start) -> Networks:
        modules = {"student": self.consistency.flow_map(start), ROLE: self.feedback.reward(start)}
        group = Optimizer(("student",), self.lr, "adamw", clip=1.0, decay="linear")
        return Networks(modules, {"student": group}, ema=("student",))

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update | Question]:
        plans = list(self.consistency.plans(nets.student.schedule).values())
        plan = plans[batch.rng.shared_integer(0, len(plans))]
        x, _ = StudentGenerator(nets.student, plan).draw(batch.n, batch.rng, batch.cond)
        loss, logs = yield from feedback_loss(nets.reward, nets.student, x, batch.cond, self.margins)
        yield Update("student", loss, {**logs, "sample_std": sample_std(x)})

    def student(self, nets: Networks) -> Student:
        return self.consistency.student(nets)


@dataclass(frozen=True)
class OneStepMatching(Method):
    """Score distillation of one call, with a regression on pairs, the feedback's loss, and the consistency of all times
    beside it.

    ``consistency`` is the loss that goes on, at ``consistency_weight``.
    """

    name: ClassVar[str] = "hyper-sd-one-step"
    paper: ClassVar[Paper] = PAPER
    healthy: ClassVar[dict[str, str]] = {
        "critic/denoising": "stays level: its target moves with the student, a fall is not the goal",
        "student/matching_norm": "starts near 0 (the critic is a copy of the teacher), rises as the critic turns to "
        "the student's samples, then falls slowly",
        "student/sample_std": "of samples among themselves: stays near the data's; a slide to 0 is collapse",
    }
    unstable: ClassVar[dict[str, Alarm]] = {
        "critic/denoising": RUNAWAY_CRITIC,
        "student/sample_std": LOST_MODES,
        "student/class_entropy": FEW_CLASSES,
    }
    roles: ClassVar[tuple[str, ...]] = ("student", ROLE)

    consistency: SegmentedConsistency = CONSISTENCY
    consistency_weight: float = 1.0
    regression_weight: float = 0.25
    pairs: int = 4096
    ode_steps: int = 18
    guidance: float = 1.0
    feedback: Feedback = NO_FEEDBACK
    margins: tuple[float, ...] = (-0.1,)
    feedback_weight: float = 0.1
    lr: float = 3e-4
    critic_lr: float = 1e-3

    def sources(self, start: Start) -> Mapping[str, Samples]:
        if not self.regression_weight:
            return {"data": start.data}
        return {"data": start.data, "pairs": pairs_of(start.teacher, start, self.pairs, self.ode_steps, self.guidance)}

    def networks(self, start: Start) -> Networks:
        teacher = start.teacher.native()
        modules: dict[str, nn.Module] = {
            "student": self.consistency.flow_map(start),
            "critic": start.network("critic", on=teacher.schedule),
            "teacher": teacher,
            "distance": L2.network(teacher),
        }
        if self.consistency_weight:
            modules |= self.consistency.parts(modules["student"], teacher)
        if self.feedback:
            modules[ROLE] = self.feedback.reward(start)
        groups = two_optimizers(self.lr, self.critic_lr, clip=10.0, warmup=20)
        return Networks(modules, groups, ema=("student",), moved=("target",) if self.consistency_weight else ())

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update | Question]:
        plan = tcd_plan(nets.student.schedule, 1, 0.0)
        x, _ = StudentGenerator(nets.student, plan).draw(batch.n, batch.rng, batch.cond)
        loss, logs = matching_loss(x, guided(nets.teacher, self.guidance), nets.critic, batch.cond, batch.rng)
        if self.regression_weight:
            pairs = batch.of["pairs"]
            made = rollout(nets.student, pairs.column("noise"), plan, pairs.cond)
            regression = nets.distance(made, pairs.x).mean()
            loss, logs["regression"] = loss + self.regression_weight * regression, regression.detach()
        if self.consistency_weight:
            landed, aim, _, _ = self.consistency.land(nets, batch)
            distance = nets.distance(landed, aim).mean()
            loss, logs["distance"] = loss + self.consistency_weight * distance, distance.detach()
        if self.feedback:
            content, more = yield from feedback_loss(nets.reward, nets.student, x, batch.cond, self.margins)
            loss, logs = loss + self.feedback_weight * content, {**logs, **more}
        moves = self.consistency_weight > 0
        yield Update("student", loss, logs, (lambda: self.consistency.follow(nets)) if moves else None)
        denoising = critic_loss(nets.critic, x.detach(), batch.cond, batch.rng)
        yield Update("critic", denoising, {"denoising": denoising.detach()})

    def student(self, nets: Networks) -> Student:
        return self.consistency.student(nets)


@dataclass(frozen=True)
class HyperSD(Recipe):
    """The stages; those of segments share ``tscd_share`` of the budget equally."""

    name: ClassVar[str] = "hyper-sd"
    paper: ClassVar[Paper] = PAPER
    system: ClassVar[System] = System(
        "Hyper-SD", 2024, "consistency", "teacher, data, a reward if wanted", "1, 2, 4, 8",
        "consistency within fewer and fewer segments, feedback of a reward, score distillation of one call",
    )  # fmt: skip
    roles: ClassVar[tuple[str, ...]] = ("student", ROLE)

    segments: Annotated[tuple[Count, ...], "parts of the trajectory, one stage for each; the last is 1"] = (8, 4, 2, 1)
    distance_weights: Annotated[tuple[NonNegative, ...], "weight of the distance in each"] = (1.0, 1.0, 0.5, 0.5)
    adversarial_weights: Annotated[tuple[NonNegative, ...], "weight of the adversarial term in each; 0 for none"] = (
        0.0, 0.0, 1e-3, 1e-3,
    )  # fmt: skip
    lr: Annotated[NonNegative, "learning rate of the student"] = 3e-4
    skip: Annotated[Count, "steps of the teacher's table that its solver takes at once, thousandths without one"] = 20
    mu: Annotated[Share, "decay of the target network"] = 0.8
    guidance_min: Annotated[float, "least scale of the teacher's classifier-free guidance, 1 for none"] = 1.0
    guidance_max: Annotated[float, "greatest scale, drawn up to for every sample"] = 1.0
    distance: Annotated[Distance, "how two landings are compared"] = L2
    discriminator_rank: Annotated[
        int, Least(0), "rank of the weights that the discriminator trains in its decoder; 0 for a head alone"
    ] = 0
    discriminator_lr: Annotated[NonNegative, "learning rate of the discriminator"] = 1e-3
    feedback: Annotated[Feedback, "what rates samples; given: the module brought as a reward"] = NO_FEEDBACK
    margins: Annotated[tuple[float, ...], "a reward above its margin has no gradient: one for each, or for all"] = (
        -0.1,
    )
    feedback_lr: Annotated[NonNegative, "learning rate of the stage of feedback"] = 1e-4
    feedback_weight: Annotated[NonNegative, "weight of the feedback's loss in score distillation"] = 0.1
    regression_weight: Annotated[NonNegative, "weight of score distillation's regression; 0 makes no pairs"] = 0.25
    pairs: Annotated[Count, "pairs of noise and the teacher's output for it, made once"] = 4096
    ode_steps: Annotated[Count, "Heun steps of the teacher for each pair"] = 18
    consistency_weight: Annotated[NonNegative, "weight of consistency at all times in score distillation"] = 1.0
    critic_lr: Annotated[NonNegative, "learning rate of the critic"] = 1e-3
    tscd_share: Annotated[NonNegative, "share of the budget of the stages of segments, all together"] = 4.0
    feedback_share: Annotated[NonNegative, "share of the budget of feedback, where something rates"] = 1.0
    one_step_share: Annotated[NonNegative, "share of the budget of score distillation"] = 2.0
    steps: Annotated[tuple[Count, ...], "network calls that the student is made for, one plan each"] = (1, 2, 4, 8)
    eta: Annotated[tuple[Share, ...], "share of noise between calls, TCD's: one for all of steps, or one for each"] = (
        0.3,
    )
    target_time: Annotated[bool, "tell the network where its jump ends, as CTM does; not in the paper"] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_etas(self.name, self.steps, self.eta)
        if not self.segments or self.segments[-1] != 1:
            raise ValueError(f"{self.name}: segments={self.segments} must end with 1, such as 8,4,2,1")
        for field, given in (("distance", self.distance_weights), ("adversarial", self.adversarial_weights)):
            if len(given) != len(self.segments):
                raise ValueError(f"{self.name}: {field}_weights={given} must be as many as segments={self.segments}")

    def check_given(self, given: Mapping[str, object]) -> None:
        super().check_given(given)
        self.feedback.check_given(ROLE in given)

    def stages(self) -> list[Stage]:
        weights = zip(self.segments, self.distance_weights, self.adversarial_weights, strict=True)
        ladder = [self.consistency(*each) for each in weights]
        tuning = RewardTuning(ladder[-1], self.feedback, self.margins, self.feedback_lr)
        last = OneStepMatching(
            ladder[-1], self.consistency_weight, self.regression_weight, self.pairs, self.ode_steps,
            (self.guidance_min + self.guidance_max) / 2, self.feedback, self.margins, self.feedback_weight,
            self.lr, self.critic_lr,
        )  # fmt: skip
        return [
            *(Stage(method, self.tscd_share / len(ladder)) for method in ladder),
            *([Stage(tuning, self.feedback_share)] if self.feedback else []),
            Stage(last, self.one_step_share),
        ]

    def consistency(self, segments: int, distance_weight: float, adversarial_weight: float) -> SegmentedConsistency:
        return SegmentedConsistency(
            segments, self.lr, self.skip, self.mu, self.guidance_min, self.guidance_max, self.distance,
            distance_weight, adversarial_weight, discriminator_rank=self.discriminator_rank,
            discriminator_lr=self.discriminator_lr, steps=self.steps, eta=self.eta, target_time=self.target_time,
        )  # fmt: skip
