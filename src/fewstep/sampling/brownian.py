"""One Brownian path for any number of steps.

With a :class:`BrownianPath` in the place of an :class:`~fewstep.randomness.Rng`, a stochastic solver with 10 steps and one
with 100 follow the same noise: their results are two approximations of one path, so they can be compared sample by
sample, and converge as the steps become many.

The path is ``W(q)`` with the clock ``q = exp(2 lambda)``, the signal-to-noise ratio: in it the noise that the reverse SDE
adds to ``x / sigma`` is exactly an increment of ``W``.  It is never stored.  A value is found by halving the range of
lambda towards it, each middle a Brownian bridge between the two ends with a normal draw that belongs to that middle
(the "virtual Brownian tree"), and a stretch of lambda gets ``(W(q_1) - W(q_0)) / sqrt(q_1 - q_0)``: exactly standard
normal, and independent of any other stretch that it does not overlap.
"""

from __future__ import annotations

import math

from torch import Tensor

from fewstep.randomness import Rng
from fewstep.schedules import LOG_SNR_BOUND


class BrownianPath:
    """Fresh noise that depends on where in lambda it is used, and not on how often one looks.

    ``seed`` as in :class:`~fewstep.randomness.Rng`.  Values of lambda are told apart to ``2 LOG_SNR_BOUND / 2^depth``
    (a thousandth at the default): ValueError for a shorter stretch.  Keeps about ``2 depth`` states.  A path belongs
    to one state shape: it starts again when the shape or the type changes.
    """

    def __init__(self, *seed: int | str, depth: int = 15, part: int = 0, parts: int = 1, device: str = "cpu") -> None:
        if not 1 <= depth <= 40:
            raise ValueError(f"BrownianPath: depth={depth} must lie in 1 .. 40")
        self.seed, self.depth = seed, depth
        self.part, self.parts, self.device = part, parts, device
        self._apart = self._rng("apart")
        self._known: dict[int, Tensor] = {}

    def _rng(self, *what: int | str) -> Rng:
        return Rng(*self.seed, *what, part=self.part, parts=self.parts, device=self.device)

    def normal_like(self, x: Tensor) -> Tensor:
        """Independent of the path: what churn adds at levels that have had their noise."""
        return self._apart.normal_like(x)

    def increment(self, x: Tensor, start: float, end: float) -> Tensor:
        a, b = self._cell(start), self._cell(end)
        if a >= b:
            raise ValueError(
                f"the stretch {start:g} .. {end:g} of lambda is shorter than this Brownian path resolves "
                f"({2 * LOG_SNR_BOUND / 2**self.depth:g}); give it a larger depth than {self.depth}"
            )
        if self._known and next(iter(self._known.values())).shape != x.shape:
            self._known = {}
        left, right = self._value(a, x), self._value(b, x)
        self._forget(a, b)
        return (right - left) / math.sqrt(self._clock(b) - self._clock(a))

    def _cell(self, log_snr: float) -> int:
        """The nearest of the ``2^depth`` points of the range of lambda."""
        bounded = min(max(log_snr, -LOG_SNR_BOUND), LOG_SNR_BOUND)
        return round((bounded + LOG_SNR_BOUND) / (2 * LOG_SNR_BOUND) * 2**self.depth)

    def _clock(self, cell: int) -> float:
        return math.exp(2 * (2 * LOG_SNR_BOUND * cell / 2**self.depth - LOG_SNR_BOUND))

    def _value(self, cell: int, x: Tensor) -> Tensor:
        """``W`` at a point."""
        low, high = 0, 2**self.depth
        if low not in self._known:
            self._known[low] = x.new_zeros(x.shape)
        if high not in self._known:
            self._known[high] = self._rng(high).normal_like(x) * math.sqrt(self._clock(high) - self._clock(low))
        while cell not in self._known or low == high:
            middle = (low + high) // 2
            if middle not in self._known:
                self._known[middle] = self._bridge(low, middle, high, x)
            low, high = (low, middle) if cell <= middle else (middle, high)
        return self._known[cell]

    def _bridge(self, low: int, middle: int, high: int, x: Tensor) -> Tensor:
        before, here, after = self._clock(low), self._clock(middle), self._clock(high)
        share = (here - before) / (after - before)
        sd = math.sqrt((after - here) * share)
        return (
            (self._rng(middle).normal_like(x) * sd)
            .add_(self._known[low], alpha=1 - share)
            .add_(self._known[high], alpha=share)
        )

    def _forget(self, *cells: int) -> None:
        """Keep the points on the way to the given ones."""
        kept = {0, 2**self.depth, *cells}
        for cell in cells:
            low, high = 0, 2**self.depth
            while high - low > 1:
                middle = (low + high) // 2
                kept.add(middle)
                low, high = (low, middle) if cell <= middle else (middle, high)
        self._known = {cell: value for cell, value in self._known.items() if cell in kept}
