"""Make the table of distilled students that proxies of architectures are judged by: every residual network with 1, 2 or
3 blocks in each of three stages, trained from labels alone and from a teacher, two seeds each.

    python benchmarks/make_student_table.py [--out FILE]

Five minutes of one core; a call with the same file goes on where one was stopped.  Students learn from
200 digits, the teacher has seen 648, and all are tested on the other 1149.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import ClassVar

import torch

from fewstep.classifiers import NetworkClassifier
from fewstep.condense.supervised import STUDENT, Supervised
from fewstep.data import Dataset
from fewstep.data.bundled import read_bundled
from fewstep.files import write_atomically
from fewstep.methods.method import Networks
from fewstep.methods.start import Start
from fewstep.models.networks import fresh_network
from fewstep.runs.course import run_recipe
from fewstep.students.diswot import DisWOT
from fewstep.students.proxies import flops, parameters
from fewstep.training.budget import Budget
from fewstep.training.settings import Settings

SHAPE, CLASSES, WIDTH, DEPTHS, SEEDS = (1, 8, 8), 10, 4, (1, 2, 3), (0, 1)
TEACHER = (4, 4, 4)
TAUGHT, LEARNED, STEPS, TEACHER_STEPS, BATCH, LR = 648, 200, 250, 400, 64, 0.05
OUT = Path(__file__).parent.parent / "src" / "fewstep" / "assets" / "students-digits.json"


@dataclass(frozen=True)
class Given(DisWOT):
    """DisWOT's distillation of a student that is given."""

    roles: ClassVar[tuple[str, ...]] = (STUDENT,)

    def networks(self, start: Start) -> Networks:
        return Networks({STUDENT: start.network(), "teacher": start.model()}, {STUDENT: self.optimizer()})


def classifier(width: int, depths: tuple[int, ...], seed: int) -> NetworkClassifier:
    """A residual network with first weights from a seed."""
    config = {
        "name": "resnet", "shape": list(SHAPE), "classes": CLASSES, "width": width, "depths": list(depths),
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
    return round(float((told == held.labels).double().mean()), 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    out = parser.parse_args().out
    taught, learned, held = parts()
    teacher = run_recipe(
        Supervised(lr=LR), classifier(WIDTH, TEACHER, 0), taught, settings(TEACHER_STEPS, 0), show=False
    ).model
    known = json.loads(out.read_text())["students"] if out.is_file() else []
    about = {
        "data": "digits", "shape": list(SHAPE), "classes": CLASSES, "width": WIDTH, "seeds": list(SEEDS),
        "learned": LEARNED, "tested": len(held), "steps": STEPS, "batch": BATCH, "lr": LR,
        "teacher": {"width": WIDTH, "depths": list(TEACHER), "learned": TAUGHT, "accuracy": accuracy(teacher, held)},
    }  # fmt: skip
    for depths in product(DEPTHS, repeat=3):
        if any(student["depths"] == list(depths) for student in known):
            continue
        row = {"depths": list(depths), "vanilla": [], "kd": []}
        for seed in SEEDS:
            made = {"vanilla": (Supervised(lr=LR), classifier(WIDTH, depths, seed), {})}
            made["kd"] = (Given(lr=LR), teacher, {STUDENT: classifier(WIDTH, depths, seed)})  # type: ignore[assignment]
            for name, (recipe, start, given) in made.items():
                run = run_recipe(recipe, start, learned, settings(STEPS, seed), given=given, show=False)
                row[name].append(accuracy(run.model, held))
        net = classifier(WIDTH, depths, 0)
        row["parameters"] = int(parameters(net, torch.zeros(0)))
        row["flops"] = int(flops(net, torch.zeros(1, *SHAPE)))
        known.append(row)
        lines = ",\n  ".join(json.dumps(student) for student in known)
        write_atomically(out, f'{{"about": {json.dumps(about)},\n "students": [\n  {lines}\n]}}\n'.encode())
        print(row, flush=True)


if __name__ == "__main__":
    main()
