"""Distances between samples, one number per sample: by name, perceptual ones among them, or any function.

``features:digits`` and ``features:fashion`` are perceptual distances by the bundled classifiers, ``lpips:PATH`` is
LPIPS from a file of its weights, and :class:`~fewstep.methods.parts.perceptual.FeatureDistance` makes one of any
network.  They compare pictures: where the teacher makes latents, both are decoded first.  ``l2``, ``l1`` and
``pseudo-huber`` compare the samples themselves, and so does a function or module of the caller's, unless it is a
:class:`~fewstep.methods.parts.perceptual.PictureDistance`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from fewstep.denoisers import Denoiser
from fewstep.methods.parts.perceptual import ClassifierDistance, LPIPSDistance, between_samples
from fewstep.networks.classifier import BUNDLED
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
    takes two ``[B, ...]`` and gives ``[B]``, which no file can record.  It is given samples as they are, latents where
    the teacher makes latents; a ``PictureDistance`` is given pictures.

    A method makes the network of it with its others, ``self.distance.network(start.teacher)``.  ValueError for an
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

    def network(self, teacher: Denoiser) -> nn.Module:
        """``d(a, b)`` of samples such as the teacher's, as a module; ValueError when they are none, and decode to none,
        that it can compare."""
        return between_samples(module_of(self.by), teacher, str(self))


#: What methods compare by unless they are told otherwise.
L2 = Distance("l2")


def module_of(distance: str | Compare) -> nn.Module:
    """The module behind a name, or around a function; a module of the caller's is copied."""
    if isinstance(distance, nn.Module):
        return copy.deepcopy(distance).eval()
    if not isinstance(distance, str):
        return Plain(distance)
    if distance in DISTANCES:
        return Plain(DISTANCES[distance])
    if distance in FEATURES:
        return ClassifierDistance(distance.partition(":")[2])
    return LPIPSDistance(Path(distance.removeprefix(LPIPS)))


class Plain(nn.Module):
    """A distance without parameters."""

    def __init__(self, compare: Compare) -> None:
        super().__init__()
        self.compare = compare

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.compare(a, b)
