"""Students that are trained, in seconds, on laws that are known: what a method promises, not what its terms are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewstep.data import Dataset
from fewstep.denoisers import Denoiser, NetworkDenoiser
from fewstep.exact import GaussianMixture, ring
from fewstep.methods.flow_maps.rectified_flow import STRAIGHT, Reflow
from fewstep.methods.matching.dmd2 import DMD2
from fewstep.methods.method import Method
from fewstep.methods.parts.stores import solve_heun
from fewstep.methods.start import Start
from fewstep.methods.teachers.denoising import Denoising
from fewstep.networks import MLP
from fewstep.predictions import Prediction, TrigPrediction, Velocity
from fewstep.randomness import Rng
from fewstep.schedules import Schedule, TrigFlow
from fewstep.training.budget import Budget
from fewstep.training.profiles import Power
from fewstep.training.settings import Settings
from fewstep.training.trainer import train


def teacher_of(x: Tensor, schedule: Schedule, prediction: Prediction) -> NetworkDenoiser:
    """A small network that has learned these samples."""
    torch.manual_seed(0)
    net = NetworkDenoiser(MLP(tuple(x.shape[1:]), 32, 1), schedule, prediction, tuple(x.shape[1:]))
    made: NetworkDenoiser = trained(Denoising(lr=4e-3, warmup=20), Start(net, Dataset("x", x)), 300, 256)
    return made


def trained(method: Method, start: Start, steps: int, batch: int = 128) -> Any:
    settings = Settings(Budget(steps), batch, precision="fp32", averages=(Power(0.1),))
    return train(method, start, settings, None, show=False).model


def test_dmd2_finds_all_modes_of_a_ring() -> None:
    """One call, eight modes, a critic that moves five times as often: every mode has its share and nearly all samples
    lie at one."""
    schedule = TrigFlow(sigma_data=1.4)
    world = ring(schedule)
    x = world.sample(4096, Rng(1)).float()
    first = teacher_of(x, schedule, TrigPrediction(sigma_data=1.4))
    method = DMD2(gan_weight=0.0, critic_steps=5, lr=2e-3, critic_lr=4e-3)
    student = trained(method, Start(world, Dataset("x", x), given={"student": first, "critic": first}), 500)
    noise = Rng(2).normal(2048, 2)

    def seen(made: Tensor) -> tuple[Tensor, float]:
        far = torch.cdist(made.double(), world.means.reshape(8, 2))
        return torch.bincount(far.argmin(1), minlength=8) / len(made), float((far.amin(1) < 0.75).double().mean())

    shares, close = seen(student(noise))
    assert float(shares.min()) > 0.06 and close > 0.8


def test_the_gan_goes_where_a_teacher_is_wrong() -> None:
    """The teacher's ring is a fifth too small.  Matching its scores stays there; data through the discriminator bring
    the radius most of the way."""
    schedule = TrigFlow(sigma_data=1.4)
    x = ring(schedule).sample(4096, Rng(1)).float()
    teacher = teacher_of(0.8 * x, schedule, TrigPrediction(sigma_data=1.4))

    def radius(gan_weight: float) -> float:
        method = DMD2(gan_weight=gan_weight, discriminator_weight=1.0, critic_steps=2, lr=2e-3, critic_lr=4e-3)
        made = trained(method, Start(teacher, Dataset("x", x)), 250, 128)(Rng(2).normal(2048, 2))
        return float(made.norm(dim=1).mean())

    real, without, with_it = float(x.norm(dim=1).mean()), radius(0.0), radius(1.0)
    assert without < 0.85 * real
    assert real - with_it < 0.5 * (real - without)


def test_reflow_makes_one_step_enough() -> None:
    """On a mixture in the plane: pairs of a flow cost a third of what independent ones cost to carry, those of the
    reflowed flow about as little; and one Euler step of that ends near where its path does, where one of the first
    flow, trained as long, ends in the mean."""
    means = torch.tensor([[-2.0, 0.6], [2.0, -0.6], [0.0, 2.0]], dtype=torch.float64)
    world = GaussianMixture(STRAIGHT, torch.ones(3), means, torch.full((3,), 0.16))
    x, noise = world.sample(4096, Rng(1)).float(), Rng(3).normal(1024, 2)
    first = teacher_of(x, STRAIGHT, Velocity())
    again = trained(Reflow(pairs=2048, ode_steps=8, lr=4e-3), Start(first, Dataset("x", x)), 300, 256)

    def cost(made: Tensor) -> float:
        return float((made - noise).square().sum(1).mean())

    def one_step(model: Denoiser) -> Tensor:
        return noise - model.velocity(noise, torch.ones(len(noise), dtype=torch.float64))

    with torch.no_grad():
        ends = [solve_heun(model, noise, 16) for model in (first, again)]
        gaps = [one_step(model) - end for model, end in zip((first, again), ends, strict=True)]
        off = [float(gap.norm(dim=1).mean()) for gap in gaps]
    independent, before, after = cost(x[:1024]), *map(cost, ends)
    assert max(before, after) < 0.4 * independent
    assert off[1] < 0.25 * off[0]
