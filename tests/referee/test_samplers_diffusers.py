"""Our samplers against diffusers' schedulers, on the same exact model and the same noise levels.

diffusers keeps its levels in float32 and so its coefficients: agreement is to about 1e-6 (measured: 3e-7 to 1e-6 for
2M, UniPC and Euler; more where a scheduler subtracts float32 products near 1).  The model is evaluated at the
scheduler's own sigmas, not at its rounded timesteps, which alone would leave errors near 1e-3.
"""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
    UniPCMultistepScheduler,
)

from fewstep.discrete_vp import DiscreteVP
from fewstep.exact import three_modes
from fewstep.randomness import Rng
from fewstep.sampling import (
    DDIM,
    NATIVE,
    NOISE,
    Ancestral,
    DDPMLarge,
    DPMSolver1,
    DPMSolverPP2M,
    DPMSolverPP2MTaylor,
    DPMSolverPP3M,
    DPMSolverPP3MPublished,
    Fast,
    Hooks,
    Levels,
    RhoAB,
    RungeKutta,
    Single,
    UniPC,
    solve,
)
from fewstep.sampling.solvers.runge_kutta import EULER, HEUN2
from fewstep.schedules import EDM, FlowMatching, TrigFlow

#: Any variance-preserving schedule that reaches sigma = 0: alpha = cos t, sigma = sin t.
CIRCLE = TrigFlow(t_max=math.pi / 2, sigma_data=1.0)
START = torch.randn(32, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
BETAS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
SPACINGS = {"trailing": {"timestep_spacing": "trailing"}, "karras": {"use_karras_sigmas": True}}


def states(denoiser, x, times, solver, rng=None):
    """The state after every step: what each later call of a one-call solver is given, and the result."""
    seen = []
    end = solve(denoiser, x, times, solver, rng=rng, hooks=Hooks(input=lambda k, x, t: seen.append(x) or (x, t)))
    return [*seen[1:], end]


def assert_close(ours, theirs, tolerance):
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert float((mine - other).abs().max()) < tolerance


def run_vp(scheduler, steps, x):
    """Drive a scheduler that works in x = alpha x_0 + sigma eps; returns its states and our times."""
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    times = torch.atan(scheduler.sigmas.double())
    world, seen = three_modes(CIRCLE), []
    for k, timestep in enumerate(scheduler.timesteps):
        x = scheduler.step(world.eps(x, float(times[k])), timestep, x).prev_sample
        seen.append(x)
    return seen, times


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [8, 20])
@pytest.mark.parametrize(("kind", "solver"), [("midpoint", DPMSolverPP2M()), ("heun", DPMSolverPP2MTaylor())])
def test_dpm_solver_pp_2m(kind, solver, steps, spacing):
    """Order 2, both kinds, to the clean end, state by state."""
    scheduler = DPMSolverMultistepScheduler(**BETAS, **SPACINGS[spacing], solver_order=2, solver_type=kind)
    theirs, times = run_vp(scheduler, steps, START)
    assert float(times[-1]) == 0
    assert_close(states(three_modes(CIRCLE), START, times, solver), theirs, 2e-6)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_dpm_solver_pp_3m(spacing):
    """Order 3: diffusers computes the published coefficients, not those of the Taylor expansion."""
    scheduler = DPMSolverMultistepScheduler(**BETAS, **SPACINGS[spacing], solver_order=3, lower_order_final=False)
    theirs, times = run_vp(scheduler, 12, START)
    assert_close(states(three_modes(CIRCLE), START, times, DPMSolverPP3MPublished()), theirs, 2e-6)
    assert float((solve(three_modes(CIRCLE), START, times, DPMSolverPP3M()) - theirs[-1]).abs().max()) > 1e-4


@pytest.mark.parametrize(
    ("order", "kind", "solver"),
    [(1, "midpoint", DDIM()), (2, "midpoint", DPMSolverPP2M(form=NOISE)), (2, "heun", DPMSolverPP2MTaylor(form=NOISE)),
     (3, "midpoint", DPMSolverPP3MPublished(form=NOISE))],
)  # fmt: skip
def test_dpm_solver_in_noise_prediction(order, kind, solver):
    """algorithm_type "dpmsolver", multistep.  It cannot end at sigma = 0 (their code refuses it too)."""
    scheduler = DPMSolverMultistepScheduler(
        **BETAS, algorithm_type="dpmsolver", solver_order=order, solver_type=kind, final_sigmas_type="sigma_min",
        use_karras_sigmas=True, lower_order_final=False,
    )  # fmt: skip
    theirs, times = run_vp(scheduler, 12, START)
    last = len(times) - 2 if float(times[-1]) == float(times[-2]) else len(times) - 1  # they repeat the last level
    ours = states(three_modes(CIRCLE), START, times[: last + 1], solver)
    assert_close(ours, theirs[:last], 4e-6)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis(order):
    """diffusers' DEIS puts its polynomial in log rho = -lambda: the exact integrals of DPM-Solver in noise
    prediction.
    """
    scheduler = DEISMultistepScheduler(**BETAS, solver_order=order, use_karras_sigmas=True, lower_order_final=False)
    theirs, times = run_vp(scheduler, 12, START)
    solver = {1: DDIM(), 2: DPMSolverPP2MTaylor(form=NOISE), 3: DPMSolverPP3M(form=NOISE)}[order]
    last = len(times) - 2 if float(times[-1]) == float(times[-2]) else len(times) - 1
    if float(times[-1]) == 0:
        last -= 1  # their step to sigma = 0 is not finite or not of this form
    ours = states(three_modes(CIRCLE), START, times[: last + 1], solver)
    assert_close(ours, theirs[:last], {1: 2e-6, 2: 1e-5, 3: 1e-5}[order])


@pytest.mark.parametrize(
    ("order", "algorithm", "solver"),
    [(2, "dpmsolver++", Fast(2, kind="taylor")), (3, "dpmsolver++", Fast(3, kind="taylor")),
     (2, "dpmsolver", Fast(2, NOISE, "taylor")), (3, "dpmsolver", Fast(3, NOISE, "taylor"))],
)  # fmt: skip
@pytest.mark.parametrize("steps", [10, 11, 12, 13])
def test_dpm_solver_single_step(order, algorithm, solver, steps):
    """The points of the grid taken two or three at a time: the states after whole groups.

    Of the "taylor" kind ("heun"): in the other one diffusers makes the second inner state of order 3 by another rule
    than the official code.
    """
    scheduler = DPMSolverSinglestepScheduler(
        **BETAS, solver_order=order, algorithm_type=algorithm, use_karras_sigmas=True, final_sigmas_type="sigma_min",
        solver_type="heun",
    )  # fmt: skip
    theirs, times = run_vp(scheduler, steps, START)
    if float(times[-1]) == float(times[-2]):
        times, theirs = times[:-1], theirs[:-1]
    ours, world = [], three_modes(CIRCLE)
    solve(world, START, times, solver, hooks=Hooks(after=lambda i, x: ours.append(x) or x))
    ends = torch.tensor(solver.groups(Levels.of(CIRCLE, times))).cumsum(0).tolist()
    whole = [end for end, size in zip(ends, solver.groups(Levels.of(CIRCLE, times)), strict=True) if size == order]
    assert len(whole) >= 2
    for end in whole:
        assert float((ours[ends.index(end)] - theirs[end - 1]).abs().max()) < 1e-5 * float(START.abs().max())


@pytest.mark.parametrize(
    ("order", "kind", "solver"),
    [(1, "midpoint", DPMSolver1(eta=1.0)), (2, "midpoint", DPMSolverPP2M(eta=1.0)),
     (2, "heun", DPMSolverPP2MTaylor(eta=1.0))],
)  # fmt: skip
def test_sde_dpm_solver_pp(order, kind, solver):
    """algorithm_type "sde-dpmsolver++" with shared noise, to the clean end.

    Orders 1 and 2: at order 3 diffusers (0.42) weighs the second derivative with psi_2 - 1, which does not vanish with
    the step; k-diffusion's has the right sign and is compared in test_samplers_kdiffusion.py.
    """
    scheduler = DPMSolverMultistepScheduler(
        **BETAS, algorithm_type="sde-dpmsolver++", solver_order=order, solver_type=kind, use_karras_sigmas=True,
        lower_order_final=False,
    )  # fmt: skip
    scheduler.set_timesteps(12)
    scheduler.set_begin_index(0)
    times = torch.atan(scheduler.sigmas.double())
    noises = torch.randn(12, 32, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    world, x, seen = three_modes(CIRCLE), START, []
    for k, timestep in enumerate(scheduler.timesteps):
        eps = world.eps(x, float(times[k]))
        x = scheduler.step(eps, timestep, x, variance_noise=noises[k]).prev_sample
        seen.append(x)
    assert_close(states(world, START, times, solver, SharedNoise(noises)), seen, 3e-6)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc(order, variant, spacing):
    """Orders 1 to 3, both B(h), with corrector and lower orders at the end, state by state.

    With bh1 their last step to sigma = 0 is NaN (B = h = inf); ours is the exact first-order step, and is left out.
    """
    scheduler = UniPCMultistepScheduler(**BETAS, **SPACINGS[spacing], solver_order=order, solver_type=variant)
    theirs, times = run_vp(scheduler, 12, START)
    ours = states(three_modes(CIRCLE), START, times, UniPC(p=order, variant=variant))
    assert bool(torch.isfinite(ours[-1]).all())
    if variant == "bh1":
        assert not bool(torch.isfinite(theirs[-1]).any())
        ours, theirs = ours[:-1], theirs[:-1]
    assert_close(ours, theirs, 2e-6)


@pytest.mark.parametrize("scheduler_type", [EulerDiscreteScheduler, HeunDiscreteScheduler])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_euler_and_heun(scheduler_type, spacing):
    """In the variance-exploding variables, to sigma = 0."""
    scheduler = scheduler_type(**BETAS, **SPACINGS[spacing])
    scheduler.set_timesteps(12)
    scheduler.set_begin_index(0)
    schedule = EDM(t_max=200.0)
    world = three_modes(schedule)
    x = start = START * float(scheduler.sigmas[0])
    for k, timestep in enumerate(scheduler.timesteps):
        scheduler.scale_model_input(x, timestep)  # they ask for the call; the exact model takes x as it is
        x = scheduler.step(world.eps(x, float(scheduler.sigmas[k])), timestep, x).prev_sample
    levels = scheduler.sigmas.double()
    # Heun's list holds every inner level twice
    times = torch.unique_consecutive(levels)
    tableau = {EulerDiscreteScheduler: EULER, HeunDiscreteScheduler: HEUN2}[scheduler_type]
    frame = {EulerDiscreteScheduler: NATIVE}.get(scheduler_type)
    solver = RungeKutta(tableau, frame) if frame else RungeKutta(tableau)
    assert float((solve(world, start, times, solver) - x).abs().max()) < 1e-6  # of states that start at 150


@pytest.mark.parametrize("spacing", SPACINGS)
def test_lms(spacing):
    """Adams-Bashforth in sigma, coefficients from SciPy's quadrature; the last step, to 0, is of first order with
    us.
    """
    scheduler = LMSDiscreteScheduler(**BETAS, **SPACINGS[spacing])
    scheduler.set_timesteps(12)
    schedule = EDM(t_max=200.0)
    world, x, seen = three_modes(schedule), START * float(scheduler.sigmas[0]), []
    for k, timestep in enumerate(scheduler.timesteps):
        scheduler.scale_model_input(x, timestep)
        x = scheduler.step(world.eps(x, float(scheduler.sigmas[k])), timestep, x).prev_sample
        seen.append(x)
    ours = states(world, START * float(scheduler.sigmas[0]), scheduler.sigmas.double(), RhoAB(degree=3))
    assert_close(ours[:-1], seen[:-1], 1e-5)  # of states of size 150


@pytest.mark.parametrize(
    ("scheduler_type", "solver"),
    [(KDPM2DiscreteScheduler, Single(2, NOISE)), (KDPM2AncestralDiscreteScheduler, Ancestral(NOISE))],
)
def test_dpm2(scheduler_type, solver):
    """DPM2 and DPM2 ancestral, which call the model between the levels too: on Karras' grid, where diffusers' inner
    levels are the geometric means."""
    scheduler = scheduler_type(**BETAS, use_karras_sigmas=True)
    scheduler.set_timesteps(12)
    scheduler.set_begin_index(0)
    world, x = three_modes(EDM(t_max=200.0)), START * float(scheduler.sigmas[0])
    ancestral = scheduler_type is KDPM2AncestralDiscreteScheduler
    gen = torch.Generator().manual_seed(2)
    for timestep in scheduler.timesteps:
        scheduler.scale_model_input(x, timestep)
        inner = scheduler.sigmas_interpol[scheduler.step_index - ancestral]
        level = scheduler.sigmas[scheduler.step_index] if scheduler.state_in_first_order else inner
        eps = world.eps(x, float(level))
        x = scheduler.step(eps, timestep, x, **({"generator": gen} if ancestral else {})).prev_sample
    gen = torch.Generator().manual_seed(2)
    drawn = [torch.randn(32, 1, generator=gen, dtype=torch.float64) for _ in range(12)]
    levels = torch.unique_consecutive(scheduler.sigmas.double())
    ours = solve(world, START * float(levels[0]), levels, solver, rng=SharedNoise(drawn))
    assert float((ours - x).abs().max()) < 1e-6


class SharedNoise(Rng):
    """Hands out given noises in order."""

    def __init__(self, noises):
        super().__init__(0)
        self.noises = iter(noises)

    def normal_like(self, x):
        return next(self.noises)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim(eta):
    """At integer times of the DDPM table, eta 0, 0.5 and 1 with shared noise, state by state."""
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, timestep_spacing="leading")
    scheduler.set_timesteps(20)
    world = three_modes(DiscreteVP.linear())
    noises = torch.randn(20, 32, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x, seen = START, []
    for timestep, z in zip(scheduler.timesteps[:-1], noises, strict=False):
        x = scheduler.step(world.eps(x, float(timestep)), timestep, x, eta=eta, variance_noise=z).prev_sample
        seen.append(x)
    ours = states(world, START, scheduler.timesteps.double(), DDIM(eta=eta), SharedNoise(noises))
    assert_close(ours, seen, 6e-6)  # 1 - alphas_cumprod loses digits in float32


@pytest.mark.parametrize(("variance", "solver"), [("fixed_small", DDIM(eta=1.0)), ("fixed_large", DDPMLarge())])
def test_ddpm(variance, solver):
    """Ancestral sampling with both variances, from the same generator."""
    scheduler = DDPMScheduler(**BETAS, variance_type=variance, clip_sample=False)
    scheduler.set_timesteps(100)
    world = three_modes(DiscreteVP.linear())
    gen = torch.Generator().manual_seed(3)
    x, seen = START, []
    for timestep in scheduler.timesteps[:-1]:
        x = scheduler.step(world.eps(x, float(timestep)), timestep, x, generator=gen).prev_sample
        seen.append(x)
    gen = torch.Generator().manual_seed(3)
    noises = [torch.randn(32, 1, generator=gen, dtype=torch.float64) for _ in range(99)]
    ours = states(world, START, scheduler.timesteps.double(), solver, SharedNoise(noises))
    assert_close(ours, seen, 6e-5)  # beta = 1 - ratio of two float32 products near 1


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_match_euler(shift):
    """Euler on a straight flow from t = 1 to t = 0, plain and shifted grids."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(10)
    world = three_modes(FlowMatching())
    x, seen = START, []
    for k, timestep in enumerate(scheduler.timesteps):
        x = scheduler.step(world.velocity(x, float(scheduler.sigmas[k])), timestep, x).prev_sample
        seen.append(x)
    ours = states(world, START, scheduler.sigmas.double(), RungeKutta(EULER, NATIVE))
    assert_close(ours, seen, 5e-7)
