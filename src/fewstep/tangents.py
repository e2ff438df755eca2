"""Directional derivatives of networks in state and time, for the continuous-time losses.

:func:`tangent` is one forward-mode pass (``torch.func.jvp``); :func:`finite_difference` is its slow readable twin, for
networks that have no forward-mode rule and as the test of the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import group_norm, layer_norm
from torch.overrides import TorchFunctionMode

Field = Callable[[Tensor, Tensor], Tensor]  # (x [B, ...], t [B]) -> [B, ...]


class PlainNorms(TorchFunctionMode):
    """Norms see a contiguous float32 input, and give back the type that they were given.

    PyTorch's kernels compute in float32 too, but their forward-mode rules fail for other layouts, and under autocast,
    where weights are float32, give a tangent in float32 to a value in half precision, which the next layer refuses.
    """

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in (group_norm, layer_norm):
            return func(*args, **(kwargs or {}))
        x, *rest = args
        kind = torch.promote_types(x.dtype, torch.float32)
        plain = x.to(kind).clone(memory_format=torch.contiguous_format)
        return func(plain, *rest, **(kwargs or {})).to(x.dtype)


def tangent(field: Field, x: Tensor, t: Tensor, dx: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """``(F(x, t), dF(x, t)[dx, dt])`` in one pass, without a graph.

    Attention is written out meanwhile: PyTorch's fused kernels have no forward-mode rule.
    """
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), PlainNorms():
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
