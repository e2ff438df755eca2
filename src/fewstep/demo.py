"""The demonstration: a teacher made fast by several methods in a few minutes, and a page that shows it.

Two cores and no downloads.  Every student trains in a folder of its own, so a demonstration that was stopped goes on
where it stopped when it is started again.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from fewstep import api
from fewstep.cli.runs import told_by_run
from fewstep.data import Dataset
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
    """One student: its name, what it is in a few words, how it is trained and its share of the training time."""

    name: str
    about: str
    recipe: Recipe
    share: float
    batch: int


#: What the demonstration trains, in order.  The shares add up to 1.  Runs of a minute want higher learning rates than
#: the defaults, and distribution matching without its GAN.
STUDENTS = (
    Entry(
        "dmd2", "distribution matching, 1 step",
        DMD2(gan_weight=0.0, critic_steps=2, lr=7e-4, critic_lr=2e-3), 0.45, 32,
    ),
    Entry("pd", "progressive distillation, 4 steps to 1", ProgressiveLadder(start=4, end=1, lr=5e-4), 0.22, 64),
    Entry(
        "scm", "continuous-time consistency, 1, 2 and 4 steps",
        ContinuousConsistencyDistillation(sigma_data=0.7, tangent_warmup=0.1), 0.33, 64,
    ),
)  # fmt: skip
#: Shown beside them: a student that ships with the package, trained for most of an hour on one core.
BUNDLED = {"fashion": ("dmd2 (ships with fewstep)", "fashion-1step")}
TRAINING = 0.8  # of the minutes; the rest loads, samples and measures
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
    check_writable(Path(out))
    model, source = api.load(teacher), load_data(data)
    console = Console(stderr=True)
    left = 60 * minutes * TRAINING + MEASURING
    text = f"teacher '{teacher}', {len(STUDENTS)} students, about {duration(left)} in all"
    console.print(text, highlight=False, markup=False)
    students: dict[str, Any] = {}
    for k, entry in enumerate(STUDENTS):
        seconds = round(60 * minutes * TRAINING * entry.share, 1)
        announce(console, k, f"{entry.name}: {entry.about}", seconds, left)
        folder = Path(runs) / entry.name
        with told_by_run(folder):
            students[entry.name] = trained(entry, model, source, folder, seconds, teacher, data)
        left -= seconds
    if teacher in BUNDLED:
        name, bundled = BUNDLED[teacher]
        students[name] = api.load(bundled)
    announce(console, len(STUDENTS), f"measuring: {samples} samples of each model", left, left)
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


def announce(console: Console, k: int, what: str, seconds: float, left: float) -> None:
    """A line before every stage: which one it is, how long it takes, how long everything still takes."""
    text = f"[{k + 1} of {len(STUDENTS) + 1}] {what} - {duration(seconds)}, all done in about {duration(left)}"
    console.print(text, style="bold", highlight=False, markup=False, soft_wrap=True)


def trained(
    entry: Entry, teacher: Any, data: Dataset, folder: Path, seconds: float, teacher_name: str, data_name: str
) -> Any:
    """The student of an entry, trained in ``folder`` for so many seconds, those of earlier calls included."""
    settings = Settings(Budget(seconds, "seconds"), batch=entry.batch, seed=SEED, log_steps=LOG_STEPS)
    start = {"teacher": model_source(teacher_name, teacher, api.locate(teacher_name))}
    record = record_of(entry.recipe, start, data_source(data_name, data), settings)
    result = run_recipe(entry.recipe, teacher, data, settings, folder, record=record, further=True)
    return result.model


if __name__ == "__main__":
    main(minutes=float(sys.argv[1]) if len(sys.argv) > 1 else 5.0)
