"""What DisWOT searched: every student that was scored, and how far the scores can be trusted."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fewstep.data import Samples
from fewstep.report import plots
from fewstep.report.runs import RunCourse
from fewstep.report.tasks.figure import Figure
from fewstep.report.tasks.stores import stores
from fewstep.students.diswot import USUAL

#: Students that are listed.
LISTED = 10


def figures(course: RunCourse, model: object, data: Samples) -> Sequence[Figure]:
    """Scores against parameters, and the best students."""
    told = []
    for found in stores(course, "search"):
        names = proxies_of(course, found)
        taus = zip(names, found["agreement"][0].tolist(), strict=True)
        agreement = ", ".join(f"{name} {tau:.2f}" for name, tau in taus)
        draws = found["scores"].shape[1]
        told += [
            Figure(
                "Every student that was scored",
                f"{len(found['total'])} students, none of them trained. The marked one was taken. A score is the mean "
                f"over {draws} draws of weights and pictures, in units of its spread over random students.",
                scatter(found),
            ),
            Figure(
                "The best students",
                f"Kendall's tau between the rankings of two halves of the {draws} draws: {agreement}. "
                "Near 0 the ranking is noise, and the choice among the listed is arbitrary.",
                table(found, names),
            ),
        ]
    return told


def proxies_of(course: RunCourse, found: dict[str, Tensor]) -> tuple[str, ...]:
    """The names of the scores, in their order; where nobody named them, as many of the usual ones as there are."""
    named = None if course.note is None else course.note.arguments.get("proxies")
    return tuple(named or USUAL[: found["scores"].shape[2]])


def scatter(found: dict[str, Tensor]) -> str:
    """Total score against parameters."""
    best = int(found["total"].argmax())
    size, total = found["parameters"].tolist(), found["total"].tolist()
    return plots.scatter(size, total, [best], "parameters", "score", plots.STUDENTS[0])


def table(found: dict[str, Tensor], names: Sequence[str]) -> str:
    """The first by their score."""
    first = found["total"].argsort(descending=True)[:LISTED]
    head = ("blocks", "channels", "parameters", *names, "together")
    rows = ["<tr>" + "".join(f"<th>{name}</th>" for name in head) + "</tr>\n"]
    for k in first.tolist():
        *depths, width = found["student"][k].tolist()
        means = [f"{score:.3g}" for score in found["scores"][k].mean(0).tolist()]
        cells = (
            "-".join(map(str, depths)), str(width), f"{int(found['parameters'][k]):,}", *means,
            f"{float(found['total'][k]):+.2f}",
        )  # fmt: skip
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>\n")
    return f"<table>{''.join(rows)}</table>"
