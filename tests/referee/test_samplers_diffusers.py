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
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from fewstep.exact import three_modes
from fewstep.randomness import Rng
from fewstep.sampling import (
    DDIM,
    NATIVE,
    DDPMLarge,
    DPMSolverPP2M,
    DPMSolverPP2MTaylor,
    Hooks,
    RungeKutta,
    UniPC,
    solve,
)
from fewstep.sampling.runge_kutta import EULER, HEUN2
from fewstep.schedules import EDM, DiscreteVP, FlowMatching, TrigFlow

#: Any variance-preserving schedule that reaches sigma = 0: alpha = cos t, sigma = sin t.
CIRCLE = TrigFlow(t_max=math.pi / 2, sigma_data=1.0)
NOISE = torch.randn(32, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
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
    theirs, times = run_vp(scheduler, steps, NOISE)
    assert float(times[-1]) == 0
    assert_close(states(three_modes(CIRCLE), NOISE, times, solver), theirs, 2e-6)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc(order, variant, spacing):
    """Orders 1 to 3, both B(h), with corrector and lower orders at the end, state by state.

    With bh1 their last step to sigma = 0 is NaN (B = h = inf); ours is the exact first-order step, and is left out.
    """
    scheduler = UniPCMultistepScheduler(**BETAS, **SPACINGS[spacing], solver_order=order, solver_type=variant)
    theirs, times = run_vp(scheduler, 12, NOISE)
    ours = states(three_modes(CIRCLE), NOISE, times, UniPC(p=order, variant=variant))
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
    x = start = NOISE * float(scheduler.sigmas[0])
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
    x, seen = NOISE, []
    for timestep, z in zip(scheduler.timesteps[:-1], noises, strict=False):
        x = scheduler.step(world.eps(x, float(timestep)), timestep, x, eta=eta, variance_noise=z).prev_sample
        seen.append(x)
    ours = states(world, NOISE, scheduler.timesteps.double(), DDIM(eta=eta), SharedNoise(noises))
    assert_close(ours, seen, 6e-6)  # 1 - alphas_cumprod loses digits in float32


@pytest.mark.parametrize(("variance", "solver"), [("fixed_small", DDIM(eta=1.0)), ("fixed_large", DDPMLarge())])
def test_ddpm(variance, solver):
    """Ancestral sampling with both variances, from the same generator."""
    scheduler = DDPMScheduler(**BETAS, variance_type=variance, clip_sample=False)
    scheduler.set_timesteps(100)
    world = three_modes(DiscreteVP.linear())
    gen = torch.Generator().manual_seed(3)
    x, seen = NOISE, []
    for timestep in scheduler.timesteps[:-1]:
        x = scheduler.step(world.eps(x, float(timestep)), timestep, x, generator=gen).prev_sample
        seen.append(x)
    gen = torch.Generator().manual_seed(3)
    noises = [torch.randn(32, 1, generator=gen, dtype=torch.float64) for _ in range(99)]
    ours = states(world, NOISE, scheduler.timesteps.double(), solver, SharedNoise(noises))
    assert_close(ours, seen, 6e-5)  # beta = 1 - ratio of two float32 products near 1


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_match_euler(shift):
    """Euler on a straight flow from t = 1 to t = 0, plain and shifted grids."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(10)
    world = three_modes(FlowMatching())
    x, seen = NOISE, []
    for k, timestep in enumerate(scheduler.timesteps):
        x = scheduler.step(world.velocity(x, float(scheduler.sigmas[k])), timestep, x).prev_sample
        seen.append(x)
    ours = states(world, NOISE, scheduler.sigmas.double(), RungeKutta(EULER, NATIVE))
    assert_close(ours, seen, 5e-7)
