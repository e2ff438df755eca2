"""The order in which training reads its samples: a function of the position alone, so that a resumed run reads what the
killed one would have read, on however many processes.

Repeated random sampling, RS2 (Okanovic et al. 2023, "Repeated Random Sampling for Minimizing the Time-to-Accuracy of
Learning", arXiv 2305.18424), reads a new random subset of a share ``r`` of the data in every *round*, in any training.
Learning rates follow the budget, not the epoch: a schedule is as short as the run.  A round has ``S = round(r N)``
samples and none of them twice.

* without replacement, a permutation is dealt out round by round, and what is too little for a round at its end is left
  out (the official code fills that round up from the start of the same permutation, so that samples come twice in it):
  with ``S`` dividing ``N`` this is the order of ordinary epochs, bit for bit;
* with replacement, every round draws anew: a sample may be in two rounds that follow each other;
* stratified, every round is a new draw of as many samples of each class as its part of the data.

Batches are cut from the stream of rounds, so that one may belong to two of them.  Nothing here needs torch until it is
used, so that help is instant.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from fewstep.values import Written, read

if TYPE_CHECKING:
    from torch import Tensor

    from fewstep.data.dataset import Samples
    from fewstep.data.rounds import Chosen


class Reading(NamedTuple):
    """What is read: the ``indices`` ``[count]`` of samples, and the epoch or round ``[count]`` in which each is."""

    indices: Tensor
    epochs: Tensor


#: What stands at the positions ``start .. start + count``.
Reader = Callable[[int, int], Reading]


@dataclass(frozen=True)
class Order(Written):
    """Written ``epochs``, or ``random:0.1``, ``replaced:0.1``, ``stratified:0.1`` for a share of the data a round."""

    shown: ClassVar[str] = "epochs|random:R|replaced:R|stratified:R"

    @classmethod
    def parse(cls, text: str) -> Order:
        if text == "epochs":
            return Epochs()
        name, colon, number = text.partition(":")
        if name not in ROUNDS or not colon:
            raise ValueError(f"order '{text}' is not one of epochs, {', '.join(f'{kind}:R' for kind in ROUNDS)}")
        return ROUNDS[name](read(float, number))

    @abstractmethod
    def reader(self, data: Samples, seed: int) -> Reader:
        """What reads the data.  It may keep what it has found out (the classes, the round that is being read), so that
        reading on is cheap; what it reads depends on the position alone."""

    def read(self, data: Samples, start: int, count: int, seed: int) -> Reading:
        """What stands at the positions ``start .. start + count``, read once."""
        return self.reader(data, seed)(start, count)

    @abstractmethod
    def marginals(self, data: Samples) -> Tensor:
        """The probability ``[N]`` that each sample is in one round (or epoch), float64."""


@dataclass(frozen=True)
class Epochs(Order):
    """All samples once an epoch, each epoch in an order of its own."""

    def __str__(self) -> str:
        return "epochs"

    def reader(self, data: Samples, seed: int) -> Reader:
        import torch

        from fewstep.data.dataset import epoch_indices

        n = len(data)
        return lambda start, count: Reading(
            epoch_indices(n, start, count, seed), torch.arange(start, start + count) // n
        )

    def marginals(self, data: Samples) -> Tensor:
        import torch

        return torch.ones(len(data), dtype=torch.float64)


@dataclass(frozen=True)
class InSequence(Order):
    """The samples as they come, again and again: for those whose batches were made together."""

    def __str__(self) -> str:
        return "sequence"

    def reader(self, data: Samples, seed: int) -> Reader:
        import torch

        def read(start: int, count: int) -> Reading:
            places = torch.arange(start, start + count)
            return Reading(places % len(data), places // len(data))

        return read

    def marginals(self, data: Samples) -> Tensor:
        import torch

        return torch.ones(len(data), dtype=torch.float64)


@dataclass(frozen=True)
class Rounds(Order):
    """Subsets of a share ``ratio`` in (0, 1]; ValueError for data of which that is not one sample."""

    name: ClassVar[str]

    ratio: float

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"order '{self}': the share of the data must lie in (0, 1]")

    def __str__(self) -> str:
        return f"{self.name}:{self.ratio:g}"

    def size(self, data: Samples) -> int:
        """The samples of a round."""
        size = round(self.ratio * len(data))
        if size < 1:
            raise ValueError(f"order '{self}': that is no sample of the {len(data)} of '{data.name}'")
        return size

    def reader(self, data: Samples, seed: int) -> Reader:
        import torch

        size = self.size(data)
        chosen = self.rounds(data, size, seed)

        def read(start: int, count: int) -> Reading:
            numbers = range(start // size, (start + count - 1) // size + 1)
            parts = [chosen(k)[max(start - k * size, 0) : start + count - k * size] for k in numbers]
            return Reading(torch.cat(parts), torch.arange(start, start + count) // size)

        return read

    @abstractmethod
    def rounds(self, data: Samples, size: int, seed: int) -> Chosen:
        """The samples of a round, in order, by its number."""

    def marginals(self, data: Samples) -> Tensor:
        import torch

        return torch.full((len(data),), self.size(data) / len(data), dtype=torch.float64)


@dataclass(frozen=True)
class WithoutReplacement(Rounds):
    """A permutation dealt out round by round."""

    name = "random"

    def rounds(self, data: Samples, size: int, seed: int) -> Chosen:
        from fewstep.data.rounds import dealt

        return dealt(len(data), size, seed)


@dataclass(frozen=True)
class WithReplacement(Rounds):
    """A new draw every round."""

    name = "replaced"

    def rounds(self, data: Samples, size: int, seed: int) -> Chosen:
        from fewstep.data.rounds import drawn

        return drawn(len(data), size, seed)


@dataclass(frozen=True)
class Stratified(Rounds):
    """A new draw every round, of every class its part; ValueError for data without labels."""

    name = "stratified"

    def rounds(self, data: Samples, size: int, seed: int) -> Chosen:
        from fewstep.data.rounds import stratified

        return stratified(data, size, seed)

    def marginals(self, data: Samples) -> Tensor:
        import torch

        from fewstep.data.rounds import spread, strata

        found = torch.zeros(len(data), dtype=torch.float64)
        groups = strata(data)
        for group, count in zip(groups, spread([len(g) for g in groups], self.size(data)), strict=True):
            found[group] = count / len(group)
        return found


#: Name -> the kind of rounds.
ROUNDS: dict[str, type[Rounds]] = {cls.name: cls for cls in (WithoutReplacement, WithReplacement, Stratified)}
