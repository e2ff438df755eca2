"""Learned solvers: hand-made ones written out as rows, derivatives through the sampler, and optima in closed form."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import fewstep as fs
from fewstep.discrete_vp import DiscreteVP
from fewstep.exact import Gaussian, ring, three_modes
from fewstep.hub.settings import load_settings, save_settings
from fewstep.randomness import Rng
from fewstep.sampling import LearnedSolver, Levels, balanced, folded, solve
from fewstep.sampling.learned import schedule_id
from fewstep.sampling.learning import (
    Iterate,
    Task,
    damped_step,
    learn,
    learning,
    moved,
    normal_equations,
    sensitivities,
)
from fewstep.sampling.named import SOLVERS, named_solver, named_times
from fewstep.sampling.search import Reference, Setting, shortlist, tune
from fewstep.schedules import EDM, FlowMatching, TrigFlow, VPCosine, VPLinear

FAMILIES = {
    "vp": VPLinear(),
    # from lambda = -10 on, noise-form solvers multiply rounding by e^10 in their first step
    "cosine": VPCosine(log_snr_max=4.0),
    "edm": EDM(),
    "flow": FlowMatching(),
    "trig": TrigFlow(),
    "ddpm": DiscreteVP.linear(),
}
#: Stages that share a level, or steps that come back to one: their calls do not fall in time.
RUNGE_KUTTA = {"heun", "heun-native", "kutta3", "rk4", "ssp3"}
NOISY = {
    "euler-ancestral", "ddpm", "ddpm-large", "dpm2-ancestral", "dpmpp-2s-ancestral", "dpmpp-sde", "dpmpp-2m-sde",
    "dpmpp-3m-sde", "abm-sde",
}  # fmt: skip


def start_on(schedule, solver="unipc", steps=5):
    """A hand-made solver as rows."""
    made = named_solver(solver)
    return folded(made.table(Levels.of(schedule, named_times(schedule, made, steps, None))))


def exact_reference(world, n, name):
    """Starting points and where the exact flow takes them."""
    noise = Rng(0, name).normal(n, *world.shape, dtype=torch.float64)
    schedule = world.schedule
    return Reference(noise, world.flow(schedule.prior(noise), schedule.t_max, 0.0))


# hand-made solvers as rows


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", sorted(set(SOLVERS) - NOISY - RUNGE_KUTTA))
def test_rows_are_the_solver(name, family):
    """Histories of noise predictions, corrections, anchors and inner stages: the same end to rounding, on every
    schedule."""
    world = three_modes(FAMILIES[family])
    solver = SOLVERS[name]()
    times = balanced(world.schedule, 6)
    x = world.schedule.prior(Rng(0).normal(50, 1, dtype=torch.float64))
    rows = folded(solver.table(Levels.of(world.schedule, times)))
    want = solve(world, x, times, solver)
    got = solve(world, x, rows.grid(world.schedule, len(rows.times)), rows)
    assert float((got - want).abs().max()) < 1e-12 * float(want.abs().max().clamp_min(1))


@pytest.mark.parametrize("name", sorted(NOISY | RUNGE_KUTTA))
def test_what_is_no_list_of_falling_calls_is_refused(name):
    """Fresh noise, and two calls at one level."""
    table = SOLVERS[name]().table(Levels.of(VPLinear(), balanced(VPLinear(), 6)))
    with pytest.raises(ValueError, match=r"deterministic|fall strictly"):
        folded(table)


def test_a_learned_solver_is_sampled_like_any_other():
    """Its own times by default; the same result as the solver that it was written from."""
    world = three_modes()
    rows = start_on(world.schedule, "dpmpp-2m", 7)
    want = fs.sample(world, 20, solver="dpmpp-2m", steps=7)
    assert torch.allclose(fs.sample(world, 20, solver=rows), want, rtol=0, atol=1e-12)
    assert torch.equal(fs.sample(world, 20, solver=rows), fs.sample(world, 20, solver=rows, steps=7))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"steps": 6}, "steps=6: this solver was learned for 5 steps"),
        ({"grid": "karras"}, "a learned solver has times of its own"),
        ({"steps": 4, "grid": "karras"}, "too few"),
    ],
)
def test_another_grid_is_refused(how, said):
    """One line that says what is wrong."""
    with pytest.raises(ValueError, match=said):
        fs.sample(three_modes(), 3, solver=start_on(three_modes().schedule), **({"steps": 5} | how))


def test_another_schedule_is_refused():
    """Also one of the same family with other parameters."""
    rows = start_on(VPLinear())
    for schedule in (FlowMatching(), VPLinear(beta_max=19.0)):
        with pytest.raises(ValueError, match="learned on the schedule VPLinear-") as caught:
            fs.sample(three_modes(schedule), 3, solver=rows)
        assert "\n" not in str(caught.value) and schedule_id(schedule) in str(caught.value)


@pytest.mark.parametrize(
    ("times", "rows", "said"),
    [
        ((), (), "times is empty"),
        ((1.0, 0.5), ((1.0, 0.1),), "2 times and 1 rows: need one row a time"),
        ((1.0,), ((1.0, 0.1, 0.2),), r"rows\[0\] has 3 numbers, need 2"),
        ((1.0,), ((1.0, math.nan),), "finite"),
        ((0.5, 0.5), ((1.0, 0.1), (1.0, 0.1, 0.1)), "fall strictly"),
    ],
)
def test_numbers_that_are_no_solver(times, rows, said):
    """Lengths, finiteness, order."""
    with pytest.raises(ValueError, match=said):
        LearnedSolver("VPLinear-0", times, rows)


# the file


def test_a_file_keeps_every_bit(tmp_path):
    """Saved and loaded, the solver is equal, and its samples have the same bits."""
    world = three_modes()
    rows = start_on(world.schedule, "unipc-3", 5)
    path = save_settings(tmp_path / "x.json", Setting("unipc-3", "balanced", 5, 5, "static"), None, {}, rows)
    options = load_settings(path)
    assert options["solver"] == rows and options["steps"] == 5 and options["threshold"] == "static"
    got = fs.sample(world, 9, **options)
    assert torch.equal(got, fs.sample(world, 9, solver=rows, threshold="static"))
    assert len(json.loads(path.read_text())["learned"]["rows"]) == 5


def test_a_file_without_a_learned_solver(tmp_path):
    """The named setting itself."""
    setting = Setting("ddim", "karras", 4, 4)
    options = load_settings(save_settings(tmp_path / "x.json", setting, 2.0, {"model": "m"}))
    assert options == {**setting.options(), "guidance": 2.0}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"times": ["a"]}, r"learned.times\[0\] = \"a\" must be a finite number"),
        ({"rows": 3}, "learned.rows = 3 must be a list"),
        ({"rows": [[1.0]]}, r"LearnedSolver: rows\[0\] has 1 numbers, need 2"),
        ({"times": [1.0, 1.0], "rows": [[0.0, 1.0], [0.0, 1.0, 0.0]]}, "times must fall strictly"),
        ({"more": 1}, "more"),
    ],
)
def test_damaged_learned_solvers_are_refused(tmp_path, change, said):
    """Other types, lengths, orders or fields: one line with the file's name."""
    path = tmp_path / "x.json"
    save_settings(path, Setting("ddim", "karras", 1, 1), None, {}, LearnedSolver("VPLinear-0", (1.0,), ((0.0, 1.0),)))
    content = json.loads(path.read_text())
    content["learned"] |= change
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"x\.json: .*{said}") as caught:
        load_settings(path)
    assert "\n" not in str(caught.value)


# what a search hands over


def test_a_shortlist_is_the_best_on_a_quarter_of_the_points():
    """32 points: the first 8 decide, whatever the others say."""
    world = ring(TrigFlow())
    target = exact_reference(world, 32, "x")
    settings = [Setting(name, "balanced:centre=1", 6, 6) for name in ("ddim", "dpmpp-2m", "unipc", "dpmpp-3m")]
    best = [trial.setting for trial in tune(world, settings, target.part(0, 8))]
    spoiled = Reference(target.noise, torch.cat([target.ends[:8], target.noise[8:]]))
    assert shortlist(world, settings, spoiled, keep=2) == best[:2]
    assert [t.setting for t in tune(world, settings, spoiled)] != best


def test_parts_of_a_reference():
    """Noise, ends and every tensor of the conditions, of the samples from one on."""
    noise = torch.arange(6.0).reshape(6, 1)
    whole = Reference(noise, noise + 10, {"labels": torch.arange(6), "scale": 2.0}, 3.0)
    part = whole.part(2, 3)
    assert part.noise.flatten().tolist() == [2, 3, 4] and part.ends.flatten().tolist() == [12, 13, 14]
    assert part.cond["labels"].tolist() == [2, 3, 4] and part.cond["scale"] == 2.0 and part.guidance == 3.0
    assert Reference(noise, noise).part(0, 2).cond is None


# derivatives


@pytest.mark.parametrize("labelled", [False, True])
def test_derivatives_through_the_sampler_are_differences_of_the_sampler(labelled):
    """Every time and coefficient, against central differences of whole runs, every sample under its own condition.
    One-sided differences of step 6e-6 leave about as much, relative to second derivatives of order 1 to 100."""
    world = three_modes(TrigFlow(), labels=[0, 1, 2]) if labelled else ring(TrigFlow())
    solver = start_on(world.schedule, "unipc", 4)
    target = exact_reference(world, 6, "x")
    cond = torch.tensor([0, 2, 1, 1, 0, 2]) if labelled else None
    target = replace(target, cond=cond)
    task = Task.of(world, target, None)
    end, tangents = sensitivities(task, solver)
    count = len(tangents)
    assert count == 4 * 7 // 2 + 3

    def run_with(changed):
        return fs.sample(world, 6, solver=changed, noise=target.noise, cond=cond)

    assert torch.allclose(end, run_with(solver), rtol=0, atol=1e-10)

    for k in range(count):
        ahead, behind = (moved(solver, [d * (j == k) for j in range(count)], world.schedule) for d in (1e-5, -1e-5))
        slope = (run_with(ahead) - run_with(behind)) / 2e-5
        assert float((tangents[k] - slope).norm()) < 1e-3 * float(slope.norm().clamp_min(1e-2))


def test_the_gradient_is_that_of_the_mean_error():
    """Weighting by 1 / |r| makes ``g`` the derivative of the mean root mean square, times the root of the dimension."""
    world = ring(TrigFlow())
    solver = start_on(world.schedule, "dpmpp-2m", 4)
    task = Task.of(world, exact_reference(world, 40, "x"), None)
    _, gradient = normal_equations(task, solver, batch=64)
    for k in range(len(gradient)):
        change = [1e-5 * (j == k) for j in range(len(gradient))]
        ahead = moved(solver, change, world.schedule)
        behind = moved(solver, [-c for c in change], world.schedule)
        slope = (task.error(ahead) - task.error(behind)) / 2e-5 * math.sqrt(2)
        assert float(gradient[k]) == pytest.approx(slope, rel=1e-3, abs=1e-4)


# what is learned


def test_one_call_is_exact_for_two_variances():
    """``N(0, diag(s_1, s_2))``: a call is ``x (a + c k)`` along each axis, ``k = alpha s / (alpha^2 s + sigma^2)``, the
    flow is ``x sqrt(s / (alpha^2 s + sigma^2))``: two equations for a and c, whose solution is what is learned."""
    schedule, s = TrigFlow(t_max=1.3), torch.tensor([0.3, 2.0], dtype=torch.float64)
    world = Gaussian(schedule, torch.zeros(2), s.diag())
    time = torch.tensor(schedule.t_max, dtype=torch.float64)
    alpha, sigma = schedule.alpha(time), schedule.sigma(time)
    variance = alpha**2 * s + sigma**2
    equations = torch.stack([torch.ones(2, dtype=torch.float64), alpha * s / variance], 1)
    a, c = torch.linalg.solve(equations, (s / variance).sqrt())
    train, held_out = exact_reference(world, 16, "train"), exact_reference(world, 16, "held-out")
    found = learn(world, start_on(schedule, "ddim", 1), train, held_out)
    assert found.rows[0] == pytest.approx((float(a), float(c)), abs=1e-6)
    assert Task.of(world, held_out, None).error(found) < 1e-6


def test_one_call_is_exact_for_a_mean():
    """``N(m, s I)`` with a mean: m must be sent to itself too, ``c (1 - k alpha) = 1 - alpha sqrt(s / v)``."""
    schedule, s = TrigFlow(t_max=1.3), 0.4
    world = Gaussian(schedule, torch.tensor([0.5, -1.0, 2.0]), s)
    alpha, sigma = math.cos(1.3), 0.5 * math.sin(1.3)
    v = alpha**2 * s + sigma**2
    k, stretch = alpha * s / v, math.sqrt(s / v)
    c = (1 - alpha * stretch) / (1 - k * alpha)
    train, held_out = exact_reference(world, 16, "train"), exact_reference(world, 16, "held-out")
    found = learn(world, start_on(schedule, "ddim", 1), train, held_out)
    assert found.rows[0] == pytest.approx((stretch - c * k, c), abs=1e-6)


def test_two_calls_are_exact_for_four_variances():
    """Six numbers for four equations: the error of the hand-made start, a tenth of the data, falls to nothing."""
    world = Gaussian(TrigFlow(), torch.zeros(4), torch.tensor([0.05, 0.3, 1.0, 4.0]).diag())
    train, held_out = exact_reference(world, 16, "train"), exact_reference(world, 16, "held-out")
    start = start_on(world.schedule, "unipc", 2)
    task = Task.of(world, held_out, None)
    found = learn(world, start, train, held_out, iterations=20)
    assert task.error(start) > 0.05 and task.error(found) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_learning_on_every_schedule(family):
    """The mixture in five calls: the error of UniPC on points that were not learned from falls to less than half, and
    times keep falling inside the schedule."""
    world = three_modes(FAMILIES[family])
    start = start_on(world.schedule, "unipc", 5)
    first, last = world.schedule.t_max, world.schedule.t_min

    def reference(name):
        noise = Rng(0, name).normal(64, 1, dtype=torch.float64)
        return Reference(noise, world(world.flow(world.schedule.prior(noise), first, last), last))

    held_out = reference("held-out")
    found = learn(world, start, reference("train"), held_out)
    task = Task.of(world, held_out, None)
    assert task.error(found) < task.error(start) / 2
    assert found.times[0] == start.times[0] and found.times[-1] >= last


def test_never_worse_on_held_out_points():
    """Ends that have nothing to do with the starts can be learned by heart, which the held-out points refuse."""
    world = ring(TrigFlow())
    start = start_on(world.schedule, "unipc", 4)
    good = exact_reference(world, 32, "held-out")
    nonsense = Reference(good.noise[:2], Rng(1).normal(2, 2, dtype=torch.float64))
    iterates = list(learning(world, start, nonsense, good))
    assert iterates[-1].train < iterates[0].train and iterates[-1].held_out > iterates[0].held_out
    assert learn(world, start, nonsense, good) == start


def test_what_cannot_be_learned_is_refused():
    """Too many calls; another schedule."""
    world = three_modes()
    target = exact_reference(world, 2, "x")
    with pytest.raises(ValueError, match="17 calls are too many"):
        learn(world, start_on(world.schedule, "unipc", 17), target, target)
    with pytest.raises(ValueError, match="learned on the schedule FlowMatching"):
        learn(world, start_on(FlowMatching()), target, target)


@pytest.mark.parametrize(
    ("aim", "found", "change"),
    [
        (-1.0, 3e-9, -1 / (1 + 3e-9)),  # the bolder the better: down to the first below 1e-8
        (-0.98, 3e-3, -1 / 1.003),  # ten times bolder would be worse
        (-0.1, 30.0, -1 / 31),  # the first ones go beyond twice the aim: up to the one that does not
        (-0.01, 300.0, -1 / 301),  # the first above 100 is the last
        (-0.001, 1e-3, 0.0),  # no step lowers the error, and the damping starts anew
        (0.1, 1e-3, 0.0),
    ],
)
def test_the_damping_is_sought_by_tens(aim, found, change, monkeypatch):
    """With ``H = g = 1`` the step is ``-1 / (1 + damping)``, and the error is its distance from the aim."""
    monkeypatch.setattr("fewstep.sampling.learning.moved", lambda solver, change, schedule: solver + change[0])
    task = SimpleNamespace(denoiser=SimpleNamespace(schedule=None), error=lambda solver: abs(solver - aim))
    now = Iterate(0.0, abs(aim), 0.0)
    one = torch.ones(1, dtype=torch.float64)
    best, damping = damped_step(task, now, (one[None], one), 3e-3)
    assert best.solver == pytest.approx(change, rel=1e-12) and damping == pytest.approx(found, rel=1e-12)
    assert (best is now) == (change == 0)
