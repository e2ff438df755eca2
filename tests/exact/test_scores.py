"""Scores of examples: against autograd, by hand, and kept by digest."""

import math

import pytest
import torch
from torch import nn

from fewstep.condense.scores import (
    AUM,
    Forgetting,
    Scores,
    el2n,
    entropy,
    gradient_features,
    grand,
    label_margin,
    margin,
    scores_of,
    softmax_twice_error,
)  # fmt: skip
from fewstep.data.dataset import Dataset
from fewstep.methods.parts.stores import made_now
from fewstep.randomness import Rng
from fewstep.runs.shelf import Shelf
from fewstep.training.parallel import Parallel


class Net(nn.Module):
    """A linear classifier on two hidden units."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.head = nn.Linear(2, 3, dtype=torch.float64)
        rng = Rng("net", seed)
        self.mix = nn.Parameter(rng.normal(4, 2, dtype=torch.float64))
        with torch.no_grad():
            self.head.weight.copy_(rng.normal(3, 2))
            self.head.bias.copy_(rng.normal(3))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x.double().flatten(1) @ self.mix)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


def some_data(n: int = 10) -> Dataset:
    return Dataset("some", Rng(1).normal(n, 1, 2, 2), torch.arange(n) % 3)


def last_layer_gradient(net: Net, x: torch.Tensor, y: torch.Tensor, *, twice: bool = False) -> torch.Tensor:
    """By autograd, one example at a time: bias, then the rows of the weight."""
    found = []
    for i in range(len(x)):
        z = net(x[i : i + 1])
        loss = nn.functional.cross_entropy(z.softmax(-1) if twice else z, y[i : i + 1])
        weight, bias = torch.autograd.grad(loss, (net.head.weight, net.head.bias))
        found.append(torch.cat([bias, weight.flatten()]))
    return torch.stack(found)


@pytest.mark.parametrize("twice", [False, True])
def test_gradient_features_are_the_gradient_of_the_last_layer(twice: bool) -> None:
    net, data = Net(), some_data()
    x, y = data.x, data.cond
    assert isinstance(y, torch.Tensor)
    expected = last_layer_gradient(net, x, y, twice=twice)
    error = {"error": softmax_twice_error} if twice else {}
    assert torch.allclose(gradient_features(net(x), net.features(x), y, **error), expected, atol=1e-14, rtol=0)
    named = scores_of((net,), data, "gradients-softmax-twice" if twice else "gradients", batch=4)
    assert torch.allclose(named, expected, atol=1e-14, rtol=0)


def test_grand_is_the_norm_of_the_gradient_features() -> None:
    net, data = Net(), some_data()
    y = data.labels
    assert y is not None
    expected = last_layer_gradient(net, data.x, y).norm(dim=1)
    assert torch.allclose(grand(net(data.x), net.features(data.x), y), expected, atol=1e-14, rtol=0)


def test_scores_by_hand() -> None:
    z = torch.tensor([[math.log(0.7), math.log(0.2), math.log(0.1)]], dtype=torch.float64)
    y = torch.tensor([1])
    assert float(el2n(z, y)) == pytest.approx(math.sqrt(0.49 + 0.64 + 0.01), abs=1e-14)
    assert float(margin(z)) == pytest.approx(0.5, abs=1e-14)
    assert float(entropy(z)) == pytest.approx(-(0.7 * math.log(0.7) + 0.2 * math.log(0.2) + 0.1 * math.log(0.1)))
    assert float(label_margin(z, y)) == pytest.approx(math.log(0.2 / 0.7), abs=1e-14)
    sure = torch.tensor([[1000.0, 0.0, 0.0]])
    # nothing is NaN where one class has everything
    assert float(entropy(sure)) == 0 and float(el2n(sure, torch.tensor([0]))) == 0
    assert float(el2n(sure, torch.tensor([2]))) == pytest.approx(math.sqrt(2), abs=1e-14)


def test_aum_is_the_mean_margin_over_the_times_that_an_example_was_seen() -> None:
    aum = AUM(3)
    z = torch.tensor([[2.0, 0.5], [0.0, 1.0]])
    aum.update(torch.tensor([2, 0]), z, torch.tensor([0, 0]))
    aum.update(torch.tensor([2]), torch.tensor([[0.0, 4.0]]), torch.tensor([0]))
    assert aum.scores()[[0, 2]].tolist() == [-1.0, (1.5 - 4.0) / 2]
    assert bool(aum.scores()[1].isnan())


def test_forgetting_counts_the_falls_from_right_to_wrong() -> None:
    """Answers of four examples over five epochs, in another order every epoch."""
    answers = torch.tensor([
        [0, 1, 0, 1, 0],  # forgotten twice
        [0, 0, 0, 0, 0],  # never learned
        [1, 1, 1, 1, 1],  # never forgotten
        [0, 0, 1, 1, 0],  # forgotten once, after it was learned late
    ])  # fmt: skip
    counter = Forgetting(4)
    for epoch in range(5):
        order = Rng(epoch).shuffled(4)
        logits = nn.functional.one_hot(answers[order, epoch], 2).double()
        counter.update(order, logits, torch.ones(4, dtype=torch.int64))
    assert counter.scores().tolist() == [2, math.inf, 0, 1]


def test_counters_are_resumed_with_the_networks_that_hold_them() -> None:
    counter = Forgetting(2)
    y = torch.tensor([1])
    counter.update(torch.tensor([0]), torch.tensor([[0.0, 1.0]]), y)
    resumed = Forgetting(2)
    resumed.load_state_dict(counter.state_dict())
    resumed.update(torch.tensor([0]), torch.tensor([[1.0, 0.0]]), y)
    assert resumed.scores().tolist() == [1, math.inf]


def test_scores_are_a_mean_over_classifiers_whatever_the_batch() -> None:
    data, nets = some_data(), (Net(0), Net(1))
    y = data.labels
    assert y is not None
    expected = (el2n(nets[0](data.x), y) + el2n(nets[1](data.x), y)) / 2
    for batch in (3, 10, 64):
        assert torch.allclose(scores_of(nets, data, batch=batch), expected.detach(), atol=1e-15, rtol=0)
    # plain functions will do
    assert torch.allclose(scores_of((nets[0].forward, nets[1].forward), data), expected.detach(), atol=1e-15, rtol=0)
    kept = made_now(Scores(nets, data, batch=4), 0)
    assert torch.allclose(kept.x[:, 0], expected.detach(), atol=1e-15, rtol=0) and not kept.x.requires_grad


def test_a_run_folder_keeps_scores_until_weights_or_data_change(tmp_path, monkeypatch) -> None:
    data, net = some_data(), Net()
    shelf = Shelf(tmp_path, Parallel.from_environment(torch.device("cpu")), False)
    calls = 0
    forward = Net.forward

    def counted(self: Net, x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return forward(self, x)

    monkeypatch.setattr(Net, "forward", counted)
    first = shelf(Scores((net,), data), 0).x
    assert torch.equal(shelf(Scores((net,), data), 0).x, first) and calls == 1
    shelf(Scores((net,), data, "margin"), 0)
    assert calls == 2
    shelf(Scores((net,), data.subset(slice(0, 9))), 0)
    assert calls == 3
    with torch.no_grad():
        net.head.bias += torch.tensor([1.0, 0.0, 0.0])
    assert not torch.equal(shelf(Scores((net,), data), 0).x, first) and calls == 4


def test_what_cannot_be_scored_is_one_line() -> None:
    net, data = Net(), some_data()
    with pytest.raises(ValueError, match=r"^score='el3n' is not one of el2n, grand, margin"):
        Scores((net,), data, "el3n")
    with pytest.raises(ValueError, match=r"^score='el2n' of 0 classifiers: at least one is needed$"):
        scores_of((), data)
    with pytest.raises(ValueError, match=r"^score='gradients' of 2 classifiers: one is needed$"):
        scores_of((net, net), data, "gradients")
    for labels in (None, torch.arange(10) % 3 - 1):
        with pytest.raises(ValueError, match=r"^data 'bare': the score 'el2n' needs pictures and a label for each$"):
            scores_of((net,), Dataset("bare", data.x, labels))
