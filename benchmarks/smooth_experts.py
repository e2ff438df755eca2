"""What distilled images are worth beside real ones: the tables and the picture of AST's page.

    python benchmarks/smooth_experts.py digits --per-class 1 5 --picture docs/img/ast.png
    python benchmarks/smooth_experts.py fashion --samples 2000 --networks convnet mlp-classifier --width 16 \\
        --seeds 0 1 --experts 5 --epochs 8 --updates 200 --train-steps 100 --train-batch 32 \\
        --methods "ast without penalty"

The first network is that of the experts and of the inner steps.  Every seed has random images, experts and first
weights of its own; classifiers learn from every set in the same steps.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from fewstep.classifiers import NetworkClassifier
from fewstep.condense.ast import AST
from fewstep.condense.select import uniform
from fewstep.data import load
from fewstep.data.condensed import Condensed
from fewstep.data.dataset import Dataset
from fewstep.data.siamese import Siamese
from fewstep.evaluation.classification import (
    Candidate,
    Protocol,
    fresh_classifier,
    from_condensed,
    post_evaluate,
    random_subset,
)
from fewstep.networks.classifier import BUNDLED
from fewstep.randomness import Rng
from fewstep.report.pictures import sheet
from fewstep.runs.course import run_recipe
from fewstep.training.budget import Budget
from fewstep.training.settings import Settings

#: What is switched off for plain matching of training trajectories.
MTT = {"clipping": 0, "penalty": 0.0, "balanced": False, "intermediate": "none", "perturbation": 0.0, "initial": "real"}


def distilled(
    method: AST, fresh: NetworkClassifier, train: Dataset, settings: Settings
) -> tuple[Condensed, float, float]:
    """The images, the processor seconds that they took, and the loss L_M at the end."""
    start = time.process_time()
    result = run_recipe(method, fresh, train, settings, show=False)
    made: Any = result.model
    final = fmean(record["images/final"] for record in result.records[-5:])
    return made, time.process_time() - start, final


def picture(made: Condensed) -> bytes:
    """Two rows: what the first image of each class was, and what it became."""
    first = torch.stack([(made.labels == name).nonzero()[0, 0] for name in range(made.classes)])
    return sheet(torch.cat([made.notes["start"][first], made.x[first]]), made.classes, side=56)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=BUNDLED)
    parser.add_argument("--networks", nargs="+", default=["mlp-classifier", "convnet"])
    parser.add_argument("--per-class", type=int, nargs="+", default=[1])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, help="so many random real samples only")
    parser.add_argument("--experts", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--width", type=int, default=32, help="channels of the ConvNet")
    parser.add_argument("--train-steps", type=int, default=200)
    parser.add_argument("--train-batch", type=int, default=64)
    parser.add_argument("--methods", nargs="+", default=["ast", "ast without penalty", "mtt"])
    parser.add_argument("--picture", type=Path)
    chosen = parser.parse_args(given)
    torch.set_num_threads(1)
    train, test = load(chosen.data), load(chosen.data, "test")
    if chosen.samples is not None:
        train = train.subset(uniform(len(train), chosen.samples, Rng(0, "samples")))
    ast = AST(augment=Siamese.parse("none"), experts=chosen.experts, epochs=chosen.epochs)
    methods = {"ast": ast, "ast without penalty": replace(ast, penalty=0.0), "mtt": replace(ast, **MTT)}
    networks = {name: {"width": chosen.width} if name == "convnet" else {} for name in chosen.networks}
    for per_class in chosen.per_class:
        for seed in chosen.seeds:
            protocol = Protocol(networks, (seed,), chosen.train_steps, chosen.train_batch)
            settings = Settings(Budget(chosen.updates), batch=1, seed=seed, precision="fp32")

            def tell(candidate: Candidate, protocol: Protocol = protocol, **more: Any) -> None:
                found = {row.network: row.mean for row in post_evaluate([candidate], test, protocol)}
                print(json.dumps({"name": candidate.name, **more, **found}), flush=True)

            tell(random_subset(train, 10 * per_class, seed), per_class=per_class, seed=seed)
            for name in chosen.methods:
                method = replace(methods[name], per_class=per_class)
                fresh = fresh_classifier(chosen.networks[0], train, seed, networks[chosen.networks[0]])
                made, seconds, final = distilled(method, fresh, train, settings)
                where = {"per_class": per_class, "seed": seed}
                tell(Candidate(f"start of {name}", Dataset("start", made.notes["start"], made.labels), 0), **where)
                eta = float(made.notes["eta"])
                tell(from_condensed(name, made), **where, seconds=round(seconds, 1), final=final, eta=eta)
                if chosen.picture is not None:
                    chosen.picture.write_bytes(picture(made))
                    chosen.picture = None


if __name__ == "__main__":
    main()
