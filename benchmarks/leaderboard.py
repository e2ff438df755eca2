"""Everything that can be trained, from one teacher, in one budget, over three seeds: a table and a plot.

    python benchmarks/leaderboard.py --out leaderboard.json                    digits; `make leaderboard`
    python benchmarks/leaderboard.py --data fashion --methods sim dmd2 --budgets 3min --out fashion.json

Every method runs out of the box (or with the flags behind its name, in quotes) for each of ``--budgets``, in processor
time of one core, with batches of 64, and is measured as in quality.py; ``--jobs`` processes share the work.  Rows that
are there are not made again, and a run that was stopped goes on: the same command finishes an interrupted leaderboard.
Beside FILE.json stand the table FILE.md and the plot FILE.png: quality against network calls, and against seconds of
training at the fewest calls.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import matplotlib
from quality import FEW_STEPS, FULL_STEPS, Result, beside, mean, read, spread, write

from fewstep.files import write_atomically
from fewstep.methods import RECIPES

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import NullFormatter

#: What makes a teacher, a sampler or a model of other data, and stages that stand in a recipe of their own.
OTHERS = (
    "denoising", "flow-matching", "discrete-denoising", "score-entropy", "analog-bits", "lowdiff", "retime", "lsd",
    "lsd-plus", "reflow", "pd-halving",
)  # fmt: skip
#: Parts of methods that are off out of the box: adversarial terms, and guidance.
MORE = (
    "ayf --gan-share 0.3", "ctm --gan-share 0.5", "pcm --gan-share 0.5", "caf --gan-share 0.3",
    "mean-flow --guidance 2",
)  # fmt: skip
QUALITY = Path(__file__).with_name("quality.py")


def main() -> None:
    chosen = arguments()
    folder = chosen.runs / "parts"
    folder.mkdir(parents=True, exist_ok=True)
    # by turns, so that every process has methods of every kind; two processes never write one file
    parts = [chosen.methods[k :: chosen.jobs] for k in range(chosen.jobs)]
    running = [start(chosen, methods, folder / f"{k}.json") for k, methods in enumerate(parts) if methods]
    failed = [process for process in running if process.wait()]
    rows = {key: row for k in range(chosen.jobs) for key, row in read(folder / f"{k}.json").items()}
    write(chosen.out, rows, vars(chosen))
    text = table(list(rows.values()))
    write_atomically(chosen.out.with_suffix(".md").absolute(), text.encode())
    draw(list(rows.values()), chosen.out.with_suffix(".png"))
    print(text)
    if failed:
        sys.exit(f"{len(failed)} of {len(running)} processes stopped early; the same command goes on")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, fashion, or the path of a data set with a test part")
    parser.add_argument("--teacher", help="a model or run folder (default: the bundled teacher of the data)")
    parser.add_argument("--methods", nargs="+", default=[*(n for n in RECIPES if n not in OTHERS), *MORE])
    parser.add_argument("--budgets", nargs="+", default=["10s", "40s"], help="of every run (default 10s and 40s)")
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    parser.add_argument("--jobs", type=int, default=2, help="processes at once, one thread each (default 2)")
    parser.add_argument("--n", default="1000", help="samples of each model (default 1000)")
    parser.add_argument("--runs", type=Path, default=Path("runs/leaderboard"), help="where the runs train")
    parser.add_argument("--out", type=Path, default=Path("leaderboard.json"))
    return parser.parse_args()


def start(chosen: argparse.Namespace, methods: list[str], out: Path) -> subprocess.Popen[bytes]:
    """A process that makes the rows of some methods at every budget, one after the other."""
    common = ["--defaults", "--precision", "fp32", "--data", chosen.data, "--n", chosen.n, "--out", str(out)]
    common += ["--runs", str(chosen.runs), *(["--teacher", chosen.teacher] if chosen.teacher else [])]
    script = (
        "import subprocess, sys\n"
        "for budget in sys.argv[1].split(','):\n"
        "    subprocess.run([sys.executable, *sys.argv[2:], '--budget', budget], check=True)\n"
    )
    told = [str(QUALITY), *common, "--seeds", *chosen.seeds, "--methods", *methods]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", script, ",".join(chosen.budgets), *told], env=one_thread)


def groups_of(rows: list[Result]) -> dict[tuple[str, float, int], list[Result]]:
    """The seeds of each model, budget (seconds of training, to a tenth) and number of steps."""
    found: dict[tuple[str, str, int], list[Result]] = {}
    for row in rows:
        found.setdefault((row.model, row.key.partition(" seed=")[0], row.steps), []).append(row)
    return {
        (model, round(mean(row.training_seconds for row in group), 1), steps): group
        for (model, _, steps), group in found.items()
    }


def longest(rows: list[Result]) -> dict[str, list[list[Result]]]:
    """By model, the groups of its longest budget, the fewest calls first."""
    by_model: dict[str, dict[float, list[list[Result]]]] = {}
    for (model, seconds, _), group in groups_of(rows).items():
        by_model.setdefault(model, {}).setdefault(seconds, []).append(group)
    return {model: sorted(runs[max(runs)], key=lambda g: g[0].calls) for model, runs in by_model.items()}


def table(rows: list[Result]) -> str:
    """A row a method at its longest budget, by its quality at the fewest calls, the teacher first: Fréchet distance in
    1, 2, 4 and 8 calls, and the other columns at the fewest."""
    last = longest(rows)
    teacher = last.pop("teacher")
    full = next(group for group in teacher if group[0].steps == FULL_STEPS)
    bar = mean(row.frechet for row in full)
    calls = [f"{k} call{'s' * (k > 1)}" for k in FEW_STEPS]
    lines = [
        f"Fréchet distance; real against real {full[0].floor:.2f}. A star marks what is in one call no worse than the "
        f"teacher in {FULL_STEPS}, {spread([row.frechet for row in full], 2)}.",
        "",
        f"| method | {' | '.join(calls)} | recall | diversity | close to training data | class accuracy | seconds "
        "| images |",
        f"|---|{'---:|' * (len(FEW_STEPS) + 6)}",
    ]
    ordered = sorted(last.items(), key=lambda item: mean(row.frechet for row in item[1][0]))
    for model, groups in [("teacher", teacher), *ordered]:
        found = {group[0].calls: [row.frechet for row in group] for group in groups}
        first = groups[0]
        star = "*" if model != "teacher" and mean(found.get(1, [bar + 1])) <= bar else ""
        seconds, images = mean(row.training_seconds for row in first), 64 * mean(row.training_steps for row in first)
        cells = [
            f"`{model}`{star}", *(spread(found.get(k, []), 2) for k in FEW_STEPS),
            *(spread([v for v in column if v is not None], 2) for column in beside(first)),
            spread([row.accuracy for row in first if row.accuracy is not None], 3),
            f"{seconds:.0f}" if seconds else "", f"{images:,.0f}" if images else "",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(rows: list[Result], path: Path) -> None:
    """Quality against calls at the longest budget, and at the fewest calls against the seconds of training."""
    figure, (calls, seconds) = pyplot.subplots(1, 2, figsize=(11, 5.2), layout="constrained")
    last = longest(rows)
    best = sorted((m for m in last if m != "teacher"), key=lambda m: mean(row.frechet for row in last[m][0]))
    palette = [color for color in pyplot.colormaps["tab20"].colors if len(set(color)) > 1]  # no greys
    colors = dict(zip(best, palette, strict=False))
    for model in [*reversed(best), "teacher"]:
        style = {"color": "black", "lw": 2} if model == "teacher" else {"color": colors.get(model, "0.8"), "lw": 1}
        x = [group[0].calls for group in last[model]]
        label = model if model in colors or model == "teacher" else None
        calls.plot(x, [mean(row.frechet for row in group) for group in last[model]], "o-", ms=3, label=label, **style)
    by_time: dict[str, list[tuple[float, float]]] = {}
    for (model, spent, steps), group in groups_of(rows).items():
        if model != "teacher" and steps == last[model][0][0].steps:
            by_time.setdefault(model, []).append((spent, mean(row.frechet for row in group)))
    for model in best:
        points = sorted(by_time[model])
        seconds.plot(*zip(*points, strict=True), "o-", ms=3, lw=1, color=colors.get(model, "0.8"))
    full = next(group for group in last["teacher"] if group[0].steps == FULL_STEPS)
    seconds.axhline(
        mean(row.frechet for row in full), color="black", ls="--", lw=1, label=f"teacher, {FULL_STEPS} calls"
    )
    for axes, label in ((calls, "network calls"), (seconds, "seconds of training on one core")):
        axes.set(xlabel=label, yscale="log", xscale="log")
        axes.set_yticks([1, 2, 5, 10], ["1", "2", "5", "10"])
    calls.set(ylabel="Fréchet distance")
    calls.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    spent = [place for points in by_time.values() for place, _ in points]
    marks = [k for k in (5 * 2**power for power in range(16)) if 0.9 * min(spent) <= k <= 1.1 * max(spent)]
    seconds.set_xticks(marks, [f"{mark}" for mark in marks])
    seconds.xaxis.set_minor_formatter(NullFormatter())
    calls.plot([], [], "o-", ms=3, lw=1, color="0.8", label="the others")
    seconds.legend(frameon=False)
    handles, labels = calls.get_legend_handles_labels()
    order = [len(labels) - 2, *range(len(labels) - 3, -1, -1), len(labels) - 1]  # the teacher, the best first
    figure.legend(
        [handles[k] for k in order], [labels[k] for k in order], loc="outside right upper", fontsize=7, frameon=False
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
