"""Training of classifiers from hard labels, soft ones and a teacher."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from fewstep.condense.supervised import KnowledgeDistillation, SoftSupervised, Supervised, nll
from fewstep.data import Dataset
from fewstep.data.views import Views
from fewstep.divergences import kl
from fewstep.evaluation.classification import fresh_classifier
from fewstep.methods.method import Batch, Networks, Progress, alone
from fewstep.methods.start import Start
from fewstep.randomness import Rng
from fewstep.training.optimizers import make_optimizer

#: The recipe of the RS2 paper, and that of benchmarks of condensed data (which says nothing of labels beside it).
SGD = {"kind": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "decay": "cosine:0.001"}
ADAMW = {"kind": "adamw", "betas": (0.9, 0.999), "weight_decay": 0.01, "decayed": "matrices", "decay": "cosine"}
SOFT = {
    "views": ..., "lr": 1e-3, "decay": "cosine", "momentum": ..., "weight_decay": 0.01, "temperature": 20.0,
    "decayed": "matrices", "optimizer": ADAMW,
}  # fmt: skip
PUBLISHED = {
    "supervised": {
        "views": ..., "lr": 0.1, "decay": "cosine:0.001", "momentum": 0.9, "weight_decay": 5e-4, "optimizer": SGD,
    },
    "soft-supervised": SOFT,
    "kd": {**SOFT, "alpha": 1.0, "power": 0.0},
}  # fmt: skip

SHAPE, CLASSES = (1, 4, 4), 3
LABELS = torch.arange(5) % CLASSES
X, SOFT_LOGITS = Rng(0, "x").normal(5, *SHAPE), Rng(0, "soft").normal(5, CLASSES)
DATA = Dataset("points", X, LABELS)


def test_the_losses_are_those_of_the_papers() -> None:
    """Cross-entropy; the KL to soft labels at a temperature; and ``(1 - alpha) CE + alpha T^p KL``."""
    teacher, student = (fresh_classifier("mlp-classifier", DATA, seed) for seed in (0, 1))
    batch = Batch(X, LABELS, Rng(0), {"logits": SOFT_LOGITS})
    start = Start(teacher, DATA, given={"student": student})
    distilled = KnowledgeDistillation(alpha=0.9, temperature=3.0, power=2.0)
    for method in (Supervised(), SoftSupervised(temperature=4.0), distilled):
        nets: Networks = method.networks(start)
        (update,) = alone(method.updates(nets, batch, Progress()))
        logits = nets.student(X)
        assert torch.equal(logits, student(X))
        hard = cross_entropy(logits, LABELS)
        expected = {
            "supervised": hard,
            "soft-supervised": kl(SOFT_LOGITS, logits, 4.0).mean(),
            "kd": 0.1 * hard + 0.9 * 9 * kl(teacher(X), logits, 3.0).mean(),
        }[method.name]
        assert torch.allclose(update.loss, expected, atol=1e-6), method.name
    assert not any(p.requires_grad for p in nets.teacher.parameters())


@pytest.mark.parametrize("decayed", ["all", "matrices"])
def test_which_weights_decay(decayed: Any) -> None:
    """A gradient of 0 leaves an AdamW step of decay alone, 0.5 times 0.2 of a weight."""
    method = SoftSupervised(lr=0.5, weight_decay=0.2, decayed=decayed)
    nets = method.networks(Start(fresh_classifier("convnet", DATA, 0), DATA))
    with torch.no_grad():
        for p in nets.parameters():
            p.fill_(1.0)
            p.grad = torch.zeros_like(p)
    make_optimizer(nets.groups["student"], nets, "student").step()
    shrunk = {p.ndim: float(p.mean()) for p in nets.parameters()}
    assert shrunk == pytest.approx({4: 0.9, 2: 0.9, 1: 0.9 if decayed == "all" else 1.0})


def test_the_teacher_sees_the_view_that_the_student_sees() -> None:
    """Not the picture itself, and not a view of its own."""
    teacher, student = (fresh_classifier("mlp-classifier", DATA, seed) for seed in (0, 1))
    method = KnowledgeDistillation(Views.parse("crop:0.3"))
    nets = method.networks(Start(teacher, DATA, given={"student": student}))
    seen = {}
    for name in ("student", "teacher"):
        getattr(nets, name).register_forward_pre_hook(lambda _, given, name=name: seen.update({name: given[0]}))
    list(alone(method.updates(nets, Batch(X, LABELS, Rng(0)), Progress())))
    assert torch.equal(seen["teacher"], seen["student"]) and not torch.equal(seen["teacher"], X)


def test_the_cross_entropy_is_computed_wide() -> None:
    """Of half-precision logits as of what float32 keeps of them."""
    logits = (20 * SOFT_LOGITS).bfloat16()
    assert torch.equal(nll(logits, LABELS), nll(logits.float(), LABELS))
    assert nll(logits.double(), LABELS).dtype == torch.float64


def test_sgd_has_no_nesterov_without_momentum() -> None:
    assert Supervised().optimizer().nesterov and not Supervised(momentum=0.0).optimizer().nesterov


@pytest.mark.parametrize(
    ("labels", "said"),
    [(LABELS - 1, r"data 'points' has samples without a label \(-1\)"), (None, "data 'points' has no labels")],
)
def test_hard_labels_are_asked_for_before_training(labels: Any, said: str) -> None:
    """Those of every sample; who learns from a teacher needs none."""
    start = Start(fresh_classifier("mlp-classifier", DATA), Dataset("points", X, labels))
    with pytest.raises(ValueError, match=said):
        Supervised().sources(start)
    assert KnowledgeDistillation().sources(start)["data"] is start.data
