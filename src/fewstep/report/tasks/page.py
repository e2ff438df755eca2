"""One page for runs whose product makes no samples: pictures, what it is worth, how it was made."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from fewstep.data import Samples
from fewstep.data.sources import load
from fewstep.evaluation.classification import Protocol, Show
from fewstep.evaluation.language import language_table
from fewstep.evaluation.sources import whole_of
from fewstep.evaluation.tables import Table, classifier_table, condensed_table
from fewstep.files import write_atomically
from fewstep.hub import native
from fewstep.hub.models import load as open_model
from fewstep.language_models import Tokenizer
from fewstep.methods import RECIPES, recipe_class
from fewstep.models import model_of
from fewstep.report import machine, plots
from fewstep.report.comparison import parts
from fewstep.report.courses import choosing, courses, deviations, source
from fewstep.report.runs import RunCourse, model_folder
from fewstep.report.style import STYLE
from fewstep.report.tasks import figures_of
from fewstep.report.words import duration
from fewstep.runs.conditions import samples_of, tokenizer_of

#: What a small data set is tried on: enough to see what it is worth, in a minute.
TRIED = Protocol(networks={"convnet": {}, "mlp-classifier": {}}, seeds=(0, 1, 2))


def write_tasks(
    runs: Sequence[RunCourse], path: Path, *, data: str = "", title: str = "", left_out: Sequence[str] = (), show: Show
) -> Path:
    """Write the page of the runs to ``path``, replacing it whole.

    ``data`` is the name of what the runs were made from, by default what each notes.  ValueError for a run that does
    not say it.
    """
    told = [section(run, data, part_of(show, i, len(runs))) for i, run in enumerate(runs)]
    named = title or headline(runs)
    versions = ", ".join(f"{escape(name)} {escape(version)}" for name, version in machine.versions().items())
    where = ", ".join(f"{escape(name)}: {escape(value)}" for name, value in machine.machine("cpu").items())
    missing = "".join(f"<p>Left out: {escape(text)}</p>" for text in left_out)
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(named)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<header>\n<p class="kicker">fewstep report</p>\n<h1>{escape(named)}</h1>\n</header>\n'
        + "\n".join(told)
        + f"\n<footer>{missing}<p>{versions}.<br>{where}.</p></footer>\n</main>\n</body>\n</html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page.encode())
    return path


def part_of(show: Show, i: int, parts: int) -> Show:
    """Progress of the ``i``-th of some parts."""
    return lambda done, what: show((i + done) / parts, what)


def headline(runs: Sequence[RunCourse]) -> str:
    """A title from what was run."""
    names = dict.fromkeys(name_of(run.recipe) for run in runs)
    sources = dict.fromkeys(run.note.data for run in runs if run.note is not None)
    return ", ".join(names) + (f" on {', '.join(sources)}" if sources else "")


def name_of(recipe: str) -> str:
    """What a recipe's system is called."""
    system = recipe_class(recipe).system if recipe in RECIPES else None
    return recipe if system is None else system.name


def section(run: RunCourse, data: str, show: Show) -> str:
    """All about one run."""
    name = data or (run.note.data if run.note is not None else "")
    if not name:
        raise ValueError(f"{run.folder} does not say its data (no recipe.json): name them with --data")
    model: Any = native.load(model_folder(run.folder))
    seconds = sum(stage.seconds for stage in run.stages)
    told = [
        f"<h2>{escape(run.name)}</h2>",
        f"<p>{source(run.stages[-1].method)}. {sum(s.steps for s in run.stages):,} steps, {duration(seconds)}."
        f"{choosing(run)}</p>",
        *(figure.html() for figure in figures_of(run, model, samples_of(name, tokenizer=reader_of(run, model)))),
    ]
    told.append(html_table(measured(run, model, name, show)))
    drawn: list[str] = []
    for k, stage in enumerate(run.stages):
        drawn += courses(stage, plots.student_colour(0), f"{k + 1} {stage.method}: " if len(run.stages) > 1 else "")
    made = "".join([*drawn, deviations(run)])
    told.append(f'<section>\n<h2>How it was made</h2>\n<div class="courses">{made}</div>\n</section>')
    if run.note is not None:
        told.append(f"<section>\n<h2>To repeat it</h2>\n<pre>{escape(run.note.shell(run.folder))}</pre>\n</section>")
    return "\n".join(told)


def reader_of(run: RunCourse, model: Any) -> Tokenizer | None:
    """How a run's text is read: as its product reads it or, of a draft without a tokenizer, as its target does."""
    found = tokenizer_of(model)
    if found is None and model_of(model).task == "language" and run.note is not None:
        try:
            found = tokenizer_of(open_model(run.note.teacher))
        except (FileNotFoundError, ValueError):  # it is not where it was
            return None
    return found


def measured(run: RunCourse, model: Any, name: str, show: Show) -> Table:
    """What the product is worth on held-out data."""
    kind = model_of(model)
    train, test = parts_of(whole_of(name), reader_of(run, model))
    if kind.task == "language":
        return language_table({run.name: model}, test)
    if kind.task == "classification":
        return classifier_table({run.name: model}, test)
    return condensed_table(run.name, model, train, test, TRIED, seconds=run.seconds, show=show)


def parts_of(source: str, tokenizer: Tokenizer | None = None) -> tuple[Samples, Samples]:
    """Training and held-out data; a fifth put aside where a source has no part of its own."""
    train = load(source, tokenizer=tokenizer)
    try:
        return train, load(source, "test", tokenizer=tokenizer)
    except (FileNotFoundError, ValueError):
        return parts(train)


def html_table(table: Table) -> str:
    """A table for a page."""
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in table.rows)
    shown = f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"
    note = f'<p class="faint">{escape(table.title)}: {escape(table.note)}.</p>'
    return f'<section>\n<h2>What it is worth</h2>\n<div class="scroll">{shown}</div>\n{note}\n</section>'
