"""Training of classifiers from hard labels, soft ones and a teacher."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from fewstep.condense.supervised import KnowledgeDistillation, SoftSupervised, Supervised, nll
from fewstep.data import Dataset
from fewstep.divergences import kl
from fewstep.evaluation.classification import fresh_classifier
from fewstep.methods.method import Batch, Networks, Progress, alone
from fewstep.methods.start import Start
from fewstep.randomness import Rng

#: The recipe of the RS2 paper, and that of benchmarks of condensed data (which says nothing of labels beside it).
SGD = {"kind": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "decay": "cosine:0.001"}
ADAMW = {"kind": "adamw", "betas": (0.9, 0.999), "weight_decay": 0.01, "decay": "cosine"}
SOFT = {
    "views": ..., "lr": 1e-3, "decay": "cosine", "momentum": ..., "weight_decay": 0.01, "temperature": 20.0,
    "optimizer": ADAMW,
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


def test_the_cross_entropy_is_computed_wide() -> None:
    """Of half-precision logits as of what float32 keeps of them."""
    logits = (20 * SOFT_LOGITS).bfloat16()
    assert torch.equal(nll(logits, LABELS), nll(logits.float(), LABELS))
    assert nll(logits.double(), LABELS).dtype == torch.float64


def test_sgd_has_no_nesterov_without_momentum() -> None:
    assert Supervised().optimizer().nesterov and not Supervised(momentum=0.0).optimizer().nesterov
