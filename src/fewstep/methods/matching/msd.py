"""MSD: Multi-Student Diffusion Distillation (Song et al. 2024, arXiv 2410.23274).

The conditions are cut into K parts and every part gets a one-step student of its own, with its own critic: K times the
capacity at the price, for one sample, of one student.  Student k is distilled as any other, on its part ``V_k`` of the
conditions only::

    G_k = Distill(teacher, data with conditions in V_k),      a sample under c is G_k(z, c) with c in V_k

in up to three stages.  *TSM*, for a student that is smaller than the teacher and cannot start as its copy, regresses on
what the teacher says of noised data; *DM* matches distributions, with a regression on pairs that are those of *all*
conditions; *ADM* goes on from there with real data through a discriminator, without the regression::

    TSM    E w || D_student(x_t) - D_teacher(x_t) ||^2,      x_t noised data of V_k
    DM     DMD
    ADM    DMD2 with its GAN

No code of the authors is public.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import nn

from fewstep.data.dataset import Samples
from fewstep.denoisers import Denoiser
from fewstep.methods.matching.dmd import DMD
from fewstep.methods.matching.dmd2 import DMD2
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
from fewstep.methods.parts.host import Host
from fewstep.methods.parts.partition import By, Partition
from fewstep.methods.parts.score_matching import data_loss
from fewstep.methods.parts.times import Own
from fewstep.methods.start import Start
from fewstep.ranges import Count, NonNegative, Share, Within
from fewstep.routing import RoutedFlowMap
from fewstep.sampling.rollout import Student


@dataclass(frozen=True)
class TeacherScoreMatching(Method):
    """A student of any size learns the teacher's denoiser, at all noise levels of the data."""

    name: ClassVar[str] = "teacher-score-matching"
    paper: ClassVar[Paper] = Paper(
        "Multi-student Diffusion Distillation for Better One-step Generators", "2410.23274", "reconstructed",
        ("no code of the authors is public: the stages are the paper's, all else is that of DMD and DMD2 here",
         "the parts are trained one after the other in one run, each with an equal share of the budget, which is that "
         "of all together",
         "a smaller network is given (`--student`), of any architecture, and gets its warm-up where --tsm gives it a "
         "share of the budget; the critics have the teacher's architecture",
         "prompts are cut by k-means of their mean embeddings, where the paper has quadrants of two axes that it does "
         "not name: these parts need not be of equal size",
         "random parts, which the paper does not try, are there for comparison"),
    )  # fmt: skip
    healthy: ClassVar[dict[str, str]] = {
        "student/tsm": "falls steadily; where it stops is what the small network cannot say",
    }
    roles: ClassVar[tuple[str, ...]] = ("student",)

    lr: Annotated[NonNegative, "learning rate"] = 1e-3

    def networks(self, start: Start) -> Networks:
        teacher = start.teacher.native()
        optimizer = Optimizer(("student",), self.lr, "adamw", weight_decay=0.01, clip=10.0, warmup=20, decay="cosine")
        modules = {"student": start.network("student", on=teacher.schedule), "teacher": teacher}
        return Networks(modules, {"student": optimizer}, ema=("student",))

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        schedule, rng = nets.teacher.schedule, batch.rng
        t = Own(0.0, 1.0).draw(schedule, batch.n, rng)
        x_t = schedule.add_noise(batch.x, rng.normal_like(batch.x), t)
        with torch.no_grad():
            target = nets.teacher(x_t, t, batch.cond)
        loss = data_loss(nets.student, x_t, t, batch.cond, target)
        yield Update("student", loss, {"tsm": loss.detach()})

    def student(self, nets: Networks) -> Denoiser:
        made: Denoiser = nets.student
        return made


@dataclass(frozen=True)
class OnePart(Method):
    """A method on one part of the conditions; what else it trains on, as pairs, is that of all parts.

    The ``first`` of a part's stages starts from what the user gave and not from the part before.  The ``last`` one of
    the last part makes the whole: the students of all parts, of which every sample is asked of its own.
    """

    name: ClassVar[str] = "msd-part"
    paper: ClassVar[Paper] = TeacherScoreMatching.paper
    healthy: ClassVar[dict[str, str]] = {
        "critic/denoising": "a level of its own in every part, and within one level: its target moves with the student",
        "student/regression": "falls quickly at first, then slowly, in the stages without a GAN",
        "critic/discriminator_accuracy": "between 0.5 and 0.8, in those with one",
        "student/sample_std": "stays near the part's data's; a slide to 0 is collapse",
    }
    roles: ClassVar[tuple[str, ...]] = ("student",)

    host: Annotated[Host, "what trains the part's student"]
    partition: Annotated[Partition, "how the conditions are cut"]
    part: Annotated[int, "which part"]
    first: Annotated[bool, "the first stage of its part"]
    last: Annotated[bool, "the last stage of its part"]

    def sources(self, start: Start) -> Mapping[str, Samples]:
        found = self.host.method.sources(start)
        if self.partition.parts == 1:
            return found
        mine = self.partition.data(start, self.part)
        return {name: mine if source is start.data else source for name, source in found.items()}

    def networks(self, start: Start) -> Networks:
        before = ("student", "critic") if self.first else ()
        made = {role: model for role, model in start.made.items() if role not in before}
        nets = self.host.method.networks(dataclasses.replace(start, made=made))
        others = [made[f"expert {k}"] for k in range(self.part) if f"expert {k}" in made]
        if self.last and 1 < self.partition.parts == len(others) + 1:
            nets.add_module("experts", nn.ModuleList(others))
            nets.add_module("router", self.partition.router(start))
        return nets

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update | Question]:
        yield from self.host.method.updates(nets, batch, progress)

    def student(self, nets: Networks) -> nn.Module:
        own: Any = self.host.method.student(nets)
        others = dict(nets.named_children()).get("experts")
        if others is None:
            return own
        students: list[Any] = [*others, own]  # type: ignore[misc]
        return Student(RoutedFlowMap([student.flow_map for student in students], nets.router), own.plans)

    def hands_on(self, nets: Networks) -> Mapping[str, nn.Module]:
        made = self.student(nets)
        if self.last:
            return {f"expert {self.part}": self.host.method.student(nets), "student": made}
        return {"student": made, **({"critic": nets.critic} if "critic" in nets.groups else {})}


@dataclass(frozen=True)
class MSD(Recipe):
    """The whole recipe: K students, each on its own part of the conditions, and what asks each for its own.

    ``parts = 1`` with ``tsm = adm = 0`` is the method ``dm`` itself.
    """

    name: ClassVar[str] = "msd"
    paper: ClassVar[Paper] = TeacherScoreMatching.paper
    system: ClassVar[System] = System(
        "MSD", 2024, "matching", "teacher, data", "1",
        "several students, each for a part of the conditions, possibly smaller than the teacher",
    )  # fmt: skip
    roles: ClassVar[tuple[str, ...]] = ("student",)

    parts: Annotated[Count, "students, each with a part of the conditions"] = 4
    by: Annotated[By, "how conditions are cut: consecutive classes, random classes, centers of embeddings"] = "classes"
    parts_seed: Annotated[int, "seed of random parts and of the search for centers"] = 0
    tsm: Annotated[float, Within(0, 0.9), "share of the budget for teacher score matching, of smaller students"] = 0.0
    adm: Annotated[Share, "share of the budget for the adversarial stage; 0 leaves it out"] = 0.3
    dm: Annotated[Host, "what distils every part, in the rest of the budget"] = Host(DMD())  # noqa: RUF009
    adversary: Annotated[Host, "what goes on from there in the adversarial stage"] = Host(DMD2())  # noqa: RUF009
    tsm_lr: Annotated[NonNegative, "learning rate of teacher score matching"] = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tsm + self.adm > 1:
            raise ValueError(f"MSD: tsm={self.tsm:g} and adm={self.adm:g} are shares of one budget: 1 together at most")

    def stages(self) -> list[Stage]:
        rest = max(0.0, 1 - self.tsm - self.adm)
        warm = Host(TeacherScoreMatching(self.tsm_lr))
        taken = [(h, s) for h, s in ((warm, self.tsm), (self.dm, rest), (self.adversary, self.adm)) if s > 1e-9]
        partition, end = Partition(self.parts, self.by, self.parts_seed), len(taken) - 1
        return [
            Stage(OnePart(host, partition, part, k == 0, k == end), share)
            for part in range(self.parts)
            for k, (host, share) in enumerate(taken)
        ]
