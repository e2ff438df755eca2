"""Phased DMD: critics of laws that are known by noisy states only, experts that end at their phase, and the chain."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.data import Prior
from fewstep.denoisers import Denoiser, NetworkDenoiser
from fewstep.exact import FiniteData, Gaussian, GaussianMixture
from fewstep.flow_maps import FlowMap
from fewstep.methods.matching.phased_dmd import Phase, PhasedDMD, by_divergence
from fewstep.methods.method import Batch, Networks, Progress
from fewstep.methods.parts.score_matching import (
    denoising_loss,
    interval_denoising_loss,
    interval_target,
    known_at,
    matching_vector,
    noised_from,
)
from fewstep.methods.start import Start
from fewstep.networks import MLP
from fewstep.predictions import TrigPrediction, Velocity
from fewstep.randomness import Rng
from fewstep.runs.course import run_recipe
from fewstep.sampling.rollout import rollout
from fewstep.schedules import EDM, FlowMatching, Schedule, TrigFlow, VPLinear
from fewstep.training.budget import Budget
from fewstep.training.settings import Settings

F64 = torch.float64
SCHEDULES = [FlowMatching(), VPLinear(), EDM(), TrigFlow(sigma_data=0.7)]

PUBLISHED: dict[str, Any] = {
    # paper: two phases of two steps, five critic updates; LightX2V, configs/train/phased_dmd: rates of full training,
    # guidance of 4 to 5, AdamW, a constant rate; its loss has DMD's weight, on samples of the call with the gradient
    "phases": 2, "steps": 2, "critic_steps": 5, "weight": "distance", "early_exit": True, "bound": 10.0,
    "guidance": 4.0, "lr": 2e-6, "critic_lr": 4e-7, "clip": 10.0, "warmup": ...,
    "optimizer": {
        "kind": "adamw", "betas": (0.0, 0.999), "eps": 1e-8, "weight_decay": 0.01, "clip": 10.0, "warmup": ...,
        "decay": "constant",
    },
}  # fmt: skip


def time(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64)


def levels(schedule: Schedule) -> tuple[Tensor, Tensor]:
    """A time in the middle of the levels and a noisier one."""
    s, t = schedule.own_time(torch.tensor([0.5, 0.8], dtype=F64))
    return s, t


def posterior(schedule: Schedule, points: Tensor, x_t: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of data ``points`` ``[N]``, equally probable, given ``x_t``: their probabilities, the mean of ``x_s`` with each,
    and the noise that goes with that mean."""
    alpha, sigma, a, sd = known_at(schedule, s, t)
    likelihood = -((x_t - schedule.alpha(t) * points) ** 2) / (2 * schedule.sigma(t) ** 2)
    x_s = alpha * points + a * sigma**2 / schedule.sigma(t) ** 2 * (x_t - schedule.alpha(t) * points)
    return likelihood.softmax(0), x_s, (x_t - a * x_s) / sd


def test_the_published_example() -> None:
    """Data at -1, 0, 1, 2, a phase that ends at 0.5, x = 0.3 at 0.8: the velocity is -0.34512, and so is the mean of
    the unbiased target; that of ``n - x_s`` is -0.09328."""
    schedule, points = FlowMatching(), torch.tensor([-1.0, 0.0, 1.0, 2.0], dtype=F64)
    s, t, x_t = time(0.5), time(0.8), time(0.3)
    share, x_s, n = posterior(schedule, points, x_t, s, t)
    world = FiniteData(schedule, points[:, None])
    true = float(world.velocity(x_t.reshape(1, 1), t[None]))
    unbiased = (x_t - interval_target(schedule, x_s, s, t, n)) / t  # u = (x_t - D) / t
    assert true == pytest.approx(-0.34512, abs=5e-6)
    assert float((share * unbiased).sum()) == pytest.approx(true, abs=1e-15)
    assert float((share * (n - x_s)).sum()) == pytest.approx(-0.09328, abs=5e-6)
    paper = (0.5**2 * 0.8 + 0.2 * 0.5**2) / (0.5**2 * math.sqrt(0.8**2 - (0.4 * 0.5) ** 2)) * n - x_s / 0.5
    torch.testing.assert_close(unbiased, paper, atol=1e-14, rtol=1e-13)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_the_target_is_unbiased_on_every_schedule(schedule: Schedule) -> None:
    """Its mean given ``x_t`` is the exact denoiser; the state on from ``x_s`` has the law of data noised to ``t``."""
    points = torch.tensor([-1.0, 0.0, 1.0, 2.0], dtype=F64)
    s, t = levels(schedule)
    for value in (-0.4, 0.3, 1.9):
        x_t = value * schedule.sigma(t)
        share, x_s, n = posterior(schedule, points, x_t, s, t)
        exact = FiniteData(schedule, points[:, None])(x_t.reshape(1, 1), t[None])
        mean = (share * interval_target(schedule, x_s, s, t, n)).sum()
        torch.testing.assert_close(mean, exact.squeeze(), atol=1e-13, rtol=1e-12)
    alpha, sigma, a, sd = known_at(schedule, s, t)
    torch.testing.assert_close(a * alpha, schedule.alpha(t), atol=0, rtol=1e-14)
    torch.testing.assert_close((a * sigma) ** 2 + sd**2, schedule.sigma(t) ** 2, atol=0, rtol=1e-13)
    x, n = Rng(0).normal(4, 2, dtype=F64), Rng(1).normal(4, 2, dtype=F64)
    torch.testing.assert_close(noised_from(schedule, x, s, t.expand(4), n), a * x + sd * n, atol=0, rtol=1e-13)


def teacher(
    schedule: Schedule | None = None, kind: torch.dtype = F64, classes: int | None = 3, seed: int = 0
) -> NetworkDenoiser:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        net = MLP((3,), 16, 1, classes)
        for p in net.parameters():
            p.data += 0.1 * torch.randn_like(p)
    prediction = TrigPrediction(sigma_data=0.7)
    return NetworkDenoiser(net, schedule or TrigFlow(sigma_data=0.7), prediction, (3,), classes).to(kind)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_from_data_it_is_the_denoising_loss(schedule: Schedule) -> None:
    """Where states are known at ``t_min``, the last phase's end, to the last bit; not where they are known later."""
    model, x = teacher().on(schedule), Rng(1).normal(6, 3, dtype=F64)
    t = schedule.own_time(torch.linspace(0.6, 0.9, 6, dtype=F64))
    plain = denoising_loss(model, x, t, None, Rng(2))
    assert torch.equal(interval_denoising_loss(model, x, time(schedule.t_min), t, None, Rng(2)), plain)
    assert not torch.isclose(interval_denoising_loss(model, x, levels(schedule)[0], t, None, Rng(2)), plain, rtol=1e-3)


def test_the_bound_weighs_what_comes_near_the_end_of_the_phase() -> None:
    """``min(1, bound sigma_{t|s}^2)`` a sample."""
    model, x, schedule = teacher(), Rng(1).normal(6, 3, dtype=F64), TrigFlow(sigma_data=0.7)
    s, t = time(0.8), torch.linspace(0.801, 1.5, 6, dtype=F64)
    by_hand = []
    for k in range(6):
        n = Rng(2).normal(6, 3, dtype=F64)[k : k + 1]
        x_t = noised_from(schedule, x[k : k + 1], s, t[k : k + 1], n)
        f = model.affine(x_t, t[k : k + 1])
        target = (interval_target(schedule, x[k : k + 1], s, t[k : k + 1], n) - f[0] * x_t) / f[1]
        by_hand.append((f[2] - target).square().mean() * min(1.0, 3.0 * float(known_at(schedule, s, t[k])[3]) ** 2))
    loss = interval_denoising_loss(model, x, s, t, None, Rng(2), bound=3.0)
    torch.testing.assert_close(loss, torch.stack(by_hand).mean(), atol=1e-14, rtol=1e-12)
    assert float(loss) < 0.9 * float(interval_denoising_loss(model, x, s, t, None, Rng(2)))


class Noised(Denoiser):
    """The exact critic of states ``N(mean, variance)`` at ``s``: the score of what they are noised to, as data."""

    def __init__(self, schedule: Schedule, mean: Tensor, variance: Tensor, s: Tensor) -> None:
        super().__init__(schedule, (1,))
        self.law = mean, variance, s

    def forward(self, x: Tensor, t: Any, cond: Any = None) -> Tensor:
        mean, variance, s = self.law
        _, _, a, sd = known_at(self.schedule, s, t)
        score = (a * mean - x[:, 0]) / (a**2 * variance + sd**2)
        return ((x[:, 0] + self.schedule.sigma(t) ** 2 * score) / self.schedule.alpha(t))[:, None]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_the_vector_is_the_gradient_of_the_reverse_kl_in_the_state(schedule: Schedule) -> None:
    """With exact scores the mean of ``g`` over states at ``s`` is d KL(noised states | noised data) by their mean; on
    flow matching every ``g`` is the paper's ``alpha_t alpha_{t|s} / sigma_t (u_teacher - u_critic)``."""
    s, t = levels(schedule)
    m, spread, mean, variance = time(0.4), 0.7, time(-0.3), time(0.9) * schedule.sigma(s) ** 2
    world, critic = Gaussian(schedule, m[None], spread**2), Noised(schedule, mean, variance, s)
    signs = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]], dtype=F64)  # exact: scores are affine
    x_s, times = mean + variance.sqrt() * signs[:, :1], t.expand(4)
    x_t = noised_from(schedule, x_s, s, times, signs[:, 1:])
    g = matching_vector(x_s, x_t, times, world, critic, weight=by_divergence(s))
    mean.requires_grad_()
    _, _, a, sd = known_at(schedule, s, t)
    of_data = schedule.alpha(t) ** 2 * spread**2 + schedule.sigma(t) ** 2
    of_states = a**2 * variance + sd**2
    kl = (of_states + (a * mean - schedule.alpha(t) * m) ** 2) / (2 * of_data) + (of_data / of_states).log() / 2
    kl.backward()
    torch.testing.assert_close(g.mean(), mean.grad, atol=1e-13, rtol=1e-10)
    if schedule == FlowMatching():
        w = (1 - t) * (1 - t) / (1 - s) / t
        u = [(x_t - d(x_t, times)) / t for d in (world, critic)]
        torch.testing.assert_close(g, w * (u[0] - u[1]).detach(), atol=1e-13, rtol=1e-11)


class Affine(FlowMap):
    """An expert ``scale x + shift``, wherever it is to go."""

    def __init__(self, schedule: Schedule, scale: float = 0.7) -> None:
        super().__init__(schedule, (1,), None)
        self.scale, self.shift = nn.Parameter(time(scale)), nn.Parameter(time(0.0))

    def forward(self, x: Tensor, t: Any, s: Any, cond: Any = None, **extras: Tensor) -> Tensor:
        return self.scale * x + self.shift


def test_a_chain_of_two_experts_fits_a_gaussian() -> None:
    """Linear experts with exact critics: the first makes the law of the noised data at its end, the second of what that
    makes the data, both exactly, because the gradient of every sample is 0 there."""
    schedule, m, spread = FlowMatching(), 0.6, 0.4
    world, made = Gaussian(schedule, torch.tensor([m], dtype=F64), spread**2), dict[str, nn.Module]()
    mean, variance = time(0.0), time(1.0)
    for index in range(2):
        method = Phase(index=index, steps=1, weight="kl")
        s = time(method.end(schedule))
        assert float(s) == (0.5, 0.0)[index]
        student, rng = Affine(schedule), Rng(index)
        optimiser = torch.optim.Adam(student.parameters(), 3e-2, betas=(0.0, 0.99))
        for step in range(300):
            optimiser.param_groups[0]["lr"] = 3e-2 * (1 - step / 300)
            law = (student.scale * mean + student.shift).detach(), (student.scale**2 * variance).detach()
            nets = Networks({"student": student, "critic": Noised(schedule, *law, s), "teacher": world, **made}, {})
            student.requires_grad_(True)
            batch = Batch(None, None, rng, shape=(64, 1))
            loss, _ = method.student_loss(nets, batch, *method.draw(nets, batch, trainable=True))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        mean, variance = (student.scale * mean + student.shift).detach(), (student.scale**2 * variance).detach()
        assert float(mean) == pytest.approx((1 - float(s)) * m, abs=1e-4)
        assert float(variance) == pytest.approx(((1 - float(s)) * spread) ** 2 + float(s) ** 2, abs=1e-4)
        made[f"expert-{index}"] = student


def test_a_network_learns_the_flow_above_the_end_of_its_phase() -> None:
    """A network trained at t in (0.5, 1] on states at 0.5 alone carries noise to where the exact flow carries it; one
    trained on ``n - x_s`` does not."""
    schedule, s = FlowMatching(), time(0.5)
    world = GaussianMixture(schedule, torch.ones(2), torch.tensor([[-1.0], [1.5]]), torch.full((2,), 0.01))
    quantiles = torch.distributions.Normal(0.0, 1.0).icdf(torch.linspace(0.05, 0.95, 19, dtype=F64))[:, None]
    exact = world.flow(quantiles, 1.0, 0.5)
    gaps = {}
    for naive in (False, True):
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            model = NetworkDenoiser(MLP((1,), 32, 2), schedule, Velocity(), (1,)).double()
        optimiser, rng = torch.optim.Adam(model.parameters(), 3e-3), Rng(0)
        for step in range(400):
            optimiser.param_groups[0]["lr"] = 3e-3 * (1 - step / 400)
            x_s = schedule.add_noise(world.sample(256, rng), rng.normal(256, 1, dtype=F64), s.expand(256))
            t = 0.52 + 0.48 * rng.uniform(256)
            if naive:
                n = rng.normal_like(x_s)
                x_t = noised_from(schedule, x_s, s, t, n)
                loss = (model.affine(x_t, t)[2] - (n - x_s)).square().mean()
            else:
                loss = interval_denoising_loss(model, x_s, s, t, None, rng)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        x, times = quantiles, torch.linspace(1.0, 0.5, 33, dtype=F64)
        with torch.no_grad():
            for t, r in pairwise(times):
                x = x + (r - t) * model.velocity(x + (r - t) / 2 * model.velocity(x, t), (t + r) / 2)
        gaps[naive] = float((x - exact).abs().mean())
    assert gaps[False] < 0.02 and gaps[True] > 0.05, gaps


def batch(seed: int = 3, n: int = 6) -> Batch:
    return Batch(None, torch.arange(n) % 3, Rng(seed, "phases"), shape=(n, 3))


def drawn(seed: int) -> tuple[int, Tensor]:
    """What a batch draws first: which of two calls has the gradient, and the noise."""
    rng = batch(seed).rng
    return rng.shared_integer(0, 2), rng.normal(6, 3, dtype=F64)


def at_phase(index: int, **fields: Any) -> tuple[Phase, Networks]:
    """A method at one of three phases, with other experts before it, and a student that is not the teacher any more."""
    method = Phase(index=index, phases=3, **fields)
    made = {f"expert-{k}": teacher(seed=1 + k) for k in range(index)}
    nets = method.networks(Start(teacher(), made=made))
    with torch.no_grad():
        for p in nets.group_parameters("student"):
            p += 0.05
    return method, nets


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_phase_goes_on_where_the_experts_before_it_end(index: int, early: bool) -> None:
    """Its states are made by the expert of each time, one call after the other; with the early exit the call that has
    the gradient ends the phase.  The product's own trajectory ends there too when that is the last call."""
    method, nets = at_phase(index, early_exit=early)
    schedule, cond = nets.student.schedule, batch().cond
    times, end = method.plan(schedule).times, method.end(schedule)
    assert len(times) == 6 and end == (times[2], times[4], schedule.t_min)[index]
    for seed in range(4):
        x_s, x0 = method.draw(nets, batch(seed), trainable=True)
        call, noise = drawn(seed)
        state = schedule.prior(noise)
        last = 2 * index + (call if early else 1)
        for k in range(last + 1):
            expert = nets.student if k >= 2 * index else nets.get_submodule(f"expert-{k // 2}")
            to = end if k == last else times[k + 1]
            predicted = expert.predict(state, times[k], to, cond)
            state = expert.jump(state, times[k], to, cond)
        torch.testing.assert_close(x_s, state, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(x0, predicted.detach(), atol=1e-11, rtol=1e-10)
        assert x_s.requires_grad and not x0.requires_grad
        assert not method.draw(nets, batch(seed), trainable=False)[0].requires_grad
        if last == 2 * index + 1:
            product = method.student(nets)
            whole = rollout(product.flow_map, noise, product.plan(), cond, stop=last, end=end if index < 2 else None)
            torch.testing.assert_close(whole, x_s, atol=1e-12, rtol=1e-12)
    assert {drawn(seed)[0] for seed in range(4)} == {0, 1}


def test_the_gradient_is_that_of_one_call() -> None:
    """Of the first of two, which the second passes on without one of its own; experts before it have none."""
    method, nets = at_phase(1, early_exit=False)
    seed = next(seed for seed in range(9) if drawn(seed)[0] == 0)
    x_s, _ = method.draw(nets, batch(seed), trainable=True)
    weights = nets.group_parameters("student")
    found = torch.autograd.grad(x_s.square().sum(), weights)
    schedule, cond, times = nets.student.schedule, batch().cond, method.plan(nets.student.schedule).times
    state, before = schedule.prior(drawn(seed)[1]), nets.get_submodule("expert-0")
    for t, s in ((times[0], times[1]), (times[1], times[2])):
        state = before.jump(state, t, s, cond).detach()
    middle = nets.student.jump(state, times[2], times[3], cond)
    entered = middle.detach().requires_grad_()
    (back,) = torch.autograd.grad(nets.student.jump(entered, times[3], times[4], cond).square().sum(), entered)
    for slope, wanted in zip(found, torch.autograd.grad((middle * back).sum(), weights), strict=True):
        torch.testing.assert_close(slope, wanted, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("weight", ["kl", "distance"])
def test_the_students_loss_by_hand(weight: Any) -> None:
    """In the middle phase, with guidance of the teacher alone; DMD's weight measures from the data prediction."""
    method, nets = at_phase(1, weight=weight, guidance=1.5)
    schedule, cond, rng = nets.teacher.schedule, batch().cond, batch().rng
    with torch.no_grad():
        for p in nets.critic.parameters():
            p += 0.05
    x_s, x0 = (Rng(k).normal(6, 3, dtype=F64) for k in range(2))
    x_s.requires_grad_()
    loss, logs = method.student_loss(nets, batch(), x_s, x0)
    s = time(method.end(schedule))
    t = schedule.own_time(rng.uniform(6, low=float(schedule.own_share(s)) + 0.02, high=0.98))
    _, _, a, sd = known_at(schedule, s, t)
    x_t = a[:, None] * x_s.detach() + sd[:, None] * rng.normal(6, 3, dtype=F64)
    with torch.no_grad():
        alone, fake = nets.teacher(x_t, t, torch.full((6,), -1)), nets.critic(x_t, t, cond)
        real = alone + 1.5 * (nets.teacher(x_t, t, cond) - alone)
    w = {"kl": a * schedule.alpha(t) / schedule.sigma(t) ** 2, "distance": 1 / (x0 - real).abs().mean(1)}[weight]
    g = w[:, None] * (fake - real)
    torch.testing.assert_close(torch.autograd.grad(loss, x_s)[0], g / 18, atol=1e-13, rtol=1e-10)
    torch.testing.assert_close(logs["matching_norm"], g.square().mean().sqrt(), atol=1e-13, rtol=1e-10)


@pytest.mark.parametrize("weight", ["kl", "distance"])
def test_at_the_law_of_the_data_every_gradient_is_zero(weight: Any) -> None:
    schedule = FlowMatching()
    world, method = Gaussian(schedule, torch.tensor([0.6], dtype=F64), 0.16), Phase(steps=1, weight=weight)
    student = Affine(schedule, math.sqrt(0.25 * 0.16 + 0.25))
    for shift, zero in ((0.3, True), (0.31, False)):
        student.shift.data.fill_(shift)
        critic = Noised(schedule, student.shift.detach(), student.scale.detach() ** 2, time(0.5))
        nets = Networks({"student": student, "critic": critic, "teacher": world}, {})
        student.requires_grad_(True)
        given = Batch(None, None, Rng(0), shape=(8, 1))
        _, logs = method.student_loss(nets, given, *method.draw(nets, given, trainable=True))
        assert (float(logs["matching_norm"]) < 1e-13) == zero


def test_every_phase_looks_at_all_noisier_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the end of its phase to the noisiest time, and not in its own interval only: 2 % of the index above it and
    up to 98 % in the student's loss; from data on, or 2 % above the end of the phase, in the critic's."""
    asked: list[Tensor] = []
    method, nets = at_phase(1)
    real = nets.critic.net.forward
    monkeypatch.setattr(nets.critic.net, "forward", lambda x, t, cond: (asked.append(t), real(x, t, cond))[1])
    for index in range(3):
        at = dataclasses.replace(method, index=index)
        schedule = nets.critic.schedule
        low = float(schedule.own_share(time(at.end(schedule))))
        x = torch.zeros(2000, 3, dtype=F64)
        given = Batch(None, torch.zeros(2000, dtype=torch.long), Rng(0), shape=(2000, 3))
        at.student_loss(nets, given, x, x)
        at.critic_loss(nets, given, x)
        first, second = (schedule.own_share(t.double()) for t in asked[-2:])
        edge = low + 0.02
        assert edge < float(first.min()) < edge + 0.01 and 0.97 < float(first.max()) < 0.98
        edge = low + (0.02 if index < 2 else 0.0)
        assert edge - 1e-9 < float(second.min()) < edge + 0.01 and 0.99 < float(second.max()) < 1.0


def test_critics_and_experts_start_from_the_teacher() -> None:
    """In every phase; from what the user gave, the experts.  Only the phase's own expert and critic train, the critic
    in every iteration, the expert in one of five."""
    method = Phase(index=1)
    source, other = teacher(), teacher(seed=5)
    nets = method.networks(Start(source, made={"expert-0": teacher(seed=1)}, given={"student": other}))
    for name, wanted in (("critic", source), ("student", other), ("expert-0", teacher(seed=1))):
        found = nets.get_submodule(name).state_dict().values()
        assert all(torch.equal(a, b) for a, b in zip(found, wanted.state_dict().values(), strict=True)), name
    assert {p for g in nets.groups for p in nets.group_parameters(g)} == {
        p for p in nets.parameters() if p.requires_grad
    }
    assert not any(p.requires_grad for p in nets.get_submodule("expert-0").parameters())
    groups = [[u.group for u in method.updates(nets, batch(), Progress(step=k))] for k in range(6)]
    assert groups == [["student", "critic"], *[["critic"]] * 4, ["student", "critic"]]
    assert list(method.hands_on(nets)) == ["expert-1"]


def test_the_product_is_a_mixture_of_experts_over_the_times() -> None:
    """The recipe trains one expert after the other, from conditions alone; what is not trained yet is the teacher."""
    source = teacher(kind=torch.float32)
    stages = PhasedDMD(phases=3, lr=1e-2).stages()
    assert [stage.method for stage in stages] == [Phase(index=k, phases=3, lr=1e-2) for k in range(3)]
    settings = Settings(Budget(6), batch=8, precision="fp32")
    model: Any = run_recipe(
        PhasedDMD(phases=3, critic_steps=1), source, Prior((3,), torch.arange(3)), settings, show=False
    ).model
    experts, plan = model.flow_map.experts, model.plan()
    assert len(experts) == 3 and len(plan.times) == 6 and plan.gamma == 0
    assert model.flow_map.router.bounds == (plan.times[2], plan.times[4])
    weights = [torch.cat([p.flatten() for p in e.parameters()]) for e in experts]
    start = torch.cat([p.flatten() for p in source.parameters()])
    for k, one in enumerate(weights):
        assert not torch.equal(one, start) and not any(torch.equal(one, other) for other in weights[:k])
    nets = at_phase(0)[1]
    unfinished = Phase(phases=3).student(nets)
    assert unfinished.flow_map.experts[0] is nets.student and unfinished.flow_map.experts[2].denoiser is nets.teacher


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"index=2 must be one of 2 phases"):
        Phase(index=2)
    with pytest.raises(ValueError, match=r"phases=64: the first one ends too near the noise"):
        Phase(phases=64).law(FlowMatching(), 0.02, 0.98)
