"""Directional derivatives of networks in state and time, for the continuous-time losses.

:func:`tangent` is one forward-mode pass; :func:`finite_difference` is its slow readable twin, for networks that have no
forward-mode rule and as the test of the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import group_norm, layer_norm, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from fewstep.networks.attention import attend

Field = Callable[[Tensor, Tensor], Tensor]  # (x [B, ...], t [B]) -> [B, ...]

#: Every kernel that PyTorch has for attention.
ALL_KERNELS = [
    SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH,
]  # fmt: skip


class ForwardRules(TorchFunctionMode):
    """Attention and norms with the forward-mode rules that PyTorch's own have not, whoever calls them.

    Attention goes through :func:`~fewstep.networks.attention.attend`, whose memory is linear in the tokens; with
    dropout inside, which PyTorch writes out itself, it is not.

    Norms see a contiguous float32 input, and give back the type that they were given.  PyTorch's kernels compute in
    float32 too, but their forward-mode rules fail for other layouts, and under autocast, where weights are float32,
    give a tangent in float32 to a value in half precision, which the next layer refuses.
    """

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            return attention(*args, **kwargs)
        if func not in (group_norm, layer_norm):
            return func(*args, **kwargs)
        x, *rest = args
        kind = torch.promote_types(x.dtype, torch.float32)
        plain = x.to(kind).clone(memory_format=torch.contiguous_format)
        return func(plain, *rest, **kwargs).to(x.dtype)


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """PyTorch's ``scaled_dot_product_attention`` by :func:`~fewstep.networks.attention.attend`."""
    if dropout_p > 0:
        return scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    leading = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    q, k, v = (x.expand(*leading, *x.shape[-3:]) for x in (query, key, value))
    with sdpa_kernel(ALL_KERNELS):  # where nothing has a tangent
        return attend(q, k, v, attn_mask, scale=scale)


def tangent(field: Field, x: Tensor, t: Tensor, dx: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """``(F(x, t), dF(x, t)[dx, dt])`` in one pass, without a graph.

    Attention and norms follow :class:`ForwardRules` meanwhile; what hides a fused kernel from them, as
    ``nn.MultiheadAttention`` does, is written out by PyTorch.
    """
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), ForwardRules():
        value, slope = forward(field, (x, t), (dx, dt))
    return value, slope


def forward(function: Callable[..., Any], at: Sequence[Tensor], along: Sequence[Tensor]) -> tuple[Any, Any]:
    """``(f(at), df(at)[along])`` for a function that gives a tensor or a tuple of them, without a graph.

    What ``torch.func.jvp`` gives, by dual numbers alone: its layers cost a third more on small tensors.  It cannot be
    used inside itself; where nothing depends on ``at`` the derivative is zeros.
    """
    with torch.no_grad(), forward_ad.dual_level():
        made = function(*(forward_ad.make_dual(x, dx) for x, dx in zip(at, along, strict=True)))
        several = isinstance(made, tuple)
        pairs = [forward_ad.unpack_dual(part) for part in (made if several else (made,))]
    values = tuple(pair.primal for pair in pairs)
    slopes = tuple(torch.zeros_like(pair.primal) if pair.tangent is None else pair.tangent for pair in pairs)
    return (values, slopes) if several else (values[0], slopes[0])


def finite_difference(
    field: Field, x: Tensor, t: Tensor, dx: Tensor, dt: Tensor, step: float = 1e-4
) -> tuple[Tensor, Tensor]:
    """The same by central differences: three calls, error O(step^2) plus rounding / step."""
    with torch.no_grad():
        ahead = field(x + step * dx, t + step * dt)
        behind = field(x - step * dx, t - step * dt)
        return field(x, t), (ahead - behind) / (2 * step)
