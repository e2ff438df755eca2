"""Rules for asking a teacher that is often wrong, side by side on the digits: the share of wrong answers among the
questions, and what the student is worth.

    python benchmarks/rad.py [--seeds 8] [--picture docs/img/rad.png]

Three labels of each class; the teacher, an MLP of 64 units, has learned from these 30 alone and is right on about 0.79
of the pool, which is what the rules are told; the student, another such MLP, learns from the labels and from four
rounds of 40 questions.  540 digits are held out.  Means over seeds, and their standard errors.  20 seconds of one core.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor, nn

from fewstep.classifiers import NetworkClassifier
from fewstep.condense.game import batch
from fewstep.condense.queries import RULES
from fewstep.condense.rad import RAD, kept
from fewstep.condense.supervised import Supervised
from fewstep.data import Dataset
from fewstep.data.bundled import read_bundled
from fewstep.models.networks import fresh_network
from fewstep.randomness import Rng
from fewstep.runs.course import run_recipe
from fewstep.training.budget import Budget
from fewstep.training.settings import Settings

SHAPE, CLASSES, HELD, ROUNDS, STEPS = (1, 8, 8), 10, 540, 4, 50
CONFIG = {
    "name": "mlp-classifier", "shape": list(SHAPE), "classes": CLASSES, "width": 64, "depth": 1, "activation": "relu",
}  # fmt: skip


def settings(steps: int, batch: int, seed: int) -> Settings:
    return Settings(Budget(steps), batch=batch, precision="fp32", seed=seed)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    return float((model.eval()(x).argmax(1) == labels).double().mean())


def outcomes(seed: int) -> dict[str, tuple[float, float, float]]:
    """By rule: the share of wrong answers, the student's accuracy, the teacher's on the pool."""
    parts = [read_bundled("digits", split) for split in ("train", "test")]  # type: ignore[arg-type]
    x = torch.cat([part.read(slice(None)) for part in parts])
    labels = torch.cat([part.labels for part in parts if part.labels is not None])
    order = Rng(seed, "split").shuffled(len(x))
    held, rest = order[:HELD], order[HELD:]
    known = kept(labels[rest], 3, Rng(seed))
    shown = torch.full_like(labels[rest], -1).index_copy(0, known, labels[rest][known])
    data = Dataset("digits", x[rest], shown, tuple(map(str, range(CLASSES))))
    teacher, student = (NetworkClassifier(fresh_network(CONFIG, seed, k), SHAPE, CLASSES) for k in (0, 1))
    few = data.subset(known)
    teacher = run_recipe(Supervised(weight_decay=1e-4), teacher, few, settings(200, 30, seed), show=False).model
    pool = torch.ones(len(rest), dtype=torch.bool).index_fill(0, known, False)
    right = accuracy(teacher, x[rest][pool], labels[rest][pool])
    found = {}
    for rule in RULES:
        recipe = RAD(rule=rule, rounds=ROUNDS, accuracy=right)  # type: ignore[arg-type]
        run = run_recipe(
            recipe, teacher, data, settings((ROUNDS + 1) * STEPS, 50, seed), given={"student": student}, show=False
        )
        answers = run.made["answers"]
        wrong = float((answers.logits.argmax(1) != labels[rest][answers.asked]).double().mean())  # type: ignore
        found[rule] = wrong, accuracy(run.model, x[held], labels[held]), right
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--picture", type=Path)
    chosen = parser.parse_args()
    kinds: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for seed in range(chosen.seeds):
        for rule, found in outcomes(seed).items():
            kinds[rule].append(found)
    print("| rule | wrong answers | student's accuracy |\n|---|---:|---:|")
    for rule, rows in kinds.items():
        told = []
        for column in list(zip(*rows, strict=True))[:2]:
            spread = statistics.stdev(column) / len(column) ** 0.5 if len(column) > 1 else 0.0
            told.append(f"{statistics.fmean(column):.3f} ± {spread:.3f}")
        print(f"| {rule} | {' | '.join(told)} |")
    print(f"teacher on the pool: {statistics.fmean(row[2] for row in kinds['rad']):.3f}")
    if chosen.picture is not None:
        draw(chosen.picture, {rule: statistics.fmean(row[0] for row in rows) for rule, rows in kinds.items()})


def draw(path: Path, wrong: dict[str, float]) -> None:
    """The robust marginals of 40 questions over 1000 points as the teacher gets worse, and what was measured."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.2, 3.0), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[2, 1])
    gains = torch.linspace(1, 0.02, 1000, dtype=torch.float64)
    for share, colour in ((0.02, "#2b6cb0"), (0.1, "#2f855a"), (0.3, "#c05621"), (0.6, "#805ad5")):
        left.plot(gains, batch(gains, share * len(gains), 40).marginals, color=colour, label=f"{share:.0%} wrong")
    left.invert_xaxis()
    left.set_xlabel("gain of a sample, largest first")
    left.set_ylabel("probability of a question")
    left.set_ylim(0, 0.3)
    left.legend(frameon=False)
    right.bar(list(wrong), list(wrong.values()), color=["#c05621", "#dd8452", "#718096", "#a0aec0"])
    right.set_title("wrong answers, digits", fontsize=10)
    right.tick_params(axis="x", labelsize=8)
    for ax in (left, right):
        ax.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
