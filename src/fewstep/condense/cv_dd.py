"""CV-DD: dataset distillation by committee voting (Cui et al. 2025, arXiv 2501.07575).

*Squeeze*: a pool of classifiers is trained.  *Recover*: pictures are moved until committees of the pool take them for
data.  Image index j of all classes is one batch with one committee of N members, each weighted by how well it distils
alone::

    w = softmax(prior / tau)
    loss = sum_m w_m [ CE(z_m(view(x)), y) + r sum_l c_l (||mu_l - mu_l^run||_2 + ||var_l - var_l^run||_2) ]

under one random crop, flip and shift of the whole batch, with pixels clamped after each step; c_1 = 10, else 1.
*Relabel*: the whole pool votes on crops, flips and mixtures of the pictures, its batch normalisation on the statistics
of each half of a batch, and every view is kept with what was said of it (batch-specific soft labels,
:mod:`fewstep.condense.soft_labels`).  A committee of one is SRe2L++.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fewstep.condense.committee import HELD_OUT, Pool, Priors, draw_committees, percent_right, voting_weights
from fewstep.condense.representatives import medium_patches
from fewstep.condense.select import select
from fewstep.condense.soft_labels import CUTMIX, Mix, RandomView, Replay, SoftLabels, label_views
from fewstep.condense.squeeze import CROPS, PAPER, Member, Squeeze, apart, labelled, pictures_of
from fewstep.condense.statistics import batch_statistics
from fewstep.condense.supervised import STUDENT, SoftSupervised
from fewstep.data.condensed import Condensed, to_pictures
from fewstep.data.dataset import Samples, class_labels
from fewstep.data.views import Views, crop, random_boxes, random_flips
from fewstep.methods.alarm import Alarm, Grows
from fewstep.methods.method import Batch, Method, Networks, Optimizer, Paper, Progress, Recipe, Stage, System, Update
from fewstep.methods.start import Start
from fewstep.networks.norms import Statistics, batch_norm
from fewstep.randomness import Rng
from fewstep.ranges import Count, NonNegative, Positive, Share

Initial = Literal["real", "patches"]
#: The least half of a batch whose statistics are worth having.
LEAST_HALF = 8


class Terms(NamedTuple):
    """What moves the pictures: the loss, and its two terms weighted by votes."""

    loss: Tensor
    cross_entropy: Tensor
    statistics: Tensor


def committee_loss(
    committee: Pool, x: Tensor, labels: Tensor, temperature: float, statistics_weight: float, first: float
) -> Terms:
    """``sum_m w_m (CE_m + statistics_weight * BN_m)`` of pictures ``[B, C, H, W]`` and ``labels`` ``[B]``, the first
    layer's statistics counted ``first`` times."""
    weights = voting_weights(committee.priors, temperature).tolist()
    told, matched = [], []
    for member, weight in zip(committee.members, weights, strict=True):
        with batch_norm(member, "running"), batch_statistics(member) as taps:
            told.append(weight * nn.functional.cross_entropy(member(x), labels))
        matched.append(weight * taps.loss(first))
    cross_entropy, statistics = torch.stack(told).sum(), torch.stack(matched).sum()
    return Terms(cross_entropy + statistics_weight * statistics, cross_entropy, statistics)


def view_of_batch(x: Tensor, scale: float, shift: float, rng: Rng) -> Tensor:
    """``x`` ``[B, C, H, W]`` under one random crop of at least ``scale`` of the area, one flip, and one shift by up to
    ``shift`` of each side, around the edges."""
    boxes, flips = random_boxes(len(x), rng, (scale, 1.0), shared=True), random_flips(1, rng).expand(len(x))
    sides = x.shape[-2:]
    down, over = (rng.shared_integer(0, round(shift * side) + 1) for side in sides)
    return crop(x, boxes, flips).roll((down, over), (-2, -1))


class Pictures(nn.Module):
    """What is recovered: the pictures of index j, one of every class, ``x[j]`` ``[classes, C, H, W]``, with the members
    of the pool that look at them (``committees[j]``) and the samples that they start from (``begun[j]``)."""

    committees: Tensor
    begun: Tensor

    def __init__(self, x: Tensor, committees: Tensor, begun: Tensor, class_names: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.class_names = class_names
        self.x = nn.ParameterList(nn.Parameter(part.clone()) for part in x)
        self.register_buffer("committees", committees)
        self.register_buffer("begun", begun)

    @property
    def all(self) -> Tensor:
        """All pictures ``[per_class * classes, C, H, W]``."""
        return torch.cat([*self.x]).detach()

    @property
    def labels(self) -> Tensor:
        """Their classes."""
        return torch.arange(self.begun.shape[1], device=self.begun.device).repeat(len(self.begun))


@torch.no_grad()
def clamp(x: Tensor) -> None:
    """Put pixels that have left [-1, 1] back to its ends."""
    x.clamp_(-1, 1)


@dataclass(frozen=True)
class Relabelling:
    """How pictures are labelled: ``epochs`` of views in batches of ``batch``, by the votes of the whole pool."""

    epochs: int = 300
    batch: int = 16
    temperature: float = 10.0
    statistics: Statistics = "halves"
    view: RandomView = CUTMIX
    seed: int = 42

    def __call__(self, pictures: Tensor, pool: Pool) -> SoftLabels:
        """The soft labels of uint8 pictures ``[M, C, H, W]``."""
        like = next(pool.parameters())
        batches = math.ceil(self.epochs * len(pictures) / self.batch)

        def vote(views: Tensor) -> Tensor:
            return pool.vote(views.to(like), self.temperature, self.statistics)

        return label_views(pictures, vote, batches, self.batch, self.seed, self.view)


RELABELLING = Relabelling()


@dataclass(frozen=True)
class Recover(Method):
    """Pictures moved by committees of the pool that the stage before handed on; makes them and their soft labels."""

    name: ClassVar[str] = "cv-dd-recover"
    paper: ClassVar[Paper] = PAPER
    task = "classification"
    healthy: ClassVar[dict[str, str]] = {
        "pictures/cross_entropy": "falls to 1 or less: committees know the class in most views",
        "pictures/statistics": "falls slowly at most, far above 0: a few pictures have not the statistics of all",
    }
    unstable: ClassVar[dict[str, Alarm]] = {
        "pictures/statistics": Grows("lower lr: pixels jump between their bounds faster than statistics can follow")
    }

    per_class: int = 10
    committee: int = 2
    priors: Priors = HELD_OUT
    held_out: float = 0.1
    temperature: float = 5.0
    statistics_weight: float = 0.01
    first: float = 10.0
    scale: float = 0.08
    shift: float = 0.125
    lr: float = 0.1
    relabelling: Relabelling = RELABELLING
    initial: Initial = "real"

    def sources(self, start: Start) -> Mapping[str, Samples]:
        return {"data": apart(start.data, self.held_out)[0]}

    def pool(self, start: Start) -> Pool:
        """The pool with its priors."""
        members = start.model("pool").members
        if self.priors.source == "given":
            return Pool(members, self.priors.given)
        if self.priors.source == "distilled":
            return Pool(members, [start.model(f"score-{m}").percent for m in range(len(members))])
        x, labels = labelled(apart(start.data, self.held_out)[1])
        return Pool(members, [percent_right(member, x, labels) for member in members])

    def committees(self, pool: Pool, rng: Rng) -> Tensor:
        """Who looks at which index of pictures, ``[per_class, N]``."""
        return draw_committees(self.per_class, pool.priors, self.committee, rng)

    def networks(self, start: Start) -> Networks:
        pool, data, rng = self.pool(start), apart(start.data, self.held_out)[0], Rng(start.seed, "recover")
        labels, classes = class_labels(data), start.teacher.classes
        if self.initial == "patches":
            like = next(pool.parameters())
            x, begun = medium_patches(
                data, labels, self.per_class, classes, lambda views: pool.vote(views.to(like), self.temperature), rng
            )
        else:
            begun = select(torch.zeros(len(labels)), labels, self.per_class, "random", rng, classes).T
            x = pictures_of(data, begun.flatten()).unflatten(0, begun.shape)
        pictures = Pictures(x, self.committees(pool, rng), data.index[begun], data.class_names)
        optimizer = Optimizer(("pictures",), self.lr, betas=(0.5, 0.9), decay="cosine")
        return Networks({"pictures": pictures, "pool": pool}, {"pictures": optimizer})

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        pictures = nets.pictures
        labels = torch.arange(pictures.begun.shape[1], device=pictures.begun.device)
        rng = Rng(batch.rng.shared_integer(0, 2**62))  # every part of a batch moves the same pictures
        sums = torch.zeros(2, device=labels.device)
        # a loss reaches one index of pictures alone, and the optimizer leaves the others as they are
        for j, x in enumerate(pictures.x):
            committee = nets.pool.chosen(pictures.committees[j].tolist())
            view = view_of_batch(x, self.scale, self.shift, rng)
            terms = committee_loss(committee, view, labels, self.temperature, self.statistics_weight, self.first)
            sums += torch.stack([terms.cross_entropy, terms.statistics]).detach()
            cross_entropy, statistics = (sums / (j + 1)).unbind()
            logs = {"cross_entropy": cross_entropy, "statistics": statistics}
            yield Update("pictures", terms.loss, logs, partial(clamp, x))

    def student(self, nets: Networks) -> Condensed:
        pictures, pool = nets.pictures, nets.pool
        x, labels, members = to_pictures(pictures.all.cpu()), pictures.labels.cpu(), pictures.committees.cpu()
        soft = self.relabelling(x, pool)
        votes = [voting_weights(pool.chosen(row).priors, self.temperature) for row in members.tolist()]
        notes = {
            "committees": members, "weights": torch.stack(votes), "begun": pictures.begun.cpu().flatten(),
            "priors": torch.tensor(pool.priors, dtype=torch.float64), **soft.tensors(),
        }  # fmt: skip
        size = Condensed(x, labels).bytes() + soft.bytes
        views = Views("crop", self.relabelling.view.scale)
        return Condensed(x, labels, pictures.class_names, views=views, notes=notes, stored=size)

    def hands_on(self, nets: Networks) -> Mapping[str, nn.Module]:
        return {}


@dataclass(frozen=True)
class Alone(Recover):
    """Pictures moved by one member of the pool alone, to find out how well it distils; hands them on as "alone-<k>"."""

    name: ClassVar[str] = "cv-dd-alone"

    member: int = 0

    def pool(self, start: Start) -> Pool:
        return Pool([start.model("pool").members[self.member]], [0.0])

    def committees(self, pool: Pool, rng: Rng) -> Tensor:
        return torch.zeros(self.per_class, 1, dtype=torch.int64)

    def hands_on(self, nets: Networks) -> Mapping[str, nn.Module]:
        x, labels = to_pictures(nets.pictures.all.cpu()), nets.pictures.labels.cpu()
        return {f"alone-{self.member}": Condensed(x, labels)}


class Exam(nn.Module):
    """Samples that nobody was trained on, and how many in a hundred are told right."""

    x: Tensor
    labels: Tensor

    def __init__(self, x: Tensor, labels: Tensor) -> None:
        super().__init__()
        self.register_buffer("x", x)
        self.register_buffer("labels", labels)

    def percent(self, net: nn.Module) -> float:
        return percent_right(net, self.x, self.labels)


class Score(nn.Module):
    """A prior in percent, handed on."""

    def __init__(self, percent: float) -> None:
        super().__init__()
        self.percent = percent


@dataclass(frozen=True)
class Judge(SoftSupervised):
    """A fresh classifier trained on what a member of the pool distilled alone, with that member's soft labels; hands on
    how many held-out samples it gets right as "score-<k>"."""

    name: ClassVar[str] = "cv-dd-judge"
    paper: ClassVar[Paper] = PAPER
    roles: ClassVar[tuple[str, ...]] = ()

    decay: str = "stretched-cosine:2"  # as the official evaluation of ten pictures a class
    member: int = 0
    held_out: float = 0.1
    relabelling: Relabelling = RELABELLING

    def sources(self, start: Start) -> Mapping[str, Samples]:
        alone, pool = start.model(f"alone-{self.member}"), start.model("pool")
        soft = self.relabelling(alone.x, Pool([pool.members[self.member]], [0.0]))
        return {"data": Replay(alone.x, alone.labels, soft)}

    def networks(self, start: Start) -> Networks:
        student = start.network()
        student.net = start.fresh(student.net, self.member)
        return Networks(
            {STUDENT: student, "exam": Exam(*labelled(apart(start.data, self.held_out)[1]))},
            {STUDENT: self.optimizer()},
        )

    def hands_on(self, nets: Networks) -> Mapping[str, nn.Module]:
        return {f"score-{self.member}": Score(nets.exam.percent(nets.student))}


@dataclass(frozen=True)
class CVDD(Recipe):
    """Squeeze, recover and relabel; with ``priors="distilled"`` each member distils alone and is judged in between."""

    name: ClassVar[str] = "cv-dd"
    paper: ClassVar[Paper] = PAPER
    system: ClassVar[System] = System(
        "CV-DD", 2025, "condense", "labelled data", "-",
        "pictures on whose classes and statistics committees agree, with soft labels of every view", real="cv_dd_real",
    )  # fmt: skip
    task = "classification"

    per_class: Annotated[Count, "pictures a class"] = 10
    pool: Annotated[tuple[Member, ...], "architectures of the pool, all with batch normalisation"] = (
        "convnet", "resnet", "classifier",
    )  # fmt: skip
    initial: Annotated[Initial, "what pictures start as: random real ones, or crops of such of medium loss"] = "real"
    committee: Annotated[Count, "members of the pool that look at each picture; 1 is SRe2L++"] = 2
    priors: Annotated[Priors, "what a member's vote depends on, in percent"] = HELD_OUT
    temperature: Annotated[Positive, "of the votes on pictures; a great one makes them equal"] = 5.0
    statistics_weight: Annotated[NonNegative, "weight of the statistics beside the cross-entropy"] = 0.01
    first: Annotated[NonNegative, "weight of the first layer's statistics among the others'"] = 10.0
    scale: Annotated[Share, "least share of the area that a crop shows, in all stages but the first"] = 0.08
    shift: Annotated[Share, "greatest shift of a batch around the edges, as a share of the side"] = 0.125
    lr: Annotated[Positive, "learning rate of the pictures, whose pixels lie in [-1, 1]"] = 0.1
    views: Annotated[Views, "how the pool looks at pictures when it is trained"] = CROPS
    pool_lr: Annotated[Positive, "learning rate of the pool"] = 0.1
    held_out: Annotated[Share, "share of the data that measures priors, and that nothing is trained on"] = 0.1
    label_epochs: Annotated[Count, "epochs of views that get soft labels"] = 300
    label_batch: Annotated[Count, "views a batch"] = 16
    label_temperature: Annotated[Positive, "of the votes on labels, by the whole pool"] = 10.0
    label_statistics: Annotated[
        Statistics, "of batch normalisation in relabelling: of halves of a batch, or running"
    ] = "halves"
    mix: Annotated[Mix, "how views are mixed before they are labelled"] = "cutmix"
    label_seed: Annotated[int, "seed of the views that are labelled"] = 42
    squeeze_share: Annotated[NonNegative, "share of the budget of the pool"] = 1.0
    recover_share: Annotated[NonNegative, "share of the budget of the pictures, for each time they are recovered"] = 1.0
    judge_share: Annotated[NonNegative, "share of the budget of judging one member, where priors are distilled"] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.committee > len(self.pool):
            raise ValueError(f"{self.name}: committee={self.committee} of a pool of {len(self.pool)}: at most all")
        if self.priors.source == "given" and len(self.priors.given) != len(self.pool):
            raise ValueError(f"{self.name}: priors={self.priors} must be {len(self.pool)} numbers, one a member")
        if self.label_statistics == "halves" and (self.label_batch % 2 or self.label_batch < 2 * LEAST_HALF):
            raise ValueError(
                f"{self.name}: label_batch={self.label_batch} must be even and at least {2 * LEAST_HALF}: fewer "
                "pictures have no statistics worth using; label_statistics='running' takes any"
            )

    def stages(self) -> list[Stage]:
        held_out = 0.0 if self.priors.source == "given" else self.held_out
        view = RandomView(self.scale, self.mix)
        relabelling = Relabelling(
            self.label_epochs, self.label_batch, self.label_temperature, self.label_statistics, view, self.label_seed
        )
        shared: dict[str, Any] = {
            "per_class": self.per_class, "held_out": held_out, "temperature": self.temperature, "scale": self.scale,
            "statistics_weight": self.statistics_weight, "first": self.first, "shift": self.shift, "lr": self.lr,
            "relabelling": relabelling, "initial": self.initial,
        }  # fmt: skip
        stages = [Stage(Squeeze(self.pool, held_out, self.views, self.pool_lr), self.squeeze_share)]
        if self.priors.source == "distilled":
            for k in range(len(self.pool)):
                judge = Judge(member=k, held_out=held_out, relabelling=relabelling)
                stages += [Stage(Alone(**shared, member=k), self.recover_share), Stage(judge, self.judge_share)]
        recover = Recover(**shared, committee=self.committee, priors=self.priors)
        return [*stages, Stage(recover, self.recover_share)]
