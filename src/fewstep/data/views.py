"""Random views of pictures: crops, flips, mixtures, as plain functions of their draws, which can be kept and replayed.

Pictures are ``[B, C, H, W]``.  A *box* is ``(top, left, height, width)`` in parts of the picture, each in [0, 1].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.randomness import Rng
from fewstep.values import Written, read

#: The sides of a crop, width over height.
RATIO = (3 / 4, 4 / 3)


def random_boxes(
    n: int,
    rng: Rng,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = RATIO,
    *,
    shared: bool = False,
) -> Tensor:
    """``[n, 4]`` boxes whose area is uniform in ``scale`` and whose ratio of sides is log-uniform in ``ratio``, as far
    as they fit, anywhere inside the picture; with ``shared`` one box for all.  Always the same number of draws."""
    u = rng.uniform(1 if shared else n, 4)
    area = scale[0] + (scale[1] - scale[0]) * u[:, 0]
    sides = torch.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * u[:, 1])
    height, width = (area / sides).sqrt().clamp(max=1), (area * sides).sqrt().clamp(max=1)
    boxes = torch.stack([u[:, 2] * (1 - height), u[:, 3] * (1 - width), height, width], 1)
    return boxes.expand(n, 4) if shared else boxes


def random_flips(n: int, rng: Rng) -> Tensor:
    """Whether each picture is mirrored, bool ``[n]``."""
    return rng.uniform(n) < 0.5


def within_cells(boxes: Tensor, cells: Tensor, k: int) -> Tensor:
    """Boxes ``[B, 4]`` of one cell each as boxes of a canvas of ``k * k`` cells, ``cells`` ``[B]`` counted row by row:
    none leaves its cell."""
    corner = torch.stack([cells.div(k, rounding_mode="floor"), cells % k], 1).to(boxes)
    return torch.cat([(boxes[:, :2] + corner) / k, boxes[:, 2:] / k], 1)


def crop(x: Tensor, boxes: Tensor, flips: Tensor | None = None) -> Tensor:
    """What the boxes ``[B, 4]`` show of ``x``, at the size of the whole picture, mirrored where ``flips`` ``[B]`` says
    so; bilinear and differentiable in ``x``, and nothing outside of a box is looked at.  The box (0, 0, 1, 1) is the
    picture itself, bit for bit."""
    height, width = x.shape[-2:]
    top, left, high, wide = boxes.to(x.device).double().unbind(1)
    rows, row_weight, next_row = along(height, top, high, None)
    columns, column_weight, next_column = along(width, left, wide, flips)
    picture = torch.arange(len(x), device=x.device)[:, None, None]
    across = x.movedim(1, -1)  # indexing takes the places of every picture at once

    def at(row: Tensor, column: Tensor) -> Tensor:
        return across[picture, row[:, :, None], column[:, None, :]]

    down, over = row_weight.to(x)[:, :, None, None], column_weight.to(x)[:, None, :, None]
    upper = torch.lerp(at(rows, columns), at(rows, next_column), over)
    lower = torch.lerp(at(next_row, columns), at(next_row, next_column), over)
    return torch.lerp(upper, lower, down).movedim(-1, 1)


def along(size: int, start: Tensor, extent: Tensor, flips: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Where each of ``size`` pixels of a view reads on one side of a picture: the pixel before ``[B, size]``, the
    weight of the one after, and that one.  Neither lies outside of the stretch ``start .. start + extent``."""
    places = (torch.arange(size, dtype=torch.float64, device=start.device) + 0.5) / size
    wanted = (start[:, None] + extent[:, None] * places) * size - 0.5
    # the first and the last pixel that lie in the stretch with more than half of themselves
    first = (start * size + 1e-9).round().clamp(0, size - 1)[:, None]
    last = ((start + extent) * size - 1e-9).round().sub(1).clamp(0, size - 1)[:, None]
    wanted = torch.maximum(torch.minimum(wanted, torch.maximum(first, last)), first)
    if flips is not None:
        wanted = torch.where(flips.to(wanted.device)[:, None], wanted.flip(1), wanted)
    before = (wanted + 1e-9).floor()
    weight = (wanted - before).clamp_min(0)
    after = torch.minimum(before + 1, torch.maximum(first, last))
    return before.long(), weight, after.long()


def random_mixing_box(rng: Rng) -> tuple[float, float, float, float]:
    """The box that CutMix pastes, one for a batch: a share lambda of the area, uniform, stays; centre uniform, cut at
    the edges of the picture."""
    lam, y, x = (rng.shared_integer(0, 2**31) / 2**31 for _ in range(3))
    side = math.sqrt(1 - lam) / 2
    top, left = max(0.0, y - side), max(0.0, x - side)
    return top, left, min(1.0, y + side) - top, min(1.0, x + side) - left


def pixels_of(box: tuple[float, float, float, float], height: int, width: int) -> tuple[slice, slice]:
    """The rows and columns of a box."""
    top, left, high, wide = box
    rows = slice(round(top * height), round((top + high) * height))
    return rows, slice(round(left * width), round((left + wide) * width))


def cutmix(x: Tensor, partner: Tensor, box: tuple[float, float, float, float]) -> tuple[Tensor, float]:
    """``x`` with the box of picture ``partner[i]`` ``[B]`` pasted into picture ``i``, and the share of its own that is
    left (Yun et al. 2019).  ``x`` itself is not changed."""
    rows, columns = pixels_of(box, *x.shape[-2:])
    mixed = x.clone()
    mixed[:, :, rows, columns] = x[partner][:, :, rows, columns]
    pasted = (rows.stop - rows.start) * (columns.stop - columns.start)
    return mixed, 1 - pasted / (x.shape[-1] * x.shape[-2])


def mixup(x: Tensor, partner: Tensor, lam: float) -> Tensor:
    """``lam x_i + (1 - lam) x_partner[i]`` (Zhang et al. 2018)."""
    return lam * x + (1 - lam) * x[partner]


@dataclass(frozen=True)
class Views(Written):
    """How training looks at pictures: "none"; "flip"; "crop:S", boxes of at least the share S of the area, and flips;
    "cells:K", such boxes inside of one of the K x K cells of a canvas, uniformly chosen (S = 0.5), and flips.  Crops
    and cells that end in "+upright" are never mirrored, as digits and letters must not be."""

    shown: ClassVar[str] = "none|flip|crop:S|cells:K[+upright]"
    #: The least share of a cell that is looked at.
    IN_CELL: ClassVar[float] = 0.5

    kind: str = "none"
    number: float = 0.0
    upright: bool = False

    @classmethod
    def parse(cls, text: str) -> Views:
        name, plus, suffix = text.partition("+")
        kind, colon, word = name.partition(":")
        known = (kind, bool(colon)) in (("none", False), ("flip", False), ("crop", True), ("cells", True))
        if not known or (plus and (suffix != "upright" or not colon)):
            raise ValueError(f"views '{text}' is not one of none, flip, crop:S, cells:K (and these two with +upright)")
        number = 0.0 if not colon else float(read(int, word)) if kind == "cells" else read(float, word)
        if (kind == "crop" and not 0 < number <= 1) or (kind == "cells" and number < 1):
            raise ValueError(f"views '{text}': crop takes a share of the area in (0, 1], cells a number of at least 1")
        return cls(kind, number, bool(plus))

    def __str__(self) -> str:
        if self.kind in ("none", "flip"):
            return self.kind
        return f"{self.kind}:{self.number:g}{'+upright' * self.upright}"

    def whole(self) -> Views:
        """The same for pictures that are no canvases: crops where these are of cells."""
        return Views("crop", self.IN_CELL, self.upright) if self.kind == "cells" else self

    def __call__(self, x: Tensor, rng: Rng) -> Tensor:
        """A random view of every picture of ``x`` ``[B, C, H, W]``; samples of another kind only as they are."""
        if self.kind == "none":
            return x
        if x.ndim != 4:
            raise ValueError(f"views '{self}' are of pictures [C, H, W], these samples are {list(x.shape[1:])}")
        n = len(x)
        flips = torch.zeros(n, dtype=torch.bool) if self.upright else random_flips(n, rng)
        if self.kind == "flip":
            return torch.where(flips[:, None, None, None], x.flip(-1), x)
        boxes = random_boxes(n, rng, (self.number if self.kind == "crop" else self.IN_CELL, 1.0))
        if self.kind == "cells":
            k = int(self.number)
            boxes = within_cells(boxes, rng.integers(n, 0, k * k), k)
        return crop(x, boxes, flips)
