"""The section of pictures: every model from the same noise and labels, gathered by what they cost."""

from __future__ import annotations

import re
from html import escape, unescape
from typing import TYPE_CHECKING

from torch import Tensor

from fewstep.report.pictures import data_uri, is_picture, sheet
from fewstep.report.words import calls, estimate, swatch

if TYPE_CHECKING:
    from fewstep.report.comparison import Comparison, Row


def sheets(comparison: Comparison) -> str:
    """Pictures of every model from the same noise and labels, gathered by what they cost."""
    if not is_picture(tuple(comparison.real.shape[1:])):
        return ""
    columns = len(comparison.columns) or 10
    full = comparison.full
    parts = [
        "<section>\n<h2>The same noise, every model</h2>\n<p>Each column starts from the same noise"
        + (" and asks for the same class" if comparison.columns else "")
        + " for all models, so look down a column: a student that follows its teacher makes the same picture, one that "
        "only matches the distribution is free to make another good one. Nothing was picked by hand.</p>",
        f'<div class="sheets" style="--columns: {columns}">',
    ]
    if comparison.columns:
        names = "".join(f"<span>{escape(name)}</span>" for name in comparison.columns)
        parts.append(f'<div class="head"><span></span><div class="labels">{names}</div></div>')
    parts.append("<h3>The aim</h3>")
    parts.append(one_sheet("real pictures", "held out, never seen in training", comparison.real, columns))
    parts.append(row_sheet(comparison, full, columns))
    for count in sorted({row.calls for row in comparison.rows if row.role == "student"}):
        parts.append(f"<h3>{calls(count).capitalize()}</h3>")
        for row in comparison.rows:
            if row.calls == count and row is not full:
                parts.append(row_sheet(comparison, row, columns))
    return "\n".join([*parts, "</div>\n</section>"])


def row_sheet(comparison: Comparison, row: Row, columns: int) -> str:
    note = f"{calls(row.calls)}<br>Fréchet {estimate(row.quality.frechet)}"
    return one_sheet(row.model, note, row.pictures, columns, swatch(comparison, row.model))


def one_sheet(name: str, note: str, pictures: Tensor, columns: int, mark: str = "") -> str:
    uri = data_uri(sheet(pictures, columns))
    alt = escape(f"{len(pictures)} pictures: {name}, {unescape(re.sub('<[^>]*>', ', ', note))}")
    return (
        f'<div class="sheet"><div class="caption"><b>{mark}{escape(name)}</b>{note}</div>'
        f'<img src="{uri}" alt="{alt}"></div>'
    )
