"""Consistency Models: the loss against a Gaussian and a mixture whose consistency functions are known."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep import grids
from fewstep.denoisers import Denoiser, NetworkDenoiser
from fewstep.exact import ExactFlowMap, Gaussian, three_modes
from fewstep.flow_maps import EDMConsistency, FlowMap
from fewstep.methods.consistency.cm import (
    ConsistencyDistillation,
    ConsistencyTraining,
    consistency_loss,
    follow,
)
from fewstep.methods.consistency.scm import ContinuousConsistencyDistillation, ContinuousConsistencyTraining
from fewstep.methods.method import Batch, Networks, Progress
from fewstep.methods.parts.distances import Plain, l2, pseudo_huber
from fewstep.methods.parts.teacher_steps import ddim_step, edm_like, heun_step
from fewstep.methods.start import Start
from fewstep.networks import MLP, UNet
from fewstep.predictions import EDMPrediction, TrigPrediction
from fewstep.randomness import Rng
from fewstep.schedules import EDM, FlowMatching, TrigFlow

C = 0.5


def gaussian(n: int = 1) -> Gaussian:
    return Gaussian(EDM(), torch.zeros(n, dtype=torch.float64), C**2)


class Tabular(FlowMap):
    """``f(x, t_n) = a_n x`` on the times of a grid."""

    def __init__(self, grid: torch.Tensor, a: torch.Tensor) -> None:
        super().__init__(EDM(), (1,), None)
        self.grid, self.a = grid, torch.nn.Parameter(a)

    def forward(self, x, t, s, cond=None):
        return self.a[torch.searchsorted(-self.grid, -t)][:, None] * x


@pytest.mark.parametrize(("n", "percent"), [(20, 4.368), (80, 0.2318), (320, 0.01393)])
def test_product_of_heun_steps_is_the_fixed_point_of_distillation(n: int, percent: float) -> None:
    """A tabular linear student that takes the product of the teacher's Heun steps has zero loss, and its end error
    against the exact map is the known second-order one."""
    world = gaussian()
    grid = grids.karras(EDM(), n - 1)
    ones = torch.ones(n - 1, 1, dtype=torch.float64)
    steps = heun_step(world, ones, grid[:-1], grid[1:])[:, 0]
    a = torch.cat([steps.flip(0).cumprod(0).flip(0), torch.ones(1, dtype=torch.float64)])
    exact = math.sqrt((C**2 + 0.002**2) / (C**2 + 80.0**2))
    assert 100 * (float(a[0]) / exact - 1) == pytest.approx(percent, rel=2e-3)

    model = Tabular(grid, a)
    nets = Networks({"student": model, "target": model, "teacher": world, "distance": Plain(l2)}, {})
    batch = Batch(torch.randn(256, 1, dtype=torch.float64), None, Rng(0))
    (update,) = ConsistencyDistillation(grid_times=n).updates(nets, batch, Progress())
    assert float(update.loss) < 1e-24
    model.a.data[0] *= 1.01
    (update,) = ConsistencyDistillation(grid_times=n).updates(nets, batch, Progress())
    assert float(update.loss) > 1e-9


@pytest.mark.parametrize(("n", "percent"), [(20, -13.89), (80, -3.533), (320, -0.887), (1280, -0.2219)])
def test_training_without_teacher_tends_to_the_euler_product(n: int, percent: float) -> None:
    """``a_{n+1} = a_n (c^2 + t_n t_{n+1}) / (c^2 + t_{n+1}^2)``: one Euler step with the exact denoiser gives these
    factors, and their product has the known first-order error."""
    grid = grids.karras(EDM(), n - 1)
    t, s = grid[:-1], grid[1:]
    factors = ddim_step(gaussian(), torch.ones(n - 1, 1, dtype=torch.float64), t, s)[:, 0]
    torch.testing.assert_close(factors, (C**2 + t * s) / (C**2 + t**2), rtol=1e-12, atol=0)
    exact = math.sqrt((C**2 + 0.002**2) / (C**2 + 80.0**2))
    assert 100 * (float(factors.prod()) / exact - 1) == pytest.approx(percent, rel=2e-3)


def test_training_shares_the_noise() -> None:
    """CT's two states share data and noise: the regression of ``x_s`` on ``x_t`` has the slope of an Euler step."""
    n, t, s = 200_000, torch.tensor(0.9, dtype=torch.float64), torch.tensor(0.6, dtype=torch.float64)
    batch = Batch(C * torch.randn(n, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), None, Rng(2))
    method = ConsistencyTraining()
    nets = Networks({"student": ExactFlowMap(gaussian())}, {})
    z = batch.rng.normal(n, 1, dtype=torch.float64)
    x_t = batch.x + t * z
    x_s = method.partner(nets, batch, x_t, z, t.expand(n), s.expand(n))
    slope = float((x_s * x_t).mean() / x_t.square().mean())
    expected = float((C**2 + t * s) / (C**2 + t**2))
    residual = (x_s - expected * x_t).std() / x_t.std() / n**0.5
    assert abs(slope - expected) < 5 * float(residual)


def test_loss_vanishes_at_the_exact_non_linear_consistency_function() -> None:
    """On a three-mode mixture the exact consistency function has a loss of the order of the squared Heun error, which
    falls by 2^(2 x 3) when the grid is halved; a shifted function does not."""
    world = three_modes(EDM(0.02, 20.0))
    exact = ExactFlowMap(world)

    def loss(n: int, model: FlowMap) -> float:
        nets = Networks({"student": model, "target": exact, "teacher": world, "distance": Plain(l2)}, {})
        batch = Batch(world.sample(512, Rng(3)), None, Rng(4))
        (update,) = ConsistencyDistillation(grid_times=n).updates(nets, batch, Progress())
        return float(update.loss)

    class Shifted(FlowMap):
        def forward(self, x, t, s, cond=None):
            return exact(x, t, s, cond) + 0.01

    coarse, fine = loss(65, exact), loss(129, exact)
    assert fine < coarse / 40 and fine < 1e-9
    assert loss(129, Shifted(world.schedule, world.shape, None)) == pytest.approx(1e-4, rel=1e-2)


def test_grid_and_target_decay_of_training() -> None:
    """N(k) runs from s0 to s1 + 1 and mu(k) follows it with N - 1, as in the official code."""
    method = ConsistencyTraining()
    sizes = [method.scales(Progress(fraction=f)) for f in (0.0, 0.25, 0.5, 1.0)]
    assert sizes == [2, 76, 107, 151]
    assert method.target_decay(Progress(fraction=0.0)) == pytest.approx(0.9**2)
    assert method.target_decay(Progress(fraction=1.0)) == pytest.approx(0.9 ** (2 / 150))


def test_both_calls_see_the_same_dropout_mask() -> None:
    """With equal states, equal weights and dropout, the loss is exactly zero."""
    torch.manual_seed(0)
    net = UNet((1, 8, 8), (16,), 1, 32, None, dropout=0.5)
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    model = EDMConsistency(NetworkDenoiser(net, EDM(), EDMPrediction(), (1, 8, 8))).train()
    x, t = torch.randn(4, 1, 8, 8), torch.full((4,), 2.0, dtype=torch.float64)
    loss = consistency_loss(model, model, Batch(x, None, Rng(0)), x, x, t, t, l2)
    assert float(loss.detach().abs().max()) == 0.0
    assert not torch.equal(model.to_data(x, t), model.to_data(x, t))  # the masks do differ from call to call


@pytest.mark.parametrize("method", [ConsistencyDistillation(mu=0.5), ConsistencyTraining()])
def test_the_target_network_drops_what_the_student_drops(method) -> None:
    """The target of a method's own networks is in training mode like the student, so that equal states under equal
    weights have a loss of zero with dropout too; the teacher is not."""
    torch.manual_seed(0)
    net = UNet((1, 8, 8), (16,), 1, 32, None, dropout=0.5)
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    nets = method.networks(Start(NetworkDenoiser(net, EDM(), EDMPrediction(), (1, 8, 8)).eval()))
    x, t = torch.randn(4, 1, 8, 8), torch.full((4,), 2.0, dtype=torch.float64)
    loss = consistency_loss(nets.student, nets.target, Batch(x, None, Rng(0)), x, x, t, t, l2)
    assert float(loss.detach().abs().max()) == 0.0
    assert not torch.equal(nets.target.to_data(x, t), nets.target.to_data(x, t))
    assert not any(p.requires_grad for p in nets.target.parameters())
    if "teacher" in dict(nets.named_children()):
        assert torch.equal(nets.teacher(x, t), nets.teacher(x, t))


def test_target_follows_with_mu() -> None:
    """The target network is ``mu target + (1 - mu) student`` after an update, and moves once."""
    teacher = NetworkDenoiser(MLP((2,), 16, 1), EDM(), EDMPrediction(), (2,))
    nets = ConsistencyDistillation(mu=0.95).networks(Start(teacher))
    first = [p.clone() for p in nets.target.parameters()]
    for p in nets.student.parameters():
        p.data += 1.0
    (update,) = ConsistencyDistillation(mu=0.95).updates(nets, Batch(torch.randn(8, 2), None, Rng(0)), Progress())
    update.loss.backward()
    assert all(p.grad is None for p in [*nets.target.parameters(), *nets.teacher.parameters()])
    update.then()
    for p, q in zip(first, nets.target.parameters(), strict=True):
        torch.testing.assert_close(q, p + 0.05)
    follow(nets.target, nets.student, 0.0)
    for p, q in zip(nets.student.parameters(), nets.target.parameters(), strict=True):
        assert torch.equal(p, q)


def test_pseudo_huber_limits() -> None:
    """Pseudo-Huber is ``||.||^2 / 2c`` for small and ``||.|| - c`` for large differences, per sample."""
    d = 64
    c = 0.00054 * d**0.5
    direction = torch.ones(1, d, dtype=torch.float64) / d**0.5
    small, large = 1e-3 * c, 1e3 * c
    zero = torch.zeros(1, d, dtype=torch.float64)
    assert float(pseudo_huber(small * direction, zero)) == pytest.approx(small**2 / (2 * c), rel=1e-5)
    assert float(pseudo_huber(large * direction, zero)) == pytest.approx(large - c, rel=1e-5)


@pytest.mark.parametrize("schedule", [FlowMatching(), TrigFlow(sigma_data=0.7), EDM(0.01, 50.0)])
def test_edm_frame_of_any_teacher(schedule) -> None:
    """The student's frame covers the teacher's noise levels, at most 0.002 to 80."""
    frame = edm_like(schedule)
    ends = schedule.ratio(torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64))
    assert frame.t_min == pytest.approx(max(0.002, float(ends[0]))) and frame.t_max == pytest.approx(
        min(80.0, float(ends[1]))
    )


def test_student_starts_as_the_teacher() -> None:
    """Away from t_min the untrained student is the teacher's denoiser (to the ratio eps / t)."""
    torch.manual_seed(0)
    net = MLP((2,), 16, 1)
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    teacher: Denoiser = NetworkDenoiser(net, EDM(), EDMPrediction(), (2,))
    nets = ConsistencyDistillation().networks(Start(teacher))
    x = 80 * torch.randn(16, 2)
    torch.testing.assert_close(nets.student.to_data(x, 80.0), teacher(x, 80.0), atol=2e-3, rtol=0)


def test_training_from_data_keeps_no_teacher() -> None:
    """A frozen network that no loss calls would take a third of the memory; distillation has one."""
    start = Start(NetworkDenoiser(MLP((2,), 8, 1), EDM(), TrigPrediction(), (2,)))
    for method, held in (
        (ConsistencyDistillation(), True), (ConsistencyTraining(), False),
        (ContinuousConsistencyDistillation(), True), (ContinuousConsistencyTraining(), False),
    ):  # fmt: skip
        assert ("teacher" in dict(method.networks(start).named_children())) is held
