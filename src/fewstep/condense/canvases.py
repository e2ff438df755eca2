"""Canvases: ``k * k`` whole pictures of one class, shrunk and laid side by side in the place of one.

Pictures are ``[C, H, W]``; the cells of a canvas are counted row by row.  A view of a canvas is of one cell only, which
:class:`~fewstep.data.views.Views` of the kind "cells:K" draws.
"""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor

#: The least side of a cell in pixels: digits are told apart at 8 by 8, and hardly at 4 by 4.
LEAST_SIDE = 8


def check_cells(k: int, shape: tuple[int, ...]) -> None:
    """ValueError unless samples of this shape are pictures that ``k`` by ``k`` cells divide, none too small to see
    anything in."""
    if len(shape) != 3:
        raise ValueError(f"k={k}: samples of shape {list(shape)} are no pictures [C, H, W], which cells could hold")
    height, width = shape[-2:]
    if k > 1 and (height % k or width % k or min(height, width) // k < LEAST_SIDE):
        fit = [n for n in range(2, min(height, width) // LEAST_SIDE + 1) if height % n == width % n == 0]
        right = f"1 (whole pictures){''.join(f', {n}' for n in fit)}"
        raise ValueError(
            f"k={k} must divide pictures of {height}x{width} into cells of at least {LEAST_SIDE}x{LEAST_SIDE} pixels; "
            f"possible: {right}"
        )


def shrink(pictures: Tensor, k: int) -> Tensor:
    """Pictures ``[..., C, H, W]`` at ``H / k`` by ``W / k``: every pixel the mean of ``k * k``, bytes rounded."""
    if k == 1:
        return pictures
    height, width = pictures.shape[-2:]
    if height % k or width % k:
        raise ValueError(f"k={k} must divide the sides of the pictures, {height}x{width}")
    floats = pictures if pictures.is_floating_point() else pictures.double()
    means = floats.unflatten(-1, (-1, k)).unflatten(-3, (-1, k)).mean((-1, -3))
    return means if pictures.is_floating_point() else means.round().to(pictures.dtype)


def combine(pictures: Tensor) -> Tensor:
    """The canvas ``[..., C, H, W]`` of ``pictures`` ``[..., k * k, C, H, W]``, one a cell; ValueError unless their
    number is a square and ``k`` divides their sides."""
    n = pictures.shape[-4]
    k = isqrt(n)
    if k * k != n:
        raise ValueError(f"{n} pictures fill no square canvas: their number must be 1, 4, 9, ...")
    rows = shrink(pictures, k).unflatten(-4, (k, k))  # [..., row, column, C, h, w]
    rows = torch.cat(rows.unbind(-4), -1)  # [..., row, C, h, W]
    return torch.cat(rows.unbind(-4), -2)


def split(canvas: Tensor, k: int) -> Tensor:
    """The cells ``[..., k * k, C, H / k, W / k]`` of canvases ``[..., C, H, W]``."""
    rows = torch.stack(canvas.chunk(k, -2), -4)  # [..., row, C, h, W]
    return torch.stack(rows.chunk(k, -1), -4).flatten(-5, -4)
