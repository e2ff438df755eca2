"""Make a small data set that stands for a large one.

  fewstep condense METHOD --data DATA [--network convnet] [--budget 1min] [--out FOLDER] [the method's own flags]
  fewstep condense METHOD --help               every hyper-parameter of a method, and the networks that help it choose
  fewstep condense METHOD --data DATA --dry-run
  fewstep evaluate runs/METHOD-DATA            what classifiers learn from it, beside random samples and all of them
  fewstep train NAME --method supervised --data runs/METHOD-DATA        a classifier on it
  fewstep condense --recipe runs/x/recipe.json a recorded run again

The same command in the same folder resumes a run that was stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fewstep.cli import methods
from fewstep.cli.errors import UserError, choose
from fewstep.cli.settings import add_run_arguments, word_after
from fewstep.cli.train import OF_STUDENTS, add_fresh_arguments, train
from fewstep.methods import CONDENSERS


def add_arguments(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    method = words[0] if words and not words[0].startswith("-") else None
    parser.usage = f"fewstep condense {method or 'METHOD'} --data DATA [flags]"
    parser.add_argument("method", metavar="METHOD", nargs="?", help="the method, the first word after condense")
    if method is None:
        parser.epilog = f"methods:\n{methods.listing(CONDENSERS)}\n"
    else:
        parser.description = methods.about(choose("method", method, CONDENSERS))
    recipe = word_after("--recipe", words, "")
    if method is None and not recipe:  # help and complaints, which need no flags of a method
        add_run_arguments(parser, without=OF_STUDENTS)
    else:
        add_fresh_arguments(parser, words, method or CONDENSERS[0])


def run(chosen: argparse.Namespace) -> None:
    if chosen.recipe is not None and chosen.method is not None:
        raise UserError("--recipe already says the method: leave METHOD out")
    if chosen.recipe is None and chosen.method is None:
        raise UserError("METHOD is missing: fewstep condense --help lists them")
    source = "data" if chosen.data is None else Path(chosen.data).name
    chosen.method = chosen.method or CONDENSERS[0]  # of a recipe, which says its own
    train(chosen, "condense", CONDENSERS, f"{chosen.method}-{source}")
