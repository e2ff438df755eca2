"""SIM: the score-divergence theorem by quadrature, the family of distances, and their fixed points."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewstep.exact import Gaussian, ring
from fewstep.methods.matching.sim import SIM, SLOPES, implicit_loss
from fewstep.methods.method import Batch, Networks
from fewstep.methods.parts.times import Own
from fewstep.randomness import Rng
from fewstep.schedules import EDM, FlowMatching, Schedule, VPLinear

F64 = torch.float64
M, S, A, B = 0.4, 0.7, 0.5, -0.3  # mean and spread of the teacher, spread and mean of the generator
BEND = 0.3  # where pseudo-Huber bends, wide enough for the quadrature


DISTANCES = {
    "pseudo-huber": lambda y, c: (y.square().sum(1) + c**2 * y.shape[1]).sqrt() - c * y.shape[1] ** 0.5,
    "l2": lambda y, c: y.square().sum(1),
    "l4": lambda y, c: y.pow(4).sum(1),
}


def nodes(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gauss-Hermite nodes and weights for a standard normal variable."""
    x, w = np.polynomial.hermite_e.hermegauss(count)
    return torch.tensor(x, dtype=F64), torch.tensor(w / w.sum(), dtype=F64)


def divergence_gradient(name: str, schedule: Schedule, t: torch.Tensor, data_units: bool, count: int) -> torch.Tensor:
    """d/d(spread, mean) of ``E d(s_student - s_teacher)`` with the student's score in closed form, the states held."""
    a, b = (torch.tensor(v, dtype=F64, requires_grad=True) for v in (A, B))
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    z, w = nodes(count)
    x_t = alpha * B + (alpha**2 * A**2 + sigma**2).sqrt() * z
    student = -(x_t - alpha * b) / (alpha**2 * a**2 + sigma**2)
    teacher = -(x_t - alpha * M) / (alpha**2 * S**2 + sigma**2)
    scale = sigma**2 / alpha if data_units else 1.0
    total = (w * DISTANCES[name]((scale * (student - teacher))[:, None], BEND)).sum()
    return torch.stack(torch.autograd.grad(total, (a, b)))


def loss_gradient(
    name: str, schedule: Schedule, t: torch.Tensor, data_units: bool, count: int, held: bool = False
) -> torch.Tensor:
    """The same of the theorem's loss, through the samples of the generator ``b + a z``; ``held``: not through x_t."""
    a, b = (torch.tensor(v, dtype=F64, requires_grad=True) for v in (A, B))
    z, w = nodes(count)
    z, eps, w = z.repeat_interleave(count)[:, None], z.repeat(count)[:, None], (w[:, None] * w).flatten()
    x, times = b + a * z, t.expand(count**2)
    x_t = schedule.add_noise(x, eps, times)
    x_t = x_t.detach() if held else x_t
    teacher = Gaussian(schedule, torch.full((1,), M, dtype=F64), S**2)
    critic = Gaussian(schedule, torch.full((1,), B, dtype=F64), A**2)
    scale = None if data_units else schedule.alpha(times) / schedule.sigma(times) ** 2
    loss = implicit_loss(x, teacher(x_t, times), critic(x_t, times), SLOPES[name], BEND, scale)
    return torch.stack(torch.autograd.grad((w * loss).sum(), (a, b)))


@pytest.mark.parametrize("schedule", [EDM(), FlowMatching(), VPLinear()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("data_units", [False, True])
@pytest.mark.parametrize(("name", "tolerance"), [("l2", 1e-13), ("l4", 1e-12), ("pseudo-huber", 1e-6)])
def test_score_divergence_theorem(name: str, tolerance: float, data_units: bool, schedule: Schedule) -> None:
    """The gradient of the loss is that of the divergence between the scores, by quadrature: exact for polynomials, to
    the error of 80 nodes for pseudo-Huber.  Holding x_t gives another gradient."""
    t = schedule.time_at(torch.tensor(0.1, dtype=F64))  # a little more signal than noise
    count = 80 if name == "pseudo-huber" else 12
    right = divergence_gradient(name, schedule, t, data_units, count)
    found = loss_gradient(name, schedule, t, data_units, count)
    assert float((found - right).norm() / right.norm()) < tolerance
    wrong = loss_gradient(name, schedule, t, data_units, count, held=True)
    assert float((wrong - right).norm() / right.norm()) > 0.1


def test_the_methods_loss_is_the_theorems() -> None:
    """``SIM.student_loss`` draws its levels, and its gradient in the samples is that of ``implicit_loss`` through x and
    x_t, to the last bit; holding x_t changes it."""
    schedule = EDM()
    teacher, critic = (Gaussian(schedule, torch.full((3,), m, dtype=F64), v) for m, v in ((0.4, 0.5), (-0.2, 0.3)))
    nets = Networks({"teacher": teacher, "critic": critic}, {})
    x = Rng(1).normal(16, 3, dtype=F64).requires_grad_()
    method = SIM(distance="l4")
    loss, gap = method.student_loss(nets, Batch(torch.zeros(16, 3, dtype=F64), None, Rng(2)), x)
    (found,) = torch.autograd.grad(loss, x)

    def by_hand(held: bool) -> torch.Tensor:
        rng = Rng(2)
        t = Own(0.0, 0.8).draw(schedule, 16, rng)
        x_t = schedule.add_noise(x, rng.normal_like(x), t)
        x_t = x_t.detach() if held else x_t
        real, fake = teacher(x_t, t), critic(x_t, t)
        assert torch.equal(gap, fake - real)
        return torch.autograd.grad(implicit_loss(x, real, fake, SLOPES["l4"], 1.0).mean(), x)[0]

    assert torch.equal(found, by_hand(held=False))
    assert float((found - by_hand(held=True)).norm() / found.norm()) > 0.1


def test_pseudo_huber_between_its_limits() -> None:
    """A wide bend is half the squared distance over ``c sqrt(n)``, a narrow one gives every sample a direction of
    length one: the loss is then the projection of ``critic - x`` on it."""
    x, real, fake = (Rng(seed).normal(8, 5, dtype=F64) for seed in range(3))
    squared = implicit_loss(x, real, fake, SLOPES["l2"], 1.0)
    wide, narrow = 1e4, 1e-6
    found = implicit_loss(x, real, fake, SLOPES["pseudo-huber"], wide)
    torch.testing.assert_close(found * wide * 5**0.5, squared / 2, rtol=1e-6, atol=0)
    found = implicit_loss(x, real, fake, SLOPES["pseudo-huber"], narrow)
    direction = (fake - real) / (fake - real).norm(dim=1, keepdim=True)
    torch.testing.assert_close(found, -(direction * (fake - x)).sum(1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SLOPES)
def test_slopes_are_derivatives(name: str) -> None:
    """Of distances over the whole sample, here of five numbers; every name has one."""
    y = Rng(0).normal(8, 5, dtype=F64).requires_grad_()
    (found,) = torch.autograd.grad(DISTANCES[name](y, 0.7).sum(), y)
    torch.testing.assert_close(SLOPES[name](y.detach(), 0.7), found, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(("name", "tolerance"), [("pseudo-huber", 1e-4), ("l2", 1e-4), ("l4", 0.3)])
def test_gaussian_fixed_point(name: str, tolerance: float) -> None:
    """A linear generator with the exact critic fits a Gaussian in the plane with every distance.  The gradient of every
    sample is exactly 0 there; l4 slows down before, since its gradient falls with the third power of the error."""
    schedule = EDM(0.002, 80.0)
    mean, covariance = torch.tensor([0.7, -0.3], dtype=F64), torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=F64)
    teacher = Gaussian(schedule, mean, covariance)
    a = torch.eye(2, dtype=F64).requires_grad_()
    b = torch.zeros(2, dtype=F64, requires_grad=True)
    optimiser = torch.optim.Adam([a, b], lr=3e-2, betas=(0.0, 0.99))
    steps, rng = 250, Rng(0)

    def loss(n: int, rng: Rng) -> torch.Tensor:
        x = rng.normal(n, 2, dtype=F64) @ a.T + b
        t = Own(0.0, 0.8).draw(schedule, n, rng)
        x_t = schedule.add_noise(x, rng.normal_like(x), t)
        critic = Gaussian(schedule, b.detach(), (a @ a.T).detach())
        return implicit_loss(x, teacher(x_t, t), critic(x_t, t), SLOPES[name], 0.1)

    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 3e-2 * (1 - step / steps)
        optimiser.zero_grad()
        loss(64, rng).mean().backward()
        optimiser.step()
    assert float((b - mean).detach().norm()) < tolerance
    assert float((a @ a.T - covariance).detach().norm()) < tolerance

    with torch.no_grad():
        a.copy_(torch.linalg.cholesky(covariance))
        b.copy_(mean)
    found = torch.autograd.grad(loss(64, rng).abs().sum(), (a, b))
    assert all(float(g.abs().max()) < 1e-9 for g in found)


def test_pseudo_huber_spreads_gradients_least() -> None:
    """Samples of a generator far from a ring of eight: the log of the gradient of each sample varies least with
    pseudo-Huber, most with l4."""
    schedule = EDM()
    teacher, critic = ring(schedule, radius=1.0, sd=0.1), Gaussian(schedule, torch.zeros(2, dtype=F64), 0.25)
    nets = Networks({"teacher": teacher, "critic": critic}, {})
    x = (0.5 * Rng(1).normal(2000, 2, dtype=F64)).requires_grad_()
    spread = {}
    for name in SLOPES:
        method = SIM(distance=name)  # type: ignore[arg-type]
        loss, _ = method.student_loss(nets, Batch(torch.zeros(2000, 2, dtype=F64), None, Rng(2)), x)
        spread[name] = float(torch.autograd.grad(loss, x)[0].norm(dim=1).log().std())
    assert spread["pseudo-huber"] < 0.75 * spread["l2"] < 0.75 * spread["l4"]
