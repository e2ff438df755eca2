"""Where in a picture a classifier sees its class: Grad-CAM++ (Chattopadhyay et al. 2018, arXiv 1710.11063).

With the activations ``A`` of a layer and the slope ``g`` of the class score in them, channel ``k`` counts::

    w_k = sum_ij alpha_k,ij relu(g_k,ij),      alpha = g^2 / (2 g^2 + g^3 sum_ab A_k,ab)

and the map is ``relu(sum_k w_k A_k)``.  (The derivatives are those of ``exp(score)``, whose factor is the same for the
whole picture and left out.)
"""

from __future__ import annotations

from functools import singledispatch

import torch
from torch import Tensor, nn

from fewstep.networks.classifier import Classifier
from fewstep.networks.classifiers import ClassifyingNet


def grad_cam_pp(maps: Tensor, slopes: Tensor) -> Tensor:
    """The map ``[B, h, w]``, 0 or more, of activations and their slopes, both ``[B, c, h, w]``.

    Activations are meant to be 0 or more, as after a ReLU; negative ones of another layer are left out of the sum in
    ``alpha``, which could be anything otherwise.
    """
    total = maps.clamp_min(0).sum((2, 3), keepdim=True)
    # alpha relu(g) is g / (2 + g sum A) where g is positive, and 0 elsewhere
    rising = slopes.clamp_min(0)
    weights = (rising / (2 + rising * total)).sum((2, 3))
    return torch.einsum("bc,bchw->bhw", weights, maps).clamp_min(0)


@singledispatch
def last_map(net: nn.Module, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """The last map ``[B, c, h, w]`` that a network makes of pictures and the logits ``[B, classes]`` that it makes of
    the map; ValueError for a network without maps of places."""
    raise ValueError(f"a {type(net).__name__} shows no map of places, in which a class could be seen")


@last_map.register(ClassifyingNet)
@last_map.register(Classifier)
def _last_map(net: ClassifyingNet | Classifier, pictures: Tensor) -> tuple[Tensor, Tensor]:
    last = net.maps(pictures)[-1]
    if last.ndim != 4:
        raise ValueError(f"a {type(net).__name__} shows no map of places, in which a class could be seen")
    return last, net.head(net.pooled(last))


@torch.enable_grad()
def class_map(net: nn.Module, pictures: Tensor) -> Tensor:
    """Where the network sees the class that it tells, by Grad-CAM++ on its last map: ``[B, h, w]``, 0 or more.

    Of each picture by itself only where batch normalisation uses running statistics.  ValueError as :func:`last_map`.
    """
    maps, logits = last_map(net, pictures.detach().requires_grad_())
    (slopes,) = torch.autograd.grad(logits.amax(1).sum(), maps)
    return grad_cam_pp(maps.detach(), slopes)


def on_grid(found: Tensor, grid: tuple[int, int]) -> Tensor:
    """Maps ``[B, h, w]`` on a grid of ``(rows, columns)`` patches, averaged or interpolated: ``[B, rows, columns]``."""
    sized = torch.nn.functional.interpolate(found[:, None], size=grid, mode="bilinear", antialias=True)
    return sized[:, 0]
