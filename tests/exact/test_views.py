"""Random views of pictures: what a box shows, and what mixing does."""

from __future__ import annotations

import pytest
import torch

from fewstep.data.views import (
    Views,
    crop,
    cutmix,
    mixup,
    pixels_of,
    random_boxes,
    random_flips,
    random_mixing_box,
    within_cells,
)
from fewstep.randomness import Rng

X = Rng(0, "pictures").normal(4, 2, 8, 8, dtype=torch.float64)
WHOLE = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).double().expand(4, 4)


def test_the_whole_box_is_the_picture() -> None:
    assert torch.equal(crop(X, WHOLE), X)
    flips = torch.tensor([True, False, True, False])
    assert torch.equal(crop(X, WHOLE, flips), torch.where(flips[:, None, None, None], X.flip(-1), X))


def test_a_box_is_read_bilinearly() -> None:
    """On a plane, which bilinear reading keeps, a view inside shows the plane at the places of its pixels."""
    row, column = torch.meshgrid(torch.arange(8.0).double(), torch.arange(8.0).double(), indexing="ij")
    plane = (2 * row + 3 * column).expand(1, 1, 8, 8)
    box = torch.tensor([[0.25, 0.125, 0.5, 0.75]]).double()
    places = (torch.arange(8).double() + 0.5) / 8
    rows, columns = (0.25 + 0.5 * places) * 8 - 0.5, (0.125 + 0.75 * places) * 8 - 0.5
    rows, columns = rows.clamp(2, 5), columns.clamp(1, 6)  # the pixels inside the box
    assert torch.allclose(crop(plane, box)[0, 0], 2 * rows[:, None] + 3 * columns[None], atol=1e-12)


def test_nothing_outside_of_a_box_is_looked_at() -> None:
    """10,000 boxes in cells of a canvas whose other cells are NaN, and every cell is met equally often."""
    n, k = 10_000, 2
    rng = Rng(1, "cells")
    cells = rng.integers(n, 0, k * k)
    boxes = within_cells(random_boxes(n, rng, (0.08, 1.0)), cells, k)
    canvas = torch.full((n, 1, 4, 4), float("nan"))
    for cell in range(k * k):
        r, c = 2 * (cell // k), 2 * (cell % k)
        canvas[cells == cell, :, r : r + 2, c : c + 2] = float(cell)
    seen = crop(canvas, boxes, random_flips(n, rng))
    assert torch.equal(seen, cells[:, None, None, None].expand(n, 1, 4, 4).float())
    counts = torch.bincount(cells).double() / n
    assert (counts - 0.25).abs().max() < 5 * (0.25 * 0.75 / n) ** 0.5


def test_boxes_are_of_the_areas_asked_for() -> None:
    boxes = random_boxes(4000, Rng(2, "boxes"), (0.25, 0.5), (1.0, 1.0))
    area = boxes[:, 2] * boxes[:, 3]
    assert float(area.min()) >= 0.25 and float(area.max()) <= 0.5
    assert float(area.mean()) == pytest.approx(0.375, abs=5 * 0.25 / 12**0.5 / 4000**0.5)
    assert float((boxes[:, :2] + boxes[:, 2:]).max()) <= 1 + 1e-12
    assert torch.equal(boxes[:, 2], boxes[:, 3])
    shared = random_boxes(5, Rng(2, "boxes"), shared=True)
    assert torch.equal(shared, shared[:1].expand(5, 4))


def test_the_gradient_reaches_what_was_looked_at() -> None:
    x = X.clone().requires_grad_()
    boxes, flips = random_boxes(4, Rng(3, "b")), random_flips(4, Rng(3, "f"))
    assert torch.autograd.gradcheck(lambda y: crop(y, boxes, flips), (x,))


def test_cutmix_pastes_a_box_and_counts_its_share() -> None:
    partner = torch.tensor([1, 2, 3, 0])
    box = (0.25, 0.5, 0.5, 0.25)
    before = X.clone()
    mixed, share = cutmix(X, partner, box)
    rows, columns = pixels_of(box, 8, 8)
    assert (rows, columns) == (slice(2, 6), slice(4, 6))
    assert torch.equal(mixed[:, :, rows, columns], X[partner][:, :, rows, columns])
    outside = torch.ones(8, 8, dtype=torch.bool)
    outside[rows, columns] = False
    assert torch.equal(mixed[..., outside], X[..., outside])
    assert share == 1 - 8 / 64
    assert torch.equal(X, before)
    for seed in range(50):
        top, left, high, wide = random_mixing_box(Rng(seed, "box"))
        assert min(top, left) >= 0 and top + high <= 1 + 1e-12 and left + wide <= 1 + 1e-12


def test_mixup_is_a_mean() -> None:
    partner = torch.tensor([1, 0, 3, 2])
    assert torch.allclose(mixup(X, partner, 0.3), 0.3 * X + 0.7 * X[partner], atol=1e-15)


@pytest.mark.parametrize("word", ["none", "flip", "crop:0.5", "cells:2", "crop:0.5+upright"])
def test_views_by_name(word: str) -> None:
    """The same draws give the same views, other draws others, in two parts the same as in one."""
    views = Views.parse(word)
    assert str(views) == word
    one, again, other = (views(X, Rng(seed, "views")) for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert torch.equal(one, other) == (word == "none")
    halves = [views(X[2 * k : 2 * k + 2], Rng(0, "views", part=k, parts=2)) for k in range(2)]
    assert torch.equal(torch.cat(halves), one)


@pytest.mark.parametrize(
    "word",
    ["flips", "crop", "crop:0", "crop:2", "cells:0", "cells:1.5", "none:1", "flip+upright", "crop:0.5+up"],
)
def test_words_that_are_no_views(word: str) -> None:
    with pytest.raises(ValueError):
        Views.parse(word)


def test_points_have_no_views() -> None:
    with pytest.raises(ValueError, match="of pictures"):
        Views.parse("flip")(torch.zeros(2, 3), Rng(0))


def test_upright_views_are_never_mirrored() -> None:
    """A picture that is dark on the left stays so in every crop; without the word half of them turn."""
    x = torch.arange(8.0).expand(200, 1, 8, 8)
    for word, turned in (("crop:0.5+upright", 0), ("cells:1+upright", 0), ("crop:0.5", 100)):
        seen = Views.parse(word)(x, Rng(0, "upright"))
        assert abs(int((seen[:, 0, 0, 0] > seen[:, 0, 0, -1]).sum()) - turned) < 5 * 50**0.5 * bool(turned) + 1, word
    assert [str(Views.parse(w).whole()) for w in ("cells:3", "cells:2+upright", "flip")] == [
        "crop:0.5", "crop:0.5+upright", "flip",
    ]  # fmt: skip
