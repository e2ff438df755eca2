"""Progressive Distillation (Salimans & Ho 2022, arXiv 2202.00512): halve the number of DDIM steps, again and again.

One student step must land where two teacher steps land.  From noised data ``z_t`` the teacher makes
``z_t -> z_mid -> z_s``, and the data prediction whose single DDIM step lands on ``z_s`` is the target::

    x_target = (z_s - (sigma_s / sigma_t) z_t) / (alpha_s - (sigma_s / sigma_t) alpha_t)

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
from fewstep.denoisers import Denoiser
from fewstep.flow_maps import Jump, ddim_move
from fewstep.methods.method import Batch, Method, Networks, Optimizer, Paper, Progress, Recipe, Stage, System, Update
from fewstep.methods.parts.teacher_steps import check_tells_data, ddim_step, guided
from fewstep.methods.start import Start
from fewstep.ranges import Count, NonNegative
from fewstep.sampling.rollout import Plan, Student
from fewstep.schedules import Schedule, align

Weighting = Literal["snr-trunc", "snr+1", "constant"]


def two_step_target(teacher: Denoiser, z_t: Tensor, t: Tensor, mid: Tensor, s: Tensor, cond: Cond = None) -> Tensor:
    """The data prediction that makes one DDIM step from ``z_t`` land where the teacher's two steps land.

    Where ``s`` holds (nearly) no noise the formula is 0/0 in the noise and the teacher's second data prediction is
    what it tends to; the official code uses that prediction at the last step, and so does this.
    """
    schedule = teacher.schedule
    z_mid = ddim_step(teacher, z_t, t, mid, cond)
    x_mid = teacher(z_mid, mid, cond)
    z_s = ddim_move(z_mid, x_mid, mid, s, schedule)
    carry = schedule.sigma(s) / schedule.sigma(t)
    target = (z_s - align(carry, z_t) * z_t) / align(schedule.alpha(s) - carry * schedule.alpha(t), z_t)
    return torch.where(align((s <= schedule.t_min).double(), z_t) > 0, x_mid, target)


def weight(schedule: Schedule, t: Tensor, kind: Weighting) -> Tensor:
    """Weight of the squared error in the data: ``max(SNR, 1)``, ``SNR + 1`` (the v loss) or 1; SNR up to 1e4."""
    snr = torch.exp(2 * schedule.log_snr(t)).clamp_max(1e4)
    return {"snr-trunc": snr.clamp_min(1.0), "snr+1": snr + 1, "constant": torch.ones_like(snr)}[kind]


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
         "SNR weights are capped at 1e4",
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
        return Networks({"student": student, "teacher": teacher}, {"student": optimizer})

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        schedule, rng = nets.teacher.schedule, batch.rng
        grid = grids.even(schedule, 2 * self.steps).flip(0).to(batch.x.device)
        i = rng.integers(len(batch.x), 0, self.steps)
        s, mid, t = grid[2 * i], grid[2 * i + 1], grid[2 * i + 2]
        z_t = schedule.add_noise(batch.x, rng.normal_like(batch.x), t)
        with torch.no_grad():
            target = two_step_target(guided(nets.teacher, self.guidance), z_t, t, mid, s, batch.cond)
        error = (nets.student.predict(z_t, t, s, batch.cond) - target).square().flatten(1).mean(1)
        yield Update("student", (weight(schedule, t, self.weighting).to(error) * error).mean())

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
        rounds = self.start // self.end if self.end > 0 else 0
        if self.start != rounds * self.end or rounds < 2 or rounds & (rounds - 1):
            raise ValueError(f"start={self.start} must be end={self.end} doubled at least once")

    def stages(self) -> list[Stage]:
        rounds = (self.start // self.end).bit_length() - 1
        guidance = [self.guidance, *[1.0] * (rounds - 1)]
        return [
            Stage(ProgressiveDistillation(self.start >> (k + 1), self.lr, self.weighting, guidance[k]))
            for k in range(rounds)
        ]
