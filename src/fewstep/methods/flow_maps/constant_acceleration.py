"""Constant Acceleration Flow (Park et al. 2024, arXiv 2411.00322): a velocity at the noise, and one acceleration.

On pairs of noise ``n`` and the teacher's output ``x`` two networks are trained one after the other; the path that they
speak of is that of :mod:`fewstep.constant_acceleration`, with ``tau`` from 0 at the noise to 1 at the data::

    velocity        E d( v(x_tau, tau), h (n - x) )                 x_tau built with v = h (n - x)
    acceleration    E d( a(x_tau, tau, v^), 2 (v^ - (n - x)) )      x_tau built with v^ = sg v(n, 0)

The second network is told ``v^`` (*initial velocity conditioning*): it knows on which of two crossing paths it is.
``d`` is a pseudo-Huber distance and a perceptual one of the end of the path that a prediction implies.  Velocities
point to the noise, as everywhere here; the paper's are the negative.

Read against mlvlab/CAF.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from fewstep.constant_acceleration import (
    ConstantAcceleration,
    acceleration,
    displacement,
    initial_velocity,
    path_state,
    time_of,
)
from fewstep.data.dataset import Samples
from fewstep.denoisers import Denoiser
from fewstep.methods.flow_maps.rectified_flow import STRAIGHT
from fewstep.methods.method import Batch, Method, Networks, Optimizer, Paper, Progress, Recipe, Stage, System, Update
from fewstep.methods.parts.distances import L2, Distance, pseudo_huber
from fewstep.methods.parts.stores import teacher_pairs
from fewstep.methods.start import Start
from fewstep.ranges import Count, NonNegative, Within
from fewstep.sampling.rollout import Plan, Student
from fewstep.schedules import align

#: Training looks at the times ``k / 1000``, both ends among them.
GRID = 1000
#: ``h`` at which paths do not turn before they reach the data.
Slope = Annotated[float, Within(0.01, 1.99)]


def huber(a: Tensor, b: Tensor) -> Tensor:
    """``(sqrt(||a - b||^2 + k^2) - k) / d`` with ``k = 0.00054 d``, ``[B]``, as the official code has it."""
    size = a[0].numel()
    return pseudo_huber(a, b, 0.00054 * size) / size


@dataclass(frozen=True)
class _OnPairs(Method):
    """What both stages share."""

    paper: ClassVar[Paper] = Paper(
        "Constant Acceleration Flow", "2411.00322", "verified",
        ("no adversarial last stage, which the paper's best figures have (1.48 against 4.81 on CIFAR-10)",
         "`distance` of the ends is l2 by default: the weights of LPIPS are not bundled (distance lpips:PATH reads a "
         "file of them, and compares pictures in [-1, 1] where the official code maps them to [0, 1])",
         "the end that the first stage compares is the right one for every h; the official code's is right at 1 only",
         "fewer `pairs` (a million there), by `ode_steps` of 16 Heun steps (18 there)",
         "short runs: `lr` of 1e-3 (1e-4 there), `warmup` of 20 steps and `decay` to 0 over the budget (none there)",
         "networks are told the noise level that the path has at tau, not tau itself, so that the teacher's weights "
         "are a start; the second one's output is the displacement n - x, from which the acceleration follows",
         "the second network starts from the first, as the paper says (the official code's from fresh weights)",
         "times from the even grid only, not from its U-shaped law; samples are not clamped to [-1, 1]"),
    )  # fmt: skip

    roles: ClassVar[tuple[str, ...]] = ("student",)

    h: Annotated[Slope, "initial velocity in units of the displacement: 1 straight, above 1 it slows down"] = 1.5
    pairs: Annotated[Count, "pairs of noise and the teacher's output for it, made once before training"] = 4096
    ode_steps: Annotated[Count, "Heun steps of the teacher for each pair"] = 16
    guidance: Annotated[float, "scale of the teacher's classifier-free guidance, 1 for none"] = 1.0
    distance: Annotated[Distance, "how ends of paths are compared; LPIPS in the paper"] = L2
    lr: Annotated[NonNegative, "learning rate"] = 1e-3

    def sources(self, start: Start) -> Mapping[str, Samples]:
        return teacher_pairs(start, self.pairs, self.ode_steps, self.guidance)

    def owned(self, trained: str, start: Start, **modules: nn.Module) -> Networks:
        """The networks of a stage that trains one of them."""
        optimizer = Optimizer((trained,), self.lr, kind="adamw", weight_decay=1e-5, warmup=20, decay="cosine")
        distance = self.distance.network(start.teacher.shape)
        return Networks({**modules, "distance": distance}, {trained: optimizer}, ema=(trained,))

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        (trained,) = nets.groups
        tau = batch.rng.integers(len(batch.x), 0, GRID + 1).double() / GRID
        said, wanted, end = self.prediction(nets, batch.x, batch.column("noise"), tau, batch)
        near = huber(said, wanted).mean()
        yield Update(trained, near + nets.distance(end, batch.x).mean(), {"huber": near.detach()})

    @abstractmethod
    def prediction(
        self, nets: Networks, x: Tensor, noise: Tensor, tau: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the trained network says at ``tau``, what it should say, and the end of the path that it implies."""


@dataclass(frozen=True)
class InitialVelocity(_OnPairs):
    """The first stage: from any point of the path, the velocity with which it began."""

    name: ClassVar[str] = "caf-velocity"
    healthy: ClassVar[dict[str, str]] = {
        "velocity/huber": "falls quickly, then slowly: at the noise, one velocity stands for all data near the pair's",
    }

    def networks(self, start: Start) -> Networks:
        return self.owned("velocity", start, velocity=start.network("student", on=STRAIGHT))

    def prediction(
        self, nets: Networks, x: Tensor, noise: Tensor, tau: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor, Tensor]:
        wanted = self.h * (noise - x)
        x_tau, t = path_state(x, noise, wanted, tau), time_of(tau, self.h)
        said = initial_velocity(nets.velocity, x_tau, t, self.h, batch.cond)
        return said, wanted, x_tau - align(t / self.h, x) * said

    def student(self, nets: Networks) -> Denoiser:
        """A rectified flow: its velocity is that of the straight lines."""
        return nets.velocity

    def hands_on(self, nets: Networks) -> Mapping[str, nn.Module]:
        return {"velocity": nets.velocity}


@dataclass(frozen=True)
class Acceleration(_OnPairs):
    """The second stage: the acceleration that belongs to the velocity network's own ``v^`` at the noise.

    Without a first stage the teacher's own velocity at the noise stands for it.
    """

    name: ClassVar[str] = "caf-acceleration"
    healthy: ClassVar[dict[str, str]] = {
        "acceleration/huber": "starts where the velocity's ended, twice as large, and falls below it: the second "
        "network is told where the path is meant to go",
    }

    steps: Annotated[tuple[Count, ...], "steps that the student is made for, one plan each; a call more each"] = (
        1,
        2,
        4,
    )

    def networks(self, start: Start) -> Networks:
        velocity = start.model("velocity").on(STRAIGHT)
        accelerated = start.network("velocity", beside=start.teacher.shape[0], on=STRAIGHT)
        return self.owned("acceleration", start, velocity=velocity, acceleration=accelerated)

    def prediction(
        self, nets: Networks, x: Tensor, noise: Tensor, tau: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            v = initial_velocity(nets.velocity, noise, torch.ones_like(tau), self.h, batch.cond)
        x_tau = path_state(x, noise, v, tau)
        said = acceleration(displacement(nets.acceleration, x_tau, time_of(tau, self.h), v, batch.cond), v)
        end = x_tau - align(1 - tau, x) * v + align((1 - tau**2) / 2, x) * said
        return said, acceleration(noise - x, v), end

    def student(self, nets: Networks) -> Student:
        plans = {k: self.plan(k) for k in self.steps}
        return Student(ConstantAcceleration(nets.velocity, nets.acceleration, self.h), plans)

    def plan(self, steps: int) -> Plan:
        """Even steps of tau."""
        tau = torch.arange(steps, dtype=torch.float64) / steps
        return Plan(tuple(time_of(tau, self.h).tolist()), gamma=0.0)


@dataclass(frozen=True)
class ConstantAccelerationFlow(Recipe):
    """The whole recipe: the velocity network, then the acceleration network, both on the same pairs."""

    name: ClassVar[str] = "caf"
    paper: ClassVar[Paper] = _OnPairs.paper
    system: ClassVar[System] = System(
        "Constant Acceleration Flow", 2024, "flow maps", "teacher", "2 and more",
        "paths of constant acceleration from an initial velocity, which the acceleration is told; few-step inversion",
        page="constant-acceleration-flow",
    )  # fmt: skip
    roles: ClassVar[tuple[str, ...]] = _OnPairs.roles

    h: Annotated[Slope, "initial velocity in units of the displacement: 1 straight, above 1 it slows down"] = 1.5
    pairs: Annotated[Count, "pairs of noise and the teacher's output for it, made once before training"] = 4096
    ode_steps: Annotated[Count, "Heun steps of the teacher for each pair"] = 16
    guidance: Annotated[float, "scale of the teacher's classifier-free guidance, 1 for none"] = 1.0
    distance: Annotated[Distance, "how ends of paths are compared; LPIPS in the paper"] = L2
    lr: Annotated[NonNegative, "learning rate"] = 1e-3
    steps: Annotated[tuple[Count, ...], "steps that the student is made for, one plan each; a call more each"] = (
        1,
        2,
        4,
    )

    def stages(self) -> list[Stage]:
        shared = (self.h, self.pairs, self.ode_steps, self.guidance, self.distance, self.lr)
        return [Stage(InitialVelocity(*shared)), Stage(Acceleration(*shared, self.steps))]
