"""TBCM: the times and states of the teacher's own trajectories, and what is learned there."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from fewstep.conditions import repeat
from fewstep.data import Dataset, Prior
from fewstep.denoisers import CountCalls, Denoiser, NetworkDenoiser
from fewstep.discrete_vp import DiscreteVP
from fewstep.exact import Gaussian, Mixture1D
from fewstep.flow_maps import Jump
from fewstep.guidance import Guided
from fewstep.methods.consistency import tbcm
from fewstep.methods.consistency.tbcm import TBCM, jittered_times, reference_times, walk
from fewstep.methods.method import Batch, Progress
from fewstep.methods.parts.identities import eulerian
from fewstep.methods.parts.teacher_steps import guidance_input
from fewstep.methods.start import Start
from fewstep.networks import MLP
from fewstep.predictions import TrigPrediction
from fewstep.randomness import Rng
from fewstep.runs.course import run_recipe
from fewstep.schedules import TrigFlow, align
from fewstep.training.budget import Budget
from fewstep.training.settings import Settings

SD = 0.5
SCHEDULE = TrigFlow(sigma_data=SD)
PUBLISHED: dict[str, Any] = {
    # hustvl/TBCM, train_scripts/train_tbcm.py, diffusion/utils/tbcm_utils.py and configs/600M_1024px_tbcm.yaml; how
    # many iterations a run has is not said, so that 4000 and 2000 of them are no shares
    "lr": 1e-5, "sigma_data": 0.5, "c": 0.1, "route": 16, "shift": 2.5, "guidances": (4.0, 4.5, 5.0),
    "tangent_warmup": ..., "calm_down": ..., "calm_level": 0.75, "steps": (1, 2),
    "optimizer": {
        "kind": "adam", "betas": (0.9, 0.999), "eps": 1e-30, "weight_decay": 0.0, "clip": 0.1, "warmup": ...,
        "decay": ...,
    },
}  # fmt: skip


def teacher(classes: int | None = 2, kind: torch.dtype = torch.float64) -> NetworkDenoiser:
    torch.manual_seed(0)
    net = MLP((3,), 16, 2, classes)
    for p in net.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return NetworkDenoiser(net, SCHEDULE, TrigPrediction(sigma_data=SD), (3,), classes).to(kind)


def noise(n: int, *shape: int) -> torch.Tensor:
    return torch.randn(n, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def fixed_times(steps: int, n: int) -> torch.Tensor:
    """The reference grid itself, from the largest time on, for every sample."""
    times = reference_times(steps, 2.5)
    times[0] = SCHEDULE.t_max
    return times[:, None].expand(steps, n)


def test_the_reference_grid_has_the_published_numbers() -> None:
    published = [
        1.5708, 1.5423, 1.5095, 1.4714, 1.4268, 1.3741, 1.3112, 1.2356, 1.1440, 1.0331, 0.8997, 0.7425, 0.5642, 0.3734,
        0.1832, 0.0063,
    ]  # fmt: skip
    torch.testing.assert_close(reference_times(16, 2.5), torch.tensor(published).double(), atol=5e-5, rtol=0)


def test_the_jitter_puts_one_time_into_every_gap() -> None:
    """Strictly falling from ``t_max``; in gap i uniform between reference i and i - 1, for each sample anew."""
    times = jittered_times(SCHEDULE, 16, 2.5, 4000, Rng(0))
    assert times.shape == (16, 4000)
    assert bool((times[0] == SCHEDULE.t_max).all())
    assert bool((times.diff(dim=0) < 0).all())
    edges = reference_times(16, 2.5)
    edges[0] = SCHEDULE.t_max
    for i in range(1, 16):
        share = (times[i] - edges[i]) / (edges[i - 1] - edges[i])
        assert 0 <= float(share.min()) < 0.01 and 0.99 < float(share.max()) <= 1
        assert float(share.mean()) == pytest.approx(0.5, abs=5 / math.sqrt(12 * 4000))


def test_a_teacher_that_ends_early_loses_the_first_gaps() -> None:
    """Stable Diffusion's table ends at an angle of 1.536, below the second time of the grid."""
    view = TBCM(guidances=(1.0,)).networks(Start(Gaussian(DiscreteVP.scaled_linear(), torch.zeros(3), 0.25))).teacher
    times = jittered_times(view.schedule, 16, 2.5, 10, Rng(0))
    assert times.shape == (15, 10)
    assert bool((times.diff(dim=0) < 0).all())
    assert view.schedule.t_max < 1.5423


def test_on_a_whitened_gaussian_trajectories_stand_still_and_the_optimum_is_scms() -> None:
    """The velocity is 0; a step of a finite angle shrinks the state by the cosine of the angle, the less the more
    steps.  The tangent vanishes at ``F = -tan(t / 2) x / sd`` on all states; not at another F."""
    world = Gaussian(SCHEDULE, torch.zeros(3, dtype=torch.float64), SD**2)
    for steps, shrinks in ((16, 0.11), (1024, 0.002)):
        x, t, v = walk(world, SCHEDULE.prior(noise(32, 3)), fixed_times(steps, 32))
        assert float(v.abs().max()) < 1e-12
        torch.testing.assert_close(x[-1], t[:, 0].diff().cos().prod() * x[0], atol=1e-12, rtol=0)
        assert 0 < 1 - float(t[:, 0].diff().cos().prod()) < shrinks

    class Solution(Denoiser):
        """``f(x, t) = x``, which is ``F = -tan(t / 2) x / sd``, moved by ``shift sin t x``."""

        shift = 0.0

        def forward(self, x, t, cond=None):
            return x + align(self.shift * t.sin(), x) * x

    student = Jump(Solution(SCHEDULE, (3,)))
    x, t, v = (part[1:].flatten(0, 1) for part in (x, t, v))
    zero = torch.zeros_like(t)
    f = student.mean_velocity(x, t, zero)
    torch.testing.assert_close(f, -align((t / 2).tan(), x) * x, atol=1e-12, rtol=0)
    assert float(eulerian(student, x, t, zero, v, scale=t.cos()).g.abs().max()) < 1e-12
    student.denoiser.shift = 0.02
    assert float(eulerian(student, x, t, zero, v, scale=t.cos()).g.abs().max()) > 1e-3


def test_states_follow_the_marginals_up_to_the_order_of_the_steps() -> None:
    """On N(0, c^2) a state at t has the deviation ``sqrt(V(t))``, up to an error that halves with the steps."""
    c, gaps = 0.2, []
    world = Gaussian(SCHEDULE, torch.zeros(1, dtype=torch.float64), c**2)
    start = torch.full((1, 1), (c**2 * math.cos(SCHEDULE.t_max) ** 2 + SD**2 * math.sin(SCHEDULE.t_max) ** 2) ** 0.5)
    for steps in (32, 64, 128):
        x, t, _ = walk(world, start.double(), fixed_times(steps, 1))
        gaps.append(float((x[:, 0, 0] - (c**2 * t.cos() ** 2 + SD**2 * t.sin() ** 2).sqrt()[:, 0]).abs().max()))
    assert all(1.8 < one / other < 2.3 for one, other in pairwise(gaps))
    assert gaps[-1] < 5e-3


def test_the_stored_velocity_is_the_teachers_and_costs_one_call_a_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, under the guidance drawn; states, conditions and weights stay together, state behind state."""
    method, seen = TBCM(), []
    nets = method.networks(Start(teacher()))
    nets.teacher = CountCalls(nets.teacher)
    cond = torch.tensor([0, 1, 1, 0, 1])
    real = tbcm.tangent_update
    monkeypatch.setattr(tbcm, "tangent_update", lambda *a, **k: seen.append((a, k)) or real(*a, **k))
    (update,) = method.updates(nets, Batch(noise(5, 3), cond, Rng(0)), Progress(fraction=0.7))
    assert nets.teacher.calls == 2 * 16  # guided: two a state, and none for the loss
    ((_, x, t, v, labels), more), count = seen[0], 15
    w = more["w"]
    assert x.shape == (75, 3) and torch.equal(labels, repeat(cond, count))
    assert set(w.tolist()) <= {1.0, 1.5, 2.0} and len(set(w.tolist())) > 1
    for i in range(count):
        here = slice(5 * i, 5 * i + 5)
        assert torch.equal(w[here], w[:5]) and more["r"] == 1.0
        again = Guided(nets.teacher, w[here]).velocity(x[here], t[here], labels[here])
        assert torch.equal(again, v[here])
        if i:
            before = slice(5 * i - 5, 5 * i)
            assert torch.equal(SCHEDULE.move(x[before], v[before], t[before], t[here]), x[here])
    update.loss.backward()
    assert any(float(p.grad.abs().max()) > 0 for p in nets.student.parameters() if p.grad is not None)


def test_no_data_are_needed_and_none_are_looked_at() -> None:
    """Other samples, or none, make the same weights, bit for bit; other conditions do not."""
    labels, settings = torch.arange(12) % 2, Settings(Budget(2), batch=4, precision="fp32")
    sources = [
        Dataset("ones", torch.ones(12, 3), labels), Dataset("more", torch.randn(12, 3), labels), Prior((3,), labels),
        Prior((3,), 0 * labels),
    ]  # fmt: skip
    made = [
        run_recipe(TBCM(), teacher(2, torch.float32), data, settings, show=False).model.state_dict() for data in sources
    ]
    for other in made[1:3]:
        assert all(torch.equal(other[name], value) for name, value in made[0].items())
    assert not all(torch.equal(made[3][name], value) for name, value in made[0].items())


def two_classes() -> Mixture1D:
    """Two classes on the line, which overlap: guidance makes of each what no data set is."""
    weights, means, sds = ([0.5, 0.5], [-0.4, 0.4], [0.3, 0.3])
    return Mixture1D(SCHEDULE, *(torch.tensor(v, dtype=torch.float64) for v in (weights, means, sds)), labels=[0, 1])


def test_guided_states_are_not_those_of_noised_data() -> None:
    """The gap between the space of diffusion and that of generation: at equal times, trajectories have the mean and
    the deviation of noised data at w = 1 only."""
    world, n, steps = two_classes(), 2001, 128
    z = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None]
    label = torch.ones(n, dtype=torch.long)
    times = fixed_times(steps, n)
    for w, low, high in ((1.0, 0.0, 0.01), (2.0, 0.1, 1.0), (4.0, 0.25, 2.0)):
        x, t, _ = walk(Guided(world, w), SCHEDULE.prior(z), times, label)
        for i in (80, 100, 120):
            level = t[i, 0]
            mean, sd = 0.4 * level.cos(), (0.09 * level.cos() ** 2 + SD**2 * level.sin() ** 2).sqrt()
            gap = abs(float(x[i].mean() - mean)) + abs(float(x[i].std() - sd))
            assert low <= gap < high, (w, i, gap)


def test_a_student_of_the_trajectories_is_better_where_samples_are_made() -> None:
    """Students that are affine in x at one time, fitted to the ends of the guided flow from states of either kind: on
    exact trajectories that began in other noise, the one of 16-step trajectories errs 0.018, that of noised data 0.065
    (the ends spread by 0.175)."""
    world, n, i = Guided(two_classes(), 4.0), 400, 10
    label, times = torch.ones(n, dtype=torch.long), fixed_times(16, n)
    noised = SCHEDULE.add_noise(two_classes().sample(n, Rng(0), label), noise(n, 1), times[i])

    def moved(x: torch.Tensor, t: float, s: float) -> torch.Tensor:
        fine = torch.linspace(t, s, 80, dtype=torch.float64)[:, None].expand(80, n)
        return walk(world, x, fine, label).x[-1]

    def affine(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, torch.ones_like(x)], 1)

    level, end = float(times[i, 0]), float(times[-1, 0])
    fresh = torch.randn(n, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    exact = moved(SCHEDULE.prior(fresh), SCHEDULE.t_max, level)
    target, errors = moved(exact, level, end), []
    for x in (walk(world, SCHEDULE.prior(noise(n, 1)), times, label).x[i], noised):
        student = torch.linalg.lstsq(affine(x), moved(x, level, end)).solution
        errors.append(float((affine(exact) @ student - target).square().mean().sqrt()))
    assert errors[0] < 0.025
    assert errors[1] > 0.05


def test_the_tangents_share_rises_stays_and_calms_down() -> None:
    method = TBCM(tangent_warmup=0.4, calm_down=0.2)
    at = [0.0, 0.2, 0.4, 0.8, 0.9, 1.0]
    assert [method.tangent_share(f) for f in at] == pytest.approx([0, 0.5, 1, 1, 0.875, 0.75])
    assert TBCM().tangent_share(1.0) == 1.0
    assert TBCM(tangent_warmup=0.0).tangent_share(0.0) == 1.0


def test_one_guidance_is_no_input_and_several_are() -> None:
    assert TBCM(guidances=(1.5,)).networks(Start(teacher())).student.extras == {}
    method = TBCM(guidances=(4.0, 4.5, 5.0))
    student = method.student(method.networks(Start(teacher())))
    assert student.extras["w"].at_scale(4.5) == 4.5
    assert student.extras["w"].default == guidance_input(teacher(), (5.0, 4.0, 4.5))["w"].default == 4.5
    assert student.sample(2, w=5.0).shape == (2, 3)
    assert student.plans[2].times == (SCHEDULE.t_max, 1.0)
    with pytest.raises(ValueError, match=r"w=1 must lie in \[4, 5\]"):
        student.sample(2, w=1.0)


def test_what_cannot_be_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"guidances=\(1, 1\.5, 2\): this teacher is unconditional"):
        TBCM().networks(Start(teacher(None)))
    with pytest.raises(ValueError, match=r"guidances=\(\) must name at least one"):
        TBCM(guidances=())
    with pytest.raises(ValueError, match="together more than 1"):
        TBCM(tangent_warmup=0.7, calm_down=0.4)
