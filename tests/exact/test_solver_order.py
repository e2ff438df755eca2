"""Every solver converges at its order, on smooth and on random grids, against an exact non-linear flow.

The world is a mixture on the line, whose probability flow is the quantile map.  A wrong coefficient can be invisible on
a uniform grid, so the order is measured on log-uniform, Karras and random strictly decreasing grids.  An order alone
does not settle a solver: with the two step lengths of 2M swapped the errors telescope and order 2 stays on every grid,
so the coefficients themselves are tested in test_solver_identities.py and against referees.
"""

import math

import numpy as np
import pytest
import torch

from fewstep import grids
from fewstep.exact import three_modes
from fewstep.sampling import (
    DDIM,
    IPNDM,
    NATIVE,
    NOISE,
    SOLVERS,
    TAB,
    Ancestral,
    DPMSolverPP2M,
    DPMSolverPP2MTaylor,
    DPMSolverPP3M,
    DPMSolverPP3MPublished,
    DPMSolverPPSDE,
    DualFast,
    Fast,
    Levels,
    Multistep,
    RhoAB,
    RungeKutta,
    ScoreExponential,
    Single,
    UniPC,
    solve,
)
from fewstep.sampling.solvers.deis import MIXES
from fewstep.sampling.solvers.runge_kutta import EULER, HEUN2, HEUN3, HOUWEN3, KUTTA3, MIDPOINT, RALSTON3, RK4, SSP3
from fewstep.schedules import EDM

WORLD = three_modes()  # VP linear, 1 .. 0.01
MULTISTEP = {
    "ddim": DDIM(),
    "2m": DPMSolverPP2M(),
    "2m-taylor": DPMSolverPP2MTaylor(),
    "dpm-2m": DPMSolverPP2M(form=NOISE),
    "3m": DPMSolverPP3M(),
    "3m-published": DPMSolverPP3MPublished(),
    "3m-noise": DPMSolverPP3M(form=NOISE),
    "tab-1": TAB(degree=1),
    "tab-2": TAB(degree=2),
    "rho-ab-1": RhoAB(degree=1),
    "rho-ab-2": RhoAB(degree=2),
    "score-exponential": ScoreExponential(),
    "unip-2": UniPC(p=2, corrector=False, lower_order_final=False),
    "unip-3": UniPC(p=3, corrector=False, lower_order_final=False),
    "unipc-1-bh1": UniPC(p=1, variant="bh1", lower_order_final=False),
    "unipc-1-bh2": UniPC(p=1, variant="bh2", lower_order_final=False),
    "unipc-2-bh1": UniPC(p=2, variant="bh1", lower_order_final=False),
    "unipc-2-bh2": UniPC(p=2, variant="bh2", lower_order_final=False),
    "unipc-2-vary": UniPC(p=2, variant="vary", lower_order_final=False),
    "unipc-2-noise": UniPC(p=2, form=NOISE, lower_order_final=False),
    "unipc-3": UniPC(p=3, lower_order_final=False),
}
RUNGE_KUTTA = {
    "euler": RungeKutta(EULER, NATIVE),
    "midpoint": RungeKutta(MIDPOINT),
    "heun": RungeKutta(HEUN2),
    "heun-native": RungeKutta(HEUN2, NATIVE),
    "kutta3": RungeKutta(KUTTA3),
    "heun3": RungeKutta(HEUN3),
    "ralston3": RungeKutta(RALSTON3),
    "houwen3": RungeKutta(HOUWEN3),
    "ssp3": RungeKutta(SSP3),
    "rk4": RungeKutta(RK4),
    "rk4-native": RungeKutta(RK4, NATIVE),
}


def normal_points(n):
    """The n midpoint quantiles of N(0, 1): a Gaussian sample without chance."""
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return torch.special.ndtri(u)[:, None]


def random_grid(schedule, steps, seed):
    """Strictly decreasing, with neighbouring steps in lambda that differ by up to a factor of 3."""
    gen = torch.Generator().manual_seed(seed)
    gaps = (1 + 2 * torch.rand(steps, generator=gen, dtype=torch.float64)).cumsum(0)
    first, last = schedule.log_snr(torch.tensor([schedule.t_max, schedule.t_min], dtype=torch.float64))
    times = schedule.time_at(first + torch.cat([gaps.new_zeros(1), gaps / gaps[-1]]) * (last - first))
    times[0], times[-1] = schedule.t_max, schedule.t_min
    return times


def rmse(world, solver, times, x):
    exact = world.flow(x, float(times[0]), float(times[-1]))
    return float((solve(world, x, times, solver) - exact).square().mean().sqrt())


def slope(world, solver, make_grids, steps, x):
    """The decay of the error with the number of steps, in powers of it: a line through the logs, each the mean over the
    grids of that length."""
    errors = [np.mean([math.log(rmse(world, solver, grid, x)) for grid in make_grids(n)]) for n in steps]
    return -np.polyfit(np.log(steps), errors, 1)[0]


SINGLE = {
    "2s": Single(2),
    "2s-taylor": Single(2, kind="taylor"),
    "3s": Single(3),
    "3s-taylor": Single(3, kind="taylor"),
    "dpm2": Single(2, NOISE),
    "dpm3": Single(3, NOISE),
    "2s-ancestral without noise": Ancestral(eta=0.0),
    "sde without noise": DPMSolverPPSDE(eta=0.0),
    "2s-fast": Fast(2),
    "3s-fast": Fast(3),
}


GRIDS = {
    "log-uniform": lambda schedule, n: [grids.log_snr(schedule, n)],
    "karras": lambda schedule, n: [grids.karras(schedule, n)],
    "random": lambda schedule, n: [random_grid(schedule, n, seed) for seed in range(2)],
}


def four_random_grids(n):
    """For slopes that differ much from one grid to the next."""
    return [random_grid(WORLD.schedule, n, seed) for seed in range(4)]


def formula_order(solver):
    """The order of a solver's rows once its history is there: from a start at noise the first steps, where predictions
    hardly move, do not show at these lengths."""
    if isinstance(solver, UniPC):
        return solver.p + solver.corrector
    if isinstance(solver, Multistep) and not isinstance(solver, DPMSolverPP3MPublished):
        return solver.outputs
    return solver.order


def assert_order(measured, solver, grid):
    """At least the order of the formula; at most a little more (third-order ones fall faster on random grids of this
    length, where the first step, of low order, is still large)."""
    low, high = (0.25, 0.6) if grid == "random" else (0.1, 0.15)
    assert formula_order(solver) - low < measured < formula_order(solver) + high


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", MULTISTEP)
def test_order_of_multistep_solvers(name, grid):
    """The error decays at the order of the formula: 1, 2, and p + 1 with UniPC's corrector."""
    solver = MULTISTEP[name]
    late = name in ("unipc-3", "3m-published", "tab-2", "rho-ab-2")
    steps = (160, 320) if late else (80, 160)
    measured = slope(WORLD, solver, lambda n: GRIDS[grid](WORLD.schedule, n), steps, normal_points(40))
    assert_order(measured, solver, grid)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", RUNGE_KUTTA)
def test_order_of_runge_kutta_solvers(name, grid):
    """The error decays at the order of the tableau, in both frames."""
    solver = RUNGE_KUTTA[name]
    measured = slope(WORLD, solver, lambda n: GRIDS[grid](WORLD.schedule, n), (40, 80), normal_points(40))
    assert_order(measured, solver, grid)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", SINGLE)
def test_order_of_single_step_solvers(name, grid):
    """2S, 3S and their twins in noise prediction; on the points of the grid itself ("fast") their last, lower-order
    steps cost third order some of its digits."""
    solver = SINGLE[name]
    steps = (81, 162) if isinstance(solver, Fast) else (40, 80)
    third = isinstance(solver, Fast) and solver.p == 3
    make_grids = four_random_grids if third and grid == "random" else lambda n: GRIDS[grid](WORLD.schedule, n)
    measured = slope(WORLD, solver, make_grids, steps, normal_points(40))
    if third:
        assert 1.9 < measured < 3.2
    else:
        assert_order(measured, solver, grid)


@pytest.mark.parametrize(
    ("solver", "make"),
    [(TAB(degree=3), grids.log_snr), (RhoAB(degree=3), grids.log_snr), (RhoAB(degree=3), grids.karras)],
)
def test_adams_bashforth_of_degree_three_is_of_fourth_order(solver, make):
    """Started with one output like any multistep solver, in long runs."""
    measured = slope(WORLD, solver, lambda n: [make(WORLD.schedule, n)], (160, 320), normal_points(40))
    assert 3.8 < measured < 4.3


@pytest.mark.parametrize("table", [EULER, MIDPOINT, HEUN2, KUTTA3, HEUN3, RALSTON3, HOUWEN3, SSP3, RK4])
def test_tableaus_fulfil_the_conditions_of_their_order(table):
    """Hairer, Norsett & Wanner 1993, II.2: one equation a rooted tree, all of them up to the order and not all beyond;
    a stage sits where its slopes lead."""
    n = len(table.nodes)
    b, c = (torch.tensor(v, dtype=torch.float64) for v in (table.weights, table.nodes))
    a = torch.tensor([[*row, *[0.0] * (n - len(row))] for row in table.inner], dtype=torch.float64)
    torch.testing.assert_close(a.sum(1), c, rtol=0, atol=1e-15)
    trees = {
        1: [(b.sum(), 1)], 2: [(b @ c, 2)], 3: [(b @ c**2, 3), (b @ a @ c, 6)],
        4: [(b @ c**3, 4), ((b * c) @ a @ c, 8), (b @ a @ c**2, 12), (b @ a @ a @ c, 24)],
        5: [(b @ c**4, 5)],
    }  # fmt: skip
    holds = {order: all(abs(float(found) - 1 / of) < 1e-14 for found, of in each) for order, each in trees.items()}
    assert next(order for order in range(1, 6) if not holds[order]) == table.order + 1


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_the_mixes_are_adams_bashforth(n):
    """``int_0^1 u^k du`` from the values at 0, -1, ..., 1 - n is exact for k < n, and for no higher power."""
    found = [sum(share * (-j) ** k for j, share in enumerate(MIXES[n])) for k in range(n + 1)]
    assert found[:n] == pytest.approx([1 / (k + 1) for k in range(n)], abs=1e-14)
    assert abs(found[n] - 1 / (n + 1)) > 0.1


@pytest.mark.parametrize("solver", [IPNDM(), DualFast()])
def test_fixed_mixes_are_of_second_order_at_most(solver):
    """iPNDM's mixes, and DualFast's on DDIM, belong to equal steps: second order on smooth grids, first on random
    ones.
    """
    for make in (grids.uniform, grids.log_snr, grids.karras):
        smooth = slope(WORLD, solver, lambda n, make=make: [make(WORLD.schedule, n)], (80, 160), normal_points(40))
        assert 1.85 < smooth < 2.15
    assert 0.7 < slope(WORLD, solver, four_random_grids, (80, 160), normal_points(40)) < 1.6


def test_the_third_order_coefficient():
    """The Taylor coefficient of the second derivative makes 3M third order; the published one, half of it, second."""
    make = lambda n: [grids.log_snr(WORLD.schedule, n)]  # noqa: E731
    corrected, published = (
        slope(WORLD, solver, make, (80, 160), normal_points(40))
        for solver in (DPMSolverPP3M(), DPMSolverPP3MPublished())
    )
    assert published < 2.15 < 2.9 < corrected


def test_dualfast_with_a_fixed_weight_on_the_first_prediction_does_not_converge():
    """The mixed term does not shrink with the step; with a weight that falls as 4 / steps it is of first order."""
    make = lambda n: [grids.log_snr(WORLD.schedule, n)]  # noqa: E731
    fixed = slope(WORLD, DualFast(anchor="first", weight=0.2), make, (80, 160), normal_points(40))
    assert fixed < 0.1
    falling = slope(WORLD, DualFast(anchor="first"), make, (80, 160), normal_points(40))
    assert 0.9 < falling < 1.2


@pytest.mark.parametrize(
    ("solver", "steps", "expected"),
    [
        (DualFast(anchor="first", weight=0.1), 10, 0.136), (DualFast(anchor="first", weight=0.2), 10, 0.095),
        (DualFast(anchor="first", weight=-0.2), 10, 0.273), (DualFast(anchor="first", weight=0.8), 5, 0.064),
        (DualFast(weight=0.1, ramp="linear"), 10, 0.158), (DualFast(weight=0.2, ramp="linear"), 10, 0.137),
        (DualFast(weight=0.4, ramp="linear"), 10, 0.096), (DualFast(weight=0.65), 10, 0.016),
        (DualFast(), 5, 0.040), (DualFast(), 10, 0.016), (DualFast(), 20, 0.0053),
        (DualFast(DPMSolverPP2M(), weight=0.65), 10, 0.215),
    ],
)  # fmt: skip
def test_error_of_dualfast(solver, steps, expected):
    """Root mean square errors, measured by an independent implementation on 200 to 400 random starts (hence 7 %): on
    DDIM a positive weight helps, a negative one harms, on 2M a large one spoils."""
    error = rmse(WORLD, solver, grids.log_snr(WORLD.schedule, steps), normal_points(400))
    assert error == pytest.approx(expected, rel=0.07)


@pytest.mark.parametrize(
    ("solver", "grid", "expected"),
    [
        (DDIM(), grids.log_snr, 9.05e-2),
        (DPMSolverPP2M(), grids.log_snr, 9.8e-3),
        (DPMSolverPP2MTaylor(), grids.log_snr, 1.7e-2),
        (Single(2), grids.log_snr, 8.8e-3),
        (DPMSolverPP3MPublished(), grids.log_snr, 5.0e-3),
        (DPMSolverPP3M(), grids.log_snr, 3.8e-3),
        (TAB(degree=1), grids.log_snr, 2.1e-2),
        (TAB(degree=3), grids.log_snr, 2.8e-3),
        (TAB(degree=1), grids.power, 1.1e-2),
        (TAB(degree=2), grids.power, 2.6e-3),
        (TAB(degree=3), grids.power, 7.7e-4),
        (RhoAB(degree=1), grids.log_snr, 3.5e-2),
        (RhoAB(degree=2), grids.log_snr, 2.0e-2),
        (RhoAB(degree=3), grids.log_snr, 1.5e-2),
        (IPNDM(), grids.uniform, 1.3e-2),
        (UniPC(p=1, lower_order_final=False), grids.log_snr, 2.7e-2),
        (UniPC(p=2, lower_order_final=False), grids.log_snr, 5.0e-3),
        (UniPC(p=3, lower_order_final=False), grids.log_snr, 1.7e-3),
        (RungeKutta(HEUN2), grids.karras, 2.7e-2),
        (RungeKutta(KUTTA3), grids.karras, 1.2e-3),
        (RungeKutta(RK4), grids.karras, 2.9e-4),
    ],
)
def test_error_at_twenty_steps(solver, grid, expected):
    """The root mean square error of 20 steps from N(0, 1), as measured by an independent implementation on 200 random
    starts (hence 7 %: here the starts are quantiles)."""
    error = rmse(WORLD, solver, grid(WORLD.schedule, 20), normal_points(200))
    assert error == pytest.approx(expected, rel=0.07)


def test_lower_order_final_costs_an_order_at_order_three():
    """With a first-order last step UniPC-3 falls to second order and UniP-2 keeps its two."""
    steps, x = (80, 160), normal_points(40)
    make = lambda n: [grids.log_snr(WORLD.schedule, n)]  # noqa: E731
    assert slope(WORLD, UniPC(p=3), make, steps, x) == pytest.approx(2.0, abs=0.25)
    assert slope(WORLD, UniPC(p=2, corrector=False), make, steps, x) == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize("grid", ["log-uniform", "karras"])
def test_order_on_another_schedule(grid):
    """2M, UniPC-2 and RK4 keep their orders in EDM's variables, sigma 10 to 0.1."""
    world = three_modes(EDM(t_min=0.1, t_max=10.0))
    for solver in (DPMSolverPP2M(), UniPC(p=2, lower_order_final=False), RungeKutta(RK4)):
        measured = slope(world, solver, lambda n: GRIDS[grid](world.schedule, n), (60, 120), 10 * normal_points(40))
        assert_order(measured, solver, grid)


def irregular_grid(schedule, steps):
    """Neighbouring steps in lambda differ by up to a factor of 3, in the pattern of the golden ratio: as irregular as
    chance.  It is counted from both ends, because the first and last steps, of low order, show, and should have the
    same proportions in grids of every length."""
    place = torch.arange(1, steps + 1, dtype=torch.float64)
    gaps = 1 + 2 * torch.frac(torch.minimum(place, place.flip(0)) * (math.sqrt(5) - 1) / 2)
    gaps = gaps.cumsum(0)
    first, last = schedule.log_snr(torch.tensor([schedule.t_max, schedule.t_min], dtype=torch.float64))
    times = schedule.time_at(first + torch.cat([gaps.new_zeros(1), gaps / gaps[-1]]) * (last - first))
    times[0], times[-1] = schedule.t_max, schedule.t_min
    return times


#: From noise, and from the middle of the way (sigma 2), where predictions move in the first step already.
STARTS = {
    "noise": (WORLD, normal_points(12)),
    "middle": (three_modes(EDM(t_min=0.1, t_max=2.0)), 2.2 * normal_points(12)),
}
ENDS = {name: world.flow(x, world.schedule.t_max, world.schedule.t_min) for name, (world, x) in STARTS.items()}
DETERMINISTIC = [
    name
    for name in SOLVERS
    if not SOLVERS[name]().table(Levels.of(WORLD.schedule, grids.log_snr(WORLD.schedule, 8))).noisy
]


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_the_declared_order_holds_on_every_grid(name):
    """As defaulted, a solver never falls slower than it declares, and somewhere not a whole order faster.

    A lack of .4 is let through: at these lengths the next term of the error still counts, most where it has the other
    sign (measured: .36 with ``dualfast-deis``, whose term of first order is small, .27 and less with all others).
    """
    solver, found = SOLVERS[name](), []
    for start, (world, x) in STARTS.items():
        for grid in (grids.karras, irregular_grid):
            errors = [solve(world, x, grid(world.schedule, n), solver) - ENDS[start] for n in (48, 96)]
            first, second = (float(error.square().mean().sqrt()) for error in errors)
            found.append(math.log2(first / second))
    assert solver.order - 0.4 < min(found) < solver.order + 1, found


@pytest.mark.parametrize(
    ("solver", "order"),
    [
        (DDIM(), 1), (DPMSolverPP2M(), 2), (DPMSolverPP3M(), 2), (DPMSolverPP3M(eta=0.5), 1), (TAB(degree=0), 1),
        (TAB(degree=3), 2), (UniPC(p=1), 2), (UniPC(p=3), 2), (UniPC(p=3, lower_order_final=False), 3),
        (UniPC(p=3, corrector=False), 2), (IPNDM(), 1), (IPNDM(p=1), 1), (Fast(3), 2), (Single(3), 3),
        (DualFast(), 1), (DualFast(weight=0.3, anchor="first"), 0), (DualFast(DPMSolverPP2M()), 2),
    ],
)  # fmt: skip
def test_declared_orders(solver, order):
    """A run is of the order of its worst step, which may be one order lower than the others."""
    assert solver.order == order
