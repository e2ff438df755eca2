"""The three identities of flow maps: zero at exact maps on every schedule, and what they are written out."""

from __future__ import annotations

import pytest
import torch

from fewstep.denoisers import NetworkDenoiser
from fewstep.exact import Gaussian, three_modes
from fewstep.exact.world import ExactFlowMap
from fewstep.flow_maps import Jump
from fewstep.methods.parts.identities import (
    Direction,
    adaptive_weight,
    composed,
    eulerian,
    lagrangian,
    normalize,
    regression,
    semigroup,
    towards,
)
from fewstep.networks import MLP, UNet
from fewstep.predictions import TrigPrediction
from fewstep.schedules import EDM, FlowMatching, Schedule, ShiftedFlow, TrigFlow, VPCosine, VPLinear, align
from fewstep.tangents import finite_difference

SCHEDULES = (FlowMatching(), ShiftedFlow(shift=3.0), TrigFlow(), EDM(), VPLinear(), VPCosine())


def names(schedule: Schedule) -> str:
    return type(schedule).__name__


def pairs(schedule: Schedule, n: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Times in the middle of the range, by noise level, ``t > s``."""
    level = torch.linspace(0.1, 3.0, n, dtype=torch.float64)
    return schedule.time_at(-level.log()), schedule.time_at(-(0.6 * level).log())


def states(schedule: Schedule, t: torch.Tensor) -> torch.Tensor:
    """States as the noised laws of unit data have them."""
    z = torch.special.ndtri((torch.arange(len(t), dtype=torch.float64) + 0.5) / len(t))[:, None]
    size = torch.sqrt(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2)
    return size[:, None] * z


def student(schedule: Schedule) -> Jump:
    torch.manual_seed(0)
    net = MLP((3,), 16, 2, extras=("s",)).double()
    for p in net.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return Jump(NetworkDenoiser(net, schedule, TrigPrediction(sigma_data=0.7), (3,)), two_times=True)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
def test_they_hold_at_the_exact_map_of_a_mixture(schedule: Schedule) -> None:
    """Three modes on a line, whose map is not linear; a map that is off by a hundredth is told from it."""
    world = three_modes(schedule)
    exact = ExactFlowMap(world)
    t, s = pairs(schedule)
    mid = schedule.time_at((schedule.log_snr(t) + schedule.log_snr(s)) / 2)
    x = states(schedule, t)
    v = world.velocity(x, t)

    class Off(ExactFlowMap):
        def mean_velocity(self, x, t, s, cond=None, **extras):
            return super().mean_velocity(x, t, s, cond) + 0.01 * align(t - s, x) * x

    size = float(v.abs().max())
    for flow_map, low, high in ((exact, -1.0, 1e-9), (Off(world), 1e-4, 1e9)):
        f = flow_map.mean_velocity(x, t, s)
        gaps = {
            "eulerian": eulerian(flow_map, x, t, s, v).g,
            "lagrangian": lagrangian(flow_map, x, t, s, world).g,
            "semigroup": f - semigroup(flow_map, x, t, mid, s, second=exact),
        }
        for name, g in gaps.items():
            assert low * size < float(g.abs().max()) < high * size, name


@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
def test_directions_are_the_derivatives_of_the_jump(schedule: Schedule) -> None:
    """For a random network, ``-g`` is d/dt of the jump along ``(v, 1)`` and ``g + u`` is d/ds of it, by differences."""
    model = student(schedule)
    t, s = pairs(schedule)
    x = states(schedule, t).expand(-1, 3).contiguous()
    v = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    world = Gaussian(schedule, torch.zeros(3, dtype=torch.float64), 0.3)
    step = 1e-5
    _, along = finite_difference(lambda x_, t_: model(x_, t_, s), x, t, v, torch.ones_like(t), step)
    torch.testing.assert_close(eulerian(model, x, t, s, v).g, -along, atol=1e-6, rtol=1e-6)
    half = eulerian(model, x, t, s, v, scale=torch.full_like(t, 0.5)).g
    torch.testing.assert_close(half, -along / 2, atol=1e-6, rtol=1e-6)
    _, end = finite_difference(lambda x_, s_: model(x, t, s_), x, s, torch.zeros_like(x), torch.ones_like(s), step)
    own = lagrangian(model, x, t, s, world)
    torch.testing.assert_close(own.g + world.velocity(model(x, t, s), s), end, atol=1e-6, rtol=1e-6)
    assert torch.equal(own.F, model.mean_velocity(x, t, s))


def test_what_they_are_on_flow_matching() -> None:
    """``(F - v) + r (t - s) dF/dt``, ``F + r (s - t) dF/ds - u`` and ``(F_1 + F_2) / 2``."""
    schedule = FlowMatching()
    model, world = student(schedule), Gaussian(schedule, torch.zeros(3, dtype=torch.float64), 0.3)
    t, s = torch.tensor([1.0, 0.7, 0.3], dtype=torch.float64), torch.tensor([0.0, 0.5, 0.3], dtype=torch.float64)
    x = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    v, gap = world.velocity(x, t), (t - s)[:, None]
    for r in (0.0, 0.3, 1.0):
        f, slope = torch.func.jvp(lambda x_, t_: model.mean_velocity(x_, t_, s), (x, t), (v, torch.ones_like(t)))
        expected = (f - v) + r * gap * slope
        torch.testing.assert_close(eulerian(model, x, t, s, v, r=r).g, expected, atol=1e-12, rtol=0)
        _, turn = torch.func.jvp(lambda s_: model.mean_velocity(x, t, s_), (s,), (torch.ones_like(s),))
        expected = f - r * gap * turn - world.velocity(x - gap * f, s)
        torch.testing.assert_close(lagrangian(model, x, t, s, world, r=r).g, expected, atol=1e-12, rtol=0)
    t, s = t[:2], s[:2]
    f_1, f_2 = model.mean_velocity(x[:2], t, s), model.mean_velocity(x[:2], s, s)
    torch.testing.assert_close(composed(schedule, x[:2], f_1, f_2, t, (t + s) / 2, s), (f_1 + f_2) / 2)


def test_a_direction_has_no_graph_and_the_regression_follows_it() -> None:
    """The gradient in ``F`` is ``2 w g / d`` a sample, with ``g`` normalised where that is asked."""
    g = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    f = torch.randn_like(g).requires_grad_()
    direction, weight = Direction(f.detach(), g), torch.tensor([1.0, 2.0, 0.5, 1.0])
    for c in (None, 0.1):
        loss = regression(f, direction, c=c, weight=weight)
        assert loss.shape == (4,)
        (slope,) = torch.autograd.grad(loss.sum(), f)
        wanted = g if c is None else normalize(g, c)
        torch.testing.assert_close(slope, 2 * weight[:, None] * wanted / 3, atol=1e-12, rtol=0)
    log_weight = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(regression(f, direction, log_weight=log_weight).sum(), log_weight)
    torch.testing.assert_close(slope, g.square().mean(1) - 1)
    assert not towards(f, g).g.requires_grad
    torch.testing.assert_close(adaptive_weight(g, 1.0, 0.01), 1 / (g.square().sum(1) + 0.01))
    schedule = FlowMatching()
    t = torch.full((4,), 0.5, dtype=torch.float64)
    model = student(schedule).requires_grad_(True)
    for found in (eulerian(model, f, t, 0 * t, g), lagrangian(model, f, t, 0 * t, model.instant())):
        assert not found.F.requires_grad and not found.g.requires_grad


def test_nothing_is_lost_in_float32_where_times_meet() -> None:
    """The target of two jumps over a millionth of the range has float32's digits."""
    schedule = FlowMatching()
    t = torch.tensor([0.5], dtype=torch.float64)
    f_1, f_2, x = (torch.randn(1, 3, generator=torch.Generator().manual_seed(k)) for k in range(3))
    target = composed(schedule, x, f_1, f_2, t, t - 1e-6, t - 2e-6)
    torch.testing.assert_close(target, (f_1 + f_2) / 2, atol=1e-6, rtol=1e-6)


def test_dropout_is_that_of_the_call_after() -> None:
    """The value in a direction is the one that the next call gives, mask and all."""
    schedule = TrigFlow()
    net = UNet((1, 4, 4), (8,), 1, 16, dropout=0.5)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.1 * torch.randn_like(p)
    model = Jump(NetworkDenoiser(net, schedule, TrigPrediction(), (1, 4, 4))).train()
    x, t = torch.randn(2, 1, 4, 4), torch.tensor([0.4, 1.0], dtype=torch.float64)
    found = eulerian(model, x, t, 0 * t, torch.randn_like(x))
    torch.testing.assert_close(model.mean_velocity(x, t, 0 * t), found.F, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(model.mean_velocity(x, t, 0 * t), found.F)


def test_tangents_are_not_taken_in_half_precision() -> None:
    """Under autocast the direction is the one without, bit for bit; the network's own call is not."""
    model = student(FlowMatching()).float()
    t = torch.tensor([0.9, 0.6], dtype=torch.float64)
    x, v = (torch.randn(2, 3, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    plain = eulerian(model, x, t, 0 * t, v)
    with torch.autocast("cpu", torch.bfloat16):
        under = eulerian(model, x, t, 0 * t, v)
        assert not torch.allclose(model.mean_velocity(x, t, 0 * t).float(), plain.F, atol=1e-5)
    assert torch.equal(under.F, plain.F) and torch.equal(under.g, plain.g)
