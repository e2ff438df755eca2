"""One page from run folders: ``fewstep report runs/*``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from fewstep.hub import native
from fewstep.hub.models import load
from fewstep.report import page
from fewstep.report.comparison import Show, compare_models
from fewstep.report.runs import RunCourse, model_folder, read_run


def report_runs(
    folders: Iterable[str | Path],
    out: str | Path = "report.html",
    *,
    teacher: str = "",
    data: str = "",
    n: int = 500,
    seed: int = 0,
    title: str = "",
    commands: str = "",
    show: Show = lambda done, what: None,
) -> Path:
    """Compare the students of finished runs with their teacher on one page; gives back its path.

    ``teacher`` and ``data`` are names or paths; by default those that the runs noted (``recipe.json``), which must
    agree.  A run that made the teacher shows its course only, and a folder without a finished run is named at the
    foot of the page.  Raises FileNotFoundError when no run is finished, ValueError when runs disagree or say too
    little.
    """
    runs, left_out = finished(folders)
    teacher = teacher or common(runs, "teacher")
    data = data or common(runs, "data")
    places = {run.name: Path(run.folder) for run in runs if Path(run.folder).resolve() != Path(teacher).resolve()}
    students = {name: native.load(model_folder(place)) for name, place in places.items()}
    found = compare_models(load(teacher), students, data, n, seed, show=show)
    if not commands:
        commands = f"fewstep report {' '.join(run.folder for run in runs)}"
    return page.write(found, Path(out), runs, title, commands, left_out)


def finished(folders: Iterable[str | Path]) -> tuple[list[RunCourse], list[str]]:
    """The runs that are done, and a sentence on each folder that holds none; FileNotFoundError when none is.

    Runs of the same name go by their folders.
    """
    runs: list[RunCourse] = []
    left_out: list[str] = []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except FileNotFoundError as error:
            left_out.append(str(error))
    if not runs:
        raise FileNotFoundError(left_out[0] if left_out else "no run folders were given: fewstep report runs/*")
    times = Counter(run.name for run in runs)
    return [run if times[run.name] == 1 else replace(run, name=run.folder) for run in runs], left_out


def common(runs: list[RunCourse], what: str) -> str:
    """The teacher or the data that all notes name; ValueError when they name several, or none does."""
    named: dict[str, str] = {}
    for run in runs:
        if run.note is not None:
            value = {"teacher": run.note.teacher, "data": run.note.data}[what]
            if value:
                named.setdefault(value, run.folder)
    if len(named) > 1:
        (a, first), (b, second) = list(named.items())[:2]
        raise ValueError(
            f"{first} has {what} '{a}', {second} has '{b}': one page compares students of one {what}; give fewer "
            f"folders, or {what}="
        )
    if not named:
        raise ValueError(f"{runs[0].folder} does not say its {what} (no recipe.json): give {what}=")
    return next(iter(named))
