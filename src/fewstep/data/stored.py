"""Pictures on disk that are listed, not read: in memory where they fit, else read as training goes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import overload

import numpy as np
import torch
from torch import Tensor

from fewstep.data.dataset import Dataset
from fewstep.data.streamed import Streamed


class Strings(Sequence[str]):
    """Many strings in two arrays: a million paths take the bytes they have, and no process that reads them copies
    them."""

    def __init__(self, values: Iterable[str]) -> None:
        encoded = [value.encode("utf-8", "surrogateescape") for value in values]
        self.text = b"".join(encoded)
        self.ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"string {index} of {len(self)}")
        start, end = self.ends[index % len(self) :][:2]
        return self.text[start:end].decode("utf-8", "surrogateescape")


class Stored(ABC):
    """Pictures by number: item ``i`` is uint8 ``[C, H, W]`` of the size and channels of the first.

    ``labels`` ``[N]`` and ``class_names`` are known without reading a picture (None and () without).
    """

    name: str
    class_names: tuple[str, ...]

    @property
    @abstractmethod
    def labels(self) -> Tensor | None: ...

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def picture(self, index: int) -> tuple[str, np.ndarray]:
        """What a picture is called in messages, and its pixels uint8 ``[1 or 3, H, W]``."""

    @abstractmethod
    def identity(self) -> str:
        """What tells these files from others, without reading them all where they are many."""

    @property
    @abstractmethod
    def captions(self) -> Strings | None:
        """A caption for every picture; None where there are none."""

    @cached_property
    def first(self) -> tuple[str, np.ndarray]:
        return self.picture(0)

    def __getitem__(self, index: int) -> Tensor:
        name, picture = self.picture(index)
        first_name, first = self.first
        check_size(name, picture, first_name, first)
        if len(picture) > len(first):
            raise ValueError(
                f"'{name}' is in colour but '{first_name}' is grey: pictures that do not fit in memory must be of one "
                "kind"
            )
        return torch.from_numpy(np.broadcast_to(picture, first.shape).copy())

    def in_memory(self) -> Dataset:
        """All pictures, read; grey ones become RGB when any other is in colour."""
        return Dataset(self.name, stack(self.picture(i) for i in range(len(self))), self.labels, self.class_names)

    def within(self, memory: int, workers: int) -> Dataset | Streamed:
        """The pictures in memory when they take at most ``memory`` bytes there, else read by ``workers`` processes as
        training goes: the same numbers either way."""
        if len(self) * self.first[1].size <= memory:
            return self.in_memory()
        return Streamed(
            self, self.name, cond=self.labels, class_names=self.class_names, workers=workers, identity=self.identity()
        )


def stack(pictures: Iterable[tuple[str, np.ndarray]]) -> Tensor:
    """Named pictures of one size as uint8 ``[N, C, H, W]``; grey ones become RGB when any other is in colour."""
    decoded: list[np.ndarray] = []
    first_name = ""
    for name, picture in pictures:
        first_name = first_name or name
        decoded.append(picture)
        check_size(name, picture, first_name, decoded[0])
    channels = max(picture.shape[0] for picture in decoded)
    x = torch.empty((len(decoded), channels, *decoded[0].shape[1:]), dtype=torch.uint8)
    for i, picture in enumerate(decoded):
        x[i] = torch.from_numpy(picture)
    return x


def check_size(name: str, picture: np.ndarray, first_name: str, first: np.ndarray) -> None:
    """ValueError unless a picture is of the size of the first."""
    if picture.shape[1:] != first.shape[1:]:
        (h, w), (h0, w0) = picture.shape[1:], first.shape[1:]
        raise ValueError(f"'{name}' is {h}x{w} but '{first_name}' is {h0}x{w0}: resize all pictures to one size")
