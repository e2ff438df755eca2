"""The catalogue: every system, its paper, what it needs and what it gives; or what a saved model is.

fewstep systems                   the catalogue
fewstep systems runs/dmd2-digits  its samples, the steps it has plans for, the inputs it takes
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fewstep.cli.models import Named


def add_arguments(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    parser.usage = "fewstep systems [MODEL]"
    parser.add_argument("model", metavar="MODEL", nargs="?", help="a bundled model, a model or run folder, a pipeline")


def run(chosen: argparse.Namespace) -> None:
    if chosen.model is None:
        from fewstep.catalogue import systems_table
        from fewstep.cli.terminal import console

        console().print(systems_table())
    else:
        from fewstep.cli.models import named_model

        print("\n".join(told(named_model(chosen.model))))


def told(found: Named) -> list[str]:
    """What a model is, in lines."""
    kind = found.kind
    classes = f"{kind.classes} classes" if kind.classes else "no classes"
    lines = [f"{found.name}: {kind.called}, samples of shape {list(kind.shape)}, {classes}"]
    steps = "any" if kind.plans is None else ", ".join(map(str, kind.plans))
    lines.append(f"steps: {steps}")
    for name, declared in kind.inputs.items():
        notes = ["set by its plans"] if name in kind.planned else []
        if declared.unguided is not None:
            notes.append(f"the guidance weight, {declared.unguided:g} for none")
        lines.append(f"input {name} {declared}{''.join(f'; {note}' for note in notes)}")
    return lines if kind.inputs else [*lines, "no further inputs"]
