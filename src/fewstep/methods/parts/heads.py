"""The heads of discriminators: from the features of a diffusion network to logits.

:class:`FeatureHead` gives one logit a sample (DMD2).  :class:`PatchHead` gives one for every place, under spectral
normalisation: StyleGAN-T's head (Sauer et al. 2023, arXiv 2301.09515), which ADD, LADD and SANA-Sprint put on features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu
from torch.nn.utils.parametrize import register_parametrization

from fewstep.conditions import Cond, expand, leaves, to
from fewstep.networks.parts import PositionalEmbedding


class FeatureHead(nn.Module):
    """One logit ``[B]`` from features inside a network: convolutions for grids ``(C, h, w)`` and ``(C, f, h, w)``,
    linear layers for vectors ``(d,)`` and, with a mean over them, for tokens ``(L, d)``."""

    def __init__(self, feature_shape: tuple[int, ...]) -> None:
        super().__init__()
        if len(feature_shape) > 2:
            width, *sides = feature_shape
            conv: type[nn.Conv2d] | type[nn.Conv3d] = nn.Conv2d if len(sides) == 2 else nn.Conv3d
            # the published kernel needs two places on every side
            first = conv(width, width, 4, 2, 1) if min(sides) > 1 else conv(width, width, 3, 1, 1)
            groups = math.gcd(8, width)
            self.layers = nn.Sequential(
                first, nn.GroupNorm(groups, width), nn.SiLU(),
                conv(width, width, 3, padding=1), nn.GroupNorm(groups, width), nn.SiLU(),
                nn.AdaptiveAvgPool2d(1) if len(sides) == 2 else nn.AdaptiveAvgPool3d(1), nn.Flatten(),
                nn.Linear(width, 1),
            )  # fmt: skip
        else:
            width = feature_shape[-1]
            self.layers = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features).flatten(1).mean(1)

    def follow(self) -> None:
        """Nothing is to be done after an update."""


class SpectralNorm(nn.Module):
    """A weight over its largest singular value, estimated along a direction that moves when it is told to
    (:meth:`follow`), once an update: a pass changes nothing, so that batches in parts are the same batches."""

    direction: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("direction", nn.functional.normalize(torch.randn(len(weight)), dim=0))
        for _ in range(15):
            self.follow(weight.detach())

    def forward(self, weight: Tensor) -> Tensor:
        return weight / torch.linalg.vector_norm(weight.flatten(1).T @ self.direction)

    @torch.no_grad()
    def follow(self, weight: Tensor) -> None:
        """One step of power iteration."""
        flat = weight.flatten(1)
        self.direction.copy_(nn.functional.normalize(flat @ (flat.T @ self.direction), dim=0))


def spectral(layer: Any) -> Any:
    """A layer whose weight is under :class:`SpectralNorm`."""
    register_parametrization(layer, "weight", SpectralNorm(layer.weight))
    return layer


class PatchHead(nn.Module):
    """Logits ``[B, channels, places]`` of every place of grids ``(C, h, w)``, ``(C, f, h, w)``, of tokens ``(L, d)`` as
    a closed sequence, and of vectors ``(d,)`` as one place.

    Two spectrally normalised convolutions, the second residual: of one place and of nine (3 x 3 on grids, 27 in three
    dimensions), each normalised over the sample.
    """

    def __init__(self, feature_shape: tuple[int, ...], channels: int = 1) -> None:
        super().__init__()
        self.rank = len(feature_shape)
        width = feature_shape[-1] if self.rank < 3 else feature_shape[0]
        first, around, leave = (
            of_places(feature_shape, size, out) for size, out in ((1, width), (9, width), (1, channels))
        )
        self.first, self.around, self.leave = spectral(first), spectral(around), spectral(leave)
        # over the sample, not over a batch: a batch in parts is the same batch
        self.norms = nn.ModuleList(nn.GroupNorm(1, width) for _ in range(2))

    def forward(self, features: Tensor) -> Tensor:
        x = features.mT if self.rank == 2 else features
        hidden = leaky_relu(self.norms[0](self.first(x)), 0.2)
        hidden = (hidden + leaky_relu(self.norms[1](self.around(hidden)), 0.2)) / math.sqrt(2)
        logits: Tensor = self.leave(hidden)
        return logits[:, :, None] if self.rank == 1 else logits.flatten(2)

    def follow(self) -> None:
        """Let the spectral norms follow the weights, after an update."""
        for layer in (self.first, self.around, self.leave):
            norms = layer.parametrizations.weight
            norms[0].follow(norms.original)


def of_places(feature_shape: tuple[int, ...], size: int, out: int) -> nn.Module:
    """A convolution to ``out`` channels, of one place or of the ``size`` = 9 around it."""
    if len(feature_shape) == 1:
        return nn.Linear(feature_shape[0], out)
    if len(feature_shape) == 2:
        length, width = feature_shape
        size = min(size, 2 * length - 1)  # a closed sequence is gone round once at most
        return nn.Conv1d(width, out, size, padding=size // 2, padding_mode="circular")
    conv = nn.Conv2d if len(feature_shape) == 3 else nn.Conv3d
    side = 1 if size == 1 else 3
    return conv(feature_shape[0], out, side, padding=side // 2)


#: What makes a head for the features of a layer, from the shape of those of one sample.
HeadKind = Callable[[tuple[int, ...]], nn.Module]


class Heads(nn.Module):
    """A head for the features of each of several layers: logits ``[B, K]``, those of all layers and places."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], head: HeadKind = FeatureHead) -> None:
        super().__init__()
        self.heads = nn.ModuleList(head(shape) for shape in shapes)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        told = [head(found) for head, found in zip(self.heads, features, strict=True)]
        return torch.cat([logits.reshape(len(logits), -1) for logits in told], 1)

    def follow(self) -> None:
        """What is to be done after every update."""
        for head in self.heads:
            cast(Any, head).follow()


class Told(nn.Module):
    """A time and a condition as one vector ``[B, width]``: what a discriminator is conditioned on.

    ``null`` is the body's "no condition": its leaves are the ones that are read, labels as one of ``classes``, vectors
    as they are and tokens by their mean.
    """

    def __init__(self, null: Cond, classes: int | None, width: int) -> None:
        super().__init__()
        self.null: Cond = null
        self.classes = classes
        self.link = nn.Linear(width, width)
        self.time = PositionalEmbedding(width)
        named = {name: leaf for name, leaf in leaves(null).items() if "mask" not in name}
        read = {name: leaf.shape[-1] for name, leaf in named.items() if leaf.ndim < 4 and leaf.is_floating_point()}
        sizes = {"cond": classes} if classes else read
        self.vectors = nn.ModuleDict({name: nn.Linear(size, width) for name, size in sizes.items()})

    def forward(self, log_snr: Tensor, cond: Cond) -> Tensor:
        weight = self.link.weight
        known = leaves(expand(to(self.null, weight.device), len(log_snr)) if cond is None else cond)
        told: Tensor = self.link(self.time((log_snr / 4).to(weight)))
        for name, layer in self.vectors.items():
            leaf = known[name]
            if self.classes:  # a label of -1, which is none, is no class
                leaf = leaf[:, None] == torch.arange(self.classes, device=leaf.device)
            leaf = leaf.to(weight)
            told = told + layer(leaf.mean(1) if leaf.ndim == 3 else leaf)
        return told


class ToldHeads(nn.Module):
    """Patch heads whose ``width`` channels are projected on what is :class:`Told`: logits ``[B, K]`` (Miyato & Koyama
    2018, arXiv 1802.05637)."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], told: Told, width: int) -> None:
        super().__init__()
        self.told = told
        self.heads = nn.ModuleList(PatchHead(shape, width) for shape in shapes)
        self.maps = nn.ModuleList(nn.Linear(width, width) for _ in shapes)

    def forward(self, features: Sequence[Tensor], log_snr: Tensor, cond: Cond) -> Tensor:
        told = self.told(log_snr, cond)
        logits = [
            (head(found) * link(told)[:, :, None]).mean(1) * math.sqrt(told.shape[1])
            for head, found, link in zip(self.heads, features, self.maps, strict=True)
        ]
        return torch.cat(logits, 1)

    def follow(self) -> None:
        """What is to be done after every update."""
        for head in self.heads:
            cast(Any, head).follow()
