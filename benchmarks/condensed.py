"""How good a small data set is: accuracy against the images kept, their bytes and the seconds of making it.

    python benchmarks/condensed.py --data fashion --per-class 1 10 --out fashion.json
    python benchmarks/condensed.py --data train.parquet --test test.parquet --per-class 10 50 --out cifar10.json

Every method makes its set once a seed; classifiers of several makes are trained on each in the same steps, with hard
labels and with a teacher's, beside as many random samples and all data.  Rows that the results file holds already are
not made again, so that the same command finishes a benchmark that was stopped.  Beside FILE.json stands FILE.md, the
table.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from fewstep import api
from fewstep.classifiers import NetworkClassifier
from fewstep.condense.ast import AST
from fewstep.condense.cv_dd import CVDD
from fewstep.condense.dq import DatasetQuantization
from fewstep.condense.pca import PCA
from fewstep.data import Dataset
from fewstep.data import load as load_data
from fewstep.data.dataset import Chosen, Samples
from fewstep.data.views import Views
from fewstep.evaluation.classification import (
    Candidate,
    Protocol,
    bytes_of,
    from_condensed,
    post_evaluate,
    random_subset,
    trained,
)
from fewstep.files import write_atomically
from fewstep.methods.method import Recipe
from fewstep.randomness import Rng
from fewstep.report import machine
from fewstep.training import trainer
from fewstep.training.orders import Order

#: How random samples are looked at: as they are, and as the cells of canvases are.
AS_THEY_ARE, CROPS = Views(), Views.parse("crop:0.5")
#: Method -> its recipe for so many images a class, which are a share of the data; its budget; its batch.
RECIPES: dict[str, tuple[Callable[[int, float], Recipe], str, int]] = {
    "pca": (lambda per_class, share: PCA(per_class), "400steps", 64),
    "pca, one a canvas": (lambda per_class, share: PCA(per_class, k=1), "400steps", 64),
    "dq": (lambda per_class, share: DatasetQuantization(share), "400steps", 64),
    "ast": (
        lambda per_class, share: AST(per_class, experts=4, epochs=6, max_start_epoch=4, steps=10, expert_batch=128),
        "200steps",
        64,
    ),
    "ast, no penalty": (
        lambda per_class, share: AST(
            per_class, penalty=0.0, experts=3, epochs=5, max_start_epoch=3, steps=10, expert_batch=128, inner_batch=50
        ),
        "150steps",
        64,
    ),
    "cv-dd": (lambda per_class, share: CVDD(per_class, label_epochs=60), "600steps", 64),
}

#: How many random samples a method sees at most, where its experts would take hours on all.
SEES = {"ast": 6000, "ast, no penalty": 6000}


def condensed(name: str, data: Samples, per_class: int, seed: int) -> Candidate:
    """What a method makes of the data, with the seconds that it took."""
    make, budget, batch = RECIPES[name]
    start = trainer.clock()
    share = per_class * (data.classes or 1) / len(data)
    if len(data) > SEES.get(name, len(data)):
        rows = Rng(seed, "seen").shuffled(len(data))[: SEES[name]].sort().values
        data = Chosen(data, rows, data.name)
    made = api.condense_data(make(per_class, share), data, budget, batch=batch, seed=seed, show=False)
    return from_condensed(name, made, trainer.clock() - start)


def candidates(name: str, data: Dataset, per_class: int, seed: int) -> Candidate:
    """A row's data: "random", "all", "rs2", each also "with crops", or what a method makes."""
    kept = per_class * (data.classes or 1)
    views = CROPS if name.endswith(" with crops") else AS_THEY_ARE
    kind = name.removesuffix(" with crops")
    if kind == "random":
        return replace(random_subset(data, kept, seed, views), name=name)
    if kind == "all":
        return Candidate(name, data, bytes_of(data), views)
    if kind == "rs2":  # which needs all data, and as many a round
        return Candidate(name, data, bytes_of(data), views, Order.parse(f"random:{kept / len(data)}"))
    return condensed(name, data, per_class, seed)


def teacher_of(data: Dataset, network: str, steps: int) -> NetworkClassifier:
    """A classifier of all data, whom soft labels come from."""
    return trained(Candidate("all", data, 0), network, "hard", Protocol(steps=steps), 100)[0]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown: mean and standard deviation over the sets and first weights."""
    lines = [
        "| images a class | data | kB | choosing s | labels | network | accuracy |",
        "|---:|---|---:|---:|---|---|---:|",
    ]
    for row in rows:
        found = row["accuracies"]
        spread = f" ± {100 * statistics.stdev(found):.1f}" if len(found) > 1 else ""
        lines.append(
            f"| {row['per_class']} | {row['name']} | {row['bytes'] / 1000:,.1f} | {row['chosen']:.1f} | "
            f"{row['labels']} | {row['network']} | {100 * statistics.fmean(found):.1f}{spread} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--test", help="held-out data (default: the part of the data that is held out)")
    parser.add_argument("--methods", nargs="+", default=["random", "random with crops", *RECIPES, "rs2", "all"])
    parser.add_argument("--per-class", type=int, nargs="+", default=[1, 10, 50])
    parser.add_argument("--networks", nargs="+", default=["convnet", "mlp-classifier", "resnet"])
    parser.add_argument("--labels", nargs="+", default=["hard"], choices=["hard", "soft", "stored"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train-steps", type=int, default=300)
    parser.add_argument("--teacher-steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    train = load_data(chosen.data)
    test = load_data(chosen.test) if chosen.test else load_data(chosen.data, "test")
    teacher = teacher_of(train, chosen.networks[0], chosen.teacher_steps) if "soft" in chosen.labels else None
    rows: list[dict[str, Any]] = json.loads(chosen.out.read_text())["rows"] if chosen.out.is_file() else []
    done = {(row["per_class"], row["name"]) for row in rows}
    for per_class in chosen.per_class:
        for name in chosen.methods:
            if (per_class, name) in done:
                continue
            made: dict[tuple[str, str], dict[str, Any]] = {}
            for seed in chosen.seeds:  # a set of its own for every seed
                candidate = candidates(name, train, per_class, seed)
                protocol = Protocol(
                    {network: {} for network in chosen.networks}, (seed,), chosen.train_steps, teacher=teacher
                )
                for row in post_evaluate([candidate], test, protocol, chosen.labels):
                    kept = made.setdefault((row.labels, row.network), {**asdict(row), "accuracies": []})
                    kept["accuracies"].extend(row.accuracies)
            rows += [{"per_class": per_class, **row} for row in made.values()]
            told = {
                "data": chosen.data,
                "rows": rows,
                "machine": machine.machine("cpu"),
                "versions": machine.versions(),
            }
            write_atomically(chosen.out, (json.dumps(told, indent=1) + "\n").encode())
            write_atomically(chosen.out.with_suffix(".md"), table(rows).encode())
            print(f"{per_class} a class, {name}", flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
