"""Supervised training of a classifier, with hard or soft labels: what every way of choosing or making data ends in.

Repeated random sampling is this training with another order of the data (``--order random:0.1``): the learning rate
follows the budget, so that it is as low at the end of a short run as at that of a long one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from fewstep.classifiers import NetworkClassifier
from fewstep.data.dataset import Samples, every_label
from fewstep.data.views import Views
from fewstep.divergences import kl
from fewstep.methods.method import Batch, Method, Networks, Optimizer, Paper, Progress, Update
from fewstep.methods.optimizer import Decayed
from fewstep.methods.start import Start
from fewstep.ranges import NonNegative, Positive, Share

STUDENT = "student"
AS_THEY_ARE = Views()


def labels_in(batch: Batch) -> Tensor:
    """The class labels ``[B]`` of a batch."""
    if not isinstance(batch.cond, Tensor):
        raise ValueError("this method learns from class labels, and the data have none")
    return batch.cond


def accuracy_of(logits: Tensor, labels: Tensor) -> Tensor:
    """The share of a batch whose class is told, a scalar on the device."""
    return (logits.detach().argmax(1) == labels).float().mean()


@dataclass(frozen=True)
class Supervised(Method):
    """A classifier trained on labelled samples by cross-entropy, with SGD and Nesterov's momentum."""

    name: ClassVar[str] = "supervised"
    paper: ClassVar[Paper] = Paper(
        "Repeated Random Sampling for Minimizing the Time-to-Accuracy of Learning", "2305.18424", "verified",
        ("a batch may hold samples of two rounds; the official code ends a round with a smaller batch",
         "stratified rounds have as many samples of each class as its part of the data; the official code's branch for "
         "less than a sample a class is one of its comparison with distilled sets"),
    )  # fmt: skip
    task = "classification"
    healthy: ClassVar[dict[str, str]] = {
        "student/loss": "falls", "student/accuracy": "rises towards 1, that on the training batches",
    }  # fmt: skip
    roles: ClassVar[tuple[str, ...]] = ("student",)

    views: Annotated[Views, "how training looks at pictures"] = AS_THEY_ARE
    lr: Annotated[Positive, "learning rate at the start"] = 0.1
    decay: Annotated[str, "its course over the budget"] = "cosine:0.001"
    momentum: Annotated[Share, "Nesterov's momentum"] = 0.9
    weight_decay: Annotated[NonNegative, "L2 penalty"] = 5e-4

    def sources(self, start: Start) -> Mapping[str, Samples]:
        every_label(start.data)
        return {"data": start.data}

    def networks(self, start: Start) -> Networks:
        return Networks({STUDENT: start.network()}, {STUDENT: self.optimizer()})

    def optimizer(self) -> Optimizer:
        """How the classifier moves."""
        return Optimizer(
            (STUDENT,), self.lr, kind="sgd", decay=self.decay, momentum=self.momentum, nesterov=self.momentum > 0,
            weight_decay=self.weight_decay,
        )  # fmt: skip

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        labels = labels_in(batch)
        logits = nets.student(self.views(batch.x, batch.rng))
        loss = nll(logits, labels)
        yield Update(STUDENT, loss, {"accuracy": accuracy_of(logits, labels)})

    def student(self, nets: Networks) -> NetworkClassifier:
        made: NetworkClassifier = nets.student
        return made


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy of logits ``[B, K]`` and labels ``[B]``, in float32 or wider."""
    wide = logits if logits.dtype.itemsize > 4 else logits.float()
    told = wide.log_softmax(1).gather(1, labels[:, None])
    return -told.mean()


@dataclass(frozen=True)
class SoftSupervised(Supervised):
    """The same from soft labels, the logits that stand beside each sample or beside views of samples that were kept, by
    the forward KL at a temperature."""

    name: ClassVar[str] = "soft-supervised"
    paper: ClassVar[Paper] = Paper(
        "Dataset Distillation via Committee Voting", "2501.07575", "verified",
        ("the whole cosine; the official rate ends at a half for some data sets, a stretched cosine of 2 here",),
    )  # fmt: skip
    healthy: ClassVar[dict[str, str]] = {"student/loss": "falls: the KL to the soft labels, 0 where they are matched"}

    temperature: Annotated[Positive, "of both laws; no factor of its square"] = 20.0
    lr: Annotated[Positive, "learning rate at the start"] = 1e-3
    decay: Annotated[str, "its course over the budget"] = "cosine"
    weight_decay: Annotated[NonNegative, "decoupled decay of the weights"] = 0.01
    decayed: Annotated[Decayed, "which weights decay: matrices are those of two dimensions and more"] = "matrices"

    def sources(self, start: Start) -> Mapping[str, Samples]:
        return {"data": start.data.labelled_views or start.data}

    def optimizer(self) -> Optimizer:
        return Optimizer(
            (STUDENT,), self.lr, kind="adamw", decay=self.decay, weight_decay=self.weight_decay, decayed=self.decayed
        )

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        soft = batch.column("logits").float()
        logits = nets.student(self.views(batch.x, batch.rng))
        loss = kl(soft, logits, self.temperature).mean()
        yield Update(STUDENT, loss, {"accuracy": accuracy_of(logits, soft.argmax(1))})


@dataclass(frozen=True)
class KnowledgeDistillation(SoftSupervised):
    """A classifier that learns what a teacher says of every view of a sample (Hinton et al. 2015).

    The loss is ``(1 - alpha) CE(labels) + alpha T^p KL(teacher || student)`` at temperature T; Hinton et al. multiply
    by the square of it (p = 2), the benchmarks of condensed data leave it out (p = 0).
    """

    name: ClassVar[str] = "kd"
    paper: ClassVar[Paper] = Paper(
        "Distilling the Knowledge in a Neural Network", "1503.02531", "from paper text",
        ("the factor of the squared temperature is left out by default, as in benchmarks of condensed data sets",),
    )  # fmt: skip
    healthy: ClassVar[dict[str, str]] = {"student/loss": "falls", "student/agreement": "rises towards 1"}

    alpha: Annotated[Share, "weight of the teacher's word; that of the labels is 1 - alpha"] = 1.0
    power: Annotated[NonNegative, "power of the temperature that multiplies the KL, 2 in the paper"] = 0.0

    def sources(self, start: Start) -> Mapping[str, Samples]:
        return {"data": start.data}  # the teacher tells what it sees now

    def networks(self, start: Start) -> Networks:
        return Networks({STUDENT: start.network(), "teacher": start.model()}, {STUDENT: self.optimizer()})

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        x = self.views(batch.x, batch.rng)
        with torch.no_grad():
            told = nets.teacher(x)
        logits = nets.student(x)
        loss = self.alpha * self.temperature**self.power * kl(told, logits, self.temperature).mean()
        if self.alpha < 1:
            loss = loss + (1 - self.alpha) * nll(logits, labels_in(batch))
        yield Update(STUDENT, loss, {"agreement": accuracy_of(logits, told.argmax(1))})
