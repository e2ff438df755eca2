"""A population of problems for solvers: random worlds in closed form, on every family of schedules, guided and not.

A problem is drawn from a seed, so the ones that something was fitted on and the ones that it is judged on never meet:
see ``benchmarks/held_out.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.denoisers import Cond, Denoiser
from fewstep.discrete_vp import DiscreteVP
from fewstep.exact import GaussianMixture
from fewstep.grids import balanced
from fewstep.guidance import Guided
from fewstep.randomness import Rng
from fewstep.sampling import Levels, run
from fewstep.sampling.solvers.abm import ABM
from fewstep.schedules import EDM, FlowMatching, Schedule, TrigFlow

#: The families of schedules on which problems live.
FAMILIES: dict[str, Schedule] = {
    "flow": FlowMatching(),
    "edm": EDM(),
    "trig": TrigFlow(),
    "ddpm": DiscreteVP.linear(),
    "sd": DiscreteVP.scaled_linear(),
    "cosine": DiscreteVP.cosine(1000),
}
#: Samples of a problem.
N = 32


@dataclass(frozen=True)
class Problem:
    """A model with starting points (standard normal), conditions and where the exact flow takes them."""

    name: str
    family: str
    model: Denoiser
    noise: Tensor
    ends: Tensor
    cond: Cond = None
    guidance: float | None = None

    def error(self, got: Tensor) -> float:
        """The root mean square deviation of a sample, averaged over the samples."""
        gap = (got - self.ends).flatten(1).double().square().mean(1).sqrt()
        return float(gap.mean()) if bool(gap.isfinite().all()) else math.inf


def draw_world(rng: Rng, schedule: Schedule) -> tuple[str, GaussianMixture]:
    """A mixture of 2 to 12 correlated Gaussians of unequal weights in 1 to 64 dimensions.

    The modes are .15 to .5 wide and their centres .4 to 3 apart from the mean, per coordinate (root mean square);
    in many dimensions modes that far apart are decided at once, so the distance falls with the dimension.
    """
    d = int(2 ** rng.uniform(1, low=0, high=6.01))
    k = int(rng.uniform(1, low=2, high=13))
    width = float(rng.uniform(1, low=math.log(0.15), high=math.log(0.5)).exp())
    distance = float(rng.uniform(1, low=-0.9, high=1.1).exp())
    distance /= d**0.15
    means = rng.normal(k, d, dtype=torch.float64)
    means = means - means.mean(0)
    means *= distance / means.square().mean().sqrt()
    mix = rng.normal(k, d * d, dtype=torch.float64).view(k, d, d) / math.sqrt(d)
    covariances = width**2 * (mix @ mix.mT + torch.eye(d, dtype=torch.float64)) / 2
    weights = rng.uniform(k, low=0.5, high=2.0)
    classes = [min(i, 3) for i in range(k)]
    return f"{d}-d, {k} modes {distance:.2f} apart, {width:.2f} wide", GaussianMixture(
        schedule, weights, means, covariances, classes
    )


def draw_problems(count: int, seed: str, guided: bool) -> Iterator[Problem]:
    """``count`` problems, the families in turn; guided ones have scales from 1.5 to 8."""
    names = list(FAMILIES)
    for i in range(count):
        rng = Rng(seed, "guided" if guided else "plain", i)
        family = names[i % len(names)]
        schedule = FAMILIES[family]
        name, world = draw_world(rng, schedule)
        noise = rng.normal(N, *world.shape, dtype=torch.float64)
        if guided:
            scale = float(rng.uniform(1, low=math.log(1.5), high=math.log(8)).exp())
            cond = torch.arange(N) % (world.classes or 1)
            yield guided_problem(f"{name}, guided at {scale:.1f}", family, world, noise, cond, scale)
        else:
            cond = torch.full((N,), -1)
            first = schedule.prior(noise)
            ends = world.flow(first, schedule.t_max, 0.0) if _has_data(schedule) else _to_data(world, noise, cond)
            yield Problem(name, family, world, noise, ends, cond)


def guided_problem(
    name: str, family: str, model: Denoiser, noise: Tensor, cond: Cond, scale: float | None, calls: int = 400
) -> Problem:
    """A problem whose reference is ``calls`` calls of a fourth-order solver."""
    steered = model if scale is None else Guided(model, scale)
    return Problem(name, family, model, noise, _to_data(steered, noise, cond, calls), cond, scale)


def _has_data(schedule: Schedule) -> bool:
    return float(schedule.sigma(torch.zeros((), dtype=torch.float64))) == 0


@torch.no_grad()
def _to_data(model: Denoiser, noise: Tensor, cond: Cond, calls: int = 400) -> Tensor:
    levels = Levels.of(model.schedule, balanced(model.schedule, calls, 1.0, 2.0))
    return run(model, model.schedule.prior(noise), ABM(p=4).table(levels), cond)
