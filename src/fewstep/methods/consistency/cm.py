"""Consistency Models (Song, Dhariwal, Chen & Sutskever 2023, arXiv 2303.01469).

A consistency function maps every point of a probability-flow trajectory to the same end::

    loss = E  w d( f_theta(x_t, t),  sg f_target(x_s, s) ),      s the next time of a Karras grid after t

Distillation takes ``x_s`` by one Heun step of the teacher; training takes ``x_s = x_0 + s z`` with the *same* noise
``z`` as ``x_t = x_0 + t z``.  Read against the official repository (openai/consistency_models, MIT).
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from fewstep import grids
from fewstep.flow_maps import EDMConsistency, FlowMap
from fewstep.methods.method import Batch, Method, Networks, Optimizer, Paper, Progress, System, Update
from fewstep.methods.parts.distances import L2, Compare, Distance
from fewstep.methods.parts.teacher_steps import edm_like, guided, heun_step
from fewstep.methods.start import Start
from fewstep.networks.lora import moving
from fewstep.randomness import repeated_draws
from fewstep.ranges import Above, Count, Least, NonNegative, Positive, Share
from fewstep.sampling.rollout import Student, plans_along
from fewstep.schedules import Schedule


def consistency_loss(
    model: FlowMap,
    target: FlowMap,
    batch: Batch,
    x_t: Tensor,
    x_s: Tensor,
    t: Tensor,
    s: Tensor,
    distance: Compare,
    end: Tensor | None = None,
    **extras: Tensor,
) -> Tensor:
    """``d(f(x_t, t), sg f_target(x_s, s))`` per sample, as :func:`both_jumps` makes the two."""
    return distance(*both_jumps(model, target, batch, x_t, x_s, t, s, end, **extras))


def both_jumps(
    model: FlowMap,
    target: FlowMap,
    batch: Batch,
    x_t: Tensor,
    x_s: Tensor,
    t: Tensor,
    s: Tensor,
    end: Tensor | None = None,
    **extras: Tensor,
) -> tuple[Tensor, Tensor]:
    """``f(x_t, t)`` and, without a graph, ``f_target(x_s, s)``, with the same dropout mask in both calls.

    ``f`` goes to the data, or to the times ``end`` ``[B]``; ``extras`` are further inputs of both networks.
    """

    def jump(flow_map: FlowMap, x: Tensor, time: Tensor) -> Tensor:
        if end is None:
            return flow_map.to_data(x, time, batch.cond, **extras)
        return flow_map.jump(x, time, end, batch.cond, **extras)

    with torch.no_grad(), repeated_draws(x_t.device):
        aim = jump(target, x_s, s)
    return jump(model, x_t, t), aim


@dataclass(frozen=True)
class _ConsistencyModel(Method):
    """What distillation and training share.

    ``sigma_data`` enters the boundary coefficients.
    """

    healthy: ClassVar[dict[str, str]] = {
        "student/loss": "small from the start when the student is a copy of the teacher, and stays small; it measures "
        "agreement between neighbours, not quality",
    }

    roles: ClassVar[tuple[str, ...]] = ("student",)

    lr: Annotated[NonNegative, "learning rate"] = 4e-4
    distance: Annotated[Distance, "how two predictions are compared; LPIPS in the paper"] = L2
    sigma_data: Annotated[Positive, "standard deviation of the data, in the boundary coefficients"] = 0.5
    steps: Annotated[tuple[Count, ...], "network calls that the student is made for, one plan each"] = (1, 2, 4)

    def networks(self, start: Start) -> Networks:
        model = EDMConsistency(start.network("student", on=edm_like(start.teacher.schedule)), self.sigma_data)
        return Networks(
            {
                "student": model,
                "target": copy.deepcopy(model),
                "distance": self.distance.network(start.teacher),
                **self.asked(start, model.schedule),
            },
            {"student": Optimizer(("student",), self.lr, kind="radam", decay="linear")},
            ema=("student",),
            moved=("target",),
        )

    def asked(self, start: Start, schedule: Schedule) -> dict[str, nn.Module]:
        """What the loss asks besides the student, by name; nothing where it is made from data."""
        return {}

    @abstractmethod
    def scales(self, progress: Progress) -> int:
        """N, the number of times of the grid."""

    @abstractmethod
    def target_decay(self, progress: Progress) -> float:
        """mu, the share of the target network that stays after an update; 0 makes it a copy of the student."""

    @abstractmethod
    def partner(self, nets: Networks, batch: Batch, x_t: Tensor, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """``x_s``, the state at the next time on (an estimate of) the same trajectory."""

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        schedule, rng = nets.student.schedule, batch.rng
        grid = grids.karras(schedule, self.scales(progress) - 1).to(batch.x.device)
        n = rng.integers(len(batch.x), 0, len(grid) - 1)
        t, s = grid[n], grid[n + 1]
        z = rng.normal_like(batch.x)
        x_t = schedule.add_noise(batch.x, z, t)
        with torch.no_grad():
            x_s = self.partner(nets, batch, x_t, z, t, s)
        loss = consistency_loss(nets.student, nets.target, batch, x_t, x_s, t, s, nets.distance).mean()
        mu = self.target_decay(progress)
        yield Update("student", loss, {"scales": len(grid)}, then=lambda: follow(nets.target, nets.student, mu))

    def student(self, nets: Networks) -> Student:
        schedule = nets.student.schedule
        return Student(nets.student, plans_along(grids.karras, schedule, self.steps, 1.0))


@torch.no_grad()
def follow(target: FlowMap, model: FlowMap, mu: float) -> None:
    """``target <- mu target + (1 - mu) model``."""
    torch._foreach_lerp_((*moving(target),), (*moving(model),), 1 - mu)


@dataclass(frozen=True)
class ConsistencyDistillation(_ConsistencyModel):
    """CD: the neighbour on the trajectory comes from one Heun step of the teacher (algorithm 2).

    ``grid_times`` is the paper's N (18 on CIFAR-10, 40 on ImageNet-64), ``mu`` the decay of the target network (0 on
    CIFAR-10, 0.95 elsewhere), ``guidance`` the teacher's classifier-free guidance.
    """

    name: ClassVar[str] = "cm"
    paper: ClassVar[Paper] = Paper(
        "Consistency Models", "2303.01469", "verified",
        ("`distance` is l2 by default: the weights of LPIPS are not bundled (distance lpips:PATH reads a file of them)",
         "`decay`: the learning rate falls linearly to 0 over the budget (the paper's is constant)",
         "no `warmup`, as in the authors' code for ImageNet (that for CIFAR-10 has 10 million images)",
         "sampling uses a power-function average (the paper's average has a fixed decay)",
         "the teacher's guidance is baked in, not an input of the network"),
    )  # fmt: skip
    system: ClassVar[System] = System(
        "Consistency Models", 2023, "consistency", "teacher or data", "1, 2, 4",
        "maps every point of a trajectory to its end, distilled or from data alone", page="consistency-models",
    )  # fmt: skip

    grid_times: Annotated[int, Least(2), "times of the grid, the paper's N: 18 on CIFAR-10, 40 on ImageNet-64"] = 18
    mu: Annotated[Share, "decay of the target network: 0 on CIFAR-10 in the paper, 0.95 elsewhere"] = 0.0
    guidance: Annotated[float, "scale of the teacher's classifier-free guidance, 1 for none"] = 1.0

    def asked(self, start: Start, schedule: Schedule) -> dict[str, nn.Module]:
        return {"teacher": start.teacher.on(schedule)}

    def scales(self, progress: Progress) -> int:
        return self.grid_times

    def target_decay(self, progress: Progress) -> float:
        return self.mu

    def partner(self, nets: Networks, batch: Batch, x_t: Tensor, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return heun_step(guided(nets.teacher, self.guidance), x_t, t, s, batch.cond)


@dataclass(frozen=True)
class ConsistencyTraining(_ConsistencyModel):
    """CT: no teacher in the loss; both states share data and noise (algorithm 3).

    The grid grows from ``s0`` to ``s1`` times and the target's decay with it (appendix C):
    ``N(k) = ceil(sqrt(k/K ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1``, ``mu(k) = exp(s0 log mu0 / (N(k) - 1))``, the latter
    with ``N - 1`` as in the official code.
    """

    name: ClassVar[str] = "cm-training"
    paper: ClassVar[Paper] = replace(
        ConsistencyDistillation.paper,
        deviations=(
            *ConsistencyDistillation.paper.deviations[:-1],
            "starts from the weights that it is given (fewstep train gives fresh ones, as in the paper)",
        ),
    )

    s0: Annotated[int, Least(2), "times of the grid at the start"] = 2
    s1: Annotated[int, Least(2), "times of the grid at the end, at least s0"] = 150
    mu0: Annotated[Share, Above(0), "decay of the target network at the start; it rises with the grid"] = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.s1 < self.s0:
            raise ValueError(f"ConsistencyTraining: s1={self.s1} must be at least s0={self.s0}: the grid grows")

    def scales(self, progress: Progress) -> int:
        squared = progress.fraction * ((self.s1 + 1) ** 2 - self.s0**2) + self.s0**2
        return math.ceil(math.sqrt(squared) - 1) + 1

    def target_decay(self, progress: Progress) -> float:
        return math.exp(self.s0 * math.log(self.mu0) / (self.scales(progress) - 1))

    def partner(self, nets: Networks, batch: Batch, x_t: Tensor, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return nets.student.schedule.add_noise(batch.x, z, s)
