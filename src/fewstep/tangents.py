"""Directional derivatives of networks in state and time, for the continuous-time losses.

:func:`tangent` is one forward-mode pass (``torch.func.jvp``); :func:`finite_difference` is its slow readable twin, for
networks whose attention kernels have no forward-mode rule and as the test of the other.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Field = Callable[[Tensor, Tensor], Tensor]  # (x [B, ...], t [B]) -> [B, ...]


def tangent(field: Field, x: Tensor, t: Tensor, dx: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """``(F(x, t), dF(x, t)[dx, dt])`` in one pass, without a graph."""
    with torch.no_grad():
        value, slope = torch.func.jvp(field, (x, t), (dx, dt))  # type: ignore[misc]
    return value, slope


def finite_difference(
    field: Field, x: Tensor, t: Tensor, dx: Tensor, dt: Tensor, step: float = 1e-4
) -> tuple[Tensor, Tensor]:
    """The same by central differences: three calls, error O(step^2) plus rounding / step."""
    with torch.no_grad():
        ahead = field(x + step * dx, t + step * dt)
        behind = field(x - step * dx, t - step * dt)
        return field(x, t), (ahead - behind) / (2 * step)
