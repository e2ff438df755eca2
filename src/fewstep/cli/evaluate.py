"""Quality and cost against the number of steps.

  fewstep evaluate runs/dmd2-digits                    every plan of the student, beside its teacher
  fewstep evaluate digits --data digits --steps 1 2 4 8
  fewstep evaluate my-student --teacher digits --n 2000

All models start from the same noise and labels and are measured in the same features.  The data default to those that
the model was made from, the teacher to the one that the run's recipe names.  A classifier is measured by its accuracy,
a condensed data set by what classifiers learn from it, beside random samples and all of them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.cli import worth
from fewstep.cli.errors import UserError, choose
from fewstep.cli.inputs import add_extra, extras_of, in_words
from fewstep.cli.outputs import output_file

if TYPE_CHECKING:
    from rich.table import Table

    from fewstep.cli.models import Named
    from fewstep.data import Dataset
    from fewstep.metrics import Quality

#: The teacher is also measured here, to show all that it can do.
TEACHER_STEPS = 16
#: Of a model that takes any number of steps.
ALONE = (1, 2, 4, 8, 16)
BATCH = 100


def add_arguments(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    parser.usage = "fewstep evaluate MODEL [flags]"
    parser.add_argument("model", metavar="MODEL", help="a bundled model, a model or run folder")
    parser.add_argument("--data", metavar="DATA", help="what to compare with (default: what it was made from)")
    parser.add_argument("--steps", metavar="N", type=int, nargs="+", help="default: all plans; of a teacher 1 2 4 8 16")
    parser.add_argument("--n", metavar="N", type=int, default=500, help="samples of each (default 500)")
    parser.add_argument("--teacher", metavar="MODEL", help="whose figures to show beside it; 'none' for nobody's")
    parser.add_argument("--solver", metavar="NAME", default="abm", help="of teachers (default abm)")
    add_extra(parser, "MODEL, a student")
    parser.add_argument("--features", metavar="NAME", help="pixels, digits, fashion, ... (default: those of the data)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="default 0")
    parser.add_argument("--device", metavar="DEVICE", default="cpu", help="default cpu")
    parser.add_argument("--json", metavar="FILE", type=Path, help="keep all figures in this file")
    worth.add_arguments(parser)


@dataclass(frozen=True)
class Row:
    """One model at one number of steps; ``calls`` and ``seconds`` are those of one sample."""

    model: str
    steps: int
    calls: int
    seconds: float
    quality: Quality


def run(chosen: argparse.Namespace) -> None:
    from fewstep.cli.models import named_model, parts_of, teacher_of
    from fewstep.cli.terminal import console
    from fewstep.files import write_atomically
    from fewstep.report import machine
    from fewstep.sampling.named import ALL_SOLVERS

    choose("solver", chosen.solver.partition(":")[0], sorted(ALL_SOLVERS))
    if chosen.json is not None:
        output_file("--json", chosen.json)
    found = named_model(chosen.model)
    if found.kind.task != "generation":
        worth.run(found, chosen)
        return
    if found.kind.tokens is not None:
        raise UserError(
            f"'{chosen.model}' is {found.kind.called}: its samples are tokens, and evaluate measures pictures"
        )
    extras = extras_of(found.kind, chosen.model, chosen.extra)
    teacher = teacher_of(found, chosen.teacher)
    source = chosen.data or found.data or (teacher.data if teacher else None)
    if source is None:
        raise UserError(f"--data is missing, and '{chosen.model}' does not say what it was made from")
    train, reference = parts_of(source)
    rows = measured(jobs(found, teacher, extras, chosen), train, reference, chosen)
    console().print(table(rows, f"{train.name}, {chosen.n} samples of each{in_words(extras)}"))
    quality = rows[0].quality
    print(
        f"{quality.features} features against {quality.reference}; real samples have a Fréchet distance of "
        f"{quality.floor.value:.2f}; memorised is near 1 for fresh samples, 0 for copies; ms a sample"
    )
    if chosen.json is not None:
        told = {
            "data": source, "n": chosen.n, "seed": chosen.seed, "extras": extras, "rows": [asdict(row) for row in rows],
            "versions": machine.versions(), "machine": machine.machine(chosen.device),
        }  # fmt: skip
        write_atomically(chosen.json, (json.dumps(told, indent=1) + "\n").encode())


def table(rows: Sequence[Row], title: str) -> Table:
    """The figures for the terminal."""
    from rich.box import SIMPLE
    from rich.table import Table

    shown = Table(title=title, box=SIMPLE, padding=(0, 0, 0, 1))
    shown.add_column("model", overflow="fold")
    for head in ("steps", "calls", "Fréchet", "accuracy", "recall", "memorised", "ms"):
        shown.add_column(head, justify="right", no_wrap=True)  # 80 columns hold the figures; long names are folded
    before = rows[0].model
    for row in rows:
        if row.model != before:
            shown.add_section()
            before = row.model
        found = row.quality
        shown.add_row(
            row.model, str(row.steps), str(row.calls), f"{found.frechet.value:.2f} ± {found.frechet.error:.2f}",
            "-" if found.accuracy is None else f"{found.accuracy:.3f}", f"{found.recall:.3f}",
            f"{found.memorisation.ratio:.2f}", f"{1000 * row.seconds:.2f}",
        )  # fmt: skip
    return shown


def jobs(
    found: Named, teacher: Named | None, extras: dict[str, float], chosen: argparse.Namespace
) -> list[tuple[Named, int, dict[str, float]]]:
    """Which models are measured at how many steps and with which further inputs, the teacher first."""
    own = asked_steps(chosen.steps) if chosen.steps else list(found.kind.plans or ALONE)
    for k in own:
        check_plan(found, k)
    if teacher is None:
        return [(found, k, extras) for k in own]
    beside = teacher.kind.plans or sorted({*own, TEACHER_STEPS})
    return [*((teacher, k, {}) for k in beside), *((found, k, extras) for k in own)]


def check_plan(found: Named, steps: int) -> None:
    """:class:`UserError` for a number of steps that a model has no plan for."""
    try:
        found.kind.check_steps(steps)
    except ValueError as error:
        raise UserError(f"--steps {error}") from None


def measured(
    work: Sequence[tuple[Named, int, dict[str, float]]],
    train: Dataset,
    reference: Dataset,
    chosen: argparse.Namespace,
) -> list[Row]:
    """The rows of the table, all from the same noise and labels."""
    from fewstep.cli.runs import device_of
    from fewstep.cli.terminal import progress
    from fewstep.metrics import Evaluator, load_features
    from fewstep.report.comparison import timed_samples

    device = device_of(chosen.device)
    for named, _, _ in work:
        if tuple(named.model.shape) != train.shape:
            raise UserError(
                f"'{named.name}' makes samples {list(named.model.shape)}, data '{train.name}' has {list(train.shape)}"
            )
    name = chosen.features or (train.name if train.name in ("digits", "fashion") else "pixels")
    judge = Evaluator(reference, train, load_features(name, device), seed=chosen.seed)
    rows = []
    with progress("evaluate") as show:
        for i, (named, steps, extras) in enumerate(work):
            show(i / len(work), f"{named.stem}, {steps} steps")
            model = named.model.to(device)
            x, labels, calls, seconds = timed_samples(
                model, steps, chosen.n, chosen.seed, chosen.solver, BATCH, extras=extras
            )
            rows.append(Row(named.stem, steps, calls, seconds, judge(x, labels)))
    return rows


def asked_steps(steps: Sequence[int]) -> list[int]:
    for k in steps:
        if k < 1:
            raise UserError(f"--steps {k} must be at least 1")
    return sorted(set(steps))
