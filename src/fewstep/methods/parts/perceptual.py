"""Perceptual distances: what a network makes of two pictures at several of its levels, as LPIPS has it (Zhang et al.
2018, arXiv 1801.03924)::

    d(a, b) = sum_l  mean_hw  sum_c  w_lc ( f_l(a) / ||f_l(a)|| - f_l(b) / ||f_l(b)|| )^2

with the norm over the channels at every place.  They compare pictures: latents are decoded first, and the gradient
comes back through the decoder.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial, singledispatch
from pathlib import Path

import torch
from torch import Tensor, nn

from fewstep.denoisers import Denoiser
from fewstep.networks.classifier import bundled_classifier
from fewstep.networks.feature_nets import FeatureNet, as_feature_net
from fewstep.networks.latents import decode
from fewstep.networks.lpips import read_lpips
from fewstep.sampling.inputs import weights_of


class PictureDistance(nn.Module, ABC):
    """A distance between pictures: of a teacher that makes latents it is given what they decode to.

    One of your own goes wherever a distance goes, ``DMD(distance=Mine())``.
    """

    @abstractmethod
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """``[B]`` of two batches of pictures ``[B, ...]`` in [-1, 1] (not clipped)."""

    def needs(self, shape: tuple[int, ...]) -> str:
        """The pictures that it compares, in words, where those of this ``shape`` are none; empty where they are."""
        return ""


@singledispatch
def between_samples(distance: nn.Module, teacher: Denoiser, name: str) -> nn.Module:
    """A distance as one between a teacher's samples: itself, but one of pictures compares those that samples are or
    decode to.  ValueError, with its ``name``, when it does not compare such pictures, or their decoder is out of
    reach."""
    return distance


@between_samples.register
def between_pictures(distance: PictureDistance, teacher: Denoiser, name: str) -> nn.Module:
    """Of a distance between pictures."""
    samples = torch.zeros(1, *teacher.shape).to(weights_of(teacher, torch.zeros(())))
    try:
        with torch.no_grad():
            pictures = decode(teacher, samples)
    except ValueError as error:
        raise ValueError(f"distance: '{name}' compares pictures: {error}") from None
    latent, shape = pictures is not samples, tuple(pictures.shape[1:])
    if needed := distance.needs(shape):
        behind = f" of latents {list(teacher.shape)}" if latent else ""
        raise ValueError(f"distance: '{name}' compares {needed}, the teacher makes {list(shape)}{behind}")
    return Decoded(distance, teacher) if latent else distance


class Decoded(nn.Module):
    """A distance between the pictures that latents decode to, in float32 or more whatever the training's precision; the
    gradient reaches the latents, and nothing in the model that decodes them.

    That model is no part of this module, so that a run neither keeps nor cuts it once more.
    """

    def __init__(self, distance: PictureDistance, model: nn.Module) -> None:
        super().__init__()
        self.distance = distance
        self.decode = partial(decode, model)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        kind = torch.promote_types(a.dtype, torch.float32)
        with torch.autocast(a.device.type, enabled=False):
            gap: Tensor = self.distance(self.decode(a.to(kind)), self.decode(b.to(kind)))
        return gap.to(a.dtype)


class FeatureDistance(PictureDistance):
    """What a network makes of two pictures, compared at several levels by the formula above; in the type of its weights
    whatever the training's precision.

    ``net`` is a :class:`~fewstep.networks.feature_nets.FeatureNet`, or any module with the names of the ``layers`` that
    count, called with pictures in [-1, 1]; one that takes others goes into a
    :class:`~fewstep.networks.feature_nets.TappedLayers` first.  ValueError for layers that it has not.
    """

    net: FeatureNet

    def __init__(self, net: nn.Module, layers: Sequence[str] = ()) -> None:
        super().__init__()
        self.net = as_feature_net(net, layers)

    def needs(self, shape: tuple[int, ...]) -> str:
        try:
            with torch.no_grad():
                self.maps(torch.zeros(1, *shape).to(weights_of(self, torch.zeros(()))))
        except RuntimeError as error:  # PyTorch's, of what does not fit
            return f"pictures that its network takes ({str(error).splitlines()[0]})"
        return ""

    def maps(self, pictures: Tensor) -> list[Tensor]:
        """The activations ``[B, c, ...]`` at every level that counts."""
        return self.net.maps(pictures)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        kind = weights_of(self, a)
        with torch.autocast(a.device.type, enabled=False):
            return layer_gaps(self.maps(a.to(kind)), self.maps(b.to(kind)), self.net.weights()).to(a.dtype)


def layer_gaps(a: Sequence[Tensor], b: Sequence[Tensor], weights: Sequence[Tensor] | None = None) -> Tensor:
    """The sum over levels ``[B]`` of the distances of activations of unit length, channels weighted."""
    total = torch.zeros(len(a[0]), dtype=a[0].dtype, device=a[0].device)
    for k, (one, other) in enumerate(zip(a, b, strict=True)):
        gap = (of_unit_length(one) - of_unit_length(other)).square()
        weighted = gap if weights is None else gap * weights[k].reshape(-1, *[1] * (gap.ndim - 2))
        total = total + weighted.sum(1).reshape(len(gap), -1).mean(1)
    return total


def of_unit_length(x: Tensor) -> Tensor:
    """Activations ``[B, c, ...]`` over their length at every place.

    The official code divides by ``||x|| + 1e-10``, whose gradient is no number where all channels are 0.
    """
    return x * (x.square().sum(1, keepdim=True) + 1e-20).rsqrt()


class ClassifierDistance(FeatureDistance):
    """The three levels of a bundled classifier, channels of equal weight."""

    def __init__(self, name: str) -> None:
        net = bundled_classifier(name)
        super().__init__(net)
        self.shape = net.shape

    def needs(self, shape: tuple[int, ...]) -> str:
        return "" if shape == self.shape else f"pictures {list(self.shape)}"


class LPIPSDistance(FeatureDistance):
    """LPIPS with VGG16.  Grey pictures count as colour, and those under ``SIDE`` pixels are enlarged (bilinear), as DMD
    and consistency models do it."""

    SIDE = 224

    def __init__(self, path: Path) -> None:
        super().__init__(read_lpips(path))

    def needs(self, shape: tuple[int, ...]) -> str:
        return "" if len(shape) == 3 and shape[0] in (1, 3) else "pictures of 1 or 3 channels"

    def maps(self, pictures: Tensor) -> list[Tensor]:
        x = pictures.expand(-1, 3, -1, -1)
        if min(x.shape[-2:]) < self.SIDE:
            x = nn.functional.interpolate(x, size=(self.SIDE, self.SIDE), mode="bilinear", align_corners=False)
        return self.net.maps(x)
