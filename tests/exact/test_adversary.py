"""Discriminators on features: the games, the optimum, the penalties, and where gradients go."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fewstep.denoisers import Denoiser, NetworkDenoiser, gradients
from fewstep.exact import Gaussian
from fewstep.methods.parts.adversary import (
    AdversarialLoss,
    Adversary,
    Discriminator,
    Hinge,
    NonSaturating,
    Relativistic,
)
from fewstep.methods.parts.times import Uniform
from fewstep.networks import UNet
from fewstep.networks.taps import tapped
from fewstep.predictions import TrigPrediction
from fewstep.randomness import Rng
from fewstep.schedules import FlowMatching, TrigFlow, align

F64 = torch.float64
SHAPE = (1, 8, 8)


def body() -> NetworkDenoiser:
    torch.manual_seed(0)
    net = UNet(SHAPE, (8, 16), 1, 32, 3)
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return NetworkDenoiser(net, TrigFlow(sigma_data=0.7), TrigPrediction(sigma_data=0.7), SHAPE, 3)


def test_the_games_at_a_tie_and_their_slopes() -> None:
    """At logits of 0: 2 log 2 and log 2, 1 and 0, log 2 and log 2; the discriminator raises real and lowers generated
    logits, the generator raises its own."""
    values: dict[AdversarialLoss, tuple[float, float]] = {
        NonSaturating(): (2 * math.log(2), math.log(2)), Hinge(): (1.0, 0.0),
        Relativistic(): (math.log(2), math.log(2)),
    }  # fmt: skip
    for game, (judge, student) in values.items():
        real, fake = (torch.zeros(4, 2, dtype=F64, requires_grad=True) for _ in range(2))
        assert float(game.discriminator(real, fake).detach()) == pytest.approx(judge)
        assert float(game.generator(fake, real.detach()).detach()) == pytest.approx(student)
        game.discriminator(real, fake).backward()
        assert bool((real.grad < 0).all()) and bool((fake.grad > 0).all())
        fake.grad = None
        game.generator(fake, real.detach()).backward()
        assert bool((fake.grad < 0).all())
    with pytest.raises(ValueError, match="its generator needs logits of real samples"):
        Relativistic().generator(torch.zeros(2))
    hinge = Hinge()
    assert float(hinge.discriminator(torch.tensor([2.0]), torch.tensor([-3.0]))) == 0.0


class Affine(nn.Module):
    """A head on the state itself: ``l = slope x + offset``."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1, dtype=F64)
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, features: Tensor) -> Tensor:
        return self.layer(features).flatten()


class Plain(Gaussian):
    """A body whose features are the noised state."""

    feature_shape = (1,)

    def features(self, x: Tensor, t: Tensor | float, cond: object = None) -> Tensor:
        return x


def told(body: Denoiser, rules: Adversary, head: nn.Module | None = None) -> Discriminator:
    """A discriminator, with a head of somebody's own."""
    return Discriminator(rules if head is None else replace(rules, head=lambda _: head), body)


@pytest.mark.parametrize("game", [NonSaturating(), Relativistic()], ids=lambda g: type(g).__name__)
def test_trained_on_noised_samples_the_logit_is_the_log_ratio_of_the_noised_laws(game: AdversarialLoss) -> None:
    """Two Gaussians of one variance, noised to one time: the slope is ``alpha (m_p - m_q) / (alpha^2 v + sigma^2)``; a
    game of pairs knows no offset.  Adam with averaging; 5 % is the spread over seeds."""
    schedule = FlowMatching()
    mp, mq, v, time = 0.6, -0.4, 0.5, 0.4
    world = Plain(schedule, torch.tensor([0.0], dtype=F64), torch.tensor([[v]], dtype=F64))
    head = Affine()
    discriminator = told(world, Adversary(loss=game, law=Uniform(time, time)), head)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.03)
    slopes, rng = [], Rng(0)
    for step in range(300):
        real, fake = (m + math.sqrt(v) * rng.normal(2048, 1, dtype=F64) for m in (mp, mq))
        loss, _ = discriminator.loss(world, real, fake, None, rng)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= 150:
            slopes.append(float(head.layer.weight.detach()))
    alpha, sigma = 1 - time, time
    expected = alpha * (mp - mq) / (alpha**2 * v + sigma**2)
    assert sum(slopes) / len(slopes) == pytest.approx(expected, rel=0.05)
    if isinstance(game, NonSaturating):
        middle = alpha * (mp + mq) / 2
        assert float(head.layer.bias.detach()) == pytest.approx(-expected * middle, abs=0.05)


def test_heads_see_as_many_layers_as_are_named() -> None:
    """One logit for each, from one pass; without names the bottleneck's one."""
    made = body()
    discriminator = told(made, Adversary(layers=("down.1", "middle.2", "up.1")))
    x, t, noise, cond = torch.randn(4, *SHAPE), torch.full((4,), 0.5, dtype=F64), torch.randn(4, *SHAPE), None
    calls: list[int] = []
    made.net.register_forward_hook(lambda *_: calls.append(1))
    assert discriminator.noised_logits(made, x, t, noise, cond).shape == (4, 3)
    assert calls == [1]
    plain = told(made, Adversary())
    assert plain.layers == ("middle.2",) and plain.noised_logits(made, x, t, noise, cond).shape == (4, 1)
    assert told(made, Adversary(blocks=2)).noised_logits(made, x, t, noise, cond).shape == (4, 2)


@pytest.mark.parametrize("layers", [("middle.2",), ("up.1",), ("middle.2", "up.1")])
def test_a_pass_for_the_bottleneck_alone_goes_no_further(layers: tuple[str, ...]) -> None:
    """The same logits, without the layers behind; a pass for other layers reaches those."""
    made = body()
    discriminator = told(made, Adversary(layers=layers))
    x, noise = torch.randn(4, *SHAPE), torch.randn(4, *SHAPE)
    t, cond = torch.full((4,), 0.5, dtype=F64), torch.tensor([0, 1, 2, -1])
    expected = discriminator(tapped(made, layers, made.schedule.add_noise(x, noise, t), t, cond)[1], t)
    reached: list[int] = []
    made.net.up[0].register_forward_hook(lambda *_: reached.append(1))
    assert torch.equal(discriminator.noised_logits(made, x, t, noise, cond), expected)
    assert len(reached) == (layers != ("middle.2",))


def test_the_students_gradient_passes_through_body_and_heads_which_stay() -> None:
    made = body()
    discriminator = told(made, Adversary(Hinge(), layers=("middle.2",)))
    x = torch.randn(4, *SHAPE, requires_grad=True)
    with gradients(made, "input"), gradients(discriminator, "input"):
        discriminator.student_loss(made, x, torch.zeros(4).long(), Rng(0)).backward()
    assert float(x.grad.abs().max()) > 0
    assert all(p.grad is None for p in [*made.parameters(), *discriminator.parameters()])


def test_pairs_are_compared_at_the_same_times() -> None:
    """Data that are the samples, with the same noise, would tie: the times are shared and the noise is fresh."""
    made, seen = body(), []
    discriminator = told(made, Adversary(Relativistic()))
    made.features = lambda x, t, cond: seen.append((x, t)) or torch.zeros(len(x), 16, 2, 2)  # type: ignore[method-assign]
    x = torch.randn(3, *SHAPE)
    loss = discriminator.student_loss(made, x, None, Rng(0), real=x)
    (fake, t), (real, s) = seen
    assert torch.equal(t, s) and not torch.equal(fake, real)
    assert float(loss.detach()) == pytest.approx(math.log(2))
    back = (fake - align(made.schedule.alpha(t), x) * x) / align(made.schedule.sigma(t), x)
    assert float(back.std()) == pytest.approx(1.0, abs=0.2)


def test_penalties_are_squared_slopes() -> None:
    """For a linear logit the change under a shift ``r1_sigma n`` is ``r1_sigma slope n``: the penalty's mean is ``r1
    r1_sigma^2 |slope|^2`` at no noise, for either side."""
    world = Plain(FlowMatching(), torch.tensor([0.0], dtype=F64), torch.tensor([[1.0]], dtype=F64))
    head = Affine()
    nn.init.constant_(head.layer.weight, 1.5)
    x, y = torch.zeros(20000, 1, dtype=F64), torch.ones(20000, 1, dtype=F64)
    plain, _ = told(world, Adversary(law=Uniform(0, 0)), head).loss(world, x, y, None, Rng(0))
    for r1, r2 in ((3.0, 0.0), (0.0, 2.0), (1.0, 1.0)):
        adversary = Adversary(law=Uniform(0, 0), r1=r1, r2=r2, r1_sigma=0.2)
        loss, logs = told(world, adversary, head).loss(world, x, y, None, Rng(0))
        expected = (r1 + r2) * (0.2 * 1.5) ** 2
        assert float(logs["gradient_penalty"]) == pytest.approx(expected, rel=0.05)  # 5 standard errors of 20,000
        assert float((loss - plain).detach()) == pytest.approx(float(logs["gradient_penalty"]), rel=1e-9)
