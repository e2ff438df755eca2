"""What training draws from: samples with conditions, read by index."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.conditions import Cond, count, leaves, rows
from fewstep.randomness import Rng

#: All samples.
EVERY = slice(None)


class Rows(NamedTuple):
    """Some samples of a data set: ``x`` ``[B, ...]`` as floats, pictures in [-1, 1] (None: there is no data), their
    conditions, and what else goes with each, by name."""

    x: Tensor | None
    cond: Cond
    columns: Mapping[str, Tensor]


class Draw(NamedTuple):
    """Which samples a micro-batch reads: their ``indices`` ``[B]``, the epoch ``[B]`` in which each is read, and the
    run's ``seed``.  What is random in a sample (a crop, a flip) is a function of the three."""

    indices: Tensor
    epochs: Tensor
    seed: int


class Samples(ABC):
    """A data set of any make: its ``name``, how many samples of which ``shape`` it has, and their rows by index.

    ``class_names`` name the classes where there are any; ``classes`` is their number, None without labels.
    ``captions`` are words for each sample that no encoder has read yet, None without; ``bare`` words have no samples.
    Samples ``in_sequence`` are read as they come, whatever the order of the training: their batches were made together.
    ``labelled_views`` are views of the samples with soft labels (the column "logits"), where those were kept.
    ``alphabet`` are the characters that tokens stand for, token 0 first, where the data say it.
    """

    name: str
    class_names: tuple[str, ...]
    captions: Sequence[str] | None = None
    bare: bool = False
    in_sequence: bool = False
    labelled_views: Samples | None = None
    alphabet: str | None = None

    @property
    def uncaptioned(self) -> Samples:
        """The samples without their captions."""
        return self

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""

    @property
    @abstractmethod
    def classes(self) -> int | None:
        """The number of class labels, None when there are no labels."""

    @abstractmethod
    def rows(self, indices: Tensor | slice) -> Rows:
        """The chosen samples."""

    @abstractmethod
    def sha256(self) -> str:
        """What tells this data set from any other, in hexadecimal."""

    def conditions(self, indices: Tensor | slice) -> Cond:
        """What the chosen samples are made under, without the samples where that is cheaper."""
        return self.rows(indices).cond

    def feed(self, draws: Iterable[Draw]) -> Iterator[Rows]:
        """The rows of one draw after the other; sets that are slow to read work ahead here."""
        return (self.rows(draw.indices) for draw in draws)


@dataclass(frozen=True)
class Dataset(Samples):
    """Samples in memory.

    ``x`` is ``[N, ...]``: uint8 pictures ``[N, C, H, W]`` (read as floats in [-1, 1]) or float tensors, read as they
    are.  ``cond`` is what the samples are made under (:data:`~fewstep.conditions.Cond`): class labels int64 ``[N]``, -1
    for none, or embeddings by name; None without.  ``columns`` are further tensors ``[N, ...]`` by name, such as the
    noise of a pair.  ValueError when there are no samples, lengths differ, a sample is not finite, a label has no name,
    or what was given is no tensor.
    """

    name: str
    x: Tensor
    cond: Cond = None
    class_names: tuple[str, ...] = ()
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    alphabet: str | None = None

    def __post_init__(self) -> None:
        check_kinds(self.name, self.x, self.cond, self.columns)
        if self.x.ndim < 2 or len(self.x) == 0:
            raise ValueError(f"data '{self.name}': need samples [N, ...], got shape {list(self.x.shape)}")
        if self.x.is_floating_point() and not bool(torch.isfinite(self.x).all()):
            bad = int((~torch.isfinite(self.x.flatten(1)).all(1)).nonzero()[0])
            raise ValueError(f"data '{self.name}': sample {bad} holds NaN or infinity; clean the data first")
        check_conditions(self.name, len(self.x), self.cond, self.class_names)
        for name, column in self.columns.items():
            check_length(self.name, len(self.x), name, column)

    def __len__(self) -> int:
        return len(self.x)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.x.shape[1:])

    @property
    def labels(self) -> Tensor | None:
        """The class labels ``[N]``, where the conditions are labels."""
        return labels_of(self.cond)

    @property
    def classes(self) -> int | None:
        return number_of_classes(self.cond, self.class_names)

    def rows(self, indices: Tensor | slice) -> Rows:
        columns = {name: column[indices] for name, column in self.columns.items()}
        return Rows(self.read(indices), rows(self.cond, indices), columns)

    def conditions(self, indices: Tensor | slice) -> Cond:
        return rows(self.cond, indices)

    def read(self, indices: Tensor | slice) -> Tensor:
        """Samples as floats, pictures in [-1, 1]."""
        return as_floats(self.x[indices])

    def sha256(self) -> str:
        """Over shape, type and bytes of samples, conditions and columns."""
        labels = labels_of(self.cond)
        named = {} if labels is not None else leaves(self.cond)
        return digest_of([self.x, *([] if labels is None else [labels])], {**named, **self.columns})

    def in_memory(self) -> Dataset:
        """Itself, see :class:`~fewstep.data.stored.Stored`."""
        return self

    def within(self, memory: int, workers: int) -> Dataset:
        return self

    def subset(self, indices: Tensor | slice, name: str | None = None) -> Dataset:
        """The chosen samples as a data set."""
        columns = {key: column[indices] for key, column in self.columns.items()}
        cond = rows(self.cond, indices)
        return Dataset(name or self.name, self.x[indices], cond, self.class_names, columns, self.alphabet)


class Prior(Samples):
    """No data: only the ``shape`` of one sample and the conditions ``cond`` that samples are made under (None: none).

    For methods that learn from the teacher alone: prompts without pictures, labels, or nothing.
    """

    def __init__(
        self, shape: tuple[int, ...], cond: Cond = None, name: str = "prior", class_names: tuple[str, ...] = ()
    ) -> None:
        self.name, self.cond, self.class_names = name, cond, class_names
        self._shape = tuple(shape)
        check_conditions(name, len(self), cond, class_names)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    def __len__(self) -> int:
        """The number of conditions, 1 without."""
        return count(self.cond) or 1

    @property
    def classes(self) -> int | None:
        return number_of_classes(self.cond, self.class_names)

    def rows(self, indices: Tensor | slice) -> Rows:
        return Rows(None, rows(self.cond, indices), {})

    def sha256(self) -> str:
        """Over the shape of a sample and the bytes of the conditions."""
        return digest_of([], leaves(self.cond), f"no samples {list(self.shape)}")


def as_floats(x: Tensor) -> Tensor:
    """Samples as training reads them: uint8 pictures as floats in [-1, 1], others as they are."""
    return x.float().div_(127.5).sub_(1) if x.dtype == torch.uint8 else x


def digest_of(tensors: Iterable[Tensor], named: Mapping[str, Tensor], start: str = "") -> str:
    """SHA-256 over shape, type and bytes of tensors, and the names of those that have one."""
    digest = hashlib.sha256(start.encode())
    for name, tensor in [*(("", tensor) for tensor in tensors), *named.items()]:
        digest.update(f"{name}{list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def labels_of(cond: Cond) -> Tensor | None:
    """The class labels ``[N]``, where the conditions are labels."""
    return cond if isinstance(cond, Tensor) and not cond.is_floating_point() else None


def class_labels(data: Samples, index: Tensor | slice = EVERY) -> Tensor:
    """The class labels of all samples, or some; ValueError for data without."""
    labels = labels_of(data.conditions(index))
    if labels is None:
        raise ValueError(f"data '{data.name}' has no labels: classes could not be told apart")
    return labels


def every_label(data: Samples) -> Tensor:
    """The class labels ``[N]``; ValueError for data without, and for a sample without one (-1)."""
    labels = class_labels(data)
    if int(labels.min()) < 0:
        raise ValueError(f"data '{data.name}' has samples without a label (-1); leave them out")
    return labels


def number_of_classes(cond: Cond, class_names: tuple[str, ...]) -> int | None:
    """How many classes labels tell apart; None without labels."""
    labels = labels_of(cond)
    return None if labels is None else len(class_names) or int(labels.max()) + 1


def check_kinds(name: object, x: object, cond: object, columns: Mapping[str, object]) -> None:
    """ValueError unless the name is text, and everything else made of tensors."""
    if not isinstance(name, str):
        raise ValueError(f"Dataset({type(name).__name__}, ...): a name comes first, Dataset(name, x, cond)")
    conditions = cond if isinstance(cond, Mapping) else {} if cond is None else {"cond": cond}
    for what, value in {"x": x, **conditions, **columns}.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"data '{name}': {what} must be a tensor, got {type(value).__name__}; torch.as_tensor makes one"
            )


def check_conditions(name: str, n: int, cond: Cond, class_names: tuple[str, ...]) -> None:
    """ValueError unless every condition has one row for each of ``n`` samples, and every label a name."""
    labels = labels_of(cond)
    for key, leaf in leaves(cond).items():
        check_length(name, n, "labels" if leaf is labels else key, leaf)
    if labels is None:
        return
    low, high = int(labels.min()), int(labels.max())
    if low < -1:
        raise ValueError(f"data '{name}': labels start at 0 (-1: none), found {low}")
    if class_names and high >= len(class_names):
        raise ValueError(f"data '{name}': label {high} but only {len(class_names)} class names")


def check_length(name: str, n: int, what: str, column: Tensor) -> None:
    """ValueError unless a tensor has one row a sample."""
    if column.ndim == 0 or len(column) != n:
        raise ValueError(f"data '{name}': {n} samples but {what} of shape {list(column.shape)}")


class Unlabelled(Samples):
    """A data set without its conditions."""

    def __init__(self, inner: Samples) -> None:
        self.inner = inner
        self.name, self.class_names = inner.name, ()

    def __len__(self) -> int:
        return len(self.inner)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    @property
    def classes(self) -> int | None:
        return None

    def rows(self, indices: Tensor | slice) -> Rows:
        return self.inner.rows(indices)._replace(cond=None)

    def feed(self, draws: Iterable[Draw]) -> Iterator[Rows]:
        return (rows._replace(cond=None) for rows in self.inner.feed(draws))

    def sha256(self) -> str:
        return hashlib.sha256(f"unlabelled {self.inner.sha256()}".encode()).hexdigest()


class Chosen(Samples):
    """The samples ``index`` ``[n]`` of a data set, read as they are there."""

    def __init__(self, inner: Samples, index: Tensor, name: str) -> None:
        self.inner, self.index = inner, index
        self.name, self.class_names = name, inner.class_names

    def __len__(self) -> int:
        return len(self.index)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    @property
    def classes(self) -> int | None:
        return self.inner.classes

    def rows(self, indices: Tensor | slice) -> Rows:
        return self.inner.rows(self.index[indices])

    def conditions(self, indices: Tensor | slice) -> Cond:
        return self.inner.conditions(self.index[indices])

    def feed(self, draws: Iterable[Draw]) -> Iterator[Rows]:
        return self.inner.feed(draw._replace(indices=self.index[draw.indices]) for draw in draws)

    def sha256(self) -> str:
        return digest_of([self.index], {}, f"of {self.inner.sha256()}")


class First(Chosen):
    """The first ``count`` samples of a data set."""

    def __init__(self, inner: Samples, count: int) -> None:
        super().__init__(inner, torch.arange(min(count, len(inner))), inner.name)

    def feed(self, draws: Iterable[Draw]) -> Iterator[Rows]:
        return self.inner.feed(draws)

    def sha256(self) -> str:
        return hashlib.sha256(f"{len(self)} of {self.inner.sha256()}".encode()).hexdigest()


def epoch_indices(n: int, start: int, count: int, seed: int) -> Tensor:
    """The indices that training reads from position ``start`` on: every epoch is its own permutation of ``n``.

    A pure function of the position, so a resumed run reads exactly what the killed one would have read.
    """
    chosen: list[Tensor] = []
    while count > 0:
        epoch, offset = divmod(start, n)
        order = epoch_order(n, epoch, seed)[offset : offset + count]
        chosen.append(order)
        start, count = start + len(order), count - len(order)
    return torch.cat(chosen)


@lru_cache(maxsize=2)
def epoch_order(n: int, epoch: int, seed: int) -> Tensor:
    """The permutation of one epoch, kept while it is read: it takes 10 ms to draw for a million samples."""
    return Rng(seed, "epoch", epoch).shuffled(n)
