"""How good voxels are: the share of space that two solids have in common, and the nearest real solid of each sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def overlaps(x: Tensor, others: Tensor) -> Tensor:
    """The intersection over the union of every pair of solids, ``[N, M]``; a cell above 0 is filled.

    ``x`` is ``[N, ...]`` and ``others`` ``[M, ...]``, of the same cells; ValueError when they are not.
    """
    if x.shape[1:] != others.shape[1:]:
        raise ValueError(f"solids of {list(x.shape[1:])} and {list(others.shape[1:])} cells cannot be compared")
    one, other = ((part.flatten(1) > 0).float() for part in (x, others))
    both = one @ other.T
    union = one.sum(1)[:, None] + other.sum(1) - both
    return torch.where(union > 0, both / union.clamp_min(1), 1.0)


@dataclass(frozen=True)
class Nearest:
    """The mean overlap of samples with the real solid that is nearest to each, and the share of samples for which that
    one is of the class that was asked for."""

    overlap: float
    accuracy: float


def nearest(x: Tensor, labels: Tensor, real: Tensor, real_labels: Tensor) -> Nearest:
    """The nearest of ``real`` solids ``[M, ...]`` with ``real_labels`` ``[M]`` to samples ``[N, ...]`` asked for with
    ``labels`` ``[N]``."""
    best, which = overlaps(x, real).max(1)
    return Nearest(float(best.mean()), float((real_labels[which] == labels).float().mean()))
