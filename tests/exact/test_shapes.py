"""Solids made in code: closed meshes, their voxels against volumes in closed form, and the data set of them."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.data import load
from fewstep.data.shapes import CLASSES, arc, circle, column, joined, moved, solids, turned, voxels
from fewstep.metrics.occupancy import nearest, overlaps


def volume(mesh: tuple[torch.Tensor, torch.Tensor]) -> float:
    """By the divergence theorem; positive where faces look outwards."""
    a, b, c = (mesh[0][mesh[1][:, k]] for k in range(3))
    return float((a * torch.linalg.cross(b, c)).sum() / 6)


@pytest.mark.parametrize("name", CLASSES)
def test_meshes_are_closed_and_look_outwards(name: str) -> None:
    """Every edge is passed as often one way as the other, and the enclosed volume is positive."""
    vertices, faces = solids()[name]
    places = torch.unique(vertices.round(decimals=9), dim=0, return_inverse=True)[1]  # points on the axis are one
    seen: dict[tuple[int, int], int] = {}
    for face in places[faces].tolist():
        for i, j in zip(face, face[1:] + face[:1], strict=True):
            if i != j:
                seen[i, j] = seen.get((i, j), 0) + 1
    assert all(seen[i, j] == seen.get((j, i), 0) for i, j in seen)
    assert volume((vertices, faces)) > 0.1
    assert float(vertices.abs().max()) < 0.85


@pytest.mark.parametrize(
    ("mesh", "expected"),
    [
        (turned(arc(0.7, points=33), 48), 4 / 3 * math.pi * 0.7**3),
        (turned(column(0.5, -0.6, 0.7), 48), math.pi * 0.25 * 1.3),
        (turned([(0.0, -0.7), (0.7, -0.7), (0.0, 0.7)], 48), math.pi * 0.49 * 1.4 / 3),
        (turned(circle(0.25, 0.55, 24), 48, closed=True), 2 * math.pi**2 * 0.55 * 0.0625),
        (turned(column(0.8, -0.5, 0.5), 4), 1.28),
    ],
    ids=["ball", "cylinder", "cone", "ring", "box"],
)
def test_voxels_fill_the_volume(mesh: tuple[torch.Tensor, torch.Tensor], expected: float) -> None:
    shift = torch.tensor([0.013, -0.021, 0.017], dtype=torch.float64)
    filled = voxels((mesh[0] + shift)[None], mesh[1], 40)[0]
    assert float(filled.double().mean() * 8) == pytest.approx(volume(mesh), rel=0.04)
    assert volume(mesh) == pytest.approx(expected, rel=0.03)


def test_a_voxel_is_filled_where_its_centre_lies_inside() -> None:
    """A cone, whose inside is known, cell by cell but for those within the flats of its sides."""
    side, shift = 16, 0.011
    vertices, faces = turned([(0.0, -0.7), (0.7, -0.7), (0.0, 0.7)], 64)
    found = voxels((vertices + shift)[None], faces, side)[0]
    at = (2 * torch.arange(side, dtype=torch.float64) + 1) / side - 1 - shift
    z, y, x = torch.meshgrid(at, at, at, indexing="ij")
    room = (0.7 - z) / 2 - (x**2 + y**2).sqrt()
    assert bool(found[(room > 0.01) & (z > -0.7)].all())
    assert not bool(found[(room < 0) | (z < -0.7)].any())


def test_parts_that_overlap_are_one_solid() -> None:
    box = turned(column(0.5, -0.4, 0.4), 4)
    pair = joined(box, moved(box, x=0.21, y=0.03))
    first, second, both = (voxels(mesh[0][None] + 0.007, mesh[1]) for mesh in (box, moved(box, x=0.21, y=0.03), pair))
    assert torch.equal(both, first | second)
    assert bool((first & second).any())


def test_the_data_set_is_the_same_for_everybody() -> None:
    """Voxels of eight classes, other ones for testing; a float is -1 for empty and 1 for filled."""
    data, test = load("shapes3d"), load("shapes3d", "test")
    assert (data.shape, len(data), len(test), data.classes) == ((1, 12, 12, 12), 1600, 320, 8)
    assert set(data.rows(slice(0, 9)).x.unique().tolist()) == {-1.0, 1.0}
    assert data.labels.bincount().tolist() == [200] * 8
    assert data.sha256() == load("shapes3d").sha256() != test.sha256()
    assert len(torch.unique(data.x.flatten(1), dim=0)) > 1400
    share = (data.x > 0).double().mean((1, 2, 3, 4))
    assert float(share.min()) > 0.02 and float(share.max()) < 0.3
    found = nearest(test.read(slice(None)), test.labels, data.read(slice(None)), data.labels)
    assert found.accuracy > 0.97 and 0.8 < found.overlap < 1


def test_overlap_is_the_intersection_over_the_union() -> None:
    x = torch.tensor([[1.0, 1.0, -1.0, -1.0], [-1.0] * 4])
    others = torch.tensor([[1.0, -1.0, 1.0, -1.0], [1.0, 1.0, -1.0, -1.0], [-1.0] * 4])
    assert overlaps(x, others).tolist() == [[pytest.approx(1 / 3), 1.0, 0.0], [0.0, 0.0, 1.0]]
    found = nearest(x, torch.tensor([0, 1]), others, torch.tensor([2, 0, 2]))
    assert (found.overlap, found.accuracy) == (1.0, 0.5)
    with pytest.raises(ValueError, match="cannot be compared"):
        overlaps(x, torch.zeros(2, 5))
