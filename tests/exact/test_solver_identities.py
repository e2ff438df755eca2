"""What each solver's coefficients must satisfy exactly: closed forms, limits in which two solvers agree, and laws kept.

Tolerances are float64 rounding: 1e-12 for states of size 1 to 100 after some tens of operations.
"""

import math
from decimal import Decimal, getcontext
from itertools import pairwise

import numpy as np
import pytest
import torch

from fewstep.denoisers import Denoiser
from fewstep.discrete_vp import DiscreteVP
from fewstep.exact import three_modes
from fewstep.grids import karras, log_snr, to_data
from fewstep.randomness import Rng
from fewstep.sampling import (
    ABM,
    DDIM,
    NATIVE,
    SOLVERS,
    Churn,
    DDPMLarge,
    DPMSolverPP2M,
    DPMSolverPP2MTaylor,
    DPMSolverPP3M,
    Levels,
    RungeKutta,
    UniPC,
    balanced,
    run,
    solve,
)
from fewstep.sampling.coefficients import DATA, NOISE, chi, psi, vandermonde
from fewstep.sampling.solvers.runge_kutta import EULER, HEUN2
from fewstep.sampling.solvers.stochastic import NO_CHURN
from fewstep.schedules import EDM, FlowMatching, TrigFlow, VPCosine, VPLinear

FAMILIES = {
    "vp": VPLinear(),
    "cosine": VPCosine(),
    "edm": EDM(),
    "flow": FlowMatching(),
    "trig": TrigFlow(),
    "ddpm": DiscreteVP.linear(),
}


def levels_at(schedule, log_snrs):
    return Levels.of(schedule, schedule.time_at(torch.as_tensor(log_snrs, dtype=torch.float64)))


def random_log_snrs(steps, low=-3.0, high=3.5, seed=0):
    """Rising, with neighbouring steps that differ by up to a factor of 3."""
    gaps = 1 + 2 * np.random.default_rng(seed).random(steps)
    return low + (high - low) * np.concatenate([[0], gaps.cumsum() / gaps.sum()])


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


# coefficient functions


def exact_chi(k, h):
    """The recursion in 60 digits."""
    getcontext().prec = 60
    h = Decimal(h)
    value = h.exp() - 1
    for j in range(1, k + 1):
        value = value / h - 1 / Decimal(math.factorial(j))
    return float(value)


@pytest.mark.parametrize("h", [1e-9, 1e-4, 9e-3, 1.1e-2, 0.3, 0.999, 1.0, 1.5, 4.0, 20.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_chi_and_psi_to_machine_precision(h, sign):
    """chi_0 .. chi_4 and psi_0 .. psi_4 agree with 60-digit arithmetic, for steps of any length and either sign."""
    for k, (x, y) in enumerate(zip(chi(4, sign * h), psi(4, sign * h), strict=True)):
        assert x == pytest.approx(exact_chi(k, sign * h), rel=3e-14)
        assert y == pytest.approx(-exact_chi(k, -sign * h), rel=3e-14)


def test_psi_of_an_infinite_step():
    """psi_k(inf) = 1 / k!: the exact step to pure data."""
    assert psi(3, math.inf) == [1, 1, 1 / 2, 1 / 6]


def test_vandermonde_weights_integrate_polynomials():
    """The weights reproduce the moments they were asked for."""
    nodes, moments = [-2.3, -1.1, -0.4, 1.0], [0.3, -0.7, 0.2, 1.9]
    w = np.array(vandermonde(nodes, moments))
    for k, moment in enumerate(moments):
        assert float(w @ np.array(nodes) ** k) == pytest.approx(moment, rel=1e-12)


# polynomial exactness


def integral(levels, i, f):
    """sigma_t int_s^t e^lambda f(lambda) dlambda by 40-point Gauss-Legendre: what the row's outputs must add up to."""
    a, b = levels.log_snr[i], levels.log_snr[i + 1]
    nodes, weights = np.polynomial.legendre.leggauss(40)
    lam = (a + b) / 2 + (b - a) / 2 * nodes
    return levels.sigma[i + 1] * (b - a) / 2 * float(weights @ (np.exp(lam) * f(lam)))


@pytest.mark.parametrize(
    ("solver", "degree"),
    [(DDIM(), 0), (DPMSolverPP2MTaylor(), 1), (DPMSolverPP3M(), 2), (UniPC(p=3, corrector=False), 2)],
)
def test_predictors_are_exact_for_polynomials_in_lambda(solver, degree, family):
    """Where D is a polynomial in lambda of degree (outputs - 1), a full row is the exact integral, on a random grid."""
    levels = levels_at(family, random_log_snrs(9))
    for i in range(3, 7):
        row = solver.table(levels).steps[i].stages[0].row
        assert row.a == pytest.approx(levels.sigma[i + 1] / levels.sigma[i], rel=1e-12)
        for k in range(degree + 1):
            f = lambda lam, k=k: (lam - levels.log_snr[5]) ** k  # noqa: E731
            got = sum(c * f(levels.log_snr[i - j]) for j, c in enumerate(row.c))
            assert got == pytest.approx(integral(levels, i, f), rel=1e-10, abs=1e-13)


def test_2m_is_the_midpoint_rule(family):
    """The "dpmsolver" 2M takes a D that is linear in lambda at the middle of the step, on a random grid."""
    levels = levels_at(family, random_log_snrs(9))
    for i in range(1, 9):
        row = DPMSolverPP2M().table(levels).steps[i].stages[0].row
        got = row.c[0] * levels.log_snr[i] + row.c[1] * levels.log_snr[i - 1]
        middle = (levels.log_snr[i] + levels.log_snr[i + 1]) / 2
        assert got == pytest.approx(levels.alpha[i + 1] * psi(0, levels.h(i))[0] * middle, rel=1e-11, abs=1e-13)


def test_unipc_corrector_is_exact_one_degree_higher(family):
    """UniPC-3's corrector integrates cubics exactly: its nodes are three old outputs and the new one."""
    levels = levels_at(family, random_log_snrs(9))
    for i in range(3, 7):
        _, row = UniPC(p=3, lower_order_final=False).rows(levels, i, 3)
        for k in range(4):
            f = lambda lam, k=k: (lam - levels.log_snr[5]) ** k  # noqa: E731
            got = sum(c * f(levels.log_snr[i + 1 - j]) for j, c in enumerate(row.c))
            assert got == pytest.approx(integral(levels, i, f), rel=1e-10, abs=1e-13)


class Constant(Denoiser):
    """D = x_0 whatever the state: data that is one point."""

    def __init__(self, schedule, x0):
        super().__init__(schedule, tuple(x0.shape[1:]))
        self.x0 = x0

    def forward(self, x, t, cond=None):
        return self.x0.expand_as(x)


DETERMINISTIC = [
    name
    for name in SOLVERS
    if not SOLVERS[name]().table(levels_at(EDM(), [-2.0, -1.0, 0.0])).noisy and name not in ("euler", "heun-native")
]


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_single_point_is_sampled_exactly(name, family):
    """With D = x_0 every deterministic solver stays on alpha x_0 + sigma eps, in any number of steps."""
    x0, eps = torch.tensor([[0.7, -1.3]], dtype=torch.float64), torch.tensor([[0.4, 1.1]], dtype=torch.float64)
    times = family.time_at(torch.as_tensor(random_log_snrs(7)))
    start, end = (family.add_noise(x0, eps, t.expand(1)) for t in (times[0], times[-1]))
    got = solve(Constant(family, x0), start, times, SOLVERS[name]())
    assert float((got - end).abs().max()) < 1e-12 * float(start.abs().max())


# solvers that must agree


def rows(solver, levels):
    return [stage.row for step in solver.table(levels).steps for stage in step.stages]


def assert_rows_equal(mine, others, tol=1e-12):
    assert len(mine) == len(others)
    for x, y in zip(mine, others, strict=True):
        assert (x.a, *x.c, x.n) == pytest.approx((y.a, *y.c, y.n), rel=tol, abs=tol)


def test_ddim_is_euler_in_the_noise_ratio(family):
    """DDIM(0) = Euler on d(x / alpha) / d(sigma / alpha)."""
    levels = levels_at(family, random_log_snrs(8))
    assert_rows_equal(rows(DDIM(), levels), rows(RungeKutta(EULER), levels))


def test_ddim_is_euler_in_time_where_paths_are_straight():
    """On flow matching and EDM, Euler in the schedule's own time is DDIM; on VP it is not."""
    for schedule in (EDM(), FlowMatching()):
        levels = levels_at(schedule, random_log_snrs(8))
        assert_rows_equal(rows(DDIM(), levels), rows(RungeKutta(EULER, NATIVE), levels))
    levels = levels_at(VPLinear(), random_log_snrs(8))
    gap = [abs(x.a - y.a) for x, y in zip(rows(DDIM(), levels), rows(RungeKutta(EULER, NATIVE), levels), strict=True)]
    assert min(gap) > 1e-3


def test_unip_2_with_bh2_is_2m(family):
    """UniPC-2 without its corrector, B(h) = e^h - 1, is DPM-Solver++ 2M, row by row."""
    levels = levels_at(family, random_log_snrs(8))
    unip = UniPC(p=2, variant="bh2", corrector=False, lower_order_final=False)
    assert_rows_equal(rows(unip, levels), rows(DPMSolverPP2M(), levels))


def test_unipc_variants_differ_only_by_the_half_weights():
    """From the third step on UniPC-3's bh1 and bh2 are the same (B cancels where the systems are solved); the row of
    the third still corrects the second."""
    levels = levels_at(VPLinear(), random_log_snrs(8))
    one, two = (rows(UniPC(p=3, variant=v, lower_order_final=False), levels) for v in ("bh1", "bh2"))
    assert_rows_equal(one[3:], two[3:])
    assert one[1] != two[1] and one[2] != two[2]


@pytest.mark.parametrize("solver", [UniPC(p=1), UniPC(p=3), UniPC(form=NOISE), ABM(p=4), ABM(p=2, form=NOISE)], ids=str)
def test_predicting_and_correcting_are_one_update(solver, family):
    """The table's rows lead to the same states as the algorithm as printed: correct the last step from where it began,
    then predict the next one."""
    levels = levels_at(family, random_log_snrs(8))
    world = three_modes(family)
    start = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None] * max(levels.alpha[0], levels.sigma[0])
    x, begin, outputs, corrector = start, start, [], None
    for i in range(8):
        t = torch.full((5,), levels.times[i], dtype=torch.float64)
        x0 = world(x, t)
        outputs.insert(0, x0 if solver.form == DATA else (x - levels.alpha[i] * x0) / levels.sigma[i])
        if corrector is not None:
            begin = corrector.a * begin + sum(c * m for c, m in zip(corrector.c, outputs, strict=False))
        predictor, corrector = solver.rows(levels, i, solver.usable(levels, i))
        x = predictor.a * begin + sum(c * m for c, m in zip(predictor.c, outputs, strict=False))
    got = run(world, start, solver.table(levels))
    assert float((got - x).abs().max()) < 1e-11 * float(start.abs().max())


def edm_heun(denoiser, x, sigmas, churn=NO_CHURN, noise=()):
    """Karras et al. 2022, algorithm 2, as printed."""
    noise = iter(noise)
    for sigma, after in pairwise(sigmas.tolist()):
        gamma = 0.0
        if churn.low <= sigma <= churn.high:
            gamma = min(churn.amount / (len(sigmas) - 1), math.sqrt(2) - 1)
        raised = sigma + gamma * sigma
        if gamma > 0:
            x = x + math.sqrt(raised**2 - sigma**2) * churn.inflation * next(noise)
        d = (x - denoiser(x, raised)) / raised
        new = x + (after - raised) * d
        if after != 0:
            d_after = (new - denoiser(new, after)) / after
            new = x + (after - raised) * (d + d_after) / 2
        x = new
    return x


def test_heun_is_edms_sampler():
    """The Heun tableau in the ratio frame = EDM's algorithm, on its own grid and with its last step to 0."""
    world = three_modes(EDM())
    times = to_data(karras(EDM(), 12), EDM())
    x = 80 * torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    mine = solve(world, x, times, RungeKutta(HEUN2))
    # The states have size 80 and Heun's last large steps amplify rounding some ten times.
    assert float((mine - edm_heun(world, x, times)).abs().max()) < 1e-11


class SharedNoise(Rng):
    """Hands out given noises in order."""

    def __init__(self, noises):
        super().__init__(0)
        self.noises = iter(noises)

    def normal_like(self, x):
        return next(self.noises)


def test_churned_heun_is_edms_stochastic_sampler():
    """The same with churn: the lifts, their range and their inflation, with shared noise."""
    world, churn = three_modes(EDM(t_max=200.0)), Churn(amount=6.0, low=0.05, high=50.0, inflation=1.007)
    times = to_data(karras(EDM(), 12), EDM())
    gen = torch.Generator().manual_seed(0)
    x = 80 * torch.randn(9, 1, generator=gen, dtype=torch.float64)
    noise = torch.randn(12, 9, 1, generator=gen, dtype=torch.float64)
    mine = solve(world, x, times, RungeKutta(HEUN2, churn=churn), rng=SharedNoise(noise))
    assert float((mine - edm_heun(world, x, times, churn, noise)).abs().max()) < 1e-11
    assert float((mine - edm_heun(world, x, times)).abs().max()) > 1e-3  # the churn did something


#: All but those whose polynomials, slopes or variance live in the schedule's own time.
INVARIANT = {
    **{n: SOLVERS[n]() for n in SOLVERS if "deis" not in n and n not in ("euler", "heun-native", "ddpm-large")},
    "unipc-2-bh1": UniPC(p=2, variant="bh1"),
    "heun-churn": RungeKutta(HEUN2, churn=Churn(amount=3.0)),
}


@pytest.mark.parametrize("name", INVARIANT)
def test_solvers_do_not_see_the_schedule(name):
    """On the same grid in lambda, x / alpha is the same on VP, EDM, flow matching and TrigFlow."""
    grid = torch.as_tensor(random_log_snrs(10))
    start = torch.linspace(-2, 2, 7, dtype=torch.float64)[:, None] * math.exp(3)  # in units of the data
    results = []
    for schedule in (VPLinear(), EDM(), FlowMatching(), TrigFlow()):
        times = schedule.time_at(grid)
        x = start * schedule.alpha(times[0])
        out = solve(three_modes(schedule), x, times, INVARIANT[name], rng=Rng(0))
        results.append(out / schedule.alpha(times[-1]))
    for other in results[1:]:
        assert float((other - results[0]).abs().max()) < 1e-12


# stochastic steps


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_keeps_the_marginals_of_an_oracle(eta, family):
    """With D = x_0 a step takes N(alpha_s x_0, sigma_s^2) to N(alpha_t x_0, sigma_t^2) exactly."""
    levels = levels_at(family, random_log_snrs(8))
    for i, row in enumerate(rows(DDIM(eta=eta), levels)):
        assert row.a * levels.alpha[i] + sum(row.c) == pytest.approx(levels.alpha[i + 1], rel=1e-13)
        variance = (row.a * levels.sigma[i]) ** 2 + row.n**2
        assert variance == pytest.approx(levels.sigma[i + 1] ** 2, rel=1e-12)
        assert (row.n > 0) == (eta > 0)


def test_ddim_with_eta_1_is_the_ddpm_posterior():
    """At the integer times of DDPM's table: mean and variance of q(x_s | x_t, x_0), Ho et al. 2020, eq. 6 and 7."""
    schedule = DiscreteVP.linear()
    bar = np.array(schedule.alphas_cumprod)
    for t in (999, 500, 10, 1):
        levels = Levels.of(schedule, torch.tensor([t, t - 1.0]))
        (row,) = rows(DDIM(eta=1.0), levels)
        beta = 1 - bar[t] / bar[t - 1]
        on_x = math.sqrt(1 - beta) * (1 - bar[t - 1]) / (1 - bar[t])
        on_x0 = math.sqrt(bar[t - 1]) * beta / (1 - bar[t])
        assert (row.a, row.c[0]) == pytest.approx((on_x, on_x0), rel=1e-9)
        assert row.n**2 == pytest.approx((1 - bar[t - 1]) / (1 - bar[t]) * beta, rel=1e-9)
        (large,) = rows(DDPMLarge(), levels)
        assert (large.a, large.c) == (row.a, row.c)
        assert large.n**2 == pytest.approx(beta, rel=1e-9)


def test_churn_lifts_to_the_marginal_of_the_noisier_time(family):
    """A lift takes N(alpha x_0, sigma^2) to the law of the raised time, whose ratio is 1 + gamma times larger."""
    levels = levels_at(family, random_log_snrs(8))
    churn = Churn(amount=2.0, low=0.1, high=10.0)
    starts, lifts = churn.lifts(levels)
    raised = torch.tensor(starts, dtype=torch.float64)
    for i, (lift, t) in enumerate(zip(lifts, raised, strict=True)):
        ratio = math.exp(-levels.log_snr[i])
        assert (lift is not None) == (0.1 <= ratio <= 10)
        if lift is None:
            assert float(t) == levels.times[i]
            continue
        alpha, sigma = float(family.alpha(t)), float(family.sigma(t))
        assert sigma / alpha == pytest.approx(ratio * 1.25, rel=1e-9)
        assert lift.a * levels.alpha[i] == pytest.approx(alpha, rel=1e-12)
        assert (lift.a * levels.sigma[i]) ** 2 + lift.n**2 == pytest.approx(sigma**2, rel=1e-12)


def test_churn_is_cut_at_the_noisiest_time():
    """At t_max there is nothing to lift to."""
    starts, lifts = Churn(amount=4.0).lifts(Levels.of(EDM(), karras(EDM(), 10)))
    assert starts[0] == 80 and lifts[0] is None and lifts[1] is not None and max(starts) <= 80


# the singular ends


@pytest.mark.parametrize("name", SOLVERS)
def test_the_last_step_to_zero_is_the_denoiser(name):
    """A last time 0 (sigma = 0, lambda = +inf): the result is alpha D at the last network call; nothing is NaN."""
    for schedule in (EDM(), FlowMatching(), VPLinear(), TrigFlow()):
        world, seen = three_modes(schedule), []
        hooked = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
        times = balanced(schedule, 6)
        assert float(times[-1]) == 0
        world.register_forward_hook(lambda module, args, out, seen=seen: seen.append((args[1], out)))
        got = solve(world, schedule.prior(hooked), times, SOLVERS[name](), rng=Rng(0))
        last_time, last_output = seen[-1]
        assert float(last_time[0]) == float(times[-2])
        # Flow matching's own Euler step builds the coefficient 1 in floating point.
        assert float((got - last_output).abs().max()) < 1e-14
        assert bool(torch.isfinite(got).all())


@pytest.mark.parametrize("name", SOLVERS)
def test_a_start_at_pure_noise_is_finite(name):
    """A first time with alpha = 0 (lambda = -inf), alone and together with a last time 0."""
    for schedule in (FlowMatching(), TrigFlow(t_max=math.pi / 2, sigma_data=1.0)):
        noise = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
        for times in (balanced(schedule, 6), balanced(schedule, 6)[:-1], balanced(schedule, 1)):
            levels = Levels.of(schedule, times)
            assert levels.log_snr[0] == -math.inf
            table = SOLVERS[name]().table(levels)
            for step in table.steps:
                for stage in step.stages:
                    assert all(math.isfinite(c) for c in (stage.row.a, *stage.row.c, stage.row.n))
            got = solve(three_modes(schedule), noise, times, SOLVERS[name](), rng=Rng(0))
            assert bool(torch.isfinite(got).all()) and float(got.abs().max()) < 5


def test_the_first_step_from_pure_noise_has_no_memory():
    """An output at lambda = -inf carries no slope: 2M's second step is of order 1, UniPC does not correct its first."""
    levels = Levels.of(FlowMatching(), balanced(FlowMatching(), 5))
    table = DPMSolverPP2M().table(levels)
    assert [len(step.stages[0].row.c) for step in table.steps] == [1, 1, 2, 2, 1]
    with_corrector, without = rows(UniPC(p=2), levels), rows(UniPC(p=2, corrector=False), levels)
    assert with_corrector[:2] == without[:2] and with_corrector[2] != without[2]


def test_levels_refuse_times_without_distinct_noise():
    """Two times beyond what the half log-SNR can tell apart give a clear error, not a NaN."""
    with pytest.raises(ValueError, match="no distinct noise levels"):
        Levels.of(FlowMatching(), torch.tensor([0.5, 1e-12, 0.0]))


def test_samples_on_a_log_snr_grid_are_those_of_the_exact_flow():
    """End to end on VP: 30 steps of UniPC-3 (measured 7e-4)."""
    world = three_modes()
    x = torch.linspace(-2, 2, 21, dtype=torch.float64)[:, None]
    times = log_snr(world.schedule, 30)
    got = solve(world, x, times, UniPC(p=3))
    assert float((got - world.flow(x, 1.0, 0.01)).abs().max()) < 1e-3
