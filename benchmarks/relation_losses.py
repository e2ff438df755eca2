"""DisWOT's two scores as losses beside distillation, on the digits, four seeds.

    python benchmarks/relation_losses.py

A minute and a half of one core.  Students of 4 channels learn from 200 digits in 250 steps, their teacher of 4-4-4
blocks from 648, and all are tested on the other 1149.  3000 is the weight of the relation in the official scripts.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import ClassVar

import torch

from fewstep.classifiers import NetworkClassifier
from fewstep.condense.supervised import STUDENT, Supervised
from fewstep.data import Dataset
from fewstep.data.bundled import read_bundled
from fewstep.methods.method import Networks
from fewstep.methods.start import Start
from fewstep.models.networks import fresh_network
from fewstep.runs.course import run_recipe
from fewstep.students.diswot import DisWOT
from fewstep.training.budget import Budget
from fewstep.training.settings import Settings

SHAPE, CLASSES, WIDTH, TEACHER, SEEDS = (1, 8, 8), 10, 4, (4, 4, 4), range(4)
TAUGHT, LEARNED, STEPS, TEACHER_STEPS, BATCH, LR = 648, 200, 250, 400, 64, 0.05


@dataclass(frozen=True)
class Given(DisWOT):
    """DisWOT's distillation of a student that is given."""

    roles: ClassVar[tuple[str, ...]] = (STUDENT,)

    def networks(self, start: Start) -> Networks:
        return Networks({STUDENT: start.network(), "teacher": start.model()}, {STUDENT: self.optimizer()})


def classifier(depths: tuple[int, ...], seed: int) -> NetworkClassifier:
    """A residual network with first weights from a seed."""
    config = {
        "name": "resnet", "shape": list(SHAPE), "classes": CLASSES, "width": WIDTH, "depths": list(depths),
        "norm": "batch",
    }  # fmt: skip
    return NetworkClassifier(fresh_network(config, seed), SHAPE, CLASSES)


def parts() -> tuple[Dataset, Dataset, Dataset]:
    """What the teacher learns from, what students learn from, and what all are tested on."""
    first, second = read_bundled("digits", "train"), read_bundled("digits", "test")
    assert first.labels is not None and second.labels is not None
    x, labels = torch.cat([first.x, second.x]), torch.cat([first.labels, second.labels])
    slices = slice(TAUGHT), slice(LEARNED), slice(TAUGHT, None)
    taught, learned, held = (Dataset("digits", x[s], labels[s], first.class_names) for s in slices)
    return taught, learned, held


def settings(steps: int, seed: int) -> Settings:
    return Settings(Budget(steps), batch=BATCH, precision="fp32", seed=seed)


@torch.no_grad()
def accuracy(model: NetworkClassifier, held: Dataset) -> float:
    """On the pictures that nobody has seen."""
    told = model.eval()(held.read(slice(None))).argmax(1)
    return float((told == held.labels).double().mean())


def main() -> None:
    taught, learned, held = parts()
    fresh = classifier(TEACHER, 0)
    teacher = run_recipe(Supervised(lr=LR), fresh, taught, settings(TEACHER_STEPS, 0), show=False).model
    print(f"teacher: {accuracy(teacher, held):.4f}")
    print("| blocks | relation | semantic | accuracy |\n|---|---:|---:|---:|")
    for depths in ((1, 1, 1), (2, 2, 2)):
        for relation, semantic in ((0.0, 0.0), (0.0, 1.0), (3000.0, 0.0), (3000.0, 1.0)):
            recipe = Given(lr=LR, relation_weight=relation, semantic_weight=semantic)
            found = []
            for seed in SEEDS:
                given = {STUDENT: classifier(depths, seed)}
                made = run_recipe(recipe, teacher, learned, settings(STEPS, seed), given=given, show=False).model
                found.append(accuracy(made, held))
            told = f"{statistics.fmean(found):.4f} ± {statistics.stdev(found) / len(found) ** 0.5:.4f}"
            print(f"| {'-'.join(map(str, depths))} | {relation:g} | {semantic:g} | {told} |", flush=True)


if __name__ == "__main__":
    main()
