"""Does a model repeat its training data?  Distances to the nearest training sample, beside those of held-out data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 2048  # samples and training data are compared in blocks of this many rows


@dataclass(frozen=True)
class Memorisation:
    """``ratio``: the median distance of samples to their nearest training sample, over that of held-out data; 0 for
    copies, about 1 for fresh data.  ``close``: the share of samples that are nearer to the training data than the
    nearest 5 % of held-out data are; about 0.05 for fresh data."""

    ratio: float
    close: float


def memorisation(samples: Tensor, train: Tensor, held_out: Tensor) -> Memorisation:
    """Of samples ``[n, ...]``, training data and held-out data, in pixels or any features."""
    ours, theirs = nearest_distances(samples, train), nearest_distances(held_out, train)
    usual = float(theirs.median())
    if usual == 0:
        raise ValueError("at least half of the held-out data are copies of training data: memorisation has no scale")
    near = torch.quantile(theirs, 0.05)
    return Memorisation(float(ours.median()) / usual, float((ours < near).double().mean()))


def nearest_distances(x: Tensor, train: Tensor) -> Tensor:
    """The Euclidean distance ``[n]`` of every sample of ``x [n, ...]`` to the nearest of ``train [m, ...]``.

    The nearest one is looked for in float32 through a matrix product, then its distance is taken anew in float64: a
    copy has distance 0 exactly.
    """
    if x.shape[1:] != train.shape[1:]:
        raise ValueError(f"samples of shape {list(x.shape[1:])}, training data of shape {list(train.shape[1:])}")
    x, train = x.flatten(1), train.flatten(1)
    centre = train.double().mean(dim=0)
    best = torch.full((len(x),), torch.inf, device=x.device)
    near = torch.zeros(len(x), dtype=torch.long, device=x.device)
    for first in range(0, len(train), ROWS):
        block = (train[first : first + ROWS].double() - centre).float()
        for start in range(0, len(x), ROWS):
            rows = slice(start, start + ROWS)
            distances = torch.cdist((x[rows].double() - centre).float(), block, compute_mode="use_mm_for_euclid_dist")
            least, index = distances.min(dim=1)
            better = least < best[rows]
            best[rows] = torch.where(better, least, best[rows])
            near[rows] = torch.where(better, index + first, near[rows])
    return torch.cat(
        [(x[rows].double() - train[near[rows]].double()).norm(dim=1) for rows in torch.arange(len(x)).split(ROWS)]
    )
