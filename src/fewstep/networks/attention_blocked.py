"""Attention a tile of queries and keys at a time, its tangent and its gradients: memory linear in the tokens.

``q`` is ``[..., M, d]``, ``k`` ``[..., N, d]``, ``v`` ``[..., N, dv]`` with equal leading dimensions, ``mask`` None or
``[..., M or 1, N or 1]``.  Tiles are computed in float32, or in float64 where q is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

#: Queries and keys of a tile, and the most numbers in one over all heads of all samples (64 MiB in float32).
ROWS, COLUMNS, NUMBERS = 256, 512, 2**24


def block_for(q: Tensor) -> tuple[int, int]:
    """Queries and keys of a tile: fewer queries, but 16 at least, where many heads go at once."""
    heads = max(1, math.prod(q.shape[:-2]))
    return max(16, min(ROWS, NUMBERS // (heads * COLUMNS))), COLUMNS


def value(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, block: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """``(out, logsumexp)`` by the softmax that goes along the keys with the largest score so far."""
    outs, sums = [], []
    with full_precision(q):
        for rows in blocks(q.shape[-2], block[0]):
            best = torch.full_like(part(q, rows)[..., :1], -math.inf)
            total = torch.zeros_like(best)
            out = torch.zeros_like(total.expand(*total.shape[:-1], v.shape[-1]))
            for columns in blocks(k.shape[-2], block[1]):
                s = scores(q, k, mask, scale, rows, columns)
                last, best = best, torch.maximum(best, s.amax(-1, keepdim=True))
                p = (s - finite(best)).exp_()
                fade = (last - finite(best)).exp_()
                total = total * fade + p.sum(-1, keepdim=True)
                out = out * fade + p @ part(v, columns)
            outs.append(out / torch.where(total == 0, 1.0, total))
            sums.append((finite(best) + total.log()).squeeze(-1))
        return torch.cat(outs, -2), torch.cat(sums, -1)


def slope(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, sums: Tensor, tq: Tensor | None,
    tk: Tensor | None, tv: Tensor | None, scale: float, block: tuple[int, int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Their tangents ``(o., mu)``; None for an input without one, whose products are left out."""
    slopes, means = [], []
    with full_precision(q):
        for rows in blocks(q.shape[-2], block[0]):
            level = finite(part_of(sums, rows))
            mean = torch.zeros_like(level)
            slope = torch.zeros_like(part(out, rows))
            for columns in blocks(k.shape[-2], block[1]):
                p = (scores(q, k, mask, scale, rows, columns) - level).exp_()
                if tv is not None:
                    slope = slope + p @ part(tv, columns)
                if tq is not None or tk is not None:
                    h = p * tilted(q, k, tq, tk, scale, rows, columns)
                    mean = mean + h.sum(-1, keepdim=True)
                    slope = slope + h @ part(v, columns)
            slopes.append(slope - mean * part(out, rows))
            means.append(mean.squeeze(-1))
        return torch.cat(slopes, -2), torch.cat(means, -1)


def gradients(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, sums: Tensor, d_out: Tensor | None,
    d_sums: Tensor | None, scale: float, block: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Of q, k and v, from those of ``(out, logsumexp)``: None where nothing depends on it."""
    with full_precision(q):
        d_out = torch.zeros_like(out) if d_out is None else d_out
        drop = (d_out * out).sum(-1)  # sum_j P_ij dP_ij
        drop = (drop if d_sums is None else drop - d_sums)[..., None]
        every = list(blocks(q.shape[-2], block[0]))
        dq = [torch.zeros_like(part(q, rows)) for rows in every]
        dk, dv = [], []
        for columns in blocks(k.shape[-2], block[1]):
            k_j, v_j = part(k, columns), part(v, columns)
            dk_j, dv_j = torch.zeros_like(k_j), torch.zeros_like(v_j)
            for i, rows in enumerate(every):
                p = (scores(q, k, mask, scale, rows, columns) - finite(part_of(sums, rows))).exp_()
                d_here = part(d_out, rows)
                ds = p * (d_here @ v_j.transpose(-1, -2) - drop[..., rows, :])
                dq[i] = dq[i] + ds @ k_j * scale
                dk_j = dk_j + ds.transpose(-1, -2) @ part(q, rows) * scale
                dv_j = dv_j + p.transpose(-1, -2) @ d_here
            dk.append(dk_j)
            dv.append(dv_j)
        return torch.cat(dq, -2).to(q.dtype), torch.cat(dk, -2).to(k.dtype), torch.cat(dv, -2).to(v.dtype)


def scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, rows: slice, columns: slice) -> Tensor:
    """A tile of ``scale q k^T + mask``, minus infinity where nothing is seen."""
    s = (part(q, rows) * scale) @ part(k, columns).transpose(-1, -2)
    if mask is None:
        return s
    high = rows if mask.shape[-2] > 1 else slice(None)
    wide = columns if mask.shape[-1] > 1 else slice(None)
    tile = mask[..., high, wide]
    return s.masked_fill(~tile, -math.inf) if tile.dtype == torch.bool else s + tile.to(s.dtype)


def tilted(
    q: Tensor, k: Tensor, tq: Tensor | None, tk: Tensor | None, scale: float, rows: slice, columns: slice
) -> Tensor:
    """The tangent of a tile of scores; the mask has none."""
    parts = []
    if tq is not None:
        parts.append((part(tq, rows) * scale) @ part(k, columns).transpose(-1, -2))
    if tk is not None:
        parts.append((part(q, rows) * scale) @ part(tk, columns).transpose(-1, -2))
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def part(x: Tensor, rows: slice) -> Tensor:
    """Some tokens of ``[..., tokens, features]``, in the type that tiles are computed in."""
    return x[..., rows, :].to(torch.promote_types(x.dtype, torch.float32))


def part_of(sums: Tensor, rows: slice) -> Tensor:
    """Some of ``[..., M]`` as a column."""
    return sums[..., rows, None]


def finite(level: Tensor) -> Tensor:
    """``level``, and 0 in place of the minus infinity of a query that sees nothing: its exponentials are 0 then."""
    return torch.where(level == -math.inf, 0.0, level)


def blocks(count: int, size: int) -> Iterator[slice]:
    """``count`` tokens in slices of ``size``, the last one as long as what is left."""
    for start in range(0, max(count, 1), size):
        yield slice(start, min(start + size, count))


def full_precision(q: Tensor) -> AbstractContextManager:
    """Matrix products in the type of what they are given."""
    kind = q.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
