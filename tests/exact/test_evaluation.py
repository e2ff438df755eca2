"""What a data set is worth: everybody in the same steps, the random subset beside everything."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fewstep.data import Dataset
from fewstep.data.condensed import Condensed
from fewstep.evaluation.classification import (
    Candidate,
    Protocol,
    Row,
    accuracy,
    bytes_of,
    fresh_classifier,
    from_condensed,
    logits_of,
    post_evaluate,
    random_subset,
    with_baselines,
)
from fewstep.evaluation.tables import condensed_table, rows_table
from fewstep.randomness import Rng
from fewstep.training.orders import Order

SHAPE, CLASSES = (1, 4, 4), 3
QUICK = Protocol(networks={"mlp-classifier": {"width": 16}}, seeds=(0, 1), steps=40, batch=16)


def blobs(n: int, seed: int, name: str = "blobs") -> Dataset:
    """Three classes about three means, as many of each."""
    labels = torch.arange(n) % CLASSES
    means = Rng(0, "means").normal(CLASSES, *SHAPE)
    return Dataset(name, means[labels] + 0.7 * Rng(seed, "blobs").normal(n, *SHAPE), labels)


TRAIN, TEST = blobs(150, 1), blobs(300, 2)


def test_rows_say_what_was_trained_on() -> None:
    """A condensed set beside as many random samples and all: images, bytes, an accuracy a seed; more data are better,
    and the same call gives the same figures."""
    made = Condensed(TRAIN.x[:6], TRAIN.cond[:6])  # type: ignore[index]
    rows = post_evaluate(with_baselines(from_condensed("first", made, 2.5), TRAIN), TEST, QUICK)
    assert [row.name for row in rows] == ["random", "first", "all"]
    assert [row.images for row in rows] == [6, 6, 150]
    assert [row.bytes for row in rows] == [6 * 17, 6 * (16 * 4 + 1), 150 * 17]
    assert [row.chosen for row in rows] == [0.0, 2.5, 0.0]
    assert all(len(row.accuracies) == 2 for row in rows)
    assert rows[2].mean > rows[0].mean + 0.02
    again = post_evaluate([from_condensed("first", made)], TEST, QUICK)
    assert again[0].accuracies == rows[1].accuracies


def test_the_random_subset_is_class_by_class() -> None:
    """It is the same for a seed, another for another one."""
    chosen = random_subset(TRAIN, 10)
    assert torch.bincount(chosen.data.rows(slice(None)).cond).tolist() == [4, 3, 3]  # type: ignore[arg-type]
    one, other = (random_subset(TRAIN, 30, seed).data.index for seed in (0, 1))  # type: ignore[attr-defined]
    assert torch.equal(one, random_subset(TRAIN, 30).data.index)  # type: ignore[attr-defined]
    assert not torch.equal(one, other)
    assert bytes_of(TRAIN) == 150 * 17


def test_soft_labels_come_from_the_teacher_or_with_the_data() -> None:
    """Noise with a good teacher's soft labels teaches something, with arbitrary hard labels nothing; a set that brings
    its labels has a row of its own."""
    teacher = trained_on_all()
    noise = Dataset("noise", Rng(3, "noise").normal(150, *SHAPE), torch.arange(150) % CLASSES)
    protocol = Protocol(QUICK.networks, (0, 1, 2), 80, 16, soft_lr=1e-2, temperature=4.0, teacher=teacher)
    hard, soft = post_evaluate([Candidate("noise", noise, 0)], TEST, protocol, ("hard", "soft"))
    assert soft.mean > 0.6  # 0.85 to 0.9 measured
    assert abs(hard.mean - 1 / 3) < 0.25
    brought = Condensed(noise.x, noise.cond, notes={"logits": logits_of(teacher, noise)})  # type: ignore[arg-type]
    rows = post_evaluate(
        [from_condensed("brought", brought), Candidate("bare", noise, 0)], TEST, protocol, ("hard", "stored")
    )
    assert [(row.name, row.labels) for row in rows] == [("brought", "hard"), ("bare", "hard"), ("brought", "stored")]
    assert rows[2].mean > 0.6
    with pytest.raises(ValueError, match="teacher"):
        post_evaluate([Candidate("noise", noise, 0)], TEST, QUICK, ("soft",))


def trained_on_all() -> Any:
    from fewstep.evaluation.classification import trained

    return trained(Candidate("all", TRAIN, 0), "mlp-classifier", "hard", QUICK, 5)[0]


def test_an_order_is_the_candidates_own() -> None:
    """Random fifths of the data teach another classifier than epochs do, in as many steps."""
    rows = post_evaluate([Candidate("rs2", TRAIN, 0, order=Order.parse("random:0.2"))], TEST, QUICK)
    assert rows[0].mean > 0.6
    with pytest.raises(ValueError, match="no labels"):
        post_evaluate([Candidate("bare", Dataset("bare", TRAIN.x), 0)], TEST, QUICK)
    with pytest.raises(ValueError, match="mlp-classifier"):
        fresh_classifier("mlp", TRAIN)


def test_accuracy_counts() -> None:
    class Told(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot((x.flatten(1)[:, 0] > 0).long(), CLASSES).float()

    x = torch.tensor([1.0, 1.0, -1.0, -1.0]).reshape(4, 1, 1, 1)
    assert accuracy(Told(), Dataset("four", x, torch.tensor([1, 0, 0, 2]))) == 0.5


def test_a_row_has_a_spread() -> None:
    row = Row("x", "mlp", "hard", 1, 2, 0.0, 0.0, (0.5, 0.7))
    assert (row.mean, row.spread) == (pytest.approx(0.6), pytest.approx(0.2 / math.sqrt(2)))
    assert math.isnan(Row("x", "mlp", "hard", 1, 2, 0.0, 0.0, (0.5,)).spread)
    table = rows_table([row], "title", QUICK)
    assert len(table.columns) == len(table.rows[0])
    assert "0.6000 ± 0.1414" in table.rows[0]


def test_the_table_has_the_kinds_of_labels_there_are() -> None:
    made = Condensed(TRAIN.x[:6], TRAIN.cond[:6], notes={"logits": torch.zeros(6, CLASSES)})  # type: ignore[index]
    protocol = Protocol(QUICK.networks, (0,), 2, 4, teacher=fresh_classifier("mlp-classifier", TRAIN))
    told = condensed_table("made", made, TRAIN, TEST, protocol)
    kinds = [(row["name"], row["labels"]) for row in told.data]
    assert kinds == [
        ("random", "hard"), ("made", "hard"), ("all", "hard"), ("made", "stored"),
        ("random", "soft"), ("made", "soft"), ("all", "soft"),
    ]  # fmt: skip
