"""Directional derivatives of networks in state and time, for the continuous-time losses.

:func:`tangent` is one forward-mode pass; :func:`finite_difference` is its slow readable twin, for networks that have no
forward-mode rule and as the test of the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import group_norm, layer_norm, linear, rms_norm, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from fewstep.networks.attention import attend
from fewstep.randomness import repeated_draws
from fewstep.schedules import align

Field = Callable[[Tensor, Tensor], Tensor]  # (x [B, ...], t [B]) -> [B, ...]

#: Every kernel that PyTorch has for attention.
ALL_KERNELS = [
    SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH,
]  # fmt: skip


#: The arithmetic of two, by all names that it is called by, and whether they name the second first.
ARITHMETIC: dict[Any, tuple[Callable[[Any, Any], Tensor], bool]] = {
    func: (operation, swapped)
    for operation, plain, other in (
        (torch.add, (Tensor.add, Tensor.__add__), (Tensor.__radd__,)),
        (torch.sub, (Tensor.sub, Tensor.__sub__), (Tensor.__rsub__, torch.rsub)),
        (torch.mul, (Tensor.mul, Tensor.__mul__), (Tensor.__rmul__,)),
        (torch.div, (Tensor.div, Tensor.__truediv__), (Tensor.__rtruediv__,)),
    )
    for func, swapped in ((operation, False), *((f, False) for f in plain), *((f, True) for f in other))
}


class ForwardRules(TorchFunctionMode):
    """Forward-mode rules that PyTorch's own operations have not, or have slowly, whoever calls them.

    * Attention goes through :func:`~fewstep.networks.attention.attend`, whose memory is linear in the tokens; with
      dropout inside, which PyTorch writes out itself, it is not.
    * Norms are :func:`normalized`: PyTorch's rules for them take 10 to 30 times as long as the norm itself, fail for
      layouts that are not contiguous, and under autocast give a tangent in float32 to a value in half precision.
    * Linear layers, and sums and products of one that has a tangent and one that has not: PyTorch makes a zero for the
      other and finds out in Python what the product of that zero looks like, 0.1 to 0.4 ms an operation.
    """

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            return attention(*args, **kwargs)
        made = None
        if func in ARITHMETIC and len(args) == 2 and not kwargs:
            operation, swapped = ARITHMETIC[func]
            made = arithmetic(operation, *(reversed(args) if swapped else args))
        elif func in RULES and args and is_plain(args[0]):
            made = RULES[func](*args, **kwargs)
        return func(*args, **kwargs) if made is None else made


def arithmetic(operation: Callable[[Any, Any], Tensor], a: Any, b: Any) -> Tensor | None:
    """A sum, difference, product or quotient in which one of two has a tangent; None where both have, or none."""
    if not (is_plain(a) and is_plain(b)):
        return None
    (a, da), (b, db) = unpacked(a), unpacked(b)
    if (da is None) == (db is None):
        return None
    value = operation(a, b)
    moved: Tensor = da if db is None else db
    if operation in (torch.add, torch.sub):
        slope = -moved if db is not None and operation is torch.sub else moved
    elif operation is torch.mul:
        slope = moved * (b if db is None else a)
    else:
        slope = moved / b if db is None else -value * moved / b
    return forward_ad.make_dual(value, slope.to(value.dtype).expand(value.shape))


def is_plain(x: Any) -> TypeGuard[Tensor | float]:
    """Whether it is a number or a tensor of no special kind."""
    return type(x) in (Tensor, nn.Parameter, float, int)


def unpacked(x: Tensor | float | None) -> tuple[Any, Any]:
    """A value and its tangent, None where it has none, as numbers and parameters (a dual one is a plain tensor)."""
    return forward_ad.unpack_dual(x) if isinstance(x, Tensor) and type(x) is not nn.Parameter else (x, None)


def multiplied(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """A linear layer whose weights have no tangent; None where they have, or where nothing has."""
    x, dx = unpacked(x)
    if dx is None or has_tangent(weight, bias):
        return None
    return forward_ad.make_dual(linear(x, weight, bias), linear(dx, weight))


def grouped(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor | None:
    """PyTorch's ``group_norm``."""
    channels = None if weight is None else weight.view(-1, *[1] * (x.ndim - 2))
    return normalized(
        lambda plain: group_norm(plain, num_groups, weight, bias, eps), x, (len(x), num_groups, -1), channels, bias, eps
    )


def layered(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    """PyTorch's ``layer_norm``."""
    rows = (*x.shape[: x.ndim - len(normalized_shape)], -1)
    return normalized(lambda plain: layer_norm(plain, normalized_shape, weight, bias, eps), x, rows, weight, bias, eps)


def root_mean_squared(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor | None:
    """PyTorch's ``rms_norm``."""
    rows = (*x.shape[: x.ndim - len(normalized_shape)], -1)
    least = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps if eps is None else eps
    return normalized(
        lambda plain: rms_norm(plain, normalized_shape, weight, eps), x, rows, weight, None, least, centred=False
    )


def normalized(
    norm: Callable[[Tensor], Tensor], x: Tensor, rows: Sequence[int], weight: Tensor | None, bias: Tensor | None,
    eps: float, centred: bool = True,
) -> Tensor | None:  # fmt: skip
    """A norm over the last axis of ``x`` seen as ``rows``, times ``weight``: with ``h`` and ``d`` the input and its
    tangent, both without their mean where ``centred``, and ``r = (mean h^2 + eps)^(-1/2)``, the tangent is ``weight r
    (d - h r^2 mean(h d))``.  In float32 at least; None where there is no tangent, or the weights have one."""
    x, dx = unpacked(x)
    if dx is None or has_tangent(weight, bias):
        return None
    kind = torch.promote_types(x.dtype, torch.float32)
    plain = x.to(kind, memory_format=torch.contiguous_format)
    h, d = plain.reshape(rows), dx.to(kind).reshape(rows)
    if centred:
        h, d = h - h.mean(-1, keepdim=True), d - d.mean(-1, keepdim=True)
    r = (h.square().mean(-1, keepdim=True) + eps).rsqrt()
    slope = torch.addcmul(d, h, r.square() * (h * d).mean(-1, keepdim=True), value=-1).mul_(r).view(x.shape)
    scaled = slope if weight is None else slope.mul_(weight)
    return forward_ad.make_dual(norm(plain).to(x.dtype), scaled.to(x.dtype))


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether one of them has a tangent."""
    return any(unpacked(x)[1] is not None for x in tensors)


#: Functions with a rule of their own; a rule gives None where it has nothing to say.
RULES: dict[Any, Callable[..., Tensor | None]] = {
    linear: multiplied,
    group_norm: grouped,
    layer_norm: layered,
    rms_norm: root_mean_squared,
}


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

    What hides a fused kernel from :class:`ForwardRules`, as ``nn.MultiheadAttention`` does, is written out by PyTorch.
    """
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        value, slope = forward(field, (x, t), (dx, dt))
    return value, slope


def forward(function: Callable[..., Any], at: Sequence[Tensor], along: Sequence[Tensor]) -> tuple[Any, Any]:
    """``(f(at), df(at)[along])`` for a function that gives a tensor or a tuple of them, without a graph.

    What ``torch.func.jvp`` gives, by dual numbers under :class:`ForwardRules`, which cost less on small tensors.  It
    cannot be used inside itself; where nothing depends on ``at`` the derivative is zeros.
    """
    with torch.no_grad(), forward_ad.dual_level(), ForwardRules():
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


def semi_continuous(
    field: Field, x: Tensor, t: Tensor, dx: Tensor, dt: Tensor, step: float = 1e-4
) -> tuple[Tensor, Tensor]:
    """The same, exact in ``x`` and by the difference to the time ``step`` earlier in ``t``: a pass and a call, for
    networks whose way from the time to the features has no digits, or no rule, for a derivative (rCM)."""
    with torch.no_grad():
        with repeated_draws(x.device):
            value, slope = tangent(field, x, t, dx, torch.zeros_like(dt))
        earlier = field(x, t - step)
        return value, slope + align(dt / step, x) * (value - earlier)
