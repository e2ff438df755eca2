"""SiD: its loss at alpha = 1 and beyond, its normaliser and its optimum."""

from __future__ import annotations

import pytest
import torch

from fewstep.exact import Gaussian
from fewstep.methods.matching.sid import SiD, identity_loss, normaliser
from fewstep.methods.matching.sim import implicit_loss, l2_slope
from fewstep.methods.method import Batch, Networks
from fewstep.methods.parts.times import Own
from fewstep.randomness import Rng
from fewstep.schedules import EDM, FlowMatching, Schedule, VPLinear, align

F64 = torch.float64


def worlds(schedule: Schedule) -> tuple[Gaussian, Gaussian]:
    """Teacher and critic on three numbers."""
    return (
        Gaussian(schedule, torch.full((3,), 0.4, dtype=F64), 0.5),
        Gaussian(schedule, torch.full((3,), -0.2, dtype=F64), 0.3),
    )


@pytest.mark.parametrize("schedule", [EDM(), FlowMatching(), VPLinear()], ids=lambda s: type(s).__name__)
def test_at_alpha_one_it_is_score_implicit_matching_with_the_squared_distance(schedule: Schedule) -> None:
    """SIM(l2) of the scores is ``2 (alpha / sigma^2)^2`` times SiD's loss at alpha = 1, sample by sample, values and
    gradients; at alpha = 1.2 the two are not in proportion."""
    teacher, critic = worlds(schedule)
    x = Rng(1).normal(16, 3, dtype=F64).requires_grad_()
    t = schedule.t_min + (0.05 + 0.4 * torch.arange(16, dtype=F64) / 16) * (min(schedule.t_max, 4.0) - schedule.t_min)
    x_t = schedule.add_noise(x, Rng(2).normal(16, 3, dtype=F64), t)
    real, fake = teacher(x_t, t), critic(x_t, t)
    scale = schedule.alpha(t) / schedule.sigma(t) ** 2
    sim = implicit_loss(x, real, fake, l2_slope, 1.0, scale)
    sid = {alpha: 2 * scale**2 * identity_loss(x, real, fake, alpha) for alpha in (1.0, 1.2)}
    torch.testing.assert_close(sid[1.0], sim, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(loss.sum(), x, retain_graph=True)[0] for loss in (sim, sid[1.0], sid[1.2])]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-10)
    ratios = (gradients[2] / gradients[0]).flatten()
    assert float(ratios.std() / ratios.mean().abs()) > 0.01
    torch.testing.assert_close(  # what alpha adds is the squared gap of the scores
        sid[1.2] - sid[1.0], -0.2 * 2 * (align(scale, x) * (fake - real)).square().sum(1), rtol=1e-9, atol=1e-12
    )


def test_the_methods_loss_by_hand() -> None:
    """Gradient through x and through x_t in both scores, none through the normaliser, which is one over the mean of
    ``|x - D_teacher|`` of each sample."""
    schedule = EDM()
    teacher, critic = worlds(schedule)
    x = Rng(1).normal(16, 3, dtype=F64).requires_grad_()
    nets = Networks({"teacher": teacher, "critic": critic}, {})
    loss, gap = SiD().student_loss(nets, Batch(torch.zeros(16, 3, dtype=F64), None, Rng(2)), x)
    (found,) = torch.autograd.grad(loss, x)

    def by_hand(held: bool) -> torch.Tensor:
        rng = Rng(2)
        t = Own(0.0, 0.8).draw(schedule, 16, rng)
        x_t = schedule.add_noise(x, rng.normal_like(x), t)
        x_t = x_t.detach() if held else x_t
        real, fake = teacher(x_t, t), critic(x_t, t)
        assert torch.equal(gap, fake - real)
        size = [float((x - real)[k].abs().mean()) for k in range(16)]
        terms = [((real - fake) * ((real - x) - 1.2 * (real - fake)))[k].sum() / size[k] for k in range(16)]
        return torch.autograd.grad(torch.stack(terms).mean(), x)[0]

    torch.testing.assert_close(found, by_hand(held=False), rtol=1e-11, atol=1e-13)
    assert float((found - by_hand(held=True)).norm() / found.norm()) > 0.05


def test_normaliser_has_a_floor() -> None:
    """Samples that the teacher gives back unchanged do not divide by zero."""
    x = torch.ones(2, 4, dtype=F64)
    real = torch.stack([x[0], x[0] + 0.5])
    assert normaliser(x, real).tolist() == [pytest.approx(1e5), 2.0]


@pytest.mark.parametrize("alpha", [1.0, 1.2])
def test_gaussian_fixed_point(alpha: float) -> None:
    """A linear generator with the exact critic fits a Gaussian in the plane, and the gradient of every sample is
    exactly 0 there."""
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
        nets = Networks({"teacher": teacher, "critic": critic}, {})
        loss, _ = SiD(alpha=alpha).student_loss(nets, Batch(x.detach(), None, rng), x)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert float((b - mean).detach().norm()) < 1e-4
    assert float((a @ a.T - covariance).detach().norm()) < 1e-4
