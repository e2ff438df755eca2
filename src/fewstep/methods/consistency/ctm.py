"""CTM: Consistency Trajectory Models (Kim et al. 2023, arXiv 2310.02279).

One network for every jump from ``t`` to a cleaner ``s`` along the probability flow, on the EDM schedule::

    G(x, t, s) = (s / t) x + (1 - s / t) g(x, t, s),      g(x, t, t) = D(x, t)

*Soft consistency* compares two ways to the data, one of which lets the teacher go the first ``h`` steps ``t -> u``::

    x_est = G_target(G(x_t, t, s), s, t_min),     x_aim = G_target(sg G(x_u, u, s), s, t_min),     s <= u < t

``u = s`` asks for all of the teacher's path, ``u`` one step after ``t`` for its first piece only.  *Denoising score
matching* keeps ``g(x, t, t)`` the denoiser; its weight gives both losses gradients of one size.

Read against the official repositories (sony/ctm and Kim-Dongjun/ctm-cifar10, MIT).
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from fewstep import grids
from fewstep.conditions import Cond, repeat
from fewstep.flow_maps import Jump, ddim_move
from fewstep.methods.alarm import Alarm
from fewstep.methods.consistency.cm import follow
from fewstep.methods.method import Batch, Method, Networks, Optimizer, Paper, Progress, Question, System, Update
from fewstep.methods.parts.adversarial_phase import AdversarialPhase
from fewstep.methods.parts.adversary import Adversary, Hinge
from fewstep.methods.parts.balance import Balanced, balance_losses
from fewstep.methods.parts.distances import L2, Distance
from fewstep.methods.parts.distribution_matching import WON_GAME
from fewstep.methods.parts.teacher_steps import edm_like, guided, heun_step
from fewstep.methods.parts.times import EarlyRamp, LogNormal
from fewstep.methods.start import Start
from fewstep.ranges import Count, Least, NonNegative, Positive, Share
from fewstep.sampling.rollout import Student, plans_along
from fewstep.schedules import Schedule, align


@dataclass(frozen=True)
class _ConsistencyTrajectory(Method):
    """What the two ways to go ahead share.

    ``most_steps`` bounds ``h``, the steps between ``t`` and ``u``, drawn once an iteration with a probability in
    proportion to ``h``; ``mu`` is the decay of the target network.  With ``gan_share`` a discriminator of the student's
    estimates and data joins at the end (:class:`~fewstep.methods.parts.adversarial_phase.AdversarialPhase`).
    """

    healthy: ClassVar[dict[str, str]] = {
        "student/consistency": "small from the start, because g starts as the teacher's denoiser, and stays small",
        "student/denoising": "stays near the teacher's own denoising loss; a rise says that g(x, t, t) drifts from it",
    }
    unstable: ClassVar[dict[str, Alarm]] = {"discriminator/discriminator_accuracy": WON_GAME}

    roles: ClassVar[tuple[str, ...]] = ("student",)

    lr: Annotated[NonNegative, "learning rate"] = 4e-4
    grid_times: Annotated[int, Least(2), "times of the grid, N: 18 on CIFAR-10, 40 on ImageNet-64"] = 18
    most_steps: Annotated[Count, "most steps that go ahead of the student, at most N - 1"] = 17
    mu: Annotated[Share, "decay of the target network"] = 0.999
    denoising_weight: Annotated[NonNegative, "size of the denoising gradient over consistency's, 0 for none"] = 1.0
    gan_share: Annotated[Share, "last share of the budget, in which a discriminator joins; 0 for none"] = 0.0
    gan_lr: Annotated[NonNegative, "learning rate of the discriminator"] = 2e-3
    distance: Annotated[Distance, "how two predictions are compared; LPIPS in the paper"] = L2
    sigma_data: Annotated[Positive, "standard deviation of the data, in the weight of the denoising loss"] = 0.5
    steps: Annotated[tuple[Count, ...], "network calls that the student is made for, one plan each"] = (1, 2, 4, 8)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.most_steps >= self.grid_times:
            raise ValueError(
                f"{type(self).__name__}: most_steps={self.most_steps} must be below grid_times={self.grid_times}"
            )

    def networks(self, start: Start) -> Networks:
        schedule = edm_like(start.teacher.schedule)
        model = Jump(start.network("student", extras=("s",), on=schedule), two_times=True)
        return Networks(
            {
                "student": model,
                "target": copy.deepcopy(model),
                "distance": self.distance.network(start.teacher),
                **self.asked(start, schedule),
                **self.phase.modules(start.teacher.on(schedule), start.condition()),
            },
            {"student": Optimizer(("student",), self.lr, kind="radam", decay="linear"), **self.phase.optimizers()},
            ema=("student",),
            moved=("target",),
        )

    @property
    def phase(self) -> AdversarialPhase:
        return AdversarialPhase(self.gan_share, self.gan_lr, Adversary(Hinge()))

    def asked(self, start: Start, schedule: Schedule) -> dict[str, nn.Module]:
        """What the loss asks besides the student, by name."""
        return {}

    @abstractmethod
    def ahead(self, nets: Networks, x: Tensor, times: Tensor, cond: Cond) -> Tensor:
        """``x_u`` from ``x_t`` ``[B, ...]``; ``times`` ``[h + 1, B]`` are the grid's from ``t`` to ``u``."""

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update | Question]:
        schedule, rng, n = nets.student.schedule, batch.rng, batch.n
        phase = self.phase
        grid = grids.karras(schedule, self.grid_times - 1).to(batch.x.device)
        h = 1 + rng.shared_choice(range(1, self.most_steps + 1))
        i = rng.integers(n, 0, len(grid) - h)
        left = len(grid) - i - h  # the times at u and after it
        j = i + h + (rng.uniform(n) * left).long().clamp_max(left - 1)
        t, u, s = grid[i], grid[i + h], grid[j]
        x_t = schedule.add_noise(batch.x, rng.normal_like(batch.x), t)
        if phase.discriminates(progress):
            with torch.no_grad():
                landed = nets.target.to_data(nets.student(x_t, t, s, batch.cond), s, batch.cond)
            yield phase.discriminate(nets, batch.x, landed, batch.cond, rng)
            return
        with torch.no_grad():
            x_u = self.ahead(nets, x_t, grid[i + torch.arange(h + 1, device=i.device)[:, None]], batch.cond)
            aim = nets.target.to_data(nets.student(x_u, u, s, batch.cond), s, batch.cond)

        x, first, last, cond = x_t, t, s, batch.cond
        if self.denoising_weight:
            level = torch.where(
                rng.uniform(n) < 0.5, LogNormal().draw(schedule, n, rng), EarlyRamp().draw(schedule, n, rng)
            )
            noised = schedule.add_noise(batch.x, rng.normal_like(batch.x), level)
            x, first, last = torch.cat([x, noised]), torch.cat([t, level]), torch.cat([s, level])
            cond = repeat(cond, 2)
        g = nets.student.predict(x, first, last, cond)
        landed = ddim_move(x_t, g[:n], t, s, schedule)
        estimate = nets.target.to_data(landed, s, batch.cond)
        consistency = nets.distance(estimate, aim).mean()
        others: dict[str, Balanced] = {}
        if self.denoising_weight:
            variance = self.sigma_data**2
            weight = align((level**2 + variance) / (level**2 * variance), batch.x)
            denoising = (weight * (g[n:] - batch.x).square()).mean()
            others["denoising"] = Balanced(denoising, self.denoising_weight)
        with ExitStack() as stack:
            if phase.joins(progress):
                stack.enter_context(nets.held("discriminator"))
                gan = phase.student_loss(nets, estimate, batch.cond, rng)
                others["gan"] = Balanced(gan, 1.0, phase.least, phase.most)
            logs = {name: other.loss.detach() for name, other in others.items()}
            loss = consistency
            if others:
                loss, weights = yield from balance_losses(consistency, *others.values(), at=g)
                logs |= {f"{name}_weight": weight for name, weight in zip(others, weights, strict=True)}
            logs["consistency"] = consistency.detach()
            yield Update("student", loss, logs, lambda: self.follow(nets))

    def follow(self, nets: Networks) -> None:
        follow(nets.target, nets.student, self.mu)

    def student(self, nets: Networks) -> Student:
        schedule = nets.student.schedule
        return Student(nets.student, plans_along(grids.karras, schedule, self.steps, 0.0))


@dataclass(frozen=True)
class ConsistencyTrajectory(_ConsistencyTrajectory):
    """Distillation: the teacher goes ahead, by Heun steps along the grid."""

    name: ClassVar[str] = "ctm"
    paper: ClassVar[Paper] = Paper(
        "Consistency Trajectory Models: Learning Probability Flow ODE Trajectory of Diffusion", "2310.02279",
        "verified",
        ("`distance` is l2 by default: the weights of LPIPS are not bundled (distance lpips:PATH reads a file of them)",
         "the adversarial term (`gan_share`) is off by default; its discriminator sees features of the frozen teacher "
         "(of classifiers there, DeiT-B and EfficientNet, with augmented pictures)",
         "gradients are balanced at the network's output, over the samples of both losses (at its last weights there)",
         "`decay`: the learning rate falls linearly to 0 over the budget (the paper's is constant)",
         "the weights of the target time start at zero, so that the student starts as the teacher's DDIM (the official "
         "ones start at random)",
         "sampling uses a power-function average (the paper's average has a fixed decay)",
         "the teacher's guidance is baked in, not an input of the network"),
    )  # fmt: skip
    system: ClassVar[System] = System(
        "CTM", 2023, "consistency", "teacher, data", "1 and more",
        "one network for every jump along a trajectory, and its denoiser", page="ctm",
    )  # fmt: skip

    guidance: Annotated[float, "scale of the teacher's classifier-free guidance, 1 for none"] = 1.0

    def asked(self, start: Start, schedule: Schedule) -> dict[str, nn.Module]:
        return {"teacher": guided(start.teacher.on(schedule), self.guidance)}

    def ahead(self, nets: Networks, x: Tensor, times: Tensor, cond: Cond) -> Tensor:
        for k in range(len(times) - 1):
            x = heun_step(nets.teacher, x, times[k], times[k + 1], cond)
        return x


@dataclass(frozen=True)
class SelfConsistencyTrajectory(_ConsistencyTrajectory):
    """Training without a teacher: the target network itself goes ahead, in one jump."""

    name: ClassVar[str] = "ctm-training"
    paper: ClassVar[Paper] = replace(
        ConsistencyTrajectory.paper,
        deviations=(
            *ConsistencyTrajectory.paper.deviations[:-1],
            "starts from the weights that it is given (fewstep train gives fresh ones)",
        ),
    )

    def ahead(self, nets: Networks, x: Tensor, times: Tensor, cond: Cond) -> Tensor:
        moved: Tensor = nets.target(x, times[0], times[-1], cond)
        return moved
