"""A classifier's run: which examples it read in which round, and which of them it still finds hard."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.classifiers import NetworkClassifier
from fewstep.data import Samples
from fewstep.data.dataset import class_labels
from fewstep.evaluation.classification import logits_of
from fewstep.report.pictures import is_picture, png, sheet
from fewstep.report.runs import RunCourse
from fewstep.report.tasks.figure import Figure
from fewstep.training.orders import Order

#: So many examples and rounds are drawn, each a square of so many pixels.
EXAMPLES, ROUNDS, SIDE = 200, 30, 4
#: Hard examples that are shown.
HARD = 20


def figures(course: RunCourse, model: NetworkClassifier, data: Samples) -> Sequence[Figure]:
    """The rounds of a run whose order has any, and its hardest examples where those are pictures."""
    settings = {} if course.note is None else course.note.settings
    found = []
    if course.order != "epochs":
        order = Order.parse(course.order)
        read = rounds(order, data, int(settings.get("seed", 0)), sum(stage.images for stage in course.stages))
        found.append(Figure(
            "What was read",
            f"Examples from left to right (the first {read.shape[1]}), rounds from top to bottom (the first "
            f"{len(read)}); dark where an example is read in a round. Nobody is in a round twice, and sooner or later "
            "everybody is in one.",
            png(drawn(read)),
        ))  # fmt: skip
    if is_picture(tuple(data.shape)):
        index, said = hardest(model, data)
        pictures = data.rows(index).x
        assert pictures is not None
        found.append(Figure("What it finds hard", said, sheet(pictures, 10, 72)))
    return found


def rounds(order: Order, data: Samples, seed: int, images: int) -> Tensor:
    """Which of the first examples are read in the first rounds of a run of so many ``images``: bool ``[R, E]``."""
    reading = order.read(data, 0, max(1, images), seed)
    examples = min(EXAMPLES, len(data))
    count = min(ROUNDS, int(reading.epochs[-1]) + 1)
    read = torch.zeros(count, examples, dtype=torch.bool)
    shown = (reading.indices < examples) & (reading.epochs < count)
    read[reading.epochs[shown], reading.indices[shown]] = True
    return read


def drawn(read: Tensor) -> Tensor:
    """The table of rounds as pixels ``[H, W, 1]``, on a grey that tells examples from the page."""
    levels = torch.where(read, 40, 225).to(torch.uint8)
    return levels.repeat_interleave(SIDE, 0).repeat_interleave(SIDE, 1)[..., None]


def hardest(model: NetworkClassifier, data: Samples) -> tuple[Tensor, str]:
    """The examples whose class the classifier gives the least probability, and a sentence on them."""
    labels = class_labels(data)
    told = logits_of(model, data).log_softmax(1)
    own = told.gather(1, labels[:, None])[:, 0]
    index = own.argsort(stable=True)[: min(HARD, len(data))]
    wrong, least = int((told.argmax(1) != labels).sum()), float(own[index[0]].exp())
    return index, (
        f"The {len(index)} training examples whose class it gives the least probability, {least:.2g} for the first; of "
        f"all {len(data):,} it takes {wrong:,} for another class."
    )
