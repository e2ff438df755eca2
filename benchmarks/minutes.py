"""How good a one-step student is after so many seconds of training: DMD2, DMD2 with the energy distance, DMD and SIM.

    python benchmarks/minutes.py --out minutes.json                       digits, 20 s to 2 min, one thread
    python benchmarks/minutes.py --budgets 30 60 --seeds 0 --out short.json

Every run starts again from the same teacher, with a course of the learning rate that ends with its budget.  A row is
the Fréchet distance of one call in the features of the data's classifier, beside that of the teacher's full steps;
DMD's seconds include the making of its pairs.  Rows that the results file holds are not made again.  Beside FILE.json
stand the table FILE.md and the picture FILE.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import torch
from quality import FULL_STEPS, SOLVER, Result, mean, read, spread, write

from fewstep import api
from fewstep.data import load as load_data
from fewstep.files import write_atomically
from fewstep.methods.matching.dmd import DMD
from fewstep.methods.matching.dmd2 import DMD2
from fewstep.methods.matching.sim import SIM
from fewstep.methods.method import Recipe
from fewstep.metrics import Evaluator, load_features
from fewstep.report.comparison import timed_samples
from fewstep.runs.course import run_recipe
from fewstep.training.budget import Budget
from fewstep.training.trainer import Settings

matplotlib.use("Agg")
from matplotlib import pyplot

#: By name: the recipe and its batch.  Learning rates for runs of minutes.
SETUPS: dict[str, tuple[Recipe, int]] = {
    "DMD2": (DMD2(critic_steps=3, lr=5e-4, critic_lr=2e-3), 64),
    "DMD2, energy distance": (
        DMD2(gan_weight=0.0, energy_weight=1.0, critic_steps=2, lr=5e-4, critic_lr=2e-3), 64,
    ),
    "DMD": (DMD(distance="features:digits", pairs=2048, lr=5e-4, critic_lr=2e-3), 64),
    "SIM": (SIM(lr=3e-4, critic_lr=1e-3), 64),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", nargs="+", type=float, default=[20.0, 40.0, 80.0, 120.0], help="seconds")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--n", type=int, default=1000, help="samples of each model (default 1000)")
    parser.add_argument("--out", type=Path, default=Path("minutes.json"))
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    teacher, data = api.load("digits"), load_data("digits")
    judge = Evaluator(load_data("digits", "test"), data, load_features("digits"))
    done = read(chosen.out)

    def measure(model: object, key: str, name: str, seed: int, steps: int, cost: tuple[float, int]) -> None:
        x, labels, calls, seconds = timed_samples(model, steps, chosen.n, seed, SOLVER, 100)
        found = judge(x, labels)
        done[f"{key} steps={steps}"] = Result(
            key, name, seed, steps, calls, found.frechet.value, found.frechet.error, found.floor.value, found.accuracy,
            1000 * seconds, *cost,
        )  # fmt: skip
        write(chosen.out, done, vars(chosen))

    for seed in chosen.seeds:
        if f"teacher seed={seed} steps={FULL_STEPS}" not in done:
            measure(teacher, f"teacher seed={seed}", "teacher", seed, FULL_STEPS, (0.0, 0))
        for budget in chosen.budgets:
            for name, (recipe, batch) in SETUPS.items():
                key = f"{recipe!r} batch={batch} {budget:g}s seed={seed}"
                if f"{key} steps=1" in done:
                    continue
                settings = Settings(Budget(budget, "seconds"), batch=batch, seed=seed, precision="fp32")
                result = run_recipe(recipe, teacher, data, settings, show=False)
                measure(result.model, key, name, seed, 1, (result.seconds, result.steps))
                print(f"{name}, {budget:g} s, seed {seed}: {done[f'{key} steps=1'].frechet:.2f}", flush=True)
    rows = list(done.values())
    text = table(rows)
    write_atomically(chosen.out.with_suffix(".md").absolute(), text.encode())
    draw(rows, chosen.out.with_suffix(".png"))
    print(text)


def by_cost(rows: list[Result], name: str) -> list[list[Result]]:
    """The rows of a method, in groups of one budget, the shortest first."""
    groups: dict[str, list[Result]] = {}
    for row in rows:
        if row.model == name:
            groups.setdefault(row.key.partition(" seed=")[0], []).append(row)
    return sorted(groups.values(), key=lambda group: group[0].training_seconds)


def table(rows: list[Result]) -> str:
    """One row a method and budget."""
    teacher = [row for row in rows if row.model == "teacher"]
    lines = [
        f"Teacher, {FULL_STEPS} calls: {spread([row.frechet for row in teacher], 2)}; real against real "
        f"{teacher[0].floor:.2f}",
        "",
        "| method | seconds | iterations | Fréchet | class accuracy |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in SETUPS:
        for group in by_cost(rows, name):
            seconds, steps = mean(row.training_seconds for row in group), mean(row.training_steps for row in group)
            accuracy = spread([row.accuracy for row in group if row.accuracy is not None], 3)
            distance = spread([row.frechet for row in group], 2)
            lines.append(f"| {name} | {seconds:.0f} | {steps:,.0f} | {distance} | {accuracy} |")
    return "\n".join(lines) + "\n"


def draw(rows: list[Result], path: Path) -> None:
    """Distance against training time, the teacher's full steps as a line."""
    figure, axes = pyplot.subplots(figsize=(6.4, 3.8), layout="constrained")
    for name in SETUPS:
        groups = by_cost(rows, name)
        x = [mean(row.training_seconds for row in group) for group in groups]
        y = [mean(row.frechet for row in group) for group in groups]
        low = [min(row.frechet for row in group) for group in groups]
        high = [max(row.frechet for row in group) for group in groups]
        (line,) = axes.plot(x, y, "o-", label=name)
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    full = mean(row.frechet for row in rows if row.model == "teacher")
    axes.axhline(full, color="0.4", linestyle="--", label=f"teacher, {FULL_STEPS} calls")
    axes.set(xlabel="seconds of training, one core", ylabel="Fréchet distance of one call", yscale="log")
    axes.set_yticks([1, 2, 5, 10], ["1", "2", "5", "10"])
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
