"""DPM-Solver-v3: its limits, its equations written out, its statistics where they are known, and what it refuses."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep import grids
from fewstep.denoisers import Clipped, Denoiser, NetworkDenoiser
from fewstep.discrete_vp import DiscreteVP
from fewstep.exact import Gaussian, ring, three_modes
from fewstep.guidance import Guided
from fewstep.hub import model_statistics
from fewstep.networks import MLP
from fewstep.predictions import TrigPrediction
from fewstep.randomness import Rng
from fewstep.sampling import DDIM, NOISE, DPMSolverPP2MTaylor, DPMSolverPP3M, Levels, UniPC, balanced, run, solve
from fewstep.sampling.solvers.dpm_solver_v3 import DPMSolverV3, Statistics, half_way, snapped, statistics_grid
from fewstep.sampling.solvers.model_statistics import (
    RIDGE,
    by_differences,
    diagonal,
    estimate,
    fitted,
    flow_direction,
    moving_average,
    total_derivative,
)
from fewstep.schedules import EDM, FlowMatching, Schedule, TrigFlow, VPCosine, VPLinear
from fewstep.tangents import tangent

WORLD = three_modes()  # VP linear, 1 .. 0.01
SCHEDULE = WORLD.schedule
X = torch.special.ndtri((torch.arange(200, dtype=torch.float64) + 0.5) / 200)[:, None]
EXACT = WORLD.flow(X, SCHEDULE.t_max, SCHEDULE.t_min)
#: Where every schedule has all the levels that the tests ask for.
SPACES: dict[str, Schedule] = {
    "vp": VPLinear(t_min=1e-4),
    "cosine": VPCosine(),
    "edm": EDM(),
    "flow": FlowMatching(),
    "trig": TrigFlow(),
    "ddpm": DiscreteVP.linear(),
}


def rmse(solver, times: Tensor) -> float:
    return float((solve(WORLD, X, times, solver) - EXACT).square().mean().sqrt())


def nodes(statistics: Statistics, places, schedule: Schedule = SCHEDULE) -> Tensor:
    """The times of some levels of the statistics' grid."""
    return schedule.time_at(statistics.log_snr[torch.as_tensor(places)])


@pytest.fixture(scope="module")
def estimated() -> Statistics:
    """The test-bed's statistics from 8192 samples at 121 levels."""
    return estimate(WORLD, WORLD.sample(8192, Rng("data")), Rng("noise"), batch=8192)


# --- limits ---------------------------------------------------------------------------------------------------------

TWINS = {
    "ddim": (1, DDIM(), DDIM()),
    "2m-taylor": (2, DPMSolverPP2MTaylor(), DPMSolverPP2MTaylor(form=NOISE)),
    "3m": (3, DPMSolverPP3M(), DPMSolverPP3M(form=NOISE)),
}
IRREGULAR = [0, 30, 80, 110, 200, 210, 290, 360, 400]  # of 400


@pytest.mark.parametrize("name", TWINS)
def test_constant_statistics_are_dpm_solver(name) -> None:
    """l = 1, s = b = 0 gives DDIM, DPM-Solver++ 2M (taylor) and corrected 3M; l = 0, s = -1 the noise-prediction
    solvers: on an irregular grid, to the quadrature error of 400 intervals (about 3e-9)."""
    p, data, noise = TWINS[name]
    levels = statistics_grid(SCHEDULE, 400)
    for statistics, twin in (
        (Statistics.data_prediction(levels, (1,)), data),
        (Statistics.noise_prediction(levels, (1,)), noise),
    ):
        times = nodes(statistics, IRREGULAR)
        solver = DPMSolverV3(statistics, p, "off", lower_order_final=False)
        torch.testing.assert_close(solve(WORLD, X, times, solver), solve(WORLD, X, times, twin), atol=3e-8, rtol=0)


def test_constant_statistics_with_the_second_order_corrector_are_unipc() -> None:
    """Order 1 with a pseudo-order corrector (two nodes: nothing pseudo about it) is UniPC-1 with varying coefficients,
    which also keeps its outputs through a correction."""
    statistics = Statistics.data_prediction(statistics_grid(SCHEDULE, 400), (1,))
    times = nodes(statistics, IRREGULAR)
    ours = solve(WORLD, X, times, DPMSolverV3(statistics, 1, "on", pseudo_corrector=True))
    torch.testing.assert_close(ours, solve(WORLD, X, times, UniPC(p=1, variant="vary")), atol=3e-8, rtol=0)


def test_quadrature_is_of_fourth_order() -> None:
    """Twice the levels, a sixteenth of the distance to DPM-Solver++."""

    def distance(grid: int) -> float:
        statistics = Statistics.data_prediction(statistics_grid(SCHEDULE, grid), (1,))
        times = nodes(statistics, torch.arange(0, grid + 1, grid // 10))
        ours = solve(WORLD, X, times, DPMSolverV3(statistics, 2, "off", lower_order_final=False))
        return float((ours - solve(WORLD, X, times, DPMSolverPP2MTaylor())).abs().max())

    assert distance(60) / distance(120) == pytest.approx(16, rel=0.02)


MEANS = torch.tensor([0.7, -0.4, 0.0], dtype=torch.float64)
VARIANCES = torch.tensor([0.16, 1.5, 0.02], dtype=torch.float64)


def gaussian_statistics(levels: Tensor) -> Statistics:
    """Closed form for independent Gaussians: l = sigma^2 / v, f = -sigma^2 mu / v, s = 0, b = df/dlambda."""
    noise = torch.exp(-2 * levels)[:, None]  # (sigma / alpha)^2
    linear = noise / (noise + VARIANCES)
    return Statistics(levels, linear, torch.zeros_like(linear), 2 * MEANS * linear * (1 - linear))


def test_gaussian_data_take_one_first_order_step() -> None:
    """With the closed-form statistics of a Gaussian, first order is exact in one call; five DDIM calls are 0.3 off."""
    world = Gaussian(SCHEDULE, MEANS, torch.diag(VARIANCES))
    solver = DPMSolverV3(gaussian_statistics(statistics_grid(SCHEDULE, 1000)), 1)
    x = X[:60].reshape(20, 3)
    exact = world.flow(x, SCHEDULE.t_max, SCHEDULE.t_min)
    ends = torch.tensor([SCHEDULE.t_max, SCHEDULE.t_min], dtype=torch.float64)
    torch.testing.assert_close(solve(world, x, ends, solver), exact, atol=1e-9, rtol=0)
    assert (solve(world, x, grids.log_snr(SCHEDULE, 5), DDIM()) - exact).abs().max() > 0.3


# --- the equations, written out -------------------------------------------------------------------------------------


class WrittenOut:
    """The solver as its equations stand in the paper: integrals from the noisy end by plain trapezoids (on a grid 64
    times finer than the statistics'), noise predictions kept and re-written after a correction.

    ``l``, ``s``, ``b`` are functions of lambda.
    """

    fine = 64

    def __init__(self, levels: Tensor, l, s, b) -> None:  # noqa: E741
        first, last, n = float(levels[0]), float(levels[-1]), (len(levels) - 1) * self.fine
        self.at = np.linspace(first, last, n + 1)[:, None]
        self.l, self.s, self.b = l(self.at), s(self.at), b(self.at)
        self.L, self.S = self.integral(self.l), self.integral(self.s)
        self.I = self.integral(np.exp(self.L + self.S))
        self.B = self.integral(np.exp(-self.S) * self.b)
        self.C = self.integral(np.exp(self.L + self.S) * self.B)

    def integral(self, y: np.ndarray) -> np.ndarray:
        cells = np.diff(self.at, axis=0) * (y[1:] + y[:-1]) / 2
        return np.concatenate([np.zeros_like(y[:1]), np.cumsum(cells, 0)])

    def g(self, s: int, i: int, x, eps, alpha, sigma):
        f = (sigma * eps - self.l[i] * x) / alpha
        return np.exp(self.S[s] - self.S[i]) * f - np.exp(self.S[s]) * (self.B[i] - self.B[s])

    def update(self, s: int, t: int, x, alpha_s, alpha_t, others, g, pseudo: bool):
        """From ``x`` at level ``s`` to ``t`` with ``g[0]`` there and ``g[1:]`` at levels ``others``."""
        new = alpha_t / alpha_s * np.exp(self.L[s] - self.L[t]) * x
        new = new - alpha_t * np.exp(-self.L[t] - self.S[s]) * (self.I[t] - self.I[s]) * g[0]
        new = new - alpha_t * np.exp(-self.L[t]) * (self.C[t] - self.C[s] - self.B[s] * (self.I[t] - self.I[s]))
        gaps = np.array([float(self.at[i, 0] - self.at[s, 0]) for i in others])
        n = len(others)
        if pseudo:
            all_gaps, table = np.concatenate([[0.0], gaps]), [list(g)]
            for k in range(1, n + 1):
                before = table[-1]
                table.append([(before[i + 1] - before[i]) / (all_gaps[i + k] - all_gaps[i]) for i in range(n + 1 - k)])
            over_factorial = [column[0] for column in table[1:]]
        elif n:
            system = gaps[:, None] ** np.arange(1, n + 1)
            over_factorial = np.tensordot(np.linalg.inv(system), np.stack([v - g[0] for v in g[1:]]), 1)
        grown = np.exp(self.L[s : t + 1] + self.S[s : t + 1] - self.L[s] - self.S[s])
        gone = self.at[s : t + 1] - self.at[s]
        for k in range(1, n + 1):
            y = grown * gone**k
            moment = (np.diff(gone, axis=0) * (y[1:] + y[:-1]) / 2).sum(0)
            new = new - alpha_t * np.exp(self.L[s] - self.L[t]) * moment * over_factorial[k - 1]
        return new

    def sample(self, world, x, times, places, p, p_pseudo, corrected, c_pseudo, lower_order_final):
        schedule, steps = world.schedule, len(times) - 1
        alpha, sigma = schedule.alpha(times).tolist(), schedule.sigma(times).tolist()
        at = [place * self.fine for place in places]
        xs, epss, x, order = [], [], x.numpy(), 0
        for i in range(steps):
            eps = world.eps(torch.from_numpy(x), float(times[i])).numpy()
            xs.append(x)
            epss.append(eps)
            c_order = order + c_pseudo

            def g(s: int, j: int):
                return self.g(at[s], at[j], xs[j], epss[j], alpha[j], sigma[j])

            if corrected and c_order > 1:
                others = [i, *(i - 2 - j for j in range(c_order - 2))]
                found = [g(i - 1, j) for j in (i - 1, *others)]
                better = self.update(
                    at[i - 1], at[i], xs[i - 1], alpha[i - 1], alpha[i], [at[j] for j in others], found, c_pseudo
                )
                kept = sigma[i] * eps - self.l[at[i]] * x
                xs[i], epss[i] = better, (kept + self.l[at[i]] * better) / sigma[i]
            order = min(p, i + 1, steps - i if lower_order_final else p)
            others = [i - 1 - j for j in range(order - 1)]
            found = [g(i, j) for j in (i, *others)]
            x = self.update(at[i], at[i + 1], xs[i], alpha[i], alpha[i + 1], [at[j] for j in others], found, p_pseudo)
        return torch.from_numpy(x)


@pytest.mark.parametrize("lower_order_final", [False, True])
@pytest.mark.parametrize(("corrector", "c_pseudo"), [("off", False), ("on", False), ("on", True)])
@pytest.mark.parametrize(("p", "p_pseudo"), [(1, False), (2, False), (3, False), (3, True)])
def test_solver_equals_its_equations(p, p_pseudo, corrector, c_pseudo, lower_order_final) -> None:
    """Every combination of orders, pseudo-orders and correctors equals the paper's formulas and driver, written out,
    with arbitrary statistics that differ between the coordinates (to the error of the plain trapezoids)."""
    shift = np.array([[0.0, 1.0]])
    curves = (
        lambda u: 0.8 + 0.2 * np.sin(0.7 * u + shift),
        lambda u: 0.3 * np.cos(1.1 * u - shift),
        lambda u: 0.3 * np.sin(0.9 * u) + 0.1 * shift,
    )
    levels = statistics_grid(SCHEDULE, 400)
    statistics = Statistics(levels, *(torch.from_numpy(curve(levels.numpy()[:, None])) for curve in curves))
    world, places = ring(SCHEDULE), [0, 60, 140, 180, 260, 340, 400]
    times = nodes(statistics, places)
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    solver = DPMSolverV3(statistics, p, corrector, p_pseudo, c_pseudo, lower_order_final)
    expected = WrittenOut(levels, *curves).sample(
        world, x, times, places, p, p_pseudo, corrector == "on", c_pseudo, lower_order_final
    )
    torch.testing.assert_close(solve(world, x, times, solver), expected, atol=2e-6, rtol=2e-6)


# --- estimates ------------------------------------------------------------------------------------------------------


def random_denoiser(shape=(6,), classes=None) -> NetworkDenoiser:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = MLP(shape, 16, 1, classes).double()
        for p in net.parameters():
            p.data += 0.3 * torch.randn_like(p)
    return NetworkDenoiser(net, TrigFlow(t_min=0.02, t_max=1.5), TrigPrediction(), shape, classes)


def test_hutchinson_over_all_signs_is_the_diagonal() -> None:
    """The mean of v J v over all 64 sign vectors of six numbers is the diagonal of dD/dy, by automatic differentiation;
    a single vector's is not."""
    denoiser = random_denoiser()
    schedule, t = denoiser.schedule, torch.tensor([0.7], dtype=torch.float64)
    x = torch.randn(1, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=6)), dtype=torch.float64)
    _, found = diagonal(denoiser, x.repeat(64, 1), t.repeat(64), signs, None, tangent)
    jacobian = torch.autograd.functional.jacobian(lambda x_: denoiser(x_, t)[0], x)[:, 0]
    expected = jacobian.diagonal().detach() * schedule.alpha(t)
    torch.testing.assert_close(found.mean(0), expected, atol=1e-12, rtol=1e-12)
    assert (found[0] - expected).abs().max() > 1e-2


@pytest.mark.parametrize("name", SPACES)
def test_total_derivative_follows_the_flow(name) -> None:
    """dD/dlambda is the difference of D between two points of one exact trajectory, on every schedule."""
    schedule = SPACES[name]
    world = three_modes(schedule)
    log_snr = torch.tensor([-1.0, 0.3, 1.2], dtype=torch.float64)
    t, x = schedule.time_at(log_snr), torch.tensor([[0.4], [-0.2], [0.5]], dtype=torch.float64)
    if name == "ddpm":  # off the corners of the interpolated table
        t = t.floor() + 0.5
        log_snr = schedule.log_snr(t)
    found = total_derivative(world, x, t, world(x, t), None, tangent)
    ahead, behind = schedule.time_at(log_snr + 1e-4), schedule.time_at(log_snr - 1e-4)
    expected = (world(world.flow(x, t, ahead), ahead) - world(world.flow(x, t, behind), behind)) / 2e-4
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=2e-6)
    on_x, on_x0, dt = flow_direction(schedule, t)
    slope = (on_x[:, None] * x + on_x0[:, None] * world(x, t)) / dt[:, None]
    torch.testing.assert_close(slope, world.velocity(x, t), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", SPACES)
def test_estimates_of_a_gaussian_are_its_closed_form(name) -> None:
    """l is sigma^2 / v exactly for any sample, s is 0, and b is df/dlambda up to the central differences (second order
    in a spacing of 0.1), on every schedule."""
    world = Gaussian(SPACES[name], MEANS, torch.diag(VARIANCES))
    levels = torch.linspace(-2, 2, 41, dtype=torch.float64)
    found = estimate(world, world.sample(8, Rng(0)), Rng(1), log_snr=levels)
    expected = gaussian_statistics(levels)
    torch.testing.assert_close(found.l, expected.l, atol=1e-10, rtol=0)
    assert found.s.abs().max() < 1e-6
    torch.testing.assert_close(found.b[1:-1], expected.b[1:-1], atol=1.5e-3, rtol=0)


def test_differences_stand_in_for_forward_mode() -> None:
    """Statistics by central differences are those of forward mode, to the truncation of a step of a hundredth."""
    x0, levels = WORLD.sample(64, Rng(0)), torch.linspace(-2, 2, 13, dtype=torch.float64)
    forward = estimate(WORLD, x0, Rng(1), log_snr=levels)
    differences = estimate(WORLD, x0, Rng(1), log_snr=levels, derivative=by_differences)
    for name, value in forward.tensors().items():
        torch.testing.assert_close(differences.tensors()[name], value, atol=1e-3, rtol=0)


class HalfDead(Denoiser):
    """Two pixels that are always -1 and 0, beside a bimodal one."""

    def __init__(self) -> None:
        super().__init__(SCHEDULE, (3,))
        self.world = three_modes()

    def forward(self, x, t, cond=None):
        dead = torch.zeros_like(x[:, :2]) + torch.tensor([-1.0, 0.0]).to(x)
        return torch.cat([dead, self.world(x[:, 2:], t)], 1)


def test_dead_pixels_have_no_slope() -> None:
    """Where f does not vary s is 0 and all numbers are finite, in single precision too; the solver then returns these
    pixels exactly."""
    denoiser = HalfDead()
    x0 = torch.cat([torch.tensor([[-1.0, 0.0]]).expand(64, 2), three_modes().sample(64, Rng(0)).float()], 1)
    found = estimate(denoiser, x0, Rng(1), log_snr=statistics_grid(SCHEDULE, 24))
    assert found.s[:, :2].abs().max() < 1e-6 and found.s[:, 2].abs().max() > 0.1
    levels = Levels.of(SCHEDULE, nodes(found, [0, 8, 16, 24])).denoised()
    noise = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    made = run(denoiser, noise, DPMSolverV3(found).table(levels))
    torch.testing.assert_close(made[:, :2], x0[:4, :2], atol=1e-5, rtol=0)


def test_moving_average_keeps_straight_lines() -> None:
    """Also at the ends, where the window shrinks on both sides; a lone spike is spread over its window."""
    line = torch.arange(12, dtype=torch.float64)[:, None] * torch.tensor([1.0, -2.0], dtype=torch.float64)
    torch.testing.assert_close(moving_average(line, 3), line)
    spike = torch.zeros(19, 1, dtype=torch.float64)
    spike[9] = 7
    spread = torch.zeros(19, dtype=torch.float64)
    spread[6:13] = 1
    torch.testing.assert_close(moving_average(spike, 3).flatten(), spread)


def test_the_ridge_is_a_share_of_what_noise_and_data_leave_open() -> None:
    """Where f does not vary, ``s`` is its covariance with f' over ``RIDGE^2 rho^2 v / (rho^2 + v)``."""
    log_snr, square, c = torch.tensor([-2.0, -1.0, 0.0, 1.0], dtype=torch.float64), 0.6, 1e-3
    none = torch.zeros(4, 2, dtype=torch.float64)
    found = fitted(log_snr, (none,) * 8 + (none + c,), square, 0).s[:, 0]
    torch.testing.assert_close(found * RIDGE**2, c * (1 / square + torch.exp(2 * log_snr)), rtol=1e-12, atol=0)


def test_statistics_are_a_regression() -> None:
    """``s`` and ``b`` are slope and intercept of f' on ``f = k y - D``, here over 50 draws at each of
    five levels, with a k that rises in a straight line."""
    log_snr = torch.linspace(-1, 1, 5, dtype=torch.float64)
    k = (0.3 + 0.1 * log_snr)[:, None]
    y, d, e = Rng(0).normal(3, 50, 5, 1, dtype=torch.float64)
    f, slope = k * y - d, (0.1 - k) * y + k * d - e
    means = (k, *(part.mean(0) for part in (y, d, e, y * y, y * d, d * d, y * e, d * e)))
    found = fitted(log_snr, means, 0.5, 0)
    ridge = RIDGE**2 / (torch.exp(2 * log_snr) + 1 / 0.5)[:, None]
    s = ((f - f.mean(0)) * (slope - slope.mean(0))).mean(0) / (f.var(0, correction=0) + ridge)
    torch.testing.assert_close(found.s, s, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(found.b, slope.mean(0) - s * f.mean(0), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(found.l, 1 - k)


def test_progress_is_told_after_every_level_of_every_batch() -> None:
    """And the last call says that all is done."""
    seen: list[tuple[int, int]] = []
    estimate(
        WORLD, WORLD.sample(5, Rng(0)), Rng(1), log_snr=statistics_grid(SCHEDULE, 4), batch=2,
        progress=lambda done, of: seen.append((done, of)),
    )  # fmt: skip
    assert seen == [(i + 1, 15) for i in range(15)]


# --- accuracy on the test-bed ---------------------------------------------------------------------------------------


def test_errors_at_five_calls(estimated) -> None:
    """Root mean square errors at 5 calls, uniform lambda: DDIM 0.32 (0.336 from 200 random starts, not quantiles),
    first-order v3 0.100, order 3 with its own corrector 0.039 in an independent implementation; estimates from 8 sets
    of 8192 samples lie within 0.098 .. 0.106 and 0.041 .. 0.045 here."""
    times = grids.log_snr(SCHEDULE, 5)
    assert rmse(DDIM(), times) == pytest.approx(0.323, rel=0.01)
    assert rmse(DPMSolverV3(estimated, 1, "off"), times) == pytest.approx(0.100, rel=0.08)
    assert rmse(DPMSolverV3(estimated, 3, "on", pseudo_corrector=False), times) == pytest.approx(0.0425, rel=0.08)


@pytest.mark.parametrize(("p", "expected"), [(1, 2.0e-2), (2, 4.4e-3), (3, 3.2e-3)])
def test_errors_at_twenty_calls(estimated, p, expected) -> None:
    """Without corrector: 2.0e-2, 4.4e-3, 3.2e-3 in an independent implementation with other samples (hence 15 %)."""
    error = rmse(DPMSolverV3(estimated, p, "off", lower_order_final=False), grids.log_snr(SCHEDULE, 20))
    assert error == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize(
    ("p", "options", "order"),
    [
        (1, {"corrector": "off"}, 1),
        (2, {"corrector": "off"}, 2),
        (3, {"corrector": "off"}, 3),
        (3, {"corrector": "off", "pseudo_predictor": True}, 2),
        (2, {"corrector": "on", "pseudo_corrector": False}, 2),
        (3, {"corrector": "on", "pseudo_corrector": False}, 3),
        (3, {"corrector": "on", "pseudo_corrector": False, "pseudo_predictor": True}, 3),
        (1, {"corrector": "on", "pseudo_corrector": True}, 2),
        (2, {"corrector": "on", "pseudo_corrector": True}, 2),
        (3, {"corrector": "on", "pseudo_corrector": True}, 2),
        (3, {"corrector": "half", "pseudo_corrector": True}, 2),
    ],
)
def test_order_of_convergence(estimated, p, options, order) -> None:
    """The error falls with the declared order from 60 steps to 120, one interval of the grid each: pseudo-orders are of
    order 2 at most (order 3 with its own corrector falls faster, the first steps still showing)."""
    solver = DPMSolverV3(estimated, p, lower_order_final=False, **options)
    assert solver.order == order
    slope = math.log2(rmse(solver, grids.log_snr(SCHEDULE, 60)) / rmse(solver, grids.log_snr(SCHEDULE, 120)))
    assert order - 0.1 < slope < order + (0.75 if order == 3 else 0.1)


@pytest.mark.parametrize("p", [1, 2, 3])
def test_order_on_random_grids(estimated, p) -> None:
    """The same when the steps are 1 or 2 intervals at random, against 2 or 4."""
    solver = DPMSolverV3(estimated, p, "off", lower_order_final=False)

    def error(unit: int, seed: int) -> float:
        gaps = unit * torch.randint(1, 3, (120,), generator=torch.Generator().manual_seed(seed)).cumsum(0)
        places = [0, *gaps[gaps < 120].tolist(), 120]
        return math.log2(rmse(solver, nodes(estimated, places)))

    slope = np.mean([error(2, seed) - error(1, seed + 4) for seed in range(4)])
    assert p - 0.25 < slope < p + (0.8 if p == 3 else 0.4)  # the first steps, of low order, are still large


def test_statistics_pay(estimated) -> None:
    """At 5 to 10 calls on uniform lambda, order 2 with its corrector errs less than DPM-Solver++ 2M (taylor) and than
    the same solver with constant statistics."""
    plain = Statistics.data_prediction(estimated.log_snr, (1,))
    for steps in (5, 6, 8, 10):
        times = grids.log_snr(SCHEDULE, steps)
        ours = rmse(DPMSolverV3(estimated, 2, "on", pseudo_corrector=False), times)
        assert ours < 0.75 * rmse(DPMSolverPP2MTaylor(lower_order_final=True), times)
        assert ours < 0.75 * rmse(DPMSolverV3(plain, 2, "on", pseudo_corrector=False), times)


# --- schedules and grids --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("corrector", ["on", "half"])
def test_the_same_trajectory_on_every_schedule(estimated, corrector) -> None:
    """With the same statistics and the same lambdas, x / alpha is the same on VP, EDM, flow matching and TrigFlow, to
    1e-12."""
    places = [20, 50, 60, 80, 110]
    solver = DPMSolverV3(estimated, 3, corrector)
    found = []
    for schedule in (VPLinear(t_min=1e-3), EDM(), FlowMatching(), TrigFlow()):
        times = nodes(estimated, places, schedule)
        start, end = schedule.alpha(times[[0, -1]])
        ratio = schedule.ratio(times[0])
        found.append(solve(three_modes(schedule), start * ratio * X, times, solver) / end)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("p", [1, 2, 3])
def test_pure_noise_and_pure_data_are_reached(p) -> None:
    """From alpha = 0 to sigma = 0 on flow matching's default grid: with constant statistics the samples are those of
    DPM-Solver++ on the grid that v3 has moved to its levels."""
    schedule = FlowMatching()
    statistics = Statistics.data_prediction(statistics_grid(schedule, 600), (1,))
    levels, places = snapped(Levels.of(schedule, balanced(schedule, 8)), statistics)
    assert places[0] == places[-1] == -1 and levels.times[0] == 1 and levels.times[-1] == 0
    world, twin = three_modes(schedule), (DDIM(), DPMSolverPP2MTaylor(), DPMSolverPP3M())[p - 1]
    ours = solve(world, X, balanced(schedule, 8), DPMSolverV3(statistics, p, "off", lower_order_final=False))
    torch.testing.assert_close(ours, run(world, X, twin.table(levels)), atol=1e-8, rtol=0)


def test_half_corrector_is_one_half_of_the_corrections(estimated) -> None:
    """Below (half) or above (first-half) the noise level 1.6129 of step 500 of Stable Diffusion's schedule."""
    assert half_way() == pytest.approx(-math.log(1.6129), abs=1e-4)
    levels = Levels.of(SCHEDULE, grids.log_snr(SCHEDULE, 10))
    rows = {
        corrector: [s.stages[0].row for s in DPMSolverV3(estimated, 2, corrector).table(levels).steps]
        for corrector in ("off", "on", "half", "first-half")
    }

    def correcting(corrector):
        return [not torch.equal(a.b, b.b) for a, b in zip(rows[corrector], rows["off"], strict=True)]

    assert correcting("on") == [False] + [True] * 9
    cleaner = [log_snr >= half_way() for log_snr in levels.log_snr[:-1]]
    assert correcting("half") == cleaner
    assert correcting("first-half") == [False] + [not below for below in cleaner[1:]]


def test_every_step_costs_one_call(estimated) -> None:
    """With the corrector too, and the history is as long as the order, one more for a pseudo-order corrector."""
    levels = Levels.of(SCHEDULE, grids.log_snr(SCHEDULE, 10))
    table = DPMSolverV3(estimated, 2).table(levels)
    assert table.calls == 10 and table.memory == 3
    assert DPMSolverV3(estimated, 2, "off").table(levels).memory == 2


def test_sampling_grids_move_to_the_nearest_levels(estimated) -> None:
    """No level moves by more than half an interval, and the ends stay."""
    levels = Levels.of(SCHEDULE, grids.uniform(SCHEDULE, 7))
    moved, places = snapped(levels, estimated)
    assert max(abs(a - b) for a, b in zip(moved.log_snr, levels.log_snr, strict=True)) <= estimated.spacing / 2
    assert moved.times[0] == 1 and moved.times[-1] == SCHEDULE.t_min and places[0] == 0 and places[-1] == 120
    assert moved.log_snr[3] == pytest.approx(float(estimated.log_snr[places[3]]), abs=1e-12)
    assert float(SCHEDULE.log_snr(torch.tensor(moved.times[3], dtype=torch.float64))) == pytest.approx(
        moved.log_snr[3], abs=1e-9
    )


def test_grids_that_do_not_fit_are_refused(estimated) -> None:
    """One line for steps that fall together, for levels outside, and for ends between two levels."""
    solver = DPMSolverV3(estimated)

    def table(times, schedule=SCHEDULE):
        solver.table(Levels.of(schedule, torch.as_tensor(times, dtype=torch.float64)))

    with pytest.raises(ValueError, match="fall on one of the statistics' 121 levels: take fewer steps"):
        table(grids.uniform(SCHEDULE, 200))
    with pytest.raises(ValueError, match=r"half log-SNR 6\.215, the statistics reach from -5\.025 to 3\.108"):
        table([float(torch.exp(-estimated.log_snr[20])), 1.0, 0.002], EDM())
    with pytest.raises(ValueError, match=r"the grid starts at time 0.9, which is not .* start at 0.9"):
        table([0.9, 0.5, SCHEDULE.t_min])
    with pytest.raises(ValueError, match=r"the grid ends at time 0.3, which is not .* end at 0.3"):
        table([1.0, 0.5, 0.3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"l": torch.ones(5, 2)}, "s .* does not fit 5 levels"),
        ({"b": torch.full((5, 1), math.nan)}, "b holds NaN"),
        ({"log_snr": torch.tensor([0.0, 1.0, 2.0, 3.0, 5.0])}, "must rise in equal steps"),
        ({"log_snr": torch.tensor([0.0, 1.0])}, "3 at least"),
    ],
)
def test_statistics_that_are_none_are_refused(change, message) -> None:
    """Shapes that differ, numbers that are not finite, levels that are not equally spaced."""
    whole = Statistics.data_prediction(torch.arange(5.0), (1,)).tensors()
    with pytest.raises(ValueError, match=message):
        Statistics(**whole | change)


def test_wrong_parameters_are_refused(estimated) -> None:
    """Orders and correctors that do not exist, samples that do not fit."""
    with pytest.raises(ValueError, match="p=4 must be 1, 2 or 3"):
        DPMSolverV3(estimated, 4)
    with pytest.raises(ValueError, match="corrector: 'full' is not one of"):
        DPMSolverV3(estimated, 2, "full")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"x0 of shape \[4, 2\]: need samples \[K, 1\]"):
        estimate(WORLD, torch.ones(4, 2), Rng(0))
    with pytest.raises(ValueError, match="cond holds 3 conditions for 4 samples"):
        estimate(WORLD, torch.ones(4, 1), Rng(0), cond=torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="zero throughout"):
        estimate(WORLD, torch.zeros(4, 1), Rng(0))
    with pytest.raises(ValueError, match="grid=1: the statistics need"):
        statistics_grid(SCHEDULE, 1)


# --- the engine -----------------------------------------------------------------------------------------------------


def test_element_wise_tables_keep_the_type_of_the_state() -> None:
    """A table of fields gives half-precision states back as such, and is the same after Table.to."""
    schedule = VPLinear(t_min=1e-2)
    world = Gaussian(schedule, torch.zeros(2, 3, dtype=torch.float64), 0.25)
    statistics = Statistics.data_prediction(statistics_grid(schedule, 60), (2, 3))
    table = DPMSolverV3(statistics).table(Levels.of(schedule, grids.log_snr(schedule, 5)))
    x = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0))
    exact = run(world, x.double(), table)
    for kind, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        made = run(world, x.to(kind), table)
        assert made.dtype == kind
        torch.testing.assert_close(made.double(), exact, atol=tolerance, rtol=0)
    assert torch.equal(run(world, x.double(), table.to("cpu")), exact)


# --- files ----------------------------------------------------------------------------------------------------------


def test_a_file_gives_back_its_statistics(tmp_path: Path) -> None:
    """Rounded to single precision, for the model that they are of."""
    model = random_denoiser()
    made = estimate(model, torch.randn(8, 6).double(), Rng(0), log_snr=statistics_grid(model.schedule, 4))
    path = model_statistics.save(tmp_path / "s.safetensors", made, model, 8)
    found = model_statistics.load(path, model)
    assert torch.equal(found.log_snr, made.log_snr)
    for name in ("l", "s", "b"):
        assert torch.equal(found.tensors()[name], made.tensors()[name].float())


def test_statistics_of_another_model_are_refused(tmp_path: Path) -> None:
    """Other weights, another schedule, another guidance scale, another wrapper: each is named."""
    model = random_denoiser((2,), classes=3)
    statistics = Statistics.data_prediction(statistics_grid(model.schedule, 4), (2,))
    path = model_statistics.save(tmp_path / "s.safetensors", statistics, Guided(model, 2.0), 8)
    model_statistics.load(path, Guided(model, torch.tensor(2.0)))
    others: dict[str, Denoiser] = {
        "guidance = 2.0, expected 1.5": Guided(model, 1.5),
        "guidance = 2.0, expected 1.0": model,
        "kind = .*, expected .*Clipped": Clipped(model),
        "schedule.name = 'TrigFlow', expected 'EDM'": Guided(
            NetworkDenoiser(model.net, EDM(), model.prediction, (2,), 3), 2.0
        ),
        "schedule.t_max = 1.5, expected 1.4": Guided(
            NetworkDenoiser(model.net, TrigFlow(0.02, 1.4), model.prediction, (2,), 3), 2.0
        ),
    }
    for message, other in others.items():
        with pytest.raises(ValueError, match=message):
            model_statistics.load(path, other)
    with torch.no_grad():
        next(model.parameters())[0] += 1e-3
    with pytest.raises(ValueError, match="model = "):
        model_statistics.load(path, Guided(model, 2.0))
    with pytest.raises(ValueError, match="one guidance scale, this model has 2"):
        model_statistics.fingerprint(Guided(model, torch.tensor([1.0, 2.0])))
