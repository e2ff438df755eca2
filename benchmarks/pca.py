"""What pictures are worth by how they were chosen, merged and labelled: the table and the picture of PCA's page.

    python benchmarks/pca.py fashion --per-class 1 5 10 50 --seeds 0 1 --steps 150
    python benchmarks/pca.py digits --per-class 1 5 10 --seeds 0 1 2 --steps 300
    python benchmarks/pca.py fashion --per-class 10 --picture docs/img/pca.png --no-table

Digits are enlarged to 16x16, so that a cell of a canvas holds all of their 8x8 pixels.  Every set is looked at in the
same way: crops of at least half of a picture, or of a cell, and mirrored ones.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from fewstep.classifiers import NetworkClassifier
from fewstep.condense.canvases import combine
from fewstep.condense.pca import PCA
from fewstep.condense.select import members, select
from fewstep.data import load
from fewstep.data.condensed import Condensed
from fewstep.data.dataset import Dataset
from fewstep.data.views import Views
from fewstep.evaluation.classification import (
    Candidate,
    Protocol,
    accuracy,
    bytes_of,
    fresh_classifier,
    from_condensed,
    post_evaluate,
    trained,
)  # fmt: skip
from fewstep.networks.classifier import BUNDLED, bundled_classifier
from fewstep.randomness import Rng
from fewstep.report.pictures import sheet
from fewstep.runs.course import run_recipe
from fewstep.training.budget import Budget
from fewstep.training.settings import Settings

#: Name of a row -> rule and cells along a side.
ROWS = {"random": ("random", 1), "easy": ("easy", 1), "hard": ("hard", 1), "random, k = 2": ("random", 2),
        "pca, k = 2": ("easy", 2)}  # fmt: skip
#: Trained on digits, and on larger pictures.
SMALL, LARGE = {"mlp-classifier": {}}, {"convnet": {"width": 16}}
ALL_VIEWS = Views("cells", 1)


def enlarged(data: Dataset) -> Dataset:
    """Pictures of 8x8 at 16x16, others as they are."""
    if data.shape[-1] != 8:
        return data
    return Dataset(data.name, data.x.repeat_interleave(2, -1).repeat_interleave(2, -2), data.labels, data.class_names)


def teacher_for(train: Dataset) -> NetworkClassifier:
    """The bundled classifier of the data, where it takes pictures of their size; else one that all of them trained."""
    if train.name in BUNDLED and train.shape[-1] != 16:
        return NetworkClassifier(bundled_classifier(train.name), train.shape, 10)
    whole = Candidate("all", train, bytes_of(train), ALL_VIEWS)
    return trained(whole, "convnet", "hard", Protocol(LARGE, steps=300), 0)[0]


def scored(train: Dataset, network: str) -> tuple[torch.Tensor, float]:
    """EL2N of all pictures, as the method scores them, and the seconds that it took."""
    method, start = PCA(per_class=1, k=1), time.perf_counter()
    settings = Settings(Budget(-(-method.epochs * len(train) // 64)), precision="fp32")
    made = run_recipe(method, fresh_classifier(network, train), train, settings, show=False).model
    return made.notes["scores"], time.perf_counter() - start


def condensed(train: Dataset, scores: torch.Tensor, per_class: int, keep: str, k: int) -> Condensed:
    """What the method makes of these scores."""
    index = select(scores, labels_of(train), per_class * k * k, keep, Rng(0, "random subset"), 10).reshape(-1, k * k)
    canvases = combine(train.x[index.flatten()].unflatten(0, index.shape))
    labels = torch.arange(10).repeat_interleave(per_class)
    return Condensed(canvases, labels, train.class_names, views=Views("cells", k), notes={"index": index})


def labels_of(data: Dataset) -> torch.Tensor:
    assert data.labels is not None
    return data.labels


def picture(train: Dataset, scores: torch.Tensor, per_class: int) -> bytes:
    """A row a class: three canvases, and of the same class the three easiest and the three hardest pictures."""
    made = condensed(train, scores, per_class, "easy", 2)
    rows = []
    for c, mine in enumerate(members(labels_of(train), 10)):
        order = mine[scores[mine].argsort(stable=True)]
        rows += [made.x[c * per_class : c * per_class + 3], train.x[order[:3]], train.x[order[-3:]]]
    return sheet(torch.cat(rows).float() / 127.5 - 1, 9, side=56)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=BUNDLED)
    parser.add_argument("--per-class", type=int, nargs="+", default=[1, 5, 10, 50])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--no-table", action="store_true")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args(given)
    train, test = (enlarged(load(chosen.data, split=split)) for split in ("train", "test"))
    scores, seconds = scored(train, "convnet" if chosen.data == "fashion" else "mlp-classifier")
    print(f"scores: {seconds:.1f} s, mean {float(scores.mean()):.3f}, median {float(scores.median()):.3f}", flush=True)
    if chosen.picture is not None:
        chosen.picture.write_bytes(picture(train, scores, chosen.per_class[-1]))
    if chosen.no_table:
        return
    teacher = teacher_for(train)
    print(f"teacher: {accuracy(teacher, test):.4f}", flush=True)
    networks = SMALL if chosen.data == "digits" else LARGE
    protocol = Protocol(networks, chosen.seeds, chosen.steps, teacher=teacher)
    told = []
    sets = [(n, {name: condensed(train, scores, n, *how) for name, how in ROWS.items()}) for n in chosen.per_class]
    for per_class, made in sets:
        candidates = [from_condensed(name, one) for name, one in made.items()]
        for row in post_evaluate(candidates, test, protocol, ("hard", "soft")):
            print(
                f"{per_class:3d} {row.name:14} {row.labels} {row.bytes:8,} B {row.mean:.4f} ± {row.spread:.4f}",
                flush=True,
            )
            told.append({"per_class": per_class, **vars(row)})
    whole = Candidate("all", train, bytes_of(train), ALL_VIEWS)
    for row in post_evaluate([whole], test, protocol):
        print(f"all {row.bytes:,} B {row.mean:.4f} ± {row.spread:.4f}")
        told.append(vars(row))
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
