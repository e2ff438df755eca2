"""A one-step generator beside a critic that learns the score of its samples: what data-free score matching shares.

The generator is the teacher's own network, called once at a fixed noise level on pure noise, ``x = D(init_sigma z)``;
the critic is a second copy that is trained all the time, with the teacher's own loss, on what the generator makes.
Methods differ in the loss that they make of the two scores.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from fewstep.conditions import Cond
from fewstep.denoisers import Denoiser
from fewstep.flow_maps import Jump
from fewstep.methods.alarm import Alarm
from fewstep.methods.method import Batch, Method, Networks, Optimizer, Progress, Update
from fewstep.methods.parts.distribution_matching import LOST_MODES, RUNAWAY_CRITIC
from fewstep.methods.parts.score_matching import denoising_loss, sample_std
from fewstep.methods.parts.teacher_steps import guided
from fewstep.methods.parts.times import LogNormal
from fewstep.methods.start import Start
from fewstep.ranges import NonNegative, Positive
from fewstep.sampling.inputs import evaluating
from fewstep.sampling.rollout import Plan, Student
from fewstep.sampling.student_generator import StudentGenerator
from fewstep.schedules import Schedule


def two_scores(teacher: Denoiser, critic: Denoiser, x_t: Tensor, t: Tensor, cond: Cond = None) -> tuple[Tensor, Tensor]:
    """``D_teacher, D_critic`` at ``(x_t, t)``, the way to ``x_t`` open, dropout off in both."""
    with evaluating(teacher), evaluating(critic):
        return teacher(x_t, t, cond), critic(x_t, t, cond)


@dataclass(frozen=True)
class OneStep(Method):
    """Alternation of critic and student.

    The data give nothing but conditions and how many samples to make: they may be absent.
    """

    healthy: ClassVar[dict[str, str]] = {
        "critic/denoising": "stays level: its target moves with the student, a fall is not the goal",
        "student/score_gap": "starts near 0 (the critic is a copy of the teacher), rises as the critic turns to the "
        "student's samples, then falls slowly",
        "student/sample_std": "of samples among themselves: rises to about the data's; a slide to 0 is collapse",
    }

    unstable: ClassVar[dict[str, Alarm]] = {"critic/denoising": RUNAWAY_CRITIC, "student/sample_std": LOST_MODES}
    roles: ClassVar[tuple[str, ...]] = ("student",)

    init_sigma: Annotated[Positive, "noise level sigma / alpha at which the student is called"] = 2.5
    guidance: Annotated[float, "scale of the teacher's classifier-free guidance, 1 for none"] = 1.0
    lr: Annotated[NonNegative, "learning rate"] = 1e-4
    critic_lr: Annotated[NonNegative, "learning rate of the critic"] = 5e-4

    def networks(self, start: Start) -> Networks:
        teacher = start.teacher.native()
        self.plan(teacher.schedule)
        student = Optimizer(("student",), self.lr, betas=(0.0, 0.999))
        critic = Optimizer(("critic",), self.critic_lr, betas=(0.0, 0.999))
        made = Jump(start.network("student", on=teacher.schedule))
        return Networks(
            {"student": made, "critic": start.network("critic", on=teacher.schedule), "teacher": teacher},
            {"student": student, "critic": critic},
            ema=("student",),
        )

    def plan(self, schedule: Schedule) -> Plan:
        """The student's only time; ValueError when the schedule does not reach ``init_sigma``."""
        low, high = schedule.ratio(torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64)).tolist()
        if not low < self.init_sigma <= high * (1 + 1e-12):  # the last level itself, in spite of rounding
            raise ValueError(
                f"{type(self).__name__}: init_sigma={self.init_sigma:g} must lie above {low:.3g} and not above "
                f"{high:.3g}, the teacher's noise levels"
            )
        time = schedule.time_at(torch.tensor(-math.log(self.init_sigma), dtype=torch.float64))
        return Plan((float(time),))

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        with evaluating(nets.student), torch.no_grad():
            x = self.draw(nets, batch)
        loss = self.critic_loss(nets, batch, x)
        yield Update("critic", loss, {"denoising": loss.detach()})
        if "student" not in nets.groups:  # it is held, and its critic learns alone
            return
        x = self.draw(nets, batch)
        # held until the backward pass is done, in which checkpointed layers are computed again
        with nets.held("critic"):
            loss, gap = self.student_loss(nets, batch, x)
            logs = {"score_gap": gap.detach().square().mean().sqrt(), "sample_std": sample_std(x)}
            yield Update("student", loss, logs)

    def draw(self, nets: Networks, batch: Batch) -> Tensor:
        """Student samples from fresh noise, as at inference."""
        generator = StudentGenerator(nets.student, self.plan(nets.student.schedule), simulate=False)
        return generator.draw(batch.n, batch.rng, batch.cond)[0]

    def critic_loss(self, nets: Networks, batch: Batch, x: Tensor) -> Tensor:
        """The teacher's own training loss on the student's samples."""
        t = LogNormal().draw(nets.critic.schedule, len(x), batch.rng)
        return denoising_loss(nets.critic, x, t, batch.cond, batch.rng)

    def target(self, nets: Networks) -> Denoiser:
        """The teacher under guidance."""
        return guided(nets.teacher, self.guidance)

    @abstractmethod
    def student_loss(self, nets: Networks, batch: Batch, x: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of the student's samples ``x``, and the gap ``D_critic - D_teacher`` for the record."""

    def student(self, nets: Networks) -> Student:
        return Student(nets.student, {1: self.plan(nets.student.schedule)})
