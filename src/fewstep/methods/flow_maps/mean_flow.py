"""MeanFlow (Geng et al. 2025, arXiv 2505.13447): learn the mean velocity between any two times.

On flow matching a jump is ``x_s = x_t + (s - t) F(x_t, t, s)`` with ``F`` the mean of the velocity along the way.
Differentiated in ``t`` along the trajectory it gives a target without an integral::

    loss = w || F(x_t, t, s) - sg(v - (t - s) dF/dt) ||^2,     dF/dt = one jvp along (v, 1, 0) in (x, t, s)
    w    = 1 / (|| F - target ||^2 + c)^p

the Eulerian identity (:mod:`fewstep.methods.parts.identities`).  Training takes ``v = eps - x_0`` from the sampled
pair, distillation from a teacher.  Where ``s = t``, in three quarters of a batch, it is flow matching: those rows need
no jvp.  Guidance is a matter of the target, so sampling calls the network once a step::

    v_g = omega v + (1 - omega - kappa) F(x_t, t, t | nothing) + kappa F(x_t, t, t | c)

whose solution is the velocity under the guidance scale ``omega / (1 - kappa)``.

Read against Gsunshine/meanflow (MIT); the distillation switch against NVlabs/FastGen (Apache-2.0).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from fewstep import grids
from fewstep.conditions import Cond, rows, where
from fewstep.flow_maps import Jump
from fewstep.methods.alarm import Alarm, Grows
from fewstep.methods.method import Batch, Method, Networks, Optimizer, Paper, Progress, System, Update
from fewstep.methods.parts.identities import Direction, adaptive_weight, eulerian, regression, towards
from fewstep.methods.parts.teacher_steps import guided
from fewstep.methods.parts.times import Ordered, PairLaw
from fewstep.methods.start import Start
from fewstep.methods.teachers.retime import check_time_input
from fewstep.ranges import Count, NonNegative, Positive, Share
from fewstep.sampling.rollout import Student, plans_along
from fewstep.schedules import FlowMatching, align

TITLE = "Mean Flows for One-step Generative Modeling"
DEVIATIONS = (
    "`lr` suits runs of minutes (1e-4 there), with a `warmup` of 20 steps and a `decay` to 0 over the budget (constant "
    "there)",
    "the network is told t and s, by an input that starts at zero (the paper's t and t - s)",
    "it starts from the weights of a given model (the paper's from fresh ones)",
    "a network that is told a time that changes fast, a logarithm or a count of steps, is refused (retime makes one "
    "that is not)",
    "rows with s = t are spread evenly over the batch and need no jvp (there its first rows, through a jvp with a "
    "factor of 0)",
    "sampling uses a power-function average (the paper's decays by 0.9999)",
)


@dataclass(frozen=True)
class _MeanFlow(Method):
    """What distillation and training share.

    ``equal`` is the share of rows with ``s = t``; the times are the larger and the smaller of two with
    ``logit ~ N(time_mean, time_std^2)``.  The loss is a mean over the numbers of a sample (a sum in the paper): a
    factor, which Adam takes out again.
    """

    healthy: ClassVar[dict[str, str]] = {
        "student/loss": "with power = 1 it stays near 1 / d for samples of d numbers, because the weight divides it by "
        "its own size",
        "student/error": "falls, then stays: of pairs the part that no map can tell remains",
    }
    unstable: ClassVar[dict[str, Alarm]] = {
        "student/error": Grows("lower lr, draw more rows with equal times (equal), or retime the network")
    }
    roles: ClassVar[tuple[str, ...]] = ("student",)

    lr: Annotated[NonNegative, "learning rate"] = 1e-3
    power: Annotated[NonNegative, "power of the weight 1 / (error + c)^power; 0 for none"] = 1.0
    c: Annotated[Positive, "constant of that weight"] = 0.01
    equal: Annotated[Share, "share of rows whose two times are equal: flow matching"] = 0.75
    time_mean: Annotated[float, "mean of logit(t)"] = -0.4
    time_std: Annotated[NonNegative, "standard deviation of logit(t)"] = 1.0
    steps: Annotated[tuple[Count, ...], "network calls that the student is made for, one plan each"] = (1, 2, 4, 8)

    def networks(self, start: Start) -> Networks:
        student = Jump(start.network("student", extras=("s",), on=FlowMatching()), two_times=True)
        check_time_input(student.denoiser)
        optimizer = Optimizer(("student",), self.lr, betas=(0.9, 0.95), warmup=20, decay="cosine")
        return Networks({"student": student, **self.asked(start)}, {"student": optimizer}, ema=("student",))

    def asked(self, start: Start) -> dict[str, nn.Module]:
        """What the loss asks besides the student, by name; nothing where it is made from data."""
        return {}

    def times(self) -> PairLaw:
        """The law of ``(t, s)``."""
        return Ordered(self.time_mean, self.time_std, self.equal)

    @abstractmethod
    def velocity(self, nets: Networks, batch: Batch, x: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, Cond]:
        """``v`` at the states ``x``, and the condition that the student is given."""

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        student = nets.student
        t, s = self.times().draw(student.schedule, batch.n, batch.rng)
        eps = batch.normal()
        x = student.schedule.add_noise(batch.x, eps, t)
        v, cond = self.velocity(nets, batch, x, eps, t)
        losses, errors = [], []
        for moves in (True, False):
            if self.equal == (1 if moves else 0):
                continue
            here, n = rows_where(t > s if moves else t == s)
            given = (x[here], t[here], s[here])
            # before the call with a graph, which draws the same dropout masks
            own = eulerian(student, *given, v[here], rows(cond, here)) if moves else None
            f = student.mean_velocity(*given, rows(cond, here))
            own = towards(f, v[here]) if own is None else own
            losses.append(self.loss(f, own)[:n])
            errors.append(own.g[:n].square().flatten(1).mean(1))
        yield Update("student", torch.cat(losses).mean(), {"error": torch.cat(errors).mean()})

    def loss(self, f: Tensor, direction: Direction) -> Tensor:
        """The weighted loss of every row."""
        weight = adaptive_weight(direction.g, self.power, self.c) if self.power else None
        return regression(f, direction, weight=weight)

    def student(self, nets: Networks) -> Student:
        schedule = nets.student.schedule
        return Student(nets.student, plans_along(grids.uniform, schedule, self.steps, 0.0))


def rows_where(mask: Tensor) -> tuple[Tensor, int]:
    """The rows in which ``mask`` ``[B]`` is true, and how many they are.  Where there are none, the first: networks
    that are cut over several processes must be called as often in each."""
    found = mask.nonzero()[:, 0]
    return (found if len(found) else found.new_zeros(1)), len(found)


@dataclass(frozen=True)
class MeanFlowDistillation(_MeanFlow):
    """MeanFlow with the velocity of a teacher, under ``guidance``.

    Where ``s = t`` a copy of the teacher is right from the start, and the paper's weight makes much of what little it
    is wrong by there: fewer such rows and the root of that weight (on digits a Fréchet distance of 6.2 in one call for
    9.3 after 300 iterations).
    """

    name: ClassVar[str] = "mean-flow"
    paper: ClassVar[Paper] = Paper(
        TITLE, "2505.13447", "verified",
        ("a teacher's velocity, which is no part of the paper; with it `equal` is 0.25 and `power` 0.5 (0.75 and 1 "
         "there)",
         *DEVIATIONS),
    )  # fmt: skip
    system: ClassVar[System] = System(
        "MeanFlow", 2025, "flow maps", "teacher or data", "1, 2, 4, 8",
        "learns the mean velocity between any two times from its own derivative",
    )  # fmt: skip

    power: Annotated[NonNegative, "power of the weight 1 / (error + c)^power; 0 for none"] = 0.5
    equal: Annotated[Share, "share of rows whose two times are equal: flow matching"] = 0.25
    guidance: Annotated[float, "scale of the teacher's classifier-free guidance, 1 for none"] = 1.0

    def asked(self, start: Start) -> dict[str, nn.Module]:
        return {"teacher": guided(start.teacher.on(FlowMatching()), self.guidance)}

    def velocity(self, nets: Networks, batch: Batch, x: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, Cond]:
        with torch.no_grad():
            return nets.teacher.velocity(x, t, batch.cond), batch.cond


@dataclass(frozen=True)
class MeanFlowTraining(_MeanFlow):
    """MeanFlow from data: the velocity of the sampled pair; the teacher only gives the initial weights.

    ``guidance`` (omega) and ``kappa`` are for times in ``[guided_from, guided_to]``; rows that lost their condition, a
    share ``label_dropout``, are trained without.
    """

    name: ClassVar[str] = "mean-flow-training"
    paper: ClassVar[Paper] = Paper(TITLE, "2505.13447", "verified", DEVIATIONS)

    guidance: Annotated[float, "omega of the guided target, 1 for none; the scale is omega / (1 - kappa)"] = 1.0
    kappa: Annotated[Share, "share of the student's own guided velocity in the target, below 1"] = 0.0
    guided_from: Annotated[Share, "least time that is guided"] = 0.0
    guided_to: Annotated[Share, "greatest time that is guided"] = 1.0
    label_dropout: Annotated[Share, "share of samples that are trained without their condition"] = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kappa == 1:
            raise ValueError("kappa=1 must be below 1: the guidance scale is guidance / (1 - kappa)")
        if self.guided_from > self.guided_to:
            raise ValueError(f"guided_from={self.guided_from:g} must be at most guided_to={self.guided_to:g}")

    @property
    def plain(self) -> bool:
        """Whether there is no guidance."""
        return self.guidance == 1 and self.kappa == 0

    def networks(self, start: Start) -> Networks:
        nets = super().networks(start)
        if not self.plain:
            guided(nets.student.denoiser, self.guidance / (1 - self.kappa))  # ValueError where it knows no "nothing"
        return nets

    def velocity(self, nets: Networks, batch: Batch, x: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, Cond]:
        student, cond = nets.student, batch.cond
        v = student.schedule.velocity(batch.x, eps, t)
        gone = batch.rng.uniform(batch.n) < self.label_dropout
        if cond is None or student.null is None:
            return v, cond
        kept = where(gone, student.null, cond) if self.label_dropout else cond
        if self.plain:
            return v, kept
        with torch.no_grad():
            nothing = where(torch.ones_like(gone), student.null, cond)
            target = self.guidance * v
            if away := 1 - self.guidance - self.kappa:
                target = target + away * student.mean_velocity(x, t, t, nothing)
            if self.kappa:
                target = target + self.kappa * student.mean_velocity(x, t, t, cond)
        inside = (t >= self.guided_from) & (t <= self.guided_to) & ~gone
        return torch.where(align(inside, x).bool(), target, v), kept
