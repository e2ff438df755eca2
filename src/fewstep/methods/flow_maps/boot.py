"""BOOT (Gu et al. 2023, arXiv 2306.05544): a map from noise to every time, bootstrapped without data.

Along a trajectory that starts in the noise ``eps`` the *signal* ``y_t = (x_t - sigma_t eps) / alpha_t`` follows::

    dy / dlambda = D(alpha_t y + sigma_t eps, t) - y,      lambda = log(alpha / sigma)

from ``y = D(eps, t_max)`` to the sample.  The student tells ``y(eps, t)`` from the noise and the time alone.  One step
of the teacher from what it says at ``t`` is what it must say at ``s = t - delta``::

    loss = || y(eps, s) - sg( y(eps, t) + h (D(x_t, t) - y(eps, t)) ) ||^2 / h^2,     h = 1 - e^(lambda_t - lambda_s)
         + beta || y(eps, t_max) - D(eps, t_max) ||^2

with ``x_t = alpha_t y(eps, t) + sigma_t eps``.  The second term pins where it all starts: without it every family of
trajectories of the teacher is a solution.  ``y(eps, s)`` is the data prediction of a jump from ``t_max`` to ``s``.

No official code was found; the equations are the paper's, their steps were derived again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from fewstep.conditions import Cond
from fewstep.denoisers import Denoiser
from fewstep.methods.method import Batch, Networks, Paper, Progress, System, Update
from fewstep.methods.parts.from_noise import FromNoise
from fewstep.methods.parts.times import Uniform
from fewstep.randomness import repeated_draws
from fewstep.ranges import NonNegative, Share
from fewstep.schedules import Schedule, align


class SignalStep(NamedTuple):
    """Where a step of the signal ODE lands ``[B, ...]``, and how far it went towards the data prediction ``[B]``."""

    y: Tensor
    share: Tensor


def share_of_way(schedule: Schedule, t: Tensor, s: Tensor) -> Tensor:
    """``1 - e^(lambda_t - lambda_s)``, the share of the way from ``y`` to ``D`` that a step from ``t`` to ``s`` goes;
    1 from pure noise, where the signal is the prediction."""
    left = schedule.alpha(t) * schedule.sigma(s) / (schedule.sigma(t) * schedule.alpha(s).clamp_min(1e-300))
    return torch.where(t >= schedule.t_max, 1.0, 1 - left)


@torch.no_grad()
def signal_step(
    teacher: Denoiser, eps: Tensor, y: Tensor, t: Tensor, s: Tensor, cond: Cond = None, *, heun: bool = False
) -> SignalStep:
    """One step of the signal ODE of ``teacher`` from ``y`` ``[B, ...]`` at ``t`` to ``s``, both ``[B]``.

    Euler's step is DDIM's.  Heun's takes the mean of the predictions at both ends: exact for a prediction that is
    linear in ``alpha / sigma``, second order for others, one more call.
    """
    schedule = teacher.schedule
    share = share_of_way(schedule, t, s)
    go = align(share, y)
    x0 = teacher(schedule.add_noise(y, eps, t), t, cond)
    if heun:
        ahead = y + go * (x0 - y)
        x0 = (x0 + teacher(schedule.add_noise(ahead, eps, s), s, cond)) / 2
    return SignalStep(y + go * (x0 - y), share)


@dataclass(frozen=True)
class BOOT(FromNoise):
    """Bootstrapping of the signal ODE; a share of every batch is at ``t_max``, where the boundary is."""

    name: ClassVar[str] = "boot"
    paper: ClassVar[Paper] = Paper(
        "BOOT: Data-free Distillation of Denoising Diffusion Models with Bootstrapping", "2306.05544",
        "from paper text",
        ("no official code: equations from the paper's text and derived again",
         "step size, weights and learning rate are not published where we could read them",
         "the network keeps the teacher's time input, at t_max, and is told the target time by a further one",
         "a teacher whose schedule does not end in pure noise (EDM, TrigFlow from sigma 80, the tables of Stable "
         "Diffusion) is seen on flow matching, which does; its last trained level stands in beyond it",
         "a share of the batch is at the boundary, not a second batch",
         "no negative prompt: guidance leads away from the empty condition",
         "sampling uses a power-function average of the weights"),
    )  # fmt: skip
    system: ClassVar[System] = System(
        "BOOT", 2023, "flow maps", "teacher", "1",
        "bootstraps the map from noise to every time, without data",
    )  # fmt: skip
    healthy: ClassVar[dict[str, str]] = {
        "student/loss": "rises from the boundary's 0 as the map learns to move, then stays level: its target moves too",
        "student/boundary": "stays far below the loss; growth says that the start of all paths drifts",
    }

    delta: Annotated[Share, "step of the bootstrapping, as a share of the range of times"] = 0.1
    boundary_weight: Annotated[NonNegative, "weight of the boundary at t_max"] = 1.0
    boundary_share: Annotated[Share, "share of a batch that is at the boundary"] = 0.25
    teacher_step: Annotated[Literal["euler", "heun"], "the teacher's step of the signal ODE; heun calls it twice"] = (
        "euler"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("delta", "boundary_share"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name):g} must lie between 0 and 1")

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        schedule, rng, eps = nets.student.schedule, batch.rng, batch.normal()
        t = Uniform(self.delta, 1.0).draw(schedule, batch.n, rng)
        s = t - self.delta * (schedule.t_max - schedule.t_min)
        top = torch.full_like(t, schedule.t_max)
        # a step from t_max to itself is the boundary: its target is the teacher's prediction
        edge = rng.uniform(batch.n) < self.boundary_share
        t, s = torch.where(edge, top, t), torch.where(edge, top, s)
        extras, x = self.weights(batch, eps), schedule.prior(eps)
        with torch.no_grad(), repeated_draws(eps.device):
            y = nets.student.predict(x, top, t, batch.cond, **extras)
        target, share = signal_step(
            self.target(nets, extras), eps, y, t, s, batch.cond, heun=self.teacher_step == "heun"
        )
        error = (nets.student.predict(x, top, s, batch.cond, **extras) - target).square().flatten(1).mean(1)
        q = self.boundary_share
        weight = torch.where(edge, self.boundary_weight / q, share**-2 / (1 - q))
        missed = (error.detach() * edge).sum() / edge.sum().clamp_min(1)
        yield Update("student", (weight.to(error) * error).mean(), {"boundary": missed})
