"""The engine and ``sample``: calls, memory, hooks, shapes, gradients, and every refusal."""

import math
import weakref

import pytest
import torch
from torch import nn

from fewstep.denoisers import CountCalls, Denoiser, NetworkDenoiser
from fewstep.discrete_vp import DiscreteVP
from fewstep.exact import Gaussian, ring, three_modes
from fewstep.flow_maps import Jump
from fewstep.grids import GRIDS, karras, log_snr
from fewstep.guidance import Guided
from fewstep.predictions import V
from fewstep.randomness import Rng
from fewstep.sampling import (
    ABM,
    DDIM,
    SOLVERS,
    DPMSolverPP2M,
    Hooks,
    Levels,
    Plan,
    Row,
    RungeKutta,
    Stage,
    Step,
    Student,
    Table,
    UniPC,
    balanced,
    run,
    sample,
    solve,
)
from fewstep.sampling.engine import Solver
from fewstep.sampling.solvers.runge_kutta import HEUN2, Tableau
from fewstep.schedules import EDM, FlowMatching, VPLinear

WORLD = three_modes()
GRID = log_snr(WORLD.schedule, 8)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# cost


@pytest.mark.parametrize("name", SOLVERS)
def test_calls_are_as_declared(name):
    """The network is called as often as the solver and its table say, on a grid without singular ends."""
    solver, counted = SOLVERS[name](), CountCalls(WORLD)
    solve(counted, noise(3, 1), GRID, solver, rng=Rng(0))
    table = solver.table(Levels.of(WORLD.schedule, GRID))
    assert counted.calls == solver.calls(8) == table.calls


@pytest.mark.parametrize("name", SOLVERS)
def test_calls_on_a_grid_with_singular_ends(name):
    """From pure noise to pure data only the table's number is exact; EDM's Heun makes 2 N - 1 calls to data."""
    world = three_modes(FlowMatching())
    solver, counted = SOLVERS[name](), CountCalls(world)
    times = balanced(world.schedule, 8)
    solve(counted, noise(3, 1), times, solver, rng=Rng(0))
    assert counted.calls == solver.table(Levels.of(world.schedule, times)).calls <= solver.calls(8)
    heun = RungeKutta(HEUN2).table(Levels.of(EDM(), balanced(EDM(), 18)))
    assert heun.calls == 35


@pytest.mark.parametrize(("name", "kept"), [("ddim", 1), ("dpmpp-2m", 2), ("unipc", 3), ("unipc-3", 4), ("rk4", 4)])
def test_memory_is_the_history(name, kept):
    """No more model outputs stay alive than the table's longest row reaches back to, and none waits for the garbage
    collector."""
    alive, most = [], 0

    class Watched(Denoiser):
        def forward(self, x, t, cond=None):
            nonlocal most
            most = max(most, sum(ref() is not None for ref in alive))
            out = WORLD(x, t, cond)
            alive.append(weakref.ref(out))
            return out

    table = SOLVERS[name]().table(Levels.of(WORLD.schedule, GRID))
    assert table.memory == kept
    run(Watched(WORLD.schedule, (1,)), noise(3, 1), table)
    assert most == kept


def test_a_table_can_be_run_again():
    """Running a table does not change it: the same state in, the same out."""
    table = UniPC(p=3).table(Levels.of(WORLD.schedule, GRID))
    x = noise(5, 1)
    assert torch.equal(run(WORLD, x, table), run(WORLD, x, table))
    assert torch.equal(run(WORLD, x, table), solve(WORLD, x, GRID, UniPC(p=3)))


class NoisePredictionDDIM(Solver):
    """DDIM written in noise prediction: x_t = (alpha_t / alpha_s) x + (sigma_t - alpha_t / alpha_s sigma_s) eps."""

    output = "eps"

    @property
    def order(self):
        return 1

    def table(self, levels):
        steps = []
        for i in range(levels.steps):
            a = levels.alpha[i + 1] / levels.alpha[i]
            row = Row(a, (levels.sigma[i + 1] - a * levels.sigma[i],))
            steps.append(Step((Stage(levels.times[i], row),)))
        return Table(levels, steps, self.output)


def test_a_history_of_noise_predictions():
    """A solver may declare that its history holds eps: DDIM in eps equals DDIM in D."""
    x = noise(5, 1)
    gap = solve(WORLD, x, GRID, NoisePredictionDDIM()) - solve(WORLD, x, GRID, DDIM())
    assert float(gap.abs().max()) < 1e-13


# shapes


@pytest.mark.parametrize("shape", [(6,), (1, 6), (3, 2, 2), (2, 3, 2, 2), (2, 8)], ids=str)
@pytest.mark.parametrize("name", ["dpmpp-2m", "unipc-3", "rk4", "ddpm"])
def test_any_shape_of_sample(name, shape):
    """Flat, audio [C, L], picture [C, H, W] and video [C, F, H, W] batches give what their flattened rows give."""
    n = math.prod(shape)
    mean = torch.linspace(-1, 1, n, dtype=torch.float64)
    x, times, solver = noise(4, n), log_snr(VPLinear(), 5), SOLVERS[name]()
    flat = solve(Gaussian(VPLinear(), mean, 0.3), x, times, solver, rng=Rng(1))
    shaped = solve(Gaussian(VPLinear(), mean.reshape(shape), 0.3), x.reshape(4, *shape), times, solver, rng=Rng(1))
    # A stochastic step draws its noise sample by sample, so the same numbers whatever the shape.
    assert float((shaped.flatten(1) - flat).abs().max()) < 1e-13


def test_samples_do_not_depend_on_their_batch():
    """A batch of four gives what its halves give."""
    x = noise(4, 1)
    parts = [solve(WORLD, half, GRID, UniPC(p=3)) for half in x.split(2)]
    assert torch.equal(solve(WORLD, x, GRID, UniPC(p=3)), torch.cat(parts))


def test_float32_states_stay_float32():
    """The table is float64, the state keeps its own type and a float32 result is that of float64 to rounding."""
    x = noise(64, 1)
    single = solve(WORLD, x.float(), GRID, UniPC(p=3))
    assert single.dtype == torch.float32
    assert float((single - solve(WORLD, x, GRID, UniPC(p=3))).abs().max()) < 2e-5


def test_bfloat16_states_stay_bfloat16():
    """A bfloat16 state is off by its own rounding, 2^-8 an operation."""
    x = noise(64, 1)
    half = solve(WORLD, x.bfloat16(), GRID, DDIM())
    assert half.dtype == torch.bfloat16
    assert float((half.double() - solve(WORLD, x, GRID, DDIM())).abs().max()) < 0.05


def test_gradients_flow_through_a_solve():
    """The derivative of the end point in the start state, against a central difference."""
    x = noise(3, 1).requires_grad_()
    (slope,) = torch.autograd.grad(solve(WORLD, x, GRID, UniPC(p=2)).sum(), x)
    with torch.no_grad():
        high, low = (solve(WORLD, x + step, GRID, UniPC(p=2)) for step in (1e-5, -1e-5))
    assert float((slope - (high - low) / 2e-5).abs().max()) < 1e-7


# hooks


def test_hooks_that_do_nothing_change_nothing():
    """Identity hooks give the bits of no hooks, for a multistep, a corrected and a Runge-Kutta solver."""
    hooks = Hooks(
        start=lambda x: x,
        input=lambda k, x, t: (x, t),
        output=lambda k, x0, x, t: x0,
        history=lambda k, m, past: m,
        after=lambda i, x: x,
    )
    x = noise(5, 1)
    for name in SOLVERS:
        plain = solve(WORLD, x, GRID, SOLVERS[name](), rng=Rng(0))
        assert torch.equal(solve(WORLD, x, GRID, SOLVERS[name](), rng=Rng(0), hooks=hooks), plain)


def test_hooks_are_called_at_their_places():
    """Which calls and steps each hook is told of, for a two-stage solver."""
    seen = []
    hooks = Hooks(
        start=lambda x: seen.append("start") or x,
        input=lambda k, x, t: seen.append(f"input {k}") or (x, t),
        output=lambda k, x0, x, t: seen.append(f"output {k}") or x0,
        history=lambda k, m, past: seen.append(f"history {k} of {len(past)}") or m,
        after=lambda i, x: seen.append(f"after {i}") or x,
    )
    solve(WORLD, noise(2, 1), GRID[:3], RungeKutta(HEUN2), hooks=hooks)
    one = ["input 0", "output 0", "history 0 of 0", "input 1", "output 1", "history 1 of 1", "after 0"]
    two = ["input 2", "output 2", "history 2 of 2", "input 3", "output 3", "history 3 of 2", "after 1"]
    assert seen == ["start", *one, *two]


def test_an_output_hook_is_a_clipped_denoiser():
    """Clamping in the hook equals clamping in the denoiser, also for a history in noise prediction."""
    x = noise(9, 1)
    clamp = Hooks(output=lambda k, x0, x, t: x0.clamp(-0.5, 0.5))

    class Clamped(Denoiser):
        def forward(self, x, t, cond=None):
            return WORLD(x, t, cond).clamp(-0.5, 0.5)

    for solver in (DPMSolverPP2M(), RungeKutta(HEUN2), NoisePredictionDDIM()):
        hooked = solve(WORLD, x, GRID, solver, hooks=clamp)
        assert torch.equal(hooked, solve(Clamped(WORLD.schedule, (1,)), x, GRID, solver))
        assert not torch.equal(hooked, solve(WORLD, x, GRID, solver))


def test_input_hook_changes_what_the_network_sees_only():
    """A time shift on the input (as for discrete data) moves the model's times and leaves the solver's alone."""
    seen = []

    class Listening(Denoiser):
        def forward(self, x, t, cond=None):
            seen.append((float(x[0, 0]), float(t[0])))
            return torch.zeros_like(x)

    times, x = GRID, noise(1, 1)
    shift = Hooks(input=lambda k, x, t: (2 * x, t * 0.5))
    end = solve(Listening(WORLD.schedule, (1,)), x, times, DDIM(), hooks=shift)
    assert [t for _, t in seen] == pytest.approx((times[:-1] / 2).tolist())
    assert seen[0][0] == pytest.approx(2 * float(x))
    # with D = 0 the state only shrinks with sigma
    scale = WORLD.schedule.sigma(times[-1]) / WORLD.schedule.sigma(times[0])
    assert float(end) == pytest.approx(float(x * scale), rel=1e-12)


def test_history_hook_mixes_outputs():
    """A hook that returns the previous output delays 2M by one call; it sees the past newest first."""
    lengths = []

    def delayed(k, m, past):
        lengths.append(len(past))
        return past[0] if past else m

    x = noise(3, 1)
    mixed = solve(WORLD, x, GRID[:4], DDIM(), hooks=Hooks(history=delayed))
    first = WORLD(x, GRID[0])
    expected = x
    for row in [step.stages[0].row for step in DDIM().table(Levels.of(WORLD.schedule, GRID[:4])).steps]:
        expected = row.a * expected + row.c[0] * first
    assert float((mixed - expected).abs().max()) < 1e-14
    assert lengths == [0, 1, 1]


def test_after_hook_steers_the_next_step_also_before_a_corrector():
    """A state pinned after every step stays pinned; UniPC's next step starts there, and corrects the last one."""
    pin = Hooks(after=lambda i, x: torch.full_like(x, 0.3))
    x = noise(3, 1)
    for solver in (DDIM(), UniPC(p=2), RungeKutta(HEUN2)):
        assert bool((solve(WORLD, x, GRID, solver, hooks=pin) == 0.3).all())
    times = GRID[:3]
    table = UniPC(p=1).table(Levels.of(WORLD.schedule, times))
    free_last = Hooks(after=lambda i, x: torch.full_like(x, 0.3) if i == 0 else x)
    got = run(WORLD, x, table, hooks=free_last)
    pinned = torch.full_like(x, 0.3)
    row = table.steps[1].stages[0].row
    expected = row.a * pinned + row.c[0] * WORLD(pinned, times[1]) + row.c[1] * WORLD(x, times[0])
    assert float((got - expected).abs().max()) < 1e-14


def test_start_hook_replaces_the_start():
    """Sampling goes on from what the hook returns."""
    x = noise(3, 1)
    assert torch.equal(
        solve(WORLD, x, GRID, DDIM(), hooks=Hooks(start=lambda x: 2 * x)), solve(WORLD, 2 * x, GRID, DDIM())
    )


def test_progress_counts_steps():
    """One report a step, with the total."""
    seen = []
    solve(WORLD, noise(2, 1), GRID, UniPC(), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, 8) for i in range(8)]


# refusals


def test_refusals_of_the_engine():
    """Noise without rng, a foreign table, a bad grid, bad hyper-parameters: one line each."""
    x = noise(2, 1)
    with pytest.raises(ValueError, match="pass rng"):
        solve(WORLD, x, GRID, DDIM(eta=0.5))
    table = DDIM().table(Levels.of(EDM(), karras(EDM(), 4)))
    with pytest.raises(ValueError, match="table is for EDM"):
        run(WORLD, x, table)
    with pytest.raises(ValueError, match="strictly decreasing"):
        solve(WORLD, x, torch.tensor([1.0, 0.5, 0.5, 0.1]), DDIM())
    with pytest.raises(ValueError, match="leave the schedule's range"):
        solve(WORLD, x, torch.tensor([1.5, 0.5]), DDIM())
    with pytest.raises(ValueError, match=r"eta=1\.5"):
        DDIM(eta=1.5)
    with pytest.raises(ValueError, match="p=0"):
        UniPC(p=0)
    with pytest.raises(ValueError, match="variant: 'bh3' is not one of bh1, bh2, vary"):
        UniPC(variant="bh3")
    with pytest.raises(ValueError, match="explicit tableau"):
        Tableau(2, (0, 1), ((), (1, 2)), (0.5, 0.5))


# the default grid


@pytest.mark.parametrize("steps", [1, 2, 10, 100, 1000])
def test_balanced_grid_on_every_schedule(schedule, steps):
    """steps + 1 falling times from t_max, usable by the engine; the last network call is not below t_min; the end is
    pure data."""
    grid = balanced(schedule, steps)
    assert grid.shape == (steps + 1,) and float(grid[0]) == schedule.t_max
    assert float(grid[-2]) >= schedule.t_min * (1 - 1e-9)
    assert float(grid[-1]) == schedule.data_time
    if steps == 1000 and schedule.t_min > 0:
        assert float(grid[-2]) == pytest.approx(schedule.t_min, rel=1e-9)
    Levels.of(schedule, grid)


def test_balanced_grid_is_flow_matchings_time():
    """With kappa = 1 it is the uniform grid of flow matching, seen from any schedule."""
    u = torch.linspace(1, 0, 9, dtype=torch.float64)
    assert float((balanced(FlowMatching(), 8, kappa=1.0) - u).abs().max()) < 1e-8
    ratio = EDM().sigma(balanced(EDM(), 8, kappa=1.0))
    expected = u * 80 / 81
    assert float((ratio / (1 + ratio) - expected).abs().max()) < 1e-12


@pytest.mark.parametrize("solver", ["dpmpp-2m", "unipc"])
def test_balanced_grid_beats_karras_on_the_ring(solver):
    """Ten calls on a ring of 8 Gaussians: at least ten times closer to the exact flow than on Karras' grid (measured:
    0.011 and 0.016 against 0.36 and 0.34)."""
    world = ring(VPLinear())
    x = noise(200, 2)
    exact = world.flow(x, 1.0, 0.0)
    error = {}
    for name, times in {"balanced": balanced(world.schedule, 10), "karras": to_data(karras(world.schedule, 9))}.items():
        error[name] = float((solve(world, x, times, SOLVERS[solver]()) - exact).norm(dim=1).mean())
    assert error["balanced"] < 0.03 and error["balanced"] < error["karras"] / 10


def to_data(times):
    """The grid with a last step to time 0."""
    return torch.cat([times, times.new_zeros(1)])


# sample


def test_sample_with_every_solver_and_grid():
    """Every name works, and the samples lie on the ring."""
    world = ring(VPLinear())
    for name in SOLVERS:
        x = sample(world, 40, solver=name, steps=20)
        assert x.shape == (40, 2) and x.dtype == torch.float64
        assert float((x.norm(dim=1) - 2).abs().mean()) < 0.3, name  # the radius itself has sd 0.25
    for grid in [*GRIDS, "balanced"]:
        discrete = ring(DiscreteVP.linear()) if grid == "trailing" else world
        assert float((sample(discrete, 40, solver="unipc", grid=grid, steps=20).norm(dim=1) - 2).abs().mean()) < 0.3, (
            grid
        )


def test_sample_is_solve_from_scaled_noise():
    """By hand: noise from the seed, scaled by sigma at the first time, the default grid and solver."""
    world = three_modes(EDM())
    got = sample(world, 5, steps=7, seed=3)
    start = Rng(3, "sample").normal(5, 1, dtype=torch.float64) * 80
    assert torch.equal(got, solve(world, start, ABM().grid(EDM(), 7), ABM()))
    assert torch.equal(sample(world, 5, steps=7, noise=start / 80), got)
    times = karras(EDM(), 7)[1:]
    partial = sample(world, 5, grid=times, noise=start / 80)
    assert torch.equal(partial, solve(world, start / 80 * times[0], times, ABM()))


def test_seeds():
    """Equal seeds, equal samples, also for stochastic solvers; another seed, other samples."""
    for solver in ("unipc", "ddpm"):
        one, two, other = (sample(WORLD, 4, solver=solver, seed=s) for s in (1, 1, 2))
        assert torch.equal(one, two) and not torch.equal(one, other)


def test_labels_are_cycled_and_checked():
    """A conditional world gets 0, 1, 2, 0, ... unless told otherwise."""
    world = three_modes(labels=[0, 1, 2])
    cycled = sample(world, 6)
    assert torch.equal(cycled, sample(world, 6, cond=torch.tensor([0, 1, 2, 0, 1, 2])))
    assert float(cycled[0]) < -0.2 and float(cycled[2]) > 0.5  # means -1.2 and 1.5, sds .3
    with pytest.raises(ValueError, match=r"0 \.\. 2"):
        sample(world, 2, cond=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="3 conditions for 2 samples"):
        sample(world, 2, cond=torch.tensor([0, 1, 2]))


def test_guidance_wraps_the_denoiser():
    """``guidance=w`` is the Guided combinator; without a condition it is refused."""
    world = three_modes(labels=[0, 1, 2])
    cond = torch.tensor([2, 2, 1])
    assert torch.equal(sample(world, 3, cond=cond, guidance=2.0), sample(Guided(world, 2.0), 3, cond=cond))
    assert not torch.equal(sample(world, 3, cond=cond, guidance=2.0), sample(world, 3, cond=cond))
    with pytest.raises(ValueError, match="needs a conditional model"):
        sample(WORLD, 3, guidance=2.0)


class Noisy(nn.Module):
    """A network with dropout, and a part that its owner keeps in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.dropout, self.frozen = nn.Dropout(0.5), nn.Dropout(0.5)

    def forward(self, x, t, cond=None):
        return self.frozen(self.dropout(x)) * self.weight


def test_sample_switches_dropout_off_and_back():
    """Sampling is deterministic with a network in training mode, and gives every module its mode back."""
    net = Noisy().train()
    net.frozen.eval()
    denoiser = NetworkDenoiser(net, VPLinear(), V(), (4,))
    one = sample(denoiser, 3)
    assert torch.equal(one, sample(denoiser, 3)) and one.dtype == torch.float32 and not one.requires_grad
    assert net.training and net.dropout.training and not net.frozen.training


def test_refusals_of_sample():
    """Unknown names are answered with the choices; counts and shapes that do not fit are named."""
    with pytest.raises(ValueError, match=r"solver='eulr' is not known; choose one of abm, .*unipc"):
        sample(WORLD, 2, solver="eulr")
    with pytest.raises(ValueError, match=r"grid='kerras' is not known; choose one of balanced, karras"):
        sample(WORLD, 2, grid="kerras")
    with pytest.raises(ValueError, match="n=0"):
        sample(WORLD, 0)
    with pytest.raises(ValueError, match="steps=0"):
        sample(WORLD, 2, steps=0)
    with pytest.raises(ValueError, match=r"noise of shape \[3, 1\] does not fit 2 samples"):
        sample(WORLD, 2, noise=noise(3, 1))
    with pytest.raises(ValueError, match=r"steps=5, but the given grid of 9 times has 8 steps"):
        sample(WORLD, 2, grid=GRID, steps=5)
    with pytest.raises(ValueError, match="takes a Denoiser, got Student"):
        sample(Student(Jump(WORLD), {1: Plan((1.0,))}), 2)
