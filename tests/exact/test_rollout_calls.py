"""Rollouts that are entered, left, looked at, recomputed and inverted: one path, whichever way it is walked."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.denoisers import NetworkDenoiser
from fewstep.exact import ExactFlowMap, Gaussian, GuidedFlowMap, GuidedGaussian, three_modes
from fewstep.flow_maps import EDMConsistency, FlowMap, Jump, ddim_move
from fewstep.hub.tables import plan_table
from fewstep.networks import MLP
from fewstep.predictions import Velocity
from fewstep.randomness import Rng
from fewstep.routing import ByClass, ByTime, RoutedFlowMap
from fewstep.sampling import Call, Inpainting, Plan, edit, encode, log_prob, rollout
from fewstep.schedules import EDM, FlowMatching, Schedule, as_time

F64 = torch.float64
TIMES = (1.0, 0.7, 0.4, 0.2)


class Counting(MLP):
    """Counts how often it is called."""

    calls = 0

    def forward(self, *given: Any, **more: Any) -> Tensor:
        self.calls += 1
        return super().forward(*given, **more)


def student(width: int = 16, blocks: int = 1) -> Jump:
    net, chance = Counting((2,), width=width, blocks=blocks), torch.Generator().manual_seed(0)
    for weights in net.parameters():
        nn.init.normal_(weights, std=0.3, generator=chance)
    return Jump(NetworkDenoiser(net.double(), FlowMatching(), Velocity(), (2,)))


def states(n: int = 5, d: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=F64)


# --- entered and left ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("k", [0, 1, 3])
def test_a_rollout_can_be_entered_anywhere(gamma: float, k: int) -> None:
    """With the state that a whole rollout has at its k-th time, and the noise that is still to come, the end is the
    same bit for bit."""
    flow_map, plan, calls = student(), Plan(TIMES, gamma), list[Call]()
    whole = rollout(flow_map, states(), plan, rng=Rng(0), calls=calls)
    rng = Rng(0)
    for call in calls[:k]:
        if call.r != call.s:
            rng.normal_like(call.x)
    assert torch.equal(rollout(flow_map, None, plan, rng=rng, start=(k, calls[k].x)), whole)


def test_a_rollout_can_be_left_anywhere() -> None:
    """``end`` is where the last call goes: what stops at the next time of a deterministic plan is entered there again;
    an end at ``t_min`` is the default."""
    flow_map, plan = student(), Plan(TIMES, 0.0)
    whole = rollout(flow_map, states(), plan)
    middle = rollout(flow_map, states(), plan, stop=1, end=TIMES[2])
    assert torch.equal(rollout(flow_map, None, plan, start=(2, middle)), whole)
    assert torch.equal(rollout(flow_map, states(), plan, end=0.0), whole)
    assert not torch.equal(rollout(flow_map, states(), plan, end=0.1), whole)
    one = rollout(flow_map, None, Plan(TIMES), start=(2, middle), stop=2, end=0.3)
    assert torch.equal(one, flow_map.jump(middle, TIMES[2], 0.3))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"noise": None}, "starts from noise, or from start"),
        ({"start": (0, states())}, "give one of them"),
        ({"noise": None, "start": (4, states())}, "start=4 must be at most 3"),
        ({"noise": None, "start": (2, states()), "stop": 1}, "stop=1 .* from the start at 2 on"),
        ({"end": 0.2}, r"end=0.2 must lie in \[0, 0.2\)"),
        ({"stop": 1, "end": 0.8}, "below the last call's time"),
        ({"end": -0.1}, "end=-0.1 must lie in"),
    ],
)
def test_what_contradicts_the_plan_is_refused(given: dict[str, Any], message: str) -> None:
    """In one line that names the argument."""
    with pytest.raises(ValueError, match=message):
        rollout(student(), given.pop("noise", states()), Plan(TIMES), rng=Rng(0), **given)


# --- looked at -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.0, 0.6, 1.0])
def test_calls_tell_what_happened(schedule: Schedule, gamma: float) -> None:
    """Every call leads from its state to its output and on to the state of the next one; its data prediction is the one
    whose DDIM move it makes, that of the denoiser where the map is a denoiser's."""
    world = Gaussian(schedule, torch.tensor([0.3, -0.2]), torch.tensor([[0.5, 0.2], [0.2, 0.4]]))
    times = schedule.time_at(-torch.tensor([5.0, 1.0, 0.2], dtype=F64).log()).tolist()
    for flow_map in (ExactFlowMap(world), Jump(world)):
        calls: list[Call] = []
        end = rollout(flow_map, states(), Plan(tuple(times), gamma), rng=Rng(1), calls=calls)
        assert [(call.i, call.t) for call in calls] == list(enumerate(times))
        assert [call.s for call in calls] == [*times[1:], None]
        for call, after in zip(calls, [*calls[1:], None], strict=True):
            torch.testing.assert_close(call.out, flow_map.jump(call.x, call.t, call.r), rtol=0, atol=1e-12)
            moved = ddim_move(call.x, call.x0, as_time(call.t, call.x), as_time(call.r, call.x), schedule)
            torch.testing.assert_close(moved, call.out, rtol=0, atol=1e-12)
            assert torch.equal(call.next, end if after is None else after.x)
            if isinstance(flow_map, Jump):
                torch.testing.assert_close(call.x0, world(call.x, call.t), rtol=0, atol=1e-10)


# --- recomputed ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.0, 1.0])
@pytest.mark.parametrize("at", [None, 0, 2])
def test_recomputed_calls_have_the_same_gradients(gamma: float, at: int | None) -> None:
    """To the weights and to the noise, to 1e-12; every call that has a graph is made twice, the others once."""
    flow_map = student()
    net: Any = flow_map.denoiser.net
    found = []
    for checkpoint in (False, True):
        noise = states().requires_grad_()
        net.calls = 0
        out = rollout(flow_map, noise, Plan(TIMES, gamma), rng=Rng(3), grad_at=at, checkpoint=checkpoint)
        wanted = [noise, *flow_map.parameters()]
        gradients = torch.autograd.grad(out.square().sum(), wanted, allow_unused=True, materialize_grads=True)
        assert net.calls == 4 + checkpoint * (4 - (at or 0))
        assert all(p.requires_grad for p in flow_map.parameters())
        found.append((out, *gradients))
    assert max(float(g.abs().max()) for g in found[0][2:]) > 1e-3
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-12, atol=1e-12)


def peak(flow_map: Jump, checkpoint: bool) -> int:
    """The most memory in bytes that a rollout and its backward pass hold at a time."""
    plan = Plan(tuple((1 - torch.arange(12) / 12).tolist()), 0.0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        rollout(flow_map, states(256), plan, checkpoint=checkpoint).sum().backward()
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def test_recomputed_calls_need_less_memory() -> None:
    """A dozen calls of a network: a fifth of the memory of plain backpropagation, or less."""
    flow_map = student(width=64, blocks=3)
    peak(flow_map, False)  # the gradients of the weights are there from now on
    assert peak(flow_map, True) < 0.2 * peak(flow_map, False)


# --- what a call was followed by -------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.5, 1.0])
@pytest.mark.parametrize("schedule", [EDM(), FlowMatching()], ids=["edm", "flow"])
def test_log_probabilities_are_those_of_a_gaussian(schedule: Schedule, gamma: float) -> None:
    """The mean over dimensions of a normal density around the jump of the map that is asked, which need not be the one
    that sampled."""
    mine, other = (Jump(Gaussian(schedule, torch.zeros(2), v)) for v in (0.3, 0.5))
    times = schedule.time_at(-torch.tensor([5.0, 1.0, 0.2], dtype=F64).log()).tolist()
    plan, calls = Plan(tuple(times), gamma), list[Call]()
    rollout(mine, states(), plan, rng=Rng(1), calls=calls)
    rng = Rng(1)
    for call in calls[:-1]:
        a, sd = schedule.transition(*torch.tensor([call.r, call.s], dtype=F64))
        drawn = -0.5 * rng.normal_like(call.x).square().mean(1) - sd.log() - 0.5 * math.log(2 * math.pi)
        torch.testing.assert_close(log_prob(mine, plan, call), drawn, rtol=0, atol=1e-10)
        law = torch.distributions.Normal(a * other.jump(call.x, call.t, call.r), sd)
        expected = law.log_prob(call.next).mean(1)
        torch.testing.assert_close(log_prob(other, plan, call), expected, rtol=0, atol=1e-10)
        assert float((expected - drawn).abs().max()) > 1e-3


def test_log_probabilities_have_gradients_and_take_inputs() -> None:
    """The gradient to the weights is that of the formula; further inputs are those that the caller gives."""
    flow_map, plan, calls = student(), Plan(TIMES), list[Call]()
    with torch.no_grad():
        rollout(flow_map, states(), plan, rng=Rng(2), calls=calls)
    call = calls[1]
    s = TIMES[2]
    formula = -0.5 * ((call.next - (1 - s) * flow_map.to_data(call.x, call.t)) / s).square().mean(1)
    weights = list(flow_map.parameters())
    expected = torch.autograd.grad(formula.sum(), weights)
    for ours, theirs in zip(torch.autograd.grad(log_prob(flow_map, plan, call).sum(), weights), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    guided = GuidedFlowMap(GuidedGaussian(FlowMatching(), (2,), 0.25, 1.0, 1.0))
    rollout(guided, states(), plan, rng=Rng(2), extras={"w": 3.0}, calls=(seen := []))
    normal = -0.5 * Rng(2).normal_like(states()).square().mean(1) - math.log(0.7 * math.sqrt(2 * math.pi))
    torch.testing.assert_close(log_prob(guided, plan, seen[0], w=3.0), normal, rtol=0, atol=1e-10)
    assert not torch.allclose(log_prob(guided, plan, seen[0]), normal)


@pytest.mark.parametrize(("gamma", "i"), [(0.0, 0), (0.0, 3), (1.0, 3)])
def test_calls_without_noise_have_no_density(gamma: float, i: int) -> None:
    """Deterministic calls and the last one."""
    flow_map, plan, calls = student(), Plan(TIMES, gamma), list[Call]()
    rollout(flow_map, states(), plan, rng=Rng(2), calls=calls)
    with pytest.raises(ValueError, match=f"call {i} .* has no density"):
        log_prob(flow_map, plan, calls[i])


# --- every gamma leaves the law --------------------------------------------------------------------------------------


class Given:
    """Hands out what it was given, in turn."""

    def __init__(self, *drawn: Tensor) -> None:
        self.drawn = list(drawn)

    def normal_like(self, x: Tensor) -> Tensor:
        return self.drawn.pop(0).expand_as(x)

    def increment(self, x: Tensor, start: float, end: float) -> Tensor:
        return self.normal_like(x)


def laws(flow_map: FlowMap, plan: Plan, world: Gaussian) -> list[tuple[Tensor, Tensor]]:
    """Mean and covariance after every call, exactly: the rollout is affine in its start and in the noises."""
    d, fresh = 2, len(plan.times) - 1
    first = world.noised(plan.times[0])
    root = first.basis * first.variances.sqrt()
    unit = torch.eye(d * (fresh + 1), dtype=F64)
    drawn = torch.cat([torch.zeros(1, d * (fresh + 1), dtype=F64), unit]).split(d, dim=1)
    calls: list[Call] = []
    state = first.mean + drawn[0] @ root.T
    rollout(flow_map, None, plan, rng=Given(*drawn[1:]), start=(0, state), calls=calls)
    pushed = [(call.next[0], call.next[1:] - call.next[0]) for call in calls]
    return [(mean, columns.T @ columns) for mean, columns in pushed]


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.8, 1.0])
def test_the_exact_map_keeps_the_law_at_every_gamma(schedule: Schedule, gamma: float) -> None:
    """Mean and covariance of a Gaussian after every call are those of the data at that time, to 1e-9 and without
    sampling: a part ``1 - gamma^2`` of the noise is kept and a part ``gamma^2`` is new.  The denoiser in place of the
    flow map does not keep them."""
    world = Gaussian(schedule, torch.tensor([0.4, -0.3]), torch.tensor([[0.5, 0.2], [0.2, 0.3]]))
    times = schedule.time_at(-torch.tensor([8.0, 2.0, 0.7, 0.1], dtype=F64).log()).tolist()
    plan = Plan(tuple(times), gamma)
    exact, wrong = laws(ExactFlowMap(world), plan, world), laws(Jump(world), plan, world)
    for (mean, covariance), t in zip(exact, [*times[1:], schedule.t_min], strict=True):
        law = world.noised(t)
        torch.testing.assert_close(mean, law.mean, rtol=0, atol=1e-9)
        torch.testing.assert_close(covariance, (law.basis * law.variances) @ law.basis.T, rtol=0, atol=1e-9)
    assert float((exact[-1][1] - wrong[-1][1]).abs().max()) > 1e-3


# --- inverted --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3])
def test_encoding_is_the_way_back(schedule: Schedule, steps: int) -> None:
    """With exact flow maps a rollout of the encoded noise is the data, to 1e-9, and the noise is that of one long jump;
    a Gaussian and a mixture."""
    times = (schedule.t_max, *schedule.time_at(-torch.tensor([1.0, 0.3], dtype=F64).log()).tolist())[:steps]
    sigma = schedule.sigma(torch.tensor(times[0], dtype=F64))
    flat = Gaussian(schedule, torch.tensor([0.3, -0.2]), torch.tensor([[0.5, 0.2], [0.2, 0.4]]))
    for world, x in ((flat, states()), (three_modes(schedule), states(9, 1))):
        noise = encode(ExactFlowMap(world), x, Plan(times, 0.0))
        far = world.flow(x, schedule.t_min, times[0]) / sigma
        torch.testing.assert_close(noise, far, rtol=0, atol=1e-9)
        torch.testing.assert_close(rollout(ExactFlowMap(world), noise, Plan(times, 0.0)), x, rtol=0, atol=1e-9)


def test_the_noise_of_data_is_standard_normal() -> None:
    """Data of a Gaussian, encoded, has mean 0 and variance 1 in every direction up to what its prior leaves of the
    data: the map is affine, so this is exact."""
    world = Gaussian(EDM(), torch.tensor([0.3, -0.2]), torch.tensor([[0.5, 0.2], [0.2, 0.4]]))
    start = world.noised(EDM().t_min)
    unit = torch.cat([torch.zeros(1, 2, dtype=F64), torch.eye(2, dtype=F64)])
    x = start.mean + unit @ (start.basis * start.variances.sqrt()).T
    noise = encode(ExactFlowMap(world), x, Plan((80.0, 3.0), 0.0))
    columns = noise[1:] - noise[0]
    assert float(noise[0].abs().max()) < 0.004
    torch.testing.assert_close(columns.T @ columns, torch.eye(2, dtype=F64), rtol=0, atol=2e-4)


@pytest.mark.parametrize("schedule", [EDM(), FlowMatching()], ids=["edm", "flow"])
def test_encoding_with_a_denoiser_has_the_error_of_its_steps(schedule: Schedule) -> None:
    """DDIM upward then downward comes back to the data, the nearer the more calls, at first order; from clean data it
    leaves along the network's velocity."""
    world = three_modes(schedule)
    x, gaps = states(9, 1) / 2, []
    for steps in (100, 200):
        rho = torch.logspace(math.log10(20), -2, steps, dtype=F64)
        plan = Plan(tuple(schedule.time_at(-rho.log()).tolist()), 0.0)
        noise = encode(Jump(world), x, plan)
        gaps.append(float((rollout(Jump(world), noise, plan) - x).abs().max()))
    assert gaps[1] < 0.6 * gaps[0] < 0.1
    if schedule == FlowMatching():
        one = Plan((0.8,))
        flow_map = student()
        start = states()
        found = encode(flow_map, start, one)
        torch.testing.assert_close(found, (start + 0.8 * flow_map.denoiser.velocity(start, 0.0)) / 0.8)


def test_encoding_takes_inputs_and_refuses() -> None:
    """A guidance weight is told; a plan that re-noises, and a map to data only, are refused in one line."""
    world = GuidedGaussian(FlowMatching(), (2,), 0.25, 1.0, 1.0)
    flow_map, plan = GuidedFlowMap(world), Plan((1.0, 0.5), 0.0)
    noise = encode(flow_map, states(), plan, w=3.0)
    torch.testing.assert_close(rollout(flow_map, noise, plan, extras={"w": 3.0}), states(), rtol=0, atol=1e-12)
    assert not torch.allclose(noise, encode(flow_map, states(), plan))
    with pytest.raises(ValueError, match="only a plan with gamma=0 can be encoded"):
        encode(flow_map, states(), Plan((1.0, 0.5)))
    with pytest.raises(ValueError, match="EDMConsistency jumps to data only"):
        encode(EDMConsistency(Gaussian(EDM(), torch.zeros(2), 1.0)), states(), Plan((80.0,)))


# --- what a rollout begins with --------------------------------------------------------------------------------------


class Accelerated(FlowMap):
    """Constant acceleration between noise ``n`` and data ``m + c n``, with an initial velocity of ``k n``: exact jumps
    for every ``k``.  In the time ``u = 1 - t`` the path is ``n + v u + a u^2 / 2``."""

    def __init__(self, m: float, c: float, k: float) -> None:
        super().__init__(FlowMatching(), (2,), None)
        self.m, self.c, self.k = m, c, k
        self.begun = 0

    def begin(self, x: Tensor, t: Tensor | float, cond: Any = None) -> Mapping[str, Tensor]:
        self.begun += 1
        u = 1 - as_time(t, x)[:, None]
        return {"v": self.k * (x - u**2 * self.m) / (1 - u**2 + self.c * u**2 + self.k * (u - u**2))}

    def forward(self, x: Tensor, t: Any, s: Any, cond: Any = None, **extras: Tensor) -> Tensor:
        u, after, v = 1 - as_time(t, x)[:, None], 1 - as_time(s, x)[:, None], extras["v"]
        acceleration = 2 * (self.m + (self.c - 1) * v / self.k) - 2 * v
        return x + v * (after - u) + acceleration * (u + after) / 2 * (after - u)


@pytest.mark.parametrize("k", [-0.4, 1.5])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_what_a_rollout_begins_with_is_found_once(k: float, steps: int) -> None:
    """Constant acceleration: any number of steps, either way, entered anywhere, is exact to rounding for any initial
    velocity, which is asked for once a rollout."""
    flow_map, noise = Accelerated(0.7, 0.5, k), states()
    plan = Plan(tuple(1 - i / steps for i in range(steps)), 0.0)
    calls: list[Call] = []
    out = rollout(flow_map, noise, plan, calls=calls)
    assert flow_map.begun == 1 and all(torch.equal(call.begun["v"], k * noise) for call in calls)
    torch.testing.assert_close(out, 0.7 + 0.5 * noise, rtol=0, atol=2e-15)
    torch.testing.assert_close(encode(flow_map, out, plan), noise, rtol=0, atol=1e-14)
    assert flow_map.begun == 2
    entered = rollout(flow_map, None, plan, start=(steps - 1, calls[-1].x))
    torch.testing.assert_close(entered, out, rtol=0, atol=1e-14)
    before = flow_map.begun
    assert torch.equal(rollout(flow_map, noise, plan, begun=calls[0].begun), out) and flow_map.begun == before
    assert not torch.allclose(rollout(flow_map, noise, plan, begun={"v": noise + 1}), out)


def test_what_a_rollout_begins_with_reaches_what_is_made_of_it() -> None:
    """Edits, experts and log-probabilities; a scheduler has no place for it."""
    plan = Plan((1.0, 0.5), 0.0)
    one, two = Accelerated(0.7, 0.5, 1.5), Accelerated(-0.7, 0.5, -0.4)
    routed, cond = RoutedFlowMap([one, two], ByTime([0.5])), None
    torch.testing.assert_close(rollout(routed, states(), Plan((1.0,)), cond), 0.7 + 0.5 * states())
    noise = encode(routed, 0.7 + 0.5 * states(), Plan((1.0,)))
    assert one.begun and two.begun and noise.shape == (5, 2)
    left, right = (LabelledAcceleration(m) for m in (0.7, -0.7))
    labels = torch.tensor([0, 1, 1, 0, 1])
    by_class = RoutedFlowMap([left, right], ByClass([[0], [1]]))
    means = torch.where(labels == 0, 0.7, -0.7).to(F64)[:, None]
    made = rollout(by_class, states(), plan, labels)
    torch.testing.assert_close(made, means + 0.5 * states())
    torch.testing.assert_close(encode(by_class, made, plan, labels), states())
    free = edit(one, torch.zeros(5, 2, dtype=F64), Inpainting(torch.zeros(2)), plan, Rng(0))
    torch.testing.assert_close(free, 0.7 + 0.5 * Rng(0).normal_like(states()))
    calls: list[Call] = []
    noisy = Plan((1.0, 0.5))
    rollout(one, states(), noisy, rng=Rng(0), calls=calls)
    normal = -0.5 * Rng(0).normal_like(states()).square().mean(1) - math.log(0.5 * math.sqrt(2 * math.pi))
    torch.testing.assert_close(log_prob(one, noisy, calls[0]), normal)
    with pytest.raises(ValueError, match="finds v from its noise before the first step, which no scheduler does"):
        plan_table(Beginning(student().denoiser), Plan(TIMES, 0.0))


class LabelledAcceleration(Accelerated):
    """The same under two labels."""

    def __init__(self, m: float) -> None:
        super().__init__(m, 0.5, 1.5)
        self.classes = 2


class Beginning(Jump):
    """A jump that begins with something."""

    def begin(self, x: Tensor, t: Tensor | float, cond: Any = None) -> Mapping[str, Tensor]:
        return {"v": x}


def test_the_page_shows_what_it_says() -> None:
    """The example of the page on flow maps: what its comments call zero is zero."""
    page = (Path(__file__).parents[2] / "docs" / "ideas" / "flow-maps.md").read_text()
    (example,) = re.findall(r"## Rollouts\n.*?```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(example, names)
    zeros = re.findall(r"^print\((.*)\)  #.*zero$", example, re.MULTILINE)
    assert len(zeros) == 2 and all(float(eval(zero, names).abs().max()) < 1e-12 for zero in zeros)
