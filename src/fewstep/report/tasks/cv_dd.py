"""Pictures of CV-DD: what was recovered from what, and who voted with which weight."""

from __future__ import annotations

from html import escape
from typing import Any

import torch
from torch import Tensor

from fewstep.data import Samples
from fewstep.data.dataset import as_floats
from fewstep.report.pictures import is_picture, sheet
from fewstep.report.runs import RunCourse
from fewstep.report.tasks.figure import Figure

#: So many pictures a class, and so many classes, are shown.
MOST_ROWS, MOST_CLASSES = 5, 20


def figures(course: RunCourse, model: Any, data: Samples) -> list[Figure]:
    """The sheet of pictures, where they are pictures, and the table of votes."""
    found = [votes(model.notes)]
    return [recovered(model, data), *found] if is_picture(model.shape) else found


def recovered(model: Any, data: Samples) -> Figure:
    """A row of samples that pictures began as, one of every class, above the row of what became of them."""
    classes = model.classes
    rows: list[Tensor] = []
    for j in range(min(MOST_ROWS, len(model.x) // classes)):
        here = torch.arange(j * classes, j * classes + min(classes, MOST_CLASSES))
        begun = data.rows(model.notes["begun"][here]).x
        assert begun is not None
        rows += [begun.float(), as_floats(model.x[here])]
    columns = min(classes, MOST_CLASSES)
    caption = (
        "Each pair of rows: the real picture of a class that recovery began with, or with a patch of, and what its "
        "committee made of it."
    )
    return Figure("Recovered pictures", caption, sheet(torch.cat(rows), columns, 64))


def votes(notes: dict[str, Tensor]) -> Figure:
    """Who looked at which index of pictures, and the weight of each."""
    priors = notes["priors"].tolist()
    body = []
    for j, (members, weights) in enumerate(zip(notes["committees"].tolist(), notes["weights"].tolist(), strict=True)):
        told = ", ".join(f"member {m}: {w:.3f}" for m, w in zip(members, weights, strict=True))
        body.append(f"<tr><td>{j}</td><td>{escape(told)}</td></tr>")
    head = "<tr><th>picture of each class</th><th>weights of its committee</th></tr>"
    known = ", ".join(f"member {m} {prior:.1f}" for m, prior in enumerate(priors))
    caption = f"Members of the pool vote with the softmax of their priors, in percent: {known}. All label the views."
    return Figure("Who voted", caption, f"<table><thead>{head}</thead><tbody>{''.join(body)}</tbody></table>")
