"""What robust active distillation asked, round by round, and what the teacher said."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from torch import Tensor

from fewstep.data import Samples
from fewstep.data.dataset import class_labels
from fewstep.report.pictures import data_uri, is_picture, sheet
from fewstep.report.runs import RunCourse
from fewstep.report.tasks.figure import Figure
from fewstep.report.tasks.stores import stores

#: Questions that are shown of a round.
SHOWN = 12
ROW = "<tr>{}</tr>\n"


def figures(course: RunCourse, model: object, data: Samples) -> Sequence[Figure]:
    """The questions with their answers, and the rounds in numbers."""
    rounds = sorted(stores(course, "answers"), key=lambda found: int(found["before"][0]))
    if not rounds:
        return ()
    labels = class_labels(data)
    told = [
        Figure(
            "Rounds in numbers",
            "The gain is one less the student's margin: near 1 it cannot decide between two classes. A marginal of 1 "
            "is a question that is asked for certain; robust questions are spread, so that no set of wrong answers "
            "takes all of the gain.",
            numbers(rounds, labels),
        )
    ]
    if is_picture(data.shape):
        told.insert(
            0,
            Figure(
                "What the teacher was asked, and what it said",
                f"The first {SHOWN} questions of each round, the largest gain first. Where the data have the label "
                "(which the run did not see), answers that are wrong are marked.",
                questions(rounds, labels, data),
            ),
        )
    return told


def questions(rounds: Sequence[dict[str, Tensor]], labels: Tensor, data: Samples) -> str:
    """A table of pictures."""
    rows = []
    for number, found in enumerate(rounds):
        first = found["gain"].argsort(descending=True)[:SHOWN]
        x = data.rows(found["index"][first]).x
        assert x is not None
        cells = [f"<th>round {number + 1}</th>"]
        for k, at in enumerate(first.tolist()):
            said, is_ = int(found["logits"][at].argmax()), int(labels[found["index"][at]])
            picture = data_uri(sheet(x[k : k + 1], 1, side=56))
            words = name_of(said, data)
            if 0 <= is_ != said:
                words = f'<b style="color:#c0392b">{words}</b>, is {name_of(is_, data)}'
            cells.append(f'<td style="text-align:center"><img src="{picture}" width="44" alt=""><br>{words}</td>')
        rows.append(ROW.format("".join(cells)))
    return f"<table>{''.join(rows)}</table>"


def name_of(label: int, data: Samples) -> str:
    """A class in words."""
    return escape(data.class_names[label]) if label < len(data.class_names) else str(label)


def numbers(rounds: Sequence[dict[str, Tensor]], labels: Tensor) -> str:
    """A row for every round."""
    head = ("round", "questions", "wrong answers", "mean gain", "asked for certain", "smallest marginal")
    rows = [ROW.format("".join(f"<th>{name}</th>" for name in head))]
    for number, found in enumerate(rounds):
        truth = labels[found["index"]]
        known = truth >= 0
        wrong = (found["logits"].argmax(1) != truth)[known].double().mean()
        cells = (
            str(number + 1), str(len(truth)), f"{float(wrong):.2f}" if bool(known.any()) else "not known",
            f"{float(found['gain'].mean()):.2f}", str(int((found["marginal"] > 1 - 1e-9).sum())),
            f"{float(found['marginal'].min()):.3g}",
        )  # fmt: skip
        rows.append(ROW.format("".join(f"<td>{cell}</td>" for cell in cells)))
    return f"<table>{''.join(rows)}</table>"
