"""DMD: its gradient, its fixed point with the regression, its two sources, and DMD2 as what is left without pairs."""

from __future__ import annotations

import os
import signal
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fewstep.data import Dataset, Prior
from fewstep.denoisers import Guided, NetworkDenoiser, TrigPrediction
from fewstep.exact import Gaussian
from fewstep.flow_maps import FlowMap
from fewstep.methods.matching import dmd
from fewstep.methods.matching.dmd import DMD
from fewstep.methods.matching.dmd2 import DMD2
from fewstep.methods.method import Batch, Networks, Optimizer, Progress
from fewstep.methods.parts.distances import Plain, l2
from fewstep.methods.parts.distribution_matching import critic_loss, matching_loss
from fewstep.methods.parts.score_matching import matching_vector
from fewstep.methods.parts.stores import Pairs, made_now, solve_heun
from fewstep.methods.start import Start
from fewstep.networks import MLP, UNet
from fewstep.randomness import Rng
from fewstep.runs.course import run_recipe
from fewstep.schedules import EDM, FlowMatching, TrigFlow, VPLinear, align
from fewstep.training.budget import Budget
from fewstep.training.trainer import Interrupted, Settings

F64 = torch.float64
SHAPE = (1, 8, 8)


def teacher_network(kind: str = "mlp", classes: int | None = 3) -> NetworkDenoiser:
    torch.manual_seed(0)
    net = MLP(SHAPE, 16, 1, classes) if kind == "mlp" else UNet(SHAPE, (16, 16), 1, 32, classes)
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return NetworkDenoiser(net, TrigFlow(sigma_data=0.7), TrigPrediction(sigma_data=0.7), SHAPE, classes)


def batch_of(n: int = 6, seed: int = 0, dtype: torch.dtype = torch.float32) -> Batch:
    """Fresh samples, and pairs with labels of their own."""
    rng, other = Rng(seed), Rng(seed, "pairs")
    noise, y = (other.normal(n, *SHAPE, dtype=dtype) for _ in range(2))
    pairs = Batch(y, (torch.arange(n) + 1) % 3, rng, {"noise": noise})
    return Batch(rng.normal(n, *SHAPE, dtype=dtype), torch.arange(n) % 3, rng, of={"pairs": pairs})


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def moved(module: nn.Module) -> float:
    """The largest gradient that a backward pass has left in a module."""
    return max((float(p.grad.abs().max()) for p in module.parameters() if p.grad is not None), default=0.0)


# --- without the regression it is DMD2 without its additions -----------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_without_regression_it_is_dmd2_bit_for_bit(dtype: torch.dtype, guidance: float) -> None:
    """The losses and gradients of both updates, from the same draws, with a critic away from the teacher."""
    found = []
    for method in (
        DMD(regression_weight=0.0, guidance=guidance),
        DMD2(gan_weight=0.0, critic_steps=1, guidance=guidance),
    ):
        nets = method.networks(Start(teacher_network("unet"))).to(dtype)
        for p in nets.critic.parameters():
            p.data += 0.05
        for update in method.updates(nets, batch_of(dtype=dtype), Progress(step=7)):
            update.loss.backward()
            gradients = [p.grad for p in nets.group_parameters(update.group) if p.grad is not None]
            found.append((update.group, update.loss.detach(), torch.cat([g.flatten() for g in gradients])))
    for (group, loss, gradient), (group_2, loss_2, gradient_2) in zip(found[:2], found[2:], strict=True):
        assert group == group_2 and loss.dtype == dtype and float(gradient.abs().max()) > 0
        assert torch.equal(loss, loss_2) and torch.equal(gradient, gradient_2)


def test_without_regression_a_whole_run_is_dmd2s() -> None:
    """Optimisers, rates and averages too; and with it, it is another one."""
    data = Dataset("any", torch.randn(12, *SHAPE), torch.arange(12) % 3)

    def run(method: DMD | DMD2) -> Tensor:
        settings = Settings(Budget(5), batch=4, precision="fp32")
        return weights(run_recipe(method, teacher_network(), data, settings, show=False).model)

    plain = run(DMD2(gan_weight=0.0, critic_steps=1))
    assert torch.equal(run(DMD(regression_weight=0.0)), plain)
    assert not torch.equal(run(DMD(pairs=8, ode_steps=2)), plain)


# --- the gradient ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [EDM(), FlowMatching(), VPLinear(), TrigFlow(sigma_data=0.7)])
def test_the_generators_gradient_is_that_of_the_reverse_kl(schedule) -> None:
    """Of ``x = b + a z`` with exact scores: the mean of ``alpha (s_critic - s_teacher) dx`` is d KL in b and in a, by
    automatic differentiation of the closed form, with ``s_critic - s_teacher = alpha / sigma^2`` times the vector
    without its normaliser."""
    m, s, b, a = 0.4, 0.7, -0.3, 0.5
    teacher = Gaussian(schedule, torch.full((1,), m, dtype=F64), s**2)
    critic = Gaussian(schedule, torch.full((1,), b, dtype=F64), a**2)
    t = torch.tensor(0.8 if isinstance(schedule, EDM) else 0.4 * schedule.t_max, dtype=F64)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    # all signs of z and eps make the means exact, because the scores are affine
    z, eps = (torch.tensor(signs, dtype=F64)[:, None] for signs in zip(*product((-1.0, 1.0), repeat=2), strict=True))
    shift, slope = (torch.tensor(value, dtype=F64, requires_grad=True) for value in (b, a))
    x = shift + slope * z
    times = t.expand(4)
    x_t = schedule.add_noise(x.detach(), eps, times)
    real = teacher(x_t, times)
    g = matching_vector(x.detach(), x_t, times, teacher, critic) * (x.detach() - real).abs()
    (alpha * (alpha / sigma**2 * g) * x).mean().backward()

    shift_, slope_ = (torch.tensor(value, dtype=F64, requires_grad=True) for value in (b, a))
    variance_q, variance_p = alpha**2 * slope_**2 + sigma**2, alpha**2 * s**2 + sigma**2
    kl = (variance_q + alpha**2 * (shift_ - m) ** 2) / (2 * variance_p) + (variance_p / variance_q).log() / 2
    kl.backward()
    torch.testing.assert_close(shift.grad, shift_.grad, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(slope.grad, slope_.grad, atol=1e-12, rtol=1e-10)


def test_the_loss_moves_samples_along_the_normalised_vector() -> None:
    """The gradient in x is ``(D_critic - D_teacher) / mean|x - D_teacher| / numel``, the mean over all of a sample."""
    teacher, critic = teacher_network(), teacher_network("unet")
    x = Rng(1).normal(5, *SHAPE).requires_grad_()
    cond = torch.arange(5) % 3
    loss, logs = matching_loss(x, teacher, critic, cond, Rng(2))
    loss.backward()
    again = Rng(2)
    schedule = teacher.schedule
    t = schedule.own_time(again.uniform(5, low=0.02, high=0.98))
    with torch.no_grad():
        x_t = schedule.add_noise(x, again.normal_like(x), t)
        real = teacher(x_t, t, cond)
        scale = torch.stack([(x[k] - real[k]).abs().mean() for k in range(5)])
        g = (critic(x_t, t, cond) - real) / align(scale, x)
    torch.testing.assert_close(x.grad, g / x.numel(), rtol=1e-5, atol=1e-9)
    assert float(logs["matching_norm"]) == pytest.approx(float(g.square().mean().sqrt()), rel=1e-5)


class Linear(FlowMap):
    """``x = b + A z`` of a generator's noise, ``A`` a matrix."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__(EDM(), (2,), None)
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)

    def forward(self, x, t, s, cond=None):
        return (x / self.schedule.t_max) @ self.a.T + self.b


def fitted(regression_weight: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Matrix and mean of a linear generator fitted to a Gaussian with the exact critic of its own law, from a start
    turned by 50 degrees; then the covariance, and the exact map's matrix."""
    mean = torch.tensor([0.7, -0.3], dtype=F64)
    covariance = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=F64)
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors @ values.sqrt().diag() @ vectors.T
    turn = torch.tensor(50.0).deg2rad().double()
    rotation = torch.stack([torch.stack([turn.cos(), -turn.sin()]), torch.stack([turn.sin(), turn.cos()])])
    method = DMD(regression_weight=regression_weight)
    teacher = Gaussian(EDM(), mean, covariance)
    student = Linear(rotation, torch.zeros(2, dtype=F64))
    group = Optimizer(("student",), 1e-2)
    follower = Optimizer(("critic",), 1e-2)
    optimiser = torch.optim.Adam(student.parameters(), lr=2e-2, betas=(0.0, 0.999))
    steps = 400
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 2e-2 * (1 - step / steps)
        law = Gaussian(EDM(), student.b.detach(), (student.a @ student.a.T).detach())
        nets = Networks(
            {"student": student, "critic": law, "teacher": teacher, "distance": Plain(l2)},
            {"student": group, "critic": follower},
        )
        rng = Rng(0, step)
        z = Rng(1, step).normal(64, 2, dtype=F64)
        pairs = Batch(mean + z @ root.T, None, rng, {"noise": z})
        batch = Batch(torch.zeros(64, 2, dtype=F64), None, rng, of={"pairs": pairs})
        update = next(method.updates(nets, batch, Progress(step)))
        optimiser.zero_grad()
        update.loss.backward()
        optimiser.step()
    return student.a.detach(), student.b.detach() - mean, covariance, root


def test_the_regression_picks_the_teachers_own_map() -> None:
    """Both terms vanish at the exact map, so that its fit is exact.  Matching alone fits the law as well, by another
    map: it knows no noise from any other."""
    a, off, covariance, root = fitted(0.25)
    assert float(off.norm()) < 1e-5 and float((a - root).norm()) < 1e-5
    a, off, covariance, root = fitted(0.0)
    assert float(off.norm()) < 1e-5 and float((a @ a.T - covariance).norm()) < 1e-5
    assert float((a - root).norm()) > 0.3


# --- who moves, and on what --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mlp", "unet"])
@pytest.mark.parametrize("match_pairs", [False, True])
def test_each_update_reaches_its_own_network_only(kind: str, match_pairs: bool) -> None:
    """The student first, then the critic, on the same samples; the critic always moves."""
    method = DMD(match_pairs=match_pairs, distance="features:digits")
    nets = method.networks(Start(teacher_network(kind)))
    for step in (0, 1):
        nets.zero_grad(set_to_none=True)
        updates = method.updates(nets, batch_of(), Progress(step))
        first = next(updates)
        assert first.group == "student"
        first.loss.backward()
        assert moved(nets.student) > 0 and moved(nets.critic) == moved(nets.teacher) == moved(nets.distance) == 0
        nets.zero_grad(set_to_none=True)
        second = next(updates)
        assert second.group == "critic"
        second.loss.backward()
        assert moved(nets.critic) > 0 and moved(nets.student) == moved(nets.teacher) == 0
        assert next(updates, None) is None


def test_the_pairs_have_noise_and_conditions_of_their_own() -> None:
    """The student is called on fresh noise for the matching and on the pairs' for the regression, each under its own
    conditions, and the fresh samples do not depend on the pairs."""
    method = DMD()
    nets = method.networks(Start(teacher_network()))
    schedule = nets.student.schedule
    seen: list[tuple[Tensor, Tensor]] = []
    nets.student.denoiser.net.register_forward_hook(lambda module, given, out: seen.append((given[0], given[2])))
    batch, again = batch_of(), batch_of()
    next(method.updates(nets, batch, Progress()))
    again.rng.shared_integer(0, 1)
    for (x, cond), noise, labels in zip(
        seen, (again.normal(), batch.of["pairs"].column("noise")), (batch.cond, batch.of["pairs"].cond), strict=True
    ):
        torch.testing.assert_close(x / x.std(), schedule.prior(noise) / schedule.prior(noise).std())
        assert torch.equal(cond, labels)
    assert not torch.equal(seen[0][0], seen[1][0])


def test_the_loss_is_the_sum_of_its_terms() -> None:
    """Matching on the fresh samples, or with ``match_pairs`` the mean over both kinds, plus the weighted distance of
    what the student makes of the pairs' noise from the teacher's output."""
    teacher = teacher_network()
    for match_pairs in (False, True):
        method = DMD(regression_weight=0.7, match_pairs=match_pairs, distance="l1")
        nets = method.networks(Start(teacher))
        for p in nets.critic.parameters():
            p.data += 0.05
        update = next(method.updates(nets, batch_of(), Progress()))
        batch = batch_of()
        pairs = batch.of["pairs"]
        batch.rng.shared_integer(0, 1)
        with torch.no_grad():
            x, made = (
                nets.student.to_data(teacher.schedule.prior(z), teacher.schedule.t_max, c)
                for z, c in ((batch.normal(), batch.cond), (pairs.column("noise"), pairs.cond))
            )
            matching, _ = matching_loss(x, teacher, nets.critic, batch.cond, batch.rng)
            if match_pairs:
                matching = (matching + matching_loss(made, teacher, nets.critic, pairs.cond, batch.rng)[0]) / 2
            regression = (made - pairs.x).abs().mean()
        torch.testing.assert_close(update.logs["regression"], regression)
        torch.testing.assert_close(update.loss.detach(), matching + 0.7 * regression)


def test_the_pairs_are_the_teachers_own() -> None:
    """The second source holds the guided teacher's deterministic output for its noise, under the data's conditions in
    turn; without the regression there is none."""
    teacher = teacher_network()
    data = Dataset("any", torch.zeros(5, *SHAPE), torch.tensor([2, 0, 1, 1, 0]))
    start = Start(teacher, data, seed=3)
    sources = DMD(pairs=7, ode_steps=4, guidance=2.0).sources(start)
    pairs = sources["pairs"].rows(slice(None))
    assert sources["data"] is data and torch.equal(pairs.cond, data.labels[torch.arange(7) % 5])
    expected = solve_heun(Guided(teacher, 2.0), pairs.columns["noise"], 4, pairs.cond)
    torch.testing.assert_close(pairs.x, expected)
    assert torch.equal(pairs.x, made_now(Pairs(Guided(teacher, 2.0), 7, 4, pairs.cond), 3).x)
    assert [*DMD(regression_weight=0).sources(start)] == ["data"]


def test_guidance_is_the_teachers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matching is given the guided teacher and the plain critic; a teacher without classes cannot be guided."""
    given: list[object] = []

    def spy(x, teacher, critic, cond, rng):
        given.extend((teacher, critic))
        return matching_loss(x, teacher, critic, cond, rng)

    monkeypatch.setattr(dmd, "matching_loss", spy)
    nets = DMD(guidance=3.0).networks(Start(teacher_network()))
    next(DMD(guidance=3.0).updates(nets, batch_of(), Progress()))
    assert isinstance(given[0], Guided) and given[0].scale == 3.0 and given[1] is nets.critic
    with pytest.raises(ValueError, match="guidance=3: this teacher is unconditional"):
        DMD(guidance=3.0, pairs=2).sources(Start(teacher_network(classes=None), Prior(SHAPE)))


def test_no_data_are_needed() -> None:
    """The weights are the same bit for bit whatever the pictures are, and without any."""
    labels = torch.arange(12) % 3
    made = []
    for data in (
        Dataset("any", torch.zeros(12, *SHAPE), labels),
        Dataset("any", torch.randn(12, *SHAPE), labels),
        Prior(SHAPE, labels, "any"),
    ):
        settings = Settings(Budget(4), batch=4, precision="fp32")
        made.append(weights(run_recipe(DMD(pairs=8, ode_steps=2), teacher_network(), data, settings, show=False).model))
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])
    assert not torch.equal(made[0], weights(teacher_network()))


def test_accumulation_changes_nothing() -> None:
    """In two or four parts, each with its rows of both sources, the weights agree but for rounding."""
    data = Dataset("any", torch.zeros(10, *SHAPE), torch.arange(10) % 3)

    def run(accumulate: int) -> Tensor:
        settings = Settings(Budget(4), batch=8, precision="fp32", accumulate=accumulate)
        method = DMD(pairs=12, ode_steps=2, match_pairs=True)
        return weights(run_recipe(method, teacher_network(), data, settings, show=False).model)

    whole = run(1)
    for parts in (2, 4):
        torch.testing.assert_close(run(parts), whole, atol=2e-5, rtol=0)


def test_a_killed_run_goes_on_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after three of six steps and started again, its pairs on disk: the weights, bit for bit."""
    data = Dataset("any", torch.zeros(10, *SHAPE), torch.arange(10) % 3)
    method = DMD(pairs=12, ode_steps=2, warmup=0)
    settings = Settings(Budget(6), batch=4, precision="fp32")

    def run(folder: Path | None) -> Tensor:
        return weights(run_recipe(method, teacher_network(), data, settings, folder, show=False).model)

    losses: list[Tensor] = []

    def killing(*given):
        losses.append(critic_loss(*given))
        if len(losses) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return losses[-1]

    monkeypatch.setattr(dmd, "critic_loss", killing)
    with pytest.raises(Interrupted, match="stopped after 3 steps"):
        run(tmp_path)
    assert torch.equal(run(tmp_path), run(None)) and len(losses) == 3 + 3 + 6


def test_one_call_at_the_noisiest_time_is_the_student() -> None:
    method = DMD()
    nets = method.networks(Start(teacher_network()))
    made = method.student(nets)
    assert [*made.plans] == [1] and made.plans[1].times == (nets.student.schedule.t_max,)
    noise, cond = Rng(0).normal(4, *SHAPE), torch.arange(4) % 3
    schedule = nets.student.schedule
    assert torch.equal(made(noise, cond), nets.student.to_data(schedule.prior(noise), schedule.t_max, cond))
