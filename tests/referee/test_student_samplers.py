"""Consistency, LCM and TCD sampling: equal to diffusers' schedulers with shared noise, and the law of the data with the
exact consistency function as the network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

diffusers = pytest.importorskip("diffusers")

from fewstep.denoisers import Denoiser, NetworkDenoiser  # noqa: E402
from fewstep.discrete_vp import DiscreteVP  # noqa: E402
from fewstep.exact import ExactFlowMap, three_modes  # noqa: E402
from fewstep.flow_maps import EDMConsistency, Jump  # noqa: E402
from fewstep.networks import MLP  # noqa: E402
from fewstep.predictions import Velocity  # noqa: E402
from fewstep.randomness import Rng  # noqa: E402
from fewstep.sampling.rollout import Plan, Student, rollout  # noqa: E402
from fewstep.sampling.student_samplers import (  # noqa: E402
    STUDENT_SAMPLERS,
    ending_clean,
    sample_student,
    skipping_times,
    student_plan,
)
from fewstep.schedules import EDM, FlowMatching  # noqa: E402

N = 20_000
CRITICAL = 1.63 / N**0.5  # Kolmogorov-Smirnov, 1%: 0.0115
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CLEAN = 1e-8


class Drawn(Rng):
    """Noise as a scheduler draws it from a generator."""

    def __init__(self, seed: int) -> None:
        super().__init__(0)
        self.source = torch.Generator().manual_seed(seed)

    def normal_like(self, x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=self.source, dtype=x.dtype)


class Consistency(Denoiser):
    """The exact consistency function to clean data, in the place of a data prediction: what a perfect LCM learns."""

    def __init__(self, schedule: Any) -> None:
        self.__dict__["world"] = three_modes(schedule)
        super().__init__(schedule, (1,))

    def forward(self, x: Tensor, t: Any, cond: Any = None) -> Tensor:
        return self.world.flow(x, t, 0.0)


def test_the_times_of_four_steps_are_published() -> None:
    """LCM's own of 50 even times out of 1000, which TCD takes too, with jumps to 0.7 of them."""
    for name in ("lcm", "tcd"):
        assert STUDENT_SAMPLERS[name](table(), 4).times == (999.0, 759.0, 499.0, 259.0)
    assert STUDENT_SAMPLERS["tcd"](table(), 4).inner == (531.0, 349.0, 181.0)


def table() -> DiscreteVP:
    """The betas of Stable Diffusion as diffusers holds them, in float32."""
    return DiscreteVP(alphas_cumprod=tuple(diffusers.DDPMScheduler(**BETAS).alphas_cumprod.double().tolist()))


def noise(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ks(x: Tensor) -> float:
    """The distance from the law of the data."""
    x = x.sort(0).values
    cdf = three_modes(EDM(t_min=CLEAN)).cdf(x, CLEAN)[:, 0]
    rank = torch.arange(len(x) + 1, dtype=torch.float64) / len(x)
    return float(torch.maximum(rank[1:] - cdf, cdf - rank[:-1]).max())


def played(scheduler: Any, f: Consistency, x: Tensor, steps: int, seed: int, **step: Any) -> Tensor:
    """Drive LCMScheduler or TCDScheduler, whose network predicts the noise that goes with ``f``."""
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    for t in scheduler.timesteps:
        output = f.eps(x, float(t))
        x = scheduler.step(output, t, x, generator=generator, return_dict=False, **step)[0]
    return x


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 8])
def test_lcm_is_lcm_scheduler(steps: int) -> None:
    """Times and samples of LCMScheduler, with its generator: the student's map ends on clean data."""
    f = Consistency(ending_clean(table()))
    start = noise(64) * float(f.schedule.sigma(torch.tensor(999.0, dtype=torch.float64)))
    scheduler = diffusers.LCMScheduler(**BETAS, clip_sample=False)
    theirs = played(scheduler, f, start, steps, seed=4)
    assert skipping_times(table(), steps) == tuple(scheduler.timesteps.tolist())
    mine = sample_student(Jump(f), noise(64), "lcm", steps, rng=Drawn(4))
    # their c_out is 1 - 3.5e-6 at their last possible time, and the betas are float32
    assert float((mine - theirs).abs().max()) < 1e-5


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_tcd_is_tcd_scheduler(steps: int, eta: float) -> None:
    """Times and samples of TCDScheduler with shared noise, for every eta, right or wrong as the student may be."""
    schedule = table()
    f = Consistency(schedule)
    f.__dict__["world"] = three_modes(ending_clean(schedule))
    start = noise(64) * float(schedule.sigma(torch.tensor(999.0, dtype=torch.float64)))
    theirs = played(diffusers.TCDScheduler(**BETAS), f, start, steps, seed=4, eta=eta)
    mine = sample_student(Jump(f), noise(64), "tcd", steps, rng=Drawn(4), eta=eta)
    assert float((mine - theirs).abs().max()) < 1e-5


@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_consistency_is_cm_stochastic_iterative(steps: int) -> None:
    """Times and samples of CMStochasticIterativeScheduler (which clamps data to [-1, 1] unless told not to)."""
    schedule = EDM()
    exact = ExactFlowMap(three_modes(schedule))
    scheduler = diffusers.CMStochasticIterativeScheduler(clip_denoised=False)
    scheduler.set_timesteps(steps)
    generator, x = torch.Generator().manual_seed(4), 80 * noise(64)
    for k, t in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[k].double()
        scheduler.scale_model_input(x, t)
        skip, out = scheduler.get_scalings_for_boundary_condition(sigma)
        output = (exact.to_data(x, sigma) - skip * x) / out
        x = scheduler.step(output, t, x, generator=generator, return_dict=False)[0]
    mine = sample_student(exact, noise(64), "consistency", steps, rng=Drawn(4))
    times = student_plan(exact, "consistency", steps).times
    assert torch.allclose(torch.tensor(times), scheduler.sigmas[:-1], rtol=1e-6)
    assert float((mine - x).abs().max()) < 2e-5  # their levels are float32, the first one is 80


@pytest.mark.parametrize("steps", [1, 3])
def test_the_law_of_the_data(steps: int) -> None:
    """With the exact maps every sampler leaves the law of the data as it is: the consistency function in "lcm" and
    "consistency", the flow map in "tcd"."""
    rng, z = Rng(steps, "law"), noise(N, seed=steps)
    assert ks(sample_student(Jump(Consistency(ending_clean(table()))), z, "lcm", steps, rng=rng)) < CRITICAL
    assert ks(sample_student(ExactFlowMap(three_modes(EDM(t_min=1e-4))), z, "consistency", steps, rng=rng)) < CRITICAL
    assert ks(sample_student(ExactFlowMap(three_modes(ending_clean(table()))), z, "tcd", steps, rng=rng)) < CRITICAL


def test_a_consistency_function_is_no_trajectory() -> None:
    """What tells the families apart: the exact consistency function in TCD's deterministic sampler leaves the law of
    the data (measured: 0.10, 0.16 and 0.18 with 2, 4 and 8 steps); re-noising, eta = 1, forgives it."""
    f = Jump(Consistency(ending_clean(table())))
    for steps, distance in ((2, 0.09), (4, 0.15)):
        assert ks(sample_student(f, noise(N, seed=steps), "tcd", steps, eta=0.0)) > distance
    assert ks(sample_student(f, noise(N, seed=4), "tcd", 4, rng=Rng(4), eta=1.0)) < CRITICAL


def test_tcd_needs_jumps() -> None:
    """Refused for students that map to data only, allowed for those that were trained to jump, and at eta = 1."""
    denoiser = NetworkDenoiser(MLP((2,), width=8, blocks=1), DiscreteVP.linear(), Velocity(), (2,))
    mapping = Student(Jump(denoiser), {2: Plan((999.0, 500.0), gamma=1.0)})
    with pytest.raises(ValueError, match="sampler='tcd' jumps to times between noise and data, this student maps to"):
        student_plan(mapping, "tcd", 4)
    assert student_plan(mapping, "tcd", 4, eta=1.0) == Plan((999.0, 759.0, 499.0, 259.0), inner=(0.0,) * 3)
    assert student_plan(mapping, "lcm", 4) == Plan((999.0, 759.0, 499.0, 259.0))
    trained = Student(Jump(denoiser), {2: Plan((999.0, 500.0), gamma=0.0)})
    two_times = Student(Jump(denoiser, two_times=True), {2: Plan((999.0, 500.0), gamma=1.0)})
    expected = Plan((999.0, 759.0, 499.0, 259.0), inner=(531.0, 349.0, 181.0))
    for student in (trained, two_times, trained.flow_map):
        assert student_plan(student, "tcd", 4) == expected
    edm = EDMConsistency(NetworkDenoiser(MLP((2,), width=8, blocks=1), EDM(), Velocity(), (2,)))
    assert len(student_plan(edm, "consistency", 4).times) == 4
    edm.schedule = DiscreteVP.linear()  # there is no such student; the refusal must not wait for one
    with pytest.raises(ValueError, match="maps to data only"):
        student_plan(edm, "tcd", 4)


def test_errors_name_the_choices() -> None:
    """One line each."""
    exact, z = ExactFlowMap(three_modes(table())), noise(4)
    with pytest.raises(ValueError, match=r"sampler='ctm' is not known; choose one of consistency, lcm, tcd"):
        student_plan(exact, "ctm", 4)
    with pytest.raises(ValueError, match=r"steps=51 must lie in 1 .. 50"):
        student_plan(exact, "lcm", 51)
    with pytest.raises(ValueError, match=r"steps=2000 must lie in 1 .. 1000"):
        student_plan(exact, "lcm", 4, original_steps=2000)
    with pytest.raises(ValueError, match="are steps of a table of betas, the schedule is FlowMatching"):
        student_plan(ExactFlowMap(three_modes(FlowMatching())), "lcm", 4)
    with pytest.raises(ValueError, match=r"eta=2 must lie in \[0, 1\]"):
        student_plan(exact, "tcd", 4, eta=2)
    with pytest.raises(ValueError, match="the plan jumps to 349 and re-noises to 499: pass rng"):
        sample_student(exact, z, "tcd", 2)
    with pytest.raises(ValueError, match="must be one time per re-noising, none above"):
        Plan((9.0, 5.0), inner=(6.0,))
    # the deterministic sampler draws nothing, and is the flow itself
    out = rollout(exact, z, STUDENT_SAMPLERS["tcd-deterministic"](table(), 4))
    start = z * float(table().sigma(torch.tensor(999.0, dtype=torch.float64)))
    assert torch.allclose(out, exact.jump(start, 999.0, 0.0), atol=1e-9)
