"""The catalogue: every system, its paper, what it needs and what it gives."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def add_arguments(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    parser.usage = "fewstep systems"


def run(chosen: argparse.Namespace) -> None:
    from fewstep.catalogue import systems_table
    from fewstep.cli.terminal import console

    console().print(systems_table())
