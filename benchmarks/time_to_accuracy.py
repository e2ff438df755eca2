"""Accuracy against seconds, choosing included: random subsets that are drawn anew in every round, subsets that are
chosen once, and all data, each with a learning rate that runs its whole course.

    python benchmarks/time_to_accuracy.py --data fashion --network convnet --out time.json

Every run is whole: its course of the learning rate is as long as it is.  The subsets that are chosen once are a random
one, the one that GraphCut picks by gradients in the last layer of a classifier trained for one epoch, and those of the
largest and smallest EL2N of three classifiers trained for four; what such classifiers cost is counted.  Seconds are of
processor time.  Beside FILE.json stand FILE.md, the table, and FILE.png, the plot.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fewstep.condense.graph_cut import cosine, greedy
from fewstep.condense.scores import scores_of
from fewstep.condense.select import best_per_class, budgets
from fewstep.data import Dataset
from fewstep.data import load as load_data
from fewstep.data.dataset import Chosen
from fewstep.data.rounds import spread, strata
from fewstep.evaluation.classification import Candidate, Protocol, accuracy, bytes_of, random_subset, trained
from fewstep.files import write_atomically
from fewstep.report import machine
from fewstep.training import trainer
from fewstep.training.orders import Order

Choose = Callable[[Dataset, int, Protocol, int], Tensor]


def classifiers(data: Dataset, protocol: Protocol, network: str, epochs: int, count: int, seed: int) -> list[Any]:
    """Classifiers after a few epochs of all data."""
    steps = max(1, epochs * len(data) // protocol.batch)
    short = Protocol(protocol.networks, steps=steps, batch=protocol.batch, lr=protocol.lr)
    everything = Candidate("all", data, 0)
    return [trained(everything, network, "hard", short, 1000 + 10 * seed + k)[0] for k in range(count)]


def by_graph_cut(data: Dataset, count: int, protocol: Protocol, seed: int) -> Tensor:
    """GraphCut of every class, on gradient features."""
    (network,) = protocol.networks
    features = scores_of(tuple(classifiers(data, protocol, network, 1, 1, seed)), data, "gradients")
    groups = strata(data)
    counts = spread([len(group) for group in groups], count)
    return torch.cat([g[greedy(cosine(features[g]), k)] for g, k in zip(groups, counts, strict=True)])


def by_el2n(sign: int) -> Choose:
    """The examples of every class with the largest or the smallest EL2N."""

    def choose(data: Dataset, count: int, protocol: Protocol, seed: int) -> Tensor:
        (network,) = protocol.networks
        found = scores_of(tuple(classifiers(data, protocol, network, 4, 3, seed)), data, "el2n")
        labels = data.labels
        assert labels is not None
        return best_per_class(sign * found, labels, budgets(labels, count))

    return choose


ONCE: dict[str, Choose] = {
    "random once": lambda data, count, protocol, seed: random_subset(data, count, seed).data.index,  # type: ignore[attr-defined]
    "GraphCut once": by_graph_cut,
    "EL2N hard once": by_el2n(1),
    "EL2N easy once": by_el2n(-1),
}  # fmt: skip
ANEW = {"RS2": "random", "RS2 with replacement": "replaced", "RS2 stratified": "stratified"}


def run(
    name: str, data: Dataset, test: Dataset, share: float, rounds: int, network: str, seed: int, batch: int
) -> dict[str, Any]:
    """One whole run: seconds of choosing and of training, and the accuracy."""
    size = round(share * len(data))
    protocol = Protocol({network: {}}, steps=max(1, rounds * size // batch), batch=batch)
    start = time.process_time()
    if name in ONCE:
        index = ONCE[name](data, size, protocol, seed)
        candidate = Candidate(name, Chosen(data, index, name), bytes_of(data, size))
    else:
        order = Order.parse("epochs" if name == "all, as many steps" else f"{ANEW[name]}:{share}")
        candidate = Candidate(name, data, bytes_of(data), order=order)
    chosen = time.process_time() - start
    model, seconds = trained(candidate, network, "hard", protocol, seed)
    return {
        "name": name, "share": share, "seed": seed, "steps": protocol.steps, "chosen": chosen, "seconds": seconds,
        "accuracy": accuracy(model, test),
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Means over the seeds."""
    lines = ["| share a round | data | steps | choosing s | training s | accuracy |", "|---:|---|---:|---:|---:|---:|"]
    for share, name in dict.fromkeys((row["share"], row["name"]) for row in rows):
        mine = [row for row in rows if (row["share"], row["name"]) == (share, name)]
        mean = {key: statistics.fmean(row[key] for row in mine) for key in ("chosen", "seconds", "accuracy")}
        spread = statistics.stdev(row["accuracy"] for row in mine) if len(mine) > 1 else 0.0
        lines.append(
            f"| {100 * share:g} % | {name} | {mine[0]['steps']:,} | {mean['chosen']:.1f} | {mean['seconds']:.1f} | "
            f"{100 * mean['accuracy']:.1f} ± {100 * spread:.1f} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Accuracy against all seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.add_subplot()
    for name in dict.fromkeys(row["name"] for row in rows):
        points = []
        for share in dict.fromkeys(row["share"] for row in rows):
            mine = [row for row in rows if (row["share"], row["name"]) == (share, name)]
            if mine:
                points.append((
                    statistics.fmean(row["chosen"] + row["seconds"] for row in mine),
                    100 * statistics.fmean(row["accuracy"] for row in mine),
                ))  # fmt: skip
        axes.plot(*zip(*points, strict=True), marker="o", label=name, ls="--" if "once" in name else "-")
    axes.set(xscale="log", xlabel="seconds of one core, choosing included", ylabel="accuracy, %", title=title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion")
    parser.add_argument("--test", help="held-out data (default: the part of the data that is held out)")
    parser.add_argument("--network", default="convnet")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.02, 0.05, 0.1, 0.3])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=[*ONCE, *ANEW, "all, as many steps"])
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    train = load_data(chosen.data)
    test = load_data(chosen.test) if chosen.test else load_data(chosen.data, "test")
    rows: list[dict[str, Any]] = json.loads(chosen.out.read_text())["rows"] if chosen.out.is_file() else []
    done = {(row["share"], row["name"], row["seed"]) for row in rows}
    with mock.patch.object(trainer, "clock", time.process_time):
        for share in chosen.shares:
            for name in chosen.methods:
                for seed in chosen.seeds:
                    if (share, name, seed) in done:
                        continue
                    rows.append(run(name, train, test, share, chosen.rounds, chosen.network, seed, chosen.batch))
                    told = {"data": chosen.data, "rows": rows, "machine": machine.machine("cpu")}
                    write_atomically(chosen.out, (json.dumps(told, indent=1) + "\n").encode())
                    print(rows[-1], flush=True)
    write_atomically(chosen.out.with_suffix(".md"), table(rows).encode())
    plot(rows, chosen.out.with_suffix(".png"), f"{chosen.data}, {chosen.network}, {chosen.rounds} rounds")
    print(table(rows))


if __name__ == "__main__":
    main()
