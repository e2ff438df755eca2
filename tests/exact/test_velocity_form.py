"""Velocities and jumps in float32, down to times with almost no noise."""

from __future__ import annotations

import copy

import pytest
import torch

from fewstep.denoisers import NetworkDenoiser
from fewstep.exact import Gaussian
from fewstep.extras import Input
from fewstep.flow_maps import Jump, ddim_move
from fewstep.networks import MLP
from fewstep.predictions import EDMPrediction, Eps, Prediction, TrigPrediction, V, Velocity
from fewstep.sampling.rollout import Plan, rollout
from fewstep.schedules import EDM, FlowMatching, Schedule, ShiftedFlow, TrigFlow, VPCosine, VPLinear
from fewstep.tangents import tangent

SCHEDULES = [EDM(1e-4), FlowMatching(), ShiftedFlow(shift=3.0), TrigFlow(), VPLinear(1e-4), VPCosine(1e-4)]
PREDICTIONS = [V(), Velocity(), EDMPrediction(), TrigPrediction(), Eps()]
F64 = torch.float64


def networks(extras: tuple[str, ...] = ()) -> tuple[MLP, MLP]:
    """One network in float32 and float64, not at its start."""
    net = MLP((8,), 32, 2, extras=extras)
    gen = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.2 * torch.randn(p.shape, generator=gen)
    return net, copy.deepcopy(net).double()


@pytest.mark.parametrize("view", [None, TrigFlow(), FlowMatching()], ids=["own", "TrigFlow", "FlowMatching"])
@pytest.mark.parametrize("prediction", PREDICTIONS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_velocity_and_its_tangent_in_float32(schedule: Schedule, prediction: Prediction, view: Schedule | None) -> None:
    """Within 1e-5 of float64 at t = 1e-4, where the difference of x and D has lost all its digits (3e-6 at most was
    measured, in time inputs that are logarithms)."""
    single, double = (NetworkDenoiser(net, schedule, prediction, (8,)) for net in networks())
    low, high = (d if view is None else d.on(view) for d in (single, double))
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1), dtype=F64)
    for time in (1e-4, 1e-2, 0.5):
        t = torch.full((16,), time, dtype=F64)
        v = high.velocity(x, t)
        f64, j64 = tangent(lambda a, b: high.velocity(a, b), x, t, v, torch.ones_like(t))
        f32, j32 = tangent(lambda a, b: low.velocity(a, b), x.float(), t, v.float(), torch.ones_like(t))
        assert float((f32 - f64).norm() / f64.norm()) < 1e-5
        assert float((j32 - j64).norm() / j64.norm()) < 1e-5


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_velocity_noise_and_data_agree(schedule: Schedule) -> None:
    """``affine``, ``eps`` and ``velocity`` are those of the denoiser, in float64 and away from the ends."""
    model = NetworkDenoiser(networks()[1], schedule, V(), (8,))
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(2), dtype=F64)
    t = torch.linspace(0.3, 0.8, 16, dtype=F64)
    x0 = model(x, t)
    a, b, f = model.affine(x, t)
    torch.testing.assert_close(a[:, None] * x + b[:, None] * f, x0, rtol=1e-12, atol=1e-12)
    eps = (x - schedule.alpha(t)[:, None] * x0) / schedule.sigma(t)[:, None]
    torch.testing.assert_close(model.eps(x, t), eps, rtol=1e-11, atol=1e-11)
    told = schedule.velocity(x0, eps, t)
    torch.testing.assert_close(model.velocity(x, t), told, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_a_move_in_velocity_form_is_a_ddim_move(schedule: Schedule) -> None:
    """``move`` with the velocity of the pair is ``ddim_move`` with its data."""
    gen = torch.Generator().manual_seed(3)
    x, x0 = torch.randn(2, 16, 8, generator=gen, dtype=F64)
    t, s = torch.linspace(0.3, 0.9, 16, dtype=F64), torch.linspace(0.01, 0.3, 16, dtype=F64)
    eps = (x - schedule.alpha(t)[:, None] * x0) / schedule.sigma(t)[:, None]
    moved = schedule.move(x, schedule.velocity(x0, eps, t), t, s)
    torch.testing.assert_close(moved, ddim_move(x, x0, t, s, schedule), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("schedule", [FlowMatching(), TrigFlow(), EDM(), VPLinear()], ids=lambda s: type(s).__name__)
def test_a_jump_to_its_own_time_is_the_identity(schedule: Schedule) -> None:
    """For every time, that of pure data included, in both forms."""
    jump = Jump(NetworkDenoiser(networks()[1], schedule, V(), (8,)))
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(4), dtype=F64)
    for time in (schedule.t_min, 0.5 * schedule.t_max, schedule.t_max):
        t = torch.full((16,), time, dtype=F64)
        torch.testing.assert_close(jump(x, t, t), x, rtol=1e-12, atol=1e-12)
        moved = schedule.move(x, jump.mean_velocity(x, t, t), t, t)
        torch.testing.assert_close(moved, x, rtol=1e-12, atol=1e-12)


def test_a_two_time_jump_in_both_forms() -> None:
    """The same jump, on a view too, and its denoiser is the jump that does not move."""
    model = NetworkDenoiser(networks(("s",))[1], FlowMatching(), Velocity(), (8,))
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(5), dtype=F64)
    t, s = torch.linspace(0.4, 1.0, 16, dtype=F64), torch.linspace(0.0, 0.3, 16, dtype=F64)
    for denoiser in (model, model.on(TrigFlow())):
        jump = Jump(denoiser, two_times=True)
        moved = denoiser.schedule.move(x, jump.mean_velocity(x, t, s), t, s)
        torch.testing.assert_close(jump(x, t, s), moved, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(jump.instant()(x, t), jump.predict(x, t, t), rtol=0, atol=0)
        torch.testing.assert_close(jump.instant().velocity(x, t), jump.mean_velocity(x, t, t), rtol=0, atol=0)
    half = torch.randn(2, 8, dtype=torch.bfloat16)
    assert model.label(torch.tensor([0.3, 0.7], dtype=F64), half).dtype == torch.float32


def test_further_inputs_of_a_student() -> None:
    """Defaults, then the plan's, then the caller's; unknown names and values out of range are refused."""
    net = networks(("w", "k"))[1]
    model = NetworkDenoiser(net, FlowMatching(), Velocity(), (8,))
    student = Jump(model, extras={"w": Input(1.0, 0.0, 14.0), "k": Input(1.0, 1.0, 8.0)})
    noise = torch.randn(4, 8, generator=torch.Generator().manual_seed(6), dtype=F64)
    plan = Plan((1.0, 0.5), gamma=0.0, extras={"k": 2.0})

    def told(w: float, k: float) -> torch.Tensor:
        inputs = {"w": torch.full((4,), w, dtype=F64), "k": torch.full((4,), k, dtype=F64)}
        half = student.jump(noise, 1.0, 0.5, **inputs)
        return student.to_data(half, 0.5, **inputs)

    torch.testing.assert_close(rollout(student, noise, plan), told(1.0, 2.0), rtol=0, atol=1e-12)
    torch.testing.assert_close(rollout(student, noise, plan, extras={"w": 3.0}), told(3.0, 2.0), rtol=0, atol=1e-12)
    assert float((told(3.0, 2.0) - told(1.0, 2.0)).abs().max()) > 1e-3
    with pytest.raises(
        ValueError, match=r"v=3: this student takes w from 0 to 14 \(default 1\), k from 1 to 8 \(default 1\)"
    ):
        rollout(student, noise, plan, extras={"v": 3.0})
    with pytest.raises(ValueError, match="w=20"):
        rollout(student, noise, plan, extras={"w": 20.0})
    with pytest.raises(ValueError, match=r"w=3: this student takes no further inputs"):
        rollout(Jump(Gaussian(FlowMatching(), torch.zeros(8), 1.0)), noise, Plan((1.0,)), extras={"w": 3.0})
