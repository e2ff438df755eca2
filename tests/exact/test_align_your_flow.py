"""Align Your Flow: its directions against closed forms and finite steps, its samplers, and what training learns."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from fewstep.data import Dataset
from fewstep.denoisers import Denoiser, NetworkDenoiser
from fewstep.exact import Gaussian, GuidedGaussian
from fewstep.exact.world import ExactFlowMap
from fewstep.flow_maps import FlowMap, Jump
from fewstep.guidance import Autoguided, Guided
from fewstep.methods.flow_maps.align_your_flow import AlignYourFlow, Asked, LagrangianAlignYourFlow
from fewstep.methods.method import Batch, Progress
from fewstep.methods.start import Start
from fewstep.networks import MLP, UNet
from fewstep.networks.inputs import TakesInputs
from fewstep.predictions import TrigPrediction, Velocity
from fewstep.randomness import Rng
from fewstep.sampling.rollout import Plan, inner_time, rollout
from fewstep.schedules import FlowMatching, align
from fewstep.training.budget import Budget
from fewstep.training.profiles import Power
from fewstep.training.settings import Settings
from fewstep.training.trainer import train

F64 = torch.float64
FLOW = FlowMatching()
OBJECTIVES = (AlignYourFlow, LagrangianAlignYourFlow)
PLAIN = {"guidance": 1.0, "guidance_low": 1.0, "guidance_high": 1.0}


def jumps(n: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """States ``[n, 3]``, times and target times, all apart."""
    gen = torch.Generator().manual_seed(4)
    s = 0.05 + 0.5 * torch.rand(n, generator=gen, dtype=F64)
    t = s + 0.05 + (0.95 - s) * torch.rand(n, generator=gen, dtype=F64)
    return torch.randn(n, 3, generator=gen, dtype=F64), t, s


def network(classes: int | None = None, extras: tuple[str, ...] = ()) -> NetworkDenoiser:
    """A small network with weights away from their start."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = MLP((3,), 16, 2, classes, extras=extras).double()
        for p in net.parameters():
            p.data += 0.2 * torch.randn_like(p)
    return NetworkDenoiser(net, FLOW, TrigPrediction(sigma_data=0.7), (3,), classes)


def slope_of(flow_map: FlowMap, x: Tensor, t: Tensor, s: Tensor, v: Tensor | None) -> Tensor:
    """``dF/dt`` along the velocity ``v``, or ``dF/ds`` without one."""
    if v is None:
        return torch.func.jvp(lambda s_: flow_map.mean_velocity(x, t, s_), (s,), (torch.ones_like(s),))[1]
    return torch.func.jvp(lambda x_, t_: flow_map.mean_velocity(x_, t_, s), (x, t), (v, torch.ones_like(t)))[1]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_directions_are_zero_at_the_exact_map(objective: type[AlignYourFlow]) -> None:
    """``g`` is below 1e-10 for a Gaussian whose mean is not 0, and for r < 1 what is left of the tangent; a map that is
    off by a hundredth is seen."""
    world = Gaussian(FLOW, torch.tensor([0.3, -1.0, 0.0], dtype=F64), 0.25)
    method, exact, (x, t, s) = objective(**PLAIN), ExactFlowMap(world), jumps()
    asked = Asked(x, t, s, None, {})
    assert float(method.direction(exact, world, asked, 1.0).g.abs().max()) < 1e-10  # type: ignore[arg-type]
    eulerian = objective is AlignYourFlow
    turn = align(t - s if eulerian else s - t, x) * slope_of(exact, x, t, s, world.velocity(x, t) if eulerian else None)
    left = method.direction(exact, world, asked, 0.4).g  # type: ignore[arg-type]
    torch.testing.assert_close(left, -0.6 * turn, atol=1e-10, rtol=0)
    assert float(turn.abs().max()) > 0.1

    class Off(ExactFlowMap):
        def mean_velocity(self, x, t, s, cond=None, **extras):
            return super().mean_velocity(x, t, s, cond) + 0.01 * x

    assert float(method.direction(Off(world), world, asked, 1.0).g.abs().max()) > 1e-3  # type: ignore[arg-type]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_directions_are_zero_at_the_power_law_of_autoguidance(objective: type[AlignYourFlow]) -> None:
    """One weight a sample, in the teacher and in the map."""
    x, t, s = jumps()
    w = torch.linspace(1, 3, len(x), dtype=F64)
    good, bad = (Gaussian(FLOW, torch.zeros(3, dtype=F64), variance) for variance in (0.25, 0.6))
    teacher = Autoguided(good, bad, w)
    asked = Asked(x, t, s, None, {})
    for scale, low, high in ((w, -1.0, 1e-10), (1.1 * w, 1e-3, 10.0)):
        exact = ExactFlowMap(GuidedGaussian(FLOW, (3,), 0.25, 0.6, scale))
        g = objective().direction(exact, teacher, asked, 1.0).g  # type: ignore[arg-type]
        assert low < float(g.abs().max()) < high


def test_finite_steps_tend_to_the_directions() -> None:
    """The change of a random network's jump over a teacher's Euler step of length e tends to ``-g`` of the Eulerian
    objective, and its end against an Euler step of the teacher to ``g`` of the Lagrangian, both with an error that
    halves with e."""
    student = Jump(network(extras=("s",)), two_times=True)
    world, (x, t, s) = Gaussian(FLOW, torch.zeros(3, dtype=F64), 0.25), jumps()
    asked = Asked(x, t, s, None, {})
    start = AlignYourFlow(**PLAIN).direction(student, world, asked, 1.0).g
    end = LagrangianAlignYourFlow(**PLAIN).direction(student, world, asked, 1.0).g
    errors = []
    with torch.no_grad():
        for e in (2e-3, 1e-3):
            before = t + e * (s - t)
            ahead = x + align(before - t, x) * world.velocity(x, t)
            change = (student(x, t, s) - student(ahead, before, s)) / align(t - before, x)
            held = s + e * (t - s)
            near = student(x, t, held)
            euler = near + align(s - held, x) * world.velocity(near, held)
            gap = (student(x, t, s) - euler) / align(s - held, x)
            errors.append([float((change + start).abs().max()), float((gap - end).abs().max())])
    for coarse, fine in zip(*errors, strict=True):
        assert fine < 5e-2 and coarse / fine == pytest.approx(2, abs=0.1)


class Basis:
    """Noise that is a new unit vector at every draw: what a linear sampler makes of it are its coefficients, and their
    norm is the standard deviation of its samples, exactly."""

    def __init__(self) -> None:
        self.drawn = 0

    def normal_like(self, x: Tensor) -> Tensor:
        self.drawn += 1
        return torch.eye(x.shape[1], dtype=x.dtype)[self.drawn - 1][None]

    def increment(self, x: Tensor, start: float, end: float) -> Tensor:
        return self.normal_like(x)


def deviation(flow_map: FlowMap, plan: Plan) -> float:
    """The standard deviation of what a map that is linear in its state samples along a plan."""
    basis = Basis()
    noise = basis.normal_like(torch.zeros(1, len(plan.times) + 1, dtype=F64))
    return float(rollout(flow_map, noise, plan, rng=basis).norm())


def uniform_plan(n: int, gamma: float) -> Plan:
    return Plan(tuple(torch.linspace(1, 0, n + 1, dtype=F64)[:-1].tolist()), gamma)


def wrong_map(world: Gaussian, gain: float = 0.0, bend: float = 0.0) -> FlowMap:
    """The exact map times ``1 + gain``, bent by ``bend (t - s)^2 x``."""

    class Wrong(ExactFlowMap):
        def forward(self, x, t, s, cond=None, **extras):
            return (1 + gain) * super().forward(x, t, s, cond) + bend * (t - s) ** 2 * x

    return Wrong(world)


def test_consistency_maps_get_worse_with_steps_and_flow_maps_do_not() -> None:
    """N(0, 0.5^2).  A consistency map that is 5 % off, denoising and renoising, is off by more the more often it is
    called; a flow map whose error is of second order in the length of its jumps, as a learned one's, by less, as
    1/N."""
    calls = (1, 2, 4, 16, 64)
    world = Gaussian(FLOW, torch.zeros(65, dtype=F64), 0.25)

    def errors(flow_map: FlowMap, gamma: float) -> list[float]:
        found = []
        for n in calls:
            small = Gaussian(FLOW, torch.zeros(n + 1, dtype=F64), 0.25)
            flow_map.world = small  # type: ignore[assignment]
            found.append(abs(deviation(flow_map, uniform_plan(n, gamma)) - 0.5))
        return found

    worse = errors(wrong_map(world, gain=0.05), 1.0)
    assert worse == pytest.approx([0.025, 0.030, 0.047, 0.130, 0.43], rel=0.03)
    better = errors(wrong_map(world, bend=0.1), 0.0)
    assert better == sorted(better, reverse=True) and better[0] > 0.09
    assert better[2] / better[3] == pytest.approx(4, rel=0.2) and better[3] / better[4] == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("gamma", [0.0, 0.2, 0.7, 0.95, 1.0])
def test_gamma_sampling_keeps_the_marginals_exactly(gamma: float) -> None:
    """With the exact map, deviation and mean of the samples are those of the data at every gamma, in every plan of the
    method; the inner time is ``rho / (1 + rho)`` with ``rho = sqrt(1 - gamma^2) t / (1 - t)``."""
    student = AlignYourFlow(**PLAIN, gamma=gamma).student(AlignYourFlow(**PLAIN).networks(Start(network())))
    assert list(student.plans) == [1, 2, 4, 8]
    for n, plan in student.plans.items():
        assert plan == uniform_plan(n, gamma)
        world = Gaussian(FLOW, torch.zeros(n + 1, dtype=F64), 0.25)
        assert deviation(ExactFlowMap(world), plan) == pytest.approx(0.5, abs=1e-12)
        shifted = Gaussian(FLOW, torch.full((2,), 0.8, dtype=F64), 0.25)
        zeros = Rng(0)
        zeros.normal_like = torch.zeros_like  # type: ignore[method-assign]
        middle = rollout(ExactFlowMap(shifted), torch.zeros(1, 2, dtype=F64), plan, rng=zeros)
        torch.testing.assert_close(middle, torch.full((1, 2), 0.8, dtype=F64), atol=1e-12, rtol=0)
    assert AlignYourFlow().gamma == 0
    rho = math.sqrt(1 - gamma**2) * 0.3 / 0.7
    assert inner_time(FLOW, 0.3, gamma) == pytest.approx(rho / (1 + rho), abs=1e-8)


class Gain(nn.Module, TakesInputs):
    """``F = h(t, s, w) x`` with a small network h: maps that are linear in the state."""

    extra_inputs = ("s", "w")

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))

    def widened(self, spans, beside):
        raise ValueError("it takes what it takes")

    def forward(self, x, t, cond=None, *, s, w):
        return x * self.h(torch.stack([2 * t - 1, 2 * s - 1, w - 2], 1))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_it_learns_the_power_law_of_an_autoguided_teacher(objective: type[AlignYourFlow]) -> None:
    """From fresh weights, at every guidance weight, between any two times: within 0.1 of the closed form (0.02
    to 0.06 over six first weights), where one call maps deviation 1 to 0.5 at weight 1 and to 0.125 at weight 3."""
    good, bad = (Gaussian(FLOW, torch.zeros(1, dtype=F64), variance) for variance in (0.25, 1.0))
    torch.manual_seed(0)
    fresh = NetworkDenoiser(Gain(), FLOW, Velocity(), (1,))
    data = Dataset("x", good.sample(4096, Rng(1)).float())
    method = objective(lr=2e-2, tangent_warmup=0.3)
    settings = Settings(Budget(400), 256, precision="fp32", averages=(Power(0.1),))
    start = Start(good, data, given={"student": fresh, "guide": bad})
    student = train(method, start, settings, None, show=False).model
    z = torch.special.ndtri((torch.arange(64, dtype=F64) + 0.5) / 64)[:, None]
    for t, s in ((1.0, 0.0), (1.0, 0.5), (0.7, 0.2), (0.4, 0.0)):
        x = good.flow(z, 1.0, t)
        for w in (1.0, 2.0, 3.0):
            told = torch.full((64,), w)
            jumped = student.flow_map.jump(x.float(), t, s, w=told).double()
            error = jumped - GuidedGaussian(FLOW, (1,), 0.25, 1.0, w).flow(x, t, s)
            assert float(error.square().mean().sqrt()) < 0.1, (t, s, w)


def test_the_student_is_told_the_weight_that_steers_the_teacher() -> None:
    """The teacher that the loss asks has the very weights that the network is given, from all of the range."""
    seen = {}

    class Watch(AlignYourFlow):
        def direction(self, student: Jump, teacher: Denoiser, asked: Asked, r: float):
            seen["teacher"], seen["asked"], seen["r"] = teacher, asked, r
            return super().direction(student, teacher, asked, r)

    teacher = network(classes=2)
    method = Watch(guidance_low=0.5, guidance_high=4.0)
    batch = Batch(torch.randn(200, 3, dtype=F64), torch.arange(200) % 2, Rng(0))
    next(method.updates(method.networks(Start(teacher)), batch, Progress(fraction=0.2)))
    w = seen["asked"].weights["w"]
    assert isinstance(seen["teacher"], Guided) and torch.equal(seen["teacher"].scale, w)
    assert 0.5 <= float(w.min()) < 0.6 and 3.9 < float(w.max()) <= 4.0
    nets = method.networks(Start(teacher, given={"guide": network(classes=2)}))
    next(method.updates(nets, batch, Progress()))
    assert isinstance(seen["teacher"], Autoguided) and torch.equal(seen["teacher"].scale, w)
    made = method.student(nets)
    assert made.extras["w"].default == 2.0 and made.extras["w"].unguided == 1.0
    assert not torch.equal(made.sample(2, w=1.0, steps=2), nets.teacher(torch.zeros(2, 3, dtype=F64), 1.0))


def test_a_fixed_weight_is_no_input() -> None:
    """Without guidance the plain teacher is asked and the student takes nothing; at 3 the teacher under 3 is."""
    for scale, kind in ((1.0, NetworkDenoiser), (3.0, Guided)):
        method = AlignYourFlow(guidance=scale, guidance_low=scale, guidance_high=scale)
        nets = method.networks(Start(network(classes=2)))
        assert method.student(nets).extras == {}
        assert type(method.teacher(nets, scale)) is kind
        batch = Batch(torch.randn(4, 3, dtype=F64), torch.arange(4) % 2, Rng(0))
        assert float(next(method.updates(nets, batch, Progress(fraction=0.5))).loss.detach()) > 0


def test_warm_up_ends_below_one() -> None:
    """r rises with the budget and stops at r_max; at 0 the Eulerian direction is velocity matching for every pair."""
    method = AlignYourFlow(tangent_warmup=0.5, **PLAIN)
    nets = method.networks(Start(network()))
    for fraction, r in ((0.0, 0.0), (0.2, 0.4), (0.5, 0.99), (0.9, 0.99)):
        update = next(
            method.updates(nets, Batch(torch.randn(4, 3, dtype=F64), None, Rng(0)), Progress(fraction=fraction))
        )
        assert update.logs["warmup"] == pytest.approx(r)
    x, t, s = jumps()
    own = method.direction(nets.student, nets.teacher, Asked(x, t, s, None, {}), 0.0)
    torch.testing.assert_close(own.g, own.F - nets.teacher.velocity(x, t).detach(), atol=1e-13, rtol=0)
    without = dataclasses.replace(method, tangent_warmup=0.0)
    batch = Batch(torch.randn(4, 3, dtype=F64), None, Rng(0))
    assert next(without.updates(nets, batch, Progress())).logs["warmup"] == 0.99


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_tangent_and_the_forward_pass_see_the_same_dropout_mask(objective: type[AlignYourFlow]) -> None:
    """With a huge c the loss is ``mean (F - F^-)^2``: 0 only if both drew the same masks."""
    torch.manual_seed(0)
    net = UNet((1, 8, 8), (16,), 1, 32, None, dropout=0.5)
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    teacher = NetworkDenoiser(net, FLOW, TrigPrediction(sigma_data=0.5), (1, 8, 8))
    method = objective(c=1e12, **PLAIN)
    nets = method.networks(Start(teacher)).train()
    nets.teacher.eval()
    update = next(method.updates(nets, Batch(torch.randn(4, 1, 8, 8), None, Rng(0)), Progress(fraction=0.4)))
    assert float(update.loss.detach()) < 1e-10
    x = torch.randn(4, 1, 8, 8)
    assert not torch.equal(nets.student.to_data(x, 0.5), nets.student.to_data(x, 0.5))  # the masks do differ


def test_guidance_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="guidance_low=1, guidance_high=3: this teacher is unconditional"):
        AlignYourFlow().networks(Start(network()))
    assert AlignYourFlow().networks(Start(network(), given={"guide": network()})).guide is not None
    with pytest.raises(ValueError, match="the guide knows no classes, the model 2"):
        AlignYourFlow().networks(Start(network(classes=2), given={"guide": network()}))
    with pytest.raises(ValueError, match="guidance=5 must lie between guidance_low=1 and guidance_high=3"):
        AlignYourFlow(guidance=5.0)


def test_velocities_under_autoguidance_keep_their_digits() -> None:
    """In float32, where there is hardly any noise, the velocity is that of float64: it comes from velocities, not from
    the difference of the state and a guided prediction."""
    good, bad = network(), network()
    for p in bad.parameters():
        p.data *= 0.8
    steered = Autoguided(good, bad, 2.0)
    x, t = torch.randn(8, 3, dtype=F64, generator=torch.Generator().manual_seed(0)), torch.full((8,), 1e-5, dtype=F64)
    exact = 2 * good.velocity(x, t) - bad.velocity(x, t)
    torch.testing.assert_close(steered.velocity(x, t), exact, atol=1e-12, rtol=0)
    single = steered.float().velocity(x.float(), t).double()
    torch.testing.assert_close(single, exact, atol=1e-5, rtol=1e-5)
