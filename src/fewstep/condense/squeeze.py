"""The first stage of matching statistics: classifiers with batch normalisation are trained on the data, and keep its
statistics in their layers.

Batch normalisation sees the whole batch, however it is cut: every part of it asks for the rows of the others, and all
make the same pass.  Running statistics move once a step.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fewstep.classifiers import NetworkClassifier
from fewstep.condense.committee import Pool
from fewstep.condense.statistics import batch_statistics
from fewstep.condense.supervised import accuracy_of, labels_in, nll
from fewstep.data.dataset import Chosen, Samples, class_labels
from fewstep.data.views import Views
from fewstep.methods.method import Batch, Method, Networks, Optimizer, Paper, Progress, Question, Rows, Update
from fewstep.methods.start import Start
from fewstep.networks.classifier import Classifier
from fewstep.networks.classifiers import ConvNet, ResNet
from fewstep.networks.norms import batch_norm
from fewstep.randomness import Rng

Member = Literal["convnet", "convnet-wide", "resnet", "resnet-deep", "classifier"]
#: The architectures of a pool, all with batch normalisation, made for a shape and a number of classes.
MEMBERS: dict[str, Callable[..., nn.Module]] = {
    "convnet": partial(ConvNet, norm="batch"),
    "convnet-wide": partial(ConvNet, width=64, norm="batch"),
    "resnet": ResNet,
    "resnet-deep": partial(ResNet, depths=(2, 2, 2)),
    "classifier": Classifier,
}

PAPER = Paper(
    "Dataset Distillation via Committee Voting", "2501.07575", "verified",
    ("`pool` is three small networks of this library (ResNet18, ResNet50, DenseNet121, ShuffleNetV2 and MobileNetV2 "
     "there), trained side by side on the same views, with SGD",
     "`priors` are by default each member's accuracy on a share of the data that is held out; the paper's, which take "
     "a distillation and an evaluation for each member, are `distilled`, and judged on held-out data too (on the test "
     "set there)",
     "`initial` pictures are random ones of their class; patches of medium difficulty, which are stored there, are "
     "`patches`: here crops of random pictures whose loss is in the middle for the pool",
     "pixels lie in [-1, 1], where an `lr` of 0.1 is what 0.25 is in units of a standard deviation of a fifth of their "
     "range, as CIFAR-10's is; they are rounded to 8 bits before they are labelled, and not compressed",
     "a shift is a share of the side (4 of 32 pixels, 32 of 224)",
     "random pairs, unless there are as many pictures a class as pairs, each of which is then used once, or one, which "
     "the best pair makes",
     "members that distil alone are judged in batches of the run's size (16 there), after as much training as their "
     "share of the budget is",
     "batches of views are all full, so that one may reach into the next epoch; a short one ends each epoch there",
     "crops are cut between pixels and at any ratio that fits, and never fall back to the centre",
     "mixtures are labelled as they are seen; the official relabelling of MixUp labels the unmixed pictures",
     "batch normalisation alone uses the statistics of batches; the official code puts all layers into training mode, "
     "dropout too, and lets running statistics drift"),
)  # fmt: skip
CROPS = Views("crop", 0.5)


def apart(data: Samples, held_out: float) -> tuple[Chosen, Chosen]:
    """The data without a random share, and that share (at least one sample): the same for every stage and seed.  Where
    the share is 0, all of the data and one of its samples.  ValueError where nothing is left."""
    order, n = Rng("held out").shuffled(len(data)), round(held_out * len(data))
    if n == len(data):
        raise ValueError(f"held_out={held_out:g} of {n} samples leaves none to train on")
    return Chosen(data, order[n:], data.name), Chosen(data, order[: max(1, n)], f"{data.name}, held out")


def pictures_of(data: Samples, indices: Tensor) -> Tensor:
    """Some pictures ``[n, C, H, W]``; ValueError for data of another kind."""
    x = data.rows(indices).x
    if x is None or x.ndim != 4:
        raise ValueError(f"data '{data.name}' has no pictures [C, H, W], which could be cropped and mixed")
    return x


def labelled(data: Samples) -> tuple[Tensor, Tensor]:
    """All pictures ``[N, C, H, W]`` and their labels ``[N]``; ValueError for data of another kind."""
    return pictures_of(data, torch.arange(len(data))), class_labels(data)


@dataclass(frozen=True)
class Squeeze(Method):
    """Trains fresh classifiers of the architectures ``pool`` on the same batches, and hands them on as a "pool"."""

    name: ClassVar[str] = "cv-dd-squeeze"
    paper: ClassVar[Paper] = PAPER
    task = "classification"
    healthy: ClassVar[dict[str, str]] = {
        "member-0/loss": "falls, as those of the other members do",
        "member-0/accuracy": "rises towards 1, that on views of the training batches",
    }

    pool: tuple[Member, ...] = ("convnet", "resnet", "classifier")
    held_out: float = 0.1
    views: Views = CROPS
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4

    def sources(self, start: Start) -> Mapping[str, Samples]:
        return {"data": apart(start.data, self.held_out)[0]}

    def networks(self, start: Start) -> Networks:
        shape, classes = tuple(start.teacher.shape), start.teacher.classes
        modules: dict[str, nn.Module] = {}
        groups: dict[str, Optimizer] = {}
        for k, architecture in enumerate(self.pool):
            name = f"member-{k}"
            modules[name] = NetworkClassifier(start.fresh(MEMBERS[architecture](shape, classes), k), shape, classes)
            groups[name] = Optimizer(
                (name,), self.lr, "sgd", momentum=self.momentum, weight_decay=self.weight_decay, decay="cosine"
            )
        return Networks(modules, groups)

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Generator[Update | Question, Tensor, None]:
        x = yield Rows(self.views(batch.x, batch.rng))
        labels = yield Rows(labels_in(batch))
        for k in range(len(self.pool)):
            member = nets.get_submodule(f"member-{k}")
            with batch_norm(member, "batch"), batch_statistics(member) as taps:
                logits = member(x)
            yield Update(f"member-{k}", nll(logits, labels), {"accuracy": accuracy_of(logits, labels)}, taps.follow)

    def members(self, nets: Networks) -> list[nn.Module]:
        return [nets.get_submodule(f"member-{k}") for k in range(len(self.pool))]

    def student(self, nets: Networks) -> nn.Module:
        """The first member."""
        return self.members(nets)[0]

    def hands_on(self, nets: Networks) -> Mapping[str, nn.Module]:
        return {"pool": Pool(self.members(nets), [0.0] * len(self.pool))}
