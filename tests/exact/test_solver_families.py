"""DPM-Solver(++), DEIS, DualFast and the SDE solvers: exactness, the limits in which they agree, laws kept, guidance.

Orders of convergence are in test_solver_order.py, agreement with other implementations in tests/referee.
"""

import dataclasses
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from test_solver_identities import FAMILIES, assert_rows_equal, integral, levels_at, random_log_snrs, rows
from test_solver_order import WORLD, normal_points

from fewstep import grids
from fewstep.denoisers import Denoiser
from fewstep.discrete_vp import DiscreteVP
from fewstep.exact import Gaussian, three_modes
from fewstep.randomness import Rng
from fewstep.sampling import (
    DDIM,
    IPNDM,
    NOISE,
    SOLVERS,
    TAB,
    Ancestral,
    BrownianPath,
    DPMSolver1,
    DPMSolverPP2M,
    DPMSolverPP2MTaylor,
    DPMSolverPP3M,
    DPMSolverPP3MPublished,
    DPMSolverPPSDE,
    DualFast,
    Fast,
    Hooks,
    Levels,
    RhoAB,
    RungeKutta,
    ScoreExponential,
    Single,
    UniPC,
    run,
    solve,
)
from fewstep.sampling.solvers.dpm_solver import ancestral
from fewstep.sampling.solvers.dualfast import best_weight
from fewstep.sampling.solvers.runge_kutta import RK4
from fewstep.schedules import EDM, FlowMatching, VPLinear


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture
def levels(family):
    return levels_at(family, random_log_snrs(9))


# exactness


def noise_integral(levels, i, f):
    """alpha_t int eps d rho over step i with eps = f(lambda), by 60-point Gauss-Legendre in lambda."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    a, b = levels.log_snr[i], levels.log_snr[i + 1]
    lam = (a + b) / 2 + (b - a) / 2 * nodes
    return -levels.alpha[i + 1] * (b - a) / 2 * float(weights @ (np.exp(-lam) * f(lam)))


@pytest.mark.parametrize(
    ("solver", "degree"),
    [(DDIM(), 0), (DPMSolverPP2MTaylor(form=NOISE), 1), (DPMSolverPP3M(form=NOISE), 2),
     (UniPC(p=3, corrector=False, form=NOISE), 2)],
)  # fmt: skip
def test_noise_forms_are_exact_for_polynomials_in_lambda(solver, degree, levels):
    """Where eps is a polynomial in lambda of degree (outputs - 1), a full row is the exact integral."""
    if solver == DDIM():
        solver = DPMSolver1(form=NOISE)
    for i in range(3, 7):
        row = rows(solver, levels)[i]
        assert row.a == pytest.approx(levels.alpha[i + 1] / levels.alpha[i], rel=1e-12)
        for k in range(degree + 1):
            f = lambda lam, k=k: (lam - levels.log_snr[5]) ** k  # noqa: E731
            got = sum(c * f(levels.log_snr[i - j]) for j, c in enumerate(row.c))
            assert got == pytest.approx(noise_integral(levels, i, f), rel=1e-10, abs=1e-13)


@pytest.mark.parametrize("kind", [TAB, RhoAB])
@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_deis_is_exact_for_polynomials_in_its_clock(kind, degree, levels, family):
    """eps = u^k, u the time or rho, k up to the degree: the row is the exact integral, and its weights add up to
    DDIM's.

    DDPM's table has kinks in time, on which a quadrature is not exact: 2e-4.
    """
    solver = kind(degree=degree)
    rho = lambda lam: np.exp(-lam)  # noqa: E731
    times = lambda lam: family.time_at(torch.from_numpy(lam)).numpy()  # noqa: E731
    scale = rho if kind is RhoAB else times
    unit = solver.clock(levels, 5)
    for i in range(3, 8):
        row = rows(solver, levels)[i]
        assert sum(row.c) == pytest.approx(NOISE.exact(levels.point(i), levels.point(i + 1))[1], rel=1e-12)
        for k in range(degree + 1):
            f = lambda lam, k=k: (scale(lam) / unit) ** k  # noqa: E731
            got = sum(c * (solver.clock(levels, i - j) / unit) ** k for j, c in enumerate(row.c))
            rough = isinstance(family, DiscreteVP) and kind is TAB
            assert got == pytest.approx(noise_integral(levels, i, f), rel=2e-4 if rough else 1e-9)


@pytest.mark.parametrize(
    ("solver", "degree"),
    [(Single(2, kind="taylor"), 1), (Single(3), 1), (Single(3, kind="taylor"), 2), (Fast(3, kind="taylor"), 2)],
)
def test_single_steps_are_exact_for_polynomials_in_lambda(solver, degree, levels):
    """Where D is a polynomial in lambda, 2S (taylor) and 3S are exact for lines, 3S (taylor) for parabolas."""

    class Polynomial(Denoiser):
        def forward(self, x, t, cond=None):
            return self.schedule.log_snr(torch.as_tensor(t, dtype=torch.float64)).reshape(-1, 1) ** degree + 0 * x

    exact = x = torch.tensor([[0.3]], dtype=torch.float64)
    for i in range(6):
        exact = exact * levels.sigma[i + 1] / levels.sigma[i] + integral(levels, i, lambda lam: lam**degree)
    ends = []
    times = torch.tensor(levels.times[: 8 if isinstance(solver, Fast) else 7], dtype=torch.float64)
    solve(Polynomial(levels.schedule, (1,)), x, times, solver, hooks=Hooks(after=lambda i, y: ends.append(y) or y))
    result = ends[1] if isinstance(solver, Fast) else ends[-1]  # two groups of three, then a step of order 1
    assert float((result - exact).abs()) < 1e-11


# solvers that must agree


def test_deis_of_degree_zero_is_ddim(levels):
    """tAB0 = rhoAB0 = DPM-Solver-1 = DDIM, in noise prediction."""
    reference = rows(DPMSolver1(form=NOISE), levels)
    for solver in (TAB(degree=0), RhoAB(degree=0), IPNDM(p=1)):
        assert_rows_equal(rows(solver, levels), reference, 1e-11)
    x, times = normal_points(9), torch.tensor(levels.times, dtype=torch.float64)
    world = three_modes(levels.schedule)
    ours, ddim = (solve(world, x, times, solver) for solver in (TAB(degree=0), DDIM()))
    assert float((ours - ddim).abs().max()) < 1e-12


def test_the_corrected_3m_is_unip_3(levels):
    """With B(h) gone (the variant that solves every system) UniP-3 and DPM-Solver++ 3M are the same rows."""
    unip = UniPC(p=3, variant="vary", corrector=False, lower_order_final=False)
    assert_rows_equal(rows(unip, levels), rows(DPMSolverPP3M(), levels))
    gap = [
        abs(a.c[0] - b.c[0]) for a, b in zip(rows(unip, levels), rows(DPMSolverPP3MPublished(), levels), strict=True)
    ]
    assert min(gap[3:]) > 1e-4


def test_unip_2_in_noise_prediction_is_dpm_solver_2m(levels):
    """As in data prediction: bh2's shortcut is the "dpmsolver" kind, the full system the "taylor" one."""
    for variant, twin in {"bh2": DPMSolverPP2M(form=NOISE), "vary": DPMSolverPP2MTaylor(form=NOISE)}.items():
        unip = UniPC(p=2, variant=variant, corrector=False, lower_order_final=False, form=NOISE)
        assert_rows_equal(rows(unip, levels), rows(twin, levels))


def test_the_first_sde_step_is_the_ddpm_posterior(levels):
    """SDE-DPM-Solver++ 1 with eta = 1 = DDIM(1); in between the two share out the noise differently."""
    assert_rows_equal(rows(DPMSolver1(eta=1.0), levels), rows(DDIM(eta=1.0), levels))
    assert_rows_equal(rows(DPMSolver1(), levels), rows(DDIM(), levels))
    assert abs(rows(DPMSolver1(eta=0.5), levels)[4].n - rows(DDIM(eta=0.5), levels)[4].n) > 1e-3


def test_ancestral_split_at_full_noise_is_the_reverse_sde(levels):
    """k-diffusion's down and up levels at eta = 1: down is 2 h away in lambda, the exponent of the SDE solvers."""
    for i in range(levels.steps):
        down, up = ancestral(levels.point(i), levels.point(i + 1), 1.0)
        assert down.log_snr == pytest.approx(levels.log_snr[i] + 2 * levels.h(i), abs=1e-10)
        assert up == pytest.approx(levels.sigma[i + 1] * math.sqrt(-math.expm1(-2 * levels.h(i))), rel=1e-12)


def test_without_noise_ancestral_solvers_are_single_steps(levels):
    """eta = 0: 2S ancestral and the SDE solver are 2S, DPM2 ancestral is DPM2."""
    assert_rows_equal(rows(Ancestral(eta=0.0), levels), rows(Single(2), levels))
    assert_rows_equal(rows(DPMSolverPPSDE(eta=0.0), levels), rows(Single(2), levels))
    assert_rows_equal(rows(Ancestral(NOISE, eta=0.0), levels), rows(Single(2, NOISE), levels))


def test_fast_takes_as_many_calls_as_steps():
    """Groups of p with the rest at the end; a step from pure noise or to pure data stands alone."""
    grid = grids.karras(EDM(), 12)
    expected = {5: [3, 2], 6: [3, 2, 1], 7: [3, 3, 1], 8: [3, 3, 2]}
    for steps, groups in expected.items():
        levels = Levels.of(EDM(), grids.karras(EDM(), steps))
        assert Fast(3).groups(levels) == groups
        assert Fast(3).table(levels).calls == steps
    assert Fast(2).groups(Levels.of(EDM(), grid[:8])) == [2, 2, 2, 1]
    flow = Levels.of(FlowMatching(), torch.linspace(1, 0, 10, dtype=torch.float64))
    assert Fast(3).groups(flow) == [1, 3, 3, 1, 1]
    assert Fast(3).groups(Levels.of(FlowMatching(), torch.tensor([1.0, 0.0]))) == [1]


# DualFast


def test_dualfast_without_weight_is_its_base(levels):
    """c = 0 is the base solver bit for bit."""
    for base in (DDIM(), DPMSolverPP2M(), TAB()):
        for anchor in ("previous", "first"):
            assert rows(DualFast(base, anchor, 0.0), levels) == rows(base, levels)


def test_dualfast_on_ddim_with_one_half_is_ipndm_2(levels):
    """From the second step on (the first is DDIM's in both)."""
    world, x, times = three_modes(levels.schedule), normal_points(9), torch.tensor(levels.times, dtype=torch.float64)
    ours = solve(world, x, times, DualFast(weight=0.5))
    assert float((ours - solve(world, x, times, IPNDM(p=2))).abs().max()) < 1e-12 * float(x.abs().max())


@pytest.mark.parametrize("anchor", ["previous", "first"])
@pytest.mark.parametrize("base", [DDIM(), DPMSolverPP2M(), TAB(degree=2), UniPC(p=2, corrector=False)])
def test_dualfast_mixes_the_zeroth_order_term(base, anchor):
    """Against the method written out: the base's step with eps replaced in its zeroth-order term only."""
    world, times = three_modes(VPLinear()), grids.log_snr(VPLinear(), 8)
    levels, x = Levels.of(VPLinear(), times), normal_points(9)
    ours = solve(world, x, times, DualFast(base, anchor, 0.3, "constant"))
    plain, seen, history = base.table(levels), [], []
    for i, step in enumerate(plain.steps):
        row = step.stages[0].row
        eps = world.eps(x, levels.times[i])
        output = world(x, levels.times[i]) if base.form.output == "x0" else eps
        history.insert(0, output)
        mixed = eps if i == 0 else 1.3 * eps - 0.3 * seen[0 if anchor == "first" else -1]
        replaced = mixed if base.form.output == "eps" else (x - levels.sigma[i] * mixed) / levels.alpha[i]
        zeroth = base.form.exact(levels.point(i), levels.point(i + 1))[1]
        x = row.a * x + sum(c * m for c, m in zip(row.c, history, strict=False)) + zeroth * (replaced - output)
        seen.append(eps)
    assert float((ours - x).abs().max()) < 1e-12


# laws kept by the stochastic solvers


SDE = {
    "1": DPMSolver1(), "2m": DPMSolverPP2M(), "2m-taylor": DPMSolverPP2MTaylor(), "3m": DPMSolverPP3M(),
    "2s-ancestral": Ancestral(), "sde": DPMSolverPPSDE(),
}  # fmt: skip


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", SDE)
def test_sde_steps_keep_the_marginals_of_an_oracle(name, eta, levels):
    """With D = x_0 every row, inner ones too, takes N(alpha_s x_0, sigma_s^2) to the law of the level it goes to."""
    table = dataclasses.replace(SDE[name], eta=eta).table(levels)
    for i, step in enumerate(table.steps):
        ends = [stage.time for stage in step.stages[1:]] + [levels.times[i + 1]]
        for stage, end in zip(step.stages, torch.tensor(ends, dtype=torch.float64), strict=True):
            alpha, sigma = float(levels.schedule.alpha(end)), float(levels.schedule.sigma(end))
            row = stage.row
            assert row.a * levels.alpha[i] + sum(row.c) == pytest.approx(alpha, rel=1e-12)
            assert (row.a * levels.sigma[i]) ** 2 + row.n**2 == pytest.approx(sigma**2, rel=1e-11)
            assert (row.n > 0) == (eta > 0) or (name == "2s-ancestral" and stage is step.stages[0])


def test_the_data_law_is_sampled_by_the_sde():
    """160 steps of the SDE solvers from the prior: mean and standard deviation of the mixture, the latter within the
    2 % that first-order solvers leave."""
    n = 20000
    x = WORLD.schedule.prior(Rng(0).normal(n, 1, dtype=torch.float64))
    exact = WORLD.sample(200000, Rng(1))
    for name in ("dpmpp-2m-sde", "dpmpp-3m-sde", "dpmpp-sde", "euler-ancestral"):
        got = solve(WORLD, x, grids.log_snr(WORLD.schedule, 160), SOLVERS[name](), rng=Rng(2))
        assert abs(float(got.mean() - exact.mean())) < 4 * float(exact.std()) / math.sqrt(n)
        assert float(got.std() / exact.std()) == pytest.approx(1, abs=0.03)


# one Brownian path for any number of steps


def stretches(path, cuts, x):
    return torch.stack([path.increment(x, a, b) for a, b in pairwise(cuts)])


def test_disjoint_stretches_of_a_path_are_independent_standard_normals():
    """20,000 paths over five stretches of very different length: means, and the matrix of covariances."""
    cuts = [-4.0, -3.9, -1.0, 0.0, 0.3, 5.0]
    z = stretches(BrownianPath(0), cuts, torch.zeros(20000, dtype=torch.float64))
    assert float(z.mean(1).abs().max()) < 4 / math.sqrt(20000)
    assert float((torch.cov(z) - torch.eye(5, dtype=torch.float64)).abs().max()) < 5 / math.sqrt(20000)


def test_stretches_of_one_path_add_up():
    """The noise of a long stretch is that of its parts in the clock e^(2 lambda), however it was asked before."""
    fine, coarse = [-2.0 + 0.25 * i for i in range(13)], [-2.0, -0.5, 1.0]
    x = torch.zeros(7, dtype=torch.float64)
    parts, whole = stretches(BrownianPath(3), fine, x), stretches(BrownianPath(3), coarse, x)
    path = BrownianPath(3)
    clock = [path.clock(path.cell(cut)) for cut in fine]
    sums = torch.stack([z * math.sqrt(b - a) for z, a, b in zip(parts, clock[:-1], clock[1:], strict=True)])
    for j in range(2):
        first, last = fine.index(coarse[j]), fine.index(coarse[j + 1])
        expected = sums[first:last].sum(0) / math.sqrt(clock[last] - clock[first])
        assert float((whole[j] - expected).abs().max()) < 1e-12
    assert not torch.allclose(stretches(BrownianPath(4), coarse, x), whole)


@pytest.mark.parametrize("name", ["dpmpp-2m-sde", "dpmpp-sde", "euler-ancestral"])
def test_solvers_converge_along_one_path(name):
    """With the same path 20, 40 and 80 steps approach 640 sample by sample (strong order 1/2 at least: a factor of
    1.41 each, less sampling error); with fresh noise they do not."""
    x = WORLD.schedule.prior(Rng(0).normal(300, 1, dtype=torch.float64))

    def ends(steps, make):
        return solve(WORLD, x, grids.log_snr(WORLD.schedule, steps), SOLVERS[name](), rng=make())

    reference = ends(640, lambda: BrownianPath(1))
    errors = [float((ends(n, lambda: BrownianPath(1)) - reference).square().mean().sqrt()) for n in (20, 40, 80)]
    assert errors[0] > 1.3 * errors[1] > 1.3**2 * errors[2]
    fresh = float((ends(80, lambda: Rng(1)) - reference).square().mean().sqrt())
    assert fresh > 10 * errors[2]


def test_a_path_does_not_depend_on_how_a_batch_is_split():
    """Two parts of a batch get the halves of what the whole gets, to rounding: sums are taken in another order."""
    x = torch.zeros(6, 2, dtype=torch.float64)
    whole = stretches(BrownianPath(0), [-1.0, 0.0, 2.0], x)
    parts = [stretches(BrownianPath(0, part=i, parts=2), [-1.0, 0.0, 2.0], x[:3]) for i in (0, 1)]
    assert float((torch.cat(parts, dim=1) - whole).abs().max()) < 1e-12


def test_a_path_refuses_what_it_cannot_resolve():
    """Two values of lambda in one cell, and a number of levels out of range."""
    with pytest.raises(ValueError, match="more levels than 2"):
        BrownianPath(0, levels=2).increment(torch.zeros(1), 0.0, 0.01)
    with pytest.raises(ValueError, match="levels=0"):
        BrownianPath(0, levels=0)


# guidance


class Towards(Denoiser):
    """Guidance from the whole mixture towards its third part, both exact."""

    def __init__(self, scale):
        super().__init__(WORLD.schedule, (1,))
        self.part = Gaussian(WORLD.schedule, torch.tensor([1.5]), torch.tensor([[0.09]]))
        self.scale = scale

    def forward(self, x, t, cond=None):
        away = WORLD(x, t)
        return away + self.scale * (self.part(x, t) - away)


@pytest.fixture(scope="module")
def guided_reference():
    """200 steps of the classical Runge-Kutta rule in rho; 2,000 of Heun agree to 3e-6."""
    x = normal_points(200)
    times = grids.log_snr(WORLD.schedule, 200)
    return {w: solve(Towards(w), x, times, RungeKutta(RK4)) for w in (1.0, 8.0)}


@pytest.mark.parametrize(
    ("solver", "steps", "make", "scale", "expected"),
    [
        (DDIM(), 12, grids.log_snr, 1.0, 0.047), (DPMSolverPP2M(), 12, grids.log_snr, 1.0, 0.003),
        (Single(3, NOISE), 4, grids.log_snr, 1.0, 0.005), (Single(2, NOISE), 6, grids.log_snr, 1.0, 0.044),
        (DDIM(), 12, grids.log_snr, 8.0, 0.109), (DPMSolverPP2M(), 12, grids.log_snr, 8.0, 0.265),
        (Single(3, NOISE), 4, grids.log_snr, 8.0, 3.22), (Single(2, NOISE), 6, grids.log_snr, 8.0, 2.71),
        (DDIM(), 12, grids.uniform, 8.0, 0.158), (DPMSolverPP2M(), 12, grids.uniform, 8.0, 0.121),
        (DPMSolverPP3MPublished(), 12, grids.uniform, 8.0, 1.19),
    ],
)  # fmt: skip
def test_guidance_breaks_single_step_solvers_in_noise_prediction(
    solver, steps, make, scale, expected, guided_reference
):
    """Root mean square errors at 12 calls (4 steps of 3, 6 of 2) of an independent implementation on random starts:
    unguided all are good; at scale 8 the noise-prediction solvers of higher order blow up, 2M stays bounded."""
    got = solve(Towards(scale), normal_points(200), make(WORLD.schedule, steps), solver)
    error = float((got - guided_reference[scale]).square().mean().sqrt())
    assert error == pytest.approx(expected, rel=0.07)


# the ends


@pytest.mark.parametrize("name", SOLVERS)
def test_denoise_to_zero_on_a_schedule_that_never_gets_there(name):
    """DDPM's table stops at sigma = 0.01; a further step gives back the network's prediction at that level."""
    schedule = DiscreteVP.linear()
    world, seen = three_modes(schedule), []
    levels = Levels.of(schedule, grids.trailing(schedule, 6)).denoised()
    world.register_forward_hook(lambda module, args, out: seen.append((float(args[1][0]), out)))
    got = run(world, normal_points(5), SOLVERS[name]().table(levels), rng=Rng(0))
    assert seen[-1][0] == 0.0
    assert float((got - seen[-1][1]).abs().max()) < 1e-12
    assert levels.denoised() is levels


def test_the_score_exponential_is_worse_than_euler_near_the_data():
    """Ingredient 1 of DEIS without ingredient 2: a fixed score over a step that ends at a small sigma."""
    x = normal_points(100)
    times = grids.uniform(WORLD.schedule, 10)
    exact = WORLD.flow(x, float(times[0]), float(times[-1]))
    score, euler = (
        float((solve(WORLD, x, times, solver) - exact).square().mean().sqrt())
        for solver in (ScoreExponential(), SOLVERS["euler"]())
    )
    assert score > euler


def test_dualfasts_measured_weight_between_and_beyond_its_table():
    """0.8, 0.65 and 0.55 at 5, 10 and 20 steps; halfway in log(steps) lies the mean of two neighbours; fewer than 5
    have that of 5, and beyond 20 the surplus over 1/2 falls like 1 / steps."""
    found = {steps: best_weight(steps) for steps in (1, 5, 6, 7, 10, 14, 20, 40, 200)}
    assert (found[1], found[5], found[10], found[20]) == (0.8, 0.8, 0.65, pytest.approx(0.55))
    assert [found[6], found[7]] == pytest.approx([0.8 - 0.15 * math.log2(n / 5) for n in (6, 7)], rel=1e-14)
    assert found[14] == pytest.approx(0.65 - 0.1 * math.log2(14 / 10), rel=1e-14)
    assert found[40] == pytest.approx(0.525, rel=1e-14) and found[200] == pytest.approx(0.505, rel=1e-14)


def test_dualfasts_weights_of_every_step():
    """Nothing in the first step; constant with the prediction before, from 0 up to 4 / steps with the first."""
    assert DualFast().weights(10) == [0.0] + [0.65] * 9
    assert DualFast(anchor="first").weights(5) == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8], rel=1e-15)
    assert DualFast(ramp="linear").weights(5) == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8], rel=1e-15)
    assert DualFast(anchor="first", ramp="constant", weight=0.3).weights(3) == [0.0, 0.3, 0.3]
    assert DualFast(DPMSolverPP2M()).weights(3) == [0.0, 0.0, 0.0]
    assert [solver.order for solver in (DualFast(), DualFast(weight=0.3), DualFast(anchor="first", weight=0.3))] == [
        DDIM().order, 1, 0,
    ]  # fmt: skip
