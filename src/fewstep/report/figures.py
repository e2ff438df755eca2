"""The sections of numbers: quality against network calls, and the table of cost and quality."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, TypeAlias

from fewstep.report import plots
from fewstep.report.words import colour, milliseconds, plus_minus, swatch

if TYPE_CHECKING:
    from fewstep.report.comparison import Comparison, Row

#: The title of a table's column, what it shows of a row, and its class: a "roomy" column is left out on narrow screens.
Column: TypeAlias = "tuple[str, Callable[[Row], str], str]"


def quality(comparison: Comparison) -> str:
    """Fréchet distance and class accuracy against the number of network calls."""
    models = {"teacher": comparison.teacher, **comparison.students}
    frechet, accuracy = [], []
    for name, rows in models.items():
        tint = colour(comparison, name)
        found = tuple((row.calls, row.quality.frechet.value, row.quality.frechet.error) for row in rows)
        frechet.append(plots.Series(name, tint, found))
        known = tuple((row.calls, row.accuracy.value, row.accuracy.error) for row in rows if row.accuracy is not None)
        if known:
            accuracy.append(plots.Series(name, tint, known))
    drawings = [
        plots.against_calls(frechet, "Fréchet distance (lower is better)", comparison.floor.value, "real against real")
    ]
    if accuracy:
        title = "Class recognised (higher is better)"
        drawings.append(
            plots.against_calls(accuracy, title, comparison.real_accuracy, "real pictures", logarithmic=False)
        )
    legend = "".join(f"<li>{swatch(comparison, name)}{escape(name)}</li>" for name in models)
    figures = "".join(f"<figure>{drawing}</figure>" for drawing in drawings)
    return (
        "<section>\n<h2>Quality against network calls</h2>\n<p>A network call is what sampling costs. The teacher gets "
        f"better with the calls it is given (solver: {escape(comparison.solver)}); a student was trained to be good "
        "with few. Bars are one standard error of drawing other samples.</p>\n"
        f'<ul class="legend">{legend}</ul>\n<div class="plots">{figures}</div>\n</section>'
    )


def cost_table(comparison: Comparison) -> str:
    """Every row with its cost and its quality; the further measures are folded away."""

    def model(row: Row) -> str:
        return swatch(comparison, row.model) + escape(row.model)

    cost: list[Column] = [
        ("model", model, ""),
        ("network<br>calls", lambda row: str(row.calls), ""),
        ("ms per<br>picture", lambda row: milliseconds(row.seconds), ""),
        ("pictures<br>a&nbsp;second", lambda row: f"{1 / row.seconds:,.0f}", "roomy"),
        ("Fréchet<br>distance", lambda row: plus_minus(row.quality.frechet), ""),
    ]
    if any(row.accuracy is not None for row in comparison.rows):
        cost.append(("class<br>recognised", lambda row: plus_minus(row.accuracy, 3) if row.accuracy else "", ""))
    more: list[Column] = [
        ("model", model, ""),
        ("network<br>calls", lambda row: str(row.calls), ""),
        ("kernel<br>distance", lambda row: plus_minus(row.quality.kernel, 3), ""),
        ("precision", lambda row: f"{row.quality.precision:.2f}", ""),
        ("recall", lambda row: f"{row.quality.recall:.2f}", ""),
        ("diversity", lambda row: f"{row.quality.diversity:.2f}", "roomy"),
        ("near<br>copies", lambda row: f"{100 * row.quality.memorisation.close:.0f}&nbsp;%", ""),
    ]
    first = comparison.rows[0].quality
    return (
        f"<section>\n<h2>What each one costs and gives</h2>\n{table(comparison, cost)}\n"
        f'<p class="faint">Measured on {comparison.n} samples of each model in the features '
        f"“{escape(first.features)}” against {escape(first.reference)} held-out pictures; as many real training "
        f"pictures score {plus_minus(comparison.floor)}. Time is wall time of sampling in batches, the fastest batch. "
        "Bold: the best student of the fewest calls.</p>\n"
        "<details><summary>More measures: kernel distance, precision and recall, diversity, copies</summary>\n"
        f"{table(comparison, more)}</details>\n</section>"
    )


def table(comparison: Comparison, columns: Sequence[Column]) -> str:
    """The rows of a comparison."""
    described = [(title, shown, f' class="{kind}"' if kind else "") for title, shown, kind in columns]
    best, lines = comparison.best(), []
    for row, after in zip(comparison.rows, [*comparison.rows[1:], None], strict=True):
        kind = " ".join(["rule"] * (after is not None and after.role != row.role) + ["best"] * (row is best))
        cells = "".join(f"<td{css}>{shown(row)}</td>" for _, shown, css in described)
        lines.append(f'<tr class="{kind}">{cells}</tr>' if kind else f"<tr>{cells}</tr>")
    header = "".join(f'<th scope="col"{css}>{title}</th>' for title, _, css in described)
    body = "\n".join(lines)
    return f'<div class="scroll"><table>\n<thead><tr>{header}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'
