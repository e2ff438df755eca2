"""FreeFlow (2025, arXiv 2511.19428): a flow map from the prior alone, by the path that it predicts itself.

Data that were noised are not the states that a guided or tuned teacher visits; only pure noise is.  So the student
starts there, ``f(z, d) = z + d F(z, d)`` with the duration ``d = 1 - s``, and its own path must follow the teacher's
velocity (towards the data here)::

    v_G = d f / dd = F + d dF/dd,      loss = || F - sg( F - w_k (v_G - u(f(z, d), 1 - d)) ) ||^2
    w_k = 1 / ( ||v_G - u||^2 / dim + eps )^k

the Lagrangian identity (:func:`~fewstep.methods.parts.identities.lagrangian`) at ``t = 1``, whose sign of velocities is
that from data to noise.  With ``difference`` the derivative is a finite difference of the path, ``v_G = (f(z, d) -
f(z, d - difference)) / difference``, against ``u`` at its earlier end: the target of that step is BOOT's.

A share of the batch *corrects* what goes wrong along the path: the velocity ``u_fake`` of the student's own samples
``x = f(z, 1)``, noised to ``r``, is learned all the time by a second network, and samples move until it is the
teacher's::

    gradient   d F(z, 1) / d theta . sg( u_fake(x_r, r) - u(x_r, r) ),      scaled to the prediction's size

which is the matching vector of score distillation, written with velocities.  No training code was released; equations
are the project page's.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from fewstep.conditions import Cond
from fewstep.conditions import rows as take
from fewstep.denoisers import Denoiser
from fewstep.flow_maps import FlowMap
from fewstep.methods.alarm import Alarm, Grows
from fewstep.methods.method import Batch, Mean, Networks, Optimizer, Paper, Progress, Question, System, Update
from fewstep.methods.parts.adversary import EVERYWHERE
from fewstep.methods.parts.distribution_matching import RUNAWAY_CRITIC
from fewstep.methods.parts.from_noise import FromNoise, seen_from_noise
from fewstep.methods.parts.identities import (
    Direction,
    adaptive_weight,
    composed,
    lagrangian,
    regression,
    sizes,
)
from fewstep.methods.parts.score_matching import denoising_loss
from fewstep.methods.parts.times import chosen_rows
from fewstep.methods.start import Start
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
        ("no training code was released: equations from the project page, shares and weights from a note on the paper",
         "the law of the duration, the learning rates and how often the second network moves are not published "
         "where we could read them",
         "the correction is scaled to the size of the prediction's weighted direction, so that their gradients have "
         "one size",
         "a teacher on another schedule is seen on flow matching; beyond its last trained level that level stands in"),
    )  # fmt: skip
    system: ClassVar[System] = System(
        "FreeFlow", 2025, "flow maps", "teacher", "1",
        "a flow map from noise alone, by the path that the student predicts itself, and corrected by its samples",
    )  # fmt: skip
    healthy: ClassVar[dict[str, str]] = {
        "student/velocity_gap": "the size of v_G - u, falls over the run",
        "student/loss": "with k = 1 it stays near 1 by construction: it says nothing about quality",
        "student/correction_gap": "the size of u_fake - u: rises as the critic turns to the samples, then falls",
        "critic/denoising": "stays level: its target moves with the student, a fall is not the goal",
    }
    unstable: ClassVar[dict[str, Alarm]] = {
        "critic/denoising": RUNAWAY_CRITIC,
        "student/velocity_gap": Grows(
            "the correction runs ahead of the network that learns its velocity: lower alpha", 5.0
        ),
    }

    schedule: ClassVar[Schedule] = FlowMatching()

    k: Annotated[NonNegative, "power of the weight 1 / (||v_G - u||^2 / dim + eps)^k"] = 1.0
    eps: Annotated[Positive, "constant of that weight"] = 0.1
    power: Annotated[
        Share, "the law of the duration has a density like d^power; above 1 training would not be stable"
    ] = 0.5
    difference: Annotated[Share, "step of the finite difference that gives v_G; 0 for the exact derivative"] = 0.1
    correction: Annotated[Share, "share of the batch that corrects by the velocity of the samples; 0 for none"] = 0.25
    alpha: Annotated[NonNegative, "size of the correction's gradient over the prediction's"] = 0.1
    noise_mean: Annotated[float, "mean of logit r, the noise level at which samples are corrected"] = 0.8
    noise_std: Annotated[NonNegative, "standard deviation of logit r"] = 1.0
    critic_lr: Annotated[NonNegative, "learning rate of the network that learns the samples' velocity"] = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.difference == 1:
            raise ValueError("difference=1 must be below 1, the whole of the path")

    def networks(self, start: Start) -> Networks:
        nets = super().networks(start)
        if not self.correction:
            return nets
        critic = seen_from_noise(start.network("critic"), self.schedule)
        groups = {**nets.groups, "critic": Optimizer(("critic",), self.critic_lr, warmup=10)}
        return Networks({**dict(nets.named_children()), "critic": critic}, groups, nets.ema)

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Generator[Update | Question, Tensor, None]:
        z, rng, n = batch.normal(), batch.rng, batch.n
        extras = self.weights(batch, z)
        s = 1 - rng.uniform(n) ** (1 / (1 + self.power))
        if not self.correction:
            losses, g = self.prediction(nets, z, s, batch.cond, extras)
            yield Update("student", losses.mean(), {"velocity_gap": typical(g)})
            return
        # drawn for all rows, of which each kind takes its own
        schedule, further = nets.student.schedule, rng.stream("correction")
        chosen = chosen_rows(n, self.correction, further)
        r = torch.sigmoid(self.noise_mean + self.noise_std * further.normal(n, dtype=torch.float64))
        t, noise, eps = EVERYWHERE.draw(schedule, n, further), further.normal_like(z), further.normal_like(z)
        p, counts_p = picked(~chosen)
        c, counts_c = picked(chosen)
        told_p, told_c = ({name: w[rows] for name, w in extras.items()} for rows in (p, c))
        # means over the whole batch, in which each kind has its share of the rows
        counts_p, counts_c = counts_p.to(z) / ((1 - self.correction) * n), counts_c.to(z) / (self.correction * n)
        losses, g = self.prediction(nets, z[p], s[p], take(batch.cond, p), told_p)
        cond = take(batch.cond, c)
        f, x = one_jump(nets.student, z[c], cond, told_c)
        gap = velocity_gap(nets.critic, self.target(nets, told_c), x, noise[c], r[c], cond)
        weighted = sizes(align(self.weight(g), g) * g)
        own, other = yield Mean(torch.stack([(counts_p * weighted).sum(), (counts_c * sizes(gap)).sum()]))
        scale = self.alpha * own / (other + 1e-8)
        corrections = regression(f, Direction(f.detach(), scale * gap))
        logs = {"velocity_gap": typical(g), "correction_gap": typical(gap), "correction_scale": scale}
        yield Update("student", (counts_p * losses).sum() + (counts_c * corrections).sum(), logs)
        denoising = counts_c.sum() * denoising_loss(nets.critic, x.detach(), t[c], cond, further, eps[c])
        yield Update("critic", denoising, {"denoising": denoising.detach()})

    def prediction(
        self, nets: Networks, z: Tensor, s: Tensor, cond: Cond, extras: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """The losses ``[B]`` of the paths from ``z`` at ``s``, and ``v_G - u``."""
        teacher, one = self.target(nets, extras), torch.ones_like(s)
        if self.difference:
            s = s * (1 - self.difference)
            direction = followed(nets.student, z, s, teacher, cond, step=self.difference, **extras)
        else:
            direction = lagrangian(nets.student, z, one, s, teacher, cond, **extras)
        f = nets.student.mean_velocity(z, one, s, cond, **extras)
        return regression(f, direction, weight=self.weight(direction.g)), direction.g

    def weight(self, g: Tensor) -> Tensor:
        """``1 / (||g||^2 / dim + eps)^k``, ``[B]``."""
        dim = g[0].numel()
        return adaptive_weight(g, self.k, self.eps * dim) * dim**self.k


def one_jump(student: FlowMap, z: Tensor, cond: Cond, extras: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """``F(z, 1)`` and the sample ``f(z, 1)``."""
    one = torch.ones(len(z), dtype=torch.float64, device=z.device)
    f = student.mean_velocity(z, one, 0 * one, cond, **extras)
    return f, student.schedule.move(z, f, one, 0 * one)


@torch.no_grad()
def velocity_gap(critic: Denoiser, teacher: Denoiser, x: Tensor, noise: Tensor, r: Tensor, cond: Cond) -> Tensor:
    """``u_fake - u`` at samples ``x`` noised to ``r`` ``[B]``: against it ``F(z, 1)`` moves."""
    x_r = teacher.schedule.add_noise(x, noise, r)
    return critic.velocity(x_r, r, cond) - teacher.velocity(x_r, r, cond)


def picked(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The indices of the chosen rows, and what each counts, 1; where a part has none, one that counts nothing."""
    index = rows.nonzero()[:, 0]
    if len(index):
        return index, torch.ones(len(index), device=rows.device)
    return rows.new_zeros(1, dtype=torch.int64), torch.zeros(1, device=rows.device)


def typical(g: Tensor) -> Tensor:
    """The mean size of directions a dimension."""
    return sizes(g).mean() / g[0].numel() ** 0.5
