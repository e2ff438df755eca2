"""Grids: strictly decreasing, the right ends, the spacing that their name says."""

import math

import pytest
import torch

from fewstep.discrete_vp import DiscreteVP
from fewstep.grids import (
    GRIDS,
    check_grid,
    even,
    karras,
    log_snr,
    power,
    shifted,
    student_grid,
    to_data,
    trailing,
    uniform,
)
from fewstep.sampling import Levels
from fewstep.schedules import EDM, FlowMatching, ShiftedFlow, TrigFlow, VPLinear

CONTINUOUS = [name for name in GRIDS if name not in ("trailing", "balanced")]


@pytest.mark.parametrize("name", CONTINUOUS)
@pytest.mark.parametrize("steps", [1, 2, 7, 64])
def test_grids_fall_from_t_max_to_t_min(schedule, name, steps):
    """Every grid on every schedule: steps + 1 float64 times, both ends exact, strictly decreasing."""
    grid = GRIDS[name](schedule, steps)
    assert grid.shape == (steps + 1,) and grid.dtype == torch.float64
    assert float(grid[0]) == schedule.t_max and float(grid[-1]) == schedule.t_min
    assert bool((grid.diff() < 0).all())
    assert torch.equal(check_grid(grid, schedule), grid)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_grids_end_where_asked(name):
    """``end`` replaces t_min as the last time."""
    grid = GRIDS[name](VPLinear(), 9, end=0.05)
    assert float(grid[-1]) == 0.05 and len(grid) == 10


@pytest.mark.parametrize("end", [1e-4, -0.1, 1.0, 2.0])
def test_an_end_outside_the_range_is_refused(end):
    """Below t_min lies pure data alone; t_max would leave no step."""
    with pytest.raises(ValueError, match=r"must be 0 or a time in \[0\.001, 1\)"):
        uniform(VPLinear(), 4, end=end)
    assert [float(uniform(VPLinear(), 4, end=allowed)[-1]) for allowed in (0, 1e-3)] == [0, 1e-3]


def spacing(values):
    return (values.diff() / values.diff().mean()).sub(1).abs().max().item()


def test_spacing_is_what_the_name_says():
    """Equal steps in t, sqrt(t), log-SNR and ratio^(1/7); on EDM the Karras grid is the formula of the paper."""
    for schedule in (VPLinear(), EDM(), TrigFlow(t_min=0.01)):
        assert spacing(uniform(schedule, 12)) < 1e-10
        assert spacing(power(schedule, 12) ** 0.5) < 1e-10
        assert spacing(schedule.log_snr(log_snr(schedule, 12))) < 1e-9
        assert spacing(schedule.ratio(karras(schedule, 12)) ** (1 / 7)) < 1e-9
    i = torch.arange(18, dtype=torch.float64)
    paper = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(karras(EDM(), 17), paper, rtol=1e-12, atol=0)
    assert spacing(power(EDM(), 9, kappa=3.0) ** (1 / 3)) < 1e-10


def test_shift_moves_steps_to_high_noise():
    """t' = k t / (1 + (k - 1) t), whose log-SNR is that of t lowered by log k; k = 1 is the uniform grid."""
    schedule = FlowMatching()
    plain, moved = uniform(schedule, 10), shifted(schedule, 10, shift=3.0)
    torch.testing.assert_close(moved, 3 * plain / (1 + 2 * plain), rtol=1e-14, atol=1e-15)
    inner = slice(1, -1)
    expected = schedule.ratio(plain)[inner] * 3
    torch.testing.assert_close(schedule.ratio(moved)[inner], expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(shifted(schedule, 10, shift=1.0), plain, rtol=1e-14, atol=1e-15)


def test_trailing_integers():
    """Integer times back from the last one, as diffusers spaces them, and down to 0."""
    schedule = DiscreteVP.linear()
    assert trailing(schedule, 4).tolist() == [999, 749, 499, 249, 0]
    assert trailing(schedule, 1).tolist() == [999, 0]
    seven = trailing(schedule, 7)
    assert torch.equal(seven, seven.round()) and bool((seven.diff() < 0).all())
    with pytest.raises(ValueError, match="steps=11"):
        trailing(DiscreteVP.linear(10), 11)


def test_trailing_equals_diffusers():
    """The network times of diffusers' "trailing" spacing."""
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(timestep_spacing="trailing")
    for steps in (1, 3, 8, 50):
        theirs.set_timesteps(steps)
        assert trailing(DiscreteVP.linear(), steps)[:steps].tolist() == theirs.timesteps.tolist()


def test_a_shifted_schedule_is_the_shifted_grid():
    """Uniform in the shifted schedule's time are the levels of the shifted grid of flow matching."""
    schedule = ShiftedFlow(shift=3.0)
    levels = schedule.sigma(uniform(schedule, 10))
    torch.testing.assert_close(levels, shifted(FlowMatching(), 10, shift=3.0), rtol=1e-14, atol=0)


def test_to_data_replaces_the_last_time():
    """The last step becomes a plain denoise: time 0 where that is pure data, the mark -1 on a table of betas."""
    for schedule, end in ((EDM(), 0), (DiscreteVP.linear(), -1)):
        grid = karras(schedule, 5)
        ended = to_data(grid, schedule)
        assert torch.equal(ended[:-1], grid[:-1]) and float(ended[-1]) == end == schedule.data_time
        assert torch.equal(check_grid(ended, schedule), ended)
        assert Levels.of(schedule, ended).point(5) == (1.0, 0.0, math.inf)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([1.0], "at least two"),
        ([[1.0, 0.5]], "vector"),
        ([1.0, float("nan")], "finite"),
        ([1.0, 0.5, 0.5], "strictly decreasing"),
        ([0.5, 1.0], "strictly decreasing"),
        ([1.5, 0.5], "leave the schedule's range"),
        ([0.5, 1e-4], "leave the schedule's range"),
        ([0.5, 1e-4, 0.0], "leave the schedule's range"),
    ],
)
def test_bad_grids_are_refused(times, message):
    """A repeated level would be a silent division by zero in a multistep solver."""
    with pytest.raises(ValueError, match=message):
        check_grid(torch.tensor(times), VPLinear())


def test_no_steps_is_refused():
    """A grid needs at least one step."""
    for name in CONTINUOUS:
        with pytest.raises(ValueError, match="steps=0"):
            GRIDS[name](VPLinear(), 0)


def test_a_students_times_are_those_of_diffusers_schedulers_on_a_table() -> None:
    """Published for four calls of 1000 steps: 999, 749, 499 and 249; on other schedules equal parts."""
    table = DiscreteVP.scaled_linear()
    assert student_grid(table, 4).tolist() == [999, 749, 499, 249, 0]
    assert torch.equal(student_grid(FlowMatching(), 3), even(FlowMatching(), 3))
