"""How good few-step students become in a given processor time, beside their teacher, over several seeds.

    python benchmarks/quality.py --data digits --budget 60s --out results.json
    python benchmarks/quality.py --defaults --methods scm ctm "mean-flow --guidance 2" --budget 40s --out family.json
    python benchmarks/quality.py --data fashion --methods cm dmd2 --seeds 0 1 2 --budget 3min --out fashion.json

Every method trains from the same teacher with every seed; students are measured at all their numbers of steps, the
teacher at the same numbers and at its full steps.  A row is Fréchet distance (features of the data's classifier, else
pixels) and class accuracy, mean and standard deviation over the seeds, with the cost of sampling and of training.  Rows
that the results file holds already are not made again, and a training run that was stopped goes on, so the same command
finishes a benchmark that was interrupted.  Beside FILE.json stands FILE.md, the table.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from fewstep import api
from fewstep.cli import flags
from fewstep.cli import methods as methods_of_the_cli
from fewstep.data import Dataset
from fewstep.data import load as load_data
from fewstep.denoisers import Denoiser
from fewstep.files import write_atomically
from fewstep.hub import native
from fewstep.methods import RECIPES, recipe_class
from fewstep.methods.consistency.cm import ConsistencyDistillation
from fewstep.methods.consistency.ict import ImprovedConsistencyTraining
from fewstep.methods.consistency.scm import ContinuousConsistencyDistillation
from fewstep.methods.flow_maps.progressive import ProgressiveLadder
from fewstep.methods.flow_maps.rectified_flow import InstaFlow
from fewstep.methods.matching.diff_instruct import DiffInstruct
from fewstep.methods.matching.dmd2 import DMD2
from fewstep.methods.matching.sid import SiD
from fewstep.methods.matching.sim import SIM
from fewstep.methods.method import Recipe
from fewstep.metrics import Evaluator, load_features
from fewstep.report import machine
from fewstep.report.comparison import timed_samples
from fewstep.runs.course import run_recipe
from fewstep.runs.record import weights_sha256
from fewstep.sampling.rollout import Student
from fewstep.training import trainer
from fewstep.training.budget import Budget
from fewstep.training.trainer import Settings

#: Hyper-parameters and batch of each method, by data; what is not named here runs with its defaults and a batch of 64.
SETUPS: dict[str, dict[str, tuple[Recipe, int]]] = {
    "digits": {
        "cm": (ConsistencyDistillation(sigma_data=0.75, lr=1e-3), 128),
        "scm": (ContinuousConsistencyDistillation(sigma_data=0.75), 128),
        "ict": (ImprovedConsistencyTraining(sigma_data=0.75, beta2=0.98), 128),
        "dmd2": (DMD2(), 128),
        "diff-instruct": (DiffInstruct(), 128),
        "sid": (SiD(), 128),
        "sim": (SIM(), 128),
        "instaflow": (InstaFlow(pairs=4096, ode_steps=16), 128),
        "pd": (ProgressiveLadder(start=16), 128),
    },
    "fashion": {
        "cm": (ConsistencyDistillation(sigma_data=0.7, lr=1e-3, grid_times=8), 64),
        "scm": (ContinuousConsistencyDistillation(sigma_data=0.7, tangent_warmup=0.1), 64),
        "dmd2": (DMD2(critic_steps=3), 48),
        "instaflow": (InstaFlow(pairs=2048, ode_steps=8, lr=5e-4), 64),
        "pd": (ProgressiveLadder(start=8, lr=5e-4), 64),
    },
}
SOLVER = "unipc"
FULL_STEPS = 16
FEW_STEPS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Result:
    """One model with one seed at one number of steps; ``key`` says what made it."""

    key: str
    model: str
    seed: int
    steps: int
    calls: int
    frechet: float
    error: float
    floor: float
    accuracy: float | None
    milliseconds: float
    training_seconds: float
    training_steps: int
    recall: float | None = None
    diversity: float | None = None
    #: The share of samples nearer to training data than the nearest 5 % of held-out data are; 0.05 for fresh data.
    close: float | None = None


def main() -> None:
    chosen = arguments()
    train, reference = load_data(chosen.data), load_data(chosen.data, "test")
    teacher: Denoiser = api.load(chosen.teacher or chosen.data)
    features = chosen.features or (train.name if train.name in ("digits", "fashion") else "pixels")
    judge = Evaluator(reference, train, load_features(features))
    done = read(chosen.out)

    def measure(model: Student | Denoiser, key: str, name: str, seed: int, cost: tuple[float, int]) -> None:
        """Add a model's rows to the file, all at once: a key that is there is complete."""
        for steps in steps_of(model, name):
            x, labels, calls, seconds = timed_samples(model, steps, chosen.n, seed, SOLVER, 100)
            quality = judge(x, labels)
            made = Result(
                key, name, seed, steps, calls, quality.frechet.value, quality.frechet.error, quality.floor.value,
                quality.accuracy, 1000 * seconds, *cost, quality.recall, quality.diversity, quality.memorisation.close,
            )  # fmt: skip
            done[f"{key} steps={steps}"] = made
        write(chosen.out, done, vars(chosen) | {"features": features})

    name = chosen.teacher or chosen.data
    weights = weights_sha256(api.locate(name))[:8]  # a teacher that was trained again is another teacher
    where = f"teacher {name} ({weights}) on {train.name}, n={chosen.n}, features {features}"
    finished = {row.key for row in done.values()}
    for seed in chosen.seeds:
        key = f"{where} seed={seed}"
        if key not in finished:
            measure(teacher, key, "teacher", seed, (0.0, 0))
    for seed in chosen.seeds:
        for method in chosen.methods:
            recipe, batch = setup(method, "" if chosen.defaults else train.name)
            key = f"{recipe!r} batch={batch} {chosen.budget} {where} seed={seed}"
            if key in finished:
                print(f"{method}, seed {seed}: done before")
                continue
            print(f"{method}, seed {seed}: {chosen.budget}")
            # the whole key names the folder: a run with other settings must not take up this one's checkpoint
            folder = (
                chosen.runs / train.name / f"{method.split()[0]}-{seed}-{hashlib.sha256(key.encode()).hexdigest()[:10]}"
            )
            settings = Settings(Budget.parse(chosen.budget), batch=batch, seed=seed, precision=chosen.precision)
            result, seconds = timed_run(recipe, teacher, train, settings, folder)
            native.save(result.model, folder / "model", {"method": method, "teacher": name, "data": train.name})
            measure(result.model, key, method, seed, (seconds, result.steps))
    text = table(list(done.values()), where)
    write_atomically(chosen.out.with_suffix(".md").absolute(), text.encode())
    print(text)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, fashion, or the path of a data set with a test part")
    parser.add_argument("--teacher", help="a model or run folder (default: the bundled teacher of the data)")
    parser.add_argument("--features", help="default: the classifier of digits and fashion, else pixels")
    parser.add_argument(
        "--methods", nargs="+", default=["cm", "scm", "dmd2", "instaflow", "pd"],
        help="names, or in quotes a name with the flags of fewstep distill: 'mean-flow --guidance 2'",
    )  # fmt: skip
    parser.add_argument("--defaults", action="store_true", help="every method as it is out of the box, batch 64")
    parser.add_argument("--precision", default="auto", help="auto (default), fp32 or bf16")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--budget", default="60s", help="of every run: 60s, 2min, 500steps")
    parser.add_argument("--n", type=int, default=1000, help="samples of each model (default 1000)")
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"), help="where the runs train")
    parser.add_argument("--out", type=Path, default=Path("results.json"))
    chosen = parser.parse_args()
    Budget.parse(chosen.budget)
    for asked in chosen.methods:
        if asked.split()[0] not in RECIPES:
            parser.error(f"--methods: there is no method '{asked}'")
        setup(asked, chosen.data)
    return chosen


def timed_run(
    recipe: Recipe, teacher: Denoiser, train: Dataset, settings: Settings, folder: Path
) -> tuple[trainer.Result, float]:
    """A run whose budget is told by the processor time of this process, of which what runs beside it takes nothing, and
    the seconds that all of it took, pairs and other stores with it (of a run that goes on, those of the rest)."""
    start = time.process_time()
    with mock.patch.object(trainer, "clock", time.process_time):
        result = run_recipe(recipe, teacher, train, settings, folder)
    return result, max(result.seconds, time.process_time() - start)


def setup(asked: str, data: str) -> tuple[Recipe, int]:
    """The recipe of a method, and of flags behind its name, on this data, and its batch."""
    name, *words = shlex.split(asked)
    if not words:
        known = SETUPS.get(data, {})
        return known[name] if name in known else (recipe_class(name)(), 64)
    parser, parameters = argparse.ArgumentParser(name), methods_of_the_cli.parameters(name)
    for parameter in parameters:
        parameter.add_to(parser)
    return methods_of_the_cli.build(name, flags.given(parameters, parser.parse_args(words))), 64


def steps_of(model: Student | Denoiser, name: str) -> tuple[int, ...]:
    """The numbers of steps at which a model is measured."""
    if isinstance(model, Student):
        return tuple(model.plans)
    return (*FEW_STEPS, FULL_STEPS) if name == "teacher" else FEW_STEPS


def read(path: Path) -> dict[str, Result]:
    """The rows of a results file by what they are."""
    if not path.is_file():
        return {}
    rows = [Result(**row) for row in json.loads(path.read_text())["rows"]]
    return {f"{row.key} steps={row.steps}": row for row in rows}


def write(path: Path, done: dict[str, Result], asked: dict[str, Any]) -> None:
    """Replace the results file."""
    told = {
        "asked": {name: str(value) for name, value in asked.items()},
        "versions": machine.versions(),
        "machine": machine.machine(),
        "rows": [asdict(row) for row in done.values()],
    }
    write_atomically(path.absolute(), (json.dumps(told, indent=1, allow_nan=False) + "\n").encode())


def table(rows: list[Result], where: str) -> str:
    """Mean and standard deviation over the seeds, as Markdown: the teacher first, then by calls and quality."""
    groups: dict[tuple[str, str, int], list[Result]] = {}
    for row in rows:
        what = row.key.partition(" seed=")[0]
        if what.endswith(where):
            groups.setdefault((what, row.model, row.steps), []).append(row)
    ordered = sorted(groups.values(), key=lambda g: (g[0].model != "teacher", g[0].calls, mean(r.frechet for r in g)))
    lines = [
        f"{where}; real against real {mean(r.floor for g in ordered for r in g):.2f}",
        "",
        "| model | calls | Fréchet | recall | diversity | close to training data | class accuracy | ms a picture "
        "| training | steps | seeds |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for group in ordered:
        known = [row.accuracy for row in group if row.accuracy is not None]
        trained = mean(row.training_seconds for row in group)
        steps = mean(row.training_steps for row in group)
        cells = [
            group[0].model, str(group[0].calls), spread([row.frechet for row in group], 2),
            *(spread([v for v in column if v is not None], 2) or "-" for column in beside(group)),
            spread(known, 3) if known else "-", f"{mean(row.milliseconds for row in group):.3g}",
            f"{trained:.0f} s" if trained else "-", f"{steps:.0f}" if steps else "-", str(len(group)),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def beside(group: list[Result]) -> list[list[float | None]]:
    """Recall, diversity over the data's, and the share close to training data."""
    return [[row.recall for row in group], [row.diversity for row in group], [row.close for row in group]]


def mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def spread(values: list[float], digits: int) -> str:
    """Mean and standard deviation over seeds; the value alone of one seed, nothing of none."""
    if not values:
        return ""
    value = f"{statistics.fmean(values):.{digits}f}"
    return value if len(values) < 2 else f"{value} ± {statistics.stdev(values):.{digits}f}"


if __name__ == "__main__":
    main()
