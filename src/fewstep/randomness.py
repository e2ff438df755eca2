"""Random draws that do not depend on how the work is split.

An :class:`Rng` draws for the *global* batch and hands out the slice of one part, so that a training step gives the
same numbers on one process, on two, or in four accumulated micro-batches; and it is seeded from ``(seed, step)``, so
that a resumed run needs no saved random state.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
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


#: ``torch.randn`` or ``torch.rand``.
Draw = Callable[..., Tensor]
#: PyTorch draws normal numbers in blocks of so many, and where the last block is cut, that many at the end once more.
BLOCK = 16
#: From so many numbers on, those of the other parts are passed over rather than drawn.
MANY = 2**10
#: So many words of a generator are passed over at a time, a byte each.
AT_A_TIME = 2**22


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

    def _slice(self, draw: Draw, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """This part's ``shape`` of what all parts draw together."""
        mine, source = math.prod(shape), self.generator
        if self.parts > 1 and mine * self.parts >= MANY and source.device.type == "cpu":
            drawn = draw_slice(draw, dtype, mine * self.part, mine, mine * self.parts, source)
        else:
            drawn = draw(mine * self.parts, generator=source, dtype=dtype, device=source.device)
            drawn = drawn[mine * self.part :][:mine]
        return self._moved(drawn.reshape(shape))

    def _moved(self, mine: Tensor) -> Tensor:
        if self.device.type == "cuda" and mine.device.type == "cpu":
            return mine.pin_memory().to(self.device, non_blocking=True)  # a plain copy waits for the device
        return mine.to(self.device)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal of this part's ``shape`` (leading dimension = samples of this part)."""
        return self._slice(torch.randn, shape, dtype)

    def normal_like(self, x: Tensor) -> Tensor:
        """Standard normal of the shape and type of ``x``."""
        return self.normal(*x.shape, dtype=x.dtype)

    def increment(self, x: Tensor, start: float, end: float) -> Tensor:
        """Standard normal of the shape and type of ``x`` for the stretch ``start .. end`` of lambda: fresh every time,
        whatever the stretch (a Brownian path is one that remembers)."""
        return self.normal_like(x)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """float64 numbers in ``[low, high)`` of this part's ``shape`` (leading dimension = samples of this part)."""
        return low + (high - low) * self._slice(torch.rand, shape, torch.float64)

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
        drawn = torch.randint(low, high, (n * self.parts,), generator=self.generator, device=where)
        return self._moved(drawn[n * self.part :][:n])

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


def draw_slice(
    draw: Draw, dtype: torch.dtype, start: int, count: int, total: int, generator: torch.Generator
) -> Tensor:
    """Numbers ``start .. start + count`` of ``draw(total)`` from a generator on the CPU, which is left where drawing
    them all leaves it.  The other numbers are only passed over: a fifth of the cost of normal numbers in float64, half
    of those in float32."""
    words = words_per_number(draw, dtype)
    if not words:
        return draw(total, generator=generator, dtype=dtype)[start : start + count]
    return _draw_slice(draw, dtype, start, count, total, generator, words)


def _draw_slice(
    draw: Draw, dtype: torch.dtype, start: int, count: int, total: int, generator: torch.Generator, words: int
) -> Tensor:
    first = min(start, total - BLOCK) // BLOCK * BLOCK
    last = -(-(start + count) // BLOCK) * BLOCK
    if last > total - BLOCK:  # what is drawn once more at the end belongs to it
        last = total
    pass_over(words * first, generator)
    drawn = draw(last - first, generator=generator, dtype=dtype)
    if last < total:
        again = BLOCK if draw is torch.randn and total % BLOCK else 0
        pass_over(words * (total - last + again), generator)
    return drawn[start - first :][:count]


def pass_over(words: int, generator: torch.Generator) -> None:
    """Leave out so many words of 32 bits of a generator on the CPU."""
    spent = torch.empty(min(words, AT_A_TIME), dtype=torch.uint8)
    for start in range(0, words, AT_A_TIME):
        spent[: words - start].random_(generator=generator)


@lru_cache(maxsize=16)
def words_per_number(draw: Draw, dtype: torch.dtype) -> int:
    """So many words of a generator on the CPU one number takes; 0 where this PyTorch draws in another way than
    :func:`draw_slice` counts on.  Found by trial, on totals with and without a cut block."""
    for words in (1, 2):
        agree = True
        for total in (64, 70):
            whole, part = (torch.Generator().manual_seed(0) for _ in range(2))
            expected = draw(total, generator=whole, dtype=dtype)[20:24]
            found = _draw_slice(draw, dtype, 20, 4, total, part, words)
            agree = agree and torch.equal(found, expected) and torch.equal(whole.get_state(), part.get_state())
        if agree:
            return words
    return 0


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


def seed_own_draws(seed: int, device: torch.device) -> None:
    """Seed PyTorch's own generators, that of ``device`` among them.

    For the CPU not by :func:`torch.manual_seed`, which writes down the call stack for every kind of device that is not
    there: 0.3 to 0.8 ms at depths of 20 and 60 calls, where this takes 0.006 ms.
    """
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def repeated_draws(device: torch.device) -> AbstractContextManager[None]:
    """A block after which PyTorch's own generators (CPU and that of ``device``) stand where they stood before it, so
    that the next network call draws the same dropout masks as the call inside."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])
