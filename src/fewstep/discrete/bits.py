"""Symbols as analog bits: integers in, real numbers near ``-b`` and ``b`` out, and back by a threshold.

Chen, Zhang & Hinton 2022 (arXiv 2208.04202), section 2 and appendices B and C.  A symbol is one of K = ``values``
integers; its code is a row of ``channels`` bits, cast to ``{-b, b}`` with b = ``scale`` and put into the channel
dimension: ``[B, ...]`` integers become ``[B, channels, ...]`` floats.  What a model made of them is decoded by sign (by
the largest channel for one-hot codes).  Where K is not a power of two some codes belong to no symbol: they decode to
:data:`INVALID`, which is how they are counted, or to the nearest symbol.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fewstep.schedules import TrigFlow

#: What a code that belongs to no symbol decodes to.
INVALID = -1

#: The authors' cosine schedule, ``alpha^2 = cos^2(pi/2 (t + 0.0002) / 1.00025)`` for t in [0, 1], exactly: TrigFlow of
#: unit scale between these angles, which grow linearly in their t.
COSINE = TrigFlow(t_min=math.pi / 2 * 0.0002 / 1.00025, t_max=math.pi / 2 * 1.0002 / 1.00025, sigma_data=1.0)


@dataclass(frozen=True)
class Encoding(ABC):
    """A code for ``values`` symbols with analog bits ``-scale`` and ``scale``.

    ValueError for fewer than two symbols or a scale that is not positive.
    """

    values: int
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.values < 2:
            raise ValueError(f"{type(self).__name__}: values={self.values} must be at least 2")
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"{type(self).__name__}: scale={self.scale} must be positive and finite")

    @property
    @abstractmethod
    def channels(self) -> int:
        """The number of bits of a symbol."""

    @property
    @abstractmethod
    def bits(self) -> Tensor:
        """The bits (0 or 1) of every symbol, int64 ``[values, channels]``."""

    @property
    def codebook(self) -> Tensor:
        """The analog bits of every symbol, float32 ``[values, channels]``."""
        return (2 * self.bits - 1).float() * self.scale

    def encode(self, symbols: Tensor) -> Tensor:
        """Integers ``[B, ...]`` as analog bits ``[B, channels, ...]``, float32.

        ValueError for symbols outside ``0 .. values - 1``.
        """
        if symbols.is_floating_point() or symbols.ndim < 1:
            raise ValueError(f"symbols are integers [B, ...], got {symbols.dtype} of shape {list(symbols.shape)}")
        whole = symbols.long()
        if whole.numel() and not 0 <= int(whole.min()) <= int(whole.max()) < self.values:
            raise ValueError(
                f"symbols must lie in 0 .. {self.values - 1}, got {int(whole.min())} .. {int(whole.max())}"
            )
        return self.codebook.to(symbols.device)[whole].movedim(-1, 1).contiguous()

    def decode(self, x: Tensor) -> Tensor:
        """Analog bits ``[B, channels, ...]`` as int64 symbols ``[B, ...]``, :data:`INVALID` for codes of no symbol."""
        self.check(x)
        return self.read(x)

    @abstractmethod
    def read(self, x: Tensor) -> Tensor:
        """:meth:`decode` of bits whose shape was checked."""

    def nearest(self, x: Tensor) -> Tensor:
        """As :meth:`decode`, but an invalid code becomes the symbol whose code is nearest to the analog bits."""
        symbols = self.decode(x)
        wrong = symbols == INVALID
        # all codes are equally long, so the nearest one has the largest inner product
        symbols[wrong] = (x.movedim(1, -1)[wrong] @ self.codebook.to(x).T).argmax(-1)
        return symbols

    def expected(self, probabilities: Tensor) -> Tensor:
        """The mean analog bits ``[B, channels, ...]`` under probabilities of the symbols ``[B, values, ...]``."""
        return torch.einsum("bk...,kn->bn...", probabilities, self.codebook.to(probabilities))

    def check(self, x: Tensor) -> None:
        if x.ndim < 2 or x.shape[1] != self.channels:
            raise ValueError(
                f"{type(self).__name__}: analog bits of {self.values} symbols are [B, {self.channels}, ...], got shape "
                f"{list(x.shape)}"
            )


@dataclass(frozen=True)
class BinaryEncoding(Encoding):
    """``ceil(log2 K)`` bits, the least significant first; subclasses say which integer's bits a symbol has."""

    @property
    def channels(self) -> int:
        return (self.values - 1).bit_length()

    @abstractmethod
    def codes(self) -> Tensor:
        """The integer whose bits stand for each symbol: int64 ``[values]``, all different, below ``2 ** channels``."""

    @cached_property
    def bits(self) -> Tensor:
        return (self.codes()[:, None] >> torch.arange(self.channels)) & 1

    @cached_property
    def _symbols(self) -> Tensor:
        """The symbol of every code ``[2 ** channels]``."""
        table = torch.full((2**self.channels,), INVALID)
        table[self.codes()] = torch.arange(self.values)
        return table

    def read(self, x: Tensor) -> Tensor:
        place = 2 ** torch.arange(self.channels, device=x.device)
        return self._symbols.to(x.device)[((x > 0).movedim(1, -1) * place).sum(-1)]


@dataclass(frozen=True)
class Unsigned(BinaryEncoding):
    """The bits of the integer itself (the paper's "uint8" for 256 values): partly keeps the order of the symbols."""

    def codes(self) -> Tensor:
        return torch.arange(self.values)


@dataclass(frozen=True)
class Gray(BinaryEncoding):
    """The reflected Gray code: neighbouring symbols differ in one bit."""

    def codes(self) -> Tensor:
        symbol = torch.arange(self.values)
        return symbol ^ (symbol >> 1)


@dataclass(frozen=True)
class Permuted(BinaryEncoding):
    """A fixed random permutation of all codes (the paper's "uint8 (rand)"): the order of the symbols is gone.

    ``seed`` is that of NumPy's legacy generator, so that 42 with 256 values is the paper's table.
    """

    seed: int = 42

    def codes(self) -> Tensor:
        codes = np.arange(2**self.channels)
        np.random.RandomState(self.seed).shuffle(codes)
        return torch.from_numpy(codes)[: self.values].long()


@dataclass(frozen=True)
class OneHot(Encoding):
    """A channel for every symbol, decoded by the largest: no code is invalid."""

    @property
    def channels(self) -> int:
        return self.values

    @property
    def bits(self) -> Tensor:
        return torch.eye(self.values, dtype=torch.long)

    def read(self, x: Tensor) -> Tensor:
        return x.argmax(1)


#: Encodings by name.
ENCODINGS: dict[str, type[Encoding]] = {"uint": Unsigned, "gray": Gray, "rand": Permuted, "one-hot": OneHot}
