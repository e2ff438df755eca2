"""Distances between samples, one number per sample: by name, perceptual ones among them, or any function.

A perceptual distance compares what a network makes of two pictures at several of its layers, as LPIPS does (Zhang et
al. 2018, arXiv 1801.03924)::

    d(a, b) = sum_l  mean_hw  sum_c  w_lc ( f_l(a) / ||f_l(a)|| - f_l(b) / ||f_l(b)|| )^2

with the norm over the channels at every place.  ``features:digits`` and ``features:fashion`` take the bundled
classifiers and ``w = 1``; ``lpips:PATH`` is LPIPS itself, from a file of its weights (:mod:`fewstep.networks.lpips`).
They compare pictures: latents would have to be decoded first, which is not there yet.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fewstep.networks.classifier import BUNDLED, bundled_classifier
from fewstep.networks.lpips import read_lpips
from fewstep.values import Written, check, suggestion

Compare = Callable[[Tensor, Tensor], Tensor]  # two [B, ...] -> [B]


def l2(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference."""
    return (a - b).square().flatten(1).mean(1)


def l1(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference."""
    return (a - b).abs().flatten(1).mean(1)


def pseudo_huber(a: Tensor, b: Tensor, c: float | None = None) -> Tensor:
    """``sqrt(||a - b||^2 + c^2) - c`` over the whole sample, by default with ``c = 0.00054 sqrt(d)`` (Song & Dhariwal
    2023, eq. 7)."""
    difference = (a - b).flatten(1)
    c = 0.00054 * difference.shape[1] ** 0.5 if c is None else c
    return (difference.square().sum(1) + c**2).sqrt() - c


DISTANCES: dict[str, Compare] = {"l2": l2, "l1": l1, "pseudo-huber": pseudo_huber}
FEATURES = tuple(f"features:{name}" for name in BUNDLED)
LPIPS = "lpips:"
CHOICES = ", ".join([*DISTANCES, *FEATURES, f"{LPIPS}PATH"])


@dataclass(frozen=True, repr=False)
class Distance(Written):
    """A hyper-parameter that says how two samples are compared: one of the names above, or a function (or module) that
    takes two ``[B, ...]`` and gives ``[B]``, which no file can record.

    A method makes the network of it with its others, ``self.distance.network(start.teacher.shape)``.  ValueError for an
    unknown name.
    """

    shown: ClassVar[str] = CHOICES.replace(", ", "|")

    by: str | Compare

    def __post_init__(self) -> None:
        if not isinstance(self.by, str) or self.by in (*DISTANCES, *FEATURES):
            return
        if not self.by.startswith(LPIPS) or self.by == LPIPS:
            near = suggestion(self.by, [*DISTANCES, *FEATURES])
            raise ValueError(f"'{self.by}' is not one of {CHOICES}{near}")

    @classmethod
    def parse(cls, text: str) -> Distance:
        return cls(text)

    @classmethod
    def from_plain(cls, value: Any) -> Distance:
        return cls(value) if callable(value) else cls(check(str, value))

    def plain(self) -> str:
        if not isinstance(self.by, str):
            raise ValueError(f"distance: '{self}' is a function, which no file can record: name one, or use no folder")
        return self.by

    def __str__(self) -> str:
        return self.by if isinstance(self.by, str) else getattr(self.by, "__name__", type(self.by).__name__)

    def __repr__(self) -> str:
        """The bare name: checkpoints know a method by its repr, and those of earlier versions have a string here."""
        return repr(self.by) if isinstance(self.by, str) else str(self)

    def network(self, shape: tuple[int, ...]) -> nn.Module:
        """``d(a, b)`` of samples of this shape, as a module; ValueError when they are none that it can compare."""
        return named(self.by, shape)


#: What methods compare by unless they are told otherwise.
L2 = Distance("l2")


def named(distance: str | Compare, shape: tuple[int, ...]) -> nn.Module:
    """The module behind a name, or around a function; a module of the caller's is copied."""
    if isinstance(distance, nn.Module):
        return copy.deepcopy(distance)
    if not isinstance(distance, str):
        return Plain(distance)
    if distance in DISTANCES:
        return Plain(DISTANCES[distance])
    if distance in FEATURES:
        return ClassifierDistance(distance.partition(":")[2], shape)
    return LPIPSDistance(Path(distance.removeprefix(LPIPS)), shape)


class Plain(nn.Module):
    """A distance without parameters."""

    def __init__(self, compare: Compare) -> None:
        super().__init__()
        self.compare = compare

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.compare(a, b)


class Perceptual(nn.Module, ABC):
    """A distance between what a network makes of two pictures; in float32 whatever the training's precision."""

    @abstractmethod
    def layers(self, x: Tensor) -> list[Tensor]:
        """The activations ``[B, c, h, w]`` at every layer that counts."""

    def heads(self) -> Sequence[Tensor] | None:
        """The weights ``[c]`` of the channels of every layer, None where all are 1."""
        return None

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        kind = next(self.parameters())
        with torch.autocast(a.device.type, enabled=False):
            return layer_gaps(self.layers(a.to(kind)), self.layers(b.to(kind)), self.heads()).to(a.dtype)


def layer_gaps(a: Sequence[Tensor], b: Sequence[Tensor], heads: Sequence[Tensor] | None = None) -> Tensor:
    """The sum over layers ``[B]`` of the distances of activations of unit length, channels weighted by ``heads``."""
    total = torch.zeros(len(a[0]), dtype=a[0].dtype, device=a[0].device)
    for k, (one, other) in enumerate(zip(a, b, strict=True)):
        gap = (of_unit_length(one) - of_unit_length(other)).square()
        weighted = gap if heads is None else gap * heads[k][:, None, None]
        total = total + weighted.sum(1).mean((1, 2))
    return total


def of_unit_length(x: Tensor) -> Tensor:
    """Activations ``[B, c, h, w]`` over their length at every place.

    The official code divides by ``||x|| + 1e-10``, whose gradient is no number where all channels are 0.
    """
    return x * (x.square().sum(1, keepdim=True) + 1e-20).rsqrt()


class ClassifierDistance(Perceptual):
    """The three layers of a bundled classifier, channels of equal weight."""

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.net = bundled_classifier(name)
        if tuple(shape) != self.net.shape:
            wrong = f"compares samples {list(self.net.shape)}, the teacher makes {list(shape)}"
            raise ValueError(f"distance: 'features:{name}' {wrong}")

    def layers(self, x: Tensor) -> list[Tensor]:
        return self.net.layers(x)


class LPIPSDistance(Perceptual):
    """LPIPS with VGG16.  Grey pictures count as colour, and those under ``SIDE`` pixels are enlarged (bilinear), as DMD
    and consistency models do it."""

    SIDE = 224

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        super().__init__()
        if len(shape) != 3 or shape[0] not in (1, 3):
            raise ValueError(
                f"distance: '{LPIPS}{path}' compares pictures of 1 or 3 channels, the teacher makes {list(shape)}; "
                "latents would have to be decoded first, which is not there yet"
            )
        self.net = read_lpips(path)

    def heads(self) -> Sequence[Tensor]:
        return list(self.net.heads)

    def layers(self, x: Tensor) -> list[Tensor]:
        x = x.expand(-1, 3, -1, -1)
        if min(x.shape[-2:]) < self.SIDE:
            x = nn.functional.interpolate(x, size=(self.SIDE, self.SIDE), mode="bilinear", align_corners=False)
        return self.net.layers(x)
