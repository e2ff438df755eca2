"""Solids in three dimensions, made in code: closed triangle meshes, stretched, left upright or laid down, and shifted
at random, as voxels.

Every mesh is turned on a lathe: an outline in the plane of radius and height goes around the vertical axis in so many
flat sides (four make a box).  Some classes are joined from several.  A voxel is filled where its centre lies inside,
told by the signed crossings of a vertical line with the triangles, so that parts may overlap.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from fewstep.data.dataset import Dataset
from fewstep.randomness import Rng

#: An outline: points (radius, height) from bottom to top, the surface on their right.
Outline = Sequence[tuple[float, float]]
#: Vertices ``[V, 3]``, the last coordinate up, and faces int64 ``[T, 3]``, counter-clockwise seen from outside.
Mesh = tuple[Tensor, Tensor]

SIDE, SEGMENTS = 12, 12
#: Samples of each class, by part.
COUNTS = {"train": 200, "test": 40}
#: What the random change of each solid may do: stretch of each axis, shift, in units of half the grid.
STRETCH, SHIFT = (0.8, 1.1), 0.08


def turned(outline: Outline, sides: int = SEGMENTS, closed: bool = False) -> Mesh:
    """The solid that an outline goes around; ``closed`` outlines are rings (a torus), open ones begin and end on the
    axis."""
    around = 2 * math.pi * (torch.arange(sides, dtype=torch.float64) + 0.5) / sides
    rings = [torch.stack([r * around.cos(), r * around.sin(), torch.full_like(around, z)], 1) for r, z in outline]
    faces = []
    for k in range(len(outline) if closed else len(outline) - 1):
        low, high = sides * k, sides * ((k + 1) % len(outline))
        for i in range(sides):
            j = (i + 1) % sides
            faces += [(low + i, low + j, high + j), (low + i, high + j, high + i)]
    return torch.cat(rings), torch.tensor(faces)


def joined(*meshes: Mesh) -> Mesh:
    """Several solids as one; they may overlap."""
    starts = torch.tensor([0, *(len(vertices) for vertices, _ in meshes)]).cumsum(0)
    faces = [part + start for (_, part), start in zip(meshes, starts[:-1], strict=True)]
    return torch.cat([vertices for vertices, _ in meshes]), torch.cat(faces)


def moved(mesh: Mesh, x: float = 0.0, y: float = 0.0, z: float = 0.0) -> Mesh:
    """A solid somewhere else."""
    return mesh[0] + torch.tensor([x, y, z], dtype=torch.float64), mesh[1]


def arc(radius: float, centre: float = 0.0, out: float = 0.0, points: int = 7) -> list[tuple[float, float]]:
    """The right half of a circle around (out, centre), from bottom to top."""
    angles = [math.pi * (k / (points - 1) - 0.5) for k in range(points)]
    return [(out + radius * math.cos(a), centre + radius * math.sin(a)) for a in angles]


def column(radius: float, low: float, high: float) -> Outline:
    return [(0.0, low), (radius, low), (radius, high), (0.0, high)]


def circle(radius: float, out: float, points: int = 8) -> Outline:
    angles = [2 * math.pi * k / points for k in range(points)]
    return [(out + radius * math.cos(a), radius * math.sin(a)) for a in angles]


def solids() -> dict[str, Mesh]:
    """The classes, each a solid within the cube of half side 0.8."""
    legs = [moved(turned(column(0.2, -0.75, 0.4), 4), x, y) for x in (-0.45, 0.45) for y in (-0.45, 0.45)]
    return {
        "ball": turned(arc(0.72)),
        "box": turned(column(0.8, -0.6, 0.6), 4),
        "cylinder": turned(column(0.5, -0.75, 0.75)),
        "cone": turned([(0.0, -0.7), (0.75, -0.7), (0.0, 0.8)]),
        "ring": turned(circle(0.24, 0.52), closed=True),
        "table": joined(turned(column(0.95, 0.25, 0.6), 4), *legs),
        "dumbbell": joined(
            turned(arc(0.4, 0.4)), turned(arc(0.4, -0.4)), turned(column(0.18, -0.5, 0.5)),
        ),
        "mushroom": joined(turned(column(0.25, -0.75, 0.1)), turned([(0.0, 0.0), *arc(0.72)[3:]])),
    }  # fmt: skip


CLASSES = tuple(solids())


def voxels(vertices: Tensor, faces: Tensor, side: int = SIDE) -> Tensor:
    """Which of ``side`` cubed cells of the cube [-1, 1] have their centre inside of meshes ``[N, V, 3]`` with the same
    ``faces``: bool ``[N, side, side, side]`` over height, depth and width."""
    centres = (2 * torch.arange(side, dtype=torch.float64) + 1) / side - 1
    y, x = (part.flatten() for part in torch.meshgrid(centres, centres, indexing="ij"))
    feet = torch.stack([x, y, torch.ones_like(x)])  # [3, side^2]
    corners = [vertices[:, faces[:, k]] for k in range(3)]  # of [N, T, 3]
    (ax, ay, _), (bx, by, _), (cx, cy, _) = (corner.unbind(2) for corner in corners)
    whole = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)  # twice the signed area, seen from above
    shares = [
        torch.stack([p[..., 1] - q[..., 1], q[..., 0] - p[..., 0], p[..., 0] * q[..., 1] - p[..., 1] * q[..., 0]], 2)
        / torch.where(whole == 0, math.nan, whole)[..., None]
        for p, q in ((corners[1], corners[2]), (corners[2], corners[0]), (corners[0], corners[1]))
    ]  # of the corners in the foot of each line, linear in x and y
    parts = [share @ feet for share in shares]
    n, t, foot = ((parts[0] >= 0) & (parts[1] >= 0) & (parts[2] >= 0)).nonzero(as_tuple=True)
    height = sum(part[n, t, foot] * corner[n, t, 2] for part, corner in zip(parts, corners, strict=True))
    below = torch.searchsorted(centres, height)  # so many centres lie below the crossing
    crossings = torch.zeros(len(vertices), side + 1, side**2, dtype=torch.float64)
    crossings.index_put_((n, below, foot), whole[n, t].sign(), accumulate=True)
    above = crossings.flip(1).cumsum(1).flip(1)[:, 1:]
    return (above != 0).unflatten(2, (side, side))


def made(split: Literal["train", "test"]) -> Iterator[tuple[Tensor, int]]:
    """The voxels of each class and its number."""
    for label, (name, (vertices, faces)) in enumerate(solids().items()):
        rng, n = Rng(0, "shapes3d", split, name), COUNTS[split]
        stretch = rng.uniform(n, 3, low=STRETCH[0], high=STRETCH[1])
        lying = rng.integers(n, 0, 2)
        shift = rng.uniform(n, 3, low=-SHIFT, high=SHIFT)
        coordinate = (torch.arange(3) + lying[:, None]) % 3
        placed = torch.take_along_dim(vertices * stretch[:, None], coordinate[:, None], 2) + shift[:, None]
        yield torch.cat([voxels(part, faces) for part in placed.split(25)]), label


def read_shapes(split: Literal["train", "test"]) -> Dataset:
    """The data set ``shapes3d``: uint8 voxels ``[N, 1, 12, 12, 12]``, 0 for empty and 255 for filled, and the class of
    each; the same for everybody."""
    parts = list(made(split))
    x = torch.cat([cells for cells, _ in parts])[:, None].to(torch.uint8) * 255
    labels = torch.cat([torch.full((len(cells),), label) for cells, label in parts])
    return Dataset("shapes3d", x, labels, CLASSES)
