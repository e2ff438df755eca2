"""Repeated random sampling: orders of the data that are functions of the position."""

from __future__ import annotations

import dataclasses
from collections import Counter
from itertools import chain

import pytest
import torch
from torch import Tensor

from fewstep.classifiers import NetworkClassifier
from fewstep.condense.supervised import Supervised
from fewstep.data import Dataset
from fewstep.data.dataset import epoch_indices
from fewstep.data.rounds import spread
from fewstep.networks.classifiers import MLPClassifier
from fewstep.randomness import Rng
from fewstep.runs.course import run_recipe
from fewstep.training.budget import Budget
from fewstep.training.feed import Feed
from fewstep.training.orders import Epochs, Order
from fewstep.training.settings import Settings

N, CLASSES = 60, 3
KINDS = ("random", "replaced", "stratified")


def points(n: int = N) -> Dataset:
    """Three unequal classes: a half, a third, a sixth."""
    labels = (torch.arange(n) % 6).apply_(lambda i: 0 if i < 3 else 1 if i < 5 else 2)
    return Dataset("points", Rng(0, "points").normal(n, 1, 2, 2), labels)


def rounds(word: str, data: Dataset, count: int, seed: int = 0) -> list[list[int]]:
    """The indices of the first rounds."""
    order = Order.parse(word)
    size = round(float(word.partition(":")[2]) * len(data))
    reading = order.read(data, 0, count * size, seed)
    assert reading.epochs.tolist() == [k for k in range(count) for _ in range(size)]
    return [part.tolist() for part in reading.indices.split(size)]


def weights(order: Order, budget: int, data: Dataset) -> dict[str, Tensor]:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = NetworkClassifier(MLPClassifier((1, 2, 2), CLASSES, width=8), (1, 2, 2), CLASSES)
    settings = Settings(Budget(budget), batch=6, precision="fp32", order=order)
    return dict(run_recipe(Supervised(), model, data, settings, show=False).model.state_dict())


def test_without_replacement_is_full_epochs_bit_for_bit() -> None:
    """S = 12, a multiple of the batch of 6, in 60: 15 rounds are three full epochs, with the same compressed schedule;
    drawn with replacement they are not, and a learning rate tied to full epochs is not."""
    one, other = (weights(Order.parse(word), 30, points()) for word in ("random:0.2", "epochs"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    again = weights(Order.parse("replaced:0.2"), 30, points())
    assert not torch.equal(one["net.head.weight"], again["net.head.weight"])


def test_a_cycle_has_everybody_once() -> None:
    """After 1 / r rounds the multiset of indices is {each once}; at r = 1 it is an ordinary epoch."""
    found = rounds("random:0.2", points(), 10)
    for cycle in (found[:5], found[5:]):
        assert sorted(chain(*cycle)) == list(range(N))
    assert found[:5] != found[5:]
    whole = Order.parse("random:1").read(points(), 0, 2 * N, 7).indices
    assert torch.equal(whole, epoch_indices(N, 0, 2 * N, 7))


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_is_in_a_round_twice(kind: str) -> None:
    """Also where S = 13 does not divide N = 60: the tail of eight is left out, no round is short."""
    for found in rounds(f"{kind}:{13 / 60}", points(), 30):
        assert len(set(found)) == len(found) == 13


def test_with_replacement_draws_so_many_different_ones() -> None:
    """The mean number of distinct samples after X rounds is N (1 - (1 - r)^X)."""
    n, r, times = 200, 0.1, 8
    data = points(n)
    seen = [len(set(chain(*rounds(f"replaced:{r}", data, times, seed)))) for seed in range(60)]
    mean = sum(seen) / len(seen)
    expected = n * (1 - (1 - r) ** times)
    error = (sum((s - mean) ** 2 for s in seen) / 59 / 60) ** 0.5
    assert abs(mean - expected) < 4 * error
    assert len({tuple(found) for found in rounds(f"replaced:{r}", data, 20)}) == 20  # not one subset again and again


@pytest.mark.parametrize("kind", KINDS)
def test_marginals_are_the_frequencies(kind: str) -> None:
    data = points()
    order = Order.parse(f"{kind}:0.25")
    marginals = order.marginals(data)
    assert float(marginals.sum()) == pytest.approx(15)
    counts = Counter(chain(*rounds(f"{kind}:0.25", data, 400)))
    found = torch.tensor([counts[i] / 400 for i in range(N)])
    assert (found - marginals).abs().max() < 5 * (0.25 * 0.75 / 400) ** 0.5
    assert torch.equal(Epochs().marginals(data), torch.ones(N, dtype=torch.float64))


def test_strata_are_the_data_in_small() -> None:
    """Of classes of 30, 20 and 10 a round of 12 has 6, 4 and 2, in an order that mixes them."""
    data = points()
    for found in rounds("stratified:0.2", data, 10):
        assert torch.bincount(data.labels[found]).tolist() == [6, 4, 2]  # type: ignore[index]
        assert data.labels[found].tolist() != sorted(data.labels[found].tolist())  # type: ignore[index]


def test_largest_remainders() -> None:
    assert spread([30, 20, 10], 7) == [4, 2, 1]  # 3.5, 2.33, 1.17
    assert spread([1, 1, 1], 2) == [1, 1, 0]
    for sizes, total in (([5, 1, 1], 6), ([100, 1], 100), ([3, 3, 3], 9)):
        found = spread(sizes, total)
        assert sum(found) == total
        assert all(count <= size for count, size in zip(found, sizes, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_is_a_function_of_the_position(kind: str) -> None:
    """Read in pieces, from anywhere, over round and epoch borders, or by four processes: the same indices."""
    data, order = points(), Order.parse(f"{kind}:0.3")
    whole = order.read(data, 0, 120, 3)
    pieces = [order.read(data, start, 24, 3) for start in range(0, 120, 24)]
    assert torch.equal(torch.cat([piece.indices for piece in pieces]), whole.indices)
    assert torch.equal(torch.cat([piece.epochs for piece in pieces]), whole.epochs)
    assert not torch.equal(order.read(data, 0, 120, 4).indices, whole.indices)
    parts = [next(Feed({"data": data}, 24, 3, range(k, k + 1), 4, order).draws("data", 2)).indices for k in range(4)]
    assert torch.equal(torch.cat(parts), pieces[2].indices)


def test_a_second_source_is_read_in_epochs() -> None:
    """An order is that of the data: pairs and other sources are read whole."""
    data = points()
    feed = Feed({"data": data, "pairs": data}, 12, 0, range(1), 1, Order.parse("random:0.2"))
    draws = feed.draws("pairs", 0)
    assert sorted(torch.cat([next(draws).indices for _ in range(5)]).tolist()) == list(range(N))


@pytest.mark.parametrize("word", ["random", "random:0", "random:1.5", "often:0.1", "epochs:2", "random:nan"])
def test_words_that_are_no_order(word: str) -> None:
    with pytest.raises(ValueError, match=r"order|number"):
        Order.parse(word)


def test_what_data_cannot_give() -> None:
    data = points()
    with pytest.raises(ValueError, match="no sample of the 60"):
        Order.parse("random:0.001").read(data, 0, 4, 0)
    with pytest.raises(ValueError, match="no labels"):
        Order.parse("stratified:0.5").read(dataclasses.replace(data, cond=None), 0, 4, 0)
    for word in ("epochs", "random:0.25", "stratified:0.1"):
        assert str(Order.parse(word)) == word
