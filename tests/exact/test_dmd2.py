"""DMD2: gradients, fixed points, freezing and the two time scales on Gaussians with exact scores."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fewstep.denoisers import NetworkDenoiser, gradients
from fewstep.exact import Gaussian
from fewstep.flow_maps import Jump
from fewstep.methods.matching.dmd2 import DMD2
from fewstep.methods.method import Batch, Networks, Progress
from fewstep.methods.parts.adversary import NonSaturating, accuracy
from fewstep.methods.parts.distribution_matching import critic_loss, two_optimizers
from fewstep.methods.parts.score_matching import matching_vector, surrogate
from fewstep.methods.parts.times import Own
from fewstep.methods.start import Start
from fewstep.networks import MLP, UNet
from fewstep.predictions import TrigPrediction
from fewstep.randomness import Rng
from fewstep.sampling.rollout import Call, Plan, rollout
from fewstep.schedules import EDM, FlowMatching, TrigFlow, VPLinear, align

F64 = torch.float64


def test_surrogate_gradient_is_the_vector() -> None:
    """The surrogate's gradient in x is ``g / numel`` to rounding."""
    x = torch.randn(5, 3, 4, dtype=F64, requires_grad=True)
    g = torch.randn(5, 3, 4, dtype=F64)
    surrogate(x, g).backward()
    torch.testing.assert_close(x.grad, g / x.numel(), atol=1e-16, rtol=1e-14)


@pytest.mark.parametrize("schedule", [EDM(), FlowMatching(), VPLinear(), TrigFlow(sigma_data=0.7)])
def test_vector_is_the_gradient_of_the_reverse_kl(schedule) -> None:
    """With exact scores, ``E[alpha (s_critic - s_teacher)]`` is d/db KL of the noised Gaussians, and the vector is
    that difference times ``sigma^2 / alpha`` over the normaliser."""
    m, s, b, a = 0.4, 0.7, -0.3, 0.5
    teacher = Gaussian(schedule, torch.full((1,), m, dtype=F64), s**2)
    critic = Gaussian(schedule, torch.full((1,), b, dtype=F64), a**2)
    t = torch.tensor(0.4 * schedule.t_max if not isinstance(schedule, EDM) else 0.8, dtype=F64)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    # antithetic pairs make the mean over x_t exact, because the scores are affine
    x = b + a * torch.tensor([[-1.0], [1.0], [-1.0], [1.0]], dtype=F64)
    eps = torch.tensor([[-1.0], [-1.0], [1.0], [1.0]], dtype=F64)
    times = t.expand(4)
    x_t = schedule.add_noise(x, eps, times)
    g = matching_vector(x, x_t, times, teacher, critic)
    scale = (x - teacher(x_t, times)).abs()
    difference = critic.score(x_t, times) - teacher.score(x_t, times)
    torch.testing.assert_close(g * scale, sigma**2 / alpha * difference, atol=1e-12, rtol=1e-9)

    b_ = torch.tensor(b, dtype=F64, requires_grad=True)
    variance_q, variance_p = alpha**2 * a**2 + sigma**2, alpha**2 * s**2 + sigma**2
    kl = (variance_q + alpha**2 * (b_ - m) ** 2) / (2 * variance_p) + (variance_p / variance_q).log() / 2
    kl.backward()
    torch.testing.assert_close((alpha * difference).mean(), b_.grad, atol=1e-12, rtol=1e-10)


def test_exact_fixed_point_has_vanishing_noise() -> None:
    """A linear generator with the analytic critic of its own law fits a 2-D Gaussian exactly: the vector is zero for
    every sample at the optimum, so that the noise of the gradient vanishes with the error."""
    schedule = EDM(0.002, 80.0)
    mean = torch.tensor([0.7, -0.3], dtype=F64)
    covariance = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=F64)
    teacher = Gaussian(schedule, mean, covariance)
    a = torch.eye(2, dtype=F64).requires_grad_()
    b = torch.zeros(2, dtype=F64, requires_grad=True)
    optimiser = torch.optim.Adam([a, b], lr=1e-2, betas=(0.0, 0.999))
    steps, rng = 1500, Rng(0)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        x = rng.normal(512, 2, dtype=F64) @ a.T + b
        t = Own().draw(schedule, 512, rng)
        x_t = schedule.add_noise(x.detach(), rng.normal_like(x), t)
        critic = Gaussian(schedule, b.detach(), (a @ a.T).detach())
        loss = surrogate(x, matching_vector(x.detach(), x_t, t, teacher, critic))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert float((b - mean).detach().norm()) < 1e-5
    assert float((a @ a.T - covariance).detach().norm()) < 1e-5


def teacher_network(shape: tuple[int, ...] = (1, 8, 8), kind: str = "mlp") -> NetworkDenoiser:
    torch.manual_seed(0)
    net = MLP(shape, 16, 1, 3) if kind == "mlp" else UNet(shape, (16, 16), 1, 32, 3)
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return NetworkDenoiser(net, TrigFlow(sigma_data=0.7), TrigPrediction(sigma_data=0.7), shape, 3)


def batch_of(n: int = 6, seed: int = 0) -> Batch:
    rng = Rng(seed)
    return Batch(rng.normal(n, 1, 8, 8), torch.arange(n) % 3, rng)


@pytest.mark.parametrize("kind", ["mlp", "unet"])
def test_each_update_reaches_its_own_networks_only(kind: str) -> None:
    """After the student's backward pass critic, head and teacher have no gradient, though the GAN's gradient does
    flow through the critic to x; after the critic's, the student has none."""
    method = DMD2(gan_weight=1.0)
    nets = method.networks(Start(teacher_network(kind=kind)))
    updates = method.updates(nets, batch_of(), Progress())
    first = next(updates)
    assert first.group == "student"
    first.loss.backward()
    for name in ("critic", "discriminator", "teacher"):
        assert all(p.grad is None for p in nets.get_submodule(name).parameters()), name
    assert not any(p.requires_grad for p in [*nets.critic.parameters(), *nets.discriminator.parameters()])
    assert any(p.grad is not None and float(p.grad.abs().max()) > 0 for p in nets.student.parameters())
    nets.zero_grad(set_to_none=True)
    second = next(updates)
    assert second.group == "critic" and all(
        p.requires_grad for p in [*nets.critic.parameters(), *nets.discriminator.parameters()]
    )
    second.loss.backward()
    assert all(p.grad is None for p in [*nets.student.parameters(), *nets.teacher.parameters()])
    for name in ("critic", "discriminator"):
        assert any(p.grad is not None and float(p.grad.abs().max()) > 0 for p in nets.get_submodule(name).parameters())


def test_gan_gradient_passes_through_the_frozen_critic() -> None:
    """The adversarial term alone moves x."""
    nets = DMD2().networks(Start(teacher_network()))
    x = torch.randn(4, 1, 8, 8, requires_grad=True)
    t = torch.full((4,), 0.8, dtype=F64)
    with gradients(nets.critic, "input"), gradients(nets.discriminator, "input"):
        told = nets.discriminator.noised_logits(nets.critic, x, t, torch.randn(4, 1, 8, 8), torch.zeros(4).long())
        NonSaturating().generator(told).backward()
    assert float(x.grad.abs().max()) > 0
    assert all(p.grad is None for p in [*nets.critic.parameters(), *nets.discriminator.parameters()])


def test_without_gan_and_ratio_one_the_student_gradient_is_dmds() -> None:
    """With gan_weight 0 and one critic step, the update is the surrogate of the DMD vector at the same draws."""
    method = DMD2(gan_weight=0.0, critic_steps=1)
    nets = method.networks(Start(teacher_network()))
    assert "discriminator" not in dict(nets.named_children())
    (update, *_) = method.updates(nets, batch_of(seed=3), Progress())
    update.loss.backward()
    got = [p.grad.clone() for p in nets.student.parameters() if p.grad is not None]
    nets.zero_grad(set_to_none=True)

    batch = batch_of(seed=3)
    batch.rng.shared_integer(0, 1)
    noise = batch.rng.normal_like(batch.x)
    top = torch.tensor(nets.student.schedule.t_max, dtype=F64)
    x = nets.student.to_data(align(nets.student.schedule.sigma(top), noise) * noise, float(top), batch.cond)
    t = Own(0.02, 0.98).draw(nets.teacher.schedule, 6, batch.rng)
    x_t = nets.teacher.schedule.add_noise(x.detach(), batch.rng.normal_like(x), t)
    with torch.no_grad():
        fake, real = nets.critic(x_t, t, batch.cond), nets.teacher(x_t, t, batch.cond)
        g = (fake - real) / (x - real).abs().mean((1, 2, 3), keepdim=True)
    (0.5 * (x - (x - g).detach()).square().mean()).backward()
    for a, p in zip(got, [p for p in nets.student.parameters() if p.grad is not None], strict=True):
        assert torch.equal(a, p.grad)


def test_the_students_loss_at_the_same_draws_with_a_gan() -> None:
    """The adversarial term is *added*, with its weight: ``gan_weight softplus(-l(x_tau))`` at a time of the whole
    range, drawn after those of the matching."""
    method = DMD2(gan_weight=0.5)
    nets = method.networks(Start(teacher_network()))
    batch = batch_of(seed=5)
    loss, logs = method.student_loss(nets, batch, batch.x)
    again = batch_of(seed=5)
    plain, _ = DMD2(gan_weight=0.0).student_loss(nets, again, again.x)
    tau = nets.teacher.schedule.own_time(again.rng.uniform(6, low=0.0, high=1.0))
    fake = nets.discriminator.noised_logits(nets.critic, again.x, tau, again.rng.normal_like(again.x), again.cond)
    expected = torch.log1p(torch.exp(-fake)).mean()
    torch.testing.assert_close(logs["gan"], expected.detach())
    torch.testing.assert_close(loss.detach(), plain.detach() + 0.5 * expected.detach())


def test_the_gan_pulls_samples_towards_what_passes_for_data() -> None:
    """A head whose logit rises with x: the non-saturating loss moves x upwards, by ``sigmoid(-l) / n`` a sample; at a
    logit of 0 it is log 2."""
    x = torch.tensor([-3.0, 0.0, 2.0], dtype=F64, requires_grad=True)
    NonSaturating().generator(x).backward()
    torch.testing.assert_close(x.grad, -torch.sigmoid(-x.detach()) / 3)
    assert float(NonSaturating().generator(torch.zeros(4, dtype=F64))) == pytest.approx(math.log(2))


def test_the_critics_loss_at_the_same_draws() -> None:
    """Denoising of the student's samples plus the weighted discriminator loss: data and samples at the same times of
    the whole range, with noises of their own."""
    method = DMD2(gan_weight=0.5, discriminator_weight=0.25)
    nets = method.networks(Start(teacher_network()))
    batch, x = batch_of(seed=6), batch_of(seed=7).x
    loss, logs = method.critic_loss(nets, batch, x)
    again = batch_of(seed=6)
    denoising = critic_loss(nets.critic, x, again.cond, again.rng)
    tau = nets.critic.schedule.own_time(again.rng.uniform(6, low=0.0, high=1.0))
    noises = [again.rng.normal_like(x) for _ in range(2)]
    game = nets.discriminator
    real, fake = (
        game.noised_logits(nets.critic, y, tau, n, again.cond) for y, n in zip((again.x, x), noises, strict=True)
    )
    expected = denoising + 0.25 * (torch.log1p(torch.exp(-real)) + torch.log1p(torch.exp(fake))).mean()
    torch.testing.assert_close(loss, expected)
    assert float(logs["discriminator_accuracy"]) == pytest.approx(float(((real > 0).sum() + (fake <= 0).sum()) / 12))


def test_accuracy_counts_both_kinds() -> None:
    """Real above 0 and fake at most 0 are told right; a logit of exactly 0 is called fake."""
    real, fake = torch.tensor([1.0, 0.0, -1.0, 2.0]), torch.tensor([-1.0, 0.0, 3.0, 4.0])
    assert float(accuracy(real, fake)) == 4 / 8


def test_two_time_scales() -> None:
    """The critic moves in every iteration, the student in one of critic_steps."""
    method = DMD2(critic_steps=3)
    nets = method.networks(Start(teacher_network()))
    groups = [[u.group for u in method.updates(nets, batch_of(), Progress(step=k))] for k in range(6)]
    assert groups == [["student", "critic"], ["critic"], ["critic"]] * 2


class Score(nn.Module):
    """``F`` of N(mean, 1) on TrigFlow with sigma_data 1, the mean learned: ``dx/dt = -mean sin t``."""

    def __init__(self, mean: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean, dtype=F64))

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: object = None) -> torch.Tensor:
        return (-self.mean * t.sin())[:, None].expand_as(x)


class Shift(Score):
    """A generator of N(mean, 1): where there is nothing but noise, the data prediction is ``x + mean``."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: object = None) -> torch.Tensor:
        return -x - self.mean


def course_of_the_mean(critic_steps: int, iterations: int = 240) -> list[float]:
    """The student's mean as DMD2 moves it from 0 towards the teacher's 1, by plain gradient descent."""
    schedule = TrigFlow(sigma_data=1.0)
    student, critic, teacher = (
        NetworkDenoiser(net, schedule, TrigPrediction(sigma_data=1.0), (16,))
        for net in (Shift(0.0), Score(0.0), Score(1.0))
    )
    nets = Networks({"student": Jump(student), "critic": critic, "teacher": teacher}, two_optimizers(1.0, 1.0, 1.0, 0))
    moved = {"student": (student.net.mean, 0.1), "critic": (critic.net.mean, 0.05)}
    course = []
    for step in range(iterations):
        batch = Batch(torch.zeros(64, 16, dtype=F64), None, Rng(0, step))
        for update in DMD2(gan_weight=0.0, critic_steps=critic_steps).updates(nets, batch, Progress(step)):
            mean, lr = moved[update.group]
            mean.data -= lr * torch.autograd.grad(update.loss, mean)[0]
        course.append(float(student.net.mean.detach()))
    return course


def test_a_student_in_step_with_its_critic_runs_past_the_teacher() -> None:
    """With rates a and k the means obey ``b' = -(a/R)(m - 1)``, ``m' = k (b - m)``, an oscillator whose damping grows
    as the root of R: at R = 1 the student passes the teacher by almost half, at 5 it comes to rest there, moved a fifth
    as often."""
    together, five = course_of_the_mean(1), course_of_the_mean(5)
    assert max(together) > 1.3 and max(five) < 1.05
    assert all(abs(mean - 1) < 0.05 for mean in five[160:])


def test_discriminator_optimum_is_the_log_density_ratio() -> None:
    """For two Gaussians of equal variance the discriminator loss is stationary at ``l = log p - log q``, which is
    linear; quadrature over both densities."""
    mp, mq, v = 0.8, -0.5, 1.3
    y = torch.linspace(-12, 12, 4001, dtype=F64)
    p, q = (torch.exp(-((y - m) ** 2) / (2 * v)) for m in (mp, mq))
    slope = torch.tensor((mp - mq) / v, dtype=F64, requires_grad=True)
    offset = torch.tensor((mq**2 - mp**2) / (2 * v), dtype=F64, requires_grad=True)
    told = slope * y + offset
    # the loss takes means, so each sample is weighted by its density through importance in the logit's loss
    soft = torch.nn.functional.softplus
    loss = (q * soft(told)).sum() / q.sum() + (p * soft(-told)).sum() / p.sum()
    loss.backward()
    assert abs(float(slope.grad)) < 1e-9 and abs(float(offset.grad)) < 1e-9
    a, b = torch.randn(7, dtype=F64), torch.randn(5, dtype=F64)
    torch.testing.assert_close(NonSaturating().discriminator(a, b), soft(-a).mean() + soft(b).mean())


@pytest.mark.parametrize("steps", [1, 4])
def test_backward_simulation_is_inference(steps: int) -> None:
    """The training sample at index j is exactly what inference computes at its j-th call, and only that call has a
    graph."""
    method = DMD2(steps=steps, gan_weight=0.0)
    nets = method.networks(Start(teacher_network()))
    plan = method.plan(nets)
    seen = set()
    for seed in range(8):
        batch = batch_of(seed=seed)
        x = method.draw(nets, batch, trainable=True)
        again = batch_of(seed=seed)
        j = again.rng.shared_integer(0, steps)
        seen.add(j)
        calls: list[Call] = []
        noise = again.rng.normal_like(again.x)
        rollout(nets.student, noise, Plan(plan.times, 1.0), again.cond, again.rng, calls=calls)
        assert torch.equal(calls[j].out.detach(), x.detach())
        assert x.requires_grad
    assert len(seen) == min(steps, len(seen)) and (steps == 1 or len(seen) > 1)
