"""Rewards: the hinge, the classifier's log-probability, decoding with a gradient, and how hacking shows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.denoisers import NetworkDenoiser
from fewstep.flow_maps import Jump
from fewstep.methods.alarm import Falls
from fewstep.methods.method import Mean
from fewstep.methods.parts.feedback import FEW_CLASSES, Feedback, feedback_loss
from fewstep.methods.start import Start
from fewstep.networks import MLP
from fewstep.networks.classifier import bundled_classifier
from fewstep.networks.latents import decode
from fewstep.predictions import TrigPrediction
from fewstep.rewards import ClassReward, ModuleReward, Reward, Together, hinge
from fewstep.schedules import TrigFlow


def pictures(n: int = 6) -> Tensor:
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_the_hinge_has_no_gradient_above_the_margin() -> None:
    """``relu(margin - r)``, summed over rewards with margins of their own."""
    r = torch.tensor([[-1.0, 3.0], [0.5, -2.0], [2.0, 9.0]], requires_grad=True)
    loss = hinge(r, (0.0, 4.0))
    assert loss.tolist() == [2.0, 6.0, 0.0]
    loss.sum().backward()
    assert r.grad is not None and r.grad.tolist() == [[-1.0, -1.0], [0.0, -1.0], [0.0, 0.0]]
    assert hinge(torch.tensor([-0.5, 0.5]), (0.0,)).tolist() == [0.5, 0.0]
    with pytest.raises(ValueError, match=r"rewards of shape \[3, 2\] for 3 margins: a reward gives \[B\]"):
        hinge(r, (0.0, 1.0, 2.0))
    with pytest.raises(ValueError, match=r"rewards of shape \[1, 1, 1\] for 1 margins"):
        hinge(torch.zeros(1, 1, 1), (0.0,))


def test_a_classifier_rates_by_the_class_asked_for() -> None:
    """Its log-probability, whose gradient reaches the pictures only; with it the probabilities of all classes."""
    net, x, cond = bundled_classifier("digits"), pictures().requires_grad_(), torch.arange(6)
    reward = ClassReward(net)
    rewards, classes = reward.rate(x, cond)
    for i in range(6):
        assert float(rewards[i]) == pytest.approx(float(net(x)[i].softmax(0)[i].log()), abs=1e-5)
    assert classes is not None and not classes.requires_grad
    torch.testing.assert_close(classes.sum(1), torch.ones(6))
    reward(x, cond).sum().backward()
    assert x.grad is not None and bool(x.grad.abs().flatten(1).sum(1).bool().all())
    assert all(p.grad is None for p in net.parameters())
    for wrong in (None, {"prompt": x}, cond.float(), cond[:3]):
        with pytest.raises(ValueError, match="rates pictures by the class asked for"):
            reward(x, wrong)
    for wrong in (cond - 1, cond + 5):
        with pytest.raises(ValueError, match=r"rates labels 0 .. 9 only"):
            reward(x, wrong)


class Brightness(nn.Module):
    """Somebody's own."""

    def forward(self, x: Tensor, cond: Any) -> Tensor:
        return x.flatten(1).mean(1)


def test_several_rewards_have_a_column_each() -> None:
    x, cond = pictures(), torch.arange(6)
    both = Together([ModuleReward(Brightness()), ClassReward(bundled_classifier("digits"))])
    found, classes = both.rate(x, cond)
    assert found.shape == (6, 2) and classes is not None and classes.shape == (6, 10)
    assert torch.equal(found[:, 0], x.flatten(1).mean(1)) and torch.equal(both(x, cond), found)


class Doubling(MLP):
    """A network whose samples are half of a picture, of a decoder with a weight of its own."""

    factor = torch.tensor(2.0, requires_grad=True)

    def decode(self, samples: Tensor) -> Tensor:
        return self.factor.detach() * samples


def test_latents_are_decoded_before_they_are_rated() -> None:
    """The picture counts, with a gradient through the decoder; samples of other networks are pictures."""
    shape = (1, 8, 8)
    for net, factor in ((Doubling(shape, 8, 1), 2.0), (MLP(shape, 8, 1), 1.0)):
        model = Jump(NetworkDenoiser(net, TrigFlow(), TrigPrediction(), shape))
        x = pictures().requires_grad_()
        assert torch.equal(decode(model, x), factor * x)
        loss, logs = answered(feedback_loss(ModuleReward(Brightness()), model, x, None, (5.0,)))
        assert float(loss) == pytest.approx(5.0 - factor * float(x.mean()), abs=1e-5)
        loss.backward()
        assert x.grad is not None
        torch.testing.assert_close(x.grad, torch.full_like(x, -factor / x.numel()))
        assert set(logs) == {"reward"}


def answered(asked: Any, *parts: Any) -> Any:
    """What a generator of questions returns, in one part or with the answers of several in lock step."""
    generators = (asked, *parts)
    answer: Tensor | None = None
    while True:
        questions, results = [], []
        for generator in generators:
            try:
                questions.append(next(generator) if answer is None else generator.send(answer))
            except StopIteration as end:
                results.append(end.value)
        if results:
            return results if parts else results[0]
        assert all(isinstance(question, Mean) for question in questions)
        answer = torch.stack([question.value for question in questions]).mean(0)


def test_the_entropy_of_classes_is_that_of_the_whole_batch() -> None:
    """Of two parts with one class each it is log 2, not 0; a collapse sets off the alarm."""

    class One(Reward):
        def rate(self, x: Tensor, cond: Any) -> tuple[Tensor, Tensor | None]:
            return x.flatten(1).mean(1), torch.nn.functional.one_hot(cond, 3).double()

        def forward(self, x: Tensor, cond: Any) -> Tensor:
            return self.rate(x, cond)[0]

    model = Jump(NetworkDenoiser(MLP((1, 8, 8), 8, 1), TrigFlow(), TrigPrediction(), (1, 8, 8)))
    parts = [feedback_loss(One(), model, pictures(2), torch.tensor([k, k]), (0.0,)) for k in (0, 1)]
    (_, first), (_, second) = answered(*parts)
    assert float(first["class_entropy"]) == float(second["class_entropy"]) == pytest.approx(math.log(2), abs=1e-9)
    _, alone = answered(feedback_loss(One(), model, pictures(2), torch.tensor([0, 0]), (0.0,)))
    assert float(alone["class_entropy"]) == pytest.approx(0, abs=1e-9)
    assert isinstance(FEW_CLASSES, Falls)
    lines = [{"student/class_entropy": value} for value in (2.3, 2.25)]
    assert FEW_CLASSES.found("student/class_entropy", lines[1], lines[:1]) is None
    assert "fallen to 43 %" in str(FEW_CLASSES.found("student/class_entropy", {"student/class_entropy": 1.0}, lines))


def test_a_reward_that_gives_something_else_is_refused() -> None:
    class Wrong(nn.Module):
        def forward(self, x: Tensor, cond: Any) -> Tensor:
            return torch.zeros(3)

    model = Jump(NetworkDenoiser(MLP((1, 8, 8), 8, 1), TrigFlow(), TrigPrediction(), (1, 8, 8)))
    with pytest.raises(ValueError, match="the reward gave 3 numbers for 6 pictures"):
        answered(feedback_loss(ModuleReward(Wrong()), model, pictures(), None, (0.0,)))


def test_what_rates_is_named_or_brought() -> None:
    """A word for recipes and flags; the module in the role, a copy of it and frozen by the networks; and what
    contradicts each other."""
    assert str(Feedback.parse("classifier:digits")) == Feedback("classifier:digits").plain() == "classifier:digits"
    assert not Feedback() and Feedback("given")
    with pytest.raises(ValueError, match=r"'clasifier:digits' is not one of .* did you mean 'classifier:digits'"):
        Feedback("clasifier:digits")
    world = NetworkDenoiser(MLP((1, 8, 8), 8, 1), TrigFlow(), TrigPrediction(), (1, 8, 8))
    brought = Brightness()
    made = Feedback("given").reward(Start(world, given={"reward": brought}))
    assert torch.equal(made(pictures(), None), brought(pictures(), None))
    own = ClassReward(bundled_classifier("digits"))
    assert (
        Feedback("given").reward(Start(world, given={"reward": own})).rate(pictures(), torch.arange(6))[1] is not None
    )
    assert isinstance(Feedback("classifier:fashion").reward(Start(world)), ClassReward)
    with pytest.raises(ValueError, match="feedback=given asks a reward, and none was brought; classifier:digits"):
        Feedback("given").reward(Start(world))
    with pytest.raises(ValueError, match="feedback=none: a reward was brought, which feedback=given asks"):
        Feedback().check_given(True)
