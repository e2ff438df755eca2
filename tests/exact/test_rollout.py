"""Rollouts: with exact flow maps the law of the data is left invariant; gradients go through one chosen call."""

import math

import pytest
import torch
from torch import nn

from fewstep.denoisers import NetworkDenoiser
from fewstep.discrete_vp import DiscreteVP
from fewstep.exact import ExactFlowMap, FiniteData, Gaussian, three_modes
from fewstep.flow_maps import Jump
from fewstep.grids import karras
from fewstep.networks import MLP
from fewstep.predictions import Velocity
from fewstep.randomness import Rng
from fewstep.sampling.rollout import Plan, Student, greedy_times, inner_time, rollout
from fewstep.schedules import EDM, FlowMatching, TrigFlow

N = 20_000
CRITICAL = 1.63 / N**0.5  # Kolmogorov-Smirnov, 1%
LAW_SCHEDULES = {"flow": FlowMatching(), "trig": TrigFlow(), "ddpm": DiscreteVP.linear()}


def plan(schedule, steps, gamma):
    """Times at equal ratios of noise, 10 down to 0.2 in units of the data, starting from pure noise."""
    rho = torch.logspace(1, math.log10(0.2), max(steps - 1, 1), dtype=torch.float64)[: steps - 1]
    return Plan((schedule.t_max, *schedule.time_at(-rho.log()).tolist()), gamma)


def ks(world, x):
    x = x.sort(0).values
    cdf = world.cdf(x, world.schedule.t_min)[:, 0]
    rank = torch.arange(len(x) + 1, dtype=torch.float64) / len(x)
    return float(torch.maximum(rank[1:] - cdf, cdf - rank[:-1]).max())


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("name", LAW_SCHEDULES)
@pytest.mark.parametrize("gamma", [1.0, 0.4])
def test_the_law_is_left_invariant(name, gamma, steps):
    """With the exact flow map as the student, any number of re-noising steps gives the data law: full re-noising
    (consistency sampling) and partial (CTM's gamma)."""
    world = three_modes(LAW_SCHEDULES[name])
    noise = Rng(steps, "law").normal(N, 1, dtype=torch.float64)
    out = rollout(ExactFlowMap(world), noise, plan(world.schedule, steps, gamma), rng=Rng(steps, name, "renoise"))
    assert ks(world, out) < CRITICAL


def test_a_wrong_student_fails_the_same_test():
    """The test above can fail: the denoiser's DDIM move in place of the flow map is far from the law."""
    world = three_modes(FlowMatching())
    noise = Rng(2, "law").normal(N, 1, dtype=torch.float64)
    out = rollout(Jump(world), noise, plan(world.schedule, 2, 1.0), rng=Rng(2, "renoise"))
    assert ks(world, out) > 5 * CRITICAL


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_deterministic_exact_jumps_are_the_exact_flow(schedule, steps, gen):
    """gamma = 0: many exact jumps are one (1e-9), and need no random numbers."""
    world = three_modes(schedule)
    noise = torch.randn(50, 1, generator=gen, dtype=torch.float64)
    times = karras(schedule, steps)[:-1].tolist()
    start = schedule.prior(noise)
    out = rollout(ExactFlowMap(world), noise, Plan(tuple(times), 0.0))
    torch.testing.assert_close(out, world.flow(start, schedule.t_max, schedule.t_min), rtol=0, atol=1e-9)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.8, 1.0])
def test_inner_time_and_kernel_add_up(schedule, gamma, gen):
    """A jump to the inner time and the noise of the kernel give the marginal of the next time; in variance-exploding
    units the inner level is sqrt(1 - gamma^2) of the next one."""
    s = float(schedule.time_at(torch.tensor(0.5, dtype=torch.float64)))
    r = inner_time(schedule, s, gamma)
    times = torch.tensor([r, s], dtype=torch.float64)
    a, sd = schedule.transition(*times)
    sigma_r, sigma_s = schedule.sigma(times)
    torch.testing.assert_close((a * sigma_r) ** 2 + sd**2, sigma_s**2, rtol=1e-10, atol=0)
    if gamma < 1:
        assert float(schedule.ratio(times)[0] / schedule.ratio(times)[1]) == pytest.approx(
            (1 - gamma**2) ** 0.5, rel=1e-7
        )
    else:
        assert r == schedule.t_min


def model():
    net = MLP((2,), width=16, blocks=1)
    nn.init.normal_(net.leave.weight, std=0.3)
    return Jump(NetworkDenoiser(net.double(), FlowMatching(), Velocity(), (2,)))


TIMES = (1.0, 0.7, 0.4, 0.2)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_stopping_early_sees_the_states_of_inference(gamma, gen):
    """stop = j is the clean prediction from exactly the state that inference reaches at its j-th time."""
    student, noise = model(), torch.randn(5, 2, generator=gen, dtype=torch.float64)
    calls = []
    full = rollout(student, noise, Plan(TIMES, gamma), rng=Rng(0, "noise"), calls=calls)
    assert [call.i for call in calls] == [0, 1, 2, 3] and torch.equal(calls[0].x, noise)
    for j in range(4):
        stopped = rollout(student, noise, Plan(TIMES, gamma), rng=Rng(0, "noise"), stop=j)
        assert torch.equal(stopped, student.to_data(calls[j].x, TIMES[j]))
    assert torch.equal(stopped, full)


def gradient(student, loss):
    return torch.autograd.grad(loss, list(student.parameters()), allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("gamma", [0.0, 1.0])
@pytest.mark.parametrize("at", [0, 2, 3])
def test_gradient_through_one_call_only(gamma, at, gen):
    """grad_at = i: the parameters' gradient is that of a rollout whose other calls use a frozen copy of the network;
    the samples are the same, and the network is as before."""
    student, frozen = model(), model()
    frozen.load_state_dict(student.state_dict())
    frozen.requires_grad_(False)
    noise = torch.randn(5, 2, generator=gen, dtype=torch.float64)
    out = rollout(student, noise, Plan(TIMES, gamma), rng=Rng(0, "noise"), grad_at=at)
    assert all(p.requires_grad for p in student.parameters())
    x, rng = noise, Rng(0, "noise")
    for i, t in enumerate(TIMES):
        net = student if i == at else frozen
        s = TIMES[i + 1] if i < 3 else 0.0
        renoised = gamma == 1 and i < 3
        x = (1 - s) * net.jump(x, t, 0.0) + s * rng.normal_like(x) if renoised else net.jump(x, t, s)
    torch.testing.assert_close(out, x, rtol=1e-12, atol=1e-12)
    expected = gradient(student, x.sum())
    assert any(float(g.abs().max()) > 1e-3 for g in expected)
    for ours, theirs in zip(gradient(student, out.sum()), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_gradient_at_a_stop_sees_no_graph_before(gen):
    """DMD2's step: stop and grad_at at the same call make the gradient of that call on a constant state,
    also when the noise itself is differentiable."""
    student, noise = model(), torch.randn(5, 2, generator=gen, dtype=torch.float64, requires_grad=True)
    calls = []
    out = rollout(student, noise, Plan(TIMES), rng=Rng(0), stop=2, grad_at=2, calls=calls)
    assert not calls[0].out.requires_grad and not calls[2].x.requires_grad
    again = student.to_data(calls[2].x, TIMES[2])
    for ours, expected in zip(gradient(student, out.sum()), gradient(student, again.sum()), strict=True):
        assert torch.equal(ours, expected)


def test_students_sample_in_the_steps_they_know(gen):
    """Plans by number of steps, the fewest by default, labels cycled, equal seeds equal samples; no weights needed."""
    data = FiniteData(FlowMatching(t_min=0.01), torch.tensor([[1.0, 0.0], [-1.0, 0.5], [0.0, -1.5]]), 0.1, [0, 1, 2])
    data.steps = 12  # to see which point a sample ends near
    student = Student(ExactFlowMap(data), {2: Plan((1.0, 0.5)), 1: Plan((1.0,))})
    x = student.sample(9, seed=3)
    assert x.shape == (9, 2) and torch.equal(x, student.sample(9, steps=1, seed=3))
    nearest = (x[:, None] - data.points).norm(dim=2).argmin(1)
    assert nearest.tolist() == [0, 1, 2] * 3
    assert not torch.equal(x, student.sample(9, steps=2, seed=3)) and not torch.equal(x, student.sample(9, seed=4))
    with pytest.raises(ValueError, match=r"steps=3: this student has plans for \[1, 2\] steps"):
        student.sample(1, steps=3)


def test_rollout_on_edm_starts_at_its_own_scale(gen):
    """Standard normal noise is scaled to sigma of the first time, which need not be t_max."""
    world = Gaussian(EDM(), torch.zeros(2), 1.0)
    noise = torch.randn(4, 2, generator=gen, dtype=torch.float64)
    out = rollout(ExactFlowMap(world), noise, Plan((10.0,)))
    torch.testing.assert_close(out, world.flow(10 * noise, 10.0, 0.002), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Plan(()), "at least one time"),
        (lambda: Plan((0.5, 0.5)), "strictly decreasing"),
        (lambda: Plan((1.0,), gamma=1.5), "gamma=1.5"),
        (lambda: Student(model(), {}), "at least one sampling plan"),
        (lambda: rollout(model(), torch.zeros(1, 2).double(), Plan(TIMES), rng=Rng(0), stop=4), "stop=4"),
        (lambda: rollout(model(), torch.zeros(1, 2).double(), Plan(TIMES)), "pass rng"),
    ],
)
def test_bad_rollouts_are_refused(call, message):
    """One clear line that names the field."""
    with pytest.raises(ValueError, match=message):
        call()


def test_greedy_search_of_times_finds_the_lowest_score() -> None:
    """Where the score falls and rises, ternary search finds the best time for every step, each with the earlier ones
    fixed, in a logarithm of the grid's length."""
    grid = list(range(1000, -1, -1))
    for wanted in ((3, 2), (1000 - 17, 400), (999, 998), (1, 0)):
        asked = []

        def score(times, wanted=wanted, asked=asked):
            asked.append(times)
            return abs(times[-1] - wanted[len(times) - 2])

        assert greedy_times(grid, 3, score) == (1000, *wanted)
        assert len(asked) == len(set(asked)) < 2 * 5 * math.log(len(grid))
    assert greedy_times(grid, 1, lambda times: 0.0) == (1000,)
    assert greedy_times(grid, 3, lambda times: 0.0) == (1000, 999, 998), "of equal scores the noisier time"
    assert greedy_times([3.0, 2.0, 1.0], 3, lambda times: 0.0) == (3.0, 2.0, 1.0)
    with pytest.raises(ValueError, match=r"steps=4 must lie in 1 \.\. 3"):
        greedy_times([3.0, 2.0, 1.0], 4, lambda times: 0.0)


def test_greedy_times_help_a_student_that_only_denoises() -> None:
    """The exact denoiser is a poor consistency function from pure noise: of three Gaussians it makes their mean.  A
    second call mends it where the search puts it, better than at either end of the grid."""
    world = three_modes(EDM())
    denoiser = Jump(world)
    grid = karras(EDM(), 40)[:-1].tolist()
    noise = torch.randn(4000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def score(times):
        return ks(world, rollout(denoiser, noise, Plan(times), rng=Rng(1)))

    first, second = greedy_times(grid, 2, score)
    found = score((first, second))
    assert found < 0.5 * min(score((first,)), score((first, grid[1])), score((first, grid[-1])))


def test_inner_times_of_a_plan():
    """Given one by one they are those of gamma where they say the same, and are kept in a model folder's plan."""
    schedule = EDM()
    plan = Plan((80.0, 10.0, 1.0), gamma=0.6)
    listed = Plan(plan.times, inner=tuple(plan.inner_at(schedule, i) for i in (0, 1)))
    net = ExactFlowMap(three_modes(schedule))
    noise = Rng(0).normal(5, 1, dtype=torch.float64)
    ends = [rollout(net, noise, p, rng=Rng(1)) for p in (plan, listed)]
    assert torch.equal(*ends)
    assert not torch.equal(ends[0], rollout(net, noise, Plan(plan.times, inner=(5.0, 0.5)), rng=Rng(1)))
    for inner in ((1.0,), (20.0, 0.5)):
        with pytest.raises(ValueError, match="must be one time per re-noising"):
            Plan(plan.times, inner=inner)
