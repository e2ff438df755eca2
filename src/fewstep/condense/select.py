"""Which examples of each class to keep: the easiest, the hardest, or any."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.randomness import Rng

#: Rules by name: the order of preference ``[n]`` among the members of one class, from their scores ``[n]``.  Equal
#: scores keep the order of the data.
KEEP: dict[str, Callable[[Tensor, Rng], Tensor]] = {
    "easy": lambda scores, rng: scores.argsort(stable=True),
    "hard": lambda scores, rng: scores.argsort(descending=True, stable=True),
    "random": lambda scores, rng: rng.shuffled(len(scores)),
}


def members(labels: Tensor, classes: int, least: int = 0) -> list[Tensor]:
    """The indices of every class's examples, in the order of the data; ValueError where one has fewer than ``least``.
    Examples without a label (-1) are no one's."""
    found = [(labels == c).nonzero()[:, 0] for c in range(classes)]
    for c, index in enumerate(found):
        if len(index) < least:
            raise ValueError(f"{least} examples of each class are asked for, and class {c} has {len(index)}")
    return found


def select(scores: Tensor, labels: Tensor, per_class: int, keep: str, rng: Rng, classes: int) -> Tensor:
    """``per_class`` examples of each of the classes ``0 .. classes - 1`` ``[classes, per_class]``: those which the rule
    ``keep`` of :data:`KEEP` prefers among *all* of the class, the preferred one first.

    ``scores`` ``[N]`` are larger for harder examples.  Random choices draw a permutation of one class after the other.
    ValueError for an unknown rule, for scores that are NaN, and for a class with too few examples.
    """
    if keep not in KEEP:
        raise ValueError(f"keep='{keep}' is not one of {', '.join(KEEP)}")
    if bool(scores.isnan().any()):
        raise ValueError(f"the score of example {int(scores.isnan().nonzero()[0])} is no number: nothing can be ranked")
    chosen = [index[KEEP[keep](scores[index], rng)[:per_class]] for index in members(labels, classes, per_class)]
    return torch.stack(chosen)
