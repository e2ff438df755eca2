"""Robust active distillation on the digits: few labels, and a teacher that is wrong on a fifth of the pool."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from fewstep.classifiers import NetworkClassifier
from fewstep.condense.rad import RAD, kept
from fewstep.condense.supervised import Supervised
from fewstep.data import Dataset
from fewstep.networks.classifiers import MLPClassifier
from fewstep.randomness import Rng
from fewstep.runs.course import run_recipe
from fewstep.training.budget import Budget
from fewstep.training.settings import Settings

RULES = ("margin", "rad", "uniform")


class Outcome(NamedTuple):
    """The share of wrong answers among the questions, and the student's accuracy on held-out digits."""

    wrong: float
    accuracy: float


def classifier(seed: int) -> NetworkClassifier:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return NetworkClassifier(MLPClassifier((1, 8, 8), 10, width=64), (1, 8, 8), 10)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    return float((model.eval()(x).argmax(1) == labels).float().mean())


def settings(steps: int, batch: int, seed: int) -> Settings:
    return Settings(Budget(steps), batch=batch, precision="fp32", seed=seed)


def outcomes(x: Tensor, labels: Tensor, seed: int) -> dict[str, Outcome]:
    """Every rule with the same teacher and student: 3 labels of each class, 4 rounds of 40 questions."""
    order = Rng(seed, "split").shuffled(len(x))
    held, rest = order[:540], order[540:]
    x_train, y_train = x[rest], labels[rest]
    known = kept(y_train, 3, Rng(seed))
    shown = torch.full_like(y_train, -1).index_copy(0, known, y_train[known])
    data = Dataset("digits", x_train, shown, tuple("0123456789"))
    learning = Supervised(lr=0.1, weight_decay=1e-4)
    teacher = run_recipe(learning, classifier(seed), data.subset(known), settings(200, 30, seed), show=False).model
    pool = torch.ones(len(x_train), dtype=torch.bool).index_fill(0, known, False)
    right = accuracy(teacher, x_train[pool], y_train[pool])
    found = {}
    for rule in RULES:
        run = run_recipe(
            RAD(rule=rule, accuracy=right), teacher, data, settings(5 * 50, 50, seed),  # type: ignore[arg-type]
            given={"student": classifier(seed + 100)}, show=False,
        )  # fmt: skip
        answers = run.made["answers"]
        wrong = (answers.logits.argmax(1) != y_train[answers.asked]).float().mean()  # type: ignore
        found[rule] = Outcome(float(wrong), accuracy(run.model, x[held], labels[held]))
    return found


@pytest.fixture(scope="module")
def means() -> dict[str, Outcome]:
    """Over three seeds."""
    from sklearn.datasets import load_digits

    pictures, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    x = pictures.float().reshape(-1, 1, 8, 8) / 8 - 1
    each = [outcomes(x, labels, seed) for seed in range(3)]
    return {
        rule: Outcome(*(sum(values) / 3 for values in zip(*(one[rule] for one in each), strict=True))) for rule in RULES
    }


def test_robust_questions_meet_fewer_wrong_answers_than_the_least_certain_ones(means: dict[str, Outcome]) -> None:
    """What a student is unsure of the teacher gets wrong too: 0.58 of the answers for the largest gains, 0.36 for the
    robust questions, 0.21 for uniform ones."""
    assert means["margin"].wrong > 0.45
    assert means["margin"].wrong > means["rad"].wrong + 0.1 > means["uniform"].wrong + 0.15
    assert 0.1 < means["uniform"].wrong < 0.3


def test_a_student_of_robust_questions_is_no_worse(means: dict[str, Outcome]) -> None:
    """Than that of margin selection; whether it beats uniform questions is not said: here it does not."""
    assert means["rad"].accuracy >= means["margin"].accuracy > 0.7
