"""AST (Shen et al. 2023, arXiv 2310.10541): images that lead a network along the paths of experts.

A network that starts where an expert stood after epoch ``s`` and takes ``K`` steps of SGD with momentum on a handful of
synthetic images should arrive where the expert, which saw all real data, stood after epoch ``s + M``::

    L_j = || theta_k - theta*_{s+j} ||^2 / || theta_0 - theta*_{s+j} ||^2,    k = j floor(K / M), and K for j = M
    L   = L_M + sum_{j<M} beta_j L_j

``L`` is differentiated through all inner steps, and moves the images and the learning rate ``eta`` of the inner steps.
With the six components off this is matching training trajectories (MTT, Cazenavette et al. 2022, arXiv 2203.11932),
with momentum.  They are: the clipping loss and the gradient penalty of the experts
(:mod:`~fewstep.condense.experts`); images that start as representative real ones; an inner loss that is divided by
``log_5(floor(S/2) - s + 8)`` for early ``s < floor(S/2)`` and multiplied by ``log_5(s - floor(S/2) + 8)`` for late
ones; the losses ``L_j`` on the way; and noise on the kernels that the inner steps start from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fewstep.condense.experts import Experts, logits_of, samples
from fewstep.condense.representatives import representatives
from fewstep.condense.select import stratified
from fewstep.condense.unroll import FlatNet, Loss, unroll
from fewstep.data.condensed import Condensed
from fewstep.data.dataset import every_label
from fewstep.data.siamese import SIAMESE, Drawn, Siamese
from fewstep.methods.alarm import Grows
from fewstep.methods.method import Batch, Method, Networks, Optimizer, Paper, Progress, System, Update
from fewstep.methods.start import Start
from fewstep.randomness import Rng
from fewstep.ranges import Count, Least, NonNegative, Positive, Share

#: The learning rate of the inner steps is put back to this where an update goes below.
LEAST_RATE = 1e-6
#: The standard deviation of images that start as noise: about that of photos in [-1, 1].
NOISE = 0.5


def distance(theta: Tensor, target: Tensor, start: Tensor) -> Tensor:
    """``|| theta - target ||^2 / || start - target ||^2``: 1 for what has not moved, 0 for what is there."""
    return (theta - target).square().sum() / (start - target).square().sum()


def matching_losses(
    inner: Loss,
    path: Tensor,
    start: Tensor,
    lr: Tensor,
    steps: int,
    momentum: float = 0.9,
    *,
    second_order: int | None = None,
    outer: Sequence[Tensor] | None = None,
) -> Tensor:
    """``L_1 .. L_M`` ``[M]`` of a student that takes ``steps`` on the ``inner`` loss from ``start`` ``[P]``, where the
    expert's weights at the ends of the epochs are ``path`` ``[M + 1, P]``; without steps ``L_M`` = 1 alone.
    ``second_order`` and ``outer`` as in :func:`~fewstep.condense.unroll.unroll`."""
    epochs = len(path) - 1
    due = {j * (steps // epochs): j for j in range(1, epochs)} | {steps: epochs}
    walk = unroll(inner, start, lr, steps, momentum, second_order=second_order, outer=outer)
    thetas = enumerate(chain([start], walk))
    return torch.stack([distance(theta, path[due[k]], start) for k, theta in thetas if k in due])


def balance(epoch: int, max_start_epoch: int) -> float:
    """What the inner loss is multiplied by where a stretch starts at ``epoch`` of ``max_start_epoch``: below 1 in the
    first half, above 1 in the second."""
    late = epoch - max_start_epoch // 2
    return math.log(late + 8, 5) if late >= 0 else 1 / math.log(8 - late, 5)


class Lesson(NamedTuple):
    """What an inner step reads: which images ``[b]``, and the draws of their augmentation."""

    chosen: Tensor
    drawn: Drawn


def lessons(images: int, batch: int, steps: int, augment: Siamese, rng: Rng) -> list[Lesson]:
    """What so many inner steps read: the images in batches, every pass in an order of its own."""
    found: list[Lesson] = []
    waiting: list[Tensor] = []
    while len(found) < steps:
        waiting = waiting or list(rng.shuffled(images).split(batch))
        chosen = waiting.pop()
        found.append(Lesson(chosen, augment.draw(len(chosen), rng)))
    return found


class SyntheticImages(nn.Module):
    """What is learned: images ``x`` ``[M, *shape]`` of fixed ``labels`` ``[M]``; ``start`` is what they were."""

    labels: Tensor
    start: Tensor

    def __init__(self, x: Tensor, labels: Tensor, classes: int, class_names: tuple[str, ...]) -> None:
        super().__init__()
        self.classes, self.class_names = classes, class_names
        self.x = nn.Parameter(x.clone())
        self.register_buffer("labels", labels)
        self.register_buffer("start", x.clone())


class InnerRate(nn.Module):
    """The learning rate of the inner steps, which is learned."""

    def __init__(self, value: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value, dtype=dtype))

    @torch.no_grad()
    def keep_positive(self) -> None:
        self.value.clamp_min_(LEAST_RATE)


class Trajectories(nn.Module):
    """The experts' ``paths``, each ``[epochs + 1, P]``, which stay where they lie: a stretch alone goes where it is
    matched."""

    def __init__(self, paths: Sequence[Tensor]) -> None:
        super().__init__()
        self.paths = tuple(paths)

    def stretch(self, expert: int, first: int, epochs: int) -> Tensor:
        """An expert's weights ``[epochs + 1, P]`` from the end of an epoch on."""
        return self.paths[expert][first : first + epochs + 1]


@dataclass(frozen=True)
class AST(Method):
    """Alignment with smooth expert trajectories; the experts have the architecture of the classifier given."""

    name: ClassVar[str] = "ast"
    paper: ClassVar[Paper] = Paper(
        "Efficient Dataset Distillation through Alignment with Smooth and High-Quality Expert Trajectories",
        "2310.10541", "verified",
        ("the equations are those of the authors' code; the paper's own were not read",
         "for small data: `experts` 10 for 100, `epochs` 12 for 50, `max_start_epoch` 4 for 20, `expert_epochs` 2 for "
         "3, `expert_batch` 64 for 256, `expert_lr` 0.03 for 0.003, `lr_images` 10 for 1000",
         "representative images are the nearest to as many centres as there are images of a class; the code has ten "
         "centres always, and for fewer than ten images selects none",
         "each of them from the samples of its own cluster, so that none comes twice",
         "eta is kept above 0",
         "no ZCA whitening; images start in [-1, 1] and are not held there",
         "what augmentation brings in from outside of a picture is black, not the mean; a hole has the same size "
         "everywhere",
         "several stretches can be matched in one iteration"),
    )  # fmt: skip
    task = "classification"
    system: ClassVar[System] = System(
        "AST", 2023, "condense", "labelled data", "-",
        "dataset distillation along smooth expert trajectories", real="ast_real",
    )  # fmt: skip
    healthy: ClassVar[dict[str, str]] = {
        "images/loss": "starts near the number of losses it adds up, and falls: the student gets nearer to the expert",
        "images/final": "falls below 1, which is a student that has not moved",
        "images/eta": "settles; at its floor of 1e-6 nothing is learned any more: lower --lr-eta",
    }
    unstable: ClassVar[dict[str, Grows]] = {
        "images/final": Grows("the inner steps overshoot: lower --eta, --lr-eta or --lr-images"),
    }

    unused: ClassVar[dict[str, str]] = {"batch": "stretches says how many paths of experts an iteration matches"}

    per_class: Annotated[Count, "synthetic images of each class"] = 1
    clipping: Annotated[int, Least(0), "epochs in which the experts' loss counts less, a half at first; 0: none"] = 10
    penalty: Annotated[NonNegative, "weight of the experts' gradient penalty; 0: none"] = 2.0
    initial: Annotated[
        Literal["representative", "real", "noise"],
        "what the images start as: real ones nearest to the centres of an expert's logits, random real ones, or noise",
    ] = "representative"
    balanced: Annotated[bool, "scale the inner loss by the epoch that a stretch starts at"] = True
    intermediate: Annotated[
        Literal["none", "equal", "rising"], "weights of the losses of the epochs between: 0, 1, or j / M"
    ] = "equal"
    perturbation: Annotated[NonNegative, "noise on the kernels that the inner steps start from; 0: none"] = 1.0

    experts: Annotated[Count, "expert trajectories, made once before training"] = 10
    epochs: Annotated[Count, "epochs of each expert"] = 12
    expert_batch: Annotated[Count, "real samples in each of an expert's steps"] = 64
    expert_lr: Annotated[Positive, "learning rate of the experts"] = 0.03
    expert_momentum: Annotated[Share, "momentum of the experts"] = 0.9
    expert_decay: Annotated[NonNegative, "weight decay of the experts"] = 1e-3

    steps: Annotated[Count, "inner steps K"] = 20
    expert_epochs: Annotated[Count, "the experts' epochs M that the inner steps stand for"] = 2
    max_start_epoch: Annotated[Count, "stretches start after one of the first S epochs, from 0"] = 4
    inner_batch: Annotated[Count | None, "synthetic images in an inner step; none: all"] = None
    momentum: Annotated[Share, "momentum of the inner steps"] = 0.9
    augment: Annotated[Siamese, "differentiable augmentation, of experts and inner steps"] = SIAMESE
    eta: Annotated[Positive, "learning rate of the inner steps, at first"] = 0.01
    second_order: Annotated[int | None, Least(0), "keep the graph of so many last gradients only; none: all"] = None
    checkpointed: Annotated[bool, "compute inner steps again in the backward pass, to save memory"] = False

    stretches: Annotated[Count, "stretches of trajectories matched in an iteration"] = 1
    lr_images: Annotated[Positive, "learning rate of the images"] = 10.0
    lr_eta: Annotated[NonNegative, "learning rate of eta"] = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        last = self.max_start_epoch - 1 + self.expert_epochs
        if last > self.epochs:
            raise ValueError(
                f"epochs={self.epochs} must be at least max_start_epoch - 1 + expert_epochs = {last}, where the last "
                "stretch ends"
            )
        if self.steps < self.expert_epochs:
            raise ValueError(f"steps={self.steps} must be at least expert_epochs={self.expert_epochs}: one an epoch")

    def store(self, start: Start) -> Experts:
        """The experts."""
        return Experts(
            start, self.experts, self.epochs, self.expert_batch, self.expert_lr,
            self.expert_momentum, self.expert_decay, self.clipping, self.penalty, self.augment,
        )  # fmt: skip

    def networks(self, start: Start) -> Networks:
        found: Any = start.store(self.store(start))
        student = FlatNet(start.teacher.net)
        group = Optimizer(
            ("images", "eta"), self.lr_images, "sgd", momentum=0.5, rates={"eta": self.lr_eta / self.lr_images}
        )
        modules = {
            "images": self.images(start, student, found.x), "eta": InnerRate(self.eta, found.x.dtype),
            "student": student, "experts": Trajectories(found.paths),
        }  # fmt: skip
        return Networks(modules, {"images": group})

    def images(self, start: Start, student: FlatNet, last: Tensor) -> SyntheticImages:
        """The images at the start; ``last`` are the weights ``[experts, P]`` at the ends of the experts' paths."""
        rng, labels = Rng(start.seed, "ast"), every_label(start.data)
        if self.initial == "representative":
            weights = last[rng.shared_integer(0, len(last))].to(next(student.net.parameters()))
            chosen = representatives(logits_of(student, weights, start.data), labels, self.per_class, rng)
        else:
            chosen = stratified(labels, self.per_class, rng)
        x = samples(start.data, chosen).to(last)
        if self.initial == "noise":
            x = NOISE * rng.normal_like(x)
        return SyntheticImages(x, labels[chosen], start.teacher.classes, start.data.class_names)

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        rng, x, eta = batch.rng, nets.images.x, nets.eta.value
        seed = rng.shared_integer(0, 2**62)
        mine = range(rng.part, self.stretches, rng.parts)  # the parts of a batch share the stretches out
        with torch.autocast(x.device.type, enabled=False):
            none = 0 * (x.sum() + eta).expand(self.expert_epochs)  # for a part without a stretch
            found = [self.losses(nets, Rng(seed, i, device=x.device)) for i in mine]
            means = torch.stack([none, *found]).sum(0) * rng.parts / self.stretches
            loss = (means * self.weights().to(means)).sum()
        logs = {"final": means[-1].detach(), "eta": eta.detach().clone()}
        yield Update("images", loss, logs, nets.eta.keep_positive)

    def weights(self) -> Tensor:
        """``beta_1 .. beta_{M-1}`` and 1, ``[M]``."""
        rising = torch.arange(1, self.expert_epochs) / self.expert_epochs
        between = {"none": 0 * rising, "equal": torch.ones_like(rising), "rising": rising}
        return torch.cat([between[self.intermediate], torch.ones(1)])

    def losses(self, nets: Networks, rng: Rng) -> Tensor:
        """``L_1 .. L_M`` of a stretch that is drawn."""
        images, student = nets.images, nets.student
        expert, s = rng.shared_integer(0, len(nets.experts.paths)), rng.shared_integer(0, self.max_start_epoch)
        path = nets.experts.stretch(expert, s, self.expert_epochs).to(images.x)
        start = student.perturbed(path[0], self.perturbation, rng) if self.perturbation else path[0]
        count = len(images.x)
        read = lessons(count, self.inner_batch or count, self.steps, self.augment, rng)
        factor = balance(s, self.max_start_epoch) if self.balanced else 1.0

        def inner(theta: Tensor, k: int) -> Tensor:
            chosen, drawn = read[k]
            logits = student(theta, self.augment(images.x[chosen], drawn))
            return factor * cross_entropy(logits, images.labels[chosen])

        return matching_losses(
            inner, path, start, nets.eta.value, self.steps, self.momentum, second_order=self.second_order,
            outer=(images.x,) if self.checkpointed else None,
        )  # fmt: skip

    def student(self, nets: Networks) -> Condensed:
        images = nets.images
        notes = {"eta": nets.eta.value.float(), "start": images.start.float()}
        x = images.x.detach().to(torch.float32, copy=True)
        return Condensed(x, images.labels, images.class_names, classes=images.classes, notes=notes)
