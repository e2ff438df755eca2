"""Where in a picture a classifier sees its class: Grad-CAM++ (Chattopadhyay et al. 2018, arXiv 1710.11063).

With the activations ``A`` of a layer and the slope ``g`` of the class score in them, channel ``k`` counts::

    w_k = sum_ij alpha_k,ij relu(g_k,ij),      alpha = g^2 / (2 g^2 + g^3 sum_ab A_k,ab)

and the map is ``relu(sum_k w_k A_k)``.  (The derivatives are those of ``exp(score)``, whose factor is the same for the
whole picture and left out.)
"""

from __future__ import annotations

import torch
from torch import Tensor


def grad_cam_pp(maps: Tensor, slopes: Tensor) -> Tensor:
    """The map ``[B, h, w]``, 0 or more, of activations and their slopes, both ``[B, c, h, w]``.

    Activations are meant to be 0 or more, as after a ReLU; the negative ones of another layer are left out of the sum
    in ``alpha``, which could be anything otherwise.
    """
    total = maps.clamp_min(0).sum((2, 3), keepdim=True)
    # alpha relu(g) is g / (2 + g sum A) where g is positive, and 0 elsewhere
    rising = slopes.clamp_min(0)
    weights = (rising / (2 + rising * total)).sum((2, 3))
    return torch.einsum("bc,bchw->bhw", weights, maps).clamp_min(0)


def on_grid(found: Tensor, grid: tuple[int, int]) -> Tensor:
    """Maps ``[B, h, w]`` on a grid of ``(rows, columns)`` patches, averaged or interpolated: ``[B, rows, columns]``."""
    sized = torch.nn.functional.interpolate(found[:, None], size=grid, mode="bilinear", antialias=True)
    return sized[:, 0]
