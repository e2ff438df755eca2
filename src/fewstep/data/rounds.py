"""Random subsets of the data, one a round: what repeated random sampling reads (:mod:`fewstep.training.orders`).

Every function here gives one from the number ``k`` of a round to its samples, in order.  Which these are is a function
of ``k`` and of what was given before alone; a round that was drawn is kept until the next one is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from fewstep.data.dataset import Samples, class_labels, epoch_order
from fewstep.randomness import Rng

#: The samples of a round ``[S]``, int64, by its number.
Chosen = Callable[[int], Tensor]


def dealt(n: int, size: int, seed: int) -> Chosen:
    """Without replacement: a permutation of ``n`` dealt out round by round, then the next one.  What is too little for
    a round at the end of a permutation is left out."""

    def chosen(k: int) -> Tensor:
        cycle, i = divmod(k, n // size)
        return epoch_order(n, cycle, seed)[i * size : (i + 1) * size]

    return chosen


def drawn(n: int, size: int, seed: int) -> Chosen:
    """With replacement between rounds: each a new draw of ``size`` different samples of ``n``."""

    @lru_cache(maxsize=1)
    def chosen(k: int) -> Tensor:
        return Rng(seed, "round", k).shuffled(n)[:size]

    return chosen


def stratified(data: Samples, size: int, seed: int) -> Chosen:
    """Each a new draw, of every class as many as its part of the data; ValueError for data without labels."""
    groups = strata(data)
    counts = spread([len(group) for group in groups], size)

    @lru_cache(maxsize=1)
    def chosen(k: int) -> Tensor:
        rng = Rng(seed, "stratified", k)
        picked = [group[rng.shuffled(len(group))[:count]] for group, count in zip(groups, counts, strict=True)]
        whole = torch.cat(picked)
        return whole[rng.shuffled(len(whole))]

    return chosen


def strata(data: Samples) -> list[Tensor]:
    """The indices of the samples of each class that occurs, in the order of the data; those without a label (-1) are a
    class of their own.  ValueError for data without labels."""
    labels = class_labels(data)
    return list(labels.argsort(stable=True).split(labels.unique(return_counts=True)[1].tolist()))


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
