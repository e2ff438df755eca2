"""One HTML page for several runs of one teacher: pictures, quality against steps, cost, what a healthy run looks like.

  fewstep report runs/*
  fewstep report runs/dmd2-digits runs/cm-digits --out digits.html --n 2000

The page needs no other file and no network.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fewstep.cli.inputs import add_extra, read_extras
from fewstep.cli.outputs import output_file


def add_arguments(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    parser.usage = "fewstep report RUN... [flags]"
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", metavar="FILE", type=Path, default=Path("report.html"), help="default report.html")
    parser.add_argument("--teacher", metavar="MODEL", default="", help="default: the one that the runs name")
    parser.add_argument("--data", metavar="DATA", default="", help="default: the data that the runs name")
    parser.add_argument("--n", metavar="N", type=int, default=500, help="samples of each model (default 500)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="default 0")
    add_extra(parser, "the students that take it")
    parser.add_argument("--title", metavar="TEXT", default="", help="of the page")


def run(chosen: argparse.Namespace) -> None:
    from fewstep.cli.terminal import progress
    from fewstep.report import report_runs

    for folder in chosen.runs:
        if not folder.exists():
            raise FileNotFoundError(f"{folder}: no such run folder")
    output_file("--out", chosen.out)
    extras = read_extras(chosen.extra)
    with progress("report") as show:
        out = report_runs(
            chosen.runs, chosen.out, teacher=chosen.teacher, data=chosen.data, n=chosen.n, seed=chosen.seed,
            title=chosen.title, extras=extras, show=show,
        )  # fmt: skip
    print(out)
