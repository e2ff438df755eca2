"""Progressive Distillation: the halving algebra and whole ladders with students that can represent it exactly."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from fewstep import grids
from fewstep.denoisers import Denoiser, NetworkDenoiser
from fewstep.exact import Gaussian, three_modes
from fewstep.flow_maps import Jump, ddim_move
from fewstep.methods.flow_maps.progressive import (
    ProgressiveDistillation,
    ProgressiveLadder,
    weight,
)
from fewstep.methods.method import Batch, Networks, Progress
from fewstep.methods.parts.identities import semigroup
from fewstep.methods.parts.teacher_steps import ddim_step
from fewstep.methods.start import Start
from fewstep.networks import MLP
from fewstep.predictions import EDMPrediction, Eps, Prediction, Velocity
from fewstep.randomness import Rng
from fewstep.schedules import EDM, FlowMatching, Schedule, TrigFlow, VPCosine, align

SCHEDULES = [VPCosine(), FlowMatching(), TrigFlow(sigma_data=0.7)]


def triple(schedule, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Times ``t > mid > s`` for n samples, inside the schedule."""
    u = torch.linspace(0.3, 0.95, n, dtype=torch.float64) * schedule.t_max
    return u, u * 0.8, u * 0.6


def two_step_target(teacher: Denoiser, z_t, t, mid, s) -> torch.Tensor:
    """The target as a data prediction: what the state and the target velocity say of the data."""
    schedule = teacher.schedule
    velocity = semigroup(Jump(teacher), z_t, t, mid, s, clean=True)
    state, noise = (align(c / schedule.wronskian(t), z_t) for c in (schedule.d_sigma(t), schedule.sigma(t)))
    return state * z_t - noise * velocity


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_one_step_with_the_target_lands_where_two_teacher_steps_land(schedule) -> None:
    """DDIM with the target from z_t returns z_s to rounding, for a non-linear teacher."""
    world = three_modes(schedule)
    t, mid, s = triple(schedule, 40)
    z_t = torch.randn(40, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = two_step_target(world, z_t, t, mid, s)
    z_s = ddim_step(world, ddim_step(world, z_t, t, mid), mid, s)
    torch.testing.assert_close(ddim_move(z_t, target, t, s, schedule), z_s, atol=1e-13, rtol=1e-12)


@pytest.mark.parametrize("schedule", [FlowMatching(), VPCosine(log_snr_max=2.0), EDM(t_min=0.1)])
def test_last_interval_uses_the_second_data_prediction(schedule) -> None:
    """At s = t_min the target is the teacher's data prediction at the middle of the step, whatever noise is left there;
    one step earlier it is not."""
    world = three_modes(schedule)
    t, mid, s = (torch.full((5,), v, dtype=torch.float64) for v in (0.5, 0.25, schedule.t_min))
    z_t = torch.randn(5, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    z_mid = ddim_step(world, z_t, t, mid)
    torch.testing.assert_close(two_step_target(world, z_t, t, mid, s), world(z_mid, mid), atol=1e-14, rtol=1e-14)
    assert float((two_step_target(world, z_t, t, mid, s + 0.1) - world(z_mid, mid)).abs().max()) > 1e-3


def test_on_flow_matching_the_target_is_the_mean_of_two_velocities() -> None:
    """On straight lines with equal half steps, ``(z_t - x_target) / t = (v_1 + v_2) / 2``: the shortcut target."""
    schedule = FlowMatching()
    world = three_modes(schedule)
    t = torch.linspace(0.4, 1.0, 30, dtype=torch.float64)
    s = t - 0.3
    mid = (t + s) / 2
    z_t = torch.randn(30, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    first = world.velocity(z_t, t)
    second = world.velocity(z_t + (mid - t)[:, None] * first, mid)
    target = two_step_target(world, z_t, t, mid, s)
    torch.testing.assert_close((z_t - target) / t[:, None], (first + second) / 2, atol=1e-12, rtol=1e-12)


class Halved(Denoiser):
    """The student that fits its halving exactly: its data prediction *is* the target."""

    def __init__(self, teacher: Denoiser, steps: int) -> None:
        super().__init__(teacher.schedule, teacher.shape)
        self.teacher, self.grid = teacher, grids.uniform(teacher.schedule, 2 * steps).flip(0)

    def forward(self, x, t, cond=None):
        i = torch.searchsorted(self.grid, torch.as_tensor(t, dtype=torch.float64).expand(len(x)).contiguous() - 1e-9)
        return two_step_target(self.teacher, x, self.grid[i], self.grid[i - 1], self.grid[i - 2])


@pytest.mark.parametrize("schedule", [VPCosine(log_snr_max=8.0), TrigFlow(t_min=1e-3, sigma_data=0.5)])
def test_ladder_of_exact_students_is_the_ddim_composite(schedule) -> None:
    """16 -> 8 -> 4 -> 2 -> 1 with exact students equals 16 DDIM steps of the teacher in one call; the distance to the
    exact map is the base solver's and halves when the start is doubled."""
    # The official rule replaces the target of the last interval by the second data prediction, which drops the
    # noise still left at t_min, sigma(t_min) |eps| with |eps| = |x| / sigma <= 4 here.
    world = Gaussian(schedule, torch.zeros(1, dtype=torch.float64), 0.25)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]

    def one_step(start: int) -> torch.Tensor:
        model: Denoiser = world
        steps = start // 2
        while steps >= 1:
            model = Halved(model, steps)
            steps //= 2
        return Jump(model).to_data(x, schedule.t_max)

    def ddim(steps: int) -> torch.Tensor:
        times = grids.uniform(schedule, steps)
        z = x
        for t, s in pairwise(times[:-1]):
            z = ddim_step(world, z, t.expand(9), s.expand(9))
        return world(z, times[-2].expand(9))

    left = float(schedule.sigma(torch.tensor(schedule.t_min, dtype=torch.float64)))
    assert left < 1e-3
    torch.testing.assert_close(one_step(16), ddim(16), atol=4 * left, rtol=0)

    exact = world.flow(x, schedule.t_max, schedule.t_min)
    coarse, fine = (float((one_step(n) - exact).abs().max()) for n in (8, 16))
    assert 1.6 < coarse / fine < 2.6


def test_weights() -> None:
    """max(SNR, 1), SNR + 1 and 1 on the squared error in the data, also at the data's end, where they are infinite."""
    schedule = VPCosine()
    t = torch.tensor([0.25, 0.9], dtype=torch.float64)
    snr = (schedule.alpha(t) / schedule.sigma(t)) ** 2
    of_data = (schedule.wronskian(t) / schedule.sigma(t)) ** 2  # of an error in the velocity, which makes that one
    kinds = {"snr-trunc": torch.stack([snr[0], torch.ones_like(snr[0])]), "snr+1": snr + 1, "constant": snr**0}
    for kind, wanted in kinds.items():
        torch.testing.assert_close(weight(schedule, t, kind) * of_data, wanted)  # type: ignore[arg-type]
    clean = torch.zeros(1, dtype=torch.float64)
    assert [float(weight(FlowMatching(), clean, kind)) for kind in kinds] == [1, 1, 0]  # type: ignore[arg-type]


def test_loss_vanishes_at_the_exact_student_and_nowhere_near_it() -> None:
    """The update's loss is zero for the student that is the target; a scaled one has a loss."""
    world = three_modes(VPCosine(log_snr_max=3.0))  # which leaves noise in the last interval
    method = ProgressiveDistillation(steps=4)
    batch = Batch(world.sample(64, Rng(0)), None, Rng(1))

    class Off(Halved):
        def forward(self, x, t, cond=None):
            return 1.01 * super().forward(x, t, cond)

    for student, low, high in ((Halved(world, 4), 0.0, 1e-24), (Off(world, 4), 1e-5, 1.0)):
        nets = Networks({"student": Jump(student), "teacher": Jump(world)}, {})
        (update,) = method.updates(nets, Batch(batch.x, None, Rng(1)), Progress())
        assert low <= float(update.loss) <= high


def test_ladder_stages() -> None:
    """16 to 1 is 8, 4, 2, 1; guidance belongs to the first halving; impossible ladders are refused."""
    stages = [s.method for s in ProgressiveLadder(16, 1, guidance=3.0).stages()]
    assert [s.steps for s in stages] == [8, 4, 2, 1]
    assert [s.guidance for s in stages] == [3.0, 1.0, 1.0, 1.0]
    assert [s.method.steps for s in ProgressiveLadder(12, 3).stages()] == [6, 3]
    for start, end in ((12, 1), (4, 4), (8, 3)):
        with pytest.raises(ValueError, match="doubled"):
            ProgressiveLadder(start, end)
    with pytest.raises(ValueError, match="end=0 must be at least 1"):
        ProgressiveLadder(8, 0)


def test_on_edm_the_steps_are_equal_in_the_angle() -> None:
    """EDM's own time is the noise level: equal steps of it (80, 60, 40, 20) would leave all of the picture to the last.
    The student is called at the noise levels that it has on TrigFlow, and trained between those."""
    plans = {}
    for schedule in (EDM(), TrigFlow()):
        method = ProgressiveDistillation(steps=4)
        nets = method.networks(Start(network_on(schedule)))
        levels = schedule.ratio(torch.tensor(method.student(nets).plans[4].times, dtype=torch.float64))
        plans[schedule] = levels
        seen: list[torch.Tensor] = []
        real = nets.student.denoiser.affine
        nets.student.denoiser.affine = lambda x, t, *rest, seen=seen, real=real: seen.append(t) or real(x, t, *rest)
        (update,) = method.updates(nets, Batch(torch.zeros(64, 2), None, Rng(0)), Progress())
        trained = schedule.ratio(torch.cat(seen)).unique()
        torch.testing.assert_close(trained.flip(0), levels, rtol=1e-9, atol=0)
        assert bool(update.loss.isfinite())
    here, there = plans.values()
    torch.testing.assert_close(here, there, rtol=0.02, atol=0)
    assert here.tolist() == pytest.approx([80.0, 1.2, 0.5, 0.2], rel=0.05)


def test_a_ladder_on_edm_is_as_good_as_on_trigflow() -> None:
    """16 DDIM steps between the times of the ladder, against the exact map of a Gaussian."""
    world = Gaussian(EDM(), torch.full((1,), 0.3, dtype=torch.float64), 0.25)
    x = 80 * torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    nets = Networks({"student": Jump(world), "teacher": world}, {})
    (plan,) = ProgressiveDistillation(steps=16).student(nets).plans.values()
    z = x
    for t, s in pairwise((*plan.times, world.schedule.t_min)):
        time, target = (torch.full((9,), v, dtype=torch.float64) for v in (t, s))
        z = ddim_step(world, z, time, target)
    assert float((z - world.flow(x, 80.0, 0.002)).abs().max()) < 0.1


def network_on(schedule: Schedule) -> NetworkDenoiser:
    torch.manual_seed(0)
    return NetworkDenoiser(MLP((2,), 16, 1), schedule, EDMPrediction(), (2,))


def test_a_teacher_that_cannot_tell_the_data_is_refused() -> None:
    """A prediction of the noise on schedules that end in pure noise; one that ends at alpha = 5e-5 is taken, and so is
    one of the velocity anywhere."""

    def networks(schedule: Schedule, prediction: Prediction) -> Networks:
        teacher = NetworkDenoiser(MLP((1,), 8, 1, 3), schedule, prediction, (1,), 3)
        return ProgressiveDistillation().networks(Start(teacher))

    for schedule in (FlowMatching(), TrigFlow(t_max=math.pi / 2)):
        with pytest.raises(ValueError, match="does not tell the data at t = 1"):
            networks(schedule, Eps())
        networks(schedule, Velocity())
    networks(VPCosine(), Eps())
