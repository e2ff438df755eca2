"""FreeFlow (2025, arXiv 2511.19428): a flow map from the prior alone, by the path that it predicts itself.

Data that were noised are not the states that a guided or tuned teacher visits; only pure noise is.  So the student
starts there, ``f(z, d) = z + d F(z, d)`` with the duration ``d = 1 - s``, and its own path must follow the teacher's
velocity (towards the data here)::

    v_G = d f / dd = F + d dF/dd,      loss = || F - sg( F - w_k (v_G - u(f(z, d), 1 - d)) ) ||^2
    w_k = 1 / ( ||v_G - u||^2 / dim + eps )^k

the Lagrangian identity (:func:`~fewstep.methods.parts.identities.lagrangian`) at ``t = 1``, whose sign of velocities is
that from data to noise.  With ``difference`` the derivative is a finite difference of the path, ``v_G = (f(z, d) -
f(z, d - difference)) / difference``, against ``u`` at its earlier end: the target of that step is BOOT's.

The paper's second half, the correction by a velocity learned from the student's samples, is not here.  No training code
was released; equations are the project page's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from fewstep.conditions import Cond
from fewstep.denoisers import Denoiser
from fewstep.flow_maps import FlowMap
from fewstep.methods.method import Batch, Networks, Paper, Progress, System, Update
from fewstep.methods.parts.from_noise import FromNoise
from fewstep.methods.parts.identities import (
    Direction,
    adaptive_weight,
    composed,
    lagrangian,
    regression,
    sizes,
)
from fewstep.randomness import repeated_draws
from fewstep.ranges import NonNegative, Positive, Share
from fewstep.schedules import FlowMatching, Schedule, align


@torch.no_grad()
def followed(
    flow_map: FlowMap, z: Tensor, s: Tensor, teacher: Denoiser, cond: Cond = None, *, step: float, **extras: Tensor
) -> Direction:
    """The prediction's direction at ``s`` ``[B]`` by a difference of the path of length ``step``: ``v_G`` between
    ``s + step`` and ``s``, less the teacher's velocity at the first; on flow matching."""
    one, schedule, earlier = torch.ones_like(s), flow_map.schedule, s + step
    with repeated_draws(z.device):
        f = flow_map.mean_velocity(z, one, s, cond, **extras)
    with repeated_draws(z.device):
        before = flow_map.mean_velocity(z, one, earlier, cond, **extras)
    u = teacher.velocity(schedule.move(z, before, one, earlier), earlier, cond)
    landed = composed(schedule, z, before, u, one, earlier, s)
    return Direction(f, align((1 - s) / step, f) * (f - landed))


@dataclass(frozen=True)
class FreeFlow(FromNoise):
    """Prediction from the prior: every duration learns from the ones before it."""

    name: ClassVar[str] = "free-flow"
    paper: ClassVar[Paper] = Paper(
        "Flow Map Distillation Without Data", "2511.19428", "from paper text",
        ("prediction only: the correction, which matches the noised laws of the student's samples and the teacher's by "
         "an auxiliary velocity, is not here, and errors along the path are not undone",
         "no training code was released: equations from the project page",
         "the law of the duration and the learning rate are not published where we could read them",
         "a teacher on another schedule is seen on flow matching; beyond its last trained level that level stands in"),
    )  # fmt: skip
    system: ClassVar[System] = System(
        "FreeFlow", 2025, "flow maps", "teacher", "1",
        "a flow map from noise alone, by the path that the student predicts itself (no correction yet)",
    )  # fmt: skip
    healthy: ClassVar[dict[str, str]] = {
        "student/velocity_gap": "the size of v_G - u, falls over the run",
        "student/loss": "with k = 1 it stays near 1 by construction: it says nothing about quality",
    }

    schedule: ClassVar[Schedule] = FlowMatching()

    k: Annotated[NonNegative, "power of the weight 1 / (||v_G - u||^2 / dim + eps)^k"] = 1.0
    eps: Annotated[Positive, "constant of that weight"] = 0.1
    power: Annotated[
        Share, "the law of the duration has a density like d^power; above 1 training would not be stable"
    ] = 0.5
    difference: Annotated[Share, "step of the finite difference that gives v_G; 0 for the exact derivative"] = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.difference == 1:
            raise ValueError("difference=1 must be below 1, the whole of the path")

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        loss, gap = self.prediction(nets, batch)
        yield Update("student", loss, {"velocity_gap": gap})

    def prediction(self, nets: Networks, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss, and the mean size of ``v_G - u`` a dimension."""
        z = batch.normal()
        extras = self.weights(batch, z)
        s = 1 - batch.rng.uniform(batch.n) ** (1 / (1 + self.power))
        teacher, one = self.target(nets, extras), torch.ones_like(s)
        if self.difference:
            s = s * (1 - self.difference)
            direction = followed(nets.student, z, s, teacher, batch.cond, step=self.difference, **extras)
        else:
            direction = lagrangian(nets.student, z, one, s, teacher, batch.cond, **extras)
        f = nets.student.mean_velocity(z, one, s, batch.cond, **extras)
        dim = z[0].numel()
        weight = adaptive_weight(direction.g, self.k, self.eps * dim) * dim**self.k
        gap = sizes(direction.g).mean() / dim**0.5
        return regression(f, direction, weight=weight).mean(), gap
