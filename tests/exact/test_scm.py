"""sCM: the tangent against closed forms and differences, and the fixed point of training."""

from __future__ import annotations

import pytest
import torch

from fewstep.denoisers import Denoiser, NetworkDenoiser
from fewstep.exact import Gaussian, three_modes
from fewstep.flow_maps import Jump
from fewstep.methods.consistency.scm import (
    ContinuousConsistencyDistillation,
    ContinuousConsistencyTraining,
)
from fewstep.methods.method import Batch, Networks, Progress
from fewstep.methods.parts.identities import eulerian, normalize
from fewstep.methods.start import Start
from fewstep.networks import MLP, UNet
from fewstep.networks.parts import Dropout
from fewstep.predictions import TrigPrediction
from fewstep.randomness import Rng
from fewstep.schedules import TrigFlow
from fewstep.tangents import finite_difference, tangent

SD = 0.5
SCHEDULE = TrigFlow(t_max=1.56, sigma_data=SD)


class ExactConsistency(Denoiser):
    """The consistency function of N(0, c^2) as a "denoiser": ``f = c / sqrt(V) x``, so that the student's F is
    ``F* = (cos t - c / sqrt(V)) x / (sd sin t)``, ``V = c^2 cos^2 + sd^2 sin^2``."""

    def __init__(self, c: float) -> None:
        super().__init__(SCHEDULE, (3,), None)
        self.c = c

    def forward(self, x, t, cond=None):
        v = self.c**2 * torch.cos(t) ** 2 + SD**2 * torch.sin(t) ** 2
        return (self.c / v.sqrt())[:, None] * x


def random_student() -> NetworkDenoiser:
    torch.manual_seed(0)
    net = MLP((3,), 32, 2).double()
    for p in net.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return NetworkDenoiser(net, SCHEDULE, TrigPrediction(sigma_data=SD), (3,))


def states(n: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    t = 0.02 + 1.5 * torch.rand(n, generator=generator, dtype=torch.float64)
    return SD * torch.randn(n, 3, generator=generator, dtype=torch.float64), t


def consistency_tangent(denoiser, x, t, v, warmup=1.0):
    """The student's ``F^-`` and the paper's ``G``, from the identity at ``s = 0``."""
    own, g = eulerian(Jump(denoiser), x, t, torch.zeros_like(t), v, r=warmup, scale=t.cos())
    return own / denoiser.schedule.sigma_data, -g


@pytest.mark.parametrize("c", [SD, 0.2, 1.3])
def test_tangent_is_zero_at_the_exact_solution(c: float) -> None:
    """At F* of a Gaussian and the exact trajectory velocity, G is 0 to rounding; at a perturbed F it is not."""
    x, t = states()
    world = Gaussian(SCHEDULE, torch.zeros(3, dtype=torch.float64), c**2)
    v = world.velocity(x, t)
    _, g = consistency_tangent(ExactConsistency(c), x, t, v)
    assert float(g.abs().max()) < 1e-12
    _, off = consistency_tangent(ExactConsistency(1.05 * c), x, t, v)
    assert float(off.abs().max()) > 1e-3


def test_tangent_is_zero_at_the_quantile_map_of_a_mixture() -> None:
    """The same where the exact consistency function is not linear: three modes in one dimension, at 8 times."""
    schedule = TrigFlow(t_max=1.56, sigma_data=1.0)
    world = three_modes(schedule)

    class Quantiles(Denoiser):
        """The consistency function, moved by ``shift sin t``."""

        shift = 0.0

        def forward(self, x, t, cond=None):
            return world.flow(x, t, 0.0) + self.shift * t.sin()[:, None]

    levels = torch.linspace(0.1, 1.5, 8, dtype=torch.float64)
    z = torch.special.ndtri((torch.arange(16, dtype=torch.float64) + 0.5) / 16)[:, None]
    x, t = torch.cat([world.flow(z, schedule.t_max, float(level)) for level in levels]), levels.repeat_interleave(16)
    model, v = Quantiles(schedule, (1,), None), world.velocity(x, t)
    assert float(consistency_tangent(model, x, t, v)[1].abs().max()) < 1e-12
    model.shift = 0.01
    assert float(consistency_tangent(model, x, t, v)[1].abs().max()) > 5e-3


def test_whitened_gaussian_has_the_known_solution() -> None:
    """For c = sigma_data the velocity is 0 and ``F* = -tan(t / 2) x / sd``."""
    x, t = states()
    f, _ = consistency_tangent(ExactConsistency(SD), x, t, torch.zeros_like(x))
    torch.testing.assert_close(f, -torch.tan(t / 2)[:, None] * x / SD, atol=1e-12, rtol=0)


def test_tangent_equals_cos_t_times_df_dt() -> None:
    """For a random network, G is ``cos t df/dt`` along (v, 1), by central differences of f itself."""
    student, (x, t) = random_student(), states()
    v = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    _, g = consistency_tangent(student, x, t, v)
    _, slope = finite_difference(lambda x_, t_: student(x_, t_), x, t, v, torch.ones_like(t), step=1e-5)
    torch.testing.assert_close(g, t.cos()[:, None] * slope, atol=2e-8, rtol=1e-6)


def test_jvp_equals_finite_difference_for_the_networks() -> None:
    """The forward-mode pass through our networks is their directional derivative."""
    student, (x, t) = random_student(), states()
    dx, dt = torch.ones_like(x), 0.3 * torch.ones_like(t)
    value, exact = tangent(student.forward, x, t, dx, dt)
    again, difference = finite_difference(student.forward, x, t, dx, dt, step=1e-5)
    torch.testing.assert_close(value, again, atol=0, rtol=0)
    torch.testing.assert_close(exact, difference, atol=2e-8, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_jvp_of_the_unet_equals_its_difference(dtype: torch.dtype) -> None:
    """Channels-last pictures, attention and group norms have a forward-mode derivative, in both precisions, and the
    call without one gives the same value."""
    torch.manual_seed(1)
    net = UNet((1, 8, 8), (16, 16), 1, 32, 3).to(dtype)
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    model = NetworkDenoiser(net, SCHEDULE, TrigPrediction(sigma_data=SD), (1, 8, 8), 3)
    x, dx = (torch.randn(3, 1, 8, 8, dtype=dtype, generator=torch.Generator().manual_seed(k)) for k in (2, 3))
    t = torch.tensor([0.2, 0.7, 1.4], dtype=torch.float64)
    cond = torch.arange(3)

    def field(x_, t_):
        return model.velocity(x_, t_, cond)

    value, slope = tangent(field, x, t, dx, torch.ones_like(t))
    exact = model.double()
    plain, difference = finite_difference(
        lambda x_, t_: exact.velocity(x_, t_, cond), x.double(), t, dx.double(), torch.ones_like(t), step=1e-5
    )
    # float32: rounding of a velocity of size 1 divided by sin t, and its derivative by another sin t
    tolerance = 1e-6 if dtype == torch.float64 else 2e-4
    torch.testing.assert_close(value.double(), plain, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(slope.double(), difference, atol=tolerance, rtol=tolerance)


def test_without_warmup_share_the_update_is_velocity_matching() -> None:
    """At r = 0 the target direction is ``-cos^2 t (sd F - v)``: plain velocity matching with weight cos^2."""
    student, (x, t) = random_student(), states()
    v = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    f, g = consistency_tangent(student, x, t, v, warmup=0.0)
    torch.testing.assert_close(g, -(t.cos() ** 2)[:, None] * (SD * f - v), atol=1e-14, rtol=0)


def test_normalised_tangent_makes_the_loss_constant() -> None:
    """The squared error is ``(||G|| / (||G|| + c))^2`` whatever the network: only its gradient says something."""
    _, g = consistency_tangent(random_student(), *states(), torch.zeros(64, 3, dtype=torch.float64))
    norm = torch.linalg.vector_norm(g, dim=1)
    torch.testing.assert_close(torch.linalg.vector_norm(normalize(g, 0.1), dim=1), norm / (norm + 0.1))

    method = ContinuousConsistencyDistillation(sigma_data=SD, tangent_warmup=0.0)
    teacher = random_student()
    nets = method.networks(Start(teacher))
    batch = Batch(torch.randn(32, 3, dtype=torch.float64), None, Rng(0))
    (update,) = method.updates(nets, batch, Progress())
    assert 0 < float(update.loss.detach()) < 1 / 3  # w = 0 at the start; mean over d = 3 of a squared norm below 1
    update.loss.backward()
    assert all(p.grad is None for p in nets.teacher.parameters())
    assert any(float(p.grad.abs().max()) > 0 for p in nets.student.parameters())


def test_the_tangent_and_the_forward_pass_see_the_same_dropout_mask() -> None:
    """With a huge c the loss is ``mean (F - F^-)^2``: 0 in training mode only if both drew the same masks."""
    torch.manual_seed(0)
    net = UNet((1, 8, 8), (16,), 1, 32, None, dropout=0.5)
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    teacher = NetworkDenoiser(net, SCHEDULE, TrigPrediction(sigma_data=SD), (1, 8, 8))
    nets = ContinuousConsistencyDistillation(sigma_data=SD, c=1e12).networks(Start(teacher)).train()
    batch = Batch(torch.randn(4, 1, 8, 8), None, Rng(0))
    (update,) = ContinuousConsistencyDistillation(sigma_data=SD, c=1e12).updates(nets, batch, Progress())
    assert float(update.loss.detach()) < 1e-12
    x, t = torch.randn(4, 1, 8, 8), torch.full((4,), 1.0, dtype=torch.float64)
    assert not torch.equal(nets.student.to_data(x, t), nets.student.to_data(x, t))  # the masks do differ


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_dropout_keeps_the_mean_and_repeats_in_any_memory_layout(p: float) -> None:
    """The share 1 - p is kept and scaled up, all or nothing at the ends, with one mask for both layouts and a jvp."""
    dropout, x = Dropout(p).train(), torch.ones(8, 16, 16, 16)
    made = []
    for layout in (torch.contiguous_format, torch.channels_last):
        state = x.to(memory_format=layout)
        for call in (dropout, lambda y: torch.func.jvp(dropout, (y,), (y,))[0]):
            torch.manual_seed(0)
            made.append(call(state))
    assert all(torch.equal(made[0], other) for other in made[1:])
    assert set(made[0].unique().tolist()) == {0.0: {1.0}, 0.5: {0.0, 2.0}, 1.0: {0.0}}[p]
    assert float(made[0].mean()) == pytest.approx(float(p < 1), abs=5 * (x.numel() ** -0.5))
    assert torch.equal(dropout.eval()(x), x)


class Polynomial(Denoiser):
    """``F(x, t) = b(t) x / sd`` with ``b`` an odd-and-even polynomial without constant."""

    def __init__(self, degree: int = 8) -> None:
        super().__init__(SCHEDULE, (1,), None)
        t = torch.linspace(1e-3, 1.45, 400, dtype=torch.float64)
        q, r = torch.linalg.qr(torch.stack([t**k for k in range(1, degree + 1)], 1))
        self.register_buffer("change", torch.linalg.inv(r) * q.shape[0] ** 0.5)
        self.b = torch.nn.Parameter(torch.zeros(degree, dtype=torch.float64))

    def gain(self, t):
        return torch.stack([t**k for k in range(1, len(self.b) + 1)], -1) @ self.change @ self.b

    def forward(self, x, t, cond=None):
        return (torch.cos(t) - torch.sin(t) * self.gain(t))[:, None] * x


def test_training_reaches_the_known_solution_of_the_whitened_gaussian() -> None:
    """Gradient descent on ``||F - sg F - sg G||^2`` with the exact velocity takes b to -tan(t/2), to the 6.9e-7 that a
    polynomial of degree 8 leaves on [1e-3, 1.45]."""
    student = Polynomial()
    t = torch.linspace(1e-3, 1.45, 64, dtype=torch.float64)
    x = torch.full((64, 1), SD, dtype=torch.float64)
    optimiser = torch.optim.SGD(student.parameters(), lr=0.05)
    for _ in range(1200):
        f_minus, g = consistency_tangent(student, x, t, torch.zeros_like(x))
        f = student.velocity(x, t) / SD
        loss = (f - f_minus - g).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert float((student.gain(t) + torch.tan(t / 2)).detach().abs().max()) < 1e-6


def test_training_from_data_uses_the_pair_velocity() -> None:
    """sCT's velocity is ``cos t z - sin t x_0`` with z of standard deviation sigma_data."""
    x, t = states(8)
    z = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    student = ContinuousConsistencyDistillation(sigma_data=SD).networks(Start(random_student())).student
    nets = Networks({"student": student}, {})
    v = ContinuousConsistencyTraining(sigma_data=SD).trajectory_velocity(nets, Batch(x, None, Rng(0)), x, z, t)
    torch.testing.assert_close(v, t.cos()[:, None] * SD * z - t.sin()[:, None] * x)
