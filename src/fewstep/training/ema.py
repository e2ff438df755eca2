"""Exponential moving averages of weights, several at once, with reconstruction after the fact.

A *profile* says how much of the past an average holds after ``n`` updates.  The power-function profile of EDM2
(Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3) weighs the
weights at time ``tau`` by ``tau ** gamma``: its width is a constant share ``sigma_rel`` of the run, so that one
setting fits a run of a hundred steps and one of a million.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Profile(ABC):
    """``ema <- decay(n) ema + (1 - decay(n)) weights`` at the n-th update, n = 1, 2, ..."""

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

    def decay(self, n: int) -> float:
        return (1 - 1 / n) ** (gamma_of(self.sigma_rel) + 1)


@dataclass(frozen=True)
class HalfLife(Profile):
    """Exponential profile that halves the past every ``updates`` updates, with a warm-up ``n / 10`` for short runs."""

    updates: float = 1000.0

    def __post_init__(self) -> None:
        if self.updates <= 0:
            raise ValueError(f"HalfLife: updates={self.updates} must be positive")

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


class Average:
    """One moving average of a list of tensors, in their type, updated with multi-tensor operations."""

    def __init__(self, profile: Profile, weights: Sequence[Tensor]) -> None:
        self.profile = profile
        self.updates = 0
        self.weights = [w.detach().clone() for w in weights]

    @torch.no_grad()
    def update(self, weights: Sequence[Tensor]) -> None:
        """Take in the weights after an optimiser step."""
        self.updates += 1
        torch._foreach_lerp_(self.weights, list(weights), 1 - self.profile.decay(self.updates))


def profile_overlap(n_a: Tensor, gamma_a: Tensor, n_b: Tensor, gamma_b: Tensor) -> Tensor:
    """Inner product of power profiles ``p(tau) = (gamma + 1) tau^gamma / n^(gamma + 1)`` on ``[0, n]``:
    ``(g_a + 1)(g_b + 1) / (g_a + g_b + 1) * min(n)^(g_a + g_b + 1) / (n_a^(g_a + 1) n_b^(g_b + 1))``."""
    low = torch.minimum(n_a, n_b)
    total = gamma_a + gamma_b + 1
    log = total * low.log() - (gamma_a + 1) * n_a.log() - (gamma_b + 1) * n_b.log()
    return (gamma_a + 1) * (gamma_b + 1) / total * log.exp()


def reconstruct(
    snapshots: Sequence[tuple[int, float, Sequence[Tensor]]], updates: int, sigma_rel: float
) -> list[Tensor]:
    """The average of width ``sigma_rel`` at ``updates``, as the least-squares combination of stored ones.

    ``snapshots`` are ``(updates, sigma_rel, weights)`` of power-function averages saved along the run; only those at
    or before ``updates`` are used.  The combination is solved in profile space (EDM2, section 3.2), in float64, with
    coefficients that sum to 1: the paper's free ones miss 1 by the residual of the fit, which multiplies the weights
    themselves and not only their changes.  ValueError when there is nothing to combine.
    """
    usable = [s for s in snapshots if s[0] <= updates]
    if not usable:
        raise ValueError(f"no snapshot at or before update {updates} to reconstruct an average from")
    n = torch.tensor([float(s[0]) for s in usable], dtype=torch.float64)
    gamma = torch.tensor([gamma_of(s[1]) for s in usable], dtype=torch.float64)
    end, target = torch.tensor([float(updates), gamma_of(sigma_rel)], dtype=torch.float64)
    gram = profile_overlap(n[:, None], gamma[:, None], n[None, :], gamma[None, :])
    right = profile_overlap(n, gamma, end.expand_as(n), target.expand_as(gamma))
    # sum to 1: the last snapshot, plus differences to it
    last = torch.eye(len(usable), dtype=torch.float64)[-1]
    steps = torch.eye(len(usable), dtype=torch.float64)[:, :-1] - last[:, None]
    along = torch.linalg.lstsq(steps.T @ gram @ steps, (steps.T @ (right - gram @ last))[:, None], driver="gelsd")
    mix = last + (steps @ along.solution)[:, 0]
    columns = zip(*(s[2] for s in usable), strict=True)
    return [
        sum((c * w.double() for c, w in zip(mix, column, strict=True)), torch.zeros(())).to(column[0].dtype)
        for column in columns
    ]
