"""One Brownian path for any number of steps.

With a :class:`BrownianPath` in the place of an :class:`~fewstep.randomness.Rng`, a stochastic solver with 10 steps and
one with 100 follow the same noise: their results are two approximations of one path, so they can be compared sample by
sample, and converge as the steps become many.

The path is ``W(q)`` with the clock ``q = exp(2 lambda)``, the signal-to-noise ratio: in it the noise that the reverse
SDE adds to ``x / sigma`` is exactly an increment of ``W``.  It is never stored.  The range of lambda is cut into 32
cells, each of those into 32, and so on; an increment over a cell is shared out among its parts by normal draws that
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

PARTS = 32
RANGE = 2 * LOG_SNR_BOUND
#: Spreads the numbers of cells over all seeds of 32 bits, which is what the generator tells apart (it is odd).
SPREAD = 0x9E3779B1


@cache
def _split(length: float, child: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """How W at the start of a part of a cell, and its increment over the part, come from those of the cell ``[2, 2]``
    and from the normal draws of all its parts ``[2, PARTS]``, each of this length in lambda, where the clock starts at
    1.

    The draws make independent increments; what they lack of the increment over the cell is shared out by variance.
    """
    growth = math.exp(2 * length)  # of the clock, from each part to the next
    variances = torch.tensor([growth**j * (growth - 1) for j in range(PARTS)], dtype=torch.float64)
    shares, deviations = variances / variances.sum(), variances.sqrt()
    wanted = torch.zeros(2, PARTS, dtype=torch.float64)  # the parts before, and the part itself
    wanted[0, :child], wanted[1, child] = 1.0, 1.0
    lacking = wanted @ shares
    on_cell = torch.stack([torch.tensor([1.0, 0.0], dtype=torch.float64), lacking], dim=1)
    return on_cell.to(dtype), ((wanted - lacking[:, None]) * deviations).to(dtype)


class BrownianPath:
    """Fresh noise that depends on where in lambda it is used, and not on how often one looks.

    ``seed``, ``part`` and ``parts`` are those of an :class:`~fewstep.randomness.Rng`.  Values of lambda are told apart
    to ``40 / 32^levels`` (4e-5 at the default): ValueError for a shorter stretch.  Keeps ``2 levels + 5`` states.
    """

    def __init__(
        self, *seed: int | str, levels: int = 4, part: int = 0, parts: int = 1, device: torch.device | str = "cpu"
    ) -> None:
        if not 1 <= levels <= 6:
            raise ValueError(f"BrownianPath: levels={levels} must lie in 1 .. 6")
        self.levels, self.part, self.parts, self.device = levels, part, parts, torch.device(device)
        self.cells = PARTS**levels
        self._apart = Rng(*seed, "apart", part=part, parts=parts, device=device)
        self._seed = derive_seed(*seed, "path")
        self._generator = torch.Generator()
        self._way: list[tuple[int, Tensor]] = []  # to the last value: cells, W at their start and over them [2, ...]
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
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        if self._way and (self._way[0][1].shape[1:] != x.shape or self._way[0][1].dtype != kind):
            self._way, self._recent = [], {}
        left = self._recent[a] if a in self._recent else self.value(a, x.shape, kind)
        right = self._recent[b] if b in self._recent else self.value(b, x.shape, kind)
        self._recent = {**dict(list(self._recent.items())[-1:]), a: left, b: right}
        return ((right - left) / math.sqrt(self.clock(b) - self.clock(a))).to(self.device, x.dtype)

    def cell(self, log_snr: float) -> int:
        """The nearest of the points at which the path has a value."""
        bounded = min(max(log_snr, -LOG_SNR_BOUND), LOG_SNR_BOUND)
        return round((bounded + LOG_SNR_BOUND) / RANGE * self.cells)

    def clock(self, cell: int) -> float:
        """``q`` at a point."""
        return math.exp(2 * (RANGE * cell / self.cells - LOG_SNR_BOUND))

    def value(self, cell: int, shape: torch.Size, kind: torch.dtype) -> Tensor:
        """``W`` at a point, 0 at the first one; on the CPU."""
        start, size, number = 0, self.cells, 0
        if not self._way:
            deviation = math.sqrt(self.clock(self.cells) - self.clock(0))
            whole = self._draw(0, 1, shape, kind) * deviation
            self._way = [(0, torch.cat([torch.zeros_like(whole), whole]))]
        here = self._way[0][1]
        if cell == self.cells:
            return here.sum(0)
        for level in range(1, self.levels + 1):
            size //= PARTS
            child = (cell - start) // size
            number = number * PARTS + child
            if level < len(self._way) and self._way[level][0] == number:
                here = self._way[level][1]
            else:
                on_cell, on_draws = _split(RANGE * size / self.cells, child, kind)
                z = self._draw(1 + number // PARTS + PARTS**level, PARTS, shape, kind).flatten(1)
                scale = math.exp(RANGE * start / self.cells - LOG_SNR_BOUND)
                here = torch.addmm(on_cell @ here.flatten(1), on_draws, z, alpha=scale).view(here.shape)
                self._way[level:] = [(number, here)]
            start += child * size
            if start == cell:
                break
        return here[0]

    def _draw(self, number: int, n: int, shape: torch.Size, kind: torch.dtype) -> Tensor:
        """``n`` standard normal states that belong to a cell, drawn for the whole batch."""
        self._generator.manual_seed((self._seed + number * SPREAD) % 2**32)
        size, *rest = shape
        z = torch.randn(n, size * self.parts, *rest, generator=self._generator, dtype=kind)
        return z.chunk(self.parts, dim=1)[self.part] if self.parts > 1 else z
