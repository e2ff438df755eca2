"""The weight that gives two losses gradients of one size (as in VQGAN, Esser et al. 2021, and CTM)."""

from __future__ import annotations

from collections.abc import Generator

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
    weight = yield from weigh(slopes, at, eps, most)
    return weight


def balance_losses(
    first: Tensor, second: Tensor, at: Tensor, *, share: float = 1.0, eps: float = 1e-4, most: float = 1e4
) -> Generator[Mean, Tensor, tuple[Tensor, Tensor]]:
    """``first + w second`` and ``w``, which is ``share`` times that of :func:`balance`, where both depend on parameters
    through the tensor ``at`` only: the loss has the value of the sum and its gradient at ``at``, so that what lies
    behind ``at`` is differentiated once, not once more for ``w``."""
    slopes = [torch.autograd.grad(loss, at)[0] for loss in (first, second)]
    weight = share * (yield from weigh(slopes, at, eps, most))
    inner = (at * (slopes[0] + weight * slopes[1])).sum()
    return (first + weight * second).detach() + inner - inner.detach(), weight


def weigh(slopes: list[Tensor], at: Tensor, eps: float, most: float) -> Generator[Mean, Tensor, Tensor]:
    """The ratio of the sizes of two slopes over the whole batch."""
    if at.is_leaf:
        means = yield Mean(torch.stack(slopes))
        sizes = torch.linalg.vector_norm(means.flatten(1), dim=1)
    else:
        squares = yield Mean(torch.stack([slope.square().sum() * len(at) for slope in slopes]))
        sizes = squares.sqrt()
    return (sizes[0] / (sizes[1] + eps)).clamp_max(most)
