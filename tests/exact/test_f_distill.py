"""f-distill: the gradients of all divergences by quadrature, the two means, the ratio's direction, and what covers."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.data import Dataset
from fewstep.denoisers import NetworkDenoiser
from fewstep.exact import Gaussian, Mixture1D
from fewstep.methods.matching.f_distill import DIVERGENCES, FDistill, Name, ratio_of, relative_ratio
from fewstep.methods.method import Batch, Progress, Question, Update, alone
from fewstep.methods.parts.adversary import Adversary, Discriminator
from fewstep.methods.parts.score_matching import TwoScores, by_noise, surrogate, weighted_difference
from fewstep.methods.parts.times import Own, Segments
from fewstep.methods.start import Start
from fewstep.networks import MLP, UNet
from fewstep.networks.taps import bottleneck
from fewstep.predictions import TrigPrediction
from fewstep.randomness import Rng
from fewstep.schedules import EDM, FlowMatching, Schedule, TrigFlow, VPLinear
from fewstep.training.budget import Budget
from fewstep.training.settings import Settings
from fewstep.training.trainer import Interrupted, Run, train

F64 = torch.float64
NAMES = tuple(DIVERGENCES)
ADAMW = {
    "kind": "adamw", "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "clip": 10.0, "warmup": 0,
    "decay": "constant",
}  # fmt: skip
# NVlabs/FastGen, configs/methods/config_f_distill.py and configs/experiments/EDM/config_f_distill_in64.py
PUBLISHED: dict[str, Any] = {
    "divergence": "js", "steps": 1, "critic_steps": 5, "gan_weight": 3e-3, "discriminator_weight": 1.0,
    "discriminator": "teacher", "heads": 1, "r1": 0.0, "ratio_min": 0.1, "ratio_max": 20.0, "parts": 10,
    "ratio_decay": 0.0, "guidance": 1.0, "lr": 2e-6, "critic_lr": 2e-6, "clip": 10.0, "warmup": 0,
    "optimizer": ADAMW,
}  # fmt: skip
#: FastGen's weights by name; where two are the same but for a factor, the mean takes it out.
FASTGEN = {
    "rkl": torch.ones_like, "kl": lambda r: r, "js": lambda r: 1 - 1 / (1 + r), "soft-rkl": lambda r: 1 / (1 + r),
    "neyman": lambda r: 1 / r.clamp_min(1e-8), "hellinger": lambda r: r**0.5, "jeffreys": lambda r: 1 + r,
}  # fmt: skip


def answered(made: Generator[Question, Tensor, Any]) -> Any:
    """What a generator of questions returns where every answer is what was asked about."""
    asked = next(made)
    while True:
        try:
            asked = made.send(asked.value)
        except StopIteration as done:
            return done.value


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("schedule", [EDM(), VPLinear(), FlowMatching()], ids=lambda s: type(s).__name__)
def test_the_weighted_difference_is_the_gradient_of_the_divergence(name: Name, schedule: Schedule) -> None:
    """``d/d(m, s) D_f(p_t || q_t)`` of noised laws, data of two modes over a student ``m + s z``: by automatic
    differentiation of its quadrature, and as ``E h(r) alpha / sigma^2 (D_critic - D_teacher) d x_t`` with ``r = exp(log
    p_t - log q_t)``; for both parameters to 1e-7."""
    m, s = (torch.tensor(v, dtype=F64, requires_grad=True) for v in (0.2, 0.9))
    data = Mixture1D(schedule, torch.tensor([0.4, 0.6]), torch.tensor([-0.5, 0.8]), torch.tensor([0.8, 0.95]))
    t = schedule.time_at(torch.tensor(0.4, dtype=F64))
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    sd = (alpha**2 * s**2 + sigma**2).sqrt()
    u = torch.linspace(-11, 11, 2001, dtype=F64)
    density = torch.exp(-(u**2) / 2) / math.sqrt(2 * math.pi) * (u[1] - u[0])

    # the divergence itself, on fixed states, so that only the density of q depends on the parameters
    y = (alpha * m + sd * u).detach()
    log_q = -0.5 * ((y - alpha * m) / sd).square() - sd.log() - 0.5 * math.log(2 * math.pi)
    p = data.log_density(y[:, None], t).exp()
    value = (DIVERGENCES[name].f(p / log_q.exp()) * log_q.exp()).sum() * (y[1] - y[0])
    expected = torch.stack(torch.autograd.grad(value, (m, s)))

    # the sum over z and eps, by their means given the state: d x_t / d m = alpha, E[alpha z | x_t] in closed form
    x_t, critic = y[:, None], Gaussian(schedule, m.detach()[None], float(s) ** 2)
    logit = data.log_density(x_t, t) - critic.log_density(x_t, t)
    h = DIVERGENCES[name].h(ratio_of(logit, 1e-30, 1e30))
    found = TwoScores(x_t, x_t, t.expand(len(y)), data(x_t, t), critic(x_t, t), schedule)
    difference = weighted_difference(found, lambda scores: h * alpha / sigma**2)[:, 0]
    moved = torch.stack([alpha * torch.ones_like(u), alpha * (alpha * s.detach() / sd.detach()) * u])
    torch.testing.assert_close((density * difference * moved).sum(1), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_h_is_the_second_derivative(name: Name) -> None:
    """``f'' r^2``; ``f(1) = 0``; FastGen's weights but for a factor."""
    r = torch.logspace(-1, 1.3, 40, dtype=F64).requires_grad_()
    (first,) = torch.autograd.grad(DIVERGENCES[name].f(r).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    h = DIVERGENCES[name].h(r.detach())
    torch.testing.assert_close(h, second * r.detach().square(), rtol=1e-10, atol=1e-12)
    assert float(DIVERGENCES[name].f(torch.ones((), dtype=F64))) == pytest.approx(0, abs=1e-15)
    if name in FASTGEN:
        theirs = FASTGEN[name](r.detach())
        torch.testing.assert_close(h / h.mean(), theirs / theirs.mean(), rtol=1e-12, atol=0)
    assert {*NAMES} - {*FASTGEN} == {"pearson"}


def test_the_ratio_of_logits() -> None:
    """Logits of several heads are averaged first; half precision does not overflow; the bounds hold; no gradient."""
    logits = torch.tensor([[1.0, -0.5], [0.3, 0.1]], dtype=F64, requires_grad=True)
    ratio = ratio_of(logits, 0.1, 20.0)
    torch.testing.assert_close(ratio, torch.tensor([0.25, 0.2], dtype=F64).exp())
    assert not ratio.requires_grad
    assert ratio_of(torch.tensor([-9.0, 9.0, 40.0]), 0.1, 20.0).tolist() == pytest.approx([0.1, 20.0, 20.0])
    half = ratio_of(torch.tensor([12.0], dtype=torch.float16), 0.1, 1e9)
    assert half.dtype == torch.float32 and float(half) == pytest.approx(math.exp(10))
    with pytest.raises(ValueError, match="ratio_min=2, ratio_max=20: the ratio of equal laws, 1, must lie between"):
        FDistill(ratio_min=2.0)


def test_ratios_are_compared_at_like_noise_levels() -> None:
    """Over the mean of their part of the noise levels: of this batch without decay, mixed with what was before with
    it; a part that the batch does not meet keeps its mean.  A batch in two pieces has the means of the whole."""
    schedule, ratio = EDM(), torch.tensor([1.0, 3.0, 5.0, 0.5], dtype=F64)
    t = schedule.own_time(torch.tensor([0.1, 0.2, 0.15, 0.9], dtype=F64))
    assert Segments(3).of(schedule, t).tolist() == [0, 0, 0, 2]
    before = torch.tensor([2.0, 7.0, 4.0], dtype=F64)
    relative, seen = answered(relative_ratio(ratio, t, schedule, before, 0.0))
    assert seen.tolist() == [3.0, 7.0, 0.5]
    torch.testing.assert_close(relative, ratio / torch.tensor([3.0, 3.0, 3.0, 0.5], dtype=F64))
    relative, seen = answered(relative_ratio(ratio, t, schedule, before, 0.75))
    assert seen.tolist() == pytest.approx([2.25, 7.0, 3.125])
    pieces = [relative_ratio(ratio[part], t[part], schedule, before, 0.75) for part in (slice(0, 2), slice(2, 4))]
    asked = torch.stack([next(piece).value for piece in pieces]).mean(0)
    found = []
    for piece in pieces:
        with pytest.raises(StopIteration) as done:
            piece.send(asked)
        found.append(done.value.value)
    torch.testing.assert_close(torch.cat([one for one, _ in found]), relative)


@pytest.mark.parametrize("name", NAMES)
def test_weights_have_mean_one(name: Name) -> None:
    """Whatever the ratios; where all are equal every weight is 1, as in DMD2."""
    method, schedule = FDistill(divergence=name), EDM()
    t = schedule.own_time(Rng(0).uniform(64))
    before = torch.ones(10, dtype=F64)
    weight, relative, _ = answered(method.weights(Rng(1).normal(64, 2, dtype=F64), t, schedule, before))
    assert float(weight.mean()) == pytest.approx(1, abs=1e-12) and float(relative.mean()) == pytest.approx(1)
    assert (float(weight.std()) > 0.01) == (name != "rkl")
    equal, _, _ = answered(method.weights(torch.full((64, 2), 0.7, dtype=F64), t, schedule, before))
    torch.testing.assert_close(equal, torch.ones(64, dtype=F64), rtol=1e-12, atol=0)


def network(kind: str = "mlp", seed: int = 0) -> NetworkDenoiser:
    torch.manual_seed(seed)
    net = MLP((1, 8, 8), 16, 2, 3) if kind == "mlp" else UNet((1, 8, 8), (8, 16), 1, 32, 3)
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return NetworkDenoiser(net, TrigFlow(sigma_data=0.7), TrigPrediction(sigma_data=0.7), (1, 8, 8), 3)


def batch_of(n: int = 6, seed: int = 0) -> Batch:
    rng = Rng(seed)
    return Batch(rng.normal(n, 1, 8, 8), torch.arange(n) % 3, rng)


@pytest.mark.parametrize("body", ["teacher", "critic"])
@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_one_pass_of_each_network_gives_scores_and_logits(body: Any, guidance: float) -> None:
    """The teacher is called once, and once more for guidance; the critic once, and where the discriminator sits on it
    once more for the adversarial term, at times of its own."""
    method = FDistill(discriminator=body, guidance=guidance, gan_weight=0.5)
    nets = method.networks(Start(network()))
    assert nets.discriminator.layers == (bottleneck(nets.teacher),) == ("blocks.1",)
    calls = {"teacher": 0, "critic": 0}

    def count(name: str) -> None:
        calls[name] += 1

    for name in calls:
        nets.get_submodule(name).net.blocks[1].register_forward_hook(lambda *_, name=name: count(name))
    first = next(alone(method.updates(nets, batch_of(), Progress())))
    assert calls == {"teacher": 1 + (guidance != 1), "critic": 1 + (body == "critic")}
    assert isinstance(first, Update) and first.group == "student"


@pytest.mark.parametrize("kind", ["mlp", "unet"])
@pytest.mark.parametrize("body", ["teacher", "critic"])
def test_each_update_reaches_its_own_networks_only(body: Any, kind: str) -> None:
    """The student's backward pass leaves no gradient in critic, heads and teacher; the critic's none in the student,
    and with heads on the teacher none from them in the critic.  The mean ratios move after the student's step."""
    method = FDistill(discriminator=body, gan_weight=1.0, heads=2)
    nets = method.networks(Start(network(kind)))
    updates = alone(method.updates(nets, batch_of(), Progress()))
    update = next(updates)
    update.loss.backward()
    for name in ("critic", "discriminator", "teacher"):
        assert all(p.grad is None for p in nets.get_submodule(name).parameters()), name
    assert any(p.grad is not None and float(p.grad.abs().max()) > 0 for p in nets.student.parameters())
    assert nets.levels.mean.tolist() == [1.0] * 10
    assert update.then is not None
    update.then()
    assert len({*nets.levels.mean.tolist()}) > 1
    nets.zero_grad(set_to_none=True)
    next(updates).loss.backward()
    assert all(p.grad is None for p in [*nets.student.parameters(), *nets.teacher.parameters()])
    for name in ("critic", "discriminator"):
        assert any(p.grad is not None and float(p.grad.abs().max()) > 0 for p in nets.get_submodule(name).parameters())
    assert len(nets.discriminator.heads.heads) == 2


class Squares(nn.Module):
    """A network of numbers whose features are ``(x, x^2)``: its discriminators are logistic regressions."""

    def __init__(self) -> None:
        super().__init__()
        self.squares = nn.Identity()

    def forward(self, x: Tensor, t: Tensor, cond: object = None) -> Tensor:
        return self.squares(torch.cat([x, x.square()], 1))[:, :1]


def test_the_discriminator_finds_the_log_ratio_of_noised_laws() -> None:
    """Trained as the method trains it, a discriminator that can be a quadratic is ``log p_t - log q_t`` of two noised
    Gaussians, data over samples; what it says weighs samples by ``p_t / q_t`` for the KL divergence, and by the
    inverse, which is Neyman's, were its sign the other."""
    schedule = FlowMatching(t_min=0.4999, t_max=0.5)  # one noise level
    body = NetworkDenoiser(Squares(), schedule, TrigPrediction(sigma_data=0.7), (1,))
    n = 16_000
    game = Discriminator(Adversary(layers=("squares",), head=lambda shape: nn.Linear(*shape, 1)), body).double()
    data, fake = Rng(1).normal(n, 1, dtype=F64) + 0.8, 1.5 * Rng(2).normal(n, 1, dtype=F64) - 0.3
    optimiser = torch.optim.LBFGS(game.parameters(), max_iter=40, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss, _ = game.loss(body, data, fake, None, Rng(3))
        loss.backward()
        return loss

    optimiser.step(closure)
    x = torch.linspace(-0.5, 1, 40, dtype=F64)[:, None]
    t = torch.full((40,), 0.5, dtype=F64)
    laws = [Gaussian(schedule, torch.tensor([m], dtype=F64), v) for m, v in ((0.8, 1.0), (-0.3, 2.25))]
    ratio = laws[0].log_density(x, t) - laws[1].log_density(x, t)
    logit = game.logits(body, x, t, None)
    assert float((logit[:, 0] - ratio).abs().max()) < 0.06 < 0.2 * float(ratio.abs().max())
    weights = {
        (name, sign): answered(FDistill(divergence=name).weights(sign * logit, t, schedule, torch.ones(1, dtype=F64)))[
            0
        ]
        for name in ("kl", "neyman")
        for sign in (1, -1)
    }
    expected = ratio.exp().clamp(0.1, 20)
    torch.testing.assert_close(weights["kl", 1], expected / expected.mean(), rtol=0.1, atol=0)
    torch.testing.assert_close(weights["kl", -1], weights["neyman", 1], rtol=1e-9, atol=0)
    assert not torch.allclose(weights["kl", -1], weights["kl", 1], rtol=0.1)


WORLD = Mixture1D(EDM(), torch.ones(2), torch.tensor([-1.5, 1.5]), torch.tensor([0.4, 0.4]))


def pulled(name: Name, mean: float, spread: float, n: int, rng: Rng) -> tuple[Tensor, Tensor, Tensor]:
    """Samples ``mean + spread z``, their z, and the vector along which they are moved with exact scores and ratios."""
    z = rng.normal(n, 1, dtype=F64)
    x, critic = mean + spread * z, Gaussian(WORLD.schedule, torch.tensor([mean], dtype=F64), spread**2)
    t = Own(0.02, 0.3).draw(WORLD.schedule, n, rng)  # up to where noise would join the modes
    x_t = WORLD.schedule.add_noise(x, rng.normal_like(x), t)
    logits = WORLD.log_density(x_t, t) - critic.log_density(x_t, t)
    weight, _, _ = answered(FDistill(divergence=name).weights(logits, t, WORLD.schedule, torch.ones(10, dtype=F64)))
    found = TwoScores(x, x_t, t, WORLD(x_t, t), critic(x_t, t), WORLD.schedule)
    return x, z, weighted_difference(found, lambda scores: by_noise(scores) * weight)


def share_at_the_other_mode(name: Name, steps: int = 150) -> float:
    """Of a student ``b + a z`` that was begun at the right one of two modes and moved along these vectors."""
    parameters = [torch.tensor(v, dtype=F64, requires_grad=True) for v in (1.0, 0.6)]
    optimiser = torch.optim.Adam(parameters, betas=(0.0, 0.99))
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 0.03 * (1 - step / steps)
        b, a = parameters
        _, z, g = pulled(name, float(b.detach()), float(a.detach()), 128, Rng(0, step))
        optimiser.zero_grad()
        surrogate(b + a * z, g).backward()
        optimiser.step()
    b, a = (p.detach() for p in parameters)
    return float(torch.special.ndtr(-b / a.abs()))


def test_the_kl_divergence_covers_a_mode_that_the_reverse_one_drops() -> None:
    """A student that can only be a Gaussian, at noise levels that leave the modes apart: Jeffreys' divergence, half of
    which is the KL, covers too; the Jensen-Shannon divergence does not."""
    share = {name: share_at_the_other_mode(name) for name in ("rkl", "js", "jeffreys", "kl")}
    assert max(share["rkl"], share["js"]) < 0.01 and min(share["jeffreys"], share["kl"]) > 0.25


def test_covering_costs_variance() -> None:
    """At a student on one mode, the spread of the vectors by which samples are moved, mean weight 1: the KL and
    Jeffreys divergences before Hellinger's and the Jensen-Shannon, these before the reverse KL."""
    order: tuple[Name, ...] = ("pearson", "kl", "jeffreys", "hellinger", "js", "rkl", "soft-rkl")
    spread = {name: float(pulled(name, 1.5, 0.5, 10_000, Rng(0))[2].var()) for name in order}
    assert sorted(spread, key=lambda name: -spread[name]) == list(order)


def test_the_mean_ratios_are_part_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a decay they are read in the next update: a run that was stopped ends with the same bits."""
    method = FDistill(ratio_decay=0.9, critic_steps=1, gan_weight=0.1, parts=2, lr=1e-2, critic_lr=1e-2)
    data = Dataset("points", torch.randn(24, 1, 8, 8), torch.arange(24) % 3)
    settings = Settings(Budget(4), batch=8, precision="fp32", save_seconds=0.0, log_steps=1)

    def run(folder: Path | None) -> Any:
        torch.manual_seed(0)
        return train(method, Start(network(), data), settings, folder, show=False)

    whole = run(None)
    real, left = Run.step, [3]

    def step(run: Run, source: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        real(run, source)

    monkeypatch.setattr(Run, "step", step)
    with pytest.raises(Interrupted):
        run(tmp_path / "run")
    again = run(tmp_path / "run")
    last = {name: value for name, value in whole.records[-1].items() if "/" in name}
    assert {name: again.records[-1][name] for name in last} == last
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
    other = train(dataclasses.replace(method, ratio_decay=0.0), Start(network(), data), settings, show=False)
    assert other.records[-1]["student/weight_max"] != last["student/weight_max"]
