"""One page from run folders: ``fewstep report runs/*``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from fewstep.files import check_writable
from fewstep.hub import native
from fewstep.hub.models import load, locate
from fewstep.models.kinds import SAVED
from fewstep.report import page
from fewstep.report.comparison import Show, compare_models
from fewstep.report.runs import RunCourse, model_folder, read_run
from fewstep.report.tasks.page import write_tasks


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
    extras: Mapping[str, float] | None = None,
    show: Show = lambda done, what: None,
) -> Path:
    """Compare the students of finished runs with their teacher on one page; gives back its path.

    ``teacher`` and ``data`` are names or paths; by default those that the runs noted (``recipe.json``), which must
    be the same: of one name, or of one digest.  A run that made the teacher shows its course only (where no run names a
    teacher, the first that trained one is it), and a folder without a finished run is named at the foot of the page.
    ``extras`` set further inputs of the students that take them.
    Raises FileNotFoundError when no run is finished, ValueError when runs disagree or say too little, OSError when
    ``out`` cannot be written.
    """
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    check_writable(Path(out))
    runs, left_out = finished(folders)
    tasks = {task_of(run) for run in runs}
    if tasks != {"generation"}:
        if "generation" in tasks:
            raise ValueError("one page shows models that make samples, or models that make none: give fewer folders")
        return write_tasks(runs, Path(out), data=data, title=title, left_out=left_out, show=show)
    teacher = teacher or found_teacher(runs)
    data = data or common(runs, "data")[0]
    if data == "none":
        raise ValueError("these runs were made without data: say with data= what their samples are compared with")
    places = {run.name: Path(run.folder) for run in runs if Path(run.folder).resolve() != Path(teacher).resolve()}
    students = {name: native.load(model_folder(place)) for name, place in places.items()}
    found = compare_models(load(teacher), students, data, n, seed, extras=extras, show=show)
    if not commands:
        commands = f"fewstep report {' '.join(run.folder for run in runs)}"
        commands += "".join(f" --extra {name}={value:g}" for name, value in found.extras.items())
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


def task_of(run: RunCourse) -> str:
    """What the product of a run is for."""
    kind = native.kind(model_folder(run.folder))
    return SAVED[kind].task


def found_teacher(runs: list[RunCourse]) -> str:
    """The teacher that the runs name, under a name that is still there; else the first run that trained from
    scratch."""
    scratch = [run.folder for run in runs if run.note is not None and run.note.command == "train"]
    if scratch and not any(run.note.teacher for run in runs if run.note is not None):
        return scratch[0]
    names = common(runs, "teacher")
    return next((name for name in names if is_there(name)), names[0])


def is_there(name: str) -> bool:
    """Whether a model of this name can be found."""
    try:
        locate(name)
    except FileNotFoundError:
        return False
    return True


def common(runs: list[RunCourse], what: str) -> list[str]:
    """The names that the notes give the one teacher, or the one data set; ValueError when they name several, or none.

    Two names of one digest are one thing.
    """
    named: list[tuple[str, str | None, str]] = []
    for run in runs:
        if run.note is not None:
            value = {"teacher": run.note.teacher, "data": run.note.data}[what]
            if value:
                named.append((value, run.note.digests.get(what), run.folder))
    if not named:
        raise ValueError(f"{runs[0].folder} does not say its {what} (no recipe.json): name it with --{what}")
    first, digest, folder = named[0]
    for value, other, place in named[1:]:
        same = value == first if digest is None or other is None else digest == other
        if not same:
            raise ValueError(
                f"{folder} has {what} '{first}', {place} has '{value}', which is another: one page compares students "
                f"of one {what}; give fewer folders, or one {what} for all with --{what}"
            )
    return list(dict.fromkeys(value for value, _, _ in named))
