"""Students that start from pure noise and are told where to jump: what BOOT and FreeFlow share.

The student is ``f(z, s)``, the jump from the prior at ``t_max`` to every time ``s`` of the trajectory that starts in
``z``; one call to ``t_min`` is a sample.  Its network sees ``z`` at ``t_max`` and is told ``s``, by an input that
starts at zero.  Training draws noise and conditions only: a run may have no data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from fewstep.denoisers import Denoiser, OnSchedule
from fewstep.extras import Input
from fewstep.flow_maps import Jump
from fewstep.guidance import Guided
from fewstep.methods.method import Batch, Method, Networks, Optimizer
from fewstep.methods.parts.teacher_steps import check_all_guidable, guided
from fewstep.methods.start import Start
from fewstep.ranges import NonNegative
from fewstep.sampling.rollout import Plan, Student
from fewstep.schedules import FlowMatching, Schedule

#: At most so much signal is none.
NO_SIGNAL = 1e-9


def ends_in_noise(schedule: Schedule) -> bool:
    """Whether there is no signal left at ``t_max``."""
    return abs(float(schedule.alpha(torch.tensor(schedule.t_max, dtype=torch.float64)))) <= NO_SIGNAL


def seen_from_noise(denoiser: Denoiser, on: Schedule | None = None) -> Denoiser:
    """A denoiser on a schedule that ends in pure noise: its own where that does (or ``on``), else flow matching.

    Where a schedule ends in some signal (0.068 at the end of Stable Diffusion's table) ``x_1`` is not the noise, and
    what starts there is biased.  On flow matching it is; beyond the last level that a network was trained at, the state
    is scaled to it and that level stands in, as in samplers, so that much of the bias stays until the teacher is
    trained on to pure noise.
    """
    own = denoiser.native()
    if on is None and ends_in_noise(own.schedule):
        return own
    wanted = FlowMatching() if on is None else on
    return own if own.schedule == wanted else OnSchedule(own, wanted)


@dataclass(frozen=True)
class FromNoise(Method):
    """Networks and product of a student from the prior."""

    #: The schedule that the method is written on; None: any that ends in pure noise.
    schedule: ClassVar[Schedule | None] = None

    roles: ClassVar[tuple[str, ...]] = ("student",)

    lr: Annotated[NonNegative, "learning rate"] = 1e-3
    guidance: Annotated[float, "scale of the teacher's classifier-free guidance, 1 for none"] = 1.0
    guidance_range: Annotated[
        tuple[float, float] | None,
        "lowest and highest scale: the student takes it as an input w; without, guidance is fixed",
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        ends = self.guidance_range
        if ends and not (ends[0] < ends[1] and ends[0] <= self.guidance <= ends[1]):
            raise ValueError(
                f"guidance_range={ends} must be two scales, the lowest and the highest, with "
                f"guidance={self.guidance:g} between them"
            )

    def networks(self, start: Start) -> Networks:
        teacher = seen_from_noise(start.teacher, self.schedule)
        extras = {}
        if self.guidance_range:
            check_all_guidable(
                teacher, self.guidance_range, "guidance_range"
            )  # says so where there is nothing to guide away from
            low, high = self.guidance_range
            extras["w"] = Input(self.guidance, low, high, unguided=1.0)
        else:
            teacher = guided(teacher, self.guidance)
        network = seen_from_noise(start.network("student", extras=("s", *extras)), self.schedule)
        student = Jump(network, two_times=True, extras=extras)
        return Networks(
            {"student": student, "teacher": teacher},
            {"student": Optimizer(("student",), self.lr, warmup=10, decay="cosine")},
            ema=("student",),
        )

    def weights(self, batch: Batch, z: Tensor) -> dict[str, Any]:
        """The guidance scales ``[B]`` for the noise ``z`` as the student's input, where it takes them."""
        if not self.guidance_range:
            return {}
        low, high = self.guidance_range
        return {"w": batch.rng.uniform(batch.n, low=low, high=high).to(torch.promote_types(z.dtype, torch.float32))}

    def target(self, nets: Networks, extras: Mapping[str, Tensor]) -> Denoiser:
        """The teacher under the guidance of the batch."""
        teacher: Denoiser = nets.teacher
        return Guided(teacher, extras["w"]) if extras else teacher

    def student(self, nets: Networks) -> Student:
        return Student(nets.student, {1: Plan((nets.student.schedule.t_max,))})
