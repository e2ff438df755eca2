"""How much of the past a moving average of weights holds after ``n`` updates.

The power-function profile of EDM2 (Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion
Models", section 3) weighs the weights at time ``tau`` by ``tau ** gamma``: its width is a constant share ``sigma_rel``
of the run, so that one setting fits a run of a hundred steps and one of a million.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from fewstep.values import Written, as_words, check, read


@dataclass(frozen=True)
class Profile(Written):
    """``ema <- decay(n) ema + (1 - decay(n)) weights`` at the n-th update, n = 1, 2, ...; written ``0.1`` for
    :class:`Power`, ``half-life:1000`` for :class:`HalfLife`."""

    shown: ClassVar[str] = "X"

    @classmethod
    def parse(cls, text: str) -> Profile:
        name, colon, number = text.partition(":")
        return HalfLife(read(float, number)) if colon and name == "half-life" else Power(read(float, text))

    @classmethod
    def from_plain(cls, value: Any) -> Profile:
        return cls.parse(value) if isinstance(value, str) else Power(check(float, value))

    @property
    def width(self) -> float | None:
        """Its relative width, the same in runs of every length; None for a profile that has none."""
        return None

    @abstractmethod
    def decay(self, n: int) -> float:
        """The share of the old average that is kept at update ``n``; 0 at the first."""


@dataclass(frozen=True)
class Power(Profile):
    """Power-function profile of relative width ``sigma_rel`` (standard deviation of its weights over the run length,
    in (0, 0.288))."""

    sigma_rel: float = 0.1

    def __post_init__(self) -> None:
        gamma_of(self.sigma_rel)

    @property
    def width(self) -> float:
        return self.sigma_rel

    def __str__(self) -> str:
        return as_words(self.sigma_rel)

    def plain(self) -> float:
        return self.sigma_rel

    def decay(self, n: int) -> float:
        return (1 - 1 / n) ** (gamma_of(self.sigma_rel) + 1)


@dataclass(frozen=True)
class HalfLife(Profile):
    """Exponential profile that halves the past every ``updates`` updates, with a warm-up ``n / 10`` for short runs."""

    updates: float = 1000.0

    def __post_init__(self) -> None:
        if self.updates <= 0:
            raise ValueError(f"HalfLife: updates={self.updates} must be positive")

    def __str__(self) -> str:
        return f"half-life:{as_words(self.updates)}"

    def decay(self, n: int) -> float:
        return 0.0 if n == 1 else 0.5 ** (1 / min(self.updates, n / 10))


@cache
def gamma_of(sigma_rel: float) -> float:
    """The exponent whose profile has width ``sigma_rel``: the positive root of
    ``sigma_rel^2 (gamma + 2)^2 (gamma + 3) = gamma + 1`` (EDM2, equation 123)."""
    if not 0 < sigma_rel < 12**-0.5:
        raise ValueError(f"sigma_rel={sigma_rel} must lie in (0, {12**-0.5:.3f}), the width of a flat average")
    low, high = 0.0, 2.0 / sigma_rel
    for _ in range(200):
        middle = (low + high) / 2
        wide = (middle + 1) / ((middle + 2) ** 2 * (middle + 3)) > sigma_rel**2
        low, high = (middle, high) if wide else (low, middle)
    return (low + high) / 2
