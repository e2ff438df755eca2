"""The statistics of what batch normalisation layers read, beside those that they ran up in training.

A network keeps the mean and the variance of what came into each such layer: a trace of its data.  Pictures whose own
statistics agree with it look to the network like data (Yin et al. 2020, DeepInversion)::

    sum_l c_l ( || mu_l(x) - mu_l^run ||_2 + || var_l(x) - var_l^run ||_2 ),      c_1 = first, c_l = 1

with norms, not their squares, and the biased variance.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fewstep.networks.norms import batch_norms


@dataclass
class LayerStatistics:
    """Mean and biased variance ``[C]`` of the inputs of one layer, over ``count`` numbers each, and
    the running ones with how far they move at a step."""

    mean: Tensor
    var: Tensor
    count: int
    running_mean: Tensor
    running_var: Tensor
    momentum: float

    def distance(self) -> Tensor:
        """The norms of both differences, added."""
        norm = torch.linalg.vector_norm
        return norm(self.mean - self.running_mean) + norm(self.var - self.running_var)

    @torch.no_grad()
    def follow(self) -> None:
        """Move the running statistics as a call in training mode does, whose variance is the unbiased one."""
        unbiased = self.var * (self.count / max(self.count - 1, 1))
        self.running_mean.lerp_(self.mean, self.momentum)
        self.running_var.lerp_(unbiased, self.momentum)


@dataclass
class Taps:
    """What the layers of a network read in its last call, in the order in which they are registered."""

    layers: list[_BatchNorm]
    seen: dict[int, LayerStatistics] = field(default_factory=dict)

    def loss(self, first: float = 1.0) -> Tensor:
        """The distance of all layers, that of the first ``first`` times; ValueError for a layer that was not called."""
        if missing := [i for i in range(len(self.layers)) if i not in self.seen]:
            raise ValueError(f"batch normalisation layer {missing[0]} of the network was not called")
        distances = torch.stack([self.seen[i].distance() for i in range(len(self.layers))])
        return first * distances[0] + distances[1:].sum()

    def follow(self) -> None:
        """Move the running statistics of every layer towards those that were seen."""
        for seen in self.seen.values():
            seen.follow()


def running(layer: _BatchNorm) -> tuple[Tensor, Tensor, float]:
    """The running mean and variance ``[C]`` of a layer, and the share by which a batch moves them; ValueError for one
    that keeps none."""
    if layer.running_mean is None or layer.running_var is None or layer.momentum is None:
        raise ValueError("a batch normalisation layer without running averages has nothing to be matched with")
    return layer.running_mean, layer.running_var, layer.momentum


@contextmanager
def batch_statistics(net: nn.Module) -> Iterator[Taps]:
    """A block in which the statistics of the inputs of every batch normalisation layer are kept, differentiable.

    ValueError for a network that has no such layer, and in a call of one without running averages.
    """
    layers = batch_norms(net)
    if not layers:
        raise ValueError(f"a {type(net).__name__} has no batch normalisation, whose statistics could be matched")
    taps = Taps(layers)
    with ExitStack() as stack:
        for i, layer in enumerate(layers):

            def keep(layer: nn.Module, given: tuple[Tensor, ...], i: int = i) -> None:
                x = given[0] if given[0].dtype.itemsize > 2 else given[0].float()  # sums of many
                var, mean = torch.var_mean(x, [d for d in range(x.ndim) if d != 1], correction=0)
                taps.seen[i] = LayerStatistics(mean, var, x.numel() // x.shape[1], *running(layers[i]))

            stack.callback(layer.register_forward_pre_hook(keep).remove)
        yield taps
