"""The page: one HTML file that needs nothing else, for somebody who has never heard of distillation.

Pictures and plots are inline, nothing is fetched, and it reads on a phone, in the dark and on paper.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.files import write_atomically
from fewstep.report.courses import training
from fewstep.report.figures import cost_table, quality
from fewstep.report.runs import RunCourse
from fewstep.report.sheets import sheets
from fewstep.report.style import STYLE
from fewstep.report.words import calls, duration, estimate, factor, milliseconds, number

if TYPE_CHECKING:
    from fewstep.report.comparison import Comparison, Row


def write(
    comparison: Comparison,
    path: Path,
    runs: Sequence[RunCourse] = (),
    title: str = "",
    commands: str = "",
    left_out: Sequence[str] = (),
) -> Path:
    """Write the page to ``path``, replacing it whole.

    ``runs`` adds how the students were trained; ``commands`` is shown as what repeats everything; ``left_out`` are
    sentences on what the page does not show.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, html(comparison, runs, title, commands, left_out).encode())
    return path


def html(
    comparison: Comparison,
    runs: Sequence[RunCourse] = (),
    title: str = "",
    commands: str = "",
    left_out: Sequence[str] = (),
) -> str:
    """The page as text; ValueError for a comparison without the teacher."""
    if not comparison.teacher:
        raise ValueError("the comparison has no rows of the teacher, beside which a page shows its students")
    comparison = replace(comparison, trained=tuple(run.name for run in runs))
    title = title or headline(comparison)
    sections = [
        head(comparison, runs, title),
        sheets(comparison),
        quality(comparison),
        cost_table(comparison),
        training(comparison, runs),
        repeat(runs, commands),
        reading(comparison),
        foot(comparison, left_out),
    ]
    numbers = comparison.to_json().replace("</", "<\\/")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="generator" content="fewstep {escape(comparison.versions.get("fewstep", ""))}">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + f'\n</main>\n<script type="application/json" id="numbers">{numbers}</script>\n</body>\n</html>\n'
    )


def headline(comparison: Comparison) -> str:
    """A title from the numbers."""
    full, best = comparison.full, comparison.best()
    if best is None:
        return f"{comparison.data}: a teacher at few steps"
    if best.calls >= full.calls:
        return f"{comparison.data}: a teacher that needs no more calls than its students"
    fewest = "one" if best.calls == 1 else str(best.calls)
    return f"From {full.calls} network calls to {fewest}"


def head(comparison: Comparison, runs: Sequence[RunCourse], title: str) -> str:
    """Title, summary and the headline numbers."""
    kicker = f"fewstep report · data: {comparison.data} · {comparison.n} samples of each model, seed {comparison.seed}"
    kicker += "".join(f" · {name}={value:g}" for name, value in comparison.extras.items())
    return (
        f'<header>\n<p class="kicker">{escape(kicker)}</p>\n<h1>{escape(title)}</h1>\n'
        f'<p class="lede">{summary(comparison, runs)}</p>\n{tiles(comparison)}</header>'
    )


def summary(comparison: Comparison, runs: Sequence[RunCourse]) -> str:
    """One paragraph with the headline numbers; ``runs`` are those of the students that were trained."""
    comparison = replace(comparison, trained=tuple(run.name for run in runs))
    full, best = comparison.full, comparison.best()
    floor = f"real pictures measured against other real ones score {comparison.floor.value:.2f}"
    if best is None:
        return (
            f"The model makes a picture in {calls(full.calls)} with a Fréchet distance of "
            f"{number(full.quality.frechet.value)} from real pictures (lower is better); {floor}."
        )
    same = teacher_at(comparison, best.calls)
    took = {run.name: run.seconds for run in runs}
    trained = f", trained for {duration(took[best.model])}," if best.model in took else ""
    text = (
        f"The teacher makes a picture in {calls(full.calls)}. The student <b>{escape(best.model)}</b>{trained} makes "
        f"one in <b>{calls(best.calls)}</b>. Its Fréchet distance from real pictures (lower is better) is "
        f"<b>{estimate(best.quality.frechet)}</b>; the teacher's is {estimate(full.quality.frechet)}"
    )
    if same is not None and same is not full:
        text += f", and {estimate(same.quality.frechet)} when it gets {calls(best.calls)} as well"
    equal = next((row for row in comparison.teacher if as_good(row, best)), None)
    if equal is None:
        text += ". With none of the numbers of calls tried here does the teacher do as well as this student"
    elif equal.calls > best.calls:
        text += f". To do as well as this student, the teacher needs {calls(equal.calls)}"
    others = [row for row in comparison.rows if row.role == "student" and row.model not in took]
    others = [row for row in others if took and row.calls == best.calls]
    if others:
        row = min(others, key=lambda row: row.quality.frechet.value)
        text += f". <b>{escape(row.model)}</b>, which was not trained here, comes to {estimate(row.quality.frechet)}"
    return f"{text}. For scale, {floor}."


def tiles(comparison: Comparison) -> str:
    """The headline numbers as tiles."""
    full, best = comparison.full, comparison.best()
    if best is None:
        return ""
    told = [(f"{full.calls} → {best.calls}", f"network calls for a picture, teacher → {escape(best.model)}")]
    if best.seconds < full.seconds:
        told.append((
            f"{factor(full.seconds / best.seconds)} faster",
            f"{milliseconds(full.seconds)} → {milliseconds(best.seconds)} ms for a picture on this machine",
        ))  # fmt: skip
    same = teacher_at(comparison, best.calls)
    there, reached = full.quality.frechet.value, best.quality.frechet.value
    start = there if same is None else same.quality.frechet.value
    # a share of a gap that is within the errors, or of the wrong sign, would say nothing
    if same is not None and start - there > 3 * same.quality.frechet.error and start > reached:
        told.append((
            f"{100 * (start - reached) / (start - there):.0f} %",
            f"of the way from the teacher's pictures in {calls(same.calls)} (Fréchet {start:.1f}) to those in "
            f"{calls(full.calls)} ({there:.1f})",
        ))  # fmt: skip
    if best.accuracy is not None and full.accuracy is not None:
        told.append((
            f"{100 * best.accuracy.value:.0f} %",
            f"of its pictures show the class that was asked for (teacher: {100 * full.accuracy.value:.0f} %)",
        ))  # fmt: skip
    return (
        '<div class="tiles">\n'
        + "".join(f'<div class="tile"><b>{value}</b>{text}</div>\n' for value, text in told)
        + "</div>\n"
    )


def repeat(runs: Sequence[RunCourse], commands: str) -> str:
    """The exact commands."""
    noted = [(run, run.note) for run in runs if run.note is not None]
    if not commands and not noted:
        return ""
    parts = ["<section>\n<h2>To repeat it</h2>"]
    if commands:
        parts.append(f"<pre>{escape(commands)}</pre>")
    if noted:
        shell = "\n".join(note.shell(run.folder) for run, note in noted)
        python = "\n".join(
            ["import fewstep as fs", *(f"{name_of(run)} = {note.call(run.folder)}" for run, note in noted)]
        )
        parts.append(
            f"<p>Each student alone:</p>\n<pre>{escape(shell)}</pre>\n"
            f"<details><summary>The same in Python</summary>\n<pre>{escape(python)}</pre></details>\n"
            '<p class="faint">A budget in seconds gives other weights on another machine; one in steps (500steps) '
            "repeats bit for bit on the same one.</p>"
        )
    return "\n".join([*parts, "</section>"])


def reading(comparison: Comparison) -> str:
    """The words of this page, explained."""
    terms = {
        "Teacher, student": "The teacher is an ordinary diffusion model: it starts from noise and removes it little by "
        "little, one network call at a time. A student is a copy of it, trained to need only a few of those calls.",
        "Fréchet distance": "How far the samples are from held-out real pictures, as a whole: features of a classifier "
        "are computed for both sets and the means and covariances of the two are compared. 0 would be equal; with so "
        f"few samples even real pictures score {comparison.floor.value:.2f}. Compare it only at the same number of "
        "samples and in the same features.",
        "Class recognised": "The share of samples that a classifier takes for the class that was asked for.",
        "Kernel distance": "The same question, asked with a kernel instead of two moments; around 0, below it too, for "
        "real pictures.",
        "Precision, recall, diversity": "The share of samples that lie among the real pictures; the share of real "
        "pictures that lie among the samples; the mean distance between two samples of a class, over that of real "
        "ones. A student that makes one perfect picture again and again has high precision and low recall.",
        "Near copies": "The share of samples that are closer to a training picture than the nearest 5 % of held-out "
        "pictures are. Much more than 5 % means the model repeats its training data.",
    }
    if not any(row.accuracy is not None for row in comparison.rows):
        del terms["Class recognised"]
    listed = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>\n" for term, text in terms.items())
    return f"<section>\n<h2>How to read it</h2>\n<dl>\n{listed}</dl>\n</section>"


def foot(comparison: Comparison, left_out: Sequence[str]) -> str:
    """Versions, machine, and what is not on the page."""
    versions = ", ".join(f"{escape(name)} {escape(version)}" for name, version in comparison.versions.items())
    machine = ", ".join(f"{escape(name)}: {escape(value)}" for name, value in comparison.machine.items())
    missing = "".join(f"<p>Left out: {escape(text)}</p>" for text in left_out)
    return f"<footer>{missing}<p>{versions}.<br>{machine}.</p></footer>"


def as_good(row: Row, other: Row) -> bool:
    """Whether a row is as good as another, to within one standard error of their difference."""
    ours, theirs = row.quality.frechet, other.quality.frechet
    return ours.value <= theirs.value + math.hypot(ours.error, theirs.error)


def teacher_at(comparison: Comparison, count: int) -> Row | None:
    """The teacher's row with so many calls."""
    return next((row for row in comparison.teacher if row.calls == count), None)


def name_of(run: RunCourse) -> str:
    """A run's name as a Python name."""
    word = re.sub(r"\W+", "_", run.name).strip("_")
    return word if word.isidentifier() else f"student_{word}"
