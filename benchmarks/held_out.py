"""The default solver and ``solver_for`` on worlds that no choice has seen, beside the best of diffusers for every cell.

    python benchmarks/held_out.py [--seed held-out] [--count 12] [--calls 5 10 20 40] [--out site/held-out.md]

Draws ``--count`` unguided and as many guided problems (``benchmarks/population.py``) from the seed; the rules of
:class:`fewstep.sampling.ABM` were chosen on the seed "fit".  A cell is a problem at a number of calls.  diffusers gets
its best setting for that very cell (``benchmarks/diffusers_peers.py``); fewstep gets one rule.  Lost cells are printed.
About 20 minutes of one core at the default size.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers.utils import logging
from diffusers_peers import best_of
from population import Problem, draw_problems

from fewstep.guidance import Guided
from fewstep.sampling import sample
from fewstep.sampling.search import half_level, solver_for


class Cell(NamedTuple):
    """Errors of the default, of ``solver_for`` with the model, and of the best of diffusers."""

    problem: Problem
    calls: int
    default: float
    chosen: float
    theirs: float
    which: str

    def factor(self, ours: float) -> float:
        """How many times smaller an error is than the best of diffusers."""
        return self.theirs / ours


def cells(problem: Problem, calls: Sequence[int]) -> Iterator[Cell]:
    model, n = problem.model, len(problem.noise)
    steered = model if problem.guidance is None else Guided(model, problem.guidance)
    defaults = [problem.error(sample(steered, n, steps=k, noise=problem.noise, cond=problem.cond)) for k in calls]
    model.half_level = half_level(model, problem.cond)
    for k, default in zip(calls, defaults, strict=True):
        setting = solver_for(k, problem.guidance or False, model, problem.cond)
        chosen = sample(steered, n, noise=problem.noise, cond=problem.cond, **setting.options())  # type: ignore[arg-type]
        theirs, which = best_of(problem.family, k, steered, problem.noise, problem.cond, problem.error)
        yield Cell(problem, k, default, problem.error(chosen), theirs, which)


def summary(found: list[Cell], key: Callable[[Cell], object]) -> str:
    """Cells won and the geometric mean of the factor, by a key."""
    lines = ["| | cells | default wins | factor | `solver_for` wins | factor |", "|---|---:|---:|---:|---:|---:|"]
    for group in [*dict.fromkeys(map(key, found)), None]:
        mine = [cell for cell in found if group is None or key(cell) == group]
        columns = []
        for ours in ("default", "chosen"):
            factors = [cell.factor(getattr(cell, ours)) for cell in mine]
            mean = math.exp(sum(map(math.log, factors)) / len(factors))
            columns.append(f"{sum(f > 1 for f in factors)} | {mean:.1f}x")
        lines.append(f"| {'all' if group is None else group} | {len(mine)} | {' | '.join(columns)} |")
    return "\n".join(lines)


def table(found: list[Cell]) -> str:
    """Every cell."""
    heads = ("problem", "schedule", "calls", "default", "`solver_for`", "best of diffusers", "which")
    lines = [f"| {' | '.join(heads)} |", "|---|---|" + "---:|" * 4 + "---|"]
    for cell in found:
        lost = " (lost)" if cell.chosen >= cell.theirs else ""
        lines.append(
            f"| {cell.problem.name} | {cell.problem.family} | {cell.calls} | {cell.default:.2g} | "
            f"{cell.chosen:.2g}{lost} | {cell.theirs:.2g} | {cell.which} |"
        )
    return "\n".join(lines)


def figure(found: list[Cell], path: Path) -> None:
    """How many times smaller ``solver_for`` errs than the best of diffusers: a point a cell."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(7, 3.6), layout="constrained")
    axis = fig.subplots()
    calls = sorted({cell.calls for cell in found})
    for shift, guided, color in ((-0.12, False, "C0"), (0.12, True, "C1")):
        mine = [cell for cell in found if (cell.problem.guidance is not None) == guided]
        x = [calls.index(cell.calls) + shift for cell in mine]
        axis.scatter(x, [cell.factor(cell.chosen) for cell in mine], s=18, alpha=0.7, color=color,
                     label="guided" if guided else "unguided")  # fmt: skip
    axis.axhline(1, color="grey", lw=1, ls="--")
    axis.set_yscale("log")
    axis.set_xticks(range(len(calls)), [f"{k} calls" for k in calls])
    axis.set_ylabel("error of the best of diffusers / ours")
    axis.legend()
    fig.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", default="held-out", help="what the problems are drawn from")
    parser.add_argument("--count", type=int, default=12, help="unguided problems, and as many guided ones")
    parser.add_argument("--calls", type=int, nargs="+", default=[5, 10, 20, 40])
    parser.add_argument("--out", type=Path, help="a Markdown file for the tables; a figure lies beside it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    began, found = time.perf_counter(), list[Cell]()
    for guided in (False, True):
        for problem in draw_problems(args.count, args.seed, guided):
            found += cells(problem, args.calls)
            latest = " ".join(f"{cell.factor(cell.chosen):.1f}x" for cell in found[-len(args.calls) :])
            print(f"{problem.family}, {problem.name}: {latest} ({time.perf_counter() - began:.0f} s)", flush=True)

    def kind(cell: Cell) -> str:
        return f"{'unguided' if cell.problem.guidance is None else 'guided'}, {cell.calls} calls"

    parts = [summary(found, kind), summary(found, lambda cell: cell.problem.family), table(found)]
    text = "\n\n".join(parts)
    print(text)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n")
        figure(found, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
