"""MeanFlow: its target against closed forms, its weight, its rows without a tangent, and guidance inside training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.data import Dataset
from fewstep.denoisers import NetworkDenoiser
from fewstep.exact import Gaussian, GaussianMixture
from fewstep.exact.world import ExactFlowMap
from fewstep.flow_maps import Jump
from fewstep.guidance import Guided
from fewstep.methods.flow_maps import mean_flow
from fewstep.methods.flow_maps.mean_flow import MeanFlowDistillation, MeanFlowTraining, rows_where
from fewstep.methods.method import Batch, Method, Networks, Progress
from fewstep.methods.parts.identities import Direction, adaptive_weight, eulerian, regression
from fewstep.methods.parts.times import Ordered
from fewstep.methods.start import Start
from fewstep.networks import MLP, UNet
from fewstep.networks.inputs import TakesInputs
from fewstep.predictions import TrigPrediction, Velocity
from fewstep.randomness import Rng
from fewstep.schedules import FlowMatching
from fewstep.training.budget import Budget
from fewstep.training.profiles import Power
from fewstep.training.settings import Settings
from fewstep.training.trainer import train

F64 = torch.float64
FLOW = FlowMatching()
METHODS = (MeanFlowDistillation, MeanFlowTraining)


def network(classes: int | None = 2, seed: int = 0) -> NetworkDenoiser:
    """A small network with weights away from their start."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        net = MLP((3,), 16, 2, classes).double()
        for p in net.parameters():
            p.data += 0.2 * torch.randn_like(p)
    return NetworkDenoiser(net, FLOW, TrigPrediction(sigma_data=0.7), (3,), classes)


def made(method: Method, source: NetworkDenoiser | None = None) -> Networks:
    """The networks of a method, the student's new input away from zero."""
    nets = method.networks(Start(source or network()))
    with torch.random.fork_rng([]):
        torch.manual_seed(5)
        for p in nets.student.parameters():
            p.data += 0.05 * torch.randn_like(p)
    return nets


def batch(n: int = 32, seed: int = 0) -> Batch:
    x = torch.randn(n, 3, dtype=F64, generator=torch.Generator().manual_seed(1))
    return Batch(x, torch.arange(n) % 2, Rng(seed))


def slopes(loss: Tensor, nets: Networks) -> Tensor:
    """The gradient of a loss in all parameters of the student."""
    found = torch.autograd.grad(loss, list(nets.student.parameters()), allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


def test_the_target_is_right_in_the_mean_at_the_exact_map() -> None:
    """At the map of a Gaussian g is 0 along the teacher's velocity, and with velocities of pairs it is affine in them:
    0 in their mean, and not for one pair."""
    world = Gaussian(FLOW, torch.tensor([0.3, -1.0, 0.0], dtype=F64), 0.25)
    exact, gen = ExactFlowMap(world), torch.Generator().manual_seed(2)
    t, s = torch.linspace(0.3, 1.0, 20, dtype=F64), torch.linspace(0.0, 0.6, 20, dtype=F64)
    x, off = (torch.randn(20, 3, dtype=F64, generator=gen) for _ in range(2))
    v = world.velocity(x, t)
    ahead, behind = (eulerian(exact, x, t, s, v + sign * off).g for sign in (1, -1))
    assert float((ahead + behind).abs().max()) < 1e-10
    assert float(eulerian(exact, x, t, s, v).g.abs().max()) < 1e-10
    assert float(ahead.abs().max()) > 0.1


def plain_loss(method: MeanFlowDistillation, nets: Networks, given: Batch) -> tuple[Tensor, Direction, int]:
    """The loss by one jvp through the whole batch, the direction, and how many rows move."""
    t, s = method.times().draw(FLOW, given.n, given.rng)
    x = FLOW.add_noise(given.x, given.normal(), t)
    own = eulerian(nets.student, x, t, s, nets.teacher.velocity(x, t, given.cond), given.cond)
    f = nets.student.mean_velocity(x, t, s, given.cond)
    loss = regression(f, own, weight=adaptive_weight(own.g, method.power, 0.01)).mean()
    return loss, own, int((t > s).sum())


@pytest.mark.parametrize("equal", [0.0, 0.5, 0.75, 1.0])
def test_rows_without_a_tangent_are_those_whose_tangent_is_zero(equal: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradient are those of one jvp through the whole batch; it is taken of the rows that move only."""
    taken = []

    def spied(flow_map: Any, x: Tensor, *rest: Any, **extras: Any) -> Direction:
        taken.append(len(x))
        return eulerian(flow_map, x, *rest, **extras)

    monkeypatch.setattr(mean_flow, "eulerian", spied)
    method = MeanFlowDistillation(equal=equal, power=1.0)
    nets, given = made(method), batch()
    update = next(method.updates(nets, given, Progress()))
    loss, own, moving = plain_loss(method, nets, batch())
    torch.testing.assert_close(update.loss, loss, atol=1e-13, rtol=1e-12)
    torch.testing.assert_close(slopes(update.loss, nets), slopes(loss, nets), atol=1e-12, rtol=1e-10)
    assert taken == ([] if equal == 1 else [moving])
    assert float(update.logs["error"]) == pytest.approx(float(own.g.square().mean()), rel=1e-10)


@pytest.mark.parametrize(("equal", "moving"), [(0.25, {1, 2}), (0.75, {0, 1})])
def test_every_part_makes_the_same_calls(equal: float, moving: set[int]) -> None:
    """A part of few rows, none of which moves or all of which do, calls the network as often as any other: one row
    stands in, without a weight."""
    method = MeanFlowDistillation(equal=equal)
    nets = made(method)
    calls: list[int] = []
    nets.student.denoiser.net.register_forward_hook(lambda *_: calls.append(1))
    counts, moved = set(), set()
    for seed in range(12):
        calls.clear()
        update = next(method.updates(nets, batch(2, seed), Progress()))
        counts.add(len(calls))
        loss, _, moves = plain_loss(method, nets, batch(2, seed))
        moved.add(moves)
        torch.testing.assert_close(update.loss, loss, atol=1e-13, rtol=1e-12)
    assert moved == moving and counts == {3}
    assert rows_where(torch.tensor([False, True, True]))[0].tolist() == [1, 2]
    rows, n = rows_where(torch.tensor([False, False]))
    assert rows.tolist() == [0] and n == 0


def test_as_many_rows_have_equal_times_in_every_batch_and_each_as_often() -> None:
    """Systematic sampling: ``equal`` of the batch to within one row, every row with that probability, and the slices of
    parts are those of the whole."""
    law = Ordered(equal=0.3)
    drawn = torch.stack([torch.eq(*law.draw(FLOW, 12, Rng(seed))) for seed in range(4000)])
    assert {int(n) for n in drawn.sum(1)} == {3, 4}
    bound = 4 * math.sqrt(0.3 * 0.7 / 4000)  # standard deviations of a share
    assert float((drawn.double().mean(0) - 0.3).abs().max()) < bound
    parts = torch.cat([torch.eq(*law.draw(FLOW, 3, Rng(7, part=k, parts=4))) for k in range(4)])
    assert torch.equal(parts, drawn[7])


def test_three_quarters_of_the_rows_have_equal_times() -> None:
    t, s = MeanFlowTraining().times().draw(FLOW, 20_000, Rng(0))
    assert float((t == s).double().mean()) == pytest.approx(0.75, abs=0.01)
    assert bool((t >= s).all())
    alone = t[t == s].logit()  # the larger of two normal numbers is 0.564 above their mean
    assert float(alone.mean()) == pytest.approx(-0.4 + 0.564, abs=0.03)


def test_the_weight_divides_by_the_squared_norm_of_the_sample() -> None:
    """``w = 1 / (||g||^2 + 0.01)`` without a gradient of its own; power 0 is none."""
    g = torch.tensor([[3.0, 4.0], [0.0, 0.1]], dtype=F64)
    f = torch.zeros(2, 2, dtype=F64, requires_grad=True)
    own = Direction(f.detach(), g)
    loss = MeanFlowTraining().loss(f, own)
    torch.testing.assert_close(loss, torch.tensor([25 / 25.01, 0.01 / 0.02], dtype=F64) / 2)
    (slope,) = torch.autograd.grad(loss.sum(), f)
    torch.testing.assert_close(slope, g / torch.tensor([[25.01], [0.02]], dtype=F64))
    torch.testing.assert_close(MeanFlowTraining(power=0.0).loss(f, own), torch.tensor([12.5, 0.005], dtype=F64))


class GuidedWorld(nn.Module):
    """The velocity of a labelled world under a guidance scale, as a student that does not move."""

    def __init__(self, world: GaussianMixture, scale: float) -> None:
        super().__init__()
        self.schedule, self.null, self.steered = world.schedule, torch.tensor([-1]), Guided(world, scale)

    def mean_velocity(self, x: Tensor, t: Tensor, s: Tensor, cond: Tensor) -> Tensor:
        return self.steered.velocity(x, t, cond)


@pytest.mark.parametrize(("omega", "kappa"), [(2.5, 0.0), (0.2, 0.92), (0.5, 0.5), (1.0, 0.6)])
def test_the_guided_target_is_the_velocity_at_the_scale_omega_over_one_minus_kappa(omega: float, kappa: float) -> None:
    """In the mean over the pairs that pass through a state the target there is what the student says: its solution is
    the velocity under that scale, for rows with a condition in the guided times; elsewhere the plain one."""
    means = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.5, 0.0]], dtype=F64)
    world = GaussianMixture(FLOW, torch.ones(2), means, torch.tensor([0.3, 0.2], dtype=F64), [0, 1])
    student = GuidedWorld(world, omega / (1 - kappa))
    method = MeanFlowTraining(guidance=omega, kappa=kappa, guided_from=0.2, guided_to=0.75, label_dropout=0.3)
    given, t = batch(64), torch.linspace(0.05, 0.95, 64, dtype=F64)
    eps = torch.randn(64, 3, dtype=F64, generator=torch.Generator().manual_seed(3))
    x = FLOW.add_noise(given.x, eps, t)
    target, cond = method.velocity(Networks({"student": student}, {}), given, x, eps, t)
    assert isinstance(cond, Tensor)
    gone, inside = cond == -1, (t >= 0.2) & (t <= 0.75)
    assert 5 < int(gone.sum()) < 40 and torch.equal(cond[~gone], given.cond[~gone])  # type: ignore[index]
    pair, mean = FLOW.velocity(given.x, eps, t), world.velocity(x, t, cond)
    free = gone | ~inside
    share = torch.full((64, 1), omega, dtype=F64).masked_fill(free[:, None], 1.0)
    expected = target - share * (pair - mean)
    torch.testing.assert_close(expected[free], mean[free], atol=1e-12, rtol=0)
    held = student.mean_velocity(x, t, t, cond)
    torch.testing.assert_close(expected[~free], held[~free], atol=1e-12, rtol=0)
    if omega / (1 - kappa) != 1:
        assert float((held - mean)[~free].abs().max()) > 0.1


def test_without_guidance_the_target_is_the_pairs_velocity() -> None:
    method, given = MeanFlowTraining(), batch(400)
    nets, eps = made(method), torch.ones(400, 3, dtype=F64)
    calls: list[int] = []
    nets.student.denoiser.net.register_forward_hook(lambda *_: calls.append(1))
    v, cond = method.velocity(nets, given, given.x, eps, torch.rand(400, dtype=F64))
    assert torch.equal(v, eps - given.x) and not calls
    assert float((cond == -1).double().mean()) == pytest.approx(0.1, abs=0.04)  # type: ignore[union-attr]
    plain = MeanFlowTraining(guidance=3.0)
    v, cond = plain.velocity(nets, Batch(given.x, None, Rng(0)), given.x, eps, torch.rand(400, dtype=F64))
    assert torch.equal(v, eps - given.x) and cond is None  # data without labels: nothing to guide to


def test_conditions_are_trees() -> None:
    """Prompts by name: rows are cut, dropped and led away from the empty prompt."""

    class Prompted(nn.Module, TakesInputs):
        extra_inputs = ("s",)

        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(5, 3).double()

        def widened(self, spans: Mapping[str, float], beside: int) -> nn.Module:
            raise ValueError("nothing more")

        def forward(self, x: Tensor, t: Tensor, cond: Any = None, s: Tensor | None = None) -> Tensor:
            return self.a(torch.cat([x, cond["text"]], 1)) * torch.sin(t)[:, None]

    source = NetworkDenoiser(Prompted(), FLOW, Velocity(), (3,), null={"text": torch.zeros(1, 2, dtype=F64)})
    for method in (MeanFlowTraining(guidance=2.0, kappa=0.5, label_dropout=0.5), MeanFlowDistillation(guidance=2.0)):
        nets = method.networks(Start(source))
        given = Batch(batch(8).x, {"text": torch.randn(8, 2, dtype=F64)}, Rng(0))
        loss = next(method.updates(nets, given, Progress())).loss
        assert float(loss.detach()) > 0 and float(slopes(loss, nets).abs().max()) > 0


@pytest.mark.parametrize("method", METHODS)
def test_the_tangent_and_the_forward_pass_see_the_same_dropout_mask(method: type[MeanFlowTraining]) -> None:
    """The loss is ``w mean (F - F^- + g)^2``: that of the direction alone only if F and F^- drew the same masks."""
    torch.manual_seed(0)
    net = UNet((1, 8, 8), (16,), 1, 32, None, dropout=0.5)
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    source = NetworkDenoiser(net, FLOW, TrigPrediction(sigma_data=0.5), (1, 8, 8))
    recipe = method(power=0.0, equal=0.5)
    nets = recipe.networks(Start(source)).train()
    update = next(recipe.updates(nets, Batch(torch.randn(6, 1, 8, 8), None, Rng(0)), Progress()))
    assert float(update.loss.detach()) == pytest.approx(float(update.logs["error"]), rel=1e-5)


class Gain(nn.Module, TakesInputs):
    """``F = h(t, s) x + k(t, s)`` with a small network: maps that are affine in the state."""

    extra_inputs = ("s",)

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2))

    def widened(self, spans: Mapping[str, float], beside: int) -> nn.Module:
        raise ValueError("it takes what it takes")

    def forward(self, x: Tensor, t: Tensor, cond: object = None, *, s: Tensor) -> Tensor:
        gain, shift = self.h(torch.stack([2 * t - 1, 2 * s - 1], 1)).split(1, dim=1)
        return x * gain + shift


@pytest.mark.parametrize("method", METHODS)
def test_it_learns_the_map_of_a_gaussian(method: type[MeanFlowTraining]) -> None:
    """From fresh weights, with a teacher and from data alone: between any two times within 0.15 of the
    closed form (0.12 was seen); a single Euler step of the exact velocity would be 0.5 off."""
    world = Gaussian(FLOW, torch.full((1,), 0.7, dtype=F64), 0.25)
    torch.manual_seed(0)
    fresh = NetworkDenoiser(Gain(), FLOW, Velocity(), (1,))
    start = Start(world, Dataset("x", world.sample(8192, Rng(1)).float()), given={"student": fresh})
    settings = Settings(Budget(200), 256, precision="fp32", averages=(Power(0.1),))
    student = train(method(lr=2e-2), start, settings, None, show=False).model
    z = torch.special.ndtri((torch.arange(64, dtype=F64) + 0.5) / 64)[:, None]
    for t, s in ((1.0, 0.0), (1.0, 0.5), (0.7, 0.2), (0.4, 0.0), (0.6, 0.6)):
        x = world.flow(z, 1.0, t)
        error = student.flow_map.jump(x.float(), t, s).double() - world.flow(x, t, s)
        assert float(error.square().mean().sqrt()) < 0.15, (t, s)


def test_plans_are_deterministic_in_one_to_eight_calls() -> None:
    method = MeanFlowTraining()
    nets = made(method)
    student = method.student(nets)
    assert {k: (plan.gamma, len(plan.times)) for k, plan in student.plans.items()} == {k: (0, k) for k in (1, 2, 4, 8)}
    z, cond = torch.randn(4, 3, dtype=F64), torch.tensor([0, 1, 0, 1])
    middle = z - 0.5 * nets.student.mean_velocity(z, 1.0, 0.5, cond)
    by_hand = middle - 0.5 * nets.student.mean_velocity(middle, 0.5, 0.0, cond)
    torch.testing.assert_close(student(z, cond, steps=2), by_hand, atol=1e-12, rtol=0)


def test_the_student_starts_as_its_teacher() -> None:
    """For every target time, with the velocity that the teacher has on flow matching."""
    source = network()
    student = MeanFlowDistillation().networks(Start(source)).student
    assert isinstance(student, Jump) and student.two_times
    x, t = batch(6).x, torch.linspace(0.1, 1, 6, dtype=F64)
    for s in (0.0, 0.1):
        assert torch.equal(student.mean_velocity(x, t, s), source.velocity(x, t))


def test_guidance_that_cannot_be_is_refused() -> None:
    for method in (MeanFlowDistillation(guidance=2.0), MeanFlowTraining(guidance=2.0), MeanFlowTraining(kappa=0.5)):
        with pytest.raises(
            ValueError, match="this teacher is unconditional, or knows no empty condition; its only scale is 1"
        ):
            method.networks(Start(network(classes=None)))
    with pytest.raises(ValueError, match="kappa=1 must be below 1"):
        MeanFlowTraining(kappa=1.0)
    with pytest.raises(ValueError, match=r"guided_from=0\.8 must be at most guided_to=0\.5"):
        MeanFlowTraining(guided_from=0.8, guided_to=0.5)
