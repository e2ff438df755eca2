"""On Distillation of Guided Diffusion Models (Meng et al. 2022, arXiv 2210.03142): guidance as an input of one network,
then fewer and fewer steps.

Stage 1 puts the two calls of classifier-free guidance into one network that is told the guidance weight::

    loss = E omega(t) || D_1(z_t, w) - D^w(z_t) ||^2,    D^w = D_unc + w (D_cond - D_unc),    w ~ U[w_min, w_max]

Stage 2 is Progressive Distillation of that network, each example at a weight of its own, one call a teacher step.  The
weight is the *scale* of the guidance here, 1 for none; the paper's is one less.

What the last halving learns is the student's way of walking the noise levels:

* ``ddim``: N steps down, deterministic;
* ``stochastic``: from every time of the N-step grid a step of double length, after which sampling goes back one length
  with fresh noise; the last step is a single one;
* ``encode``: N steps up, from data to noise.

No official code exists; equations and settings are those of the paper's text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from fewstep import grids
from fewstep.denoisers import Denoiser
from fewstep.extras import Input
from fewstep.flow_maps import Jump
from fewstep.guidance import Guided
from fewstep.methods.flow_maps.progressive import (
    Step,
    Weighting,
    halved,
    halving_loss,
    halvings,
    weight,
)
from fewstep.methods.method import Batch, Method, Networks, Optimizer, Paper, Progress, Recipe, Stage, System, Update
from fewstep.methods.parts.identities import regression, towards
from fewstep.methods.parts.teacher_steps import check_tells_data
from fewstep.methods.start import Start
from fewstep.ranges import Count, NonNegative, Positive
from fewstep.sampling.rollout import Plan, Student
from fewstep.schedules import Schedule

Way = Literal["ddim", "stochastic", "encode"]


def double_step(schedule: Schedule, steps: int, i: Tensor) -> Step:
    """From every time of the grid of ``steps``, the data excluded, two steps along it; from the time next to the data,
    ``i = 0``, one step (the first of two has no length)."""
    grid = grids.even(schedule, steps).flip(0).to(i.device)
    return grid[i + 1], grid[i.clamp_min(1)], grid[(i - 1).clamp_min(0)]


def raised(schedule: Schedule, steps: int, i: Tensor) -> Step:
    """The steps number ``i`` of ``steps``, counted from the data, walked upward."""
    t, mid, s = halved(schedule, steps, i)
    return s, mid, t


#: The steps that a student of each way learns, from the teacher's.
WAYS: dict[Way, Callable[[Schedule, int, Tensor], Step]] = {
    "ddim": halved, "stochastic": double_step, "encode": raised,
}  # fmt: skip


def plans_of(schedule: Schedule, steps: int, way: Way) -> dict[int, Plan]:
    """How a student of ``steps`` is sampled.  A stochastic one of an even number knows the steps of half as many
    deterministic ones too."""
    grid = tuple(grids.even(schedule, steps).tolist())
    if way != "stochastic":
        return {steps: Plan(grid[:-1], gamma=0.0)}
    half = {} if steps % 2 else {steps // 2: Plan(grid[:-1:2], gamma=0.0)}
    return {steps: Plan(grid[:-1], inner=grid[2:]), **half}


@dataclass(frozen=True)
class _Weighted(Method):
    """What the stages share: a student that is told the guidance weight, drawn for every example."""

    roles: ClassVar[tuple[str, ...]] = ("student",)

    steps: Annotated[Count, "steps that the student is sampled in"] = 1
    lr: Annotated[NonNegative, "learning rate"] = 3e-4
    weighting: Annotated[Weighting, "weight of the squared error over noise levels"] = "snr-trunc"
    w_min: Annotated[float, "least guidance scale that the student is told, 1 for no guidance"] = 1.0
    w_max: Annotated[float, "greatest guidance scale that the student is told"] = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weights(self.w_min, self.w_max)

    def weights(self, batch: Batch) -> Tensor:
        """Guidance scales ``[B]``, from draws of their own."""
        w = batch.rng.stream("w").uniform(batch.n, low=self.w_min, high=self.w_max)
        return w.to(torch.promote_types(batch.x.dtype, torch.float32))

    def jump(self, denoiser: Denoiser, way: Way) -> Jump:
        """A denoiser that takes ``w`` as a flow map that sampling may tell it."""
        none = min(max(1.0, self.w_min), self.w_max)
        extras = {"w": Input(none, self.w_min, self.w_max, unguided=1.0)}
        return Jump(denoiser, extras=extras, upward=way == "encode")

    def trained(self, start: Start, teacher: Denoiser, way: Way) -> Networks:
        """A student that starts as ``start`` has it, beside the model that it learns from."""
        student = self.jump(start.network("student", extras=("w",), on=teacher.schedule), way)
        optimizer = Optimizer(("student",), self.lr, clip=1.0, decay="linear")
        return Networks({"student": student, "teacher": Jump(teacher)}, {"student": optimizer})

    def hands_on(self, nets: Networks) -> Mapping[str, nn.Module]:
        return dict.fromkeys(("teacher", "student"), nets.student.denoiser)


def check_weights(w_min: float, w_max: float) -> None:
    """ValueError for a range of guidance weights that is empty."""
    if not w_min <= w_max:
        raise ValueError(f"w_min={w_min:g} must be at most w_max={w_max:g}")


@dataclass(frozen=True)
class GuidedDenoiser(_Weighted):
    """Stage 1: one network in the place of a guided teacher's two calls, at any weight.

    Its student walks along ``steps`` DDIM steps.
    """

    name: ClassVar[str] = "guided-denoiser"
    healthy: ClassVar[dict[str, str]] = {"student/loss": "starts at the size of the guidance's effect and falls"}

    def networks(self, start: Start) -> Networks:
        teacher = start.teacher
        check_tells_data(teacher)
        if teacher.null is None:
            raise ValueError("this teacher is unconditional, or knows no empty condition: there is no guidance")
        return self.trained(start, teacher, "ddim")

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        schedule, rng = nets.student.schedule, batch.rng
        t = grids.even_time(schedule, rng.uniform(batch.n))
        z_t = schedule.add_noise(batch.x, rng.normal_like(batch.x), t)
        w = self.weights(batch)
        with torch.no_grad():
            target = Guided(nets.teacher.denoiser, w).velocity(z_t, t, batch.cond)
        f = nets.student.mean_velocity(z_t, t, t, batch.cond, w=w)
        loss = regression(f, towards(f, target), weight=weight(schedule, t, self.weighting))
        yield Update("student", loss.mean())

    def student(self, nets: Networks) -> Student:
        return Student(nets.student, plans_of(nets.student.schedule, self.steps, "ddim"))


@dataclass(frozen=True)
class GuidedHalving(_Weighted):
    """Stage 2: one student step against two of a teacher that takes ``w`` too; ``way`` says which steps."""

    name: ClassVar[str] = "guided-halving"
    healthy: ClassVar[dict[str, str]] = {
        "student/loss": "starts near the teacher's two-step error and falls within each halving",
    }

    way: Annotated[Way, "which steps are learned"] = "ddim"

    def networks(self, start: Start) -> Networks:
        return self.trained(start, start.model("teacher"), self.way)

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        schedule, rng = nets.student.schedule, batch.rng
        step = WAYS[self.way](schedule, self.steps, rng.integers(batch.n, 0, self.steps))
        z_t = schedule.add_noise(batch.x, rng.normal_like(batch.x), step[0])
        w = self.weights(batch)
        loss = halving_loss(nets.student, nets.teacher, z_t, step, batch.cond, self.weighting, w=w)
        yield Update("student", loss.mean())

    def student(self, nets: Networks) -> Student:
        return Student(nets.student, plans_of(nets.student.schedule, self.steps, self.way))


@dataclass(frozen=True)
class GuidedDistillation(Recipe):
    """Stage 1, then the halvings from ``start`` steps to ``end``.

    A stochastic student has one more stage, in which the steps of the student of ``end`` are doubled; it needs two or
    more.
    """

    name: ClassVar[str] = "guided-distillation"
    paper: ClassVar[Paper] = Paper(
        "On Distillation of Guided Diffusion Models", "2210.03142", "from paper text",
        ("no official code: equations and settings from the paper's text",
         "the guidance weight is the scale, by default from 1 to 5 (0 to 4 there, where it is one less; 2 to 14 for "
         "text)",
         "the learning rate suits networks of a million parameters in runs of minutes (the paper's is not known)",
         "every halving has the same share of the budget (the paper's updates for each are not known)",
         "the weight is embedded as times are and starts without effect",
         "the single last step of a stochastic student is one teacher step (the paper's rule for it is not known)",
         "the network keeps the teacher's own prediction; a teacher of the noise is taken as it is, unless alpha is "
         "below 1e-6",
         "on EDM, which the paper does not treat, steps and times are equal in TrigFlow's angle"),
    )  # fmt: skip
    system: ClassVar[System] = System(
        "Guided distillation", 2022, "flow maps", "guided teacher, data", "1-16",
        "guidance as an input of one network, then progressive distillation", real="composed_real",
    )  # fmt: skip
    roles: ClassVar[tuple[str, ...]] = ("student",)

    start: Annotated[Count, "DDIM steps of the network of stage 1: end, doubled once or more"] = 16
    end: Annotated[Count, "steps of the last student"] = 1
    way: Annotated[Way, "what the student does: ddim or stochastic steps to data, or encode it as noise"] = "ddim"
    w_min: Annotated[float, "least guidance scale that the student is told, 1 for no guidance"] = 1.0
    w_max: Annotated[float, "greatest guidance scale that the student is told"] = 5.0
    lr: Annotated[NonNegative, "learning rate"] = 1e-3
    weighting: Annotated[Weighting, "weight of the squared error over noise levels"] = "snr-trunc"
    first_share: Annotated[Positive, "budget of stage 1 in halvings"] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weights(self.w_min, self.w_max)
        halvings(self.start, self.end)
        if self.way == "stochastic" and self.end < 2:
            raise ValueError(f"end={self.end}: a stochastic student takes two steps or more")

    def stages(self) -> list[Stage]:
        def halving(steps: int, way: Way) -> Stage:
            return Stage(GuidedHalving(steps, self.lr, self.weighting, self.w_min, self.w_max, way))

        first = GuidedDenoiser(self.start, self.lr, self.weighting, self.w_min, self.w_max)
        down: Way = "encode" if self.way == "encode" else "ddim"
        stages = [Stage(first, self.first_share), *(halving(n, down) for n in halvings(self.start, self.end))]
        return [*stages, halving(self.end, self.way)] if self.way == "stochastic" else stages
