"""The page: one HTML file that needs nothing else, for somebody who has never heard of distillation.

Pictures and plots are inline, nothing is fetched, and it reads on a phone, in the dark and on paper.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from torch import Tensor

from fewstep.hub.native import write_atomically
from fewstep.metrics import Estimate
from fewstep.report import plots
from fewstep.report.comparison import Comparison, Row
from fewstep.report.pictures import data_uri, is_picture, sheet
from fewstep.report.runs import RunCourse, Sign, StageCourse, method_class, signs
from fewstep.report.style import STYLE

#: Beside the declared signs, a stage shows its losses; gradient norms stay in the log.
_NOT_SHOWN = ("grad_norm", "scales", "warmup")

Column = tuple[str, Callable[[Row], str]]  # the title of a table's column and what it shows of a row


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
    """The page as text."""
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
    full, best = comparison.teacher[-1], comparison.best()
    if best is None:
        return f"{comparison.data}: a teacher at few steps"
    fewest = "one" if best.calls == 1 else str(best.calls)
    return f"From {full.calls} network calls to {fewest}"


def head(comparison: Comparison, runs: Sequence[RunCourse], title: str) -> str:
    """Title, summary and the headline numbers."""
    kicker = f"fewstep report · data: {comparison.data} · {comparison.n} samples of each model, seed {comparison.seed}"
    return (
        f'<header>\n<p class="kicker">{escape(kicker)}</p>\n<h1>{escape(title)}</h1>\n'
        f'<p class="lede">{summary(comparison, runs)}</p>\n{tiles(comparison)}</header>'
    )


def summary(comparison: Comparison, runs: Sequence[RunCourse]) -> str:
    """One paragraph with the headline numbers."""
    full, best = comparison.teacher[-1], comparison.best()
    floor = f"real pictures measured against other real ones score {number(comparison.floor.value)}"
    if best is None:
        return (
            f"The model makes a picture in {calls(full.calls)} with a Fréchet distance of "
            f"{number(full.quality.frechet.value)} from real pictures (lower is better); {floor}."
        )
    same = teacher_at(comparison, best.calls)
    took = next((run.seconds for run in runs if run.name == best.model), None)
    trained = "" if took is None else f", trained for {duration(took)}"
    text = (
        f"The teacher makes a picture in {calls(full.calls)}. The student <b>{escape(best.model)}</b>{trained}, makes "
        f"one in <b>{calls(best.calls)}</b>. Its Fréchet distance from real pictures (lower is better) is "
        f"<b>{estimate(best.quality.frechet)}</b>; the teacher's is {estimate(full.quality.frechet)}"
    )
    if same is not None and same is not full:
        text += f", and {estimate(same.quality.frechet)} when it gets {calls(best.calls)} as well"
    return f"{text}. For scale, {floor}."


def tiles(comparison: Comparison) -> str:
    """The headline numbers as tiles."""
    full, best = comparison.teacher[-1], comparison.best()
    if best is None:
        return ""
    told = [
        (f"{full.calls} → {best.calls}", f"network calls for a picture, teacher → {escape(best.model)}"),
        (
            f"{factor(full.seconds / best.seconds)} faster",
            f"{milliseconds(full.seconds)} → {milliseconds(best.seconds)} ms for a picture on this machine",
        ),
    ]
    same = teacher_at(comparison, best.calls)
    there, reached = full.quality.frechet.value, best.quality.frechet.value
    start = there if same is None else same.quality.frechet.value
    # a share of a gap that is within the errors, or of the wrong sign, would say nothing
    if same is not None and start - there > 3 * same.quality.frechet.error and start > reached:
        told.append((
            f"{100 * (start - reached) / (start - there):.0f} %",
            f"of the way from the teacher's pictures in {calls(same.calls)} (Fréchet {number(start)}) to those in "
            f"{calls(full.calls)} ({number(there)})",
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


def sheets(comparison: Comparison) -> str:
    """Pictures of every model from the same noise and labels, gathered by what they cost."""
    if not is_picture(tuple(comparison.real.shape[1:])):
        return ""
    columns = len(comparison.columns) or 10
    full = comparison.teacher[-1]
    parts = [
        '<section>\n<h2>The same noise, every model</h2>\n<p>Each column starts from the same noise'
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
    alt = escape(f"{len(pictures)} pictures: {name}, {re.sub('<[^>]*>', ', ', note)}")
    return (
        f'<div class="sheet"><div class="caption"><b>{mark}{escape(name)}</b>{note}</div>'
        f'<img src="{uri}" alt="{alt}"></div>'
    )


def quality(comparison: Comparison) -> str:
    """Quality against the number of network calls."""
    frechet, accuracy = [], []
    colour = {"teacher": plots.INK} | {
        name: plots.student_colour(i) for i, name in enumerate(comparison.students)
    }
    for name, rows in {"teacher": comparison.teacher, **comparison.students}.items():
        found = [(row.calls, row.quality.frechet.value, row.quality.frechet.error) for row in rows]
        frechet.append(plots.Series(name, colour[name], tuple(found)))
        known = [(row.calls, row.accuracy.value, row.accuracy.error) for row in rows if row.accuracy is not None]
        if known:
            accuracy.append(plots.Series(name, colour[name], tuple(known)))
    drawings = [
        plots.against_calls(frechet, "Fréchet distance (lower is better)", comparison.floor.value, "real against real")
    ]
    if accuracy:
        drawings.append(plots.against_calls(accuracy, "Class recognised (higher is better)", logarithmic=False))
    legend = "".join(f"<li>{swatch(comparison, name)}{escape(name)}</li>" for name in colour)
    figures = "".join(f"<figure>{drawing}</figure>" for drawing in drawings)
    return (
        "<section>\n<h2>Quality against network calls</h2>\n<p>A network call is what sampling costs. The teacher gets "
        f"better with every call it is given (solver: {escape(comparison.solver)}); a student was trained to be good "
        "at once. Bars are one standard error of drawing other samples.</p>\n"
        f'<ul class="legend">{legend}</ul>\n<div class="plots">{figures}</div>\n</section>'
    )


def cost_table(comparison: Comparison) -> str:
    """Every row with its cost and its quality; the further measures are folded away."""
    with_accuracy = any(row.accuracy is not None for row in comparison.rows)

    def model(row: Row) -> str:
        return swatch(comparison, row.model) + escape(row.model)

    cost: list[Column] = [("model", model), ("network<br>calls", lambda row: str(row.calls))]
    cost += [("ms per<br>picture", lambda row: milliseconds(row.seconds))]
    cost += [("pictures<br>a&nbsp;second", lambda row: f"{1 / row.seconds:,.0f}")]
    cost += [("Fréchet<br>distance", lambda row: plus_minus(row.quality.frechet))]
    if with_accuracy:
        cost += [("class<br>recognised", lambda row: plus_minus(row.accuracy, 3) if row.accuracy else "")]
    more: list[Column] = [
        ("model", model),
        ("network<br>calls", lambda row: str(row.calls)),
        ("kernel<br>distance", lambda row: plus_minus(row.quality.kernel, 3)),
        ("precision", lambda row: f"{row.quality.precision:.2f}"),
        ("recall", lambda row: f"{row.quality.recall:.2f}"),
        ("diversity", lambda row: f"{row.quality.diversity:.2f}"),
        ("near<br>copies", lambda row: f"{100 * row.quality.memorisation.close:.0f}&nbsp;%"),
    ]
    first = comparison.rows[0].quality
    return (
        f"<section>\n<h2>What each one costs and gives</h2>\n{table(comparison, cost)}\n"
        f'<p class="faint">Measured on {comparison.n} samples of each model in the features '
        f"“{escape(first.features)}” against {escape(first.reference)} held-out pictures; as many real training "
        f"pictures score {plus_minus(comparison.floor)}. Time is wall time of sampling in batches, the fastest batch. "
        "Bold: the best student of the fewest calls.</p>\n"
        f"<details><summary>More measures: kernel distance, precision and recall, diversity, copies</summary>\n"
        f"{table(comparison, more)}</details>\n</section>"
    )


def table(comparison: Comparison, columns: Sequence[Column]) -> str:
    """The rows of a comparison; a column is a title and what it shows of a row."""
    best, lines = comparison.best(), []
    for row, after in zip(comparison.rows, [*comparison.rows[1:], None], strict=True):
        kind = " ".join(["rule"] * (after is not None and after.role != row.role) + ["best"] * (row is best))
        cells = "".join(f"<td>{shown(row)}</td>" for _, shown in columns)
        lines.append(f'<tr class="{kind}">{cells}</tr>' if kind else f"<tr>{cells}</tr>")
    header = "".join(f'<th scope="col">{title}</th>' for title, _ in columns)
    body = "\n".join(lines)
    return (
        f'<div class="scroll"><table>\n<thead><tr>{header}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'
    )


def training(comparison: Comparison, runs: Sequence[RunCourse]) -> str:
    """How each student was trained, and whether the run looks healthy."""
    if not runs:
        return ""
    parts = [
        "<section>\n<h2>How they were trained</h2>\n<p>Every method says what a healthy run looks like. Here is that, "
        "beside what was measured: faint every record, strong a running mean; numbers are medians over the first and "
        "the last tenth of the run.</p>"
    ]
    known = list(comparison.students)
    for run in runs:
        colour = plots.student_colour(known.index(run.name)) if run.name in known else plots.INK
        parts.append(one_run(run, colour))
    return "\n".join([*parts, "</section>"])


def one_run(run: RunCourse, colour: str) -> str:
    steps, images = sum(s.steps for s in run.stages), sum(s.images for s in run.stages)
    paper = method_class(run.stages[-1].method).paper
    dot = f'<span class="swatch" style="background: var({plots.variable(colour)})"></span>'
    parts = [
        f"<h3>{dot}{escape(run.name)}</h3>",
        f'<p>{escape(paper.title)} (<a href="https://arxiv.org/abs/{paper.arxiv}">arXiv {paper.arxiv}</a>; evidence: '
        f"{paper.evidence}). {steps:,} steps, {images:,} pictures seen, {duration(run.seconds)}"
        + (f", in {len(run.stages)} stages" if len(run.stages) > 1 else "")
        + ".</p>",
    ]
    for k, stage in enumerate(run.stages):
        if len(run.stages) > 1:
            parts.append(f'<p class="faint">Stage {k + 1}: {escape(stage.method)}, {duration(stage.seconds)}</p>')
        drawn = courses(stage, colour)
        if k + 1 == len(run.stages):
            drawn.append(deviations(run))
        parts.append(f'<div class="courses">{"".join(drawn)}</div>')
    return "\n".join(parts)


def deviations(run: RunCourse) -> str:
    """What the methods of a run do otherwise than their papers."""
    texts = dict.fromkeys(text for stage in run.stages for text in method_class(stage.method).paper.deviations)
    items = "".join(f"<li>{escape(text)}</li>" for text in texts) or "<li>nothing known</li>"
    return f'<div class="course"><b>What differs from the paper</b><ul class="notes">{items}</ul></div>'


def courses(stage: StageCourse, colour: str) -> list[str]:
    """A drawing of each logged scalar: the declared signs first, then the other losses."""
    declared = {sign.key: sign for sign in signs(stage)}
    others = (key for key in stage.scalars() if key not in declared and key.split("/")[-1] not in _NOT_SHOWN)
    drawn = []
    for key in (*declared, *others):
        seconds, values = stage.curve(key)
        if len(values) > 1:
            drawn.append(one_course(key, plots.course(seconds, values, colour), declared.get(key)))
    return drawn


def one_course(key: str, drawing: str, sign: Sign | None) -> str:
    numbers = "" if sign is None else f'<span class="numbers">{number(sign.first)} → {number(sign.last)}</span>'
    healthy = "" if sign is None else f"<p>Healthy: {escape(sign.sentence)}.</p>"
    return f'<div class="course">{numbers}<b>{escape(key)}</b>{drawing}{healthy}</div>'


def repeat(runs: Sequence[RunCourse], commands: str) -> str:
    """The exact commands."""
    calls_made = [f"{variable_name(run.name)} = {run.note.call()}" for run in runs if run.note is not None]
    if not commands and not calls_made:
        return ""
    parts = ["<section>\n<h2>To repeat it</h2>"]
    if commands:
        parts.append(f"<pre>{escape(commands)}</pre>")
    if calls_made:
        text = "\n".join(["import fewstep as fs", "", *calls_made])
        parts.append(f"<p>Each student alone, in Python:</p>\n<pre>{escape(text)}</pre>")
        parts.append(
            '<p class="faint">A budget in seconds gives other weights on another machine; one in steps ("500steps") '
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
        f"few samples even real pictures score {number(comparison.floor.value)}. Compare it only at the same number of "
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


def teacher_at(comparison: Comparison, count: int) -> Row | None:
    """The teacher's row with so many calls."""
    return next((row for row in comparison.teacher if row.calls == count), None)


def swatch(comparison: Comparison, model: str) -> str:
    """A dot in the colour of a model."""
    students = list(comparison.students)
    colour = plots.student_colour(students.index(model)) if model in students else plots.INK
    return f'<span class="swatch" style="background: var({plots.variable(colour)})"></span>'


def variable_name(name: str) -> str:
    """A run's name as a Python name."""
    word = re.sub(r"\W+", "_", name).strip("_")
    return word if word.isidentifier() else f"student_{word}"


def calls(count: int) -> str:
    """"one network call", "4 network calls"."""
    return "one network call" if count == 1 else f"{count} network calls"


def number(value: float) -> str:
    """Three significant digits at most, without an exponent where it can be avoided."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def estimate(value: Estimate) -> str:
    return f"{number(value.value)}&nbsp;±&nbsp;{value.error:.2g}"


def plus_minus(value: Estimate, digits: int = 2) -> str:
    return f"{value.value:.{digits}f} <small>± {value.error:.{digits}f}</small>"


def milliseconds(seconds: float) -> str:
    return number(1000 * seconds)


def factor(ratio: float) -> str:
    return f"{ratio:.0f}&times;" if ratio >= 10 else f"{ratio:.1f}&times;"


def duration(seconds: float) -> str:
    """"45 s", "1 min 40 s", "3.2 h"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{seconds / 3600:.1f} h"
