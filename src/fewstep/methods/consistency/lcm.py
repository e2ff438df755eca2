"""LCM: Latent Consistency Models (Luo, Tan, Huang, Li & Zhao 2023, arXiv 2310.04378).

A consistency model on the teacher's own time grid, whose teacher is led by a guidance scale ``w`` that is drawn anew
for every sample and told to the student::

    loss = E  d( f_theta(x_t, t, w),  sg f_target(x_s, s, w) ),     s = t - k in the teacher's own index
    x_s  = one DDIM step from t to s with  D_w = D_unc + w (D_cond - D_unc),    w ~ U[guidance_min, guidance_max]
    f    = c_skip x + c_out D_theta(x, t, w)        (:class:`~fewstep.flow_maps.LatentConsistency`)

Skipping ``k = 20`` of 1000 steps makes neighbours differ enough for a few thousand iterations to be sufficient.
Nothing asks whether samples are latents.  Read against the authors' training script, huggingface/diffusers
examples/consistency_distillation/train_lcm_distill_sd_wds.py (Apache-2.0).
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from fewstep import grids
from fewstep.denoisers import Denoiser, networks_in
from fewstep.extras import Input
from fewstep.flow_maps import FlowMap, LatentConsistency
from fewstep.guidance import Guided
from fewstep.methods.consistency.cm import both_jumps, follow
from fewstep.methods.method import Batch, Method, Networks, Optimizer, Paper, Progress, Question, System, Update
from fewstep.methods.parts.distances import L2, Distance
from fewstep.methods.parts.teacher_steps import check_tells_data, ddim_step, guided
from fewstep.methods.start import Start
from fewstep.ranges import Count, NonNegative, Positive, Share
from fewstep.sampling.rollout import Plan, Student
from fewstep.sampling.student_samplers import ending_clean
from fewstep.schedules import Schedule

#: The name of the guidance weight as an input of networks.
WEIGHT = "w"


@dataclass(frozen=True)
class SkippingDistillation(Method):
    """What LCM and PCM share: the teacher's guided DDIM step over ``skip`` steps of its own index, whose two ends must
    be taken to the same place.

    Where ``guidance_min`` and ``guidance_max`` differ, the weight is an input ``w`` of the student, at ``guidance_min``
    unless sampling sets it; where they are equal, the guidance is baked in.
    """

    healthy: ClassVar[dict[str, str]] = {
        "student/loss": "falls quickly at first, then slowly; it measures agreement between neighbours, not quality",
    }

    roles: ClassVar[tuple[str, ...]] = ("student",)

    lr: Annotated[NonNegative, "learning rate"] = 4e-4
    distance: Annotated[Distance, "how two predictions are compared"] = L2
    skip: Annotated[Count, "steps of the teacher's table that its solver takes at once, thousandths without one"] = 20
    mu: Annotated[Share, "decay of the target network; 0 makes it the student"] = 0.95
    guidance_min: Annotated[float, "least scale of the teacher's classifier-free guidance, 1 for none"] = 1.0
    guidance_max: Annotated[float, "greatest scale; the student is told it unless both are equal"] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.guidance_max < self.guidance_min:
            raise ValueError(
                f"{type(self).__name__}: guidance_max={self.guidance_max:g} must be at least "
                f"guidance_min={self.guidance_min:g}"
            )

    @property
    def tells(self) -> bool:
        """Whether the student is told the guidance weight."""
        return self.guidance_min < self.guidance_max

    @abstractmethod
    def seen_on(self, schedule: Schedule) -> Schedule:
        """The schedule of the student, for that of the teacher."""

    @abstractmethod
    def flow_map(self, denoiser: Denoiser, extras: Mapping[str, Input]) -> FlowMap:
        """The student around its network."""

    @abstractmethod
    def times(self, schedule: Schedule) -> Tensor:
        """The falling times of the teacher's solver."""

    def end(self, schedule: Schedule, t: Tensor) -> Tensor | None:
        """The times to which the jumps from ``t`` go; None for the data."""
        return None

    def networks(self, start: Start) -> Networks:
        schedule = self.seen_on(start.teacher.schedule)
        teacher = start.teacher.on(schedule)
        check_tells_data(teacher)
        self.check(teacher)
        denoiser = start.network("student", extras=(WEIGHT,) if self.tells else (), on=schedule)
        model = self.flow_map(denoiser, self.weight_of(denoiser))
        return Networks(
            {
                "student": model,
                "teacher": teacher if self.tells else guided(teacher, self.guidance_min),
                "distance": self.distance.network(teacher),
                **({"target": copy.deepcopy(model)} if self.mu else {}),
            },
            {"student": Optimizer(("student",), self.lr, kind="adamw", clip=1.0, decay="linear")},
            ema=("student",),
            moved=("target",) if self.mu else (),
        )

    def check(self, teacher: Denoiser) -> None:
        """ValueError for a teacher that cannot be led, or whose index has no ``skip`` steps."""
        if teacher.null is None and (self.guidance_min, self.guidance_max) != (1, 1):
            raise ValueError(
                f"guidance_min={self.guidance_min:g}, guidance_max={self.guidance_max:g}: this teacher is "
                "unconditional, or knows no empty condition; set both to 1"
            )
        if self.skip > (last := grids.last_index(teacher.schedule)):
            raise ValueError(f"skip={self.skip} must be at most {last}, the steps of the teacher's own index")

    def weight_of(self, denoiser: Denoiser) -> dict[str, Input]:
        """The guidance weight as an input, counted as the network counts it, the middle of its range for samples that
        ask for none; no input where it is not told."""
        if not self.tells:
            return {}
        unguided = networks_in(denoiser)[0].net.unguided
        low, high = self.guidance_min - 1 + unguided, self.guidance_max - 1 + unguided
        return {WEIGHT: Input((low + high) / 2, low, high, unguided)}

    def led(self, nets: Networks, batch: Batch) -> tuple[Denoiser, dict[str, Tensor]]:
        """The guided teacher, and what the student is told of it; a weight of its own for every sample."""
        if not self.tells:
            return nets.teacher, {}
        scale = batch.rng.uniform(len(batch.x), low=self.guidance_min, high=self.guidance_max)
        return Guided(nets.teacher, scale), {WEIGHT: scale - 1 + nets.student.extras[WEIGHT].unguided}

    def ahead(self, teacher: Denoiser, x: Tensor, t: Tensor, s: Tensor, batch: Batch) -> Tensor:
        """Where the guided teacher takes states from ``t`` to ``s``, both ``[B]``."""
        return ddim_step(teacher, x, t, s, batch.cond)

    def both_ends(self, nets: Networks, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """What the student makes of noised data, what the target makes of the states that the teacher takes them to,
        and the times of the first."""
        schedule, rng = nets.student.schedule, batch.rng
        grid = self.times(schedule).to(batch.x.device)
        n = rng.integers(len(batch.x), 0, len(grid) - 1)
        t, s = grid[n], grid[n + 1]
        x_t = schedule.add_noise(batch.x, rng.normal_like(batch.x), t)
        teacher, told = self.led(nets, batch)
        with torch.no_grad():
            x_s = self.ahead(teacher, x_t, t, s, batch)
        jumps = both_jumps(nets.student, self.target(nets), batch, x_t, x_s, t, s, self.end(schedule, t), **told)
        return *jumps, t

    def target(self, nets: Networks) -> FlowMap:
        """The target network, the student itself where it has no average."""
        found: FlowMap = nets.target if self.mu else nets.student
        return found

    def moves(self, nets: Networks) -> Callable[[], None] | None:
        """What moves after an update of the student."""
        return (lambda: follow(nets.target, nets.student, self.mu)) if self.mu else None

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update | Question]:
        made, aim, _ = self.both_ends(nets, batch)
        yield Update("student", nets.distance(made, aim).mean(), then=self.moves(nets))


@dataclass(frozen=True)
class LatentConsistencyDistillation(SkippingDistillation):
    """LCM: all jumps go to the data, and sampling noises up again between calls, at times of the teacher's grid."""

    name: ClassVar[str] = "lcm"
    paper: ClassVar[Paper] = Paper(
        "Latent Consistency Models: Synthesizing High-Resolution Images with Few-Step Inference", "2310.04378",
        "verified",
        ("`guidance_min` and `guidance_max` are 1 and 4 (3 and 15 in this way of counting there, for Stable Diffusion)",
         "`lr` suits networks of a million parameters and runs of minutes (8e-6 there), and with it `mu` "
         "(0.999943 there over 100k iterations, 0.95 in the authors' script)",
         "`decay`: the learning rate falls linearly to 0 over the budget (constant there)",
         "`distance` is l2 (the authors' command: pseudo-Huber, element by element; here over the whole sample)",
         "the last step of the teacher's solver goes to clean data, as LCM's sampler takes it, not to the first level "
         "of the table",
         "schedules that are no table are counted in thousandths of their own index",
         "sampling uses a power-function average of the weights",
         "no latent consistency fine-tuning on other data, which is this distillation from another data set"),
    )  # fmt: skip
    system: ClassVar[System] = System(
        "LCM", 2023, "consistency", "teacher, data", "1, 2, 4, 8",
        "consistency distillation on the teacher's own grid, skipping 20 steps, with the guidance scale as an input",
    )  # fmt: skip

    guidance_max: Annotated[float, "greatest scale; the student is told it unless both are equal"] = 4.0
    sigma_data: Annotated[Positive, "standard deviation of the data, in the boundary coefficients"] = 0.5
    time_scale: Annotated[Positive, "factor on the time in the boundary coefficients"] = 10.0
    steps: Annotated[tuple[Count, ...], "network calls that the student is made for, one plan each"] = (1, 2, 4, 8)

    def check(self, teacher: Denoiser) -> None:
        super().check(teacher)
        self.plan_times(teacher.schedule, max(self.steps))

    def seen_on(self, schedule: Schedule) -> Schedule:
        seen: Schedule = ending_clean(schedule)
        return seen

    def flow_map(self, denoiser: Denoiser, extras: Mapping[str, Input]) -> FlowMap:
        return LatentConsistency(denoiser, self.sigma_data, self.time_scale, extras)

    def times(self, schedule: Schedule) -> Tensor:
        return grids.skipping(schedule, self.skip)

    def plan_times(self, schedule: Schedule, steps: int) -> tuple[float, ...]:
        """About every ``n / steps``-th of the ``n`` times of training, the noisiest first; ValueError for more steps
        than there are times."""
        times = self.times(schedule)[:-1].tolist()
        if steps > len(times):
            raise ValueError(f"steps={steps}: this teacher has {len(times)} times when its solver skips {self.skip}")
        return tuple(times[math.floor(i * len(times) / steps)] for i in range(steps))

    def student(self, nets: Networks) -> Student:
        schedule = nets.student.schedule
        return Student(nets.student, {k: Plan(self.plan_times(schedule, k), gamma=1.0) for k in self.steps})
