"""Constant Acceleration Flow (Park et al. 2024, arXiv 2411.00322): a velocity at the noise, and one acceleration.

On pairs of noise ``n`` and the teacher's output ``x`` two networks are trained one after the other; the path that they
speak of is that of :mod:`fewstep.constant_acceleration`, with ``tau`` from 0 at the noise to 1 at the data::

    velocity        E d( v(x_tau, tau), h (n - x) )                 x_tau built with v = h (n - x)
    acceleration    E d( a(x_tau, tau, v^), 2 (v^ - (n - x)) )      x_tau built with v^ = sg v(n, 0)

The second network is told ``v^`` (*initial velocity conditioning*): it knows on which of two crossing paths it is.
``d`` is a pseudo-Huber distance and a perceptual one of the end of the path that a prediction implies.  A third stage,
where it is asked for, adds what a discriminator says of one-step samples beside real data to the second one's loss.
Velocities point to the noise, as everywhere here; the paper's are the negative.

Read against mlvlab/CAF.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from fewstep.conditions import Cond, repeat
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
from fewstep.methods.alarm import Alarm
from fewstep.methods.flow_maps.rectified_flow import STRAIGHT
from fewstep.methods.method import (
    Batch,
    Method,
    Networks,
    Optimizer,
    Paper,
    Progress,
    Question,
    Recipe,
    Stage,
    System,
    Update,
)
from fewstep.methods.parts.adversarial_phase import AdversarialPhase
from fewstep.methods.parts.adversary import Adversary, Hinge
from fewstep.methods.parts.balance import Balanced, balance_losses
from fewstep.methods.parts.distances import L2, Distance, pseudo_huber
from fewstep.methods.parts.distribution_matching import WON_GAME
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
        ("the adversarial last stage, which the paper's best figures have (1.48 against 4.81 on CIFAR-10), is off by "
         "default (`gan_share`); its discriminator sees features of the teacher (of classifiers there)",
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
        distance = self.distance.network(start.teacher)
        return Networks({**modules, "distance": distance}, {trained: optimizer}, ema=(trained,))

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update | Question]:
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

    def hands_on(self, nets: Networks) -> Mapping[str, nn.Module]:
        return {**super().hands_on(nets), "velocity": nets.velocity, "acceleration": nets.acceleration}

    def student(self, nets: Networks) -> Student:
        plans = {k: self.plan(k) for k in self.steps}
        return Student(ConstantAcceleration(nets.velocity, nets.acceleration, self.h), plans)

    def plan(self, steps: int) -> Plan:
        """Even steps of tau."""
        tau = torch.arange(steps, dtype=torch.float64) / steps
        return Plan(tuple(time_of(tau, self.h).tolist()), gamma=0.0)


@dataclass(frozen=True)
class AdversarialAcceleration(Acceleration):
    """The third stage: the second network goes on, with a discriminator of its one-step samples and real data beside
    it; iterations of the two take turns."""

    name: ClassVar[str] = "caf-adversarial"
    healthy: ClassVar[dict[str, str]] = {
        "acceleration/huber": "rises a little: samples may leave their pairs for what real data look like",
        "discriminator/discriminator_accuracy": "between 0.5 and 0.8; near 1 it has won and teaches nothing: lower "
        "gan_lr",
    }
    unstable: ClassVar[dict[str, Alarm]] = {"discriminator/discriminator_accuracy": WON_GAME}

    gan_lr: Annotated[NonNegative, "learning rate of the discriminator"] = 1e-3

    @property
    def phase(self) -> AdversarialPhase:
        return AdversarialPhase(1.0, self.gan_lr, Adversary(Hinge()))

    def sources(self, start: Start) -> Mapping[str, Samples]:
        return {**super().sources(start), "real": start.data}

    def networks(self, start: Start) -> Networks:
        trained = start.network("acceleration", on=STRAIGHT)
        body = self.phase.modules(start.teacher.native(), start.condition())
        nets = self.owned(
            "acceleration", start, velocity=start.model("velocity").on(STRAIGHT), acceleration=trained, **body
        )
        return Networks(dict(nets.named_children()), {**nets.groups, **self.phase.optimizers()}, nets.ema)

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update | Question]:
        rng, n, noise = batch.rng, batch.n, batch.column("noise")
        with torch.no_grad():
            v = initial_velocity(nets.velocity, noise, torch.ones(n).double().to(noise.device), self.h, batch.cond)
        if self.phase.discriminates(progress):
            with torch.no_grad():
                fake = noise - self.displaced(nets, noise, torch.zeros(n).double(), v, batch.cond)
            real = batch.of["real"]
            yield self.phase.discriminate(nets, real.x, fake, batch.cond, rng, real.cond)
            return
        tau = rng.integers(n, 0, GRID + 1).double() / GRID
        # the path's state, and the noise, in one call
        states = torch.cat([path_state(batch.x, noise, v, tau), noise])
        moved = self.displaced(
            nets, states, torch.cat([tau, torch.zeros_like(tau)]), torch.cat([v, v]), repeat(batch.cond, 2)
        )
        said = acceleration(moved[:n], v)
        end = states[:n] - align(1 - tau, v) * v + align((1 - tau**2) / 2, v) * said
        near = huber(said, acceleration(noise - batch.x, v)).mean() + nets.distance(end, batch.x).mean()
        with nets.held("discriminator"):
            gan = self.phase.student_loss(nets, noise - moved[n:], batch.cond, rng)
            joined = Balanced(gan, 1.0, self.phase.least, self.phase.most)
            loss, (weight,) = yield from balance_losses(near, joined, at=moved)
            logs = {"huber": near.detach(), "gan": gan.detach(), "gan_weight": weight}
            yield Update("acceleration", loss, logs)

    def displaced(self, nets: Networks, x: Tensor, tau: Tensor, v: Tensor, cond: Cond) -> Tensor:
        """``n - x`` as the network says it at ``tau``."""
        return displacement(nets.acceleration, x, time_of(tau.to(x.device), self.h), v, cond)


@dataclass(frozen=True)
class ConstantAccelerationFlow(Recipe):
    """The whole recipe: the velocity network, then the acceleration network, both on the same pairs, and, where
    ``gan_share`` gives it a part of the budget beside theirs of 1 each, the adversarial stage."""

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
    gan_share: Annotated[NonNegative, "budget of the adversarial stage beside 1 of each other one; 0 for none"] = 0.0
    gan_lr: Annotated[NonNegative, "learning rate of the discriminator"] = 1e-3

    def stages(self) -> list[Stage]:
        shared = (self.h, self.pairs, self.ode_steps, self.guidance, self.distance, self.lr)
        made = [Stage(InitialVelocity(*shared)), Stage(Acceleration(*shared, self.steps))]
        return [*made, Stage(AdversarialAcceleration(*shared, self.steps, self.gan_lr), self.gan_share)]
