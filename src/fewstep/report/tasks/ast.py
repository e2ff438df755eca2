"""What AST did to its images: what they started as, and what they became."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.data import Samples
from fewstep.data.condensed import Condensed
from fewstep.report.pictures import is_picture, sheet
from fewstep.report.runs import RunCourse
from fewstep.report.tasks.figure import Figure

#: Classes, and images of each, that are shown.
CLASSES, EACH = 10, 5


def figures(course: RunCourse, model: Condensed, data: Samples) -> Sequence[Figure]:
    """The images before and after, a column a class; nothing for samples that are no pictures."""
    if not is_picture(model.shape):
        return ()
    eta = float(model.notes["eta"])
    shown = [columns(x.float(), model.labels) for x in (model.notes["start"], model.x)]
    count = min(CLASSES, model.classes)
    return (
        Figure(
            "What the images started as",
            "A column is a class. Representative or random real ones, or noise, as the run was asked.",
            sheet(shown[0], count),
        ),
        Figure(
            "What they became",
            "The same images in the same places. They need not look like their class: they are made so that the "
            f"steps of a network that learns from them, at the learned rate of {eta:.2g}, follow those of experts that "
            "saw all data. Numbers outside of the range of pictures are cut off here, and not in training.",
            sheet(shown[1], count),
        ),
    )


def columns(x: Tensor, labels: Tensor) -> Tensor:
    """The first images of the first classes, row by row with a column for each class."""
    found = [x[labels == name][:EACH] for name in labels.unique().tolist()[:CLASSES]]
    return torch.stack(found, 1).flatten(0, 1)
