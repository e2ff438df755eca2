"""FreeFlow's prediction: its identity at the map of a Gaussian, its weight, and what only the prior sees."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.data import Dataset, Prior
from fewstep.denoisers import NetworkDenoiser, OnSchedule
from fewstep.exact import Gaussian, GuidedGaussian
from fewstep.exact.world import ExactFlowMap
from fewstep.flow_maps import FlowMap
from fewstep.methods.flow_maps.free_flow import FreeFlow, followed, one_jump, picked, velocity_gap
from fewstep.methods.method import Batch, Networks, Progress, alone
from fewstep.methods.parts.identities import eulerian, lagrangian
from fewstep.methods.start import Start
from fewstep.networks import MLP
from fewstep.predictions import TrigPrediction, Velocity
from fewstep.randomness import Rng
from fewstep.runs.course import run_recipe
from fewstep.sampling import sample
from fewstep.sampling.rollout import Plan, Student
from fewstep.sampling.search import best_noise
from fewstep.schedules import FlowMatching, ShiftedFlow, TrigFlow, as_time
from fewstep.training.budget import Budget
from fewstep.training.settings import Settings

F64 = torch.float64
M, C = 0.7, 0.5
WORLD = Gaussian(FlowMatching(), torch.full((1,), M, dtype=F64), C**2)


class Closed(FlowMap):
    """``F(z, d) = (d m + (sqrt(d^2 c^2 + (1 - d)^2) - 1) z) / d``, with the sign of velocities from data to noise."""

    def __init__(self, off: float = 0.0) -> None:
        super().__init__(FlowMatching(), (1,), None)
        self.off = off

    def forward(self, x: Tensor, t: Any, s: Any, cond: Any = None, **extras: Tensor) -> Tensor:
        t, s = as_time(t, x), as_time(s, x)
        return self.schedule.move(x, self.mean_velocity(x, t, s), t, s)

    def mean_velocity(self, x: Tensor, t: Any, s: Any, cond: Any = None, **extras: Tensor) -> Tensor:
        d = (1 - s)[:, None]
        return -(d * M + (torch.sqrt(d**2 * C**2 + (1 - d) ** 2) - 1) * x) / d + self.off * d * x


def noise(n: int = 12) -> tuple[Tensor, Tensor]:
    z = torch.special.ndtri((torch.arange(n, dtype=F64) + 0.5) / n)[:, None]
    return z, torch.linspace(0.02, 0.95, n, dtype=F64)


def test_the_closed_form_of_a_gaussian_fulfils_the_identity() -> None:
    """``v_G = u`` to 1e-10 at the map of a Gaussian, whose end is ``m + c z``; 1 % beside it, it is not.  By a
    difference of the path what is left halves with its length."""
    z, s = noise()
    one, exact = torch.ones_like(s), Closed()
    torch.testing.assert_close(exact(z, one, 0 * s), M + C * z, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        exact.mean_velocity(z, one, s), ExactFlowMap(WORLD).mean_velocity(z, one, s), rtol=0, atol=1e-10
    )
    assert float(lagrangian(exact, z, one, s, WORLD).g.abs().max()) < 1e-10
    assert float(lagrangian(Closed(0.01), z, one, s, WORLD).g.abs().max()) > 5e-3
    coarse, fine = (float(followed(exact, z, 0.9 * s, WORLD, step=step).g.abs().max()) for step in (0.02, 0.01))
    assert 1.8 < coarse / fine < 2.2


class Slope(nn.Module):
    """``F(z, s)`` affine in ``z`` with polynomials of the time: the least student."""

    def __init__(self, degree: int = 4) -> None:
        super().__init__()
        self.schedule = FlowMatching()
        self.a, self.b = (nn.Parameter(torch.zeros(degree + 1, dtype=F64)) for _ in range(2))

    def mean_velocity(self, x: Tensor, t: Tensor, s: Tensor, cond: Any = None, **extras: Tensor) -> Tensor:
        powers = torch.cos(torch.arange(len(self.a)).to(s) * torch.acos((2 * s - 1).clamp(-1, 1) * 0.999999)[:, None])
        return (powers @ self.a)[:, None] + (powers @ self.b)[:, None] * x


def learned(method: FreeFlow, steps: int = 400) -> tuple[float, float]:
    """Mean and slope of the sample after training from zero, without a sample."""
    student = Slope()
    nets: Any = SimpleNamespace(student=student, teacher=WORLD)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.03)
    course = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        for update in alone(method.updates(nets, Batch(None, None, Rng(0, step), shape=(32, 1)), Progress())):
            optimizer.zero_grad()
            update.loss.backward()
            optimizer.step()
        course.step()
    with torch.no_grad():
        z = torch.tensor([[0.0], [1.0]], dtype=F64)
        ends = z - student.mean_velocity(z, torch.ones(2), torch.zeros(2, dtype=F64))
    return float(ends[0]), float(ends[1] - ends[0])


def test_training_reaches_the_map() -> None:
    """Near ``m + c z`` from zero, without a sample."""
    assert learned(FreeFlow(power=0.0, correction=0.0)) == pytest.approx((M, C), abs=0.12)


def network(classes: int | None = None) -> NetworkDenoiser:
    torch.manual_seed(0)
    net = MLP((3,), 16, 1, classes).double()
    with torch.no_grad():
        for p in net.parameters():
            p += 0.2 * torch.randn_like(p)
    return NetworkDenoiser(net, FlowMatching(), Velocity(), (3,), classes)


def given(n: int = 8) -> Batch:
    return Batch(torch.zeros(n, 3, dtype=F64), None, Rng(4))


def moved(nets: Networks) -> Networks:
    with torch.no_grad():
        for p in nets.student.parameters():
            p += 0.05
    return nets


@pytest.mark.parametrize("difference", [0.0, 0.1])
def test_the_weight_brings_all_gaps_to_one_size(difference: float) -> None:
    """With k = 1 and a small constant the loss is 1 whatever the network; with k = 0 it is the mean squared gap."""
    nets = moved(FreeFlow().networks(Start(network())))
    for k, eps in ((1.0, 1e-12), (0.0, 1.0)):
        method = FreeFlow(difference=difference, k=k, eps=eps, correction=0.0)
        (update,) = alone(method.updates(nets, given(), Progress()))
        if k:
            assert float(update.loss) == pytest.approx(1.0, abs=1e-6)
        else:
            assert float(update.loss) > 1.05 * float(update.logs["velocity_gap"]) ** 2 > 1e-4


def test_the_student_begins_as_the_teachers_first_step() -> None:
    """At d = 0 the path has the teacher's velocity, to the last bit, and so has every duration before training."""
    method = FreeFlow(difference=0.0)
    nets = method.networks(Start(network()))
    z, one = given().normal(), torch.ones(8, dtype=F64)
    assert torch.equal(nets.student.mean_velocity(z, one, one), nets.teacher.velocity(z, one))
    assert torch.equal(nets.student.mean_velocity(z, one, 0.3 * one), nets.teacher.velocity(z, one))
    assert float(lagrangian(nets.student, z, one, one, nets.teacher).g.abs().max()) < 1e-12
    assert float(lagrangian(moved(nets).student, z, one, one, nets.teacher).g.abs().max()) > 1e-3


@pytest.mark.parametrize("schedule", [TrigFlow(), ShiftedFlow(shift=3.0)], ids=lambda s: type(s).__name__)
def test_any_teacher_is_seen_on_flow_matching(schedule: Any) -> None:
    found = NetworkDenoiser(network().net, schedule, TrigPrediction(), (3,))
    nets = FreeFlow().networks(Start(found))
    assert isinstance(nets.student.denoiser, OnSchedule) and nets.student.schedule == FlowMatching()
    (update, _) = alone(FreeFlow().updates(nets, given(), Progress()))
    assert bool(update.loss.isfinite())


def test_the_weights_do_not_depend_on_data() -> None:
    """Labels are all that is read: no samples, and samples of whatever kind, make the same weights."""
    labels = torch.arange(12) % 2
    torch.manual_seed(0)
    teacher = NetworkDenoiser(MLP((3,), 16, 1, 2), TrigFlow(), TrigPrediction(), (3,), 2)
    settings = Settings(Budget(3), batch=6, precision="fp32")
    for method in (FreeFlow(guidance_range=(1.0, 3.0)), FreeFlow(difference=0.0, guidance=2.0)):
        free = run_recipe(method, teacher, Prior((3,), labels), settings, show=False).model.state_dict()
        for scale in (1.0, 100.0):
            data = Dataset("prior", scale * torch.randn(12, 3), labels)
            other = run_recipe(method, teacher, data, settings, show=False).model.state_dict()
            assert all(torch.equal(value, free[key]) for key, value in other.items())
        other = run_recipe(method, teacher, Prior((3,), 1 - labels), settings, show=False).model.state_dict()
        assert not all(torch.equal(value, free[key]) for key, value in other.items())


class Saturated(FlowMap):
    """``F(x, t, s) = c(r) clamp(x, -3, 3)``, ``r`` the time that varies: a student that bends where the prior ends."""

    def __init__(self, coefficients: Tensor, of_target: bool) -> None:
        super().__init__(FlowMatching(), (1,), None)
        self.coefficients, self.of_target = coefficients, of_target

    def forward(self, x: Tensor, t: Any, s: Any, cond: Any = None, **extras: Tensor) -> Tensor:
        t, s = as_time(t, x), as_time(s, x)
        return self.schedule.move(x, self.mean_velocity(x, t, s), t, s)

    def mean_velocity(self, x: Tensor, t: Any, s: Any, cond: Any = None, **extras: Tensor) -> Tensor:
        r = s if self.of_target else t
        return (self.features(x, r) @ self.coefficients)[:, None]

    def features(self, x: Tensor, r: Tensor) -> Tensor:
        return x.clamp(-3, 3) * torch.stack([(2 * r - 1) ** k for k in range(len(self.coefficients))], 1)


def settled(direction: Any, of_target: bool, x: Tensor, r: Tensor, degree: int = 6) -> Tensor:
    """The coefficients at which training stands still, ``E[features g] = 0``: ``g`` is affine in them."""
    eye = torch.eye(degree + 1, dtype=F64)
    zero = direction(Saturated(0 * eye[0], of_target))
    columns = torch.cat([direction(Saturated(e, of_target)) - zero for e in eye], 1)
    features = Saturated(eye[0], of_target).features(x, r)
    return torch.linalg.solve(features.T @ columns, -(features.T @ zero)[:, 0])


def test_where_training_stands_still() -> None:
    """For a linear student of a Gaussian the exact derivative ends at the map, a difference within its first order."""
    r = ((torch.arange(64, dtype=F64) + 0.5) / 64).repeat_interleave(16)
    z = torch.special.ndtri((torch.arange(16, dtype=F64) + 0.5) / 16).repeat(64)[:, None]
    world = Gaussian(FlowMatching(), torch.zeros(1, dtype=F64), C**2)
    one = torch.ones_like(r)

    def off(direction: Any, r: Tensor) -> float:
        found = settled(direction, True, z, r)
        made = Saturated(found, True)(torch.ones(1, 1, dtype=F64), 1.0, 0.0)
        return float((made - C).abs())

    assert off(lambda f: lagrangian(f, z, one, r, world).g, r) < 2e-3

    def by_steps(step: float) -> float:
        return off(lambda f: followed(f, z, (1 - step) * r, world, step=step).g, (1 - step) * r)

    coarse, fine = by_steps(0.1), by_steps(0.05)
    assert 0.01 < fine < 0.05 < coarse < 0.1


def test_only_the_prior_is_right_under_guidance() -> None:
    """Teacher-data mismatch on a line.  The teacher is guided from wide data (standard deviation 4) to a narrow class;
    a student that can be linear over the prior, and bends outside, fits it.  Trained at noised data, most of which lie
    where the guided teacher never is, its one-step map is wrong; the more, the more the data are spread.  From the
    prior it reaches the power law of the guided teacher."""
    schedule, quantile = FlowMatching(), torch.special.ndtri((torch.arange(64, dtype=F64) + 0.5) / 64)
    r = ((torch.arange(64, dtype=F64) + 0.5) / 64).repeat_interleave(64)
    z = quantile.repeat(64)[:, None]
    world = GuidedGaussian(schedule, (1,), 0.25, 16.0, 2.0)
    one, noise = torch.ones_like(r), quantile[:, None]
    exact = world.flow(noise, 1.0, 0.0)

    def error(coefficients: Tensor, of_target: bool) -> float:
        time = torch.ones(64, dtype=F64)
        got = Saturated(coefficients, of_target)(noise, time, 0 * time)
        return float((got - exact).square().mean().sqrt() / exact.square().mean().sqrt())

    def from_data(spread: float) -> float:
        x = torch.sqrt((1 - r) ** 2 * spread**2 + r**2)[:, None] * z
        v = world.velocity(x, r)
        return error(settled(lambda f: eulerian(f, x, r, 0 * r, v).g, False, x, r), False)

    from_prior = error(settled(lambda f: lagrangian(f, z, one, r, world).g, True, z, r), True)
    own, data, augmented = from_data(0.5), from_data(4.0), from_data(8.0)
    assert from_prior < 0.005 and own < 0.005
    assert data > 1 and augmented > 3 * data


class Affine(FlowMap):
    """``f(z, 1) = mu + kappa z``, and a straight line to it."""

    def __init__(self, mu: float, kappa: float) -> None:
        super().__init__(FlowMatching(), (1,), None)
        self.mu, self.kappa = (nn.Parameter(torch.tensor(v, dtype=F64)) for v in (mu, kappa))

    def forward(self, x: Tensor, t: Any, s: Any, cond: Any = None, **extras: Tensor) -> Tensor:
        return self.schedule.move(x, self.mean_velocity(x, t, s), as_time(t, x), as_time(s, x))

    def mean_velocity(self, x: Tensor, t: Any, s: Any, cond: Any = None, **extras: Tensor) -> Tensor:
        return x - (self.mu + self.kappa * x)


def test_the_correction_alone_finds_the_law() -> None:
    """With the exact velocity of the samples, plain descent takes ``mu + kappa z`` from (-0.5, 1.3) to ``m + c z``; at
    the start the gap is ``-(mu - m) r / S(r)^2`` on average."""
    student = Affine(-0.5, 1.3)
    z = torch.special.ndtri((torch.arange(256, dtype=F64) + 0.5) / 256)[:, None]
    for step in range(200):
        rng = Rng(step)
        f, x = one_jump(student, z, None, {})
        assert torch.equal(x, z - f)
        own = Gaussian(FlowMatching(), student.mu.detach().reshape(1), float(student.kappa.detach()) ** 2)
        r = torch.sigmoid(0.8 + rng.normal(len(z), dtype=F64))
        gap = velocity_gap(own, WORLD, x, rng.normal_like(z), r, None)
        if not step:
            same = Gaussian(FlowMatching(), torch.full((1,), -0.5, dtype=F64), C**2)
            at = velocity_gap(same, WORLD, x, z, r, None)
            expected = -(-0.5 - M) * r / ((1 - r) ** 2 * C**2 + r**2)
            torch.testing.assert_close(at, expected[:, None])
        slopes = torch.autograd.grad((f * gap).mean(), list(student.parameters()))
        with torch.no_grad():
            for p, slope in zip(student.parameters(), slopes, strict=True):
                p -= 0.2 * slope
    assert (float(student.mu), float(student.kappa)) == pytest.approx((M, C), abs=0.01)


def test_the_correction_has_the_size_of_the_prediction() -> None:
    """Of a batch of eight two rows correct; their gap is scaled to the size of the weighted prediction, ``alpha``
    times; the second network moves after, on the samples."""
    nets = FreeFlow().networks(Start(network()))
    moved(nets)
    with torch.no_grad():
        for p in nets.critic.parameters():
            p += 0.1
    scales = []
    for alpha in (0.1, 0.05):
        updates = alone(FreeFlow(alpha=alpha).updates(nets, given(), Progress()))
        first = next(updates)
        nets.zero_grad(set_to_none=True)
        first.loss.backward()
        assert all(p.grad is None for p in nets.critic.parameters())
        scales.append(float(first.logs["correction_scale"]))
        second = next(updates)
        assert second.group == "critic"
        nets.zero_grad(set_to_none=True)
        second.loss.backward()
        assert all(p.grad is None for p in nets.student.parameters())
    assert scales[0] == pytest.approx(2 * scales[1]) and scales[0] > 0
    chosen = torch.tensor([True, False, True])
    assert picked(chosen)[0].tolist() == [0, 2] and picked(~chosen & False)[1].tolist() == [0.0]


def test_the_best_noise_is_found() -> None:
    """Of several noises the one whose sample scores best, for every sample by itself, and the search repeats."""
    student = Student(Closed(), {1: Plan((1.0,))}).double()
    few, _ = best_noise(student, lambda x, cond: x[:, 0], 6, of=2)
    many, cond = best_noise(student, lambda x, cond: x[:, 0], 6, of=40)
    assert cond is None and many.shape == (6, 1) and bool((many >= few).all()) and bool((many > few).any())
    assert torch.equal(many, best_noise(student, lambda x, cond: x[:, 0], 6, of=40)[0])
    least, _ = best_noise(student, lambda x, cond: -x[:, 0], 6, of=40)
    assert float(least.max()) < -1 < 1 < float(many.min())
    ends = sample(WORLD, 6, noise=many.double(), solver="heun", steps=64)
    torch.testing.assert_close(ends, student(many.double()), rtol=0, atol=5e-3)
    with pytest.raises(ValueError, match="of=0 must be at least 1"):
        best_noise(student, lambda x, cond: x[:, 0], 6, of=0)


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ValueError, match="difference=1 must be below 1"):
        FreeFlow(difference=1.0)
    with pytest.raises(ValueError, match=r"guidance_range=\(3.0, 1.0\) must be two scales"):
        FreeFlow(guidance_range=(3.0, 1.0))
    assert dataclasses.replace(FreeFlow(), difference=0.5).difference == 0.5


#: The power of the weight is said in the paper's page, nothing else where we could read it.
PUBLISHED = {
    **dict.fromkeys(
        ("lr", "guidance", "guidance_range", "eps", "power", "difference", "alpha", "noise_std", "critic_lr"), ...),
    "k": 1.0, "correction": 0.25, "noise_mean": 0.8,  # a note on the paper
    "optimizer": dict.fromkeys(("kind", "betas", "eps", "weight_decay", "clip", "warmup", "decay"), ...),
}  # fmt: skip
