"""DPM-OT: semi-discrete transport against closed forms and a linear program, and what follows it."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from fewstep.denoisers import CountCalls, Denoiser
from fewstep.exact import Gaussian, GaussianMixture
from fewstep.grids import log_snr
from fewstep.hub.statistics import digest, load_statistics, read_fingerprint, save_statistics
from fewstep.metrics.mode_mixture import mode_mixture
from fewstep.randomness import Rng
from fewstep.sampling import DDIM, Hooks, RungeKutta, sample, solve
from fewstep.sampling.dpm_ot import optimal_transport as ot
from fewstep.sampling.dpm_ot.expressway import (
    Expressway,
    annealed_langevin,
    error_bound,
    express,
    fingerprint,
    noisy_targets,
    reverse_targets,
    transport_error,
)
from fewstep.sampling.dpm_ot.optimal_transport import (
    Adam,
    AveragedGradient,
    BrenierPotential,
    GaussianSource,
    Masses,
    UniformSource,
    as_if_independent,
    transport,
)
from fewstep.sampling.solvers.runge_kutta import RK4
from fewstep.schedules import EDM, FlowMatching, VPLinear


def line(n: int, seed: int = 0) -> torch.Tensor:
    """Sorted targets ``[n, 1]`` on the line."""
    return Rng(seed, "line").normal(n, 1, dtype=torch.float64).sort(dim=0).values


def rearrangement(y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The heights that send quantiles of the uniform law to those of the targets: cells end at the cumulated weights,
    where neighbouring planes meet."""
    steps = -weights.cumsum(0)[:-1] * y[:, 0].diff()
    h = torch.cat([steps.new_zeros(1), steps.cumsum(0)])
    return h - h.mean()


def cloud(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return Rng(seed, "cloud").normal(n, d, dtype=torch.float64)


EQUAL16 = torch.full((16,), 1 / 16, dtype=torch.float64)


@pytest.mark.parametrize("weights", [EQUAL16, torch.arange(1.0, 17).double() / 136], ids=["equal", "unequal"])
def test_on_the_line_the_map_is_the_monotone_rearrangement(weights) -> None:
    """With the closed-form heights the point x goes to the target at x's quantile, for every x."""
    y = line(16)
    potential = BrenierPotential.of(y, UniformSource(), weights).at(rearrangement(y, weights))
    x = (torch.arange(2**14, dtype=torch.float64)[:, None] + 0.5) / 2**14  # no point on an edge of a cell
    expected = torch.searchsorted(weights.cumsum(0), x[:, 0])
    assert torch.equal(potential.cells(x), expected)
    assert torch.equal(potential(x), y[expected])


@pytest.mark.parametrize("weights", [EQUAL16, torch.arange(1.0, 17).double() / 136], ids=["equal", "unequal"])
def test_averaged_gradient_reaches_the_rearrangement(weights) -> None:
    """Masses as wanted and heights as in the closed form, up to a constant: h_{j+1} = h_j - (j / n) (y_{j+1} - y_j)."""
    y = line(16)
    found, masses = transport(y, Rng(0), UniformSource(), weights, AveragedGradient(tolerance=0.03))
    assert masses.error <= 0.03 and len(masses.empty) == 0
    assert found.masses(200_000, Rng(1)).error < 0.05
    assert float((found.heights - rearrangement(y, weights)).abs().max()) < 5e-3


def test_adam_of_the_paper_reaches_the_rearrangement() -> None:
    """1000 iterations bring the heights within 5e-3 of the closed form and the masses within 6 %."""
    y = line(16)
    solver = Adam(rate=0.01, iterations=1000, draws=50)
    found, masses = transport(y, Rng(0), UniformSource(), EQUAL16, solver)
    assert float((found.heights - rearrangement(y, EQUAL16)).abs().max()) < 5e-3
    assert found.masses(200_000, Rng(1)).error < 0.06 and len(masses.empty) == 0


def test_masses_follow_unequal_weights_in_the_plane() -> None:
    """The masses of the cells are the wanted ones within the error of counting, 1 : 2 : .. : 12."""
    weights = torch.arange(1.0, 13).double()
    found, _ = transport(cloud(12, 2), Rng(0), weights=weights, solver=AveragedGradient(tolerance=0.02))
    assert torch.allclose(found.weights, weights / weights.sum())
    shares = found.masses(100_000, Rng(1)).shares
    counting = (found.weights / 100_000).sqrt()
    # 4 standard deviations of counting, and twice the relative error that the solver was asked for
    assert bool(((shares - found.weights).abs() < 4 * counting + 0.04 * found.weights).all())


def test_energy_is_convex_and_the_gradient_is_its_slope() -> None:
    """Midpoint convexity and the subgradient inequality hold draw by draw; adding a constant changes nothing."""
    base = BrenierPotential.of(cloud(30, 3), GaussianSource())
    x, h = Rng(1).normal(500, 3, dtype=torch.float64), cloud(30, 2, seed=5).T
    a, b, middle = base.at(h[0]), base.at(h[1]), base.at((h[0] + h[1]) / 2)
    assert middle.energy(x) < (a.energy(x) + b.energy(x)) / 2 - 1e-3
    assert b.energy(x) >= a.energy(x) + float(a.gradient(x) @ (h[1] - h[0])) - 1e-12
    assert a.energy(x) >= b.energy(x) + float(b.gradient(x) @ (h[0] - h[1])) - 1e-12
    step = 1e-9 * h[1]  # so small that no draw changes its cell: the energy is linear between
    assert base.at(h[0] + step).energy(x) - a.energy(x) == pytest.approx(float(a.gradient(x) @ step), abs=1e-14)
    assert base.at(h[0] + 7).energy(x) == pytest.approx(a.energy(x), abs=1e-13)


def test_moving_all_targets_leaves_the_cells() -> None:
    """Exactly, for the same heights (whole numbers, so that no sum is rounded)."""
    y = torch.randint(-50, 50, (200, 4), generator=torch.Generator().manual_seed(0)).double()
    h = torch.randint(-99, 99, (200,), generator=torch.Generator().manual_seed(1)).double()
    x = torch.randint(-50, 50, (300, 4), generator=torch.Generator().manual_seed(2)).double()
    weights = torch.full((200,), 1 / 200, dtype=torch.float64)
    here = BrenierPotential(y, h, weights, GaussianSource())
    there = BrenierPotential(y + torch.tensor([3.0, -8.0, 100.0, 1.0]), h, weights, GaussianSource())
    assert torch.equal(here.cells(x), there.cells(x))


@pytest.mark.parametrize("source", [GaussianSource(), UniformSource()], ids=["gaussian", "uniform"])
def test_any_heights_are_optimal_for_the_masses_they_have(source) -> None:
    """Referee: scipy's assignment of 300 draws to targets repeated as often as they were hit costs what T costs."""
    y = cloud(25, 3)
    potential = BrenierPotential.of(y, source).at(0.3 * cloud(25, 1)[:, 0])
    x = source.draw(300, (3,), Rng(4)).double()
    cells = potential.cells(x)
    assert len(cells.unique()) > 5
    cost = torch.cdist(x, y[cells]).square().numpy()
    rows, columns = linear_sum_assignment(cost)
    assert cost.trace() == pytest.approx(cost[rows, columns].sum(), rel=1e-12)


def test_solved_map_is_near_the_best_assignment_of_draws() -> None:
    """Referee: 20 draws a target, assigned by scipy to the equal targets: their optimal cost is that of T up to the
    noise of 20 draws, which both estimates share."""
    y = cloud(50, 2)
    found, _ = transport(y, Rng(0), solver=AveragedGradient(tolerance=0.03))
    x = Rng(8).normal(1000, 2, dtype=torch.float64)
    cost = torch.cdist(x, y.repeat_interleave(20, 0)).square().numpy()
    best = cost[linear_sum_assignment(cost)].mean()
    mine = float((x - found(x)).square().sum(1).mean())
    # dual value: a lower bound for every heights, so it cannot exceed the optimum of the same draws
    dual = float(x.square().sum(1).mean() + (found.weights @ y.square().sum(1))) - 2 * found.energy(x)
    assert dual <= best + 1e-9
    assert best == pytest.approx(dual, rel=0.1) and best == pytest.approx(mine, rel=0.1)


def test_blocks_do_not_change_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planes compared 7 at a time over 11 draws at a time give the same k highest as all at once, in order."""
    potential = BrenierPotential.of(cloud(50, 3), GaussianSource()).at(cloud(50, 1)[:, 0])
    x = Rng(2).normal(40, 3, dtype=torch.float64)
    scores = x @ potential.targets.T + potential.heights
    monkeypatch.setattr(ot, "TARGET_ROWS", 7)
    monkeypatch.setattr(ot, "SOURCE_ROWS", 11)
    for k in (1, 2, 5, 20):
        values, index = potential.planes(x, k)
        best = scores.topk(k, dim=1)
        assert torch.equal(index, best.indices) and torch.allclose(values, best.values, atol=1e-14, rtol=0)
    assert potential.masses(40, Rng(3)).draws == 40


def test_high_dimensions_start_near_the_answer_and_end_near_the_limit_of_counting() -> None:
    """300 unequal targets in 128 dimensions: equal heights are far off, the starting ones not; with N draws a target
    the averaged solver comes within 2.6 / sqrt(N), and Adam with as many draws does not come half as near."""
    y = cloud(300, 128).float() * torch.linspace(0.7, 1.3, 300)[:, None] + 3
    zero = BrenierPotential.of(y, GaussianSource())
    assert zero.masses(30_000, Rng(1)).error > 1
    assert zero.at(as_if_independent(zero)).masses(100_000, Rng(1)).error < 0.25
    used: list[int] = []
    found, _ = transport(
        y, Rng(0), solver=AveragedGradient(tolerance=0.08), report=lambda done, allowed, masses: used.append(done)
    )
    error = found.masses(200_000, Rng(2)).error
    assert error < 2.6 * math.sqrt(300 / used[-1]) and used == sorted(used)
    slow, _ = transport(y, Rng(0), solver=Adam(iterations=used[-1] // 3000))
    assert slow.masses(200_000, Rng(2)).error > 2 * error


def test_the_error_of_masses_is_unbiased() -> None:
    """Cells of known masses: the mean over 2000 counts of 500 draws of the squared error is the chi-squared divergence,
    where counting alone would add 0.005."""
    weights = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    masses = torch.tensor([0.55, 0.25, 0.1, 0.1], dtype=torch.float64)
    truth = float(((masses - weights) ** 2 / weights).sum())
    draws = torch.multinomial(masses, 2000 * 500, True, generator=torch.Generator().manual_seed(0)).view(2000, 500)
    found = torch.tensor([Masses(torch.bincount(row, minlength=4), weights).error ** 2 for row in draws])
    spread = float(found.std()) / 2000**0.5
    assert abs(float(found.mean()) - truth) < 3 * spread < 0.0049


def test_one_target_takes_everything() -> None:
    """n = 1: T is constant, no draw is needed."""
    y = cloud(1, 5)
    found, masses = transport(y, Rng(0))
    assert torch.equal(found(Rng(1).normal(9, 5)), y.expand(9, 5))
    assert masses.error == 0 and len(masses.empty) == 0


def test_a_cell_without_mass_is_reported() -> None:
    """A plane below all others is named; a solver that may draw too little says that it is not done."""
    potential = BrenierPotential.of(cloud(20, 2), GaussianSource())
    h = torch.zeros(20, dtype=torch.float64)
    h[7] = -100
    assert 7 in potential.at(h).masses(20_000, Rng(0)).empty.tolist()
    _, masses = transport(cloud(20, 2), Rng(0), solver=AveragedGradient(draws=1, tolerance=0.01))
    assert masses.error > 0.01


def test_angles_find_the_jump_between_clusters() -> None:
    """Two clusters, their pairs of highest planes within or across: the angle between normals (y, -1) is that of
    trigonometry, and discarding the large ones leaves draws whose two highest planes are of one cluster."""
    y = torch.tensor([[1.3, 0.9], [0.8, 1.2], [-1.4, -1.0], [-0.9, -1.2]], dtype=torch.float64)
    potential = BrenierPotential.of(y, GaussianSource())
    x = Rng(2).normal(1000, 2, dtype=torch.float64)
    pairs = potential.planes(x, 2)[1]
    normals = torch.cat([y, -torch.ones(4, 1, dtype=torch.float64)], 1)[pairs]
    cosine = torch.nn.functional.cosine_similarity(normals[:, 0], normals[:, 1], dim=1)
    angles = potential.angles(x)
    assert torch.allclose(angles[:, 0], torch.acos(cosine.clamp(-1, 1)), atol=1e-7)
    across = (pairs[:, 0] < 2) != (pairs[:, 1] < 2)
    assert 20 < int(across.sum()) < 500
    assert float(angles[across].min()) > 1.5 and float(angles[~across].max()) < 0.4
    kept = potential.regular(1000, Rng(2), angle=1.0)
    pairs = potential.planes(kept, 2)[1]
    assert kept.shape == (1000, 2) and bool(((pairs[:, 0] < 2) == (pairs[:, 1] < 2)).all())
    with pytest.raises(ValueError, match=r"angle=0: only 0 of 10"):
        potential.regular(10, Rng(3), angle=0.0)


def test_bad_transports_are_refused() -> None:
    """Each says what is wrong."""
    y = cloud(4, 2)
    with pytest.raises(ValueError, match="targets 1 and 3 are equal"):
        BrenierPotential.of(y[[0, 1, 2, 1]], GaussianSource())
    with pytest.raises(ValueError, match="weights must be positive"):
        transport(y, Rng(0), weights=torch.tensor([1.0, 2.0, 0.0, 1.0]))
    with pytest.raises(ValueError, match="targets must be finite"):
        transport(y * torch.nan, Rng(0))
    with pytest.raises(ValueError, match="heights must be 4 finite numbers"):
        BrenierPotential.of(y, GaussianSource()).at(torch.zeros(3))
    with pytest.raises(ValueError, match=r"x of shape \[3, 5\] does not fit targets of shape \[2\]"):
        BrenierPotential.of(y, GaussianSource()).cells(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="k=5: there are 4 planes"):
        BrenierPotential.of(y, GaussianSource()).planes(torch.zeros(3, 2), 5)
    with pytest.raises(ValueError, match="first=1 at least 2"):
        AveragedGradient(first=1)


def two_modes(schedule) -> GaussianMixture:
    means = torch.tensor([[-2.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
    return GaussianMixture(schedule, torch.ones(2), means, torch.full((2,), 0.04, dtype=torch.float64), [0, 1])


def made_for(world: GaussianMixture, time: float, n: int = 128, tolerance: float = 0.3) -> Expressway:
    """An expressway onto ``n`` noisy draws of a world, with the classes of those draws."""
    labels = torch.arange(n) % world.classes
    x0 = world.sample(n, Rng(0, "data"), labels)
    y = noisy_targets(world.schedule, time, x0, Rng(0, "targets"))
    return Expressway(transport(y, Rng(0), solver=AveragedGradient(tolerance))[0], world.schedule, time, labels)


def test_no_point_between_two_modes() -> None:
    """8000 points in ten DDIM steps: the solver alone leaves some more than 5 standard deviations from both modes, of
    which the law itself has one in two million; the expressway none, in ten steps or in three, half at each mode."""
    world = two_modes(VPLinear())
    any_class = torch.full((8000,), -1)

    def between(x: torch.Tensor) -> int:
        return int(((x[:, 0].abs() - 2).abs() > 5 * 0.2).sum())

    assert between(world.sample(8000, Rng(2))) == 0
    assert between(sample(world, 8000, solver="ddim", steps=10, grid="uniform", seed=3, cond=any_class)) > 5
    road = made_for(world, float(world.schedule.time_at(torch.tensor(math.log(2.0)))))
    noise = road.draw(8000, Rng(9))
    for steps in (3, 10):
        fast, _ = express(world, road, noise, solver="ddim", grid="uniform", steps=steps, cond=any_class)
        assert between(fast) == 0
        assert abs(float((fast[:, 0] > 0).double().mean()) - 0.5) < 0.02


def test_an_expressway_on_every_schedule(schedule) -> None:
    """From the target that a draw lands on, many RK4 steps reach the world's exact flow map of that target, with the
    classes of the targets as conditions, from any name of grid."""
    world = two_modes(schedule)
    time = float(schedule.time_at(torch.tensor(math.log(1 / 0.7), dtype=torch.float64)))
    road = made_for(world, time, 12, 0.5)
    noise = road.draw(16, Rng(1))
    end = max(schedule.t_min, 1e-3 * schedule.t_max)
    states, labels = road.land(noise)
    exact = world.flow(states, time, end, labels)
    grid = log_snr(replace(schedule, t_max=time), 40, end)
    made, cond = express(world, road, noise, solver=RungeKutta(RK4), grid=grid)
    assert torch.equal(cond, labels) and torch.equal(cond, road.labels[road.potential.cells(noise)])
    assert float((made - exact).abs().max()) < 2e-4
    short, _ = express(world, road, noise, solver="unipc", steps=4)
    assert bool(torch.isfinite(short).all())


def test_the_expressway_is_a_start_hook() -> None:
    """The engine's own start hook does what express() does."""
    world = two_modes(FlowMatching(t_min=1e-3))
    road = made_for(world, 0.4, 24, 0.5)
    noise = road.draw(16, Rng(1))
    times = torch.tensor([0.4, 0.3, 0.1, 1e-3], dtype=torch.float64)
    cond = road.land(noise)[1]
    by_hook = solve(world, noise, times, DDIM(), cond, hooks=Hooks(start=road))
    assert torch.equal(by_hook, express(world, road, noise, solver="ddim", grid=times)[0])


def test_targets_without_data_are_states_of_long_runs() -> None:
    """For a Gaussian the state at ``time`` is the exact flow of the noise: 50 UniPC steps come within 3e-3."""
    world = Gaussian(VPLinear(), torch.zeros(3), torch.diag(torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)))
    made = reverse_targets(world, 32, 0.3, Rng(5), steps=50)
    noise = world.schedule.prior(Rng(5).normal(32, 3))
    assert float((made - world.flow(noise, 1.0, 0.3)).abs().max()) < 3e-3


def test_roads_that_do_not_fit_are_refused() -> None:
    """A denoiser on another schedule, times that start elsewhere, a time outside the schedule, too few labels."""
    world = two_modes(EDM())
    road = made_for(world, 0.5, 16, 0.9)
    noise = road.draw(2, Rng(0))
    with pytest.raises(ValueError, match=r"use denoiser\.on"):
        express(world.on(VPLinear()), road, noise)
    with pytest.raises(ValueError, match=r"grid starts at 0\.4, the expressway ends at time 0\.5"):
        express(world, road, noise, grid=torch.tensor([0.4, 0.1]))
    with pytest.raises(ValueError, match="time=100 must lie above"):
        Expressway(road.potential, EDM(), 100.0)
    with pytest.raises(ValueError, match=r"labels of shape \[3\] for 16 targets"):
        Expressway(road.potential, EDM(), 0.5, torch.zeros(3))


def test_files_keep_the_road_and_refuse_another(tmp_path) -> None:
    """Everything comes back to the bit; every field that differs is named with both values."""
    world = two_modes(EDM())
    road = made_for(world, 0.5, 16, 0.9)
    data = digest(world.sample(16, Rng(0)))
    path = save_statistics(tmp_path / "roads" / "road.safetensors", road.tensors(), road.fingerprint(data))
    assert [p.name for p in path.parent.iterdir()] == ["road.safetensors"]
    assert read_fingerprint(path)["schedule"] == {"name": "EDM", "t_min": 0.002, "t_max": 80.0}
    again = Expressway.of(load_statistics(path, road.fingerprint(data)), EDM(), 0.5, "gaussian")
    noise = road.draw(50, Rng(1))
    assert torch.equal(again(noise), road(noise)) and torch.equal(again.land(noise)[1], road.land(noise)[1])
    wrong = {
        r"time = 0\.5, expected 0\.6": fingerprint(EDM(), 0.6, "gaussian", data),
        r"schedule\.t_max = 80\.0, expected 50\.0": fingerprint(EDM(t_max=50.0), 0.5, "gaussian", data),
        "schedule.name = 'EDM', expected 'VPLinear'": fingerprint(VPLinear(), 0.5, "gaussian", data),
        "source = 'gaussian', expected 'uniform'": fingerprint(EDM(), 0.5, "uniform", data),
        f"data = '{data}', expected 'other'": fingerprint(EDM(), 0.5, "gaussian", "other"),
        "no model, expected 'x'": {"model": "x"},
    }
    for message, expected in wrong.items():
        with pytest.raises(ValueError, match=message):
            load_statistics(path, expected)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_statistics(path, {})
    with pytest.raises(FileNotFoundError, match="no such statistics file"):
        load_statistics(tmp_path / "none", {})


def test_digests_tell_tensors_apart() -> None:
    """Values, shape and type all count; equal tensors have equal digests."""
    a = torch.arange(6.0)
    different = {digest(t) for t in (a, a + 1, a.view(2, 3), a.double(), a.int(), [a, a], [a, a + 1])}
    assert len(different) == 7 and digest(a) == digest([a.clone()]) == digest(a.view(2, 3).flatten())
    assert json.dumps(digest(a.bfloat16()))


def test_langevin_contracts_as_its_step_says() -> None:
    """For a Gaussian of variance s^2 a step multiplies by 1 - a_i / (s^2 + sigma_i^2): two runs on the same noise end
    apart by that product times s^2 / (s^2 + sigma_L^2), and the law is the recursion's, in L n + 1 calls."""
    s2, levels, each, step_lr = 0.7, 6, 4, 0.004
    schedule = EDM(t_min=0.1, t_max=3.0)
    world = CountCalls(Gaussian(schedule, torch.zeros(1), torch.tensor([[s2]], dtype=torch.float64)))
    times = log_snr(schedule, levels - 1)
    assert torch.allclose(times[1:] / times[:-1], (times[1] / times[0]).expand(levels - 1))
    x = torch.zeros(40_000, 1, dtype=torch.float64)
    low = annealed_langevin(world, x, times, Rng(0), step_lr=step_lr, steps_each=each)
    assert world.calls == levels * each + 1
    high = annealed_langevin(world, x + 1, times, Rng(0), step_lr=step_lr, steps_each=each)
    factor, variance = 1.0, 0.0
    for sigma in times.tolist():
        a = step_lr * (sigma / 0.1) ** 2
        for _ in range(each):
            factor *= 1 - a / (s2 + sigma**2)
            variance = (1 - a / (s2 + sigma**2)) ** 2 * variance + 2 * a
    shrink = s2 / (s2 + 0.01)
    assert torch.allclose(high - low, torch.full_like(x, factor * shrink), atol=1e-12)
    assert float(low.var()) == pytest.approx(variance * shrink**2, rel=0.02)  # 2.8 standard deviations of 40,000


def test_langevin_refuses_what_it_cannot_do() -> None:
    """alpha below 1, and a step that diverges."""
    world = two_modes(EDM(t_min=0.01))
    times, x = torch.tensor([0.1, 0.01]), torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"use denoiser\.on\(EDM"):
        annealed_langevin(world.on(VPLinear()), x, times, Rng(0))
    with pytest.raises(ValueError, match=r"step_lr=0\.0002 must lie between 0 and 2 sigma"):
        annealed_langevin(world, x, times, Rng(0), step_lr=2e-4)


def test_transport_error_bounds_hold_on_the_line() -> None:
    """Heights moved off the closed form: true masses, Wasserstein distance and energy gap are known by integration and
    none exceeds its bound; with many draws the total variation is nearly sharp."""
    y = line(16)
    right = BrenierPotential.of(y, UniformSource()).at(rearrangement(y, EQUAL16))
    potential = right.at(right.heights + 0.02 * line(16, 3)[torch.randperm(16, generator=torch.Generator())][:, 0])
    x = (torch.arange(200_000, dtype=torch.float64)[:, None] + 0.5) / 200_000
    shares = potential.gradient(x) + EQUAL16
    variation = float((shares - EQUAL16).abs().sum()) / 2
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    quantile = y[torch.searchsorted(shares.cumsum(0), u).clamp_max(15), 0]
    distance = float((quantile - y[(u * 16).long(), 0]).square().mean().sqrt())
    gap = potential.energy(x) - right.energy(x)
    assert variation > 0.05 and gap > 1e-4
    for draws in (500, 200_000):
        found = transport_error(potential, Rng(0), draws)
        assert variation < found.total_variation and distance < found.distance and gap < found.energy_gap
    assert found.total_variation < variation + 0.01
    # with many draws the bounds are their formulas at the true masses
    radii = (y[:, 0] - y.mean()) ** 2
    moved = math.sqrt(2 * float((radii * (shares - EQUAL16).abs()).sum()))
    assert moved < found.distance < 1.1 * moved
    centred = BrenierPotential.of(y - y.mean(), UniformSource()).at(potential.heights + 0.5 * (y[:, 0] - y.mean()))
    dual = float((x - 0.5).square().mean() + radii.mean()) / 2 - centred.energy(x - 0.5)
    cost = float((x - 0.5 - centred(x - 0.5)).square().mean().sqrt())
    assert found.energy_gap == pytest.approx((cost + found.distance) ** 2 / 2 - dual, abs=5e-3)
    # with equal masses and nothing but counting in it the bounds go to 0 with the draws
    exact = [transport_error(right, Rng(0), draws).total_variation for draws in (2_000, 200_000)]
    assert exact[1] < exact[0] / 5


def test_transport_error_costs_its_confidence() -> None:
    """With R = 1 / 2 the bound at more confidence is larger by the difference of ``sqrt(log(2 / delta) / (2 n))``."""
    y = line(16)
    right = BrenierPotential.of(y, UniformSource()).at(rearrangement(y, EQUAL16))
    low, high = (transport_error(right, Rng(0), 2000, sure).total_variation for sure in (0.9, 0.99))
    assert high - low == pytest.approx((math.sqrt(math.log(200)) - math.sqrt(math.log(20))) / math.sqrt(4000), rel=1e-9)


class Shifted(Denoiser):
    """The exact denoiser with its noise off by a constant."""

    def __init__(self, inner: Denoiser, shift: float) -> None:
        super().__init__(inner.schedule, inner.shape)
        self.inner, self.shift = inner, shift

    def forward(self, x, t, cond=None):
        sigma = float(self.schedule.sigma(torch.as_tensor(t, dtype=torch.float64).flatten()[0]))
        return self.inner(x, t, cond) - sigma * self.shift


def test_error_bound_is_sharp_for_a_gaussian() -> None:
    """Where trajectories part at one rate everywhere and the error is constant, Gronwall is an equality: a shift of the
    start and of the noise ends where the bound says."""
    s2, shift, start = 0.5, 0.3, 0.2
    world = Gaussian(EDM(t_min=0.05), torch.zeros(1), torch.tensor([[s2]], dtype=torch.float64))
    ratios = torch.tensor(np.geomspace(2.0, 0.05, 4001))
    found = error_bound(start, ratios, torch.full_like(ratios, shift), -ratios / (s2 + ratios**2))
    x = Rng(0).normal(5, 1, dtype=torch.float64)
    times = torch.tensor(np.geomspace(2.0, 0.05, 401))
    moved = solve(Shifted(world, -shift), x + start, times, RungeKutta(RK4))
    apart = (moved - world.flow(x, 2.0, 0.05)).abs()
    assert float(apart.min()) == pytest.approx(found.total, rel=1e-5)
    assert float(apart.max()) == pytest.approx(found.total, rel=1e-5)
    assert found.growth == pytest.approx(math.sqrt((s2 + 0.05**2) / (s2 + 4)), rel=1e-6)


def test_mode_mixture_counts_samples_with_two_likely_classes() -> None:
    """Only samples with two classes at or above the threshold; what is no probability is refused."""
    p = torch.tensor([[0.5, 0.45, 0.05], [0.7, 0.2, 0.1], [1.0, 0.0, 0.0], [0.4, 0.4, 0.2]])
    assert [mode_mixture(p, t) for t in (0.45, 0.4, 0.2, 0.1, 0.05)] == [0.25, 0.5, 0.75, 0.75, 0.75]
    with pytest.raises(ValueError, match=r"threshold=0\.6 must lie in"):
        mode_mixture(p, 0.6)
    with pytest.raises(ValueError, match="softmax the logits first"):
        mode_mixture(2 * p)
    with pytest.raises(ValueError, match="two classes or more"):
        mode_mixture(torch.ones(3, 1))
