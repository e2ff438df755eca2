"""MDT-dist: few-step flows by distilling the transport from every marginal to the data (2025, arXiv 2509.04406).

The student ``phi(x_t, t)`` is the mean velocity from ``x_t`` to the data, ``x_0 = x_t - t phi``: a network of one time,
of the teacher's own architecture.  What it should be is an integral along the teacher's path, ``t phi = int_0^t v``,
which nobody wants to compute; its derivative along the path asks for one point only::

    velocity matching    phi + t dphi/dt = v(x_t, t),    dphi/dt along (v, 1)

and ``phi`` is regressed to ``v - t dphi/dt`` without a gradient through the target: the Eulerian identity
(:mod:`fewstep.methods.parts.identities`) at ``s = 0`` on flow matching.  The derivative is a difference over ``gap``
along the teacher's velocity, or exact.  Beside it *velocity distillation* moves one-step samples ``x = z - phi(z,
1)``, noised again, until their velocity, for which the student itself stands, is the teacher's: a Kullback-Leibler
divergence of the noised laws.  Several steps move along the straight line to the predicted data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from fewstep import grids
from fewstep.conditions import Cond
from fewstep.denoisers import Denoiser
from fewstep.flow_maps import FlowMap, Jump
from fewstep.methods.alarm import Alarm, Grows
from fewstep.methods.method import Batch, Method, Networks, Optimizer, Paper, Progress, System, Update
from fewstep.methods.parts.identities import Direction, Engine, eulerian, normalize, regression, sizes
from fewstep.methods.parts.teacher_steps import check_all_guidable, guided_by_choice
from fewstep.methods.start import Start
from fewstep.methods.teachers.retime import check_time_input
from fewstep.randomness import Rng, repeated_draws
from fewstep.ranges import Count, NonNegative, Share
from fewstep.sampling.rollout import Student, plans_along
from fewstep.schedules import FlowMatching, Schedule, align
from fewstep.tangents import Field, tangent

#: Added to the norm of the derivative where it is normalised.
FLOOR = 0.1


def backward_difference(
    field: Field, x: Tensor, t: Tensor, dx: Tensor, dt: Tensor, step: float
) -> tuple[Tensor, Tensor]:
    """``(F(x, t), dF(x, t)[dx, dt])`` by the value a time ``step`` earlier on the line: two calls, error O(step)."""
    with torch.no_grad():
        with repeated_draws(x.device):
            value = field(x, t)
        earlier = field(x - align(step / dt, x) * dx, t - step)
        return value, align(dt / step, x) * (value - earlier)


def with_unit_slope(
    engine: Engine, field: Field, x: Tensor, t: Tensor, dx: Tensor, dt: Tensor
) -> tuple[Tensor, Tensor]:
    """The same with ``dF/dt`` divided by its norm over the sample: the published "d_norm"."""
    value, slope = engine(field, x, t, dx, dt)
    return value, align(dt, x) * normalize(slope / align(dt, x), FLOOR)


def slope_engine(gap: float, normalized: bool) -> Engine:
    """How the derivative of the student is taken: over ``gap``, exactly where it is 0."""
    engine: Engine = partial(backward_difference, step=gap) if gap else tangent
    return partial(with_unit_slope, engine) if normalized else engine


def velocity_matching(
    student: FlowMap,
    x: Tensor,
    t: Tensor,
    v: Tensor,
    cond: Cond,
    engine: Engine,
    *,
    r: float = 1.0,
    c: float | None = None,
) -> tuple[Tensor, Direction]:
    """``||phi - sg(v - r t dphi/dt)||^2 / d`` a sample ``[B]``, and the direction ``g = phi + r t dphi/dt - v`` that it
    moves against, which the loss normalises as a whole, ``g / (||g|| + c)``, where ``c`` is given."""
    s = torch.full_like(t, student.schedule.t_min)
    direction = eulerian(student, x, t, s, v, cond, r=r, engine=engine)
    return regression(student.mean_velocity(x, t, s, cond), direction, c=c), direction


def velocity_distillation(
    student: FlowMap,
    z: Tensor,
    noise: Tensor,
    t: Tensor,
    teacher: Denoiser,
    cond: Cond,
    engine: Engine,
    *,
    r: float = 1.0,
    c: float | None = None,
) -> tuple[Tensor, Direction]:
    """The loss ``[B]`` that moves one-step samples ``x = z - phi(z, 1)`` until their own velocity is the teacher's.

    At samples noised to ``t`` the student stands for the velocity of its own law, ``U = phi + r t dphi/dt``, and
    ``phi(z, 1)`` moves against ``U - v``: the matching vector without a critic, right as far as the student is right
    there.
    """
    one, zero = torch.full_like(t, student.schedule.t_max), torch.full_like(t, student.schedule.t_min)
    f = student.mean_velocity(z, one, zero, cond)
    x = student.schedule.move(z, f.detach(), one, zero)
    with torch.no_grad():
        x_t = student.schedule.add_noise(x, noise, t)
        v = teacher.velocity(x_t, t, cond)
    gap = eulerian(student, x_t, t, zero, v, cond, r=r, engine=engine)
    return regression(f, Direction(f.detach(), gap.g), c=c), gap


@dataclass(frozen=True)
class MDTDist(Method):
    """Marginal-data transport distillation: velocity matching, and velocity distillation beside it.

    ``guidances`` are the scales of the teacher's guidance, one drawn for each sample; the student has it built in.
    ``gap`` is the time over which the derivative is a difference, 0 for the exact one (which needs a network with a
    forward-mode derivative).  ``slope_norm`` divides the derivative by its norm, as the official code does: the exact
    solution is then *not* where training ends, and in many dimensions what is left is nearly regression of the
    teacher's own velocity.  ``c`` above 0 normalises the whole direction instead, which keeps the solution;
    ``tangent_warmup`` is the share of the budget over which the derivative's part is turned up.  ``time_mean`` and
    ``time_std`` are those of ``logit t``.
    """

    name: ClassVar[str] = "mdt-dist"
    paper: ClassVar[Paper] = Paper(
        "Few-step Flow for 3D Generation via Marginal-Data Transport Distillation", "2509.04406", "verified",
        ("`slope_norm` is off: with it, as in the official code, the exact solution is no fixed point",
         "`tangent_warmup`: the derivative's part is turned up over half of the budget, as in sCM and Align Your Flow; "
         "short runs at rates of minutes go wrong without it",
         "velocity distillation begins when the derivative is turned up: before, the student is no estimate of its own "
         "velocity, and a digits run went wrong (13.4 in one call in place of 7.1)",
         "the whole direction is normalised, with the constant `c`, as in Align Your Flow, which keeps the solution: "
         "without it one digits run of three went wrong",
         "`guidances` and `distillation_guidances` are 1, for small models (41 and 101 in the official code)",
         "`lr` for students of a minute (4e-8 and 1e-8 there, for a model of 1.1B parameters), its `decay` a cosine; "
         "`clip` is a constant bound (adaptive there)",
         "no least noise of 1e-5 in the data",
         "voxels of small solids; not TRELLIS with its two flows, of structure and of sparse latents"),
    )  # fmt: skip
    system: ClassVar[System] = System(
        "MDT-dist", 2025, "flow maps", "flow teacher, data", "1, 2",
        "few-step flow for 3-D generation: the student is the mean velocity to the data",
    )  # fmt: skip
    healthy: ClassVar[dict[str, str]] = {
        "student/loss": "rises while the derivative is turned up, then falls; it does not reach 0",
        "student/direction_norm": "the same as a norm; growth that goes on when the warm-up is over is an unstable "
        "derivative: lower the learning rate",
    }
    unstable: ClassVar[dict[str, Alarm]] = {
        "student/direction_norm": Grows(
            "lower lr, give the derivative a longer warm-up (tangent_warmup), or normalise (c)"
        )
    }
    roles: ClassVar[tuple[str, ...]] = ("student",)

    lr: Annotated[NonNegative, "learning rate"] = 1e-4
    guidances: Annotated[tuple[float, ...], "scales of the teacher's guidance, one drawn for each sample"] = (1.0,)
    distillation_weight: Annotated[NonNegative, "weight of velocity distillation; 0 for none"] = 1.0
    distillation_guidances: Annotated[tuple[float, ...], "the same for velocity distillation"] = (1.0,)
    gap: Annotated[Share, "time over which the derivative is a difference, 0 for the exact one"] = 0.01
    slope_norm: Annotated[bool, "divide the derivative by its norm; moves the fixed point away from the solution"] = (
        False
    )
    c: Annotated[NonNegative, "constant of normalizing the whole direction, g / (|g| + c); 0 leaves it as it is"] = 0.1
    tangent_warmup: Annotated[Share, "share of the budget over which the derivative's part rises to 1"] = 0.5
    time_mean: Annotated[float, "mean of logit t at the times that training looks at"] = 1.0
    time_std: Annotated[NonNegative, "standard deviation of logit t at those times"] = 1.0
    steps: Annotated[tuple[Count, ...], "network calls that the student is made for, one plan each"] = (1, 2)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, scales in (("guidances", self.guidances), ("distillation_guidances", self.distillation_guidances)):
            if not scales:
                raise ValueError(f"mdt-dist: {name}=() must name at least one scale, such as 1")
        if self.gap >= 1:
            raise ValueError(f"mdt-dist: gap={self.gap:g} must be below 1, the time of noise")

    def networks(self, start: Start) -> Networks:
        schedule = FlowMatching()
        for field in ("guidances", "distillation_guidances"):
            check_all_guidable(start.teacher, getattr(self, field), field)
        student = Jump(start.network("student", on=schedule))
        if not self.gap:
            check_time_input(student.denoiser)
        return Networks(
            {
                "student": student,
                "teacher": start.teacher.on(schedule),
            },
            {"student": Optimizer(("student",), self.lr, kind="adamw", clip=1.0, warmup=10, decay="cosine")},
            ema=("student",),
        )

    def times(self, schedule: Schedule, n: int, rng: Rng) -> Tensor:
        """Logit-normal times, float64 ``[n]``, mapped to where a difference has room."""
        u = torch.sigmoid(self.time_mean + self.time_std * rng.normal(n, dtype=torch.float64))
        low = schedule.t_min + self.gap
        return low + (schedule.t_max - low) * u

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        schedule, rng = nets.student.schedule, batch.rng
        t = self.times(schedule, batch.n, rng)
        noise = rng.normal_like(batch.x)
        x = schedule.add_noise(batch.x, noise, t)
        teacher, _ = guided_by_choice(nets.teacher, self.guidances, batch.n, rng)
        with torch.no_grad():
            v = teacher.velocity(x, t, batch.cond)
        engine = slope_engine(self.gap, self.slope_norm)
        r = min(1.0, progress.fraction / self.tangent_warmup) if self.tangent_warmup else 1.0
        c = self.c or None
        losses, direction = velocity_matching(nets.student, x, t, v, batch.cond, engine, r=r, c=c)
        loss = losses.mean()
        logs: dict[str, Tensor | float] = {"direction_norm": sizes(direction.g).mean(), "warmup": r}
        if self.distillation_weight and r == 1:
            teacher, _ = guided_by_choice(nets.teacher, self.distillation_guidances, batch.n, rng)
            z, cond = rng.normal_like(batch.x), batch.cond
            moved, gap = velocity_distillation(nets.student, z, noise, t, teacher, cond, engine, r=r, c=c)
            loss, logs["distillation_norm"] = loss + self.distillation_weight * moved.mean(), sizes(gap.g).mean()
        yield Update("student", loss, logs)

    def student(self, nets: Networks) -> Student:
        schedule = nets.student.schedule
        plans = plans_along(grids.uniform, schedule, self.steps, 0.0)
        return Student(nets.student, plans)
