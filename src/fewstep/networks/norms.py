"""Which statistics the batch normalisation layers of a network use, said by name.

``net.train()`` would switch dropout too, and let the running statistics drift with every pass; this switches the
layers' statistics and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Statistics = Literal["running", "batch", "halves"]


def batch_norms(net: nn.Module) -> list[_BatchNorm]:
    """The batch normalisation layers of a network, in their order."""
    return [module for module in net.modules() if isinstance(module, _BatchNorm)]


@contextmanager
def batch_norm(net: nn.Module, statistics: Statistics) -> Iterator[None]:
    """A block in which the batch normalisation layers of ``net`` use the "running" statistics, those of the "batch", or
    those of the two "halves" of the batch, each for itself.  Running statistics are not updated in it.

    ValueError in a call for a batch of odd length that is to be halved.
    """
    layers = batch_norms(net)
    before = [layer.forward for layer in layers]
    try:
        for layer in layers:
            layer.forward = _forward(layer, statistics)  # type: ignore[method-assign, assignment]
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            if "forward" in vars(layer):
                del layer.forward
            if layer.forward != own:  # somebody had put one in place before us
                layer.forward = own  # type: ignore[method-assign]


def _forward(layer: _BatchNorm, statistics: Statistics) -> Callable[[Tensor], Tensor]:
    """The forward pass of a layer with these statistics."""

    def normalised(x: Tensor, own: bool) -> Tensor:
        mean, var = (None, None) if own else (layer.running_mean, layer.running_var)
        return torch.nn.functional.batch_norm(x, mean, var, layer.weight, layer.bias, own, 0.0, layer.eps)

    def forward(x: Tensor) -> Tensor:
        if statistics == "running":
            return normalised(x, layer.running_mean is None)
        if statistics == "batch":
            return normalised(x, True)
        if len(x) % 2:
            raise ValueError(f"a batch of {len(x)} has no two halves")
        return torch.cat([normalised(half, True) for half in x.chunk(2)])

    return forward
