"""What PCA chose: the canvases, and the pictures that were kept and left out, beside their scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.condense.select import members
from fewstep.data.condensed import Condensed
from fewstep.data.dataset import Samples, as_floats, labels_of
from fewstep.report.pictures import sheet
from fewstep.report.runs import RunCourse
from fewstep.report.tasks.figure import Figure

#: The most classes that are shown, and pictures of each.
CLASSES, SHOWN = 10, 10


def figures(course: RunCourse, model: Any, data: Samples) -> Sequence[Figure]:
    """Three sheets with a row for each class: merged, chosen, left out."""
    classes = min(model.classes, CLASSES)
    chosen, dropped = kept_and_dropped(model, data, classes)
    cells = model.notes["index"].shape[1]
    merged = f"{cells} whole pictures on each canvas" if cells > 1 else "one picture on each canvas"
    scores = model.notes["scores"]
    kept = scores[model.notes["index"].flatten()]
    found = [
        Figure(
            "Merged",
            f"Canvases, a row for each class, {merged}. Training looks at one cell at a time.",
            sheet(as_floats(canvases(model, classes)), columns_of(model)),
        ),
        Figure(
            "Chosen",
            f"Pictures that are on the canvases, a row for each class. Their EL2N is {interval(kept)}, that of all "
            f"data {interval(scores)}; 0 is told with certainty, 1.41 taken for another with certainty.",
            sheet(read(data, chosen), chosen.shape[1]),
        ),
    ]
    if dropped.numel():
        about = "Of each class those that are not on a canvas and whose scores are farthest from the chosen ones'."
        found.append(Figure("Left out", about, sheet(read(data, dropped), dropped.shape[1])))
    return found


def columns_of(model: Condensed) -> int:
    """How many canvases of each class are shown."""
    return min(SHOWN, len(model.x) // model.classes)


def canvases(model: Condensed, classes: int) -> Tensor:
    """The first canvases of each class, class by class."""
    per_class = len(model.x) // model.classes
    return model.x.unflatten(0, (model.classes, per_class))[:classes, : columns_of(model)].flatten(0, 1)


def kept_and_dropped(model: Condensed, data: Samples, classes: int) -> tuple[Tensor, Tensor]:
    """Where in the data pictures of each class lie, ``[classes, n]`` each: the first that were chosen, and of those
    that were not the ones whose scores are the farthest from the mean score of the chosen."""
    labels = labels_of(data.conditions(slice(None)))
    assert labels is not None
    scores = model.notes["scores"]
    index = model.notes["index"].reshape(model.classes, -1)[:classes]
    left = []
    for mine, everyone in zip(index, members(labels, classes), strict=True):
        others = everyone[~torch.isin(everyone, mine)]
        distance = (scores[others] - scores[mine].mean()).abs()
        left.append(others[distance.argsort(descending=True, stable=True)])
    n = min(SHOWN, *(len(others) for others in left))
    return index[:, :SHOWN], torch.stack([others[:n] for others in left])


def read(data: Samples, index: Tensor) -> Tensor:
    """Pictures by their places in the data."""
    x = data.rows(index.flatten()).x
    assert x is not None
    return x


def interval(scores: Tensor) -> str:
    """The range of scores, in words."""
    return f"{float(scores.min()):.2f} to {float(scores.max()):.2f}"
