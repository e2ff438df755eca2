"""Which samples to keep: budgets a class, the best of every class, uniform choices, and draws with given marginals.

Plain functions on scores ``[N]`` and labels ``[N]``; whatever they return are int64 indices or counts.  Every draw is
made from an :class:`~fewstep.randomness.Rng` and is the same for each of its parts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.data.rounds import spread
from fewstep.randomness import Rng


def class_sizes(labels: Tensor) -> Tensor:
    """How many samples every class has, int64 ``[K]``, from their labels ``[N]``; ValueError for a label below 0."""
    if labels.ndim != 1 or labels.is_floating_point() or not len(labels):
        raise ValueError(f"labels of shape {list(labels.shape)} and type {labels.dtype} must be whole numbers [N]")
    if int(labels.min()) < 0:
        raise ValueError(f"label {int(labels.min())}: every sample must have a class, from 0 on")
    return torch.bincount(labels)


def budgets(labels: Tensor, total: int) -> Tensor:
    """``total`` samples shared out among the classes ``[K]`` in proportion to their sizes, by largest remainders, of
    equal ones the first; no class is asked for more than it has.  ValueError for more samples than there are."""
    if not 0 <= total <= len(labels):
        raise ValueError(f"total={total} must lie in [0, {len(labels)}], the number of samples")
    return torch.tensor(spread(class_sizes(labels).tolist(), total))


def best_per_class(scores: Tensor, labels: Tensor, per_class: int | Tensor) -> Tensor:
    """The ``per_class`` samples (one number, or one a class ``[K]``) of the highest score in every class.

    Class after class, the best first; of equal scores the first.  For the lowest scores give ``-scores``.  ValueError
    for scores that are no numbers, and where a class has not enough samples.
    """
    if scores.shape != labels.shape:
        raise ValueError(f"scores {list(scores.shape)} and labels {list(labels.shape)} must both be [N]")
    if bool(scores.isnan().any()):
        raise ValueError("scores hold NaN: they must be numbers")
    wanted = wanted_of(labels, per_class)
    order = torch.argsort(scores, descending=True, stable=True)
    return first_of_each(order, labels, wanted)


def uniform(n: int, count: int, rng: Rng) -> Tensor:
    """``count`` of ``n`` samples, every set of them as likely as any other, in random order.  ValueError for more than
    there are."""
    if not 0 <= count <= n:
        raise ValueError(f"count={count} must lie in [0, {n}], the number of samples")
    return rng.shuffled(n)[:count]


def stratified(labels: Tensor, per_class: int | Tensor, rng: Rng) -> Tensor:
    """``per_class`` samples (one number, or one a class ``[K]``) of every class, uniformly; class after class.

    Strata of any kind may stand for the classes.  ValueError where a class has not enough samples.
    """
    wanted = wanted_of(labels, per_class)
    return first_of_each(rng.shuffled(len(labels)).to(labels.device), labels, wanted)


def wanted_of(labels: Tensor, per_class: int | Tensor) -> Tensor:
    """How many samples of each class are wanted ``[K]``; ValueError where a class has not so many."""
    sizes = class_sizes(labels)
    wanted = torch.as_tensor(per_class, dtype=torch.int64, device=labels.device).expand_as(sizes)
    for name, (size, count) in enumerate(zip(sizes.tolist(), wanted.tolist(), strict=True)):
        if not 0 <= count <= size:
            raise ValueError(f"per_class={count} of class {name} must lie in [0, {size}], the samples that it has")
    return wanted


def first_of_each(order: Tensor, labels: Tensor, wanted: Tensor) -> Tensor:
    """The first ``wanted`` ``[K]`` samples of each class in ``order`` ``[N]``, class after class."""
    groups = (order[labels[order] == name][:count] for name, count in enumerate(wanted.tolist()))
    return torch.cat(list(groups))


def marginals(weights: Tensor, count: int) -> Tensor:
    """The chance ``[N]`` of every sample to be among ``count``, float64: as near to proportional to ``weights`` ``[N]``
    as chances can be, ``q_i = min(1, c w_i)`` with the ``c`` for which they sum to ``count``.

    ValueError for weights that are negative or not finite, and for more samples than have a weight.
    """
    w = weights.double()
    if w.ndim != 1 or not bool((w >= 0).all()) or not bool(w.isfinite().all()):
        raise ValueError("weights must be a list of finite numbers, none negative")
    if not 0 <= count <= int((w > 0).sum()):
        raise ValueError(f"count={count} must lie in [0, {int((w > 0).sum())}], the samples whose weight is above 0")
    heavy, order = torch.sort(w, descending=True, stable=True)
    rest = heavy.flip(0).cumsum(0).flip(0)  # the weight of sample k and all lighter ones
    # with the k heaviest at 1, the others have c = (count - k) / rest_k; the first k that keeps them at most 1 is right
    taken = torch.arange(count, dtype=torch.float64)
    fits = (count - taken) * heavy[:count] <= rest[:count] * (1 + 1e-12)
    certain = int(fits.int().argmax()) if bool(fits.any()) else count
    q = torch.zeros_like(w)
    q[order[:certain]] = 1.0
    if certain < count:
        q[order[certain:]] = ((count - certain) * heavy[certain:] / rest[certain]).clamp_max(1.0)
    return q


def pivotal(chances: Tensor, rng: Rng) -> Tensor:
    """A random set, ascending, in which sample ``i`` is with probability ``chances[i]``, and always so many as the
    chances ``[N]`` sum to: pivotal sampling (Deville & Tillé 1998), also known as dependent rounding.

    Two samples at a time settle which of them takes the other's chance, until it is 0 or 1.  They do so in their order,
    so that of the first ``k`` samples, for every ``k``, as many are taken as their chances sum to, rounded up or down:
    neighbours rarely come together.  ValueError for chances outside of [0, 1] and for a sum that is no whole number.
    """
    q = chances.double().cpu()
    if q.ndim != 1 or not bool(((q >= 0) & (q <= 1)).all()):
        raise ValueError("chances must be a list of numbers in [0, 1]")
    total = float(q.sum())
    if abs(total - round(total)) > 1e-6:
        raise ValueError(f"the chances sum to {total:g}: they must sum to a whole number of samples")
    taken = q == 1
    undecided = ((q > 0) & (q < 1)).nonzero()[:, 0].tolist()
    u = torch.rand(len(undecided), generator=rng.generator, dtype=torch.float64, device=rng.generator.device).tolist()
    if undecided:
        holder, held = undecided[0], float(q[undecided[0]])
        for other, draw in zip(undecided[1:], u[1:], strict=True):
            chance = float(q[other])
            both = held + chance
            if both < 1:  # one of them is out, the other goes on with the chances of both
                holder = other if draw * both < chance else holder
                held = both
            elif draw * (2 - both) < 1 - chance:  # one of them is in, the other goes on with what is over
                taken[holder] = True
                holder, held = other, both - 1
            else:
                taken[other] = True
                held = both - 1
        taken[holder] = held > 0.5  # a whole number but for rounding
    return taken.nonzero()[:, 0]


def random_counts(sizes: Tensor, total: int, rng: Rng) -> Tensor:
    """``total`` shared out in whole numbers ``[K]`` among groups of ``sizes`` ``[K]``, with the same chance for every
    member: a group gets its share rounded down, or up with the probability of what was cut off.

    ValueError for more than the groups have.
    """
    n = int(sizes.sum())
    if not 0 <= total <= n:
        raise ValueError(f"total={total} must lie in [0, {n}], the members of all groups")
    share = total * sizes.double() / max(n, 1)
    counts = whole_part(share)
    counts[pivotal((share - counts).clamp(0, 1), rng)] += 1
    return counts


def whole_part(share: Tensor) -> Tensor:
    """The whole part of float64 shares, int64; one that rounding has put just under a whole number is that number."""
    near = share.round()
    return torch.where((share - near).abs() <= 1e-9 * near.abs().clamp_min(1), near, share.floor()).long()


#: What PCA's rules call the examples that they keep.
KEEP = ("easy", "hard", "random")


def members(labels: Tensor, classes: int, least: int = 0) -> list[Tensor]:
    """The indices of every class's examples, in the order of the data; ValueError where one has fewer than ``least``.
    Examples without a label (-1) are no one's."""
    found = [(labels == c).nonzero()[:, 0] for c in range(classes)]
    for c, index in enumerate(found):
        if len(index) < least:
            raise ValueError(f"{least} examples of each class are asked for, and class {c} has {len(index)}")
    return found


def select(scores: Tensor, labels: Tensor, per_class: int, keep: str, rng: Rng, classes: int) -> Tensor:
    """``per_class`` examples of each of the classes ``0 .. classes - 1`` ``[classes, per_class]`` among *all* of the
    class: the "easy" ones of the lowest scores ``[N]``, the "hard" ones of the highest, the first ones first, or
    "random" ones.

    Examples without a label (-1) are not chosen.  ValueError for an unknown rule, for scores that are NaN, and for a
    class with too few examples.
    """
    if keep not in KEEP:
        raise ValueError(f"keep='{keep}' is not one of {', '.join(KEEP)}")
    if bool(scores.isnan().any()):
        raise ValueError(f"the score of example {int(scores.isnan().nonzero()[0])} is no number: nothing can be ranked")
    groups = members(labels, classes, per_class)
    if keep == "random":
        return torch.stack([index[rng.shuffled(len(index))[:per_class]] for index in groups])
    order = torch.argsort(scores, descending=keep == "hard", stable=True)
    return first_of_each(order, labels, torch.full((classes,), per_class)).reshape(classes, per_class)
