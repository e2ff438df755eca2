"""Random subsets of the data, one a round: what repeated random sampling reads (:mod:`fewstep.training.orders`).

Every function gives the samples of round ``k`` in order, and is a function of its arguments alone.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fewstep.data.dataset import Samples, class_labels, epoch_order
from fewstep.randomness import Rng


def dealt(data: Samples, size: int, k: int, seed: int) -> Tensor:
    """Without replacement: a permutation dealt out round by round, then the next one.  What is too little for a round
    at the end of a permutation is left out."""
    cycle, i = divmod(k, len(data) // size)
    return epoch_order(len(data), cycle, seed)[i * size : (i + 1) * size]


def drawn(data: Samples, size: int, k: int, seed: int) -> Tensor:
    """With replacement between rounds: a new draw of ``size`` different samples."""
    return _drawn(len(data), size, k, seed)


@lru_cache(maxsize=2)
def _drawn(n: int, size: int, k: int, seed: int) -> Tensor:
    return Rng(seed, "round", k).shuffled(n)[:size]  # kept while the round is read


def stratified(data: Samples, size: int, k: int, seed: int) -> Tensor:
    """A new draw, of every class as many as its part of the data; ValueError for data without labels."""
    groups = strata(data)
    rng = Rng(seed, "stratified", k)
    counts = spread([len(group) for group in groups], size)
    picked = [group[rng.shuffled(len(group))[:count]] for group, count in zip(groups, counts, strict=True)]
    whole = torch.cat(picked)
    return whole[rng.shuffled(len(whole))]


def strata(data: Samples) -> list[Tensor]:
    """The indices of the samples of each class that occurs; ValueError for data without labels."""
    labels = class_labels(data)
    return [(labels == label).nonzero()[:, 0] for label in labels.unique()]


def spread(sizes: list[int], total: int) -> list[int]:
    """``total`` spread over strata in proportion to their sizes by largest remainders, the earlier one first where they
    are equal.  Nobody gets more than there are of it."""
    whole = sum(sizes)
    exact = [total * size / whole for size in sizes]
    counts = [int(part) for part in exact]
    order = sorted(range(len(sizes)), key=lambda i: (counts[i] - exact[i], i))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts
