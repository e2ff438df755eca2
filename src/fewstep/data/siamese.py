"""Differentiable siamese augmentation (Zhao & Bilen 2021, arXiv 2102.08259).

Every operation is a plain function of pictures ``x`` ``[B, C, H, W]`` in [-1, 1] and of what was drawn, differentiable
in ``x``; a draw is made apart, from an :class:`~fewstep.randomness.Rng`, for every picture or one for all of a batch,
so that two batches (siamese) or two passes can have the same.  What comes in from outside of a picture, and what is cut
out, is black, -1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from fewstep.randomness import Rng
from fewstep.values import Written, suggestion

#: The paper's strengths.
FLIP_PROBABILITY, LARGEST_SHIFT, LARGEST_SCALE, LARGEST_ANGLE, HOLE = 0.5, 0.125, 1.2, 15.0, 0.5
CONTRAST, SATURATION = (0.5, 1.5), (0.0, 2.0)
#: The paper's is +-0.5 on pictures of standard deviation 1, which photos in [-1, 1] have half of.
BRIGHTNESS = 0.25
BLACK = -1.0


def flip(x: Tensor, flipped: Tensor) -> Tensor:
    """Mirrored left to right where ``flipped`` ``[B]``."""
    return torch.where(flipped.bool()[:, None, None, None], x.flip(-1), x)


def shift(x: Tensor, by: Tensor) -> Tensor:
    """Moved by whole pixels: down and right by the parts ``by`` ``[B, 2]`` of height and width, rounded."""
    size = torch.tensor(x.shape[-2:], dtype=by.dtype, device=x.device)
    down, right = (by.to(x.device) * size).round().long().unbind(1)
    rows = torch.arange(x.shape[-2], device=x.device) - down[:, None]
    columns = torch.arange(x.shape[-1], device=x.device) - right[:, None]
    here = inside(rows, x.shape[-2])[:, None, :, None] & inside(columns, x.shape[-1])[:, None, None, :]
    rows, columns = rows.clamp(0, x.shape[-2] - 1), columns.clamp(0, x.shape[-1] - 1)
    batch = torch.arange(len(x), device=x.device)[:, None, None]
    moved = x.movedim(1, -1)[batch, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)
    return torch.where(here, moved, BLACK)


def inside(positions: Tensor, size: int) -> Tensor:
    """Which of the positions lie in ``[0, size)``."""
    return (positions >= 0) & (positions < size)


def scale(x: Tensor, factors: Tensor) -> Tensor:
    """Stretched about the middle, by ``factors`` ``[B, 2]`` in height and width: 2 shows half of the picture."""
    down, right = factors.to(x).unbind(1)
    zero = torch.zeros_like(down)
    return placed(x, torch.stack([1 / right, zero, zero, zero, 1 / down, zero], 1).view(-1, 2, 3))


def rotate(x: Tensor, degrees: Tensor) -> Tensor:
    """Turned about the middle by ``degrees`` ``[B]``, counter-clockwise as seen; in pixels, also of oblong pictures."""
    angle = torch.deg2rad(degrees.to(x))
    c, s, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    height, width = x.shape[-2:]
    return placed(x, torch.stack([c, -s * height / width, zero, s * width / height, c, zero], 1).view(-1, 2, 3))


def placed(x: Tensor, where: Tensor) -> Tensor:
    """The pictures read, bilinearly, at the affine places ``where`` ``[B, 2, 3]`` of coordinates in [-1, 1]."""
    grid = affine_grid(where, list(x.shape), align_corners=False)
    return grid_sample(x - BLACK, grid, align_corners=False) + BLACK


def brightness(x: Tensor, by: Tensor) -> Tensor:
    """``by`` ``[B]`` added."""
    return x + column(by, x)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    """The distance from grey, the mean of the channels, times ``factor`` ``[B]``; grey pictures stay as they are."""
    grey = x.mean(1, keepdim=True)
    return grey + (x - grey) * column(factor, x)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """The distance from the mean of the picture, times ``factor`` ``[B]``."""
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (x - mean) * column(factor, x)


def color(x: Tensor, drawn: Tensor) -> Tensor:
    """Brightness, saturation and contrast, one after the other, by the columns of ``drawn`` ``[B, 3]``."""
    by, colours, distances = drawn.unbind(1)
    return contrast(saturation(brightness(x, by), colours), distances)


def cutout(x: Tensor, centres: Tensor) -> Tensor:
    """A black hole of half the height and width about ``centres`` ``[B, 2]``, from the top and left as parts of the
    picture."""
    here = [
        (torch.arange(size, device=x.device) + 0.5 - centre[:, None] * size).abs() <= HOLE * size / 2
        for size, centre in zip(x.shape[-2:], centres.to(x).unbind(1), strict=True)
    ]
    return torch.where(here[0][:, None, :, None] & here[1][:, None, None, :], BLACK, x)


def column(values: Tensor, x: Tensor) -> Tensor:
    """Numbers ``[B]`` beside pictures."""
    return values.to(x)[:, None, None, None]


class Operation(NamedTuple):
    """A function of pictures and of a draw, and the ``low`` and ``high`` ends of what is drawn, uniformly."""

    apply: Callable[[Tensor, Tensor], Tensor]
    low: tuple[float, ...]
    high: tuple[float, ...]

    def draw(self, n: int, rng: Rng) -> Tensor:
        """What is drawn for ``n`` pictures, float64 ``[n, numbers]``, or ``[n]`` where it is one number."""
        low, high = torch.tensor([self.low, self.high], dtype=torch.float64)
        drawn = low + (high - low) * rng.uniform(n, len(self.low)).cpu()
        return drawn if len(self.low) > 1 else drawn[:, 0]


def flipped_half(x: Tensor, u: Tensor) -> Tensor:
    """Mirrored where ``u`` ``[B]`` says so, uniform in [0, 1)."""
    return flip(x, u.to(x.device) < FLIP_PROBABILITY)


def pair(number: float) -> tuple[float, float]:
    """The same end for height and width."""
    return number, number


OPERATIONS = {
    "color": Operation(
        color, (-BRIGHTNESS, SATURATION[0], CONTRAST[0]), (BRIGHTNESS, SATURATION[1], CONTRAST[1])
    ),
    "crop": Operation(shift, pair(-LARGEST_SHIFT), pair(LARGEST_SHIFT)),
    "cutout": Operation(cutout, pair(0.0), pair(1.0)),
    "flip": Operation(flipped_half, (0.0,), (1.0,)),
    "scale": Operation(scale, pair(1 / LARGEST_SCALE), pair(LARGEST_SCALE)),
    "rotate": Operation(rotate, (-LARGEST_ANGLE,), (LARGEST_ANGLE,)),
}  # fmt: skip


class Drawn(NamedTuple):
    """Which operation a batch goes through (None: none), and what was drawn for its pictures."""

    operation: str | None
    values: Tensor


@dataclass(frozen=True)
class Siamese(Written):
    """One of the named ``operations``, drawn anew for every batch; none for "none"."""

    shown: ClassVar[str] = "color+crop+cutout+flip+scale+rotate|none"

    operations: tuple[str, ...] = tuple(OPERATIONS)

    def __post_init__(self) -> None:
        for name in self.operations:
            if name not in OPERATIONS:
                raise ValueError(f"'{name}' is not one of {', '.join(OPERATIONS)}{suggestion(name, OPERATIONS)}")

    @classmethod
    def parse(cls, text: str) -> Siamese:
        return cls(() if text == "none" else tuple(text.split("+")))

    def __str__(self) -> str:
        return "+".join(self.operations) or "none"

    def draw(self, n: int, rng: Rng, *, shared: bool = False) -> Drawn:
        """The draws for ``n`` pictures: for every one, or ``shared`` by all of them."""
        if not self.operations:
            return Drawn(None, torch.zeros(n))
        name = self.operations[rng.shared_integer(0, len(self.operations))]
        values = OPERATIONS[name].draw(1 if shared else n, rng)
        return Drawn(name, values.expand(n, *values.shape[1:]))

    def __call__(self, x: Tensor, drawn: Drawn) -> Tensor:
        """The pictures after what was drawn; ValueError for what is no picture ``[B, C, H, W]``."""
        if drawn.operation is None:
            return x
        if x.ndim != 4:
            raise ValueError(f"augment={self} is for pictures [C, H, W], the samples are {list(x.shape[1:])}: say none")
        return OPERATIONS[drawn.operation].apply(x, drawn.values)


#: All operations.
SIAMESE = Siamese()
