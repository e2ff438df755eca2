"""What unseen networks learn from a share of all bins: the tables of Dataset Quantization's page.

    python benchmarks/dq.py --data digits --patch-size 2 --steps 200 --out digits.json
    python benchmarks/dq.py --data fashion --keep 0.05 0.1 0.2 --kinds random dq patches --steps 300 --out fashion.json

For each seed a ConvNet that has seen the data once gives the features, and an autoencoder is trained for ``--steps``.
``dq`` keeps pictures whole, ``patches`` without a fifth of their patches, which are filled in again; ``one set`` is a
single greedy selection by the same features, of every class its part.  On each of them, on as many random pictures and
on all of them, networks of four makes are trained in the same 200 steps, three of which nobody asked when the pictures
were chosen.  Beside FILE.json stands FILE.md, the table.  A seed that the results file holds is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.condense.dq import DatasetQuantization, across_bins
from fewstep.condense.graph_cut import cosine, greedy
from fewstep.condense.scores import scores_of
from fewstep.condense.select import budgets, members
from fewstep.data import Dataset, load
from fewstep.data.condensed import Condensed
from fewstep.evaluation.classification import (
    Candidate,
    Protocol,
    accuracy,
    bytes_of,
    fresh_classifier,
    from_condensed,
    post_evaluate,
    random_subset,
)
from fewstep.files import write_atomically
from fewstep.methods.method import Networks
from fewstep.methods.start import Start
from fewstep.randomness import Rng
from fewstep.report import machine
from fewstep.training.budget import Budget
from fewstep.training.settings import Settings
from fewstep.training.trainer import train

NETWORKS = ("mlp-classifier", "resnet", "vit", "convnet")
KINDS = ("random", "dq", "patches", "one set")


@dataclass(frozen=True)
class Opened(DatasetQuantization):
    """The method with all examples kept, which hands on its classifier."""

    keep: float = 1.0

    def hands_on(self, nets: Networks) -> Mapping[str, nn.Module]:
        return {"classifier": nets.classifier}


def candidates(data: Dataset, test: Dataset, shares: Sequence[float], seed: int, method: Opened, steps: int
               ) -> Iterator[tuple[float, Candidate]]:  # fmt: skip
    """Share by share, what is trained on; one training of the two networks serves all of them."""
    labels = data.labels
    assert labels is not None
    start = Start(fresh_classifier("convnet", data, seed), data, seed)
    before = time.process_time()
    result = train(method, start, Settings(Budget(steps), seed=seed, precision="fp32"), show=False)
    made: Any = result.model
    classifier: Any = result.made["classifier"]
    print(
        f"seed {seed}: features of a network with {accuracy(classifier, test):.3f}, holes filled with a squared "
        f"error of {holes(made, data):.3f}, the mean picture has {float(data.read(slice(None)).var(0).mean()):.3f}; "
        f"{time.process_time() - before:.0f} s", flush=True,
    )  # fmt: skip
    features = scores_of((classifier,), data, "gradients")
    for share in shares:
        count = round(share * len(data))
        kept = across_bins(made.notes["bin"], labels, share, Rng(seed, "dq", "keep"))
        wanted = budgets(labels, count).tolist()
        one = torch.cat([
            mine[greedy(cosine(features[mine]), number)]
            for mine, number in zip(members(labels, len(wanted)), wanted, strict=True)
        ])  # fmt: skip
        yield share, random_subset(data, count, seed)
        yield share, Candidate("dq", data.subset(kept), bytes_of(data, count))
        patches = Condensed(made.x[kept], labels[kept], data.class_names)
        yield share, from_condensed("patches", patches)
        yield share, Candidate("one set", data.subset(one), bytes_of(data, count))


def holes(made: Condensed, data: Dataset) -> float:
    """The mean squared error of the filled patches, of pictures that are all kept."""
    dropped = made.notes["dropped"]
    patch = round((data.shape[1] * data.shape[2] / dropped.shape[1]) ** 0.5)
    grid = dropped.view(-1, 1, data.shape[1] // patch, data.shape[2] // patch)
    pixels = grid.repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    error: Tensor = (made.dataset().read(slice(None)) - data.read(slice(None))).square()
    return float(error[pixels].mean())


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A row a network and share: mean and standard deviation over the seeds."""
    lines = [f"| network | kept | {' | '.join(KINDS)} |", f"|---|---:|{'---:|' * len(KINDS)}"]
    for network in dict.fromkeys(row["network"] for row in rows):
        for share in dict.fromkeys(row["share"] for row in rows):
            cells = []
            for kind in KINDS:
                found = [
                    value
                    for row in rows
                    if (row["network"], row["share"], row["name"]) == (network, share, "all" if share == 1 else kind)
                    for value in row["accuracies"]
                ]
                spread = f" ± {statistics.stdev(found):.3f}" if len(found) > 1 else ""
                cells.append(f"{statistics.fmean(found):.3f}{spread}" if found else "")
            if share == 1:  # there is only one way to keep everything
                cells[1:] = [""] * (len(KINDS) - 1)
            lines.append(f"| {network} | {100 * share:g} % | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.4])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--patch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=200, help="steps of the autoencoder")
    parser.add_argument("--train-steps", type=int, default=200, help="steps of the networks that learn")
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    data, test = load(chosen.data), load(chosen.data, "test")
    rows: list[dict[str, Any]] = json.loads(chosen.out.read_text())["rows"] if chosen.out.is_file() else []
    done = {row["seed"] for row in rows}
    for seed in chosen.seeds:
        if seed in done:
            continue
        protocol = Protocol({network: {} for network in chosen.networks}, (seed,), chosen.train_steps)
        method = Opened(patch_size=chosen.patch_size)
        everything = (1.0, Candidate("all", data, bytes_of(data)))
        found = []
        for share, candidate in (*candidates(data, test, chosen.keep, seed, method, chosen.steps), everything):
            if candidate.name not in (*chosen.kinds, "all"):
                continue
            for row in post_evaluate([candidate], test, protocol):
                found.append({"seed": seed, "share": share, **asdict(row)})
        rows += found
        told = {"data": chosen.data, "rows": rows, "machine": machine.machine("cpu"), "versions": machine.versions()}
        write_atomically(chosen.out, (json.dumps(told, indent=1) + "\n").encode())
        write_atomically(chosen.out.with_suffix(".md"), table(rows).encode())
    print(table(rows))


if __name__ == "__main__":
    main()
