"""Distances between pictures, one number per sample; a perceptual one can be passed wherever these go."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Distance = Callable[[Tensor, Tensor], Tensor]  # two [B, ...] -> [B]


def l2(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference."""
    return (a - b).square().flatten(1).mean(1)


def l1(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference."""
    return (a - b).abs().flatten(1).mean(1)


def pseudo_huber(a: Tensor, b: Tensor) -> Tensor:
    """``sqrt(||a - b||^2 + c^2) - c`` over the whole sample, ``c = 0.00054 sqrt(d)`` (Song & Dhariwal 2023, eq. 7)."""
    difference = (a - b).flatten(1)
    c = 0.00054 * difference.shape[1] ** 0.5
    return (difference.square().sum(1) + c**2).sqrt() - c


DISTANCES: dict[str, Distance] = {"l2": l2, "l1": l1, "pseudo-huber": pseudo_huber}
