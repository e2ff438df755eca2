"""One Brownian path for any number of steps.

With a :class:`BrownianPath` in the place of an :class:`~fewstep.randomness.Rng`, a stochastic solver with 10 steps and
one with 100 follow the same noise: their results are two approximations of one path, so they can be compared sample by
sample, and converge as the steps become many.

The path is ``W(q)`` with the clock ``q = exp(2 lambda)``, the signal-to-noise ratio: in it the noise that the reverse
SDE adds to ``x / sigma`` is exactly an increment of ``W``.  It is never stored.  The range of lambda is cut into 16
cells, each of those into 16, and so on; an increment over a cell is shared out among its parts by normal draws that
belong to the cell (a Brownian bridge), and a stretch of lambda gets ``(W(q_1) - W(q_0)) / sqrt(q_1 - q_0)``: exactly
standard normal, and independent of every stretch that it does not overlap.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from fewstep.randomness import Rng, derive_seed
from fewstep.schedules import LOG_SNR_BOUND

PARTS = 16
RANGE = 2 * LOG_SNR_BOUND
#: Spreads the numbers of cells over all seeds of 32 bits, which is what the generator tells apart (it is odd).
SPREAD = 0x9E3779B1


@cache
def _shares(length: float, dtype: torch.dtype) -> tuple[Tensor, list[float], list[float]]:
    """For a cell cut into parts of this length in lambda: the standard deviations of the parts' increments where the
    clock starts at 1, their shares of the variance, and the shares of all parts before each."""
    growth = math.exp(2 * length)  # of the clock, from each part to the next
    variances = [growth**j * (growth - 1) for j in range(PARTS)]
    total = sum(variances)
    before = [sum(variances[:j]) / total for j in range(PARTS)]
    return torch.tensor(variances, dtype=dtype).sqrt(), [v / total for v in variances], before


class BrownianPath:
    """Fresh noise that depends on where in lambda it is used, and not on how often one looks.

    ``seed``, ``part`` and ``parts`` are those of an :class:`~fewstep.randomness.Rng`.  Values of lambda are told apart
    to ``40 / 16^levels`` (4e-5 at the default): ValueError for a shorter stretch.  Keeps ``2 levels + 5`` states.
    """

    def __init__(
        self, *seed: int | str, levels: int = 5, part: int = 0, parts: int = 1, device: torch.device | str = "cpu"
    ) -> None:
        if not 1 <= levels <= 8:
            raise ValueError(f"BrownianPath: levels={levels} must lie in 1 .. 8")
        self.levels, self.part, self.parts, self.device = levels, part, parts, torch.device(device)
        self.cells = PARTS**levels
        self._apart = Rng(*seed, "apart", part=part, parts=parts, device=device)
        self._seed = derive_seed(*seed, "path")
        self._generator = torch.Generator()
        self._way: list[tuple[int, Tensor, Tensor]] = []  # of the last value: cell, W at its start, increment over it
        self._recent: dict[int, Tensor] = {}  # the last values asked for: stretches share their ends

    def normal_like(self, x: Tensor) -> Tensor:
        """Independent of the path: what churn adds at levels that have had their noise."""
        return self._apart.normal_like(x)

    def increment(self, x: Tensor, start: float, end: float) -> Tensor:
        """Standard normal of the shape and type of ``x`` for a stretch of lambda."""
        a, b = self.cell(start), self.cell(end)
        if a >= b:
            raise ValueError(
                f"the stretch {start:g} .. {end:g} of lambda is shorter than this Brownian path resolves "
                f"({RANGE / self.cells:.1g}); give it more levels than {self.levels}"
            )
        if self._way and (self._way[0][1].shape != x.shape or self._way[0][1].dtype != x.dtype):
            self._way, self._recent = [], {}
        left = self._recent[a] if a in self._recent else self.value(a, x)
        right = self._recent[b] if b in self._recent else self.value(b, x)
        self._recent = {**dict(list(self._recent.items())[-1:]), a: left, b: right}
        return (right - left).mul_(1 / math.sqrt(self.clock(b) - self.clock(a)))

    def cell(self, log_snr: float) -> int:
        """The nearest of the points at which the path has a value."""
        bounded = min(max(log_snr, -LOG_SNR_BOUND), LOG_SNR_BOUND)
        return round((bounded + LOG_SNR_BOUND) / RANGE * self.cells)

    def clock(self, cell: int) -> float:
        """``q`` at a point."""
        return math.exp(2 * (RANGE * cell / self.cells - LOG_SNR_BOUND))

    def value(self, cell: int, x: Tensor) -> Tensor:
        """``W`` at a point, 0 at the first one."""
        start, size, number = 0, self.cells, 0
        if not self._way:
            whole = self._draw(0, 1, x)[0] * math.sqrt(self.clock(self.cells) - self.clock(0))
            self._way = [(0, torch.zeros_like(whole), whole)]
        _, before, whole = self._way[0]
        if cell == self.cells:
            return before + whole
        for level in range(1, self.levels + 1):
            size //= PARTS
            child = (cell - start) // size
            number = number * PARTS + child
            if level < len(self._way) and self._way[level][0] == number:
                _, before, whole = self._way[level]
            else:
                before, whole = self._child(level, number, start, size, before, whole)
                self._way[level:] = [(number, before, whole)]
            start += child * size
            if start == cell:
                break
        return before

    def _child(
        self, level: int, number: int, start: int, size: int, before: Tensor, whole: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``W`` at the start of a part of a cell and its increment, from those of the cell."""
        parent, child = divmod(number, PARTS)
        sd, share, before_share = _shares(RANGE * size / self.cells, whole.dtype)
        z = self._draw(1 + parent + PARTS**level, PARTS, whole)
        z *= (sd * math.exp(RANGE * start / self.cells - LOG_SNR_BOUND)).to(z.device).view(-1, *[1] * whole.ndim)
        rest = whole - z.sum(0)
        if child:
            before = (before + z[:child].sum(0)).add_(rest, alpha=before_share[child])
        return before, z[child].add_(rest, alpha=share[child])

    def _draw(self, number: int, n: int, x: Tensor) -> Tensor:
        """``n`` standard normal states that belong to a cell, drawn for the whole batch."""
        self._generator.manual_seed((self._seed + number * SPREAD) % 2**32)
        size, *rest = x.shape
        z = torch.randn(n, size * self.parts, *rest, generator=self._generator, dtype=x.dtype)
        return (z.chunk(self.parts, dim=1)[self.part] if self.parts > 1 else z).to(self.device)
