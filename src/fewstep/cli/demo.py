"""Train three students of a bundled teacher and write a page that compares them, in a few minutes on a laptop."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fewstep.cli.errors import UserError
from fewstep.cli.outputs import output_file


def add_arguments(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    parser.usage = "fewstep demo [--minutes X] [--out FILE]"
    parser.add_argument("--minutes", metavar="X", type=float, default=5.0, help="how long it may take (default 5)")
    parser.add_argument("--out", metavar="FILE", type=Path, default=Path("report.html"), help="default report.html")
    parser.add_argument("--runs", metavar="FOLDER", type=Path, default=Path("runs/demo"), help="default runs/demo")


def run(chosen: argparse.Namespace) -> None:
    if not 0 < chosen.minutes < float("inf"):
        raise UserError(f"--minutes {chosen.minutes:g} must be positive")
    output_file("--out", chosen.out)
    from fewstep import demo

    demo.main(chosen.out, chosen.minutes, chosen.runs)
