"""What Dataset Quantization did: the bins of the data, what is stored of a picture, what training sees of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.data import Samples
from fewstep.data.condensed import Condensed
from fewstep.data.dataset import as_floats
from fewstep.report.pictures import is_picture, sheet
from fewstep.report.runs import RunCourse
from fewstep.report.tasks.figure import Figure

#: Pictures of a row, and bins that are shown.
COLUMNS, ROWS = 10, 10
#: What stands for a patch that is not stored.
GREY = 0.3


def figures(course: RunCourse, model: Condensed, data: Samples) -> Sequence[Figure]:
    """The bins as rows of pictures, their numbers, and stored pictures beside what training sees."""
    found = model.notes
    numbers = Figure(
        "Bins in numbers",
        "Each bin is what a greedy selection takes from what those before left: typical examples first. Examples are "
        "kept from all bins alike. Distances are between samples of one class, as they are read.",
        table(data, model),
    )
    if not is_picture(model.shape):
        return (numbers,)
    told = [
        Figure(
            "From the typical to the unusual",
            "A row is a bin, the first one on top, a column a class. Choosing the best only would keep the first rows; "
            "random sampling takes the rows as they come.",
            bins_sheet(data, model),
        ),
        numbers,
    ]
    if "dropped" in found:
        share = float(found["dropped"].float().mean())
        told.append(
            Figure(
                "What is stored of a picture, and what training sees",
                f"Kept pictures as they are in the data; without the {100 * share:.0f} % of their patches that show "
                "least of the class; and with these filled in from the others.",
                stored_sheet(data, model),
            )
        )
    return told


def labels_in(data: Samples) -> Tensor:
    """The class labels of all data."""
    labels = data.conditions(slice(0, len(data)))
    assert isinstance(labels, Tensor)
    return labels


def pictures(data: Samples, index: Tensor) -> Tensor:
    """Samples of the data by their place."""
    x = data.rows(index).x
    assert x is not None
    return x


def bins_sheet(data: Samples, model: Condensed) -> bytes:
    """An example of each class in each bin, the first in the data; grey where there is none."""
    bin_of, labels = model.notes["bin"], labels_in(data)
    classes = range(min(model.classes, COLUMNS))
    count = int(bin_of.max()) + 1
    shown = sorted({round(k * (count - 1) / (min(count, ROWS) - 1 or 1)) for k in range(min(count, ROWS))})
    cells = []
    for number in shown:
        for name in classes:
            members = ((bin_of == number) & (labels == name)).nonzero()[:1, 0]
            cells.append(pictures(data, members) if len(members) else torch.full((1, *model.shape), GREY))
    return sheet(torch.cat(cells), len(classes), side=56)


def stored_sheet(data: Samples, model: Condensed) -> bytes:
    """Ten kept pictures in three rows: as they are in the data, as they are stored, as training sees them."""
    some = torch.arange(0, len(model.x), max(1, len(model.x) // COLUMNS))[:COLUMNS]
    original = pictures(data, model.notes["kept"][some])
    dropped = on_pixels(model.notes["dropped"][some], original.shape[-2:])
    return sheet(torch.cat([original, original.masked_fill(dropped, GREY), as_floats(model.x[some])]), len(some))


def on_pixels(dropped: Tensor, size: tuple[int, ...]) -> Tensor:
    """Which pixels ``[n, 1, H, W]`` lie in the dropped patches ``[n, L]``, whose sides are equal."""
    height, width = size
    patch = round((height * width / dropped.shape[1]) ** 0.5)
    grid = dropped.view(-1, 1, height // patch, width // patch)
    return grid.repeat_interleave(patch, 2).repeat_interleave(patch, 3)


def spread_of(x: Tensor, labels: Tensor, bin_of: Tensor, number: int) -> tuple[float, float]:
    """Of the examples of a bin, a mean over classes: the distance to the mean of their class, and that between two."""
    away, between = [], []
    for name in labels.unique().tolist():
        mine = labels == name
        some = x[mine & (bin_of == number)].flatten(1).double()
        if len(some) > 1:
            away.append((some - x[mine].flatten(1).double().mean(0)).norm(dim=1).mean())
            between.append(torch.pdist(some).mean())
    nothing = float("nan")
    return (float(torch.stack(away).mean()), float(torch.stack(between).mean())) if away else (nothing, nothing)


def table(data: Samples, model: Condensed) -> str:
    """A row for every bin."""
    bin_of, labels, kept = model.notes["bin"], labels_in(data), model.notes["kept"]
    x = pictures(data, torch.arange(len(data)))
    head = ("bin", "examples", "kept", "to the mean of the class", "between two")
    rows = []
    for number in range(int(bin_of.max()) + 1):
        away, between = spread_of(x, labels, bin_of, number)
        counts = (int((bin_of == number).sum()), int((bin_of[kept] == number).sum()))
        rows.append((str(number + 1), *map(str, counts), f"{away:.2f}", f"{between:.2f}"))
    cells = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f"<table><thead><tr>{''.join(f'<th>{word}</th>' for word in head)}</tr></thead><tbody>{cells}</tbody></table>"
    )
