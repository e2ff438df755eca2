"""DMD2 as its best runs were made (Yin et al. 2024, arXiv 2405.14867): matching alone to the end, then on from that
student and that critic with the GAN, at a smaller rate.

Before both, a student of one step can learn the teacher's pairs for a short while, by a perceptual distance, as that of
SDXL did, which is called at 399 of 1000 (``first_level = 0.4``): what it makes from pure noise is no picture at first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from fewstep.data.dataset import Samples
from fewstep.flow_maps import Jump
from fewstep.methods.matching.dmd2 import DMD2
from fewstep.methods.method import Batch, Method, Networks, Optimizer, Paper, Progress, Recipe, Stage, Update
from fewstep.methods.parts.distances import L2, Distance
from fewstep.methods.parts.distribution_matching import check_first_level, renoising_plan
from fewstep.methods.parts.shared_pass import Body
from fewstep.methods.parts.stores import teacher_pairs
from fewstep.methods.start import Start
from fewstep.ranges import Count, Least, NonNegative, Positive, Share
from fewstep.sampling.rollout import Plan, Student, rollout


@dataclass(frozen=True)
class PairPretraining(Method):
    """One call at ``first_level`` regressed on the teacher's output for the same noise; hands on its student."""

    name: ClassVar[str] = "dmd2-pairs"
    paper: ClassVar[Paper] = DMD2.paper
    healthy: ClassVar[dict[str, str]] = {"student/loss": "falls quickly at first, then slowly: one call cannot follow"}
    roles: ClassVar[tuple[str, ...]] = ("student",)

    first_level: Annotated[Share, "share of the noise levels at which the student is called"] = 1.0
    distance: Annotated[Distance, "how two pictures are compared; LPIPS in the paper"] = L2
    pairs: Annotated[Count, "pairs of noise and the teacher's output for it, made once before training"] = 4096
    ode_steps: Annotated[Count, "Heun steps of the teacher for each pair"] = 18
    guidance: Annotated[float, "scale of the teacher's classifier-free guidance, 1 for none"] = 1.0
    lr: Annotated[NonNegative, "learning rate"] = 3e-4
    clip: Annotated[Positive, "bound on the gradient norm"] = 10.0
    warmup: Annotated[int, Least(0), "steps over which the learning rate rises from 0"] = 20

    def sources(self, start: Start) -> Mapping[str, Samples]:
        return teacher_pairs(start, self.pairs, self.ode_steps, self.guidance)

    def networks(self, start: Start) -> Networks:
        student = Jump(start.network("student", on=start.teacher.native().schedule))
        optimizer = Optimizer(("student",), self.lr, "adamw", weight_decay=0.01, clip=self.clip, warmup=self.warmup)
        modules = {"student": student, "distance": self.distance.network(start.teacher)}
        return Networks(modules, {"student": optimizer}, ema=("student",))

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        made = rollout(nets.student, batch.column("noise"), self.plan(nets), batch.cond)
        yield Update("student", nets.distance(made, batch.x).mean())

    def plan(self, nets: Networks) -> Plan:
        """The student's only time."""
        return renoising_plan(nets.student.schedule, 1, self.first_level)

    def student(self, nets: Networks) -> Student:
        return Student(nets.student, {1: self.plan(nets)})


@dataclass(frozen=True)
class DMD2Stages(Recipe):
    """Pairs (``pairs_share`` of the budget, none by default), matching, and matching with the GAN (``gan_share`` of
    what is left) at ``gan_rate`` times the learning rates.  ValueErrors are those of :class:`DMD2
    <fewstep.methods.matching.dmd2.DMD2>`."""

    name: ClassVar[str] = "dmd2-stages"
    paper: ClassVar[Paper] = Paper(
        "Improved Distribution Matching Distillation for Fast Image Synthesis", "2405.14867", "verified",
        (*DMD2.paper.deviations,
         "`gan_share` is a quarter (140k of 550k iterations on ImageNet-64 there)",
         "the last stage begins with the averaged student of the one before, with new moments of the optimizers and a "
         "new head",
         "fewer `pairs` (10k for SDXL there), by Heun steps (Euler's there); `distance` is l2 by default: the weights "
         "of LPIPS are not bundled (distance lpips:PATH reads a file of them)",
         "below the noisiest time the student is given noise of that time's size (there of size one)"),
    )  # fmt: skip
    roles: ClassVar[tuple[str, ...]] = ("student",)

    steps: Annotated[Count, "network calls that the student is made for"] = 1
    first_level: Annotated[
        Share, "share of the noise levels at which a student of one step is called; 0.4 is 399 of 1000, as for SDXL"
    ] = 1.0
    pairs_share: Annotated[Share, "share of the budget for a regression on pairs before all"] = 0.0
    pairs: Annotated[Count, "pairs of noise and the teacher's output for it, made once before training"] = 4096
    ode_steps: Annotated[Count, "Heun steps of the teacher for each pair"] = 18
    distance: Annotated[Distance, "how the regression compares two samples; LPIPS in the paper"] = L2
    gan_share: Annotated[Share, "share of the budget, without the pairs', for the stage with the GAN"] = 0.25
    gan_rate: Annotated[NonNegative, "learning rates of that stage over those before"] = 0.25
    critic_steps: Annotated[Count, "critic updates for each of the student's"] = 5
    gan_weight: Annotated[Positive, "weight of the adversarial term"] = 3e-3
    discriminator_weight: Annotated[NonNegative, "weight of the discriminator's loss beside the critic's own"] = 1e-2
    discriminator: Annotated[Body, "whose features the discriminator sees; the paper's is on the critic"] = "critic"
    r1: Annotated[NonNegative, "weight of the approximate R1 penalty of the discriminator, 0 for none"] = 0.0
    guidance: Annotated[float, "scale of the teacher's classifier-free guidance, 1 for none"] = 1.0
    lr: Annotated[NonNegative, "learning rate of the student"] = 3e-4
    critic_lr: Annotated[NonNegative, "learning rate of the critic and the discriminator"] = 1e-3
    clip: Annotated[Positive, "bound on the gradient norm"] = 10.0
    warmup: Annotated[int, Least(0), "steps over which the learning rate rises from 0"] = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_first_level(self.first_level, self.steps)

    def stages(self) -> list[Stage]:
        shared: dict[str, Any] = {name: getattr(self, name) for name in ("first_level", "guidance", "clip", "warmup")}
        pairs = PairPretraining(
            distance=self.distance, pairs=self.pairs, ode_steps=self.ode_steps, lr=self.lr, **shared
        )  # fmt: skip
        shared |= {"steps": self.steps, "critic_steps": self.critic_steps}
        matching = DMD2(gan_weight=0.0, lr=self.lr, critic_lr=self.critic_lr, **shared)
        game = DMD2(
            gan_weight=self.gan_weight, discriminator_weight=self.discriminator_weight,
            discriminator=self.discriminator, r1=self.r1, lr=self.gan_rate * self.lr,
            critic_lr=self.gan_rate * self.critic_lr, **shared,
        )  # fmt: skip
        rest = 1 - self.pairs_share
        return [
            Stage(pairs, self.pairs_share),
            Stage(matching, rest * (1 - self.gan_share)),
            Stage(game, rest * self.gan_share),
        ]
