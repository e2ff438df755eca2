"""Measurements as tables: what the command line prints, files keep and reports show is one thing."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fewstep.classifiers import NetworkClassifier
from fewstep.data.condensed import Condensed
from fewstep.data.dataset import Samples
from fewstep.evaluation.classification import (
    Labels,
    Protocol,
    Row,
    Show,
    accuracy,
    from_condensed,
    post_evaluate,
    with_baselines,
)

#: Samples in the batch that a classifier is timed on, and how often.
TIMED, ROUNDS = 100, 5


@dataclass(frozen=True)
class Table:
    """A table in words: the first column names, the others are figures.  ``note`` says how to read it, ``data`` are the
    figures as plain data."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str
    data: Sequence[Mapping[str, Any]] = field(default_factory=list)


def quiet(done: float, what: str) -> None:
    """Shows nothing."""


def classifier_table(models: Mapping[str, NetworkClassifier], test: Samples) -> Table:
    """Classifiers by name on held-out data: accuracy with its standard error, size, time."""
    rows, data = [], []
    for name, model in models.items():
        found, seconds, size = accuracy(model, test), seconds_each(model, test), parameters(model)
        error = math.sqrt(found * (1 - found) / len(test))
        rows.append((name, f"{found:.4f} ± {error:.4f}", f"{size:,}", f"{1000 * seconds:.3f}"))
        data.append({"model": name, "accuracy": found, "error": error, "parameters": size, "seconds": seconds})
    note = f"{len(test)} held-out samples; the error is that of drawing others; ms a sample in batches of {TIMED}"
    return Table(f"{test.name}, held out", ("model", "accuracy", "parameters", "ms"), tuple(rows), note, data)


@torch.no_grad()
def seconds_each(model: nn.Module, data: Samples) -> float:
    """The seconds that a sample takes, in the fastest of some batches."""
    x = data.rows(torch.arange(TIMED) % len(data)).x
    assert x is not None
    took = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        model(x)
        took.append(time.perf_counter() - start)
    return min(took) / TIMED


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def condensed_table(
    name: str,
    made: Condensed,
    train: Samples,
    test: Samples,
    protocol: Protocol,
    *,
    seconds: float = 0.0,
    show: Show = quiet,
) -> Table:
    """What classifiers learn from a condensed set, beside as many random samples and all of them."""
    candidate = from_condensed(name, made, seconds)
    candidates = with_baselines(candidate, train)
    kinds: list[Labels] = ["hard"]
    if candidate.brings_labels:
        kinds.append("stored")
    if protocol.teacher is not None:
        kinds.append("soft")
    return rows_table(post_evaluate(candidates, test, protocol, kinds, show), f"{train.name}, held out", protocol)


def rows_table(rows: Sequence[Row], title: str, protocol: Protocol) -> Table:
    """Rows of a post-evaluation as a table."""
    told = tuple((*cells_of(row), f"{row.chosen:.1f}", f"{row.seconds:.1f}") for row in rows)
    note = (
        f"every classifier was trained for {protocol.steps} steps of {protocol.batch} samples; ± is the standard "
        f"deviation over {len(protocol.seeds)} first weights; 'chosen' are the seconds of making the set, once"
    )
    columns = ("data", "network", "labels", "images", "kB", "accuracy", "chosen s", "training s")
    data = [vars(row) | {"accuracies": list(row.accuracies), "mean": row.mean} for row in rows]
    return Table(title, columns, told, note, data)


def cells_of(row: Row) -> tuple[str, ...]:
    """What a row says of the data and of what was learned."""
    spread = f" ± {row.spread:.4f}" if len(row.accuracies) > 1 else ""
    size = (f"{row.images:,}", f"{row.bytes / 1000:,.1f}")
    return row.name, row.network, row.labels, *size, f"{row.mean:.4f}{spread}"
