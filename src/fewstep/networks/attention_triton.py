"""Attention and its tangent as Triton kernels: one pass over the keys each, every product on the tensor cores.

**Not run on a GPU, nor compiled, so far.**  There was none where this was written.  The kernels' arithmetic was run on
a CPU by a stand-in for Triton's language (``tests/exact/test_attention_triton.py``), which says nothing about
compiling, speed or memory.  :func:`agrees` therefore compares them with the tiles of
:mod:`~fewstep.networks.attention_blocked` on a small example, once a process, device, type and size, and "auto" takes
them only where they agree.

Block sizes are chosen to fit the shared memory of small GPUs, not measured.  Masks are not known here; gradients are
those of the tiles.  This module is imported where the kernels are used, because it needs the package triton.
"""

from __future__ import annotations

import math
import warnings
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewstep.networks import attention_blocked

#: Queries and keys of a tile.
ROWS, COLUMNS = 64, 32
#: Bytes of a head's features, above which tiles do not fit.
FEATURE_BYTES = 256
#: How far :func:`agrees` lets the results be from those of the tiles, in units of the type's rounding.
ROUNDINGS = 16


@triton.jit
def tile(x, tokens, features, count, size: tl.constexpr):
    """Rows ``tokens`` of ``[count, size]`` at ``x``, with zeros around."""
    inside = (tokens[:, None] < count) & (features[None, :] < size)
    return tl.load(x + tokens[:, None] * size + features[None, :], mask=inside, other=0.0)


@triton.jit
def value_kernel(
    q, k, v, out, sums, m, n, scale, D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A block of queries of one head: ``q`` ``[heads, m, D]``, ``k`` ``[heads, n, D]``, ``v`` ``[heads, n, DV]``."""
    tiles = tl.cdiv(m, BM)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    rows = (tl.program_id(0) % tiles) * BM + tl.arange(0, BM)
    across, across_v = tl.arange(0, WIDTH), tl.arange(0, WIDTH_V)
    q_i = tile(q + head * m * D, rows, across, m, D)
    best = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    sum_v = tl.zeros([BM, WIDTH_V], tl.float32)
    for start in range(0, n, BN):
        columns = start + tl.arange(0, BN)
        k_j = tile(k + head * n * D, columns, across, n, D)
        v_j = tile(v + head * n * DV, columns, across_v, n, DV)
        s = tl.dot(q_i, tl.trans(k_j), input_precision="ieee") * scale
        s = tl.where(columns[None, :] < n, s, float("-inf"))
        last = best
        best = tl.maximum(best, tl.max(s, 1))
        p = tl.exp(s - best[:, None])
        fade = tl.exp(last - best)
        total = total * fade + tl.sum(p, 1)
        sum_v = sum_v * fade[:, None] + tl.dot(p.to(v_j.dtype), v_j, input_precision="ieee")
    inside = (rows[:, None] < m) & (across_v[None, :] < DV)
    tl.store(out + head * m * DV + rows[:, None] * DV + across_v[None, :], sum_v / total[:, None], mask=inside)
    tl.store(sums + head * m + rows, best + tl.log(total), mask=rows < m)


@triton.jit
def slope_kernel(
    q, k, v, out, sums, tq, tk, tv, slopes, means, m, n, scale, D: tl.constexpr, DV: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HAS_TQ: tl.constexpr, HAS_TK: tl.constexpr, HAS_TV: tl.constexpr,
):  # fmt: skip
    """The tangents of what :func:`value_kernel` made, ``out`` and ``sums``."""
    tiles = tl.cdiv(m, BM)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    rows = (tl.program_id(0) % tiles) * BM + tl.arange(0, BM)
    across, across_v = tl.arange(0, WIDTH), tl.arange(0, WIDTH_V)
    q_i = tile(q + head * m * D, rows, across, m, D)
    if HAS_TQ:
        tq_i = tile(tq + head * m * D, rows, across, m, D)
    level = tl.load(sums + head * m + rows, mask=rows < m, other=0.0)
    mean = tl.zeros([BM], tl.float32)
    slope = tl.zeros([BM, WIDTH_V], tl.float32)
    for start in range(0, n, BN):
        columns = start + tl.arange(0, BN)
        k_j = tile(k + head * n * D, columns, across, n, D)
        s = tl.dot(q_i, tl.trans(k_j), input_precision="ieee") * scale
        p = tl.where(columns[None, :] < n, tl.exp(s - level[:, None]), 0.0)
        if HAS_TV:
            tv_j = tile(tv + head * n * DV, columns, across_v, n, DV)
            slope += tl.dot(p.to(tv_j.dtype), tv_j, input_precision="ieee")
        if HAS_TQ or HAS_TK:
            v_j = tile(v + head * n * DV, columns, across_v, n, DV)
            ts = tl.zeros([BM, BN], tl.float32)
            if HAS_TQ:
                ts += tl.dot(tq_i, tl.trans(k_j), input_precision="ieee")
            if HAS_TK:
                tk_j = tile(tk + head * n * D, columns, across, n, D)
                ts += tl.dot(q_i, tl.trans(tk_j), input_precision="ieee")
            h = p * ts * scale
            mean += tl.sum(h, 1)
            slope += tl.dot(h.to(v_j.dtype), v_j, input_precision="ieee")
    inside = (rows[:, None] < m) & (across_v[None, :] < DV)
    at = rows[:, None] * DV + across_v[None, :]
    here = tl.load(out + head * m * DV + at, mask=inside, other=0.0)
    tl.store(slopes + head * m * DV + at, slope - mean[:, None] * here, mask=inside)
    tl.store(means + head * m + rows, mean, mask=rows < m)


def value(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """``(out, logsumexp)`` in float32; ValueError for a mask, float64 and heads that are too wide."""
    check(q, v, mask)
    out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=torch.float32, device=q.device)
    sums = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    launch(value_kernel, q, k, v, (flat(q), flat(k), flat(v), out, sums), scale)
    return out, sums


class Slope(torch.autograd.Function):
    """The tangent by the kernel.  An autograd function only so that it is given plain tensors under any transform."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, tq: Tensor | None, tk: Tensor | None,
        tv: Tensor | None, scale: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        slopes, means = torch.empty_like(out), torch.empty_like(sums)
        given = (q, k, v, out, sums, *(like if t is None else t for t, like in ((tq, q), (tk, k), (tv, v))))
        tensors = (*(flat(x) for x in given[:4]), sums.contiguous(), *(flat(x) for x in given[5:]), slopes, means)
        known = {"HAS_TQ": tq is not None, "HAS_TK": tk is not None, "HAS_TV": tv is not None}
        launch(slope_kernel, q, k, v, tensors, scale, **known)
        return slopes, means

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Nothing: there is no derivative of it (see :func:`slope`)."""


def slope(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, sums: Tensor, tq: Tensor | None,
    tk: Tensor | None, tv: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``(o., mu)``; by tiles, whose operations can be differentiated again, where a graph is wanted."""
    if torch.is_grad_enabled():
        return attention_blocked.slope(q, k, v, mask, out, sums, tq, tk, tv, scale, attention_blocked.block_for(q))
    return Slope.apply(q, k, v, out, sums, tq, tk, tv, scale)


def launch(
    kernel: Any, q: Tensor, k: Tensor, v: Tensor, tensors: tuple[Tensor, ...], scale: float, **known: bool
) -> None:
    """One program a head and block of queries."""
    m, n, d, dv = q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1]
    widths = [max(16, triton.next_power_of_2(size)) for size in (d, dv)]
    heads = math.prod(q.shape[:-2])
    if heads * m == 0:
        return
    with torch.cuda.device_of(q):
        kernel[(heads * triton.cdiv(m, ROWS),)](
            *tensors, m, n, scale, d, dv, *widths, ROWS, COLUMNS, **known, num_warps=4, num_stages=1
        )


def flat(x: Tensor) -> Tensor:
    return x.reshape(-1, *x.shape[-2:]).contiguous()


def fits(q: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether the kernels take these."""
    wide = max(q.shape[-1], v.shape[-1]) * q.element_size() > FEATURE_BYTES
    return mask is None and q.dtype != torch.float64 and not wide


def check(q: Tensor, v: Tensor, mask: Tensor | None) -> None:
    if not fits(q, v, mask):
        masked = "" if mask is None else ", a mask"
        raise ValueError(
            f"kernel='triton': {q.dtype}, {q.shape[-1]} and {v.shape[-1]} features{masked}; "
            f"it takes float32 or less, at most {FEATURE_BYTES} bytes of features a head, and no mask"
        )


@cache
def agrees(device: torch.device, dtype: torch.dtype, d: int, dv: int) -> bool:
    """Whether value and tangent are those of the tiles on this device, for 80 queries and 72 keys; a warning where not.

    The tangent of half precision is rounded where the tiles round nothing, in ``P`` and ``P * S.``.
    """
    q, k, v, tq, tk, tv = (
        waves(pitch, 2, *shape).to(device, dtype)
        for pitch, shape in enumerate(2 * [(80, d), (72, d), (72, dv)], start=1)
    )
    scale, tiles = 1 / math.sqrt(d), attention_blocked.block_for(q)
    with torch.no_grad():
        try:
            ours = value(q, k, v, None, scale)
            slopes = slope(q, k, v, None, *ours, tq, tk, tv, scale)
        except Exception as error:  # whatever a compiler says
            warnings.warn(f"attention by triton fails on {device}, by tiles instead: {error}", stacklevel=2)
            return False
        theirs = attention_blocked.value(q, k, v, None, scale, tiles)
        expected = attention_blocked.slope(q, k, v, None, *theirs, tq, tk, tv, scale, tiles)
    off = max(float((a - b).abs().max()) for a, b in zip((*ours, *slopes), (*theirs, *expected), strict=True))
    if off > ROUNDINGS * torch.finfo(dtype).eps:
        warnings.warn(f"attention by triton is off by {off:.1e} on {device}, by tiles instead", stacklevel=2)
        return False
    return True


def waves(pitch: int, *shape: int) -> Tensor:
    """Numbers of size 1 without a pattern, and without a draw, which a vmap around may forbid."""
    return (
        torch.arange(math.prod(shape), dtype=torch.float64).add(pitch).square().sin().mul(math.sqrt(2)).reshape(shape)
    )
