"""Committees: several classifiers that vote with weights, by how much each has earned its vote.

The *prior* of a member is how well it does alone, in percent; a committee of the members ``m`` weighs them by::

    w = softmax(prior / tau)

A great ``tau`` makes all equal, a small one leaves the best alone, and a constant added to all priors changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

import torch
from torch import Tensor, nn

from fewstep.networks.norms import Statistics, batch_norm
from fewstep.randomness import Rng
from fewstep.values import Written, read


def voting_weights(priors: Sequence[float], temperature: float) -> Tensor:
    """``softmax(priors / temperature)`` ``[N]``, float64; ValueError for a temperature that is not positive."""
    if not temperature > 0:
        raise ValueError(f"temperature={temperature:g} must be positive: a small one leaves the best vote alone")
    return (torch.tensor(priors, dtype=torch.float64) / temperature).softmax(-1)


def draw_committees(count: int, priors: Sequence[float], size: int, rng: Rng) -> Tensor:
    """The members ``[count, size]`` of ``count`` committees, ascending: the best ones for a single committee, every
    combination once where there are as many as committees, and random combinations otherwise.

    ValueError for committees of more members than there are.
    """
    ranked = torch.tensor(priors, dtype=torch.float64)
    if not 1 <= size <= len(ranked):
        raise ValueError(f"committee={size} must lie in 1 .. {len(ranked)}, the members of the pool")
    if count == 1:
        best = ranked.sort(descending=True, stable=True).indices[:size]
        return best.sort().values[None]
    every = torch.tensor(list(combinations(range(len(ranked)), size)))
    return every if len(every) == count else every[rng.integers(count, 0, len(every))]


class Pool(nn.Module):
    """Classifiers of the same classes, and the prior of each in percent.  ValueError unless every member has one."""

    def __init__(self, members: Sequence[nn.Module], priors: Sequence[float]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.priors = tuple(priors)
        if len(self.members) != len(self.priors):
            raise ValueError(f"priors={self.priors}: the {len(self.members)} members of the pool need one each")

    def chosen(self, members: Sequence[int]) -> Pool:
        """Some of the members as a pool."""
        return Pool([self.members[m] for m in members], [self.priors[m] for m in members])

    def vote(self, x: Tensor, temperature: float, statistics: Statistics = "running") -> Tensor:
        """``sum_m w_m z_m(x)`` ``[B, K]``, each member's batch normalisation with the ``statistics`` of that name; what
        else training switches, such as dropout, stays off."""
        votes = []
        for member, weight in zip(self.members, voting_weights(self.priors, temperature).tolist(), strict=True):
            with batch_norm(member, statistics):
                votes.append(weight * member(x))
        return torch.stack(votes).sum(0)


@torch.no_grad()
def percent_right(net: nn.Module, x: Tensor, labels: Tensor, batch: int = 256) -> float:
    """How many in a hundred samples ``[N, ...]``, wherever they are, a classifier gives their label."""
    like, right = next(net.parameters(), x), 0
    for part, truth in zip(x.split(batch), labels.split(batch), strict=True):
        right += int((net(part.to(like)).argmax(1) == truth.to(like.device)).sum())
    return 100 * right / len(x)


@dataclass(frozen=True)
class Priors(Written):
    """Where priors come from: "held-out", each member's accuracy on pictures that it was not trained on; "distilled",
    the accuracy of a network trained on what is distilled from each member alone (the paper's, at the price of one
    distillation and one training a member); or numbers in percent, one a member."""

    shown: ClassVar[str] = "held-out|distilled|A,B,..."

    source: str
    given: tuple[float, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Priors:
        if text in ("held-out", "distilled"):
            return cls(text)
        try:
            return cls("given", read(tuple[float, ...], text))
        except ValueError:
            raise ValueError(f"priors '{text}' is not one of held-out, distilled and numbers such as 64,51.6") from None

    def __str__(self) -> str:
        return ",".join(f"{value:g}" for value in self.given) or self.source


HELD_OUT = Priors("held-out")
