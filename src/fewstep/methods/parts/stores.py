"""Stores: what a stage trains on and a teacher computes once, before training.

A store is made batch by batch, and any batch can be made without the others: a run that was killed makes those that are
missing, and of several processes each makes its share.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter as clock
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from fewstep.conditions import Cond, leaves, rows, to
from fewstep.data.dataset import Dataset, Samples
from fewstep.denoisers import Denoiser
from fewstep.digests import model_sha256, tensors_sha256
from fewstep.grids import karras
from fewstep.methods.parts.teacher_steps import edm_like, guided, heun_step
from fewstep.randomness import Rng

if TYPE_CHECKING:
    from fewstep.methods.start import Start

Tensors = dict[str, Tensor]
#: What the name of a condition in a store begins with.
COND = "cond/"


class Store(ABC):
    """Tensors by name that a teacher computes; ``name`` is for folders and progress bars."""

    name: ClassVar[str]

    @property
    @abstractmethod
    def batches(self) -> int:
        """How many batches it is made in."""

    @abstractmethod
    def digest(self) -> str:
        """SHA-256 of all that it is made of, but for the seed."""

    @abstractmethod
    def make(self, seed: int, wanted: Container[int]) -> Iterator[tuple[int, Tensors]]:
        """The wanted batches in order, with their numbers, on the CPU: the same bits whichever are wanted."""

    @abstractmethod
    def dataset(self, tensors: Tensors) -> Dataset:
        """All batches, put together, as what training reads."""

    def together(self, parts: Sequence[Tensors]) -> Dataset:
        """All batches in parts, which a run folder gives as maps of its files: put together in memory, unless a store
        says otherwise."""
        return self.dataset(joined(parts))

    def glimpse(self, seed: int) -> tuple[Tensors, float]:
        """What a plan looks at, the first batch unless a store says otherwise, and the seconds that all would take."""
        begun = clock()
        _, tensors = next(self.make(seed, (0,)))
        return tensors, (clock() - begun) * self.batches


def joined(parts: Sequence[Tensors]) -> Tensors:
    """The tensors of several batches or parts, put together."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def made_now(what: Store, seed: int) -> Dataset:
    """A store made in memory, kept nowhere."""
    return what.together([tensors for _, tensors in what.make(seed, range(what.batches))])


@torch.no_grad()
def solve_heun(teacher: Denoiser, noise: Tensor, steps: int, cond: Cond = None) -> Tensor:
    """The teacher's output for standard normal ``noise``: Heun steps on a Karras grid in the EDM frame, the last one to
    clean data by the denoiser itself; ``2 steps - 1`` calls."""
    schedule = edm_like(teacher.schedule)
    view = teacher.on(schedule)
    times = karras(schedule, steps)
    x = schedule.prior(noise)
    for t, s in pairwise(times[:-1]):
        x = heun_step(view, x, t.expand(len(x)), s.expand(len(x)), cond)
    return view(x, times[-2].expand(len(x)), cond)


@dataclass(frozen=True)
class Pairs(Store):
    """``n`` pairs of standard normal noise and the teacher's output in ``steps`` Heun steps, with the conditions
    ``cond`` of ``n`` samples kept beside them."""

    name: ClassVar[str] = "pairs"

    teacher: Denoiser
    n: int
    steps: int
    cond: Cond = None
    batch: int = 256

    @property
    def batches(self) -> int:
        return -(-self.n // self.batch)

    def digest(self) -> str:
        under = tensors_sha256(sorted(leaves(self.cond).items()))
        said = f"{self.name} {self.n} {self.steps} {self.batch} {under} {model_sha256(self.teacher)}"
        return hashlib.sha256(said.encode()).hexdigest()

    def make(self, seed: int, wanted: Container[int]) -> Iterator[tuple[int, Tensors]]:
        rng = Rng(seed, "pairs")
        device = next(self.teacher.parameters(), torch.zeros(())).device
        for i in range(self.batches):
            here = slice(i * self.batch, min((i + 1) * self.batch, self.n))
            noise = rng.normal(here.stop - here.start, *self.teacher.shape)
            if i not in wanted:
                continue
            cond = rows(self.cond, here)
            x = solve_heun(self.teacher, noise.to(device), self.steps, to(cond, device))
            yield i, {"x": x.cpu(), "noise": noise} | {COND + name: leaf for name, leaf in leaves(cond).items()}

    def dataset(self, tensors: Tensors) -> Dataset:
        held = {name.removeprefix(COND): leaf for name, leaf in tensors.items() if name.startswith(COND)}
        cond = held if isinstance(self.cond, Mapping) else held.get("cond")
        return Dataset("pairs", tensors["x"], cond, columns={"noise": tensors["noise"]})


def pairs_of(teacher: Denoiser, start: Start, n: int, steps: int, guidance: float = 1.0) -> Samples:
    """``n`` pairs of a teacher under ``guidance``, with the conditions of the data in turn."""
    cond = start.data.conditions(torch.arange(n) % len(start.data))
    return start.store(Pairs(guided(teacher, guidance), n, steps, cond))


def teacher_pairs(start: Start, n: int, steps: int, guidance: float = 1.0) -> Mapping[str, Samples]:
    """``n`` pairs of the stage's teacher under ``guidance`` as a method's sources, in place of the data."""
    return {"data": pairs_of(start.model("teacher"), start, n, steps, guidance)}
