"""SlimFlow (Zhu et al. 2024, arXiv 2407.12718): a one-step student in a network smaller than the teacher's.

A smaller network cannot start from the teacher's weights, and reflow from fresh ones is hard.  *Annealing reflow*
begins with independent noise, an easy task, and ends with the pairs ``(z, x)`` of the big teacher::

    E || v(x_t, t) - (z_b - x) ||^2,     z_b = sqrt(1 - b^2) z + b z',     z' fresh,   b from 1 to 0

``z_b`` is standard normal for every ``b``; b = 1 is flow matching on the teacher's samples, b = 0 is reflow.
*Flow-guided distillation* then makes one step of the small flow, with its own frozen average ``v_phi`` as a second
teacher, for noise that no pair was made for::

    E d( z - v'(z, 1), x )  +  E d( z - v'(z, 1), sg[ x_t - t v_phi(x_t, t) ] ),     x_t = z - (1 - t) v'(z, 1)

Read against yuanzhi-zhu/SlimFlow.  Time runs from noise (t = 1) to data here and velocities point to the noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from fewstep.conditions import Cond, to
from fewstep.data.dataset import Samples
from fewstep.denoisers import Denoiser
from fewstep.flow_maps import Jump
from fewstep.methods.flow_maps.rectified_flow import STRAIGHT, straight_pair
from fewstep.methods.method import Batch, Method, Networks, Optimizer, Paper, Progress, Recipe, Stage, System, Update
from fewstep.methods.parts.distances import L2, Distance
from fewstep.methods.parts.ramp import Ramp
from fewstep.methods.parts.stores import teacher_pairs
from fewstep.methods.parts.teacher_steps import guided
from fewstep.methods.start import Start
from fewstep.randomness import Rng
from fewstep.ranges import Count, NonNegative, Within
from fewstep.sampling.inputs import evaluating
from fewstep.sampling.rollout import Plan, Student
from fewstep.schedules import align

#: Noise is annealed over 300k of the 800k iterations.
ANNEALED = Ramp(1.0, 0.0, 0.375)
#: Samples and shares of the noise at which a teacher is asked whether it is equivariant, and what it may be off by.
PROBES, LEVELS, OFF = 16, (0.3, 0.6, 0.9), 0.1


def anneal_noise(z: Tensor, fresh: Tensor, b: float) -> Tensor:
    """``z_b = sqrt(1 - b^2) z + b z'``: standard normal, with correlation ``sqrt(1 - b^2)`` to ``z``."""
    return (1 - b**2) ** 0.5 * z + b * fresh


def flip_pairs(x: Tensor, z: Tensor, rng: Rng) -> tuple[Tensor, Tensor]:
    """Half of the pairs, left and right exchanged in both."""
    coin = align(rng.uniform(len(x)) < 0.5, x) > 0
    return torch.where(coin, x.flip(-1), x), torch.where(coin, z.flip(-1), z)


@torch.no_grad()
def check_flips(teacher: Denoiser, cond: Cond, seed: int = 0) -> None:
    """ValueError unless a teacher makes of a flipped state the flipped data, to a tenth of their size: only then is a
    flipped pair a pair of its own."""
    if len(teacher.shape) != 3:
        raise ValueError(
            f"flip: samples {list(teacher.shape)} are no pictures [C, H, W], which have a left and a right"
        )
    held = next(teacher.parameters(), torch.zeros(()))
    rng = Rng(seed, "flips", device=held.device)
    view, n = teacher.on(STRAIGHT), PROBES
    with evaluating(view):
        noise = rng.normal(n, *teacher.shape).to(held.dtype)
        cond = to(cond, held.device)
        data = view(noise, 1.0, cond)
        for t in LEVELS:
            time = torch.full((n,), t, dtype=torch.float64, device=held.device)
            state = straight_pair(data, noise, time)
            x = view(state, time, cond)
            gap = (view(state.flip(-1), time, cond).flip(-1) - x).square().mean().sqrt() / x.square().mean().sqrt()
            if not float(gap) <= OFF:
                raise ValueError(
                    f"flip: of flipped states the teacher makes other data, {float(gap):.0%} apart at t = {t:g}: its "
                    "pairs cannot be flipped"
                )


def slim_pairs(start: Start, pairs: int, ode_steps: int, guidance: float, flip: bool) -> Mapping[str, Samples]:
    """The pairs of the big teacher, once it is known that they can be flipped where that is asked for."""
    if flip:
        cond = start.data.conditions(torch.arange(PROBES) % len(start.data))
        check_flips(guided(start.model("teacher"), guidance), cond)
    return teacher_pairs(start, pairs, ode_steps, guidance)


@dataclass(frozen=True)
class AnnealingReflow(Method):
    """The first stage: a small flow from fresh weights (or given ones), from independent noise to the teacher's own.

    ``beta`` is b over the budget: linear, ``cosine:`` or ``exponential:`` (:class:`~fewstep.methods.parts.ramp.Ramp`).
    """

    name: ClassVar[str] = "annealing-reflow"
    paper: ClassVar[Paper] = Paper(
        "SlimFlow: Training Smaller One-Step Diffusion Models with Rectified Flow", "2407.12718", "verified",
        ("the small network is given (`--student`), of any architecture: the paper's sizes of NCSN++ and ADM are not "
         "here, and without one the student is a copy of the teacher",
         "`flip` is off by default, and refused for a teacher that is not equivariant; the coin is tossed for every "
         "pair (there for every batch)",
         "`distance` is l2 by default: the weights of LPIPS are not bundled (distance lpips:PATH reads a file of them)",
         "fewer `pairs` (50k for every seed there), by 16 Heun steps",
         "short runs: `lr` of 1e-3 (2e-4 there), `warmup` of 20 steps in both stages (5000 in the first there), "
         "`decay` to 0 over the budget (none there)",
         "times from 0.001 to 1; the one step is called at t = 1 (there at 0.999)",
         "no dropout that the network does not bring (0.15 there)"),
    )  # fmt: skip
    healthy: ClassVar[dict[str, str]] = {
        "model/loss": "starts at the loss of a flow on independent noise and falls as beta does: at 0 the pairs leave "
        "nothing to average over",
        "model/beta": "falls to 0 where `--beta` says",
    }

    roles: ClassVar[tuple[str, ...]] = ("student",)

    beta: Annotated[Ramp, Within(0, 1), "share of fresh noise in the pairs' over the budget; 0 is reflow"] = ANNEALED
    flip: Annotated[bool, "flip half of the pairs left to right, for a teacher that is equivariant"] = False
    pairs: Annotated[Count, "pairs of noise and the teacher's output for it, made once before training"] = 4096
    ode_steps: Annotated[Count, "Heun steps of the teacher for each pair"] = 16
    guidance: Annotated[float, "scale of the teacher's classifier-free guidance, 1 for none"] = 1.0
    lr: Annotated[NonNegative, "learning rate"] = 1e-3

    def sources(self, start: Start) -> Mapping[str, Samples]:
        return slim_pairs(start, self.pairs, self.ode_steps, self.guidance, self.flip)

    def networks(self, start: Start) -> Networks:
        optimizer = Optimizer(("model",), self.lr, clip=1.0, decay="cosine", warmup=20, nonfinite="zero")
        return Networks({"model": start.network("student", on=STRAIGHT)}, {"model": optimizer}, ema=("model",))

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        x, z, b = batch.x, batch.column("noise"), self.beta.at(progress.fraction)
        t = batch.rng.uniform(len(x), low=STRAIGHT.t_min, high=1.0)
        if self.flip:
            x, z = flip_pairs(x, z, batch.rng.stream("flips"))
        z = anneal_noise(z, batch.rng.stream("annealing").normal_like(z), b)
        velocity = nets.model.velocity(straight_pair(x, z, t), t, batch.cond)
        yield Update("model", torch.nn.functional.mse_loss(velocity, z - x), {"beta": b})

    def student(self, nets: Networks) -> Denoiser:
        return nets.model


@dataclass(frozen=True)
class FlowGuidedDistillation(Method):
    """The second stage: one step of the small flow, by pairs of the big teacher and by two steps on fresh noise."""

    name: ClassVar[str] = "flow-guided-distillation"
    paper: ClassVar[Paper] = AnnealingReflow.paper
    healthy: ClassVar[dict[str, str]] = {
        "student/pairs": "falls steadily; where it stops is what the small network cannot say",
        "student/two_steps": "small from the start where the flow is straight, and falls",
    }

    roles: ClassVar[tuple[str, ...]] = ("student",)

    first_half: Annotated[Literal["student", "teacher"], "whose first half step the two steps begin with"] = "student"
    two_steps: Annotated[NonNegative, "weight of the two-step term"] = 1.0
    flip: Annotated[bool, "flip half of the pairs left to right, for a teacher that is equivariant"] = False
    pairs: Annotated[Count, "pairs of noise and the teacher's output for it, made once before training"] = 4096
    ode_steps: Annotated[Count, "Heun steps of the teacher for each pair"] = 16
    guidance: Annotated[float, "scale of the teacher's classifier-free guidance, 1 for none"] = 1.0
    distance: Annotated[Distance, "how two predictions are compared; LPIPS in the paper"] = L2
    lr: Annotated[NonNegative, "learning rate"] = 1e-3

    def sources(self, start: Start) -> Mapping[str, Samples]:
        return slim_pairs(start, self.pairs, self.ode_steps, self.guidance, self.flip)

    def networks(self, start: Start) -> Networks:
        student = Jump(start.network("student", on=STRAIGHT))
        optimizer = Optimizer(("student",), self.lr, clip=1.0, decay="cosine", warmup=20, nonfinite="zero")
        frozen = start.model("student").on(STRAIGHT)
        modules = {"student": student, "flow": frozen, "distance": self.distance.network(start.teacher)}
        return Networks(modules, {"student": optimizer}, ema=("student",))

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        x, z = batch.x, batch.column("noise")
        if self.flip:
            x, z = flip_pairs(x, z, batch.rng.stream("flips"))
        model = nets.student.denoiser
        ahead = nets.distance(z - model.velocity(z, torch.ones(len(z), dtype=torch.float64), batch.cond), x).mean()
        two = self.two_step_loss(nets, batch.rng.normal_like(z), batch.rng, batch.cond)
        logs = {"pairs": ahead.detach(), "two_steps": two.detach()}
        yield Update("student", ahead + self.two_steps * two, logs)

    def two_step_loss(self, nets: Networks, z: Tensor, rng: Rng, cond: Cond = None) -> Tensor:
        """The student's one step from fresh noise against a first part of it and a second one by the small flow."""
        start = torch.ones(len(z), dtype=torch.float64)
        v = nets.student.denoiser.velocity(z, start, cond)
        t = rng.uniform(len(z), low=0.2, high=0.8)
        with torch.no_grad():
            first = v.detach() if self.first_half == "student" else nets.flow.velocity(z, start, cond)
            x_t = z - align(1 - t, z) * first
            target = x_t - align(t, z) * nets.flow.velocity(x_t, t, cond)
        return nets.distance(z - v, target).mean()

    def student(self, nets: Networks) -> Student:
        return Student(nets.student, {1: Plan((1.0,), gamma=0.0)})


@dataclass(frozen=True)
class SlimFlow(Recipe):
    """The whole recipe: two thirds of the budget for annealing reflow, the rest for flow-guided distillation."""

    name: ClassVar[str] = "slim-flow"
    paper: ClassVar[Paper] = AnnealingReflow.paper
    system: ClassVar[System] = System(
        "SlimFlow", 2024, "flow maps", "teacher, a smaller network", "1",
        "annealing reflow and flow-guided distillation into a one-step student that is smaller than its teacher",
    )  # fmt: skip
    roles: ClassVar[tuple[str, ...]] = ("student",)

    beta: Annotated[Ramp, Within(0, 1), "share of fresh noise in the pairs' over the budget; 0 is reflow"] = ANNEALED
    first_half: Annotated[Literal["student", "teacher"], "whose first half step the two steps begin with"] = "student"
    two_steps: Annotated[NonNegative, "weight of the two-step term"] = 1.0
    flip: Annotated[bool, "flip half of the pairs left to right, for a teacher that is equivariant"] = False
    pairs: Annotated[Count, "pairs of noise and the teacher's output for it, made once before training"] = 4096
    ode_steps: Annotated[Count, "Heun steps of the teacher for each pair"] = 16
    guidance: Annotated[float, "scale of the teacher's classifier-free guidance, 1 for none"] = 1.0
    distance: Annotated[Distance, "how two predictions are compared; LPIPS in the paper"] = L2
    lr: Annotated[NonNegative, "learning rate"] = 1e-3

    def stages(self) -> list[Stage]:
        shared = (self.flip, self.pairs, self.ode_steps, self.guidance)
        last = FlowGuidedDistillation(self.first_half, self.two_steps, *shared, self.distance, self.lr)
        return [Stage(AnnealingReflow(self.beta, *shared, self.lr), 2.0), Stage(last, 1.0)]
