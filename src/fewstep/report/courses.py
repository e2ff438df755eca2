"""The section on training: how each student was made and whether its run looks healthy."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from fewstep.report import plots
from fewstep.report.runs import RunCourse, Sign, StageCourse, method_class, signs
from fewstep.report.words import colour, duration, milliseconds, number, swatch

if TYPE_CHECKING:
    from fewstep.report.comparison import Comparison

#: Beside the declared signs a stage shows its losses; these stay in the log.
_NOT_SHOWN = ("grad_norm", "lr", "scales", "warmup")


def training(comparison: Comparison, runs: Sequence[RunCourse]) -> str:
    """How each student was trained, and whether the run looks healthy."""
    if not runs:
        return ""
    parts = [
        "<section>\n<h2>How they were trained</h2>\n<p>Every method says what a healthy run looks like. Here is that, "
        "beside what was measured: faint every record, strong a running mean; numbers are medians over the first and "
        "the last tenth of the run.</p>"
    ]
    parts += [one_run(comparison, run) for run in runs]
    return "\n".join([*parts, "</section>"])


def one_run(comparison: Comparison, run: RunCourse) -> str:
    steps, images = sum(s.steps for s in run.stages), sum(s.images for s in run.stages)
    parts = [
        f"<h3>{swatch(comparison, run.name)}{escape(run.name)}</h3>",
        f"<p>{source(run.stages[-1].method)}. {steps:,} steps, {images:,} pictures seen, {duration(run.seconds)}"
        + (f", in {len(run.stages)} stages" if len(run.stages) > 1 else "")
        + f".{choosing(run)}</p>",
    ]
    drawn: list[str] = []
    for k, stage in enumerate(run.stages):
        place = f"{k + 1} {stage.method}: " if len(run.stages) > 1 else ""
        drawn += courses(stage, colour(comparison, run.name), place)
    parts.append(f'<div class="courses">{"".join([*drawn, deviations(run)])}</div>')
    return "\n".join(parts)


def choosing(run: RunCourse) -> str:
    """What it cost to choose what to read, of a run that did not read its data in epochs; nothing of another."""
    if run.order == "epochs" or run.choosing is None:
        return ""
    return f" Choosing what to read ({escape(run.order)}) took {milliseconds(run.choosing)} ms of that."


def source(name: str) -> str:
    """Where a method comes from."""
    method = method_class(name)
    if method is None:
        return f"The method “{escape(name)}”, which is none of fewstep's" if name else "A method that left no name"
    paper = method.paper
    return (
        f'{escape(paper.title)} (<a href="https://arxiv.org/abs/{paper.arxiv}">arXiv {paper.arxiv}</a>; evidence: '
        f"{paper.evidence})"
    )


def deviations(run: RunCourse) -> str:
    """What the methods of a run do otherwise than their papers."""
    methods = [method for stage in run.stages if (method := method_class(stage.method)) is not None]
    if not methods:
        return ""
    texts = dict.fromkeys(text for method in methods for text in method.paper.deviations)
    items = "".join(f"<li>{with_code(text)}</li>" for text in texts) or "<li>nothing known</li>"
    return f'<div class="course"><b>What differs from the paper</b><ul class="notes">{items}</ul></div>'


def with_code(text: str) -> str:
    """A sentence as HTML, its names in backticks as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def courses(stage: StageCourse, tint: str, place: str) -> list[str]:
    """A drawing of each logged scalar: the declared signs first, then the other losses; ``place`` names the stage."""
    declared = {sign.key: sign for sign in signs(stage)}
    others = (key for key in stage.scalars() if key not in declared and key.split("/")[-1] not in _NOT_SHOWN)
    drawn = []
    for key in (*declared, *others):
        seconds, values = stage.curve(key)
        if len(values) > 1:
            drawn.append(one_course(place + key, plots.course(seconds, values, tint), declared.get(key)))
    short = f'<div class="course"><b>{escape(place)}</b>too short to record a course</div>'
    return drawn or [short]


def one_course(name: str, drawing: str, sign: Sign | None) -> str:
    numbers = "" if sign is None else f"<span>{number(sign.first)} → {number(sign.last)}</span>"
    healthy = "" if sign is None else f"<p>Healthy: {escape(sign.sentence)}.</p>"
    return f'<div class="course"><div class="name"><b>{escape(name)}</b>{numbers}</div>{drawing}{healthy}</div>'
