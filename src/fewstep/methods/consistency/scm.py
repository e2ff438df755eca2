"""sCM: continuous-time consistency models made stable (Lu & Song 2024, arXiv 2410.11081).

On TrigFlow, ``f(x, t) = cos t x - sin t sd F(x, t)`` with ``sd F = dx/dt`` the student's velocity.  The tangent of
``f`` along the trajectory velocity ``v``, times ``cos t``, is (with warm-up ``r``)::

    G = -cos^2 t (sd F^- - v) - r [cos t sin t x + sd J],      J = cos t sin t dF^-/dt   (one jvp)

normalised to ``G / (||G|| + c)``, and the loss is ``e^w / d ||F - sg F^- - sg G||^2 - w`` with a learned weight
``w(t)``: the Eulerian identity (:mod:`fewstep.methods.parts.identities`) at ``s = 0``, scaled by ``cos t``.
Distillation takes ``v`` from the teacher, training from the pair ``v = cos t z - sin t x_0``.

No official code exists; equations and hyper-parameters are those of the paper's text, checked on a whitened Gaussian
where the solution is known.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from fewstep import grids
from fewstep.conditions import Cond
from fewstep.flow_maps import Jump
from fewstep.methods.alarm import Alarm, Grows
from fewstep.methods.method import Batch, Method, Networks, Optimizer, Paper, Progress, System, Update
from fewstep.methods.parts.identities import TimeWeight, eulerian, regression, sizes
from fewstep.methods.parts.teacher_steps import edm_like, guided
from fewstep.methods.parts.times import LogNormal
from fewstep.methods.start import Start
from fewstep.methods.teachers.retime import check_time_input
from fewstep.ranges import Count, NonNegative, Positive, Share
from fewstep.sampling.rollout import Plan, Student, plans_along
from fewstep.schedules import Schedule, TrigFlow
from fewstep.tangents import tangent


def trig_like(schedule: Schedule, sigma_data: float) -> TrigFlow:
    """TrigFlow up to the noise level at which another schedule begins, at most EDM's 80."""
    trig = TrigFlow(sigma_data=sigma_data)
    top = trig.time_at(torch.tensor(edm_like(schedule).t_max, dtype=torch.float64).log().neg())
    return TrigFlow(t_max=float(top), sigma_data=sigma_data)


def tangent_update(
    nets: Networks, x: Tensor, t: Tensor, v: Tensor, cond: Cond, *, r: float, c: float, **extras: Tensor
) -> Update:
    """The update at the states ``x`` ``[B, ...]``, times ``t`` ``[B]`` and velocities ``v``, whatever they come from:
    the tangent without a graph, then the regression with one.  ``extras`` are further inputs of the student."""
    student, scale = nets.student, nets.student.schedule.sigma_data
    s = torch.full_like(t, student.schedule.t_min)
    own = eulerian(student, x, t, s, v, cond, r=r, scale=t.cos(), engine=tangent, **extras)
    f = student.mean_velocity(x, t, s, cond, **extras)
    loss = regression(f / scale, own, c=c, log_weight=nets.weight(t)).mean()
    return Update("student", loss, {"tangent_norm": sizes(own.g).mean(), "warmup": r})


@dataclass(frozen=True)
class _ContinuousConsistency(Method):
    """What sCD and sCT share.

    ``sigma_data`` is TrigFlow's scale (the teacher's own); ``c`` the constant of tangent normalisation;
    ``tangent_warmup`` the share of the budget over which ``r`` rises to 1 (10k of 100k to 400k iterations in the
    paper; short runs need nearly all of theirs: on a mixture of five modes the map of 1,500 iterations is 0.23 off with
    a half and 0.05 with 0.9, and digits bear four times the rate); ``noise_mean`` and ``noise_std``
    the law of ``log(sigma / alpha)``.
    """

    healthy: ClassVar[dict[str, str]] = {
        "student/loss": "stays near (||G|| / (||G|| + c))^2 - w by construction: it says nothing about quality",
        "student/tangent_norm": "falls over the run; growth to many times its first value is the instability that "
        "tangent normalisation and warm-up prevent",
    }

    unstable: ClassVar[dict[str, Alarm]] = {
        "student/tangent_norm": Grows(
            "give the tangent a longer warm-up (tangent_warmup), lower lr, or retime the network"
        )
    }

    roles: ClassVar[tuple[str, ...]] = ("student",)

    lr: Annotated[NonNegative, "learning rate"] = 1e-4
    sigma_data: Annotated[Positive, "TrigFlow's scale, the teacher's own"] = 0.5
    c: Annotated[Positive, "constant of the tangent normalization G / (|G| + c)"] = 0.1
    tangent_warmup: Annotated[Share, "share of the budget over which the tangent's unstable part rises to 1"] = 0.9
    noise_mean: Annotated[float, "mean of log(sigma / alpha) at the times that training looks at"] = -1.0
    noise_std: Annotated[NonNegative, "standard deviation of log(sigma / alpha) at those times"] = 1.6
    steps: Annotated[tuple[Count, ...], "network calls that the student is made for, one plan each"] = (1, 2, 4)

    def networks(self, start: Start) -> Networks:
        schedule = trig_like(start.teacher.schedule, self.sigma_data)
        model = Jump(start.network("student", on=schedule))
        check_time_input(model.denoiser)
        return Networks(
            {"student": model, "weight": TimeWeight(), **self.asked(start, schedule)},
            {
                "student": Optimizer(
                    ("student", "weight"), self.lr, betas=(0.9, 0.99), eps=1e-11, warmup=10, decay="cosine"
                )
            },
            ema=("student",),
        )

    def asked(self, start: Start, schedule: Schedule) -> dict[str, nn.Module]:
        """What the loss asks besides the student, by name; nothing where it is made from data."""
        return {}

    @abstractmethod
    def trajectory_velocity(self, nets: Networks, batch: Batch, x_t: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """``v = dx/dt`` at ``x_t``."""

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        schedule, rng = nets.student.schedule, batch.rng
        t = LogNormal(self.noise_mean, self.noise_std).draw(schedule, len(batch.x), rng)
        z = rng.normal_like(batch.x)
        x_t = schedule.add_noise(batch.x, z, t)
        with torch.no_grad():
            v = self.trajectory_velocity(nets, batch, x_t, z, t)
        r = min(1.0, progress.fraction / self.tangent_warmup) if self.tangent_warmup else 1.0
        yield tangent_update(nets, x_t, t, v, batch.cond, r=r, c=self.c)

    def student(self, nets: Networks) -> Student:
        schedule = nets.student.schedule
        plans = plans_along(grids.uniform, schedule, self.steps, 1.0)
        if 2 in plans:
            plans[2] = Plan((schedule.t_max, 1.1), gamma=1.0)
        return Student(nets.student, plans)


@dataclass(frozen=True)
class ContinuousConsistencyDistillation(_ContinuousConsistency):
    """sCD: the trajectory's velocity is the teacher's, under ``guidance``."""

    name: ClassVar[str] = "scm"
    paper: ClassVar[Paper] = Paper(
        "Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models", "2410.11081", "from paper text",
        ("no official code: equations and tables from the paper's text",
         "`decay`: the learning rate follows a cosine over the budget (the paper's falls as an inverse square root)",
         "`tangent_warmup` is nine tenths of the budget (the paper's counts 10k iterations, 2.5 to 10 %)",
         "time weight on its own small embedding",
         "a network that is told another time than the angle is refused; retiming it is a training of its own "
         "(retime)",
         "the teacher's guidance is baked in, not an input of the network",
         "no adaptive variational score distillation; normalized tangents, not clipped ones"),
    )  # fmt: skip
    system: ClassVar[System] = System(
        "sCM", 2024, "consistency", "teacher or data", "1, 2, 4",
        "continuous-time consistency made stable: TrigFlow, normalised tangents, warm-up",
    )  # fmt: skip

    guidance: Annotated[float, "scale of the teacher's classifier-free guidance, 1 for none"] = 1.0

    def asked(self, start: Start, schedule: Schedule) -> dict[str, nn.Module]:
        return {"teacher": start.teacher.on(schedule)}

    def trajectory_velocity(self, nets: Networks, batch: Batch, x_t: Tensor, z: Tensor, t: Tensor) -> Tensor:
        return guided(nets.teacher, self.guidance).velocity(x_t, t, batch.cond)


@dataclass(frozen=True)
class ContinuousConsistencyTraining(_ContinuousConsistency):
    """sCT: the trajectory's velocity is that of the sampled pair, ``v = cos t z - sin t x_0``; the teacher only gives
    the initial weights."""

    name: ClassVar[str] = "scm-training"
    paper: ClassVar[Paper] = ContinuousConsistencyDistillation.paper

    def trajectory_velocity(self, nets: Networks, batch: Batch, x_t: Tensor, z: Tensor, t: Tensor) -> Tensor:
        return nets.student.schedule.velocity(batch.x, z, t)
