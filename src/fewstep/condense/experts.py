"""Expert trajectories: the weights that networks go through while they learn from real data, epoch by epoch.

SGD with momentum makes strong experts whose paths are jumpy: most of the way is gone in the first epochs.  Two terms
smooth a path while it is made (Shen et al. 2023, arXiv 2310.10541):

* the *clipping loss*: the cross-entropy counts ``0.5, 0.55, .. 0.95`` in the first ten epochs, then 1;
* the *gradient penalty* ``lambda mean( (|| d sum_c z_c(x) / d x || - 1)^2 )`` on real samples, the norm over channels,
  so that every pixel has a slope of 1 as its target.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter as clock
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fewstep.condense.unroll import FlatNet, refuse_batch_norm, vector_of
from fewstep.data.dataset import Dataset, First, Samples, epoch_order, every_label
from fewstep.data.siamese import SIAMESE, Siamese
from fewstep.digests import model_sha256
from fewstep.methods.parts.stores import Store, Tensors, joined
from fewstep.methods.start import Start
from fewstep.models.networks import describe_network, reference_networks
from fewstep.randomness import Rng, derive_seed, repeated_draws, seed_own_draws

#: What the learning rate is multiplied by after the epoch in the middle.
LR_FACTOR = 0.6


@dataclass(frozen=True)
class Paths(Dataset):
    """Experts as data: their last weights ``x`` ``[experts, P]``, and the ``paths`` that led there, one ``[epochs + 1,
    P]`` an expert, its first weights first, which may be maps of files: what is not read takes no memory."""

    paths: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Experts(Store):
    """``experts`` trajectories of ``epochs`` epochs of ``data``, each of the teacher's architecture with weights drawn
    anew: :class:`Paths` of the columns "loss" (cross-entropy) and "accuracy" ``[experts, epochs]``, those on what each
    epoch read.

    ``clipping`` is the number of epochs of the clipping loss, ``penalty`` the gradient penalty's weight; 0 for neither.
    ValueError for batch norm, for data without labels, and for an expert whose loss stops being a number.
    """

    name: ClassVar[str] = "experts"

    start: Start
    experts: int
    epochs: int
    batch: int = 256
    lr: float = 3e-3
    momentum: float = 0.9
    weight_decay: float = 1e-3
    clipping: int = 10
    penalty: float = 2.0
    augment: Siamese = SIAMESE

    def __post_init__(self) -> None:
        refuse_batch_norm(self.start.teacher.net)

    @property
    def batches(self) -> int:
        return self.experts

    def digest(self) -> str:
        numbers = (
            self.experts, self.epochs, self.batch, self.lr, self.momentum, self.weight_decay, self.clipping,
            self.penalty, str(self.augment),
        )  # fmt: skip
        net = self.start.teacher.net
        # anybody's network has no description but its layers, and what tells it from others of the same
        made_of = describe_network(net) if type(net) in reference_networks() else f"{net} {model_sha256(net)}"
        said = f"{self.name} {numbers} {made_of} {vector_of(net).dtype} {self.start.data.sha256()}"
        return hashlib.sha256(said.encode()).hexdigest()

    def make(self, seed: int, wanted: Container[int]) -> Iterator[tuple[int, Tensors]]:
        for i in range(self.experts):
            if i in wanted:
                yield i, self.trajectory(seed, i)

    def dataset(self, tensors: Tensors) -> Paths:
        return self.together([tensors])

    def together(self, parts: Sequence[Tensors]) -> Paths:
        """The paths stay where the parts are, in memory or in files: all of them can be gigabytes."""
        paths = tuple(path for part in parts for path in part["weights"])
        told = joined([{key: part[key] for key in ("loss", "accuracy")} for part in parts])
        return Paths("experts", torch.stack([path[-1] for path in paths]), columns=told, paths=paths)

    def glimpse(self, seed: int) -> tuple[Tensors, float]:
        """One expert whose epochs are of one step, after another of one epoch: first steps are slow."""
        short = dataclasses.replace(
            self, start=dataclasses.replace(self.start, data=First(self.start.data, self.batch))
        )
        dataclasses.replace(short, epochs=1).trajectory(seed, 0)
        begun = clock()
        tensors = short.trajectory(seed, 0)
        steps = -(-len(self.start.data) // self.batch)
        return tensors, (clock() - begun) * self.experts * steps

    def trajectory(self, seed: int, i: int) -> Tensors:
        """Expert ``i`` of a seed, whose dropout, if it has any, is a function of both."""
        device = next(self.start.teacher.net.parameters()).device
        with repeated_draws(device):
            seed_own_draws(derive_seed(seed, "experts", i, "dropout"), device)
            return self.trained(seed, i)

    def trained(self, seed: int, i: int) -> Tensors:
        """What an expert leaves behind while it is trained."""
        teacher = self.start.teacher.net
        net = dataclasses.replace(self.start, seed=seed).fresh(teacher, i).to(next(teacher.parameters())).train()
        order, rng = derive_seed(seed, "experts", i), Rng(seed, "experts", i)
        weights, told = [vector_of(net).cpu()], []
        lr, optimizer = self.lr, self.optimizer(net, self.lr)
        for epoch in range(self.epochs):
            factor = 0.5 + 0.5 * epoch / self.clipping if epoch < self.clipping else 1.0
            told.append(self.epoch(net, optimizer, epoch_order(len(self.start.data), epoch, order), factor, rng))
            weights.append(vector_of(net).cpu())
            if not (told[-1].isfinite().all() and weights[-1].isfinite().all()):
                raise ValueError(f"expert {i}: its loss is no number in epoch {epoch}; lower its learning rate {lr:g}")
            if epoch == self.epochs // 2 + 1:
                lr *= LR_FACTOR
                optimizer = self.optimizer(net, lr)  # a new one: its momentum starts at 0
        loss, accuracy = torch.stack(told).unbind(1)
        return {"weights": torch.stack(weights)[None], "loss": loss[None], "accuracy": accuracy[None]}

    def optimizer(self, net: nn.Module, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            net.parameters(), lr, momentum=self.momentum, weight_decay=self.weight_decay, foreach=True
        )

    def epoch(self, net: nn.Module, optimizer: torch.optim.Optimizer, order: Tensor, factor: float, rng: Rng) -> Tensor:
        """One pass in the ``order`` given, the loss times ``factor``; the mean loss and accuracy ``[2]``."""
        first = next(net.parameters())
        labels = every_label(self.start.data)
        told = torch.zeros(2, dtype=torch.float64, device=first.device)
        for index in order.split(self.batch):
            x, truth = samples(self.start.data, index).to(first), labels[index].to(first.device)
            logits = net(self.augment(x, self.augment.draw(len(x), rng)))
            loss = cross_entropy(logits, truth)
            told += torch.stack([loss.detach(), (logits.argmax(1) == truth).to(loss).mean()]) * len(x) / len(order)
            whole = factor * loss + (self.penalty * gradient_penalty(net, x) if self.penalty else 0.0)
            optimizer.zero_grad(set_to_none=True)
            whole.backward()
            optimizer.step()
        return told.float().cpu()


def gradient_penalty(net: nn.Module, x: Tensor) -> Tensor:
    """``mean( (|| d sum_c z_c / d x || - 1)^2 )`` of logits ``z`` at ``x`` ``[B, C, ...]``, the norm over dimension 1,
    the mean over all others; differentiable in the weights."""
    x = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return (slope.norm(dim=1) - 1).square().mean()


def smoothness(weights: Tensor) -> Tensor:
    """How jumpy trajectories ``[..., epochs + 1, P]`` are: the longest step over the mean step ``[...]``, 1 for equal
    steps."""
    steps = weights.diff(dim=-2).norm(dim=-1)
    return steps.amax(-1) / steps.mean(-1)


@torch.no_grad()
def logits_of(student: FlatNet, weights: Tensor, data: Samples, batch: int = 1024) -> Tensor:
    """What the network of ``weights`` ``[P]`` says of every sample ``[N, K]``."""
    parts = torch.arange(len(data)).split(batch)
    return torch.cat([student(weights, samples(data, index).to(weights)) for index in parts])


def samples(data: Samples, index: Tensor) -> Tensor:
    """Real samples as floats; ValueError where there are none."""
    x = data.rows(index).x
    if x is None:
        raise ValueError(f"data '{data.name}' has conditions only, and experts learn from samples")
    return x
