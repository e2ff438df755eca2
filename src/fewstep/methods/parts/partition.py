"""The conditions cut into parts: who owns what, and the data of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewstep.conditions import leaves
from fewstep.data.dataset import Chosen, Samples
from fewstep.methods.start import Start
from fewstep.randomness import Rng
from fewstep.ranges import Count
from fewstep.routing import ByClass, ByEmbedding, Router
from fewstep.values import check_fields

By = Literal["classes", "random", "embedding"]
#: So many conditions are looked at to find the centers, and so many times; rows are routed in blocks.
SEEN, ROUNDS, BLOCK = 4096, 20, 4096


@dataclass(frozen=True)
class Partition:
    """``parts`` of the conditions, the same whenever it is asked.

    By "classes" they are blocks of consecutive labels, by "random" labels in the order of ``seed``; sizes differ by one
    at most.  By "embedding" they are what lies nearest to one of the centers that k-means finds in the conditions.
    """

    parts: Count
    by: By = "classes"
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)

    def router(self, start: Start) -> Router:
        """Who a sample belongs to; ValueError for conditions that cannot be cut this way."""
        rng = Rng(self.seed, "parts")
        if self.by == "embedding":
            every = torch.linspace(0, len(start.data) - 1, min(SEEN, len(start.data))).long()
            found = {k: v for k, v in leaves(start.data.conditions(every)).items() if v.is_floating_point()}
            if not found:
                raise ValueError("parts by embedding: the conditions of these data hold no embedding")
            name, leaf = next(iter(found.items()))
            points = leaf.double().mean(tuple(range(1, leaf.ndim - 1))) if leaf.ndim > 2 else leaf.double()
            return ByEmbedding(k_means(points.cpu(), self.parts, rng), name)
        classes = start.teacher.classes
        if not classes:
            raise ValueError(f"parts={self.parts} by {self.by}: the teacher knows no classes, cut by embedding or not")
        return ByClass.even(classes, self.parts, rng.shuffled(classes) if self.by == "random" else None)

    def data(self, start: Start, part: int) -> Samples:
        """The samples that belong to a part; ValueError where there are none."""
        router, data = self.router(start), start.data
        owner = []
        for rows in torch.arange(len(data)).split(BLOCK):
            blank = torch.zeros(len(rows))  # conditions alone decide
            owner.append(router.route(blank, blank, data.conditions(rows)))
        mine = (torch.cat(owner) == part).nonzero()[:, 0]
        if not len(mine):
            raise ValueError(f"data '{data.name}': none belong to part {part} of {self.parts}")
        return Chosen(data, mine, f"{data.name}, part {part} of {self.parts}")


def k_means(points: Tensor, parts: int, rng: Rng) -> Tensor:
    """Centers ``[parts, D]`` of points ``[N, D]``, from starts that are far apart (k-means++).  ValueError where fewer
    points than parts differ."""
    different = len(points.unique(dim=0))
    if different < parts:
        raise ValueError(f"parts={parts}: there are {different} different conditions")
    centers = points[rng.integers(1, 0, len(points))]
    while len(centers) < parts:
        far = torch.cdist(points, centers).amin(1).square()
        centers = torch.cat([centers, points[rng.choice(1, far)]])
    for _ in range(ROUNDS):
        owner = torch.cdist(points, centers).argmin(1)
        own = torch.nn.functional.one_hot(owner, parts).to(points)
        sizes = own.sum(0)[:, None]
        centers = torch.where(sizes > 0, own.T @ points / sizes.clamp_min(1), centers)
    return centers
