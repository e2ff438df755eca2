"""Rectified Flow and InstaFlow (Liu et al. 2022, arXiv 2209.03003; Liu et al. 2023, arXiv 2309.06380).

*Reflow* pairs noise ``z`` with the teacher's own output ``x = ODE(z)`` and learns the velocity of the straight line
between them, which straightens the paths::

    E || v(x_t, t) - (z - x) ||^2,     x_t = (1 - t) x + t z

*Distillation* then regresses the one-step (or k-step) student on pairs made by the reflowed model.  InstaFlow is the
same with a condition kept beside each pair.  Time runs from noise (t = 1) to data here, the papers' from data's side:
their velocity is the negative of this one.

Read against gnobitab/RectifiedFlow; InstaFlow's training code is not public, its stages are from the paper.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from fewstep.data.dataset import Samples
from fewstep.denoisers import Denoiser
from fewstep.flow_maps import Jump
from fewstep.methods.method import Batch, Method, Networks, Optimizer, Paper, Progress, Recipe, Stage, System, Update
from fewstep.methods.parts.distances import L2, Distance
from fewstep.methods.parts.stores import teacher_pairs
from fewstep.methods.start import Start
from fewstep.ranges import Count, Least, NonNegative
from fewstep.sampling.rollout import Plan, Student
from fewstep.schedules import FlowMatching, align

#: The straight paths' schedule; velocities divide by t, so t stops short of 0 (the official code's 1e-3).
STRAIGHT = FlowMatching(t_min=1e-3)


def straight_pair(x: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """``x_t = (1 - t) x + t z``."""
    return STRAIGHT.add_noise(x, z, t)


@dataclass(frozen=True)
class Reflow(Method):
    """One reflow: pairs from the teacher's ODE, then velocity matching on their straight lines.

    ``pairs`` noise-data pairs are made once with ``ode_steps`` Heun steps under ``guidance`` (1M and RK45 in the
    paper), which the reflowed model then needs no longer.
    """

    name: ClassVar[str] = "reflow"
    paper: ClassVar[Paper] = Paper(
        "Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow", "2209.03003", "verified",
        ("fewer `pairs` (a million there), by Heun steps on a Karras grid instead of adaptive RK45",
         "short runs: `lr` of 3e-4 (2e-4 there), `warmup` of 20 steps (5000 there), `decay` to 0 over the budget (the "
         "paper's rate is constant)",
         "the next flow starts from averaged weights (the official code's from the raw ones)"),
    )  # fmt: skip
    system: ClassVar[System] = System(
        "Rectified Flow", 2022, "flow maps", "data or teacher", "1 and more",
        "straightens a flow by training it on its own noise-data pairs", page="rectified-flow",
    )  # fmt: skip
    healthy: ClassVar[dict[str, str]] = {
        "model/loss": "falls below the first flow's: the pairs leave less to average over",
    }

    pairs: Annotated[Count, "pairs of noise and the teacher's output for it, made once before training"] = 4096
    ode_steps: Annotated[Count, "Heun steps of the teacher for each pair"] = 16
    guidance: Annotated[float, "scale of the teacher's classifier-free guidance, 1 for none"] = 1.0
    lr: Annotated[NonNegative, "learning rate"] = 3e-4

    def sources(self, start: Start) -> Mapping[str, Samples]:
        return teacher_pairs(start, self.pairs, self.ode_steps, self.guidance)

    def networks(self, start: Start) -> Networks:
        optimizer = Optimizer(("model",), self.lr, clip=1.0, decay="cosine", warmup=20)
        return Networks({"model": start.network("teacher", on=STRAIGHT)}, {"model": optimizer}, ema=("model",))

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        x, z = batch.x, batch.column("noise")
        t = batch.rng.uniform(len(x), low=STRAIGHT.t_min, high=1.0)
        velocity = nets.model.velocity(straight_pair(x, z, t), t, batch.cond)
        yield Update("model", torch.nn.functional.mse_loss(velocity, z - x))

    def student(self, nets: Networks) -> Denoiser:
        return nets.model

    def hands_on(self, nets: Networks) -> Mapping[str, nn.Module]:
        return {"teacher": nets.model}


@dataclass(frozen=True)
class ReflowDistillation(Method):
    """Distil a (reflowed) flow into ``steps`` calls on pairs of its own making.

    At ``steps = 1`` the loss is ``d(z - v(z, 1), x)``; with more, the same at the ``steps`` times of a uniform grid on
    the straight line.  The paper's k-step distillation regresses the velocity, always with squared error: since
    ``out - x = t (z - x - v)``, that is this loss with l2 and the weight ``1 / t^2``.
    """

    name: ClassVar[str] = "reflow-distil"
    paper: ClassVar[Paper] = Paper(
        "InstaFlow: One Step is Enough for High-Quality Diffusion-Based Text-to-Image Generation", "2309.06380",
        "from paper text",
        ("no public training code",
         "the first pairs are made without `guidance` unless it is asked for (6 on Stable Diffusion there), and so are "
         "a reflowed model's (`reflow_guidance`, 1.5 there)",
         "fewer `pairs` (1.6 million there), by `ode_steps` of 16 Heun steps (there 25 of DPM-Solver)",
         "`distance` is l2 by default: the weights of LPIPS are not bundled (distance lpips:PATH reads a file of them)",
         "with several steps the loss compares data: with l2, t^2 times the paper's regression of the velocity",
         "each stage starts from averaged weights (the official code's from the raw ones)",
         "one distance in all of a stage, not l2 first and LPIPS after; no stacked U-Nets; no pairs made as it trains"),
    )  # fmt: skip
    healthy: ClassVar[dict[str, str]] = {
        "student/loss": "falls steadily; where it stops is the curvature that reflow left",
    }

    roles: ClassVar[tuple[str, ...]] = ("student",)

    steps: Annotated[Count, "network calls that the student is made for"] = 1
    pairs: Annotated[Count, "pairs of noise and the teacher's output for it, made once before training"] = 4096
    ode_steps: Annotated[Count, "Heun steps of the teacher for each pair"] = 16
    guidance: Annotated[float, "scale of the teacher's classifier-free guidance, 1 for none"] = 1.0
    distance: Annotated[Distance, "how two predictions are compared; LPIPS in the paper"] = L2
    lr: Annotated[NonNegative, "learning rate"] = 3e-4

    def sources(self, start: Start) -> Mapping[str, Samples]:
        return teacher_pairs(start, self.pairs, self.ode_steps, self.guidance)

    def networks(self, start: Start) -> Networks:
        student = Jump(start.network("student", on=STRAIGHT))
        optimizer = Optimizer(("student",), self.lr, clip=1.0, decay="cosine", warmup=20)
        distance = self.distance.network(start.teacher)
        return Networks({"student": student, "distance": distance}, {"student": optimizer}, ema=("student",))

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        t = 1 - batch.rng.integers(len(batch.x), 0, self.steps).double() / self.steps
        x_t = straight_pair(batch.x, batch.column("noise"), t)
        out = x_t - align(t, x_t) * nets.student.denoiser.velocity(x_t, t, batch.cond)
        yield Update("student", nets.distance(out, batch.x).mean())

    def student(self, nets: Networks) -> Student:
        times = tuple(1 - i / self.steps for i in range(self.steps))
        return Student(nets.student, {self.steps: Plan(times, gamma=0.0)})


@dataclass(frozen=True)
class InstaFlow(Recipe):
    """The whole recipe: ``reflows`` reflow stages, then distillation, each on pairs of what the last one made;
    ``guidance`` is baked into the first pairs, ``reflow_guidance`` into those that a reflowed model makes (1.5 in the
    paper's second stage)."""

    name: ClassVar[str] = "instaflow"
    paper: ClassVar[Paper] = ReflowDistillation.paper
    system: ClassVar[System] = System(
        "InstaFlow", 2023, "flow maps", "conditional teacher", "1",
        "conditional reflow, then distillation on the reflowed model's pairs", page="rectified-flow",
    )  # fmt: skip
    roles: ClassVar[tuple[str, ...]] = ("student",)

    reflows: Annotated[int, Least(0), "reflow stages before the distillation"] = 1
    steps: Annotated[Count, "network calls that the student is made for"] = 1
    pairs: Annotated[Count, "pairs of noise and the teacher's output for it, made once before training"] = 4096
    ode_steps: Annotated[Count, "Heun steps of the teacher for each pair"] = 16
    guidance: Annotated[float, "scale of the teacher's classifier-free guidance, 1 for none"] = 1.0
    distance: Annotated[Distance, "how two predictions are compared; LPIPS in the paper"] = L2
    lr: Annotated[NonNegative, "learning rate"] = 3e-4
    reflow_guidance: Annotated[float, "guidance under which a reflowed model makes pairs, 1 for none"] = 1.0

    def stages(self) -> list[Stage]:
        first: list[Method] = [
            Reflow(self.pairs, self.ode_steps, self.reflow_guidance if i else self.guidance, self.lr)
            for i in range(self.reflows)
        ]
        guidance = self.reflow_guidance if first else self.guidance
        last = ReflowDistillation(self.steps, self.pairs, self.ode_steps, guidance, self.distance, self.lr)
        return [Stage(method) for method in (*first, last)]
