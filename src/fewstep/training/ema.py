"""Exponential moving averages of weights, several at once, with reconstruction after the fact.

How much of the past an average holds is said by its profile (:mod:`fewstep.training.profiles`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.training.profiles import Profile, gamma_of


class Average:
    """One moving average of a list of tensors, in their type, updated with multi-tensor operations."""

    def __init__(self, profile: Profile, weights: Sequence[Tensor]) -> None:
        self.profile = profile
        self.updates = 0
        self.weights = [w.detach().clone() for w in weights]

    @torch.no_grad()
    def update(self, weights: Sequence[Tensor]) -> None:
        """Take in the weights after an optimizer step."""
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
