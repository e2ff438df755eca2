"""How fast a discrete chain forgets: the share of untouched tokens over time.

A continuous-time chain replaces every token independently at the rate ``sigma(t)``.  Up to time ``t`` the total noise
is ``sbar(t)``, the integral of the rate, and a token has been left alone with probability ``keep(t) = exp(-sbar(t))``.
Time runs from data (0) to noise (1).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


def _open_unit(cls: type, **values: float) -> None:
    for name, value in values.items():
        if not 0 < value < 1:
            raise ValueError(f"{cls.__name__}: {name}={value:g} must lie in (0, 1)")


@dataclass(frozen=True)
class TotalNoise(ABC):
    """Frozen and stateless; all functions take float64 times of any shape, return the same shape and are
    differentiable in them.  There is no noise at t = 0."""

    @abstractmethod
    def keep(self, t: Tensor) -> Tensor:
        """``exp(-sbar(t))``, the probability that a token is untouched at time ``t``; falls in ``t``."""

    @abstractmethod
    def rate(self, t: Tensor) -> Tensor:
        """``sigma(t) = d sbar / dt = -keep'(t) / keep(t)``."""

    @abstractmethod
    def time_at(self, keep: Tensor) -> Tensor:
        """Inverse of :meth:`keep`."""

    def total(self, t: Tensor) -> Tensor:
        """``sbar(t)``."""
        return -self.keep(t).log()


@dataclass(frozen=True)
class LogLinear(TotalNoise):
    """``keep = 1 - (1 - rest) t``: as many tokens are touched in every stretch of time.

    ``rest`` is the share that is still untouched at t = 1 (Lou et al. 2023, "SEDD", use 1e-3).
    """

    rest: float = 1e-3

    def __post_init__(self) -> None:
        _open_unit(type(self), rest=self.rest)

    def keep(self, t: Tensor) -> Tensor:
        return 1 - (1 - self.rest) * t

    def rate(self, t: Tensor) -> Tensor:
        return (1 - self.rest) / self.keep(t)

    def time_at(self, keep: Tensor) -> Tensor:
        return (1 - keep) / (1 - self.rest)


@dataclass(frozen=True)
class Cosine(TotalNoise):
    """``keep = 1 - (1 - rest) (1 - cos(pi t / 2))``: few tokens are touched near the data (after MaskGIT's schedule,
    Chang et al. 2022)."""

    rest: float = 1e-3

    def __post_init__(self) -> None:
        _open_unit(type(self), rest=self.rest)

    def keep(self, t: Tensor) -> Tensor:
        return self.rest + (1 - self.rest) * torch.cos(math.pi / 2 * t)

    def rate(self, t: Tensor) -> Tensor:
        return (1 - self.rest) * math.pi / 2 * torch.sin(math.pi / 2 * t) / self.keep(t)

    def time_at(self, keep: Tensor) -> Tensor:
        return torch.acos(((keep - self.rest) / (1 - self.rest)).clamp(-1, 1)) * 2 / math.pi


@dataclass(frozen=True)
class Geometric(TotalNoise):
    """``sbar = low^(1 - t) high^t - low`` (Lou et al. 2023, who leave the total noise at ``low`` for t = 0)."""

    low: float = 1e-3
    high: float = 7.0

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high < math.inf:
            raise ValueError(f"Geometric: need 0 < low < high, got low={self.low:g} and high={self.high:g}")

    def total(self, t: Tensor) -> Tensor:
        return self.low * torch.expm1(math.log(self.high / self.low) * t)

    def keep(self, t: Tensor) -> Tensor:
        return torch.exp(-self.total(t))

    def rate(self, t: Tensor) -> Tensor:
        return math.log(self.high / self.low) * (self.total(t) + self.low)

    def time_at(self, keep: Tensor) -> Tensor:
        return torch.log1p(-keep.log() / self.low) / math.log(self.high / self.low)


NOISES: dict[str, type[TotalNoise]] = {cls.__name__: cls for cls in (LogLinear, Cosine, Geometric)}
