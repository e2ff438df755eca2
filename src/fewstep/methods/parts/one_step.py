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
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.denoisers import Cond, Denoiser, NetworkDenoiser, gradients
from fewstep.flow_maps import Jump
from fewstep.methods.method import Batch, Method, Networks, Optimiser, Progress, Update, copy_of
from fewstep.methods.parts.score_matching import denoising_loss
from fewstep.methods.parts.teacher_steps import edm_like, guided
from fewstep.methods.parts.times import KarrasUniform, LogNormal
from fewstep.sampling.inputs import evaluating
from fewstep.sampling.rollout import Plan, Student, rollout
from fewstep.schedules import Schedule


def karras_below(schedule: Schedule, share: float) -> KarrasUniform:
    """Uniform in the index of the schedule's own Karras ramp, without its noisiest part above ``share``."""
    levels = edm_like(schedule)
    return KarrasUniform(0.0, share, levels.t_min, levels.t_max)


def two_scores(teacher: Denoiser, critic: Denoiser, x_t: Tensor, t: Tensor, cond: Cond = None) -> tuple[Tensor, Tensor]:
    """``D_teacher, D_critic`` at ``(x_t, t)``: weights held, the way to ``x_t`` open, dropout off in both."""
    with evaluating(teacher), evaluating(critic), gradients(teacher, "input"), gradients(critic, "input"):
        return teacher(x_t, t, cond), critic(x_t, t, cond)


@dataclass(frozen=True)
class OneStep(Method):
    """Alternation of critic and student.

    ``init_sigma`` is the noise level ``sigma / alpha`` at which the student is called; ``guidance`` acts on the teacher
    only; the data give nothing but the labels and how many samples to make.
    """

    healthy: ClassVar[dict[str, str]] = {
        "critic/denoising": "stays level: its target moves with the student, a fall is not the goal",
        "student/score_gap": "starts near 0 (the critic is a copy of the teacher), rises as the critic turns to the "
        "student's samples, then falls slowly",
        "student/sample_std": "stays near the data's; a slide to 0 is collapse",
    }

    init_sigma: float = 2.5
    guidance: float = 1.0
    lr: float = 1e-4
    critic_lr: float = 5e-4

    def networks(self, teacher: Denoiser) -> Networks:
        if not isinstance(teacher, NetworkDenoiser):
            kind = type(teacher).__name__
            raise TypeError(f"{self.name} trains its critic as the teacher was trained: it needs a network, got {kind}")
        self.plan(teacher.schedule)
        student = Optimiser(("student",), self.lr, betas=(0.0, 0.999))
        critic = Optimiser(("critic",), self.critic_lr, betas=(0.0, 0.999))
        return Networks(
            {"student": Jump(copy_of(teacher)), "critic": copy_of(teacher), "teacher": teacher},
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
        x = self.draw(nets, batch)
        loss, gap = self.student_loss(nets, batch, x)
        logs = {"score_gap": gap.detach().square().mean().sqrt(), "sample_std": x.detach().std()}
        yield Update("student", loss, logs)

    def draw(self, nets: Networks, batch: Batch) -> Tensor:
        """Student samples from fresh noise, as at inference."""
        noise = batch.rng.normal_like(batch.x)
        return rollout(nets.student, noise, self.plan(nets.student.schedule), batch.cond)

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
