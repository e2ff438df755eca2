"""Random draws that do not depend on how the work is split.

An :class:`Rng` draws for the *global* batch and hands out the slice of one part, so that a training step gives the
same numbers on one process, on two, or in four accumulated micro-batches; and it is seeded from ``(seed, step)``, so
that a resumed run needs no saved random state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from integers and strings: equal parts, equal seed; unrelated parts, unrelated streams."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class Noise(Protocol):
    """Where a sampler's fresh noise comes from."""

    def normal_like(self, x: Tensor) -> Tensor:
        """Standard normal of the shape and type of ``x``, independent of all else."""

    def increment(self, x: Tensor, start: float, end: float) -> Tensor:
        """Standard normal for the stretch ``start .. end`` of lambda (half the log-SNR)."""


class Rng:
    """Explicit randomness: a ``torch.Generator`` that knows which slice of the global batch it draws for.

    ``part`` of ``parts`` owns samples ``part * n .. (part + 1) * n`` of every draw of ``n`` samples.  All parts must
    make the same draws in the same order.  Draws are made on the CPU, so that they are the same on every device.
    """

    def __init__(self, *seed: int | str, part: int = 0, parts: int = 1, device: torch.device | str = "cpu") -> None:
        if not 0 <= part < parts:
            raise ValueError(f"part={part} of parts={parts}: need 0 <= part < parts")
        self.generator = torch.Generator().manual_seed(derive_seed(*seed))
        self.part, self.parts, self.device = part, parts, torch.device(device)

    @classmethod
    def of(cls, generator: torch.Generator, device: torch.device | str = "cpu") -> Rng:
        """Draws from a generator of the caller's, on its device, and hands them out on ``device``."""
        rng = cls(device=device)
        rng.generator = generator
        return rng

    def stream(self, name: str) -> Rng:
        """An independent source of the same part, known by its name: what is drawn from it does not depend on what was
        drawn here before, nor the other way round.  The same name gives the same draws again."""
        seed = derive_seed(self.generator.initial_seed(), "stream", name)
        rng = Rng(part=self.part, parts=self.parts, device=self.device)
        rng.generator = torch.Generator(self.generator.device).manual_seed(seed)
        return rng

    def _mine(self, drawn: Tensor) -> Tensor:
        mine = drawn.chunk(self.parts)[self.part] if self.parts > 1 else drawn
        if self.device.type == "cuda" and mine.device.type == "cpu":
            return mine.pin_memory().to(self.device, non_blocking=True)  # a plain copy waits for the device
        return mine.to(self.device)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal of this part's ``shape`` (leading dimension = samples of this part)."""
        n, *rest = shape
        where = self.generator.device
        return self._mine(torch.randn(n * self.parts, *rest, generator=self.generator, dtype=dtype, device=where))

    def normal_like(self, x: Tensor) -> Tensor:
        """Standard normal of the shape and type of ``x``."""
        return self.normal(*x.shape, dtype=x.dtype)

    def increment(self, x: Tensor, start: float, end: float) -> Tensor:
        """Standard normal of the shape and type of ``x`` for the stretch ``start .. end`` of lambda: fresh every time,
        whatever the stretch (a Brownian path is one that remembers)."""
        return self.normal_like(x)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """float64 numbers in ``[low, high)`` of this part's ``shape`` (leading dimension = samples of this part)."""
        n, *rest = shape
        where = self.generator.device
        u = torch.rand(n * self.parts, *rest, generator=self.generator, dtype=torch.float64, device=where)
        return self._mine(low + (high - low) * u)

    def choice(self, n: int, weights: Sequence[float] | Tensor) -> Tensor:
        """``n`` int64 indices into ``weights``, one per sample of this part, each as probable as its weight is large.

        ValueError for weights that are negative, not finite or all 0.
        """
        edges = cumulative(weights)
        u = self.uniform(n).to(edges.device) * edges[-1]
        return torch.searchsorted(edges, u, right=True).clamp_max(last_possible(edges)).to(self.device)

    def integers(self, n: int, low: int, high: int) -> Tensor:
        """``n`` integers in ``[low, high)``, one per sample of this part."""
        where = self.generator.device
        return self._mine(torch.randint(low, high, (n * self.parts,), generator=self.generator, device=where))

    def shared_integer(self, low: int, high: int) -> int:
        """One integer in ``[low, high)``, the same for every part."""
        return int(torch.randint(low, high, (1,), generator=self.generator, device=self.generator.device))

    def shared_choice(self, weights: Sequence[float] | Tensor) -> int:
        """One index into ``weights``, the same for every part."""
        edges = cumulative(weights)
        u = self.shared_integer(0, 2**53) / 2**53 * edges[-1]
        return min(int((u >= edges).sum()), last_possible(edges))

    def shuffled(self, n: int) -> Tensor:
        """A permutation of ``n``, the same for every part."""
        return torch.randperm(n, generator=self.generator, device=self.generator.device)


def cumulative(weights: Sequence[float] | Tensor) -> Tensor:
    """The running sums of weights, float64; ValueError when they are no weights."""
    w = torch.as_tensor(weights, dtype=torch.float64)
    if w.ndim != 1 or not bool((w >= 0).all()) or not bool(w.isfinite().all()) or not bool(w.any()):
        raise ValueError(f"weights={w.tolist()} must be a list of numbers, none negative and not all 0")
    return w.cumsum(0)


def last_possible(edges: Tensor) -> int:
    """The last index with a weight: where a draw lands that rounding puts on the upper edge."""
    return int((edges < edges[-1]).sum())


class PerSample:
    """One source of noise a sample: what sample k gets does not depend on how many are drawn with it."""

    def __init__(self, sources: Sequence[Noise]) -> None:
        self.sources = sources

    def normal_like(self, x: Tensor) -> Tensor:
        """Standard normal of the shape and type of ``x``, every sample from its own source."""
        return torch.cat([source.normal_like(one) for source, one in self._pairs(x)])

    def increment(self, x: Tensor, start: float, end: float) -> Tensor:
        """The same for the stretch ``start .. end`` of lambda."""
        return torch.cat([source.increment(one, start, end) for source, one in self._pairs(x)])

    def _pairs(self, x: Tensor) -> Iterator[tuple[Noise, Tensor]]:
        if len(x) != len(self.sources):
            raise ValueError(f"{len(self.sources)} sources of noise for {len(x)} samples: one a sample")
        return zip(self.sources, x.split(1), strict=True)


def repeated_draws(device: torch.device) -> AbstractContextManager[None]:
    """A block after which PyTorch's own generators (CPU and that of ``device``) stand where they stood before it, so
    that the next network call draws the same dropout masks as the call inside."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])
