"""Progressive Distillation (Salimans & Ho 2022, arXiv 2202.00512): halve the number of DDIM steps, again and again.

One student step must land where two teacher steps land.  From noised data ``z_t`` the teacher makes
``z_t -> z_mid -> z_s``, and the data prediction whose single DDIM step lands on ``z_s`` is the target::

    x_target = (z_s - (sigma_s / sigma_t) z_t) / (alpha_s - (sigma_s / sigma_t) alpha_t)

which is the semigroup identity (:mod:`fewstep.methods.parts.identities`) for a map that is not told its target time.
It is written in velocities here, where nothing is 0/0: ``x_target = (sigma'_t z_t - sigma_t F_target) / w_t``.

Read against the official repository (google-research/diffusion_distillation, Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from fewstep import grids
from fewstep.conditions import Cond
from fewstep.flow_maps import FlowMap, Jump
from fewstep.methods.method import Batch, Method, Networks, Optimizer, Paper, Progress, Recipe, Stage, System, Update
from fewstep.methods.parts.identities import regression, semigroup, towards
from fewstep.methods.parts.teacher_steps import check_tells_data, guided
from fewstep.methods.start import Start
from fewstep.ranges import Count, NonNegative
from fewstep.sampling.rollout import Plan, Student
from fewstep.schedules import Schedule

Weighting = Literal["snr-trunc", "snr+1", "constant"]
#: Three times of a step, ``[B]`` each: where it starts, its middle, where it ends.
Step = tuple[Tensor, Tensor, Tensor]


def halving_loss(
    student: FlowMap, teacher: FlowMap, z_t: Tensor, step: Step, cond: Cond, kind: Weighting, **extras: Tensor
) -> Tensor:
    """The weighted squared error ``[B]`` of one student step against two teacher steps.

    Where ``s`` is ``t_min`` the target is the teacher's second data prediction, as in the official code.
    """
    t, _, s = step
    target = semigroup(teacher, z_t, *step, cond, second=teacher, clean=True, **extras)
    f = student.mean_velocity(z_t, t, s, cond, **extras)
    return regression(f, towards(f, target), weight=weight(student.schedule, t, kind))


def weight(schedule: Schedule, t: Tensor, kind: Weighting) -> Tensor:
    """Weight of the squared error in the velocity that weighs the error in the data, ``(sigma / w)^2`` as large, by
    ``max(SNR, 1)``, ``SNR + 1`` (the v loss) or 1."""
    signal, noise = schedule.alpha(t) ** 2, schedule.sigma(t) ** 2
    kinds = {"snr-trunc": torch.maximum(signal, noise), "snr+1": signal + noise, "constant": noise}
    return kinds[kind] / schedule.wronskian(t) ** 2


def halved(schedule: Schedule, steps: int, i: Tensor) -> Step:
    """The steps number ``i`` of ``steps``, counted from the data, and their middles: times of the grid of twice as many
    steps."""
    grid = grids.even(schedule, 2 * steps).flip(0).to(i.device)
    return grid[2 * i + 2], grid[2 * i + 1], grid[2 * i]


@dataclass(frozen=True)
class ProgressiveDistillation(Method):
    """One halving: a student of ``steps`` DDIM steps from a teacher of ``2 steps``.

    The grid is uniform in the schedule's time, which on TrigFlow and the cosine schedule is the paper's, and in
    TrigFlow's angle where the time is the noise level (EDM).  A ladder of these, each starting from what the last one
    made, is :class:`ProgressiveLadder`.
    """

    name: ClassVar[str] = "pd-halving"
    paper: ClassVar[Paper] = Paper(
        "Progressive Distillation for Fast Sampling of Diffusion Models", "2202.00512", "verified",
        ("the ladder's `start` is 16 (8192 on CIFAR-10 there), and `lr` suits networks of a million parameters (5e-5 "
         "there)",
         "the network keeps the teacher's own prediction instead of an x or (x, eps) head",
         "on EDM, which the paper does not treat, steps are equal in TrigFlow's angle",
         "every halving has the same share of the budget; the paper trains the last ones longer",
         "a teacher of the noise is taken as it is, its first step dividing by alpha, unless alpha is below 1e-6",
         "no plain SNR weight, no clipping in sampling"),
    )  # fmt: skip
    healthy: ClassVar[dict[str, str]] = {
        "student/loss": "starts near the teacher's two-step error and falls within each halving; later halvings start "
        "higher",
    }

    roles: ClassVar[tuple[str, ...]] = ("student",)

    steps: Annotated[Count, "DDIM steps of the student, half of the teacher's"] = 1
    lr: Annotated[NonNegative, "learning rate"] = 3e-4
    weighting: Annotated[Weighting, "weight of the squared error over noise levels"] = "snr-trunc"
    guidance: Annotated[float, "scale of the teacher's classifier-free guidance, 1 for none"] = 1.0

    def networks(self, start: Start) -> Networks:
        teacher = start.model("teacher")
        check_tells_data(teacher)
        student = Jump(start.network("student", on=teacher.schedule))
        optimizer = Optimizer(("student",), self.lr, clip=1.0, decay="linear")
        return Networks({"student": student, "teacher": Jump(guided(teacher, self.guidance))}, {"student": optimizer})

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        schedule, rng = nets.student.schedule, batch.rng
        step = halved(schedule, self.steps, rng.integers(len(batch.x), 0, self.steps))
        z_t = schedule.add_noise(batch.x, rng.normal_like(batch.x), step[0])
        loss = halving_loss(nets.student, nets.teacher, z_t, step, batch.cond, self.weighting)
        yield Update("student", loss.mean())

    def student(self, nets: Networks) -> Student:
        times = grids.even(nets.student.schedule, self.steps)[:-1]
        return Student(nets.student, {self.steps: Plan(tuple(times.tolist()), gamma=0.0)})

    def hands_on(self, nets: Networks) -> Mapping[str, nn.Module]:
        return dict.fromkeys(("teacher", "student"), nets.student.denoiser)


@dataclass(frozen=True)
class ProgressiveLadder(Recipe):
    """The halvings from a teacher of ``start`` steps to a student of ``end``; guidance is distilled in the first."""

    name: ClassVar[str] = "pd"
    paper: ClassVar[Paper] = ProgressiveDistillation.paper
    system: ClassVar[System] = System(
        "Progressive Distillation", 2022, "flow maps", "teacher, data", "1, 2, 4, ...",
        "halves the number of DDIM steps, again and again", page="progressive-distillation",
    )  # fmt: skip
    roles: ClassVar[tuple[str, ...]] = ("student",)

    start: Annotated[Count, "DDIM steps of the teacher: end, doubled once or more"] = 16
    end: Annotated[Count, "DDIM steps of the last student"] = 1
    lr: Annotated[NonNegative, "learning rate"] = 3e-4
    weighting: Annotated[Weighting, "weight of the squared error over noise levels"] = "snr-trunc"
    guidance: Annotated[float, "scale of the teacher's classifier-free guidance, 1 for none"] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        halvings(self.start, self.end)

    def stages(self) -> list[Stage]:
        first, *rest = halvings(self.start, self.end)
        guidance = {first: self.guidance, **dict.fromkeys(rest, 1.0)}
        return [Stage(ProgressiveDistillation(n, self.lr, self.weighting, w)) for n, w in guidance.items()]


def halvings(start: int, end: int) -> list[int]:
    """The steps of the students from a teacher of ``start`` steps down to ``end``; ValueError unless ``start`` is
    ``end`` doubled once or more."""
    rounds = start // end if end > 0 else 0
    if start != rounds * end or rounds < 2 or rounds & (rounds - 1):
        raise ValueError(f"start={start} must be end={end} doubled at least once")
    return [start >> k for k in range(1, rounds.bit_length())]
