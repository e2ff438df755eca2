"""Data that do not fit in memory: items read when their turn comes, by processes that work ahead.

The order is the feed's, and what is random in an item (a crop, a flip) is seeded by the run, the item and the epoch, so
that neither the number of reading processes nor a run that was killed and resumed changes a bit.
"""

from __future__ import annotations

import hashlib
import random
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fewstep.conditions import Cond, leaves, rows
from fewstep.data.dataset import Draw, Rows, Samples, as_floats, check_conditions, digest_of, number_of_classes
from fewstep.data.items import Item, Items, as_item, check_like, label_of, stack
from fewstep.randomness import derive_seed

#: Batches that each process has ready before they are asked for.
AHEAD = 2
#: Of data that say nothing of themselves, so many items are looked at to tell two sets apart.
WITNESSES = 64


class Place(NamedTuple):
    """A :class:`~fewstep.data.dataset.Draw` in plain numbers, as it is sent to a process."""

    indices: list[int]
    epochs: list[int]
    seed: int


class Streamed(Samples):
    """Samples of a map-style data set (``torch.utils.data.Dataset``, or anything with a length and items), read as
    training goes by ``workers`` processes, or by the training process itself (0).

    Items are what :mod:`fewstep.data.items` says; uint8 pictures are read as floats in [-1, 1].  ``classes`` is needed
    where they have class labels, unless ``class_names`` name them.  ``cond`` are the conditions of all samples where
    they are known beforehand.  Draws that the items make from the generators of
    PyTorch, NumPy and Python are seeded for each.  ``identity`` is what tells the set from others, where something
    better is known than its first samples.

    ValueError for data without items or a length, for labels of unknown number, and, when it is read, for an item that
    fails, is not like the first or not finite.
    """

    def __init__(
        self,
        items: Items,
        name: str = "data",
        *,
        classes: int | None = None,
        class_names: tuple[str, ...] = (),
        cond: Cond = None,
        workers: int = 0,
        identity: str | None = None,
    ) -> None:
        if workers < 0:
            raise ValueError(f"data '{name}': workers={workers} must be 0 or more")
        try:
            self.count = len(items)
        except TypeError:
            raise ValueError(
                f"data '{name}': a {type(items).__name__} has no length; items are read by number, in the run's order"
            ) from None
        if not self.count:
            raise ValueError(f"data '{name}': it has no items")
        check_conditions(name, self.count, cond, class_names)
        self.items, self.name, self.class_names, self.workers = items, name, class_names, workers
        self.cond = cond
        self.identity = identity
        self.named_classes = len(class_names) or classes
        self.first: Item | None = None
        self.first = self.items_of(Place([0], [0], 0))[0]
        #: Whether the items have class labels.
        self.labelled = label_of(self.first) is not None

    def __len__(self) -> int:
        return self.count

    @property
    def shape(self) -> tuple[int, ...]:
        assert self.first is not None
        return tuple(self.first.x.shape)

    @property
    def classes(self) -> int | None:
        if self.cond is not None:
            return number_of_classes(self.cond, self.class_names)
        if self.labelled and self.named_classes is None:
            raise ValueError(
                f"data '{self.name}': its items have class labels; say how many classes there are, as in classes=10"
            )
        return self.named_classes if self.labelled else None

    def rows(self, indices: Tensor | slice) -> Rows:
        chosen = torch.arange(self.count)[indices].tolist()
        return finished(self.read(Place(chosen, [0] * len(chosen), 0)))

    def conditions(self, indices: Tensor | slice) -> Cond:
        return super().conditions(indices) if self.cond is None else rows(self.cond, indices)

    def feed(self, draws: Iterable[Draw]) -> Iterator[Rows]:
        places = (Place(draw.indices.tolist(), draw.epochs.tolist(), draw.seed) for draw in draws)
        read = self.read_ahead(places) if self.workers else map(self.read, places)
        return map(finished, read)

    def read(self, place: Place) -> Rows:
        """The items of a batch, as they are stored."""
        read = stack(self.items_of(place))
        return read if self.cond is None else read._replace(cond=rows(self.cond, torch.tensor(place.indices)))

    def items_of(self, place: Place) -> list[Item]:
        """The items of a batch one by one; ValueError naming the one that cannot be read."""
        found: list[Item] = []
        with own_draws() as seed:
            for index, epoch in zip(place.indices, place.epochs, strict=True):
                seed(derive_seed(place.seed, "item", index, epoch))
                try:
                    item = as_item(self.items[index])
                    check_like(self.first or item, item, self.named_classes)
                except Exception as error:
                    said = " ".join(str(error).split()) or type(error).__name__
                    kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
                    raise ValueError(f"data '{self.name}', item {index}: {kind}{said}") from error
                found.append(item)
        return found

    def read_ahead(self, places: Iterator[Place]) -> Iterator[Rows]:
        """The same, by processes that work ahead; they end with the iterator."""
        loader: Any = DataLoader(
            _Batches(self),  # type: ignore[arg-type]
            batch_size=None,
            sampler=places,
            num_workers=self.workers,
            prefetch_factor=AHEAD,
            collate_fn=unchanged,
            worker_init_fn=leave_signals_to_training,
            generator=torch.Generator(),  # else a seed is drawn from the one that dropout uses
        )
        reading = iter(loader)
        try:
            for found in reading:
                message, parts = found
                if message is not None:
                    raise ValueError(message)
                yield Rows(*parts)
        except RuntimeError as error:
            raise ValueError(
                f"data '{self.name}': a process that reads it ended ({str(error).splitlines()[0]}); fewer workers need "
                "less memory, and workers=0 shows what fails"
            ) from error
        finally:
            del reading  # its processes end with it

    def sha256(self) -> str:
        """Over ``identity`` where there is one; else over the length and :data:`WITNESSES` items spread over the set,
        without their random draws: changes elsewhere pass unnoticed."""
        about = f"{self.count} {list(self.shape)} {self.class_names}"
        if self.cond is not None:
            about += digest_of([], leaves(self.cond))
        if self.identity is not None:
            return hashlib.sha256(f"{about} {self.identity}".encode()).hexdigest()
        chosen = sorted({i * (self.count - 1) // (WITNESSES - 1) for i in range(WITNESSES)})
        witnesses = [part for i in chosen for part in self.items_of(Place([i], [0], 0))[0].parts().values()]
        return digest_of([part.reshape(1, *part.shape) for part in witnesses], {}, about)


class _Batches:
    """What the reading processes are given: batches by their places, or why there is none, as exceptions of somebody's
    code may not travel."""

    def __init__(self, data: Streamed) -> None:
        self.data = data

    def __getitem__(self, place: Place) -> tuple[str | None, tuple[Any, ...]]:
        try:
            return None, tuple(self.data.read(place))
        except ValueError as error:
            return str(error), ()


def finished(read: Rows) -> Rows:
    """Rows as training reads them: pictures become floats only here, as they are four times the bytes."""
    return read if read.x is None else read._replace(x=as_floats(read.x))


def unchanged(batch: Any) -> Any:
    """A batch as the data set gave it."""
    return batch


def leave_signals_to_training(_worker: int) -> None:
    """A reading process goes on when the whole group is told to stop: the training process finishes its step, saves and
    ends its readers.  When that process is gone, they notice and end too."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def own_draws() -> Iterator[Any]:
    """A function that seeds the generators of PyTorch (CPU), NumPy and Python, which stand where they stood when the
    block ends."""

    def seed(number: int) -> None:
        torch.default_generator.manual_seed(number)
        np.random.seed(number % 2**32)
        random.seed(number)

    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield seed
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])
