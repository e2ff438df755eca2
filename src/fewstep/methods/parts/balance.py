"""The weight that gives two losses gradients of one size (as in VQGAN, Esser et al. 2021, and CTM)."""

from __future__ import annotations

from collections.abc import Generator
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.methods.method import Mean


def balance(
    first: Tensor, second: Tensor, at: Tensor, *, eps: float = 1e-4, most: float = 1e4
) -> Generator[Mean, Tensor, Tensor]:
    """``|d first / d at| / (|d second / d at| + eps)`` over the whole batch, at most ``most``, without a graph::

        weight = yield from balance(reconstruction, adversarial, at=output)

    ``first`` and ``second`` are means over this part's samples.  ``at`` is a weight that both depend on, or a tensor
    ``[B, ...]`` of the graph, such as the network's output (a weight that is cut over processes has no gradient here).
    The norm at samples is the root of the mean square over samples of ``B d / d at``, so that neither the size of the
    batch nor its splitting counts.
    """
    slopes = [torch.autograd.grad(loss, at, retain_graph=True)[0] for loss in (first, second)]
    sizes = yield from size(slopes, at)
    return (sizes[0] / (sizes[1] + eps)).clamp_max(most)


class Balanced(NamedTuple):
    """A loss that is to have ``share`` times the gradient of another, by a weight between ``least`` and ``most``."""

    loss: Tensor
    share: float = 1.0
    least: float = 0.0
    most: float = 1e4


def balance_losses(
    first: Tensor, *others: Balanced, at: Tensor, eps: float = 1e-4
) -> Generator[Mean, Tensor, tuple[Tensor, list[Tensor]]]:
    """``first`` plus each of ``others`` by its weight, and the weights, ``share`` times those of :func:`balance`, where
    all depend on parameters through the tensor ``at`` only: the loss has the value of the sum and its gradient at
    ``at``, so that what lies behind ``at`` is differentiated once, not once more for the weights."""
    losses = (first, *(other.loss for other in others))
    slopes = [torch.autograd.grad(loss, at, retain_graph=True)[0] for loss in losses]
    sizes = yield from size(slopes, at)
    total, slope, weights = first.detach(), slopes[0], []
    for other, own, length in zip(others, slopes[1:], sizes[1:], strict=True):
        weight = other.share * (sizes[0] / (length + eps)).clamp(other.least, other.most)
        total, slope = total + weight * other.loss.detach(), slope + weight * own
        weights.append(weight)
    inner = (at * slope).sum()
    return total + inner - inner.detach(), weights


def size(slopes: list[Tensor], at: Tensor) -> Generator[Mean, Tensor, Tensor]:
    """The sizes of slopes over the whole batch."""
    if at.is_leaf:
        means = yield Mean(torch.stack(slopes))
        return torch.linalg.vector_norm(means.flatten(1), dim=1)
    squares = yield Mean(torch.stack([slope.square().sum() * len(at) for slope in slopes]))
    return squares.sqrt()
