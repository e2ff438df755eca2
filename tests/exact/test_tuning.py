"""Choosing a solver: the search finds what is best, and the stored evidence is about settings that exist."""

import pytest
import torch

import fewstep as fs
from fewstep.denoisers import Denoiser
from fewstep.exact import three_modes
from fewstep.sampling import Levels
from fewstep.sampling.named import named_solver, named_times
from fewstep.sampling.search import (
    Setting,
    candidates,
    noise_for,
    reference,
    setting_of,
    shortlist,
    solver_for,
    tried,
    tune,
)
from fewstep.schedules import EDM, FlowMatching, VPLinear

WORLD = three_modes()


def test_the_reference_is_the_exact_flow():
    """200 calls of UniPC-3 end where the exact flow does: at the last time that the model knows, and then its
    prediction."""
    noise, schedule = noise_for(WORLD, 50, 0), WORLD.schedule
    exact = WORLD(WORLD.flow(schedule.prior(noise), schedule.t_max, schedule.t_min), schedule.t_min)
    assert float((reference(WORLD, noise).ends - exact).abs().max()) < 1e-5


def test_tuning_orders_settings_by_their_error():
    """The best comes first; on the exact mixture a second-order solver beats DDIM, and the error is the one
    measured.
    """
    target = reference(WORLD, noise_for(WORLD, 50, 0))
    seen = []
    settings = candidates(8, WORLD.schedule, solvers=("ddim", "unipc"), grids=("karras", "balanced:centre=1"))
    trials = tune(WORLD, settings, target, lambda done, total: seen.append((done, total)))
    assert [t.error for t in trials] == sorted(t.error for t in trials) and seen[-1] == (4, 4)
    assert trials[0].setting.solver == "unipc" and trials[-1].setting.solver == "ddim"
    got = fs.sample(WORLD, 50, noise=target.noise, **trials[0].setting.options())
    gap = (got - target.ends).square().mean(1).sqrt()
    assert trials[0].error == pytest.approx(float(gap.mean()))


def test_the_shortlist_is_made_on_a_quarter_of_the_points():
    """The first quarter, but 8 at least, and no more than there are; the best ``keep`` settings, best first."""
    rows = []

    class Counting(Denoiser):
        def forward(self, x, t, cond=None):
            rows.append(len(x))
            return WORLD(x, t)

    counting = Counting(WORLD.schedule, WORLD.shape)
    settings = [setting_of(solver, "karras", 4, WORLD.schedule) for solver in ("ddim", "unipc", "euler")]
    noise = noise_for(WORLD, 60, 0)
    target = reference(WORLD, noise)
    for n, used in ((4, 4), (20, 8), (36, 9), (60, 15)):
        rows.clear()
        found = shortlist(counting, settings, target.part(0, n), keep=2)
        assert set(rows) == {used}
        assert found == [trial.setting for trial in tune(WORLD, settings, target.part(0, used))][:2]


def test_a_result_that_is_not_finite_comes_last():
    """A setting whose samples overflow has an infinite error."""

    class Bad(type(WORLD)):
        def forward(self, x, t, cond=None):
            return super().forward(x, t, cond) * float("nan")

    bad = three_modes()
    bad.__class__ = Bad
    setting = Setting("ddim", "karras", 3, 3)
    assert tried(bad, setting, reference(WORLD, noise_for(WORLD, 4, 0))).error == float("inf")
    with pytest.raises(ValueError, match="no setting fits"):
        tune(WORLD, [], reference(WORLD, noise_for(WORLD, 4, 0)))


def test_settings_stay_within_their_budget():
    """As many steps as the calls allow, whatever a step costs; None where not even one fits."""
    for schedule in (VPLinear(), EDM(), FlowMatching()):
        for setting in candidates(9, schedule):
            times = named_times(schedule, named_solver(setting.solver), setting.steps, setting.grid)
            table = named_solver(setting.solver).table(Levels.of(schedule, times))
            assert table.calls == setting.calls <= 9
    assert setting_of("heun", "balanced", 9, VPLinear()) == Setting("heun", "balanced", 5, 9)
    assert setting_of("unipc-3", "balanced", 2, VPLinear()) is None
    assert setting_of("rk4", "karras", 3, VPLinear()) is None


@pytest.mark.parametrize("guided", [False, 3.0, True])
def test_solver_for_any_number_of_calls(guided):
    """Its settings exist, cost what was asked for, and sample."""
    for steps in (1, 2, 3, 4, 5, 7, 11, 33, 80):
        setting = solver_for(steps, guided)
        times = named_times(VPLinear(), named_solver(setting.solver), setting.steps, setting.grid)
        assert named_solver(setting.solver).table(Levels.of(VPLinear(), times)).calls == setting.calls == steps
        assert bool(torch.isfinite(fs.sample(WORLD, 3, **setting.options())).all())
    with pytest.raises(ValueError, match="steps=0"):
        solver_for(0)


def test_solver_for_is_better_than_ddim_by_far():
    """On a mixture that no choice has seen, centred on it, at 6 to 20 calls: at most a quarter of DDIM's error
    (measured: a fifth, a tenth, an eighteenth, an eight-hundredth)."""
    target = reference(WORLD, noise_for(WORLD, 200, 1))
    for steps in (6, 8, 10, 20):
        ours = tried(WORLD, solver_for(steps, model=WORLD), target).error
        assert ours < tried(WORLD, Setting("ddim", "balanced", steps, steps), target).error / 4
