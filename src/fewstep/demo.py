"""The demonstration: a teacher made fast by several methods in a few minutes, and a page that shows it.

Two cores and no downloads.  Two processes train side by side, since networks as small as these train as fast on one
core as on two.  Every student trains in a folder of its own, so a demonstration that was stopped goes on where it
stopped when it is started again.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fewstep import api
from fewstep.cli.errors import Stopped, UserError
from fewstep.cli.runs import told_by_run
from fewstep.data import load as load_data
from fewstep.files import check_writable
from fewstep.methods.consistency.scm import ContinuousConsistencyDistillation
from fewstep.methods.flow_maps.progressive import ProgressiveLadder
from fewstep.methods.matching.dmd2 import DMD2
from fewstep.methods.method import Recipe
from fewstep.report import compare_models, page, read_run
from fewstep.report.words import duration
from fewstep.runs.course import run_recipe
from fewstep.runs.record import data_source, model_source, record_of
from fewstep.training.budget import Budget
from fewstep.training.progress import Bar
from fewstep.training.settings import Settings


@dataclass(frozen=True)
class Entry:
    """One student: its name, what it is in a few words, how it is trained, its share of the training time, the process
    that trains it, and the student before it that it starts from (from the teacher where there is none)."""

    name: str
    about: str
    recipe: Recipe
    share: float
    batch: int
    process: int
    start: str | None = None


#: What the demonstration trains, in the order of every process.  The shares of a process add up to 1.  Runs of minutes
#: want higher learning rates than the defaults, and in place of a discriminator, which takes long to learn, the energy
#: distance between features.
STUDENTS = (
    Entry(
        "pd", "progressive distillation, 4 steps to 1", ProgressiveLadder(start=4, end=1, lr=5e-4), 0.25, 64, process=0,
    ),
    Entry(
        "dmd2", "distribution matching from there on, 1 step",
        DMD2(gan_weight=0.0, energy_weight=1.0, critic_steps=2, lr=5e-4, critic_lr=2e-3), 0.75, 32, process=0,
        start="pd",
    ),
    Entry(
        "scm", "continuous-time consistency, 1, 2 and 4 steps",
        ContinuousConsistencyDistillation(sigma_data=0.7, tangent_warmup=0.1), 1.0, 64, process=1,
    ),
)  # fmt: skip
#: Shown beside them: a student that ships with the package, trained for most of an hour on one core.
BUNDLED = {"fashion": ("dmd2 (ships with fewstep)", "fashion-1step")}
TRAINING = 0.8  # of the minutes; the rest loads, samples and measures
STARTING = 6.0  # seconds until processes train
MEASURING = 40.0  # seconds that sampling and measuring take on two cores: only for telling the time left
SAMPLES = 500  # of every model
TEACHER_STEPS = (1, 2, 4, 8, 16)
SEED = 0
LOG_STEPS = 4  # the runs are short


def main(
    out: str | Path = "report.html",
    minutes: float = 5.0,
    runs: str | Path = "runs/demo",
    *,
    teacher: str = "fashion",
    data: str = "fashion",
    samples: int = SAMPLES,
) -> Path:
    """Distil ``teacher``, measure it and its students, write the page ``out``; gives back its path.

    Takes about ``minutes`` on two cores.  The runs are left in ``runs/<student>``; the same call resumes them, a longer
    one trains them further.  Raises ValueError for minutes that are not positive, OSError for a page that cannot be
    written (before anything is trained), and what training raises.
    """
    if not 0 < minutes < float("inf"):
        raise ValueError(f"minutes={minutes:g}: the demonstration needs a positive number of minutes; 5 is a good one")
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    check_writable(Path(out))
    start = time.perf_counter()
    model = api.load(teacher)
    console = Console(stderr=True)
    training = 60 * minutes * TRAINING
    text = f"teacher '{teacher}', {len(STUDENTS)} students, about {duration(STARTING + training + MEASURING)} in all"
    console.print(text, highlight=False, markup=False)
    for entry in STUDENTS:
        console.print(f"  {entry.name}: {entry.about} - {duration(training * entry.share)}", highlight=False)
    train_all(STUDENTS, teacher, data, Path(runs), training)
    students: dict[str, Any] = {entry.name: api.load(Path(runs) / entry.name) for entry in STUDENTS}
    if teacher in BUNDLED:
        name, bundled = BUNDLED[teacher]
        students[name] = api.load(bundled)
    console.print(f"measuring: {samples} samples of each model - {duration(MEASURING)}", highlight=False)
    bar = Bar("measure")

    def show(done: float, what: str) -> None:
        bar.update(done, what)

    found = compare_models(model, students, data, samples, SEED, teacher_steps=TEACHER_STEPS, show=show)
    bar.close()
    courses = [read_run(Path(runs) / entry.name) for entry in STUDENTS]
    path = page.write(found, Path(out), courses, commands=f"fewstep demo --minutes {minutes:g}")
    Console().print(found.table())
    print(
        f"\n{duration(time.perf_counter() - start)} in all. Open {path}\n\nThen try\n"
        f"  fewstep sample {Path(runs) / STUDENTS[-1].name} --steps 2\n"
        f"  fewstep distill dmd2 --teacher {teacher} --data {data} --budget 30min"
    )
    return path


def train_all(entries: Sequence[Entry], teacher: str, data: str, runs: Path, seconds: float) -> None:
    """Train every student for its share of ``seconds``, those of earlier calls included; UserError with what a process
    could not do.  When this one is stopped, they are too, and leave runs that go on."""
    context = multiprocessing.get_context("spawn")
    failed = context.SimpleQueue()
    numbers = sorted({entry.process for entry in entries})
    threads = max(1, (os.cpu_count() or 1) // len(numbers))
    children: list[BaseProcess] = []
    for number in numbers:
        mine = [entry for entry in entries if entry.process == number]
        work = (mine, teacher, data, runs, seconds, threads, failed)
        children.append(context.Process(target=train_each, args=work, name=", then ".join(e.name for e in mine)))
    bar = Bar("train")
    start = time.monotonic()
    try:
        with no_interrupts():
            for child in children:
                child.start()
        while any(child.is_alive() for child in children) and not any(child.exitcode for child in children):
            busy = " beside ".join(child.name for child in children if child.is_alive())
            bar.update(min(0.99, (time.monotonic() - start) / (seconds + STARTING)), busy)
            time.sleep(0.2)
    finally:
        for child in children:
            if child.is_alive():
                child.terminate()
        for child in children:
            if child.pid is not None:
                child.join()
        bar.close()
    if not failed.empty():
        raise UserError(failed.get())
    for child in children:
        if child.exitcode:
            raise RuntimeError(f"the process that trained {child.name} ended with exit code {child.exitcode}")


@contextmanager
def no_interrupts() -> Iterator[None]:
    """Processes that are started here leave Ctrl-C to their training, which saves: before it, they are terminated."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def train_each(
    entries: Sequence[Entry], teacher: str, data: str, runs: Path, seconds: float, threads: int, failed: Any
) -> None:
    """The work of one process: its students, one after the other."""
    torch.set_num_threads(threads)
    try:
        model, source = api.load(teacher), load_data(data)
        for entry in entries:
            folder = runs / entry.name
            if any(later.start == entry.name for later in entries) and is_trained(folder):
                continue  # what another run started from stays as it is
            settings = Settings(
                Budget(round(seconds * entry.share, 1), "seconds"), batch=entry.batch, seed=SEED, log_steps=LOG_STEPS
            )
            sources = {"teacher": model_source(teacher, model, api.locate(teacher))}
            given = {}
            if entry.start is not None:
                place = runs / entry.start
                given["student"] = api.load(place)
                sources["student"] = model_source(str(place), given["student"], api.locate(str(place)))
            record = record_of(entry.recipe, sources, data_source(data, source), settings)
            with told_by_run(folder):
                run_recipe(
                    entry.recipe, model, source, settings, folder, given=given, record=record, further=True, show=False
                )
    except Stopped:
        sys.exit(1)
    except (ValueError, OSError) as error:
        failed.put(str(error))
        sys.exit(1)


def is_trained(folder: Path) -> bool:
    """Whether a run has left its model."""
    return (folder / "model" / "config.json").is_file()


if __name__ == "__main__":
    main(minutes=float(sys.argv[1]) if len(sys.argv) > 1 else 5.0)
