"""The flags that ``train`` and ``distill`` share (known without torch, so that help is instant)."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from fewstep.cli.errors import UserError
from fewstep.cli.flags import Parameter, given

SETTINGS = (
    Parameter("budget", str, "2min", "how long: 500steps, 20k images, 90s, 2min, 1h; split equally over the stages"),
    Parameter("batch", int, 64, "samples an iteration, over all processes and micro-batches together"),
    Parameter("accumulate", int, 1, "micro-batches that a batch is split into, to save memory"),
    Parameter("seed", int, 0, "seed of every random draw"),
    Parameter("precision", Literal["auto", "fp32", "bf16"], "auto", "arithmetic; auto measures which is faster here"),
    Parameter("averages", tuple[float, ...], (0.1,), "relative widths of the weight averages; the model is the first"),
    Parameter("device", str, "cpu", "where to train: cpu, cuda, cuda:1, mps"),
    Parameter("save_seconds", float, 60.0, "seconds between checkpoints"),
    Parameter("log_steps", int, 10, "steps between lines of log.jsonl"),
    Parameter("shard", bool, False, "cut the networks over the processes of torchrun, where they do not fit in one"),
    Parameter("tensorboard", bool, False, "also write event files for TensorBoard"),
)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Data, folder and the settings of the trainer."""
    parser.add_argument("--data", metavar="DATA", help="digits, fashion, or the path of a data set")
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="the run's folder (default: a name in runs/)")
    parser.add_argument("--recipe", metavar="FILE", type=Path, help="run a recorded recipe.json (again)")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    group = parser.add_argument_group("training")
    for parameter in SETTINGS:
        parameter.add_to(group)


def settings_given(chosen: argparse.Namespace) -> dict[str, object]:
    """All settings: those of the command line, the defaults for the rest."""
    return {parameter.name: parameter.default for parameter in SETTINGS} | given(SETTINGS, chosen)


def refuse_beside_recipe(chosen: argparse.Namespace, others: Iterable[Parameter]) -> None:
    """A recipe says everything: flags that would change what it computes are an error."""
    from fewstep.runs.record import FREE

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
