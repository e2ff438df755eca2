"""A trained table of noise levels as a schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from fewstep.schedules import Earliest, Latest, Schedule


@dataclass(frozen=True)
class DiscreteVP(Schedule):
    """A trained table of N noise levels (DDPM, Stable Diffusion), read as a continuous schedule.

    Time is the integer step index, ``0 .. N-1``, and log alpha is linear in between, so at integer times the
    coefficients are those of the table exactly.  Derivatives are those of the interpolation.
    """

    few_steps: ClassVar[str] = "trailing"

    alphas_cumprod: Annotated[tuple[float, ...], "alpha squared at every step"] = ()
    t_min: Earliest = 0.0
    t_max: Latest = 0.0  # filled in from the table

    linear_betas: ClassVar[tuple[float, float]] = (1e-4, 2e-2)

    def __post_init__(self) -> None:
        table = self.alphas_cumprod
        if len(table) < 2 or any(not 0 < b < a < 1 for a, b in pairwise(table)):
            raise ValueError("DiscreteVP: alphas_cumprod must be at least two values, strictly decreasing, in (0, 1)")
        if not self.t_max:
            object.__setattr__(self, "t_max", float(len(table) - 1))
        super().__post_init__()

    @classmethod
    def from_betas(cls, betas: Sequence[float] | Tensor) -> DiscreteVP:
        """From the betas of a DDPM, each in (0, 1)."""
        kept = 1 - torch.as_tensor(betas, dtype=torch.float64)
        return cls(alphas_cumprod=tuple(kept.cumprod(0).tolist()))

    @classmethod
    def linear(cls, n: int = 1000) -> DiscreteVP:
        """DDPM's linear betas."""
        first, last = cls.linear_betas
        return cls.from_betas(torch.linspace(first, last, n, dtype=torch.float64))

    @classmethod
    def scaled_linear(cls, n: int = 1000, first: float = 0.00085, last: float = 0.012) -> DiscreteVP:
        """Stable Diffusion's betas: linear in their square root."""
        return cls.from_betas(torch.linspace(first**0.5, last**0.5, n, dtype=torch.float64) ** 2)

    @classmethod
    def cosine(cls, n: int = 1000, max_beta: float = 0.999) -> DiscreteVP:
        """Nichol & Dhariwal's cosine table, betas capped at ``max_beta``."""
        u = torch.linspace(0, 1, n + 1, dtype=torch.float64)
        bar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        return cls.from_betas((1 - bar[1:] / bar[:-1]).clamp_max(max_beta))

    @property
    def table_length(self) -> int:
        return len(self.alphas_cumprod)

    @cached_property
    def _log_alphas(self) -> Tensor:
        return torch.tensor(self.alphas_cumprod, dtype=torch.float64).log() / 2

    @cached_property
    def _tables(self) -> dict[torch.device, Tensor]:
        return {}

    def _table(self, device: torch.device) -> Tensor:
        """Log alpha at every step, copied to a device once."""
        if device not in self._tables:
            self._tables[device] = self._log_alphas.to(device)
        return self._tables[device]

    def _segment(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Log alpha and its slope at ``t``."""
        table = self._table(t.device)
        left = t.detach().floor().long().clamp(0, len(table) - 2)
        slope = table[left + 1] - table[left]
        return table[left] + (t - left) * slope, slope

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(self._segment(t)[0])

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(2 * self._segment(t)[0]))

    def d_alpha(self, t: Tensor) -> Tensor:
        log_alpha, slope = self._segment(t)
        return slope * torch.exp(log_alpha)

    def d_sigma(self, t: Tensor) -> Tensor:
        log_alpha, slope = self._segment(t)
        return -slope * torch.exp(2 * log_alpha) / torch.sqrt(-torch.expm1(2 * log_alpha))

    def time_at(self, log_snr: Tensor) -> Tensor:
        log_alpha = -torch.nn.functional.softplus(-2 * log_snr) / 2
        table = self._table(log_snr.device)
        right = torch.searchsorted(-table, -log_alpha.detach().contiguous()).clamp(1, len(table) - 1)
        left = right - 1
        t = left + (log_alpha - table[left]) / (table[right] - table[left])
        return t.clamp(self.t_min, self.t_max)
