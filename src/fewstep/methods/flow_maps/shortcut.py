"""Shortcut Models (Frans, Hafner, Levine & Abbeel 2024, arXiv 2410.12557): one network for every step size.

The network is told the size ``d`` of the step that it is to make.  Most of a batch is flow matching on data, at the
finest size; the rest learns the larger sizes, each from two steps of half its size of the network's own average::

    loss = E || F(x_t, t, d) - F_target ||^2
    F_target = eps - x_0                                              at d = 1 / finest
    F_target = (F'(x_t, t, d/2) + F'(x_{t-d/2}, t - d/2, d/2)) / 2    at d = 1, 1/2, .., 2 / finest

the semigroup identity on flow matching (:mod:`fewstep.methods.parts.identities`), with no teacher but the network's own
smaller steps.  ``d`` is given as published, ``log2(1 / d)``: 0 for the one step from noise to data.

Read against the official repository (kvfrans/shortcut-models, MIT).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from fewstep import grids
from fewstep.conditions import Cond, rows, where
from fewstep.extras import Input
from fewstep.flow_maps import FlowMap, Jump
from fewstep.guidance import Guided
from fewstep.methods.consistency.cm import follow
from fewstep.methods.method import Batch, Method, Networks, Optimizer, Paper, Progress, System, Update
from fewstep.methods.parts.identities import composed, regression, towards
from fewstep.methods.parts.teacher_steps import check_tells_data, guided
from fewstep.methods.start import Start
from fewstep.ranges import Count, Least, NonNegative, Positive, Share
from fewstep.sampling.rollout import Plan, Student
from fewstep.schedules import FlowMatching, align


@torch.no_grad()
def bootstrap_target(
    smaller: FlowMap, x: Tensor, t: Tensor, level: Tensor, cond: Cond = None, bound: float | None = None
) -> Tensor:
    """The mean velocity of two steps of half the size ``d = 2^-level`` from ``x`` at ``t``; levels are float64 ``[B]``.

    With ``bound`` the state between them and the result are clipped to [-bound, bound], as in the authors' code.
    """
    schedule, half = smaller.schedule, 2.0 ** -(level + 1)
    mid, s = t - half, t - 2 * half

    def clipped(value: Tensor) -> Tensor:
        return value if bound is None else value.clamp(-bound, bound)

    d = told(level + 1, x)
    f_1 = smaller.mean_velocity(x, t, mid, cond, d=d)
    x_mid = clipped(schedule.move(x, f_1, t, mid))
    f_2 = smaller.mean_velocity(x_mid, mid, s, cond, d=d)
    return clipped(composed(schedule, x, f_1, f_2, t, mid, s))


def told(level: Tensor, x: Tensor) -> Tensor:
    """Step sizes as the network is told them, ``log2(1 / d)``, in the type of the times of ``x``."""
    return level.to(torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True)
class Shortcut(Method):
    """One stage, from a teacher's weights or fresh ones.

    ``guidance`` is that of the smallest bootstrapped steps, ``2 / finest``, from which it spreads to the larger ones;
    plans of at most ``finest / 2`` steps have it.
    """

    name: ClassVar[str] = "shortcut"
    paper: ClassVar[Paper] = Paper(
        "One Step Diffusion via Shortcut Models", "2410.12557", "verified",
        ("starts from the weights that it is given, a teacher's as a rule: fresh ones, as there, with 'fewstep train "
         "--method shortcut'",
         "`lr`, `finest`, `share` and `mu` suit runs of minutes (1e-4, 128 steps, 1/8 of the batch and an average of "
         "0.999 there)",
         "the share of bootstrapped samples and their sizes are drawn, not counted off",
         "`bound`: states and targets are not clipped (to [-4, 4] in the authors' code, for latents of that size)",
         "sampling uses a power-function average (0.999 there)"),
    )  # fmt: skip
    system: ClassVar[System] = System(
        "Shortcut Models", 2024, "flow maps", "data", "1, 2, 4, ...",
        "one network for every step size, two half steps as the target of one", real="composed_real",
    )  # fmt: skip
    healthy: ClassVar[dict[str, str]] = {
        "student/loss": "that of flow matching, which does not reach 0, for the most part",
        "student/bootstrap_loss": "small: the error of one step against two; it rises a little when larger steps begin "
        "to follow the smaller ones",
    }
    roles: ClassVar[tuple[str, ...]] = ("student",)

    finest: Annotated[int, Least(2), "steps of the finest size, at which flow matching is trained: a power of 2"] = 32
    share: Annotated[Share, "share of a batch that learns larger steps from smaller ones"] = 0.5
    mu: Annotated[Share, "decay of the average whose smaller steps are the targets"] = 0.95
    bound: Annotated[Positive | None, "clip states between steps, and targets, to [-bound, bound]"] = None
    guidance: Annotated[float, "scale of classifier-free guidance in the smallest bootstrapped steps, 1 for none"] = 1.0
    label_dropout: Annotated[Share, "share of flow matching's samples without their condition"] = 0.1
    lr: Annotated[NonNegative, "learning rate"] = 3e-4
    weight_decay: Annotated[NonNegative, "weight decay"] = 0.1
    steps: Annotated[tuple[Count, ...], "network calls that the student is made for: powers of 2"] = (1, 2, 4, 8)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.finest & (self.finest - 1):
            raise ValueError(f"finest={self.finest} must be a power of 2")
        for k in self.steps:
            if k & (k - 1) or k > self.finest:
                raise ValueError(f"steps={k} must be a power of 2, at most finest={self.finest}")

    @property
    def levels(self) -> int:
        """How often the one step is halved to the finest."""
        return self.finest.bit_length() - 1

    def networks(self, start: Start) -> Networks:
        flow = FlowMatching()
        check_tells_data(start.teacher.on(flow))
        extras = {"d": Input(0.0, 0.0, float(self.levels))}
        model = Jump(start.network("student", extras=("d",), on=flow), extras=extras)
        if self.guidance != 1:
            guided(start.teacher, self.guidance)  # refuses one without an empty condition
        return Networks(
            {"student": model, "target": copy.deepcopy(model)},
            {"student": Optimizer(("student",), self.lr, kind="adamw", weight_decay=self.weight_decay)},
            ema=("student",),
            moved=("target",),
        )

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        schedule, x = nets.student.schedule, batch.x
        u = batch.rng.stream("steps").uniform(batch.n, 3)
        larger = u[:, 0] < self.share
        level = torch.where(larger, (u[:, 1] * self.levels).floor(), float(self.levels))
        t = 1 - (u[:, 2] * 2**level).floor() / 2**level
        z = batch.rng.normal_like(x)
        x_t = schedule.add_noise(x, z, t)
        target = schedule.velocity(x, z, t)
        index = larger.nonzero()[:, 0] if bool(larger.any()) else larger.new_zeros(1, dtype=torch.long)
        made = bootstrap_target(
            self.smaller(nets.target, level[index]), x_t[index], t[index], level[index], rows(batch.cond, index),
            self.bound,
        )  # fmt: skip
        target[index] = torch.where(align(larger[index].double(), made) > 0, made, target[index])
        cond, null = batch.cond, nets.student.null
        if cond is not None and null is not None:
            cond = where(~larger & (batch.rng.stream("labels").uniform(batch.n) < self.label_dropout), null, cond)
        f = nets.student.mean_velocity(x_t, t, t - 2.0**-level, cond, d=told(level, x))
        loss = regression(f, towards(f, target))
        logs = {"bootstrap_loss": (loss.detach() * larger).mean() / max(self.share, 1e-9)}
        yield Update("student", loss.mean(), logs, then=lambda: follow(nets.target, nets.student, self.mu))

    def smaller(self, target: Jump, level: Tensor) -> FlowMap:
        """What makes the smaller steps: under guidance where they are of the finest size."""
        if self.guidance == 1:
            return target
        scale = torch.where(level == self.levels - 1, self.guidance, 1.0)
        return Jump(Guided(target.denoiser, scale), extras=target.extras)

    def student(self, nets: Networks) -> Student:
        schedule = nets.student.schedule
        return Student(
            nets.student,
            {
                k: Plan(tuple(grids.uniform(schedule, k)[:-1].tolist()), gamma=0.0, extras={"d": math.log2(k)})
                for k in self.steps
            },
        )
