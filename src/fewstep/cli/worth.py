"""``fewstep evaluate`` for what makes no samples: classifiers, small data sets, language models."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from fewstep.cli.errors import UserError, choose

if TYPE_CHECKING:
    from fewstep.cli.models import Named
    from fewstep.data import Dataset
    from fewstep.evaluation.tables import Table
    from fewstep.language_models import Tokenizer

#: The networks that a small data set is tried on where nobody names any.
NETWORKS = ("convnet", "mlp-classifier", "resnet")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say how a small data set is tried."""
    group = parser.add_argument_group("of a condensed data set")
    group.add_argument(
        "--networks",
        metavar="NAME",
        nargs="+",
        default=list(NETWORKS),
        help=f"classifiers to train on it (default {' '.join(NETWORKS)})",
    )
    group.add_argument("--seeds", metavar="N", type=int, default=3, help="first weights of each (default 3)")
    group.add_argument("--train-steps", metavar="N", type=int, default=300, help="steps of each (default 300)")


def run(found: Named, chosen: argparse.Namespace) -> None:
    """Measure a model by its task, print the table, keep the figures where they are asked for."""
    from fewstep.files import write_atomically
    from fewstep.report import machine

    table = MEASURES[found.kind.task](found, chosen)
    show(table)
    if chosen.json is not None:
        told = {
            "model": found.name, "rows": list(table.data), "versions": machine.versions(),
            "machine": machine.machine(chosen.device),
        }  # fmt: skip
        write_atomically(chosen.json, (json.dumps(told, indent=1) + "\n").encode())


def show(table: Table) -> None:
    """Print a table."""
    from rich.box import SIMPLE
    from rich.table import Table as Shown

    from fewstep.cli.terminal import console

    shown = Shown(title=table.title, box=SIMPLE, padding=(0, 0, 0, 1))
    shown.add_column(table.columns[0], overflow="fold")
    for head in table.columns[1:]:
        shown.add_column(head, justify="right")
    for row in table.rows:
        shown.add_row(*row)
    terminal = console()
    terminal.print(shown)
    terminal.print(table.note, highlight=False)


def parts_for(found: Named, chosen: argparse.Namespace, reader: Tokenizer | None = None) -> tuple[Dataset, Dataset]:
    """Training and held-out data: those named, else those that the model was made from; text as ``reader`` reads it."""
    from fewstep.cli.models import parts_of
    from fewstep.evaluation.sources import whole_of

    source = chosen.data or found.data
    if source is None:
        raise UserError(f"--data is missing, and '{found.name}' does not say what it was made from")
    return parts_of(whole_of(source), reader)


def classifier(found: Named, chosen: argparse.Namespace) -> Table:
    """A classifier beside the one that taught it, if it is still there."""
    from fewstep.cli.models import teacher_of
    from fewstep.evaluation.tables import classifier_table

    teacher = teacher_of(found, chosen.teacher)
    _, test = parts_for(found, chosen)
    models = {} if teacher is None or teacher.kind.task != "classification" else {teacher.stem: teacher.model}
    for model in (*models.values(), found.model):
        if tuple(test.shape) != tuple(model.shape):
            raise UserError(f"data '{test.name}' has samples {list(test.shape)}, the classifier {list(model.shape)}")
    return classifier_table({**models, found.stem: found.model}, test)


def condensed(found: Named, chosen: argparse.Namespace) -> Table:
    """What classifiers learn from a small data set."""
    from fewstep.cli.models import named_model
    from fewstep.cli.terminal import progress
    from fewstep.evaluation.classification import Protocol
    from fewstep.evaluation.tables import condensed_table
    from fewstep.hub import native
    from fewstep.networks.classifiers import CLASSIFIERS

    for name in chosen.networks:
        choose("network", name, CLASSIFIERS)
    for flag, value in (("--seeds", chosen.seeds), ("--train-steps", chosen.train_steps)):
        if value < 1:
            raise UserError(f"{flag} {value} must be at least 1")
    train, test = parts_for(found, chosen)
    if tuple(train.shape) != found.kind.shape:
        raise UserError(f"'{found.name}' has samples {list(found.kind.shape)}, '{train.name}' {list(train.shape)}")
    teacher = None if chosen.teacher in (None, "none") else named_model(chosen.teacher)
    if teacher is not None and teacher.kind.task != "classification":
        raise UserError(f"--teacher '{teacher.name}' is {teacher.kind.called}: soft labels come from a classifier")
    protocol = Protocol(
        networks={name: {} for name in chosen.networks},
        seeds=range(chosen.seed, chosen.seed + chosen.seeds),
        steps=chosen.train_steps,
        teacher=None if teacher is None else teacher.model,
        device=chosen.device,
    )
    seconds = float(native.card(found.folder).get("seconds", 0))
    with progress("evaluate") as tell:
        return condensed_table(found.stem, found.model, train, test, protocol, seconds=seconds, show=tell)


def language(found: Named, chosen: argparse.Namespace) -> Table:
    """A language model on held-out text; beside the target that taught it, how much sooner that writes with it."""
    from fewstep.cli.models import teacher_of
    from fewstep.evaluation.language import language_table, speculative_table

    teacher = teacher_of(found, chosen.teacher)
    # a draft that was made beside its target may have no tokenizer of its own
    _, test = parts_for(found, chosen, found.kind.tokenizer or (teacher.kind.tokenizer if teacher else None))
    if teacher is None:
        return language_table({found.stem: found.model}, test)
    if teacher.kind.tokens != found.kind.tokens or teacher.kind.task != "language":
        raise UserError(f"--teacher '{teacher.name}' is no language model of the same {found.kind.tokens} tokens")
    show(language_table({teacher.stem: teacher.model, found.stem: found.model}, test))
    return speculative_table(teacher.model, {found.stem: found.model}, test)


#: What is measured, by task.
MEASURES: dict[str, Callable[[Named, argparse.Namespace], Table]] = {
    "classification": classifier, "data": condensed, "language": language,
}  # fmt: skip
