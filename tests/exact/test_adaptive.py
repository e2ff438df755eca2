"""DPM-Solver-12 and -23 with adaptive steps: tolerance, calls, ends, stops, and what they refuse."""

import pytest
import torch

from fewstep.denoisers import CountCalls, Denoiser
from fewstep.discrete_vp import DiscreteVP
from fewstep.exact import three_modes
from fewstep.grids import karras
from fewstep.randomness import Rng
from fewstep.sampling import DATA, AdaptiveDPMSolver, Hooks, Levels, sample, solve
from fewstep.schedules import EDM, FlowMatching, TrigFlow, VPCosine, VPLinear

NOISE = Rng(0).normal(100, 1, dtype=torch.float64)
SCHEDULES = [EDM(), VPLinear(), VPCosine(), FlowMatching(), TrigFlow(), DiscreteVP.scaled_linear()]


def rms(x):
    return float(x.square().mean().sqrt())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
@pytest.mark.parametrize("name", ["dpm-12", "dpm-23"])
def test_the_error_is_what_is_tolerated(name, schedule):
    """No more than twice ``rtol``, from pure noise and to pure data where the schedule has them."""
    world = three_modes(schedule)
    fine = sample(world, 100, noise=NOISE, solver="dpm-23:rtol=1e-6,atol=1e-7")
    for rtol in (0.05, 0.0005):
        made = sample(world, 100, noise=NOISE, solver=f"{name}:rtol={rtol},atol={rtol / 5}")
        assert rtol / 1000 < rms(made - fine) < 2 * rtol
    assert rms(fine - world.flow(schedule.prior(NOISE), schedule.t_max, schedule.t_min)) < 3 * schedule_end(world)


def schedule_end(world):
    """How far data lie from the state at the last time of the network: its noise."""
    t = torch.tensor(max(world.schedule.t_min, 0.002), dtype=torch.float64)
    return float(world.schedule.sigma(t)) + 1e-4


@pytest.mark.parametrize("p", [2, 3])
def test_calls(p):
    """A tried step makes p calls, one less after a refusal, whose first call is kept; the leap to data makes one."""
    tried, refused = 0, 0

    class Watched(AdaptiveDPMSolver):
        def judged(self, error, h):
            nonlocal tried, refused
            accepted, after = super().judged(error, h)
            tried, refused = tried + 1, refused + (not accepted)
            return accepted, after

    counted, steps = CountCalls(three_modes()), []
    sample(counted, 20, solver=Watched(p, first=2.0), progress=lambda done, total: steps.append((done, total)))
    assert refused > 0 and counted.calls == p * tried - refused + 1
    assert len(steps) == tried - refused + 1 and steps[-1] == (100, 100)


def test_the_worst_sample_decides():
    """The steps of a batch are those of the sample that needs the shortest."""
    world = three_modes()
    lengths = []

    class Listening(AdaptiveDPMSolver):
        def judged(self, error, h):
            lengths.append((error, h))
            return super().judged(error, h)

    errors = []
    for part in (NOISE[:1], NOISE[1:2], NOISE[:2]):
        lengths.clear()
        sample(world, len(part), noise=part, solver=Listening())
        errors.append(lengths[0][0])
    assert errors[2] == pytest.approx(max(errors[:2]), rel=1e-12)


def test_times_of_a_grid_are_stops():
    """Every time of it is passed, in steps as long as the error allows in between."""
    world, solver, times = three_modes(EDM()), AdaptiveDPMSolver(), karras(EDM(), 3)
    passed = []
    end = solve(
        world, 80 * NOISE, times, solver, hooks=Hooks(input=lambda k, x, t: passed.append(float(t[0])) or (x, t))
    )
    assert set(times[:-1].tolist()) <= set(passed)
    assert rms(end - world.flow(80 * NOISE, 80.0, 0.002)) < 2 * solver.rtol


def test_hooks_and_data_predictions():
    """An output hook is a clipped denoiser, also where noise predictions are kept; every step ends with its hook."""
    world = three_modes(VPLinear())

    class Clamped(Denoiser):
        def forward(self, x, t, cond=None):
            return world(x, t, cond).clamp(-0.5, 0.5)

    clamp = Hooks(output=lambda k, x0, x, t: x0.clamp(-0.5, 0.5))
    times = AdaptiveDPMSolver().grid(world.schedule, 1)
    for solver in (AdaptiveDPMSolver(), AdaptiveDPMSolver(form=DATA)):
        hooked = solve(world, NOISE, times, solver, hooks=clamp)
        assert torch.equal(hooked, solve(Clamped(world.schedule, (1,)), NOISE, times, solver))
    seen = []
    pinned = solve(world, NOISE, times, solver, hooks=Hooks(after=lambda i, x: seen.append(i) or torch.zeros_like(x)))
    assert seen == list(range(len(seen))) and not bool(pinned.any())


def test_half_precision():
    """The state is kept in float32, the network is called in half."""
    seen = set()

    class Listening(Denoiser):
        def forward(self, x, t, cond=None):
            seen.add(x.dtype)
            return three_modes(EDM())(x.double(), t).to(x.dtype)

    times, solver = AdaptiveDPMSolver().grid(EDM(), 1), AdaptiveDPMSolver(rtol=0.01, atol=0.002)
    half = solve(Listening(EDM(), (1,)), 80 * NOISE.half(), times, solver)
    assert half.dtype == torch.float16 and seen == {torch.float16}
    assert rms(half.double() - three_modes(EDM()).flow(80 * NOISE, 80.0, 0.002)) < 2 * solver.rtol


def test_refusals():
    """No number of steps, no table, no impossible tolerance; predictions that are not finite are named."""
    world = three_modes()
    with pytest.raises(ValueError, match="steps=8: DPM-Solver-23 finds its own"):
        sample(world, 2, solver="dpm-23", steps=8)
    with pytest.raises(ValueError, match="DPM-Solver-12 finds its steps as it goes and has no table"):
        AdaptiveDPMSolver(2).table(Levels.of(world.schedule, karras(world.schedule, 4)))
    for text in ("dpm-12:rtol=0", "dpm-12:atol=-1", "dpm-23:p=4", "dpm-23:safety=2", "dpm-23:first=nan"):
        with pytest.raises(ValueError, match=r"AdaptiveDPMSolver|not a finite number"):
            sample(world, 2, solver=text)

    class Broken(Denoiser):
        def forward(self, x, t, cond=None):
            return x / 0

    with pytest.raises(ValueError, match="is not finite: the denoiser's predictions are not"):
        sample(Broken(EDM(), (1,)), 2, solver="dpm-23")
