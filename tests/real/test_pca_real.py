"""PCA on the bundled digits: when easy pictures are the better ones, and what soft labels carry."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

import pytest
import torch
from torch import Tensor, nn

from fewstep.classifiers import NetworkClassifier
from fewstep.condense.pca import PCA
from fewstep.condense.select import select
from fewstep.data import load as load_data
from fewstep.data.dataset import Dataset
from fewstep.evaluation.classification import Candidate, Protocol, bytes_of, post_evaluate
from fewstep.networks.classifier import bundled_classifier
from fewstep.networks.classifiers import MLPClassifier
from fewstep.randomness import Rng
from fewstep.runs.course import run_recipe
from fewstep.training.budget import Budget
from fewstep.training.settings import Settings

SEEDS = (0, 1, 2)


def logistic(train: Dataset, index: Tensor, test: Dataset) -> float:
    """The accuracy of scikit-learn's logistic regression on pixels."""
    from sklearn.linear_model import LogisticRegression

    def flat(data: Dataset) -> tuple[Tensor, Tensor]:
        assert data.labels is not None
        return data.read(slice(None)).flatten(1), data.labels

    model = LogisticRegression(max_iter=500).fit(*flat(train.subset(index)))
    return float(model.score(*flat(test)))


@pytest.fixture(scope="module")
def measured() -> Mapping[tuple[int, str], float]:
    """Accuracies by pictures a class and rule, the EL2N of three small networks after four epochs; means over seeds."""
    train, test = load_data("digits"), load_data("digits", split="test")
    assert train.labels is not None
    found: dict[tuple[int, str], list[float]] = {}
    like = NetworkClassifier(MLPClassifier(train.shape, 10, width=64), train.shape, 10)
    steps = -(-4 * len(train) // 64)
    for seed in SEEDS:
        settings = Settings(Budget(steps), batch=64, precision="fp32", seed=seed)
        made = run_recipe(PCA(per_class=1, k=1), like, train, settings, show=False).model
        scores = made.notes["scores"]
        # what the method itself keeps of it
        assert torch.equal(made.notes["index"], select(scores, train.labels, 1, "easy", Rng(0), 10))
        for per_class in (1, 60):
            for keep in ("easy", "random", "hard"):
                index = select(scores, train.labels, per_class, keep, Rng(seed), 10).flatten()
                found.setdefault((per_class, keep), []).append(logistic(train, index, test))
    return {key: fmean(values) for key, values in found.items()}


def test_easy_pictures_are_better_when_there_are_few(measured: Mapping[tuple[int, str], float]) -> None:
    """One a class: 0.84, 0.62 and 0.24 over five seeds, which lie 0.13 and 0.26 apart at least."""
    assert measured[1, "easy"] > measured[1, "random"] + 0.1
    assert measured[1, "random"] > measured[1, "hard"] + 0.2


def test_hard_pictures_are_better_when_there_are_many(measured: Mapping[tuple[int, str], float]) -> None:
    """Sixty a class: 0.934, 0.966 and 0.981 over five seeds."""
    assert measured[60, "random"] > measured[60, "easy"] + 0.01
    assert measured[60, "hard"] > measured[60, "random"] + 0.003


def test_noise_teaches_only_what_soft_labels_carry() -> None:
    """Smooth noise, no picture among it, with labels at random.  The teacher's word on it is worth more than chance,
    which is what hard labels stay at: pictures are not judged where soft labels are used."""
    test = load_data("digits", split="test")
    rng = Rng("noise")
    coarse = rng.normal(1000, 1, 4, 4)
    x = nn.functional.interpolate(coarse, scale_factor=2, mode="bilinear").clamp(-1, 1)
    noise = Dataset("noise", x, rng.integers(1000, 0, 10), test.class_names)
    teacher = NetworkClassifier(bundled_classifier("digits"), test.shape, 10)
    protocol = Protocol({"mlp-classifier": {}}, SEEDS, steps=200, teacher=teacher)
    hard, soft = post_evaluate([Candidate("noise", noise, bytes_of(noise))], test, protocol, ("hard", "soft"))

    # five standard errors of guessing among ten on 500 held-out pictures; measured: 0.06 and 0.22
    chance = 0.1 + 5 * (0.1 * 0.9 / 500) ** 0.5
    assert hard.mean < chance < soft.mean
