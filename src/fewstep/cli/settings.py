"""The flags that ``train`` and ``distill`` share (known without torch, so that help is instant)."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from fewstep.cli.errors import UserError
from fewstep.cli.flags import Parameter, given, of_dataclass
from fewstep.training.settings import FREE, Settings
from fewstep.values import plain

SETTINGS = of_dataclass(Settings)


def add_run_arguments(parser: argparse.ArgumentParser, without: Collection[str] = ()) -> None:
    """Data, folder and the settings of the trainer, but for some."""
    parser.add_argument(
        "--data",
        metavar="DATA",
        help="digits, fashion, shapes3d, or a path; none: noise and classes only",
    )
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="the run's folder (default: a name in runs/)")
    parser.add_argument("--recipe", metavar="FILE", type=Path, help="run a recorded recipe.json (again)")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    group = parser.add_argument_group("training")
    for parameter in SETTINGS:
        if parameter.name not in without:
            parameter.add_to(group)


def plain_defaults() -> dict[str, object]:
    """Every setting at its default, as a recipe file holds it."""
    return {parameter.name: plain(parameter.default) for parameter in SETTINGS}


def settings_given(chosen: argparse.Namespace) -> dict[str, object]:
    """All settings as a recipe file holds them: those of the command line, the defaults for the rest."""
    return plain_defaults() | {name: plain(value) for name, value in given(SETTINGS, chosen).items()}


def refuse_beside_recipe(chosen: argparse.Namespace, others: Iterable[Parameter]) -> None:
    """A recipe says everything: flags that would change what it computes are an error."""
    fixed = [parameter for parameter in (*others, *SETTINGS) if parameter.name not in FREE]
    if changed := list(given(fixed, chosen)):
        flag = "--" + changed[0].replace("_", "-")
        raise UserError(f"--recipe already says {flag}: give a recipe or flags, or edit a copy of the file")


def word_after(flag: str, words: Sequence[str], default: str) -> str:
    """The (last) value of ``flag`` in the words, before they are parsed: other flags depend on it."""
    found = default
    for i, word in enumerate(words):
        if word == flag and i + 1 < len(words):
            found = words[i + 1]
        elif word.startswith(flag + "="):
            found = word.partition("=")[2]
    return found
