"""Our samplers against k-diffusion's, on the same exact model and the same noise levels, in float64.

Both compute in float64, so they agree to rounding: states start at size 80, hence 1e-12 relative to that.
"""

import dataclasses
import math

import pytest
import torch
from kdiffusion import sampling

from fewstep.exact import three_modes
from fewstep.grids import karras, log_snr
from fewstep.randomness import Rng
from fewstep.sampling import (
    DDIM,
    NATIVE,
    NOISE,
    AdaptiveDPMSolver,
    Ancestral,
    Churn,
    DPMSolverPP2M,
    DPMSolverPP2MTaylor,
    DPMSolverPP3MPublished,
    DPMSolverPPSDE,
    Hooks,
    RhoAB,
    RungeKutta,
    Single,
    solve,
)
from fewstep.sampling.named import named_solver
from fewstep.sampling.solvers.runge_kutta import EULER, HEUN2, MIDPOINT
from fewstep.schedules import EDM

SCHEDULE = EDM(t_max=120.0)  # room above the first level for churn
WORLD = three_modes(SCHEDULE)
START = 80 * torch.randn(16, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TOLERANCE = 80 * 1e-12


def random_levels(steps):
    gen = torch.Generator().manual_seed(1)
    gaps = (1 + 2 * torch.rand(steps, generator=gen, dtype=torch.float64)).cumsum(0)
    return 80 * (0.002 / 80) ** torch.cat([gaps.new_zeros(1), gaps / gaps[-1]])


def below_80(grid, steps):
    return grid(EDM(), steps)


GRIDS = {
    "karras": below_80(karras, 12),
    "log-uniform": below_80(log_snr, 12),
    "random": random_levels(12),
    "karras-to-zero": torch.cat([below_80(karras, 11), torch.zeros(1, dtype=torch.float64)]),
}


class SharedNoise(Rng):
    """Hands out given noises in order."""

    def __init__(self, noises):
        super().__init__(0)
        self.noises = iter(noises)

    def normal_like(self, x):
        return next(self.noises)


@pytest.fixture(params=GRIDS)
def sigmas(request):
    return GRIDS[request.param]


def model(x, sigma):
    return WORLD(x, sigma)


@pytest.mark.parametrize(
    ("name", "solver"),
    [
        ("sample_euler", RungeKutta(EULER, NATIVE)),
        ("sample_euler", DDIM()),
        ("sample_heun", RungeKutta(HEUN2)),
        ("sample_dpmpp_2m", DPMSolverPP2M()),
        ("sample_dpm_2", Single(2, NOISE)),
    ],
)
def test_deterministic_samplers(name, solver, sigmas):
    """Euler, Heun, DPM2 and DPM-Solver++ 2M, step for step, on any grid."""
    theirs = getattr(sampling, name)(model, START, sigmas, disable=True)
    assert float((solve(WORLD, START, sigmas, solver) - theirs).abs().max()) < TOLERANCE


def test_dpm_2_is_not_the_midpoint_rule(sigmas):
    """DPM2 puts the middle at the geometric mean of the levels, the midpoint tableau at the arithmetic one.  Guards
    against comparing a sampler with itself."""
    theirs = sampling.sample_dpm_2(model, START, sigmas, disable=True)
    assert float((solve(WORLD, START, sigmas, RungeKutta(MIDPOINT)) - theirs).abs().max()) > 1e-4


def test_lms_is_adams_bashforth_in_the_noise_level():
    """Their coefficients come from a quadrature with tolerance 1e-4 each (SciPy's own error is far below).  They take
    the last step to 0 at full order, we at first."""
    for name, sigmas in GRIDS.items():
        sigmas = sigmas[:-1] if "zero" in name else sigmas
        theirs = sampling.sample_lms(model, START, sigmas, disable=True)
        assert float((solve(WORLD, START, sigmas, RhoAB(degree=3)) - theirs).abs().max()) < 80 * 1e-10


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ancestral_euler_is_ddim_with_eta(eta, sigmas):
    """``sample_euler_ancestral`` = DDIM(eta) with the same noise."""
    noises = torch.randn(12, 16, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    theirs_noise, ours_noise = iter(noises), SharedNoise(noises)
    theirs = sampling.sample_euler_ancestral(
        model, START, sigmas, disable=True, eta=eta, noise_sampler=lambda a, b: next(theirs_noise)
    )
    ours = solve(WORLD, START, sigmas, DDIM(eta=eta), rng=ours_noise)
    assert float((ours - theirs).abs().max()) < TOLERANCE


STOCHASTIC = {
    "sample_dpm_2_ancestral": (Ancestral(NOISE), {}),
    "sample_dpmpp_2s_ancestral": (Ancestral(), {}),
    "sample_dpmpp_sde": (DPMSolverPPSDE(), {}),
    "sample_dpmpp_2m_sde": (DPMSolverPP2M(eta=1.0), {}),
    "sample_dpmpp_2m_sde heun": (DPMSolverPP2MTaylor(eta=1.0), {"solver_type": "heun"}),
    "sample_dpmpp_3m_sde": (DPMSolverPP3MPublished(eta=1.0), {}),
}


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_samplers(name, eta, sigmas):
    """Ancestral and SDE samplers with the same noise, at every share of it.

    Their 3M takes its two-output step with ``psi_1``, the official code with ``psi_0 / 2``, which is what
    ``DPMSolverPP3MPublished`` follows: its second step is set right here.
    """
    solver, options = STOCHASTIC[name]
    solver = dataclasses.replace(solver, eta=eta)
    if isinstance(solver, DPMSolverPP3MPublished):
        solver = ExactWarmUp(eta=eta)
    noises = torch.randn(24, 16, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    theirs_noise = iter(noises)
    sampler = getattr(sampling, name.split()[0])
    theirs = sampler(
        model, START, sigmas, disable=True, eta=eta, noise_sampler=lambda a, b: next(theirs_noise), **options
    )
    ours = solve(WORLD, START, sigmas, solver, rng=SharedNoise(noises if eta else ()))
    assert float((ours - theirs).abs().max()) < TOLERANCE


class ExactWarmUp(DPMSolverPP3MPublished):
    """The published third-order step with an exact two-output one."""

    def slope_weight(self, w):
        return w[1]


class TheirController(AdaptiveDPMSolver):
    """k-diffusion's rule for the next step, in the place of the paper's, at its defaults."""

    def judged(self, error, h):
        factor = 1 + math.atan((error + 1e-8) ** (-1 / self.p) - 1)
        return factor >= 0.81, h * factor


@pytest.mark.parametrize(("rtol", "first"), [(0.05, 0.05), (0.05, 3.0), (0.001, 1.0)])
@pytest.mark.parametrize("p", [2, 3])
def test_adaptive_dpm_solvers(p, rtol, first):
    """DPM-Solver-12 and -23, step for step and refusal for refusal; theirs makes the refused step's first call again.

    Their tolerances are float32.
    """
    ends = torch.tensor([80.0, 0.002], dtype=torch.float64)
    rtol, atol = torch.tensor([rtol, 0.0078]).tolist()
    start, asked = -ends.log(), []
    theirs, info = sampling.DPMSolver(model).dpm_solver_adaptive(
        START[:1], start[0], start[1], order=p, rtol=rtol, atol=atol, h_init=first
    )
    hooks = Hooks(input=lambda k, x, t: asked.append(k) or (x, t))
    ours = solve(WORLD, START[:1], ends, TheirController(p, NOISE, rtol, atol, first), hooks=hooks)
    assert len(asked) == info["nfe"] - info["n_reject"]
    assert float((ours - theirs).abs().max()) < TOLERANCE
    assert first < 1 or info["n_reject"] > 0


@pytest.mark.parametrize("name", ["sample_heun", "sample_euler"])
def test_churn(name, sigmas):
    """Heun and Euler with churn, by name, with the noise that torch's global generator gives them.  (Their Euler is
    one in the schedule's own time, which on theirs is the noise level.)"""
    words = "churn=4,churn_low=0.05,churn_high=50,churn_noise=1.007"
    churn = Churn(amount=4.0, low=0.05, high=50.0, inflation=1.007)
    assert named_solver(f"heun:{words}") == RungeKutta(HEUN2, churn=churn)
    torch.manual_seed(0)
    theirs = getattr(sampling, name)(
        model, START, sigmas, disable=True, s_churn=4.0, s_tmin=0.05, s_tmax=50.0, s_noise=1.007
    )
    torch.manual_seed(0)
    noises = [torch.randn_like(START) for _ in range(12)]  # they draw at every step, we where the churn acts
    inside = [z for z, sigma in zip(noises, sigmas[:-1].tolist(), strict=True) if 0.05 <= sigma <= 50]
    solver = named_solver(f"{name.removeprefix('sample_')}:{words}")
    ours = solve(WORLD, START, sigmas, solver, rng=SharedNoise(inside))
    assert float((ours - theirs).abs().max()) < TOLERANCE
