"""TSCD: trajectory segmented consistency distillation, the first half of Hyper-SD (Ren et al. 2024, arXiv 2404.13686).

The teacher's trajectory is cut into ``k`` segments, and a student learns to jump between any two times of one::

    x_s   = one (guided) DDIM step of the teacher from t to s, s the next time of its solver
    t_end ~ U[t_b, s],    t_b the lower edge of the segment of t
    loss  = w d( J_theta(x_t, t -> t_end),  sg J_target(x_s, s -> t_end) ) + v adversarial
    J(x, t -> e) = alpha_e D_theta(x, t) + sigma_e eps_theta(x, t)        (:class:`~fewstep.flow_maps.Jump`)

The target is a moving average of the student.  With one segment this is the trajectory consistency of CTM in DDIM's
form, TCD.  The adversary tells the student's landing from its target's, both noised on to a time between ``t_end`` and
``t``, by features of the teacher.  :mod:`fewstep.methods.consistency.hyper_sd` runs it with 8, 4, 2 and 1 segments.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from fewstep import grids
from fewstep.denoisers import Denoiser
from fewstep.flow_maps import Jump
from fewstep.guidance import Guided
from fewstep.methods.alarm import Alarm
from fewstep.methods.consistency.cm import both_jumps, follow
from fewstep.methods.method import (
    Batch,
    Method,
    Networks,
    Optimizer,
    Paper,
    Progress,
    Question,
    Update,
)
from fewstep.methods.parts.adversary import Adversary
from fewstep.methods.parts.distances import L2, Distance
from fewstep.methods.parts.distribution_matching import WON_GAME
from fewstep.methods.parts.teacher_steps import check_tells_data, ddim_step, guided
from fewstep.methods.parts.times import Segments
from fewstep.methods.parts.trained_decoder import body_and_heads
from fewstep.methods.start import TARGET, Start
from fewstep.randomness import Rng
from fewstep.ranges import Count, Least, NonNegative, Share
from fewstep.sampling.rollout import Plan, Student
from fewstep.schedules import Schedule, align

PAPER = Paper(
    "Hyper-SD: Trajectory Segmented Consistency Model for Efficient Image Synthesis", "2404.13686", "from paper text",
    ("no training code of the authors is public",
     "`lr` suits networks of a million parameters and runs of minutes (1e-6 there, for low-rank weights); it falls "
     "linearly to 0 over every stage",
     "the weights of the two terms of a stage are ours (the paper says that the squared error leads with 8 and 4 "
     "segments, and that the adversary gains with 2 and 1), and so are the decay of the target, the steps that the "
     "solver skips, the guidance and the margins, none of which it gives",
     "the trajectory of every stage is the teacher's own, as in the paper's formula (its figure has that of the stage "
     "before)",
     "the discriminator is a head on the frozen teacher's bottleneck, or one at the end of a copy that trains low-rank "
     "weights in its decoder (a trained U-Net there); that both landings are noised on is our reading of the paper's "
     "noise perturbation",
     "the guidance scale is drawn for every sample and not told to the student; 1 unless asked",
     "feedback trains the student's weights, with no adapter of its own and no dial between it and the rest",
     "one feedback, by any reward: no instance segmentation network on noised pictures, no bundled model of aesthetics",
     "the regression of score distillation is on the teacher's own outputs, as in DMD (the paper does not say on what)",
     "consistency at all times goes on in score distillation, so that one student keeps all its steps",
     "no network of its own for one call at t = 800",
     "sampling uses a power-function average of the weights"),
)  # fmt: skip


@lru_cache(maxsize=64)
def solver_times(schedule: Schedule, skip: int, segments: int) -> Tensor:
    """The falling times of the teacher's solver, which starts again at the edge of every segment."""
    return grids.skipping(schedule, skip, Segments(segments).indices(schedule))


def draw_ends(schedule: Schedule, low: Tensor, s: Tensor, rng: Rng) -> Tensor:
    """Times ``t_end`` uniform in the own index between ``low`` and ``s``, both included and maybe equal; whole steps of
    a table."""
    first, last = grids.own_index(schedule, low), grids.own_index(schedule, s)
    whole = 1 if schedule.table_length is not None else 0
    place = first + rng.uniform(len(s)) * (last - first + whole)
    ends = grids.at_index(schedule, torch.minimum(place.floor(), last) if whole else place)
    return torch.minimum(torch.maximum(ends, low), s)


def tcd_plan(schedule: Schedule, steps: int, eta: float) -> Plan:
    """TCD's rule at the edges of ``steps`` segments: each jump goes to ``(1 - eta)`` of the next time, in the own index
    (rounded down to a step of a table), and noise up to it; ``eta = 0`` is deterministic."""
    times = tuple(Segments(steps).edges(schedule)[1:].flip(0).tolist())
    if eta == 0 or steps == 1:
        return Plan(times, gamma=0.0)
    inner = (1 - eta) * grids.own_index(schedule, torch.tensor(times[1:], dtype=torch.float64))
    if schedule.table_length is not None:
        inner = torch.tensor([math.floor(place) for place in inner.tolist()], dtype=torch.float64)
    return Plan(times, inner=tuple(grids.at_index(schedule, inner).tolist()))


def check_etas(name: str, steps: Sequence[int], eta: Sequence[float]) -> None:
    """ValueError unless there is an eta for all numbers of steps, or one for each."""
    if len(eta) not in (1, len(steps)):
        raise ValueError(f"{name}: eta={eta} must be one number, or one for each of steps={steps}")


@dataclass(frozen=True)
class SegmentedConsistency(Method):
    """TSCD: one stage, with ``segments`` parts.

    The student of several segments has one plan, deterministic with a call a segment; that of one segment has the
    unified plans for ``steps``, by TCD's rule with ``eta``.  Where ``guidance_min`` and ``guidance_max`` differ, the
    teacher's scale is drawn for every sample.
    """

    name: ClassVar[str] = "tscd"
    paper: ClassVar[Paper] = PAPER
    healthy: ClassVar[dict[str, str]] = {
        "student/distance": "small from the start, falls within a stage; it measures agreement between neighbours, not "
        "quality",
        "discriminator/discriminator_accuracy": "near 0.5 to 0.7: student and target land alike",
    }
    unstable: ClassVar[dict[str, Alarm]] = {"discriminator/discriminator_accuracy": WON_GAME}
    roles: ClassVar[tuple[str, ...]] = ("student",)

    segments: Annotated[Count, "parts of the trajectory, the paper's k"] = 1
    lr: Annotated[NonNegative, "learning rate"] = 3e-4
    skip: Annotated[Count, "steps of the teacher's table that its solver takes at once, thousandths without one"] = 20
    mu: Annotated[Share, "decay of the target network"] = 0.8
    guidance_min: Annotated[float, "least scale of the teacher's classifier-free guidance, 1 for none"] = 1.0
    guidance_max: Annotated[float, "greatest scale, drawn up to for every sample"] = 1.0
    distance: Annotated[Distance, "how two landings are compared"] = L2
    distance_weight: Annotated[NonNegative, "weight of the distance"] = 1.0
    adversarial_weight: Annotated[NonNegative, "weight of the adversarial term; 0 leaves it out altogether"] = 0.0
    discriminator_rank: Annotated[
        int, Least(0), "rank of the weights that the discriminator trains in its decoder; 0 for a head alone"
    ] = 0
    discriminator_lr: Annotated[NonNegative, "learning rate of the discriminator"] = 1e-3
    steps: Annotated[tuple[Count, ...], "network calls that the student of one segment is made for"] = (1, 2, 4, 8)
    eta: Annotated[tuple[Share, ...], "share of noise between calls, TCD's: one for all of steps, or one for each"] = (
        0.3,
    )

    target_time: Annotated[bool, "tell the network where its jump ends, as CTM does; not in the paper"] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_etas(self.name, self.steps, self.eta)
        if self.guidance_max < self.guidance_min:
            raise ValueError(
                f"{self.name}: guidance_max={self.guidance_max:g} must be at least guidance_min={self.guidance_min:g}"
            )

    def networks(self, start: Start) -> Networks:
        teacher = start.teacher.native()
        self.check(teacher)
        student = self.flow_map(start)
        modules: dict[str, nn.Module] = {"student": student, "teacher": teacher, **self.parts(student, teacher)}
        groups = {"student": Optimizer(("student",), self.lr, "adamw", clip=1.0, decay="linear")}
        if self.adversarial_weight:
            game, trained = body_and_heads(Adversary(), teacher, self.discriminator_rank, start)
            modules |= game
            groups["discriminator"] = Optimizer(trained, self.discriminator_lr, "adamw", clip=1.0)
        return Networks(modules, groups, ema=("student",), moved=("target",))

    def flow_map(self, start: Start) -> Jump:
        """The student, from what a stage before made, else what the user brought, else the teacher."""
        extras = (TARGET,) if self.target_time else ()
        denoiser = start.network("student", extras=extras, on=start.teacher.native().schedule)
        return Jump(denoiser, two_times=self.target_time)

    def parts(self, student: nn.Module, teacher: Denoiser) -> dict[str, nn.Module]:
        """What the loss needs beside student and teacher."""
        return {"target": copy.deepcopy(student), "distance": self.distance.network(teacher)}

    def check(self, teacher: Denoiser) -> None:
        """ValueError for a teacher that cannot be led, or whose index has no such steps or segments."""
        check_tells_data(teacher)
        for field in ("guidance_min", "guidance_max"):
            guided(teacher, getattr(self, field), field)
        if self.skip > (last := grids.last_index(teacher.schedule)):
            raise ValueError(f"skip={self.skip} must be at most {last}, the steps of the teacher's own index")
        for count in (self.segments, *self.steps):
            Segments(count).edges(teacher.schedule)

    def led(self, teacher: Denoiser, n: int, rng: Rng) -> Denoiser:
        """The teacher under the guidance of the batch."""
        if self.guidance_min == self.guidance_max:
            return guided(teacher, self.guidance_min)
        return Guided(teacher, rng.uniform(n, low=self.guidance_min, high=self.guidance_max))

    def ends(self, schedule: Schedule, t: Tensor, s: Tensor, rng: Rng) -> Tensor:
        """The times that the jumps from ``t`` and ``s`` go to: anywhere in their segment below ``s``.  A time that is
        an edge belongs to the segment below it, so that none is empty."""
        return draw_ends(schedule, Segments(self.segments).end(schedule, t), s, rng)

    def land(self, nets: Networks, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Where the student lands from data noised to times of the solver, where its target does without a graph, the
        times ``t`` and those ``t_end`` of the landings."""
        schedule, rng = nets.student.schedule, batch.rng
        grid = solver_times(schedule, self.skip, self.segments).to(batch.x.device)
        n = rng.integers(batch.n, 0, len(grid) - 1)
        t, s = grid[n], grid[n + 1]
        end = self.ends(schedule, t, s, rng)
        x_t = schedule.add_noise(batch.x, rng.normal_like(batch.x), t)
        with torch.no_grad():
            x_s = ddim_step(self.led(nets.teacher, batch.n, rng), x_t, t, s, batch.cond)
        return *both_jumps(nets.student, nets.target, batch, x_t, x_s, t, s, end), t, end

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update | Question]:
        landed, aim, t, end = self.land(nets, batch)
        distance = nets.distance(landed, aim).mean()
        loss, logs = self.distance_weight * distance, {"distance": distance.detach()}
        if not self.adversarial_weight:
            yield Update("student", loss, logs, lambda: self.follow(nets))
            return
        schedule, rng, cond, game = nets.student.schedule, batch.rng, batch.cond, nets.discriminator
        seen = draw_ends(schedule, end, t, rng)
        a, sd = schedule.transition(end, seen)
        fake, real = (align(a, x) * x + align(sd, x) * rng.normal_like(x) for x in (landed, aim))
        with nets.held("discriminator"):
            told = game.rules.loss.generator(game.logits(nets.body, fake, seen, cond))
            logs["adversarial"] = told.detach()
            yield Update("student", loss + self.adversarial_weight * told, logs, lambda: self.follow(nets))
        told, logs = game.tell_apart(nets.body, real, fake.detach(), seen, cond)
        yield Update("discriminator", told, logs)

    def follow(self, nets: Networks) -> None:
        follow(nets.target, nets.student, self.mu)

    def plans(self, schedule: Schedule) -> dict[int, Plan]:
        """A call a segment, or with one segment the plans of all steps."""
        if self.segments > 1:
            return {self.segments: tcd_plan(schedule, self.segments, 0.0)}
        each = self.eta if len(self.eta) == len(self.steps) else self.eta * len(self.steps)
        return {k: tcd_plan(schedule, k, eta) for k, eta in zip(self.steps, each, strict=True)}

    def student(self, nets: Networks) -> Student:
        return Student(nets.student, self.plans(nets.student.schedule))
