"""MDT-dist: velocity matching against closed forms, its derivative, its sampler, and students of small worlds."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch

from fewstep.data import Dataset
from fewstep.denoisers import CountCalls, NetworkDenoiser
from fewstep.exact import ExactFlowMap, Gaussian, GuidedGaussian, three_modes
from fewstep.flow_maps import Jump
from fewstep.methods.flow_maps.mdt_dist import (
    MDTDist,
    backward_difference,
    slope_engine,
    velocity_distillation,
    velocity_matching,
)
from fewstep.methods.method import Batch, Progress
from fewstep.methods.start import Start
from fewstep.networks import MLP, UNet3d
from fewstep.predictions import Velocity
from fewstep.randomness import Rng
from fewstep.runs.course import run_recipe
from fewstep.sampling.rollout import Plan, rollout
from fewstep.schedules import FlowMatching
from fewstep.tangents import finite_difference
from fewstep.training.budget import Budget
from fewstep.training.settings import Settings

FLOW = FlowMatching()
EXACT = slope_engine(0.0, False)
PUBLISHED: dict[str, Any] = {
    # Zanue/MDT-dist, src/trellis/trainers/flow_matching/flow_matching_mdt.py and src/configs/*.json (structure)
    "lr": 4e-8, "guidances": (41.0,), "distillation_weight": 1.0, "distillation_guidances": (101.0,),
    "gap": 0.01, "slope_norm": True, "c": 0.0, "tangent_warmup": 0.0,
    "time_mean": 1.0, "time_std": 1.0, "steps": (1, 2),
    "optimizer": {
        "kind": "adamw", "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "clip": "adaptive", "warmup": ...,
        "decay": "constant",
    },
}  # fmt: skip


def states(n: int = 64, d: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(4)
    t = 0.05 + 0.9 * torch.rand(n, generator=gen, dtype=torch.float64)
    return torch.randn(n, d, generator=gen, dtype=torch.float64), t


def network(classes: int | None = 2, d: int = 3) -> NetworkDenoiser:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = MLP((d,), 16, 2, classes).double()
        for p in net.parameters():
            p.data += 0.2 * torch.randn_like(p)
    return NetworkDenoiser(net, FLOW, Velocity(), (d,), classes)


def world(c: float = 0.5, d: int = 3) -> Gaussian:
    return Gaussian(FLOW, 0.3 + torch.zeros(d, dtype=torch.float64), c**2)


def residual(flow_map: Any, teacher: Any, engine: Any) -> float:
    x, t = states(d=flow_map.shape[0])
    return float(velocity_matching(flow_map, x, t, teacher.velocity(x, t), None, engine)[1].g.abs().max())


@pytest.mark.parametrize("scale", [1.0, 3.0, 41.0])
def test_velocity_matching_is_fulfilled_by_the_mean_velocity(scale: float) -> None:
    """``phi = (x - f(x)) / t`` of a Gaussian, and of guidance between two up to the published 40 + 1, leaves nothing
    with the exact derivative; a teacher of another scale leaves much."""
    exact = GuidedGaussian(FLOW, (3,), 0.2, 0.3, scale)
    size = float(exact.velocity(*states()).abs().max())
    assert residual(ExactFlowMap(exact), exact, EXACT) < 1e-12 * size
    assert residual(ExactFlowMap(exact), GuidedGaussian(FLOW, (3,), 0.2, 0.3, scale + 1), EXACT) > 0.05
    assert residual(ExactFlowMap(world()), world(), EXACT) < 1e-12


def test_the_residual_of_the_difference_halves_with_its_gap() -> None:
    gaps = [residual(ExactFlowMap(world()), world(), slope_engine(h, False)) for h in (0.04, 0.02, 0.01, 0.005)]
    assert all(1.8 < one / other < 2.2 for one, other in pairwise(gaps))


def test_the_direction_is_that_of_the_identity() -> None:
    """``g = phi + t dphi/dt - v`` with the derivative by central differences, and the loss moves phi against it."""
    student = Jump(network(None))
    x, t = states()
    v = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    loss, direction = velocity_matching(student, x, t, v, None, EXACT)
    phi, slope = finite_difference(lambda a, b: student.denoiser.velocity(a, b), x, t, v, torch.ones_like(t), step=1e-5)
    torch.testing.assert_close(direction.g, phi + t[:, None] * slope - v, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(loss, direction.g.square().mean(1), atol=1e-12, rtol=0)
    wanted = torch.autograd.grad((2 / 3 * direction.g * student.denoiser.velocity(x, t)).sum(), student.parameters())
    found = torch.autograd.grad(loss.sum(), student.parameters())
    assert all(torch.allclose(a, b, atol=1e-12, rtol=1e-9) for a, b in zip(found, wanted, strict=True))


def test_velocity_distillation_is_the_matching_vector_of_the_students_own_law() -> None:
    """A student that is exact for N(m', c^2), beside a teacher of N(m, c^2): the velocities of the two laws are ``-(m'
    - m) t / S^2`` apart, ``-1 / t`` times the difference of the two data predictions, and samples move towards m.  The
    derivative is taken along the teacher's velocity, which multiplies this by the slope ``c / S`` of the student's map;
    at the teacher's own map nothing is left.  Before the derivative is turned up it is another vector."""
    own, teacher = Gaussian(FLOW, 0.8 + torch.zeros(3, dtype=torch.float64), 0.25), world()
    _, t = states()
    z, noise = (torch.randn(64, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in (1, 2))
    student = ExactFlowMap(own)
    loss, gap = velocity_distillation(student, z, noise, t, teacher, None, EXACT)
    S2 = (1 - t) ** 2 * 0.25 + t**2
    slope = (0.5 / S2.sqrt())[:, None]
    torch.testing.assert_close(gap.g, slope * (-0.5 * t / S2)[:, None].expand(64, 3), atol=1e-9, rtol=0)
    x_t = FLOW.add_noise(0.8 + 0.5 * z, noise, t)
    torch.testing.assert_close(gap.g, -slope * (own(x_t, t) - teacher(x_t, t)) / t[:, None], atol=1e-9, rtol=0)
    torch.testing.assert_close(loss, gap.g.square().mean(1))
    left = velocity_distillation(ExactFlowMap(teacher), z, noise, t, teacher, None, EXACT)[1].g
    assert float(left.abs().max()) < 1e-9
    half = velocity_distillation(ExactFlowMap(teacher), z, noise, t, teacher, None, EXACT, r=0.5)[1].g
    assert float(half.abs().max()) > 0.05


def test_velocity_distillation_moves_the_samples_and_not_the_estimate() -> None:
    """Its gradient is that of ``phi(z, 1)`` times the gap, held: the call at the noised samples has no graph."""
    student, (z, t) = Jump(network(None)), states()
    noise, one = torch.flip(z, (0,)), torch.ones_like(t)
    loss, gap = velocity_distillation(student, z, noise, t, world(), None, EXACT)
    wanted = torch.autograd.grad((2 / 3 * gap.g * student.denoiser.velocity(z, one)).sum(), student.parameters())
    found = torch.autograd.grad(loss.sum(), student.parameters())
    assert all(torch.allclose(a, b, atol=1e-12, rtol=1e-9) for a, b in zip(found, wanted, strict=True))


def test_a_normalised_derivative_moves_the_fixed_point_away() -> None:
    """The published "d_norm" in 1000 dimensions: what is left at the true phi is nearly all that regression of the
    teacher's velocity would leave; without it nothing is left."""
    exact = Gaussian(FLOW, torch.zeros(1000, dtype=torch.float64), 0.25)
    t = torch.full((16,), 0.6, dtype=torch.float64)
    x = torch.randn(16, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = x * (0.16 * 0.25 + 0.36) ** 0.5
    v, phi = exact.velocity(x, t), ExactFlowMap(exact).mean_velocity(x, t, 0.0 * t)

    def left(engine: Any) -> float:
        return float(velocity_matching(ExactFlowMap(exact), x, t, v, None, engine)[1].g.square().mean().sqrt())

    gap = float((phi - v).square().mean().sqrt())
    assert left(EXACT) < 1e-12
    assert 0.9 * gap < left(slope_engine(0.0, True)) < gap
    assert not MDTDist().slope_norm


def test_normalising_the_whole_direction_keeps_the_fixed_point_and_the_warm_up_begins_at_the_teacher() -> None:
    """With ``c`` the loss is 0 at the exact phi and of size 1 elsewhere; at r = 0 the teacher is the solution."""
    x, t = states()
    v = world().velocity(x, t)
    at_phi, _ = velocity_matching(ExactFlowMap(world()), x, t, v, None, EXACT, c=0.1)
    assert float(at_phi.abs().max()) < 1e-20
    away, direction = velocity_matching(Jump(network(None)), x, t, v, None, EXACT, c=0.1)
    size = direction.g.norm(dim=1)
    torch.testing.assert_close(3 * away, (size / (size + 0.1)).square())
    teacher = Jump(network(None))
    for r, zero in ((0.0, True), (0.5, False)):
        left = velocity_matching(teacher, x, t, teacher.denoiser.velocity(x, t), None, EXACT, r=r)[1].g
        assert (float(left.detach().abs().max()) < 1e-12) == zero
    nets = MDTDist().networks(Start(network(None)))
    for fraction, r in ((0.0, 0.0), (0.25, 0.5), (0.9, 1.0)):
        (update,) = MDTDist().updates(nets, Batch(x, None, Rng(0)), Progress(fraction=fraction))
        assert update.logs["warmup"] == r


def test_the_difference_is_along_the_path_and_sees_one_dropout_mask() -> None:
    field = lambda x, t: x.square() * t[:, None]  # noqa: E731
    x, t = states()
    dx, dt = 0.3 * torch.ones_like(x), -t
    value, slope = backward_difference(field, x, t, dx, dt, 1e-6)
    assert torch.equal(value, field(x, t))
    torch.testing.assert_close(slope, 2 * x * t[:, None] * dx + x.square() * dt[:, None], atol=1e-4, rtol=1e-4)

    torch.manual_seed(0)
    net = UNet3d((1, 4, 4, 4), (8,), 1, 16, dropout=0.5)
    for p in net.parameters():
        p.data += 0.2 * torch.randn_like(p)
    x, t = torch.randn(4, 1, 4, 4, 4), torch.full((4,), 0.5, dtype=torch.float64)
    _, slope = backward_difference(lambda y, s: net.train()(y, s.float()), x, t, 0 * x, torch.ones_like(t), 1e-3)
    assert float(slope.detach().abs().max()) < 50  # two masks would differ by more than 100


def test_the_student_is_the_teachers_network_and_starts_as_it() -> None:
    """No second time and no further input; one call of the teacher an iteration, two under guidance."""
    nets = MDTDist().networks(Start(network()))
    assert nets.student.extras == {} and not nets.student.two_times
    start = network().state_dict()
    got = nets.student.denoiser.state_dict()
    assert start.keys() == got.keys() and all(torch.equal(got[name], value) for name, value in start.items())
    for guidances, calls in (((1.0,), 1), ((41.0,), 2), ((3.0, 41.0), 2)):
        nets = MDTDist().networks(Start(network()))
        nets.teacher = CountCalls(nets.teacher)
        batch = Batch(states()[0], torch.arange(64) % 2, Rng(0))
        (update,) = MDTDist(guidances=guidances, distillation_weight=0.0).updates(nets, batch, Progress())
        update.loss.backward()
        assert nets.teacher.calls == calls
        assert all(p.grad is None for p in nets.teacher.parameters())


def test_two_steps_move_along_the_line_to_the_predicted_data() -> None:
    """Euler steps with phi as the velocity, as the official sampler has it; one step is exact for the exact phi."""
    student = MDTDist().student(MDTDist().networks(Start(network(None))))
    noise = states(5)[0]
    phi = student.flow_map.denoiser.velocity
    half = noise - 0.5 * phi(noise, 1.0)
    two = half - 0.5 * phi(half, 0.5)
    torch.testing.assert_close(student(noise, steps=2), two)
    torch.testing.assert_close(student(noise, steps=1), noise - phi(noise, 1.0))
    exact = rollout(ExactFlowMap(world()), noise, Plan((1.0,), gamma=0.0))
    torch.testing.assert_close(exact, 0.3 + 0.5 * noise, atol=1e-12, rtol=0)


def test_times_are_logit_normal_above_the_gap() -> None:
    method = MDTDist()
    t = method.times(FLOW, 20_000, Rng(0))
    assert float(t.min()) >= 0.01 and float(t.max()) < 1
    logit = torch.logit((t - 0.01) / 0.99)
    assert float(logit.mean()) == pytest.approx(1.0, abs=5 / math.sqrt(20_000))
    assert float(logit.std()) == pytest.approx(1.0, abs=0.03)
    assert float(MDTDist(gap=0.0).times(FLOW, 20_000, Rng(0)).min()) < float(t.min())


def test_a_trained_student_comes_near_the_exact_map_in_one_call() -> None:
    """Three modes on the line: the student's one call from noise lands near the quantile map's end, where the
    teacher's one call of Euler does not."""
    exact = three_modes(FLOW)
    torch.manual_seed(0)
    start = NetworkDenoiser(MLP((1,), 32, 2), FLOW, Velocity(), (1,))
    data = Dataset("three", exact.sample(4096, Rng(0)).float())
    settings = Settings(Budget(300), batch=64, precision="fp32")
    student = run_recipe(MDTDist(lr=1e-2), exact, data, settings, given={"student": start}, show=False).model
    z = torch.special.ndtri((torch.arange(200, dtype=torch.float64) + 0.5) / 200)[:, None]
    target = exact.flow(z, 1.0, 0.0)
    with torch.no_grad():
        found = float((student(z.float()) - target).square().mean().sqrt())
    euler = float((z - exact.velocity(z, 1.0) - target).square().mean().sqrt())
    assert found < 0.45 < 0.9 < euler, (found, euler)


def test_what_cannot_be_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"guidances=3: this teacher is unconditional"):
        MDTDist(guidances=(3.0,)).networks(Start(network(None)))
    with pytest.raises(ValueError, match=r"distillation_guidances=\(1, 3\): this teacher is unconditional"):
        MDTDist(distillation_guidances=(1.0, 3.0)).networks(Start(network(None)))
    with pytest.raises(ValueError, match=r"guidances=\(\) must name at least one"):
        MDTDist(guidances=())
    with pytest.raises(ValueError, match="gap=1 must be below 1"):
        MDTDist(gap=1.0)
    with pytest.raises(ValueError, match="reads samples"):
        nets = MDTDist().networks(Start(network(None)))
        next(MDTDist().updates(nets, Batch(None, None, Rng(0), shape=(4, 3)), Progress()))


def test_the_engine_is_chosen_by_the_gap() -> None:
    engine = slope_engine(0.02, False)
    assert isinstance(engine, partial) and engine.keywords == {"step": 0.02}
