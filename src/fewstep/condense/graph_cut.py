"""Choosing items that stand for all: submodular functions of a set, greedy selection, and a data set peeled into bins.

With similarities ``k`` the set function of GraphCut is, for the items ``V`` that may be chosen::

    f(S) = sum_{i in V, s in S} k(i, s) - sum_{s, s' in S} k(s, s')
    f(S + e) - f(S) + k(e, e) = gain(e | S) = sum_{i in V} k(i, e) - 2 sum_{s in S} k(s, e)
                                            = sum_{i in V \\ S} k(i, e) - sum_{s in S} k(s, e)

A gain is what an item stands for less what it repeats.  Picking ``s`` lowers that of ``e`` by ``2 k(s, e)``, so that
greedy selection of ``m`` of ``n`` items with ``d`` features costs ``m n d`` operations and needs no ``n x n`` matrix;
where there is memory for one, ``m n``.

Dataset Quantization (Zhou et al. 2023, arXiv 2308.10524) repeats the greedy selection on what is left: bins that begin
with the most typical items and end with the most diverse.
"""

from __future__ import annotations

import heapq
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.condense.select import class_sizes
from fewstep.data.rounds import spread

#: The most numbers of a matrix of similarities that is kept: 512 MB, 8,192 items.
MATRIX = 2**26


class Kernel(ABC):
    """Similarities of ``n`` items with each other, float64."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def between(self, a: Tensor, b: Tensor) -> Tensor:
        """``k`` of every item in ``a`` with every one in ``b``: ``[len(a), len(b)]``."""

    @abstractmethod
    def totals(self) -> Tensor:
        """``sum_i k(i, e)`` for every ``e`` ``[n]``."""

    @abstractmethod
    def of(self, items: Tensor) -> Kernel:
        """The similarities among some of the items."""

    def remembered(self, most: int = MATRIX) -> Kernel:
        """The same, as a matrix where it has ``most`` numbers at most."""
        everyone = torch.arange(len(self))
        return Matrix(self.between(everyone, everyone)) if len(self) ** 2 <= most else self


@dataclass(frozen=True)
class Products(Kernel):
    """``k(a, b) = offset + slope <u_a, u_b> <v_a, v_b>`` of items with two vectors each, ``u`` ``[n, c]`` and ``v``
    ``[n, d]``: the inner product of all products ``u (x) v`` of the two, which are never made."""

    u: Tensor
    v: Tensor
    offset: float = 0.0
    slope: float = 1.0

    def __len__(self) -> int:
        return len(self.u)

    def between(self, a: Tensor, b: Tensor) -> Tensor:
        return self.offset + self.slope * (self.u[a] @ self.u[b].T) * (self.v[a] @ self.v[b].T)

    def totals(self) -> Tensor:
        """The product of each with the sum of all."""
        return len(self) * self.offset + self.slope * ((self.u @ (self.u.T @ self.v)) * self.v).sum(1)

    def of(self, items: Tensor) -> Products:
        return Products(self.u[items], self.v[items], self.offset, self.slope)


@dataclass(frozen=True)
class Matrix(Kernel):
    """Similarities as they stand in a symmetric matrix ``k`` ``[n, n]``."""

    k: Tensor

    def __len__(self) -> int:
        return len(self.k)

    def between(self, a: Tensor, b: Tensor) -> Tensor:
        return self.k[a][:, b]

    def totals(self) -> Tensor:
        return self.k.sum(0)

    def of(self, items: Tensor) -> Matrix:
        return Matrix(self.between(items, items))


def cosine(features: Tensor, beside: Tensor | None = None) -> Kernel:
    """``(1 + cos) / 2`` of features ``[n, ...]``, or of their products with those ``beside`` ``[n, ...]``; in [0, 1].

    A zero vector has no direction: its cosine with everything, itself included, is 0, its similarity 1/2.  ValueError
    for features that are not finite.
    """
    return Products(directions(features), ones(features) if beside is None else directions(beside), 0.5, 0.5)


def inner_product(features: Tensor) -> Kernel:
    """``<a, b>`` of features ``[n, ...]``; ValueError for features that are not finite."""
    return Products(finite(features), ones(features))


def ones(features: Tensor) -> Tensor:
    """A 1 for each item ``[n, 1]``."""
    return torch.ones(len(features), 1, dtype=torch.float64)


def directions(features: Tensor) -> Tensor:
    """Features as vectors of length 1 ``[n, d]``, or 0."""
    v = finite(features)
    if not v.shape[1]:
        raise ValueError(f"features of shape {list(features.shape)} are no vectors [n, d]")
    largest = v.abs().amax(1, keepdim=True)
    v = v / torch.where(largest > 0, largest, 1.0)  # first, so that no square underflows
    return torch.nn.functional.normalize(v, dim=1)


def finite(features: Tensor) -> Tensor:
    """Features as float64 vectors ``[n, d]``; ValueError where one is not finite."""
    v = features.detach().double().flatten(1)
    if not bool(v.isfinite().all()):
        row = int((~v.isfinite().all(1)).nonzero()[0])
        raise ValueError(f"features of item {row} hold NaN or infinity")
    return v


class Gains(ABC):
    """The gains of a set that grows an item at a time, in what is said of ``kernel``'s items."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    @abstractmethod
    def of(self, items: Tensor) -> Tensor:
        """What each of ``items`` ``[m]`` would add to the set now."""

    @abstractmethod
    def add(self, item: int) -> None:
        """Put an item into the set."""


class GraphCut(Gains):
    """``sum_{i in V} k(i, e) - 2 sum_{s in S} k(s, e)``, ``V`` all items of the kernel; submodular where no similarity
    is negative."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        self.now = kernel.totals()
        self.everyone = torch.arange(len(kernel))

    def of(self, items: Tensor) -> Tensor:
        return self.now[items]

    def add(self, item: int) -> None:
        self.now = self.now - 2 * self.kernel.between(torch.tensor([item]), self.everyone)[0]


class FacilityLocation(Gains):
    """``sum_{i in V} max(0, k(i, e) - max_{s in S} k(i, s))``: how much better the nearest chosen item is for everyone.

    The similarities of ``chunk`` items with all others are in memory at a time.
    """

    def __init__(self, kernel: Kernel, chunk: int = 1024) -> None:
        super().__init__(kernel)
        self.chunk = chunk
        self.best = torch.zeros(len(kernel), dtype=torch.float64)
        self.everyone = torch.arange(len(kernel))

    def of(self, items: Tensor) -> Tensor:
        parts = (self.kernel.between(part, self.everyone) - self.best for part in items.split(self.chunk))
        return torch.cat([part.clamp_min(0).sum(1) for part in parts])

    def add(self, item: int) -> None:
        self.best = torch.maximum(self.best, self.kernel.between(torch.tensor([item]), self.everyone)[0])


#: A set function on a kernel's items, by the class of its gains.
SetFunction = Callable[[Kernel], Gains]


def greedy(kernel: Kernel, count: int, function: SetFunction = GraphCut) -> Tensor:
    """``count`` items in the order in which they are picked, each the one of the largest gain, the first of equal ones.

    ValueError for more items than there are.
    """
    check_count(kernel, count)
    gains, left, near = function(kernel), torch.ones(len(kernel), dtype=torch.bool), tie(kernel)
    picked: list[int] = []
    for _ in range(count):
        open_items = left.nonzero()[:, 0]
        found = gains.of(open_items)
        best = int(open_items[(found >= found.max() - near).nonzero()[0, 0]])
        gains.add(best)
        left[best] = False
        picked.append(best)
    return torch.tensor(picked, dtype=torch.int64)


def lazy_greedy(kernel: Kernel, count: int, function: SetFunction = GraphCut) -> Tensor:
    """What :func:`greedy` picks, for a submodular function (Minoux 1978): a gain of before is a bound on that of now,
    so only items whose bound is the largest are looked at again.  Pays where a gain is dear (facility location)."""
    check_count(kernel, count)
    gains, near = function(kernel), tie(kernel)
    bounds = [(-gain, item) for item, gain in enumerate(gains.of(torch.arange(len(kernel))).tolist())]
    heapq.heapify(bounds)
    picked: list[int] = []
    while len(picked) < count:
        seen: list[tuple[float, int]] = []
        best = -math.inf
        while bounds and -bounds[0][0] >= best - near:
            _, item = heapq.heappop(bounds)
            gain = float(gains.of(torch.tensor([item]))[0])
            seen.append((gain, item))
            best = max(best, gain)
        chosen = min(item for gain, item in seen if gain >= best - near)
        for gain, item in seen:
            if item != chosen:
                heapq.heappush(bounds, (-gain, item))
        gains.add(chosen)
        picked.append(chosen)
    return torch.tensor(picked, dtype=torch.int64)


def tie(kernel: Kernel) -> float:
    """Gains that differ by less count as equal.  Of two items that are left, each gains the same by GraphCut; of two
    that are each other's nearest, by facility location: rounding must not choose."""
    return 1e-12 * float(kernel.totals().abs().amax()) if len(kernel) else 0.0


def check_count(kernel: Kernel, count: int) -> None:
    """ValueError unless there are so many items."""
    if not 0 <= count <= len(kernel):
        raise ValueError(f"count={count} must lie in [0, {len(kernel)}], the number of items")


def peel(kernel: Kernel, sizes: Sequence[int], function: SetFunction = GraphCut) -> list[Tensor]:
    """Disjoint sets of these ``sizes``, each chosen greedily from what those before left, which alone counts among the
    items that a set stands for.  One that takes all there is left is in the order of the items."""
    left, found = torch.arange(len(kernel)), []
    for size in sizes:
        # where all are taken there is no choice to make
        chosen = torch.arange(size) if size == len(left) else greedy(kernel.of(left), size, function)
        found.append(left[chosen])
        stays = torch.ones(len(left), dtype=torch.bool)
        stays[chosen] = False
        left = left[stays]
    return found


def bins(kernel: Kernel, count: int, labels: Tensor | None = None, function: SetFunction = GraphCut) -> Tensor:
    """The bin of every item, int64 ``[n]`` from 0, the most typical, to ``count - 1``, the most diverse.

    Bins of a class (of all items without ``labels`` ``[n]``) differ in size by one at most, the larger ones first.
    ValueError for fewer than one bin.
    """
    if count < 1:
        raise ValueError(f"count={count} must be at least 1 bin")
    labels = torch.zeros(len(kernel), dtype=torch.int64) if labels is None else labels
    found = torch.empty(len(kernel), dtype=torch.int64)
    for name in range(len(class_sizes(labels))):
        members = (labels == name).nonzero()[:, 0]
        sizes = spread([1] * count, len(members))
        for number, chosen in enumerate(peel(kernel.of(members).remembered(), sizes, function)):
            found[members[chosen]] = number
    return found
