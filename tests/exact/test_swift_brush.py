"""SwiftBrush: its vector, what moves, and where it ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fewstep.denoisers import Denoiser, NetworkDenoiser
from fewstep.exact import Gaussian, GaussianMixture, GuidedGaussian
from fewstep.guidance import Guided
from fewstep.methods.matching.dmd import DMD
from fewstep.methods.matching.swift_brush import SwiftBrush, noise_loss
from fewstep.methods.method import Batch, Networks, Progress
from fewstep.methods.parts.distribution_matching import IN_THE_MIDDLE
from fewstep.methods.parts.score_matching import TwoScores, by_noise, matching_vector, surrogate, weighted_difference
from fewstep.methods.start import Start
from fewstep.networks import MLP
from fewstep.networks.lora import factors
from fewstep.predictions import TrigPrediction
from fewstep.randomness import Rng
from fewstep.schedules import EDM, FlowMatching, Schedule, TrigFlow, align

F64, SHAPE = torch.float64, (1, 4, 4)
#: VinAIResearch/SwiftBrush, train_swiftbrush.py and its README.
PUBLISHED = {
    "guidance": 4.5, "label_dropout": 0.1, "rank": 64, "alpha": 108.0, "lr": 1e-6, "critic_lr": 1e-3,
    "optimizer": {
        "kind": "adam", "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "clip": 1.0, "warmup": 0,
        "decay": "constant",
    },
}  # fmt: skip


def teacher() -> NetworkDenoiser:
    torch.manual_seed(0)
    net = MLP(SHAPE, 16, 1, 3)
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return NetworkDenoiser(net.double(), TrigFlow(sigma_data=0.7), TrigPrediction(sigma_data=0.7), SHAPE, 3)


def prompts(seed: int = 0, n: int = 6) -> Batch:
    """A batch of conditions alone."""
    batch = Batch(None, torch.arange(n) % 3, Rng(seed), shape=(n, *SHAPE))
    return batch


@pytest.mark.parametrize("schedule", [EDM(), TrigFlow(), FlowMatching()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("scale", [1.0, 4.5])
def test_the_vector_is_the_difference_of_the_noises(schedule: Schedule, scale: float) -> None:
    """``sigma^2 (eps_teacher - eps_critic) = sigma alpha (D_critic - D_teacher)``, to machine precision, under guidance
    on both too."""
    one, other = (GuidedGaussian(schedule, (2,), 0.2 + k, 0.5, scale) for k in (0.0, 0.3))
    t = schedule.time_at(torch.linspace(-2, 2, 16, dtype=F64))
    x_t = Rng(0).normal(16, 2, dtype=F64) * align(schedule.sigma(t), torch.zeros(16, 2))
    found = TwoScores(x_t, x_t, t, one(x_t, t), other(x_t, t), schedule)
    sigma = align(schedule.sigma(t), x_t)
    expected = sigma**2 * (one.eps(x_t, t) - other.eps(x_t, t))
    torch.testing.assert_close(weighted_difference(found, by_noise), expected, atol=1e-12, rtol=1e-10)


def test_the_first_iteration_moves_nothing_but_the_critic() -> None:
    """Untrained low-rank weights are the teacher: the student's gradient is exactly 0, under guidance too, and only the
    factors of the critic have one."""
    for guidance in (1.0, 4.5):
        method = SwiftBrush(guidance=guidance, rank=2)
        nets = method.networks(Start(teacher()))
        student, critic = method.updates(nets, prompts(), Progress())
        student.loss.backward()
        assert float(student.logs["matching_norm"]) == 0.0
        assert all(p.grad is None or not bool(p.grad.any()) for p in nets.student.parameters())
        critic.loss.backward()
        moved = {name for name, p in nets.critic.named_parameters() if p.grad is not None}
        assert moved and all("lora" in name for name in moved) and factors(nets.critic)
        assert all(p.grad is None for p in nets.teacher.parameters())


def test_with_another_weight_it_is_dmd() -> None:
    """The same draws, the same surrogate: DMD without pairs and with the weight ``sigma alpha``, bit for bit; the whole
    critic in place of low-rank weights changes nothing in it."""
    method = SwiftBrush(rank=0)
    nets = method.networks(Start(teacher()))
    with torch.no_grad():
        for p in nets.critic.parameters():
            p += 0.05 * torch.randn_like(p)
    first = next(iter(method.updates(nets, prompts(3), Progress())))
    found = torch.autograd.grad(first.loss, list(nets.student.parameters()), allow_unused=True)

    batch, schedule = prompts(3), nets.teacher.schedule
    like = DMD(regression_weight=0.0)
    plan = like.plan(schedule)
    assert plan == method.plan(nets)
    z = batch.rng.normal(6, *SHAPE, dtype=F64) if not batch.rng.shared_integer(0, 1) else None
    x = nets.student.to_data(schedule.prior(z), schedule.t_max, batch.cond)
    t = IN_THE_MIDDLE.draw(schedule, 6, batch.rng)
    x_t = schedule.add_noise(x.detach(), batch.rng.normal_like(x), t)
    g = matching_vector(x.detach(), x_t, t, nets.teacher, nets.critic, batch.cond)
    scale = (x.detach() - nets.teacher(x_t, t, batch.cond)).abs().mean((1, 2, 3))  # DMD's own weight taken back
    g = align(scale * schedule.sigma(t) * schedule.alpha(t), g) * g
    wanted = torch.autograd.grad(surrogate(x, g), list(nets.student.parameters()), allow_unused=True)
    assert all(
        torch.allclose(a, b, atol=1e-15, rtol=1e-12) for a, b in zip(found, wanted, strict=True) if a is not None
    )


class Line(torch.nn.Module):
    """``x = b + a z``, what a one-step student makes of noise."""

    def __init__(self, b: float, a: float) -> None:
        super().__init__()
        self.b, self.a = (torch.nn.Parameter(torch.tensor(v, dtype=F64)) for v in (b, a))


def settled(world: Denoiser, critic_of: Any, steps: int = 400, lr: float = 0.05, n: int = 256) -> tuple[float, float]:
    """Where a Gaussian generator comes to rest under the vector, by plain gradient descent."""
    line = Line(-0.5, 1.2)
    schedule = world.schedule
    for step in range(steps):
        rng = Rng(step)
        x = line.b + line.a * rng.normal(n, 1, dtype=F64)
        t = IN_THE_MIDDLE.draw(schedule, n, rng)
        noise = rng.normal_like(x)
        x_t = schedule.add_noise(x.detach(), noise, t)
        critic = critic_of(line, x.detach(), noise)
        g = matching_vector(x.detach(), x_t, t, world, critic, weight=by_noise)
        slopes = torch.autograd.grad((x * g).mean(), [line.b, line.a])
        with torch.no_grad():
            for p, slope in zip((line.b, line.a), slopes, strict=True):
                p -= 10 * lr * slope * (1 - step / steps)
    return float(line.b.detach()), float(line.a.detach())


def own_law(line: Line, x: torch.Tensor, noise: torch.Tensor) -> Gaussian:
    return Gaussian(FlowMatching(), line.b.detach().reshape(1), float(line.a.detach()) ** 2)


def test_with_an_exact_critic_it_ends_at_the_teacher() -> None:
    world = Gaussian(FlowMatching(), torch.tensor([0.7], dtype=F64), 0.25)
    assert settled(world, own_law) == pytest.approx((0.7, 0.5), abs=0.02)


class Drawn(Denoiser):
    """A critic that knows the noise that was drawn: score distillation sampling."""

    def __init__(self, x: torch.Tensor) -> None:
        super().__init__(FlowMatching(), (1,))
        self.x = x

    def forward(self, x: torch.Tensor, t: Any, cond: Any = None) -> torch.Tensor:
        return self.x


def test_a_critic_that_never_learns_collapses_to_a_mode() -> None:
    """With the drawn noise in place of the critic's the vector is score distillation sampling's, whose generator loses
    its spread on a law of two modes; the critic of its own samples keeps it."""
    means, variances = torch.tensor([[-1.0], [1.0]], dtype=F64), torch.tensor([0.04, 0.04], dtype=F64)
    world = GaussianMixture(FlowMatching(), torch.ones(2, dtype=F64), means, variances)
    _, collapsed = settled(world, lambda line, x, noise: Drawn(x))
    _, kept = settled(world, own_law)
    assert abs(collapsed) < 0.25 < 0.6 < abs(kept)


def test_the_critics_loss_weighs_the_noise_by_the_signal() -> None:
    """``alpha^2`` times the squared error of the noise, at times of the whole range; 0 for the exact denoiser of a
    point."""
    point = Gaussian(FlowMatching(), torch.tensor([0.3, 0.3], dtype=F64), 1e-12)
    x = torch.full((32, 2), 0.3, dtype=F64)
    assert float(noise_loss(point, x, None, Rng(0))) < 1e-9
    moved = noise_loss(point, x + 0.1, None, Rng(1))
    rng = Rng(1)
    t = FlowMatching().own_time(rng.uniform(32))
    slip = 0.1 * (1 - t) / t.clamp_min(1e-9)  # eps is off by alpha / sigma times the error of D
    torch.testing.assert_close(moved, ((1 - t) * slip).square().mean(), rtol=1e-6, atol=0)


def test_the_critic_is_shown_no_condition_now_and_then() -> None:
    """A whole batch at once, in a share of the iterations."""
    method = SwiftBrush(label_dropout=0.3, rank=2)
    nets, seen = method.networks(Start(teacher())), []
    real = nets.critic.forward

    def spy(x: Any, t: Any, cond: Any = None, **extras: Any) -> Any:
        seen.append(cond)
        return real(x, t, cond, **extras)

    nets.critic.eps = lambda x, t, cond: seen.append(cond) or torch.zeros_like(x)
    for seed in range(200):
        tuple(method.updates(nets, prompts(seed, 2), Progress()))
    hidden = [bool((cond == -1).all()) for cond in seen]
    assert all(bool((cond == -1).all()) or not bool((cond == -1).any()) for cond in seen)
    assert abs(sum(hidden) / len(hidden) - 0.3) < 0.1  # three standard deviations


def test_it_needs_an_empty_condition_for_guidance() -> None:
    plain = teacher()
    plain.classes = None
    with pytest.raises(ValueError, match=r"guidance=4\.5: this teacher is unconditional"):
        SwiftBrush(guidance=4.5).networks(Start(plain))
    nets = SwiftBrush(rank=2).networks(Start(teacher()))
    assert isinstance(nets, Networks) and isinstance(Guided(nets.critic, 2.0), Guided)
