"""Random draws that do not depend on how the work is split.

An :class:`Rng` draws for the *global* batch and hands out the slice of one part, so that a training step gives the
same numbers on one process, on two, or in four accumulated micro-batches; and it is seeded from ``(seed, step)``, so
that a resumed run needs no saved random state.
"""

from __future__ import annotations

import hashlib
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

    def _mine(self, drawn: Tensor) -> Tensor:
        return drawn.chunk(self.parts)[self.part].to(self.device) if self.parts > 1 else drawn.to(self.device)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal of this part's ``shape`` (leading dimension = samples of this part)."""
        n, *rest = shape
        return self._mine(torch.randn(n * self.parts, *rest, generator=self.generator, dtype=dtype))

    def normal_like(self, x: Tensor) -> Tensor:
        """Standard normal of the shape and type of ``x``."""
        return self.normal(*x.shape, dtype=x.dtype)

    def increment(self, x: Tensor, start: float, end: float) -> Tensor:
        """Standard normal of the shape and type of ``x`` for the stretch ``start .. end`` of lambda: fresh every time,
        whatever the stretch (a Brownian path is one that remembers)."""
        return self.normal_like(x)

    def uniform(self, n: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """``n`` float64 numbers in ``[low, high)``, one per sample of this part."""
        u = torch.rand(n * self.parts, generator=self.generator, dtype=torch.float64)
        return self._mine(low + (high - low) * u)

    def integers(self, n: int, low: int, high: int) -> Tensor:
        """``n`` integers in ``[low, high)``, one per sample of this part."""
        return self._mine(torch.randint(low, high, (n * self.parts,), generator=self.generator))

    def shared_integer(self, low: int, high: int) -> int:
        """One integer in ``[low, high)``, the same for every part."""
        return int(torch.randint(low, high, (1,), generator=self.generator))

    def shuffled(self, n: int) -> Tensor:
        """A permutation of ``n``, the same for every part."""
        return torch.randperm(n, generator=self.generator)


def repeated_draws(device: torch.device) -> AbstractContextManager[None]:
    """A block after which PyTorch's own generators (CPU and that of ``device``) stand where they stood before it, so
    that the next network call draws the same dropout masks as the call inside."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])
