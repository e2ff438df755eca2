"""Diff-Instruct: its vector is DMD's without the normaliser, and the gradient of the integral KL divergence."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewstep.exact import Gaussian
from fewstep.methods.matching.diff_instruct import DiffInstruct
from fewstep.methods.method import Batch, Networks
from fewstep.methods.parts.score_matching import matching_vector
from fewstep.methods.parts.times import LogNormal
from fewstep.randomness import Rng
from fewstep.schedules import EDM, FlowMatching, Schedule, VPLinear

F64 = torch.float64


@pytest.mark.parametrize("schedule", [EDM(), FlowMatching(), VPLinear()], ids=lambda s: type(s).__name__)
def test_vector_is_dmds_without_the_normaliser(schedule: Schedule) -> None:
    """The gradient in the samples is ``g / numel`` with DMD's ``g`` times ``mean|x - D_teacher|``, at noise levels that
    are log-normal; nothing comes through the scores."""
    teacher = Gaussian(schedule, torch.full((3,), 0.4, dtype=F64), 0.5)
    critic = Gaussian(schedule, torch.full((3,), -0.2, dtype=F64), 0.3)
    nets = Networks({"teacher": teacher, "critic": critic}, {})
    x = Rng(1).normal(16, 3, dtype=F64).requires_grad_()
    loss, gap = DiffInstruct().student_loss(nets, Batch(torch.zeros(16, 3, dtype=F64), None, Rng(2)), x)
    (found,) = torch.autograd.grad(loss, x)
    rng, still = Rng(2), x.detach()
    t = LogNormal(-1.2, 1.2).draw(schedule, 16, rng)
    x_t = schedule.add_noise(still, rng.normal_like(still), t)
    size = (still - teacher(x_t, t)).abs().mean(1)
    g = matching_vector(still, x_t, t, teacher, critic) * size[:, None]
    torch.testing.assert_close(found, g / x.numel(), rtol=1e-12, atol=1e-16)
    torch.testing.assert_close(gap, g, rtol=1e-12, atol=1e-15)
    assert not gap.requires_grad


@pytest.mark.parametrize("schedule", [EDM(), FlowMatching(), VPLinear()], ids=lambda s: type(s).__name__)
def test_vector_is_the_gradient_of_the_kl_divergence(schedule: Schedule) -> None:
    """For a linear generator of a Gaussian the mean of ``g dx/d(spread, mean)`` is ``sigma^2 / alpha^2`` times the
    gradient of the KL divergence of the noised laws, by quadrature against the closed form."""
    m, s, spread, shift = 0.4, 0.7, 0.5, -0.3
    t = schedule.time_at(torch.tensor(0.1, dtype=F64))
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    a, b = (torch.tensor(v, dtype=F64, requires_grad=True) for v in (spread, shift))
    noised, aim = alpha**2 * a**2 + sigma**2, alpha**2 * s**2 + sigma**2
    kl = 0.5 * ((noised + alpha**2 * (b - m) ** 2) / aim - 1 + (aim / noised).log())
    right = torch.stack(torch.autograd.grad(kl, (a, b)))

    x, w = np.polynomial.hermite_e.hermegauss(12)
    node, weight = torch.tensor(x, dtype=F64), torch.tensor(w / w.sum(), dtype=F64)
    z, eps = node.repeat_interleave(12)[:, None], node.repeat(12)[:, None]
    x = b + a * z
    times = t.expand(144)
    teacher = Gaussian(schedule, torch.full((1,), m, dtype=F64), s**2)
    critic = Gaussian(schedule, torch.full((1,), shift, dtype=F64), spread**2)

    class Fixed(Rng):
        def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return eps if len(shape) == 2 else -schedule.log_snr(times)

    method = DiffInstruct(noise_mean=0.0, noise_std=1.0)  # the level is what is drawn
    nets = Networks({"teacher": teacher, "critic": critic}, {})
    _, g = method.student_loss(nets, Batch(x.detach(), None, Fixed(0)), x)
    found = torch.stack(torch.autograd.grad(((weight[:, None] * weight).flatten() * (g * x)[:, 0]).sum(), (a, b)))
    torch.testing.assert_close(found * alpha**2 / sigma**2, right, rtol=1e-12, atol=1e-14)


def test_gaussian_fixed_point() -> None:
    """A linear generator with the exact critic fits a Gaussian in the plane; the vector is 0 for every sample there."""
    schedule = EDM(0.002, 80.0)
    mean, covariance = torch.tensor([0.7, -0.3], dtype=F64), torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=F64)
    teacher = Gaussian(schedule, mean, covariance)
    a = torch.eye(2, dtype=F64).requires_grad_()
    b = torch.zeros(2, dtype=F64, requires_grad=True)
    optimiser = torch.optim.Adam([a, b], lr=3e-2, betas=(0.0, 0.99))
    steps, rng = 250, Rng(0)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 3e-2 * (1 - step / steps)
        x = rng.normal(64, 2, dtype=F64) @ a.T + b
        critic = Gaussian(schedule, b.detach(), (a @ a.T).detach())
        loss, _ = DiffInstruct().student_loss(
            Networks({"teacher": teacher, "critic": critic}, {}), Batch(x.detach(), None, rng), x
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert float((b - mean).detach().norm()) < 1e-5
    assert float((a @ a.T - covariance).detach().norm()) < 1e-5
