"""Repeated random sampling: orders of the data that are functions of the position."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from itertools import chain, count
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep.classifiers import NetworkClassifier
from fewstep.condense.supervised import Supervised
from fewstep.conditions import Cond
from fewstep.data import Dataset, load
from fewstep.data.dataset import Chosen, epoch_indices
from fewstep.data.rounds import spread, strata
from fewstep.networks.classifiers import MLPClassifier
from fewstep.randomness import Rng
from fewstep.report import read_run
from fewstep.report.collect import report_runs
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


def rounds(word: str, data: Dataset, number: int, seed: int = 0) -> list[list[int]]:
    """The indices of the first rounds."""
    order = Order.parse(word)
    size = round(float(word.partition(":")[2]) * len(data))
    reading = order.read(data, 0, number * size, seed)
    assert reading.epochs.tolist() == [k for k in range(number) for _ in range(size)]
    return [part.tolist() for part in reading.indices.split(size)]


def weights(order: Order, budget: int, data: Dataset) -> dict[str, Tensor]:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = NetworkClassifier(MLPClassifier((1, 2, 2), CLASSES, width=8), (1, 2, 2), CLASSES)
    settings = Settings(Budget(budget), batch=6, precision="fp32", order=order)
    return dict(run_recipe(Supervised(), model, data, settings, show=False).model.state_dict())


def test_without_replacement_is_full_epochs_bit_for_bit() -> None:
    """S = 12, a multiple of the batch of 6, in 60: 15 rounds are three full epochs, with the same compressed schedule;
    drawn with replacement they are not."""
    one, other = (weights(Order.parse(word), 30, points()) for word in ("random:0.2", "epochs"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    again = weights(Order.parse("replaced:0.2"), 30, points())
    assert not torch.equal(one["net.head.weight"], again["net.head.weight"])


def test_the_learning_rate_runs_its_whole_course_over_the_rounds() -> None:
    """From the first rate to the least one in the steps that there are, however many epochs of all data they make: 15
    rounds of 12 are 30 steps and three epochs of 60, and twice the data leave the rates as they are."""
    least, steps = 1e-4, 30
    expected = [least + (0.1 - least) * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps)]
    for n, word in ((N, "random:0.2"), (2 * N, "random:0.1")):
        model = NetworkClassifier(MLPClassifier((1, 2, 2), CLASSES, width=8), (1, 2, 2), CLASSES)
        settings = Settings(Budget(steps), batch=6, precision="fp32", order=Order.parse(word), log_steps=1)
        records = run_recipe(Supervised(), model, points(n), settings, show=False).records
        assert [record["student/lr"] for record in records] == pytest.approx(expected, rel=1e-12)


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
        assert all(got <= size for got, size in zip(found, sizes, strict=True))


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


@pytest.mark.parametrize("kind", KINDS)
def test_a_reader_remembers_what_it_found_and_reads_the_same(kind: str) -> None:
    """On, and back again, as if every position were read for the first time."""
    data, order = points(), Order.parse(f"{kind}:0.3")
    read = order.reader(data, 3)
    for start, number in ((0, 24), (24, 24), (10, 40), (0, 24), (500, 1)):
        found, anew = read(start, number), order.read(data, start, number, 3)
        assert torch.equal(found.indices, anew.indices) and torch.equal(found.epochs, anew.epochs)


class Looked(Chosen):
    """Data that count how often somebody looks at their labels."""

    looks = 0

    def conditions(self, indices: Tensor | slice) -> Cond:
        self.looks += 1
        return super().conditions(indices)


def test_classes_are_looked_at_once_a_run_and_a_round_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 20 batches of 6, which are ten rounds of 12."""
    data, drawn = Looked(points(), torch.arange(N), "looked at"), []
    monkeypatch.setattr("fewstep.data.rounds.Rng", lambda *seed: drawn.append(seed) or Rng(*seed))
    for word in ("stratified:0.2", "replaced:0.2"):
        draws = Feed({"data": data}, 6, 0, range(1), 1, Order.parse(word)).draws("data", 0)
        assert all(len(next(draws).indices) == 6 for _ in range(20))
    assert data.looks == 1
    assert drawn == [(0, "stratified", k) for k in range(10)] + [(0, "round", k) for k in range(10)]


def test_classes_are_told_apart_in_the_order_of_the_data() -> None:
    labels = torch.tensor([2, -1, 0, 2, 0, -1, 5])
    found = strata(dataclasses.replace(points(7), cond=labels))
    assert [group.tolist() for group in found] == [[1, 5], [2, 4], [0, 3], [6]]


def test_what_choosing_took_is_counted_kept_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by a quarter of a second whenever it is looked at: a quarter for every batch, of those
    before a resume too, and a sentence in the report; nothing is said of epochs."""
    ticks = count(0, 0.25)
    monkeypatch.setattr("fewstep.training.feed.clock", lambda: next(ticks))
    data, places = load("digits"), [tmp_path / "rs2", tmp_path / "epochs"]
    net = NetworkClassifier(MLPClassifier(data.shape, 10, width=8), data.shape, 10)
    for place, word in zip(places, ("random:0.1", "epochs"), strict=True):
        for steps in (4, 6):
            settings = Settings(Budget(steps), batch=32, precision="fp32", order=Order.parse(word))
            made = run_recipe(Supervised(), net, data, settings, place, further=True, show=False)
            assert made.choosing == 0.25 * steps
    assert read_run(places[0]).choosing == 1.5
    told = report_runs(places, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Choosing what to read (random:0.1) took 1,500 ms of that." in told and told.count("Choosing what") == 1


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
