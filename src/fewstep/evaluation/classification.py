"""What a data set is worth: what classifiers of several makes learn from it, in the same steps from the same seeds.

Everybody has the same number of *steps* (not of epochs, which would favour large sets), the same batch, course of the
learning rate and first weights.  Under hard labels the loss is the cross-entropy; under soft ones a teacher tells what
it sees in every view, and the loss is the KL to that at a high temperature.  Beside every condensed set stand as many
*random* samples, class by class, under the same labels, and all data: without the first a figure says nothing about how
samples were chosen.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewstep.classifiers import NetworkClassifier
from fewstep.condense.soft_labels import Replay, SoftLabels
from fewstep.condense.supervised import KnowledgeDistillation, SoftSupervised, Supervised
from fewstep.data.condensed import Condensed
from fewstep.data.dataset import Chosen, Samples
from fewstep.data.rounds import spread, strata
from fewstep.data.views import Views
from fewstep.methods.method import Recipe
from fewstep.methods.optimizer import Decayed
from fewstep.models.networks import fresh_network
from fewstep.networks.classifiers import CLASSIFIERS
from fewstep.randomness import Rng
from fewstep.runs.course import run_recipe
from fewstep.training.budget import Budget
from fewstep.training.orders import Epochs, Order
from fewstep.training.settings import Settings

Labels = Literal["hard", "soft", "stored"]
#: Called with the part done in [0, 1] and what is being done.
Show = Callable[[float, str], None]
EVERYTHING = Epochs()
NO_VIEWS = Views()
BATCH = 500


@dataclass(frozen=True)
class Candidate:
    """Data to be trained on, by name: how training looks at them and in which order it reads them, the ``bytes`` that
    they take and the ``seconds`` that it took to choose or make them.  ``stored`` is what their own soft labels are
    trained on, where those are of views and not of the samples."""

    name: str
    data: Samples
    bytes: int
    views: Views = NO_VIEWS
    order: Order = EVERYTHING
    seconds: float = 0.0
    stored: Samples | None = None

    @property
    def brings_labels(self) -> bool:
        """Whether soft labels stand beside the samples, or beside views of them."""
        return self.stored is not None or "logits" in self.data.rows(torch.tensor([0])).columns

    def with_own_labels(self) -> Candidate:
        """What is trained on for the soft labels that it brings."""
        return self if self.stored is None else replace(self, data=self.stored, views=NO_VIEWS)


@dataclass(frozen=True)
class Protocol:
    """How everybody is trained: ``networks`` by name with their arguments (empty: the usual ones), ``seeds``, and
    ``teacher``, which soft labels come from.  ``soft_decay`` and ``soft_decayed`` are the course of the learning rate
    and the weights that decay where labels are soft or stored."""

    networks: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"convnet": {}})
    seeds: Sequence[int] = (0, 1, 2)
    steps: int = 300
    batch: int = 64
    lr: float = 0.05
    soft_lr: float = 1e-3
    temperature: float = 20.0
    teacher: NetworkClassifier | None = None
    device: str = "cpu"
    soft_decay: str = "cosine"
    soft_decayed: Decayed = "all"


@dataclass(frozen=True)
class Row:
    """What was learned from one candidate by one network under one kind of labels: an accuracy a seed, and the mean
    ``seconds`` of the training; ``chosen`` are the seconds of the selection."""

    name: str
    network: str
    labels: Labels
    images: int
    bytes: int
    chosen: float
    seconds: float
    accuracies: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def spread(self) -> float:
        """The standard deviation over seeds; not a number for a single one."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else math.nan


def from_condensed(name: str, made: Condensed, seconds: float = 0.0) -> Candidate:
    """A condensed set as a candidate."""
    stored = Replay.of(made, name) if SoftLabels.among(made.notes) else None
    return Candidate(name, made.dataset(name), made.bytes(), made.views, seconds=seconds, stored=stored)


def bytes_of(data: Samples, images: int | None = None) -> int:
    """What so many samples of a data set take (all by default): a byte a number, as pictures do, and one a label."""
    return (len(data) if images is None else images) * (math.prod(data.shape) + 1)


def random_subset(data: Samples, images: int, seed: int = 0, views: Views = NO_VIEWS) -> Candidate:
    """As many random samples, of every class its part."""
    rng = Rng(seed, "random subset")
    groups = strata(data)
    counts = spread([len(group) for group in groups], images)
    index = torch.cat([g[rng.shuffled(len(g))[:count]] for g, count in zip(groups, counts, strict=True)])
    return Candidate("random", Chosen(data, index.sort().values, "random"), bytes_of(data, images), views)


def with_baselines(candidate: Candidate, data: Samples, seed: int = 0) -> list[Candidate]:
    """A candidate beside as many random samples and all of them, which training looks at in the same way (at whole
    pictures where a candidate has canvases)."""
    views = candidate.views.whole()
    everything = Candidate("all", data, bytes_of(data), views)
    return [random_subset(data, len(candidate.data), seed, views), candidate, everything]


def post_evaluate(
    candidates: Sequence[Candidate],
    test: Samples,
    protocol: Protocol,
    labels: Sequence[Labels] = ("hard",),
    show: Show = lambda done, what: None,
) -> list[Row]:
    """A row for every kind of labels, network and candidate, in this order.

    "stored" are the soft labels that a candidate brings, of its samples or of views of them; it is left out for those
    that bring none.
    ValueError for soft labels without a teacher.
    """
    if "soft" in labels and protocol.teacher is None:
        raise ValueError("soft labels come from a teacher: give one")
    jobs = [
        (kind, network, candidate)
        for kind in labels
        for network in protocol.networks
        for candidate in candidates
        if kind != "stored" or candidate.brings_labels
    ]
    rows: list[Row] = []
    for i, (kind, network, candidate) in enumerate(jobs):
        found, seconds = [], []
        for k, seed in enumerate(protocol.seeds):
            show((i + k / len(protocol.seeds)) / len(jobs), f"{candidate.name}, {network}, {kind} labels")
            model, took = trained(candidate, network, kind, protocol, seed)
            found.append(accuracy(model, test))
            seconds.append(took)
        cost = (len(candidate.data), candidate.bytes, candidate.seconds, statistics.fmean(seconds))
        rows.append(Row(candidate.name, network, kind, *cost, tuple(found)))
    return rows


def trained(
    candidate: Candidate, network: str, labels: Labels, protocol: Protocol, seed: int
) -> tuple[NetworkClassifier, float]:
    """A fresh classifier trained on a candidate, and the seconds that it took."""
    if labels == "stored":
        candidate = candidate.with_own_labels()
    fresh = fresh_classifier(network, candidate.data, seed, protocol.networks.get(network, {}))
    settings = Settings(
        Budget(protocol.steps), batch=protocol.batch, seed=seed, precision="fp32", order=candidate.order,
        device=protocol.device,
    )  # fmt: skip
    recipe: Recipe = Supervised(candidate.views, protocol.lr)
    start: nn.Module = fresh
    given: dict[str, nn.Module] = {}
    soft: dict[str, Any] = {"temperature": protocol.temperature, "decayed": protocol.soft_decayed}
    if labels == "stored":
        recipe = SoftSupervised(candidate.views, protocol.soft_lr, protocol.soft_decay, **soft)
    elif labels == "soft":
        assert protocol.teacher is not None
        recipe = KnowledgeDistillation(candidate.views, protocol.soft_lr, protocol.soft_decay, **soft)
        start, given = protocol.teacher, {"student": fresh}
    result = run_recipe(recipe, start, candidate.data, settings, given=given, show=False)
    return result.model, result.seconds


def fresh_classifier(
    network: str, data: Samples, seed: int = 0, arguments: Mapping[str, Any] | None = None
) -> NetworkClassifier:
    """A classifier for a data set, one of :data:`~fewstep.networks.classifiers.CLASSIFIERS`, with weights from a seed;
    ValueError for a network that there is not, or data without labels."""
    if network not in CLASSIFIERS:
        raise ValueError(f"network '{network}' is not one of {', '.join(CLASSIFIERS)}")
    if data.classes is None:
        raise ValueError(f"data '{data.name}' has no labels, from which a classifier could learn")
    config = {"name": network, "shape": list(data.shape), "classes": data.classes, **(arguments or {})}
    return NetworkClassifier(fresh_network(config, seed, "classifier"), data.shape, data.classes).eval()


@torch.no_grad()
def logits_of(model: nn.Module, data: Samples) -> Tensor:
    """The logits ``[N, K]`` of a classifier for all samples, on the CPU."""
    device = next(model.parameters(), torch.zeros(())).device
    found = []
    for start in range(0, len(data), BATCH):
        x = data.rows(slice(start, min(start + BATCH, len(data)))).x
        assert x is not None
        found.append(model(x.to(device)).cpu())
    return torch.cat(found)


def accuracy(model: nn.Module, data: Samples) -> float:
    """The share of the samples whose class a classifier tells."""
    labels = data.conditions(slice(0, len(data)))
    assert isinstance(labels, Tensor)
    return float((logits_of(model, data).argmax(1) == labels).double().mean())
