"""BOOT: its signal ODE on a Gaussian, what the boundary pins, and what a schedule that does not end in noise does."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.conditions import Cond
from fewstep.data import Prior
from fewstep.denoisers import Denoiser, NetworkDenoiser, OnSchedule
from fewstep.exact import Gaussian, GuidedGaussian, three_modes
from fewstep.methods.flow_maps.boot import BOOT, share_of_way, signal_step
from fewstep.methods.method import Batch, Networks, Progress, alone
from fewstep.methods.parts.from_noise import ends_in_noise, seen_from_noise
from fewstep.methods.start import Start
from fewstep.networks import MLP
from fewstep.predictions import EDMPrediction, Prediction, TrigPrediction, Velocity
from fewstep.randomness import Rng
from fewstep.schedules import EDM, FlowMatching, Schedule, ShiftedFlow, TrigFlow, VPCosine, VPLinear
from fewstep.training.budget import Budget
from fewstep.training.profiles import Power
from fewstep.training.settings import Settings
from fewstep.training.trainer import train

F64 = torch.float64
M, C = 0.7, 0.5
#: Schedules that end in pure noise; the cosine one in 5e-5 of signal.
TO_NOISE = (FlowMatching(), ShiftedFlow(shift=3.0), TrigFlow(t_max=torch.pi / 2, sigma_data=1.0), VPCosine())
EPS = torch.tensor([[-1.5], [-0.3], [0.4], [1.1]], dtype=F64)


def named(schedule: Schedule) -> str:
    return type(schedule).__name__


def world(schedule: Schedule) -> Gaussian:
    return Gaussian(schedule, torch.full((1,), M, dtype=F64), C**2)


def signal(schedule: Schedule, eps: Tensor, t: Tensor) -> Tensor:
    """The exact ``y(eps, t)`` of the Gaussian, ``m + (S - sigma) / alpha eps``."""
    a, s = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    return M + (torch.sqrt(a**2 * C**2 + s**2) - s) / a * eps


def at(schedule: Schedule, share: float) -> Tensor:
    """One time for all of EPS, at a share of the range."""
    return torch.full((len(EPS),), schedule.t_min + share * (schedule.t_max - schedule.t_min), dtype=F64)


def bootstrapped(teacher: Denoiser, steps: int, heun: bool = False) -> Tensor:
    """Where ``steps`` steps of the signal ODE take the boundary."""
    schedule = teacher.schedule
    y = teacher(schedule.prior(EPS), schedule.t_max)
    for k in range(steps):
        y = signal_step(teacher, EPS, y, at(schedule, 1 - k / steps), at(schedule, 1 - (k + 1) / steps), heun=heun).y
    return y


@pytest.mark.parametrize("schedule", TO_NOISE, ids=named)
def test_the_signal_of_a_gaussian(schedule: Schedule) -> None:
    """It begins at the prediction of pure noise, its jump to t is the exact map, and one step errs by a quarter when it
    is half as long."""
    teacher = world(schedule)
    first = teacher(EPS, schedule.t_max)
    assert (
        float((first - M).abs().max()) < 1e-4
        and float((signal(schedule, EPS, at(schedule, 0)) - M - C * EPS).abs().max()) < 1e-4
    )
    t = at(schedule, 0.6)
    moved = schedule.add_noise(signal(schedule, EPS, t), EPS, t)
    torch.testing.assert_close(moved, teacher.flow(EPS, schedule.t_max, t), rtol=0, atol=1e-4)

    def error(delta: float, heun: bool) -> float:
        s = at(schedule, 0.6 - delta)
        found = signal_step(teacher, EPS, signal(schedule, EPS, t), t, s, heun=heun).y
        return float((found - signal(schedule, EPS, s)).abs().max())

    assert 3.7 < error(0.02, False) / error(0.01, False) < 4.3
    assert 7.0 < error(0.02, True) / error(0.01, True) < 9.0


@pytest.mark.parametrize("schedule", TO_NOISE, ids=named)
def test_all_steps_lead_to_the_sample(schedule: Schedule) -> None:
    """From the boundary to ``m + c eps``: first order with Euler's steps, second (up to a logarithm) with Heun's, at
    both ends finite."""
    for heun, low, high in ((False, 1.8, 2.2), (True, 2.8, 4.2)):
        coarse, fine = (float((bootstrapped(world(schedule), n, heun) - M - C * EPS).abs().max()) for n in (96, 192))
        assert low < coarse / fine < high, (heun, coarse, fine)


def test_a_step_from_pure_noise_goes_all_the_way() -> None:
    """The state at t_max tells nothing of the signal, so the step is the prediction, whatever stood there; elsewhere
    the share is ``1 - e^(lambda_t - lambda_s)``."""
    schedule = FlowMatching()
    one = at(schedule, 1.0)
    for s in (one, one - 0.1, 0 * one):
        found = signal_step(world(schedule), EPS, 100 + EPS, one, s)
        assert torch.equal(found.share, torch.ones_like(one))
        torch.testing.assert_close(found.y, torch.full_like(EPS, M), rtol=0, atol=1e-12)
    t, s = one - 0.3, one - 0.4
    expected = 1 - torch.exp(schedule.log_snr(t) - schedule.log_snr(s))
    torch.testing.assert_close(share_of_way(schedule, t, s), expected, rtol=1e-12, atol=0)


def test_without_the_boundary_every_family_of_trajectories_is_a_solution() -> None:
    """Trajectories that start in ``g(eps) = 0.2 - 0.4 eps`` instead of ``eps`` are consistent with themselves: what is
    left of the bootstrapping is of second order in the step.  Only the boundary sees them."""
    schedule = FlowMatching()
    teacher = world(schedule)

    def wrong(t: Tensor) -> Tensor:
        x = teacher.flow(0.2 - 0.4 * EPS, 1.0, t)
        return (x - t[:, None] * EPS) / (1 - t)[:, None]

    t = at(schedule, 0.6)

    def left(delta: float) -> float:
        step = signal_step(teacher, EPS, wrong(t), t, t - delta)
        return float(((step.y - wrong(t - delta)) / step.share[:, None]).abs().max())

    assert left(0.01) < 0.02 and 1.8 < left(0.02) / left(0.01) < 2.2
    assert float((wrong(at(schedule, 0.95)) - M).abs().max()) > 10


class Affine(nn.Module):
    """``y(eps, s) = a(s) + b(s) eps``, polynomials in the time, as a student."""

    def __init__(self, schedule: Schedule, degree: int = 6) -> None:
        super().__init__()
        self.schedule = schedule
        self.a = nn.Parameter(torch.zeros(degree + 1, dtype=F64))
        self.b = nn.Parameter(torch.zeros(degree + 1, dtype=F64))

    def predict(self, x: Tensor, t: Tensor, s: Tensor, cond: object = None, **extras: Tensor) -> Tensor:
        powers = torch.cos(torch.arange(len(self.a), dtype=F64) * torch.acos((2 * s - 1).clamp(-1, 1))[:, None])
        return (powers @ self.a)[:, None] + (powers @ self.b)[:, None] * x / self.schedule.sigma(t)[:, None]


def learned(method: BOOT, teacher: Denoiser, steps: int = 700) -> Affine:
    """The affine student after training from zero; it never sees a sample."""
    student = Affine(teacher.schedule)
    nets: Any = SimpleNamespace(student=student, teacher=teacher)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
    course = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        for update in alone(method.updates(nets, Batch(None, None, Rng(0, step), shape=(32, 1)), Progress())):
            optimizer.zero_grad()
            update.loss.backward()
            optimizer.step()
        course.step()
    return student


def line(y: Tensor) -> tuple[float, float]:
    """Mean and slope in the noise of what is said at EPS."""
    slope = float((y[-1] - y[0]) / (EPS[-1] - EPS[0]))
    return float((y - slope * EPS).mean()), slope


def test_training_reaches_the_map_of_its_own_steps() -> None:
    """Ten steps of Heun from noise to data, learned all at once: the student ends where taking them ends, nearly at
    ``m + c eps``.  The boundary holds the start of the paths to the teacher's prediction."""
    teacher = world(FlowMatching())
    ends = {}
    for weight in (1.0, 0.0):
        student = learned(BOOT(delta=0.1, teacher_step="heun", boundary_weight=weight), teacher)
        with torch.no_grad():
            top, data = at(teacher.schedule, 1), at(teacher.schedule, 0)
            ends[weight] = student.predict(EPS, top, data), student.predict(EPS, top, top)
    assert line(ends[1.0][0]) == pytest.approx(line(bootstrapped(teacher, 10, heun=True)), abs=5e-3)
    assert line(ends[1.0][0]) == pytest.approx((M, C), abs=0.04)
    assert float((ends[1.0][1] - M).abs().max()) < 5e-3
    assert float((ends[0.0][1] - M).abs().max()) > 0.3


def test_a_schedule_that_ends_in_signal_is_biased() -> None:
    """Where a fifth of the state is signal, the slope is 0.8 % wrong however small the steps are; on flow matching up
    to pure noise the error goes with the steps.  A network cannot be asked beyond its last level, which stands in."""
    own = world(FlowMatching(t_max=0.8))
    rescaled = own.on(FlowMatching())
    view = seen_from_noise(own)
    biased, right, clamped = (
        [abs(line(bootstrapped(w, n, True))[1] - C) for n in (256, 512)] for w in (own, rescaled, view)
    )
    assert biased[1] > 3e-3 and biased[1] == pytest.approx(biased[0], rel=0.05)
    assert right[1] < 5e-5 and right[1] < right[0] / 3
    assert clamped[1] == pytest.approx(biased[1], rel=0.05)


NETWORKS = (
    (TrigFlow(), TrigPrediction()), (EDM(), EDMPrediction()), (FlowMatching(), Velocity()),
    (VPLinear(), TrigPrediction()),
)  # fmt: skip


def network(schedule: Schedule, prediction: Prediction, classes: int | None = None) -> NetworkDenoiser:
    torch.manual_seed(0)
    net = MLP((3,), 16, 1, classes).double()
    with torch.no_grad():
        for p in net.parameters():
            p += 0.2 * torch.randn_like(p)
    return NetworkDenoiser(net, schedule, prediction, (3,), classes)


def boundary(method: BOOT, nets: Networks, cond: Tensor | None = None) -> float:
    """What an iteration records of the boundary."""
    batch = Batch(torch.zeros(16, 3, dtype=F64), cond, Rng(2))
    (update,) = alone(method.updates(nets, batch, Progress()))
    return float(update.logs["boundary"])


@pytest.mark.parametrize(("schedule", "prediction"), NETWORKS, ids=lambda v: type(v).__name__)
def test_the_boundary_is_exact_at_the_start(schedule: Schedule, prediction: Prediction) -> None:
    """The target time enters through zeros, so the student of any teacher begins at its prediction of pure noise, to
    the last bit; a student that moved does not, nor does the teacher under guidance.  It is called where its network
    was trained, and its schedule ends in noise."""
    method = BOOT(boundary_share=0.5)
    nets = method.networks(Start(network(schedule, prediction)))
    assert boundary(method, nets) == 0.0
    assert ends_in_noise(nets.student.schedule) and nets.student.schedule == nets.teacher.schedule
    own = schedule if ends_in_noise(schedule) else FlowMatching()
    assert nets.student.schedule == own and isinstance(nets.student.denoiser, OnSchedule) == (own != schedule)
    assert method.student(nets).plans[1].times == (own.t_max,)
    one = torch.ones(1, dtype=F64)
    last = prediction.time(schedule, schedule.t_max * one)
    torch.testing.assert_close(nets.student.denoiser.label(own.t_max * one, one), last, rtol=1e-9, atol=0)
    with torch.no_grad():
        for p in nets.student.parameters():
            p += 0.01
    assert boundary(method, nets) > 1e-6
    guided, labels = BOOT(boundary_share=0.5, guidance=3.0), torch.arange(16) % 2
    assert boundary(guided, guided.networks(Start(network(schedule, prediction, 2))), labels) > 1e-6


def test_it_learns_the_map_of_a_mixture_without_a_sample() -> None:
    """A fresh network, the exact teacher of three modes on a line, and nothing else."""
    teacher = three_modes(FlowMatching())
    torch.manual_seed(0)
    fresh = NetworkDenoiser(MLP((1,), 32, 1), FlowMatching(), Velocity(), (1,))
    settings = Settings(Budget(400), 128, precision="fp32", averages=(Power(0.1),))
    method = BOOT(lr=1e-2, delta=0.1, teacher_step="heun")
    start = Start(teacher, Prior((1,)), given={"student": fresh})
    student = train(method, start, settings, None, show=False).model
    z = torch.linspace(-2, 2, 41)[:, None]
    exact = teacher.flow(z.double(), 1.0, 0.0)
    gap = (student(z) - exact).square().mean().sqrt() / exact.std()
    first = (fresh(z, 1.0).detach() - exact).square().mean().sqrt() / exact.std()
    assert gap < 0.11 and gap < 0.75 * first


class Pair(Denoiser):
    """Two Gaussians: the narrow one for class 0, the wide one without a class."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__(schedule, (1,), 1)
        self.laws = [Gaussian(schedule, torch.zeros(1, dtype=F64), v) for v in (0.25, 1.0)]

    def forward(self, x: Tensor, t: Tensor | float, cond: Cond = None) -> Tensor:
        assert cond is None or isinstance(cond, Tensor)
        here = torch.zeros(len(x), 1) if cond is None else (cond >= 0)[:, None]
        return torch.where(here > 0, self.laws[0](x, t), self.laws[1](x, t))


def test_the_guidance_weight_is_an_input() -> None:
    """The exact signal at every weight, the power law of two Gaussians, fulfils the loss up to the step; one that does
    not hear the weight does not."""
    schedule = FlowMatching()
    method = BOOT(guidance=2.0, guidance_range=(1.0, 4.0), delta=0.02, boundary_share=0.01)

    class Exact:
        schedule = FlowMatching()

        def __init__(self, hears: bool) -> None:
            self.hears = hears

        def predict(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond, w: Tensor) -> Tensor:
            world = GuidedGaussian(schedule, (1,), 0.25, 1.0, w if self.hears else 2.0)
            s = s.clamp_max(0.999)
            moved = world.flow(x, t, s)
            return (moved - s[:, None] * x) / (1 - s)[:, None]

    def loss(hears: bool, step: float) -> float:
        nets: Any = SimpleNamespace(student=Exact(hears), teacher=Pair(schedule))
        batch = Batch(torch.zeros(256, 1, dtype=F64), torch.zeros(256, dtype=torch.long), Rng(1))
        (update,) = alone(dataclasses.replace(method, delta=step).updates(nets, batch, Progress()))
        return float(update.loss)

    assert loss(True, 0.02) < 2e-3 < 0.01 < loss(False, 0.02)
    nets = method.networks(Start(network(TrigFlow(), TrigPrediction(), 2)))
    student = method.student(nets)
    assert student.extras["w"].default == 2.0 and student.sample(2, torch.tensor([0, 1]), w=3.5).shape == (2, 3)
    with pytest.raises(ValueError, match=r"w=5 must lie in \[1, 4\]"):
        student.sample(2, torch.tensor([0, 1]), w=5.0)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"delta": 0.0}, "delta=0 must lie between 0 and 1"),
        ({"boundary_share": 1.0}, "boundary_share=1 must lie between 0 and 1"),
        ({"guidance_range": (2.0, 4.0)}, "guidance=1 between them"),
        ({"guidance_range": (1.0,)}, "2 are needed"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        BOOT(**fields)


def test_guidance_needs_a_teacher_that_knows_no_condition() -> None:
    said = {"guidance=3": BOOT(guidance=3.0), r"guidance_range=\(1, 3\)": BOOT(guidance_range=(1.0, 3.0))}
    for field, method in said.items():
        with pytest.raises(ValueError, match=f"{field}: this teacher is unconditional"):
            method.networks(Start(network(TrigFlow(), TrigPrediction())))


#: Nothing of it is published where we could read it.
PUBLISHED = {
    **dict.fromkeys(
        ("lr", "guidance", "guidance_range", "delta", "boundary_weight", "boundary_share", "teacher_step"), ...),
    "optimizer": dict.fromkeys(("kind", "betas", "eps", "weight_decay", "clip", "warmup", "decay"), ...),
}  # fmt: skip
