"""Attention with derivatives in both directions: one operation that networks call, whatever is asked of it.

:func:`attend` is softmax attention.  Without tangents it is PyTorch's own fused kernel; under a forward-mode
derivative, for which that kernel has no rule, it is one of three::

    plain     the scores written out [M, N], in ordinary operations: the reference, and the fastest for few tokens
    blocked   a tile of the scores at a time: memory linear in the tokens, on any device
    triton    the same on a GPU (:mod:`~fewstep.networks.attention_triton`)

With scores ``S = a q k^T + mask`` and ``P = softmax(S)``, and a dot for a tangent (Lu & Song 2024, section 4.2)::

    o = P v,   L = logsumexp(S)
    S. = a (q. k^T + q k.^T)
    o. = P v. + (P * S.) v - mu o,   L. = mu = rowsum(P * S.)

Nothing of size ``[M, N]`` is kept but the tile at hand, because ``P = exp(S - L)``.  The backward pass is that of
FlashAttention-2 (Dao 2023).  Where a part of the keys is seen at a time (another process holds the rest),
:func:`merge_shards` puts the results of the parts together, their tangents too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import scaled_dot_product_attention

from fewstep.networks import attention_blocked

Kernel = Literal["auto", "plain", "blocked", "triton"]
KERNELS = ("auto", "plain", "blocked", "triton")

#: Scores a head above which "auto" leaves the written-out form (see benchmarks/attention.py).
PLAIN_SCORES = 128 * 128


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, scale: float | None = None, kernel: Kernel = "auto"
) -> Tensor:
    """``softmax(scale q k^T + mask) v``: ``[..., M, d]``, ``[..., N, d]`` and ``[..., N, dv]`` to ``[..., M, dv]``.

    Heads are among the leading dimensions.  Those of q and of k, v are equal, but for the last one: where q has a
    multiple of the heads of k and v, so many neighbouring heads share one (grouped queries).  ``scale`` is
    ``1 / sqrt(d)`` where it is None.  ``mask`` can be broadcast to ``[..., M, N]``: booleans say what is seen, numbers
    are added to the scores (minus infinity: not seen); a query that sees nothing gets zeros.  It is a constant, but
    for "plain", which differentiates it too, and "auto", which takes "plain" for a mask that wants a gradient.

    The result has the type of q; half precision is computed in float32, and under autocast all three are cast first.

    "plain" and "blocked" have derivatives in both directions and of any order; the second derivative of the fused
    kernel that "auto" takes for many tokens without tangents is missing in PyTorch.  ValueError for shapes, types and
    kernels that do not fit.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel={kernel!r}: one of {', '.join(KERNELS)}")
    q, k, v = in_one_type(q, k, v)
    check_shapes(q, k, v, mask)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    shape = q.shape[:-1]
    q, mask = folded_heads(q, k, mask)
    chosen = choose(q, k, v, mask) if kernel == "auto" else kernel
    if chosen == "fused":
        out = fused(q, k, v, mask, scale)
    elif chosen == "plain":
        out = plain(q, k, v, mask, scale)
    else:
        out = shard(q, k, v, mask, scale, chosen).out.to(q.dtype)
    return out.reshape(*shape, v.shape[-1])


def choose(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str:
    """The kernel that "auto" takes: the fastest that was measured, with memory linear in the tokens for many."""
    learned = mask is not None and mask.requires_grad and torch.is_grad_enabled()
    if learned or q.shape[-2] * k.shape[-2] <= PLAIN_SCORES:
        return "plain"
    if not any(has_tangent(part) for part in (q, k, v)):
        return "fused"
    if q.is_cuda and find_spec("triton") is not None:
        from fewstep.networks import attention_triton

        if attention_triton.fits(q, v, mask) and attention_triton.agrees(q.device, q.dtype, q.shape[-1], v.shape[-1]):
            return "triton"
    return "blocked"


def has_tangent(x: Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The definition, in ordinary operations."""
    kind = torch.promote_types(q.dtype, torch.float32)
    with attention_blocked.full_precision(q):
        scores = q.to(kind) @ k.to(kind).transpose(-1, -2) * scale
        if mask is None:
            return (scores.softmax(-1) @ v.to(kind)).to(q.dtype)
        if mask.dtype == torch.bool:
            blind = ~mask.any(-1, keepdim=True)
            scores = scores.masked_fill(~(mask | blind), -math.inf)
        else:
            blind = (mask == -math.inf).all(-1, keepdim=True)
            scores = scores + mask.to(kind).masked_fill(blind, 0.0)
        return (scores.softmax(-1).masked_fill(blind, 0.0) @ v.to(kind)).to(q.dtype)


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """PyTorch's own, whose kernels with linear memory want four dimensions."""
    if mask is not None:
        mask = mask if mask.dtype == torch.bool else mask.to(q.dtype)
        mask = in_four(mask if q.ndim <= 4 else mask.expand(*q.shape[:-1], k.shape[-2]))
    return scaled_dot_product_attention(in_four(q), in_four(k), in_four(v), attn_mask=mask, scale=scale)


def in_four(x: Tensor) -> Tensor:
    """``x`` in four dimensions."""
    return x.flatten(0, -4) if x.ndim > 4 else x[(None,) * (4 - x.ndim)]


class Shard(NamedTuple):
    """What attention to a part of the keys gives: ``out`` ``[..., M, dv]`` and the ``logsumexp`` ``[..., M]`` of the
    scores, both in float32 at least; a query that sees none of them has zeros and minus infinity."""

    out: Tensor
    logsumexp: Tensor


def attend_shard(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    kernel: Literal["blocked", "triton"] = "blocked",
    block: tuple[int, int] | None = None,
) -> Shard:
    """Attention to some of the keys, as :func:`merge_shards` takes it; arguments as for :func:`attend`, and ``block``,
    how many queries and keys a tile of "blocked" has (None: as many as are fast).  Both results have derivatives in
    both directions."""
    if kernel not in ("blocked", "triton"):
        raise ValueError(f"kernel={kernel!r}: one of blocked, triton")
    if block is not None and min(block) < 1:
        raise ValueError(f"block={block}: at least one query and one key")
    q, k, v = in_one_type(q, k, v)
    check_shapes(q, k, v, mask)
    shape = q.shape[:-1]
    q, mask = folded_heads(q, k, mask)
    out, sums = shard(q, k, v, mask, 1 / math.sqrt(q.shape[-1]) if scale is None else scale, kernel, block)
    return Shard(out.reshape(*shape, v.shape[-1]), sums.reshape(shape))


def merge_shards(shards: Sequence[Shard], tangents: Sequence[Shard] | None = None) -> tuple[Shard, Shard | None]:
    """Attention to all keys from attention to its parts, and the same for tangents ``(o., mu)`` of the parts::

        L = logsumexp_k L_k,   w_k = exp(L_k - L),   o = sum_k w_k o_k
        mu = sum_k w_k mu_k,   o. = sum_k w_k (o._k + (mu_k - mu) o_k)

    Tangents are given like this where they come as tensors, from another process; those that PyTorch carries itself
    need no mention.  ValueError without a part, or where some parts have no tangent.
    """
    if not shards:
        raise ValueError("merge_shards: no shard was given")
    if tangents is not None and len(tangents) != len(shards):
        raise ValueError(f"merge_shards: {len(tangents)} tangents for {len(shards)} shards; one each")
    outs, sums = (torch.stack(parts) for parts in zip(*shards, strict=True))
    top = sums.amax(0)
    top = torch.where(top == -math.inf, 0.0, top).detach()
    weights = (sums - top).exp()
    total = weights.sum(0)
    blind = total == 0
    total = torch.where(blind, 1.0, total)
    weights = weights / total
    whole = Shard((weights[..., None] * outs).sum(0), torch.where(blind, -math.inf, top + total.log()))
    if tangents is None:
        return whole, None
    slopes, means = (torch.stack(parts) for parts in zip(*tangents, strict=True))
    mean = (weights * means).sum(0)
    slope = (weights[..., None] * (slopes + (means - mean)[..., None] * outs)).sum(0)
    return whole, Shard(slope, mean)


def in_one_type(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three in the type that autocast asks for; ValueError where they differ without."""
    kind = q.device.type
    if torch.is_autocast_enabled(kind) and q.dtype != torch.float64:
        q, k, v = (part.to(torch.get_autocast_dtype(kind)) for part in (q, k, v))
    if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
        raise ValueError(f"attend: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; they must be of one floating type")
    return q, k, v


def check_shapes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    """ValueError where queries, keys, values and mask do not belong together."""
    fit = min(q.ndim, k.ndim, v.ndim) >= 2 and q.shape[-1] == k.shape[-1] and k.shape[:-1] == v.shape[:-1]
    if not fit or k.shape[-2] < 1:
        raise ValueError(f"attend: {sizes(q, k, v)}; [..., M, d], [..., N, d] and [..., N, dv] are wanted, N > 0")
    if q.shape[:-2] != k.shape[:-2]:
        grouped = q.ndim == k.ndim > 2 and q.shape[:-3] == k.shape[:-3] and k.shape[-3] > 0
        if not grouped or q.shape[-3] % k.shape[-3]:
            raise ValueError(
                f"attend: {sizes(q, k, v)}; leading dimensions must be equal, or the heads of q a multiple of k's"
            )
    if mask is not None:
        wanted = (*q.shape[:-1], k.shape[-2])
        pairs = zip(reversed(mask.shape), reversed(wanted), strict=False)
        if mask.ndim > len(wanted) or any(m not in (1, w) for m, w in pairs):
            raise ValueError(f"attend: mask {list(mask.shape)} cannot be broadcast to {list(wanted)}")


def sizes(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"


def folded_heads(q: Tensor, k: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Heads of q that share a head of k as further queries of that head, so that keys need not be copied."""
    if q.shape[:-2] == k.shape[:-2]:
        return q, mask
    heads = k.shape[-3]
    if mask is not None:
        mask = mask.expand(*q.shape[:-1], k.shape[-2]).unflatten(-3, (heads, -1)).flatten(-3, -2)
    return q.unflatten(-3, (heads, -1)).flatten(-3, -2), mask


def shard(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, kernel: str,
    block: tuple[int, int] | None = None,
) -> Shard:  # fmt: skip
    if mask is not None:
        if mask.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"kernel={kernel!r}: the mask wants a gradient, which only kernel='plain' gives it")
        mask = mask[(None,) * (q.ndim - mask.ndim)]
    return Shard(*Attention.apply(q, k, v, mask, scale, kernel, block or attention_blocked.block_for(q)))


#: q, k, v, mask, out, logsumexp
Saved = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]


class Attention(torch.autograd.Function):
    """``(out, logsumexp)`` of folded heads, with its rules; ``q``, ``k`` and ``v`` have equal leading dimensions and
    ``mask`` has as many dimensions as they."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, kernel: str, block: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        if kernel == "triton":
            from fewstep.networks import attention_triton

            return attention_triton.value(q, k, v, mask, scale)
        return attention_blocked.value(q, k, v, mask, scale, block)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, mask, ctx.scale, ctx.kernel, ctx.block = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, mask, *output)
        ctx.save_for_forward(q, k, v, mask, *output)

    @staticmethod
    def jvp(ctx: Any, tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, tm: Tensor | None, *_: Any) -> Any:
        if tm is not None:
            raise ValueError(f"kernel={ctx.kernel!r}: the mask has a tangent, which only kernel='plain' looks at")
        saved: Saved = ctx.saved_tensors
        if ctx.kernel == "triton":
            from fewstep.networks import attention_triton

            return attention_triton.slope(*saved, tq, tk, tv, ctx.scale)
        return attention_blocked.slope(*saved, tq, tk, tv, ctx.scale, ctx.block)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_sums: Tensor | None) -> Any:
        saved: Saved = ctx.saved_tensors
        slopes = attention_blocked.gradients(*saved, d_out, d_sums, ctx.scale, ctx.block)
        return *slopes, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        """One more leading dimension."""
        q, k, v, mask = (lead(x, dim) for x, dim in zip(inputs[:4], in_dims, strict=False))
        q, k, v = (x.expand(info.batch_size, *x.shape[1:]) for x in (q, k, v))
        return Attention.apply(q, k, v, mask, *inputs[4:]), (0, 0)


def lead(x: Any, dim: int | None) -> Any:
    """``x`` with its mapped dimension first, or one of size 1; None stays."""
    return None if x is None else x[None] if dim is None else x.movedim(dim, 0)
