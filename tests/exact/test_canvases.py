"""Canvases: what is put in comes out, views stay in their cell, and class counts are exact."""

import math

import pytest
import torch

from fewstep.condense.canvases import check_cells, combine, shrink, split
from fewstep.condense.select import select
from fewstep.data.views import Views, random_boxes, within_cells
from fewstep.randomness import Rng


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_split_gives_back_the_shrunk_pictures(k: int, kind: torch.dtype) -> None:
    pictures = Rng(k).uniform(5, k * k, 3, 12, 18, high=256).to(kind)
    canvases = combine(pictures)
    assert canvases.shape == (5, 3, 12, 18) and canvases.dtype == kind
    cells = split(canvases, k)
    assert cells.shape == (5, k * k, 3, 12 // k, 18 // k)
    assert torch.equal(cells, shrink(pictures, k))
    # one canvas alone
    assert torch.equal(combine(pictures[0]), canvases[0]) and torch.equal(split(canvases[0], k), cells[0])


def test_one_picture_a_canvas_is_the_picture() -> None:
    picture = Rng(0).integers(3 * 25, 0, 256).reshape(1, 3, 5, 5).to(torch.uint8)
    assert torch.equal(combine(picture), picture[0]) and torch.equal(split(picture[0], 1), picture)


def test_cells_lie_row_by_row_and_pixels_are_means() -> None:
    first = torch.tensor([[0, 2, 8, 8], [4, 6, 8, 8], [2, 1, 0, 0], [2, 2, 0, 1]], dtype=torch.uint8)
    flat = [torch.full((4, 4), value, dtype=torch.uint8) for value in (10, 20, 30)]
    canvas = combine(torch.stack([first, *flat])[:, None])
    # 3; 8; 1.75 and 0.25, rounded
    assert canvas[0].tolist() == [[3, 8, 10, 10], [2, 0, 10, 10], [20, 20, 30, 30], [20, 20, 30, 30]]


def test_ten_thousand_views_never_leave_their_cell_and_hit_all_alike() -> None:
    """Cells of one value each: a pixel of a view that saw two of them would be another number."""
    n = 10_000
    for k in (2, 3):
        painted = torch.arange(k * k, dtype=torch.float64).reshape(k, k)
        canvas = painted.repeat_interleave(8, 0).repeat_interleave(8, 1)[None]
        counts = torch.zeros(k * k)
        for part in range(4):
            seen = Views("cells", k)(canvas.expand(n // 4, -1, -1, -1), Rng("views", k, part)).flatten(1)
            assert torch.equal(seen.amin(1), seen.amax(1))
            counts += seen[:, 0].long().bincount(minlength=k * k)
        p = 1 / k**2
        # a count is binomial: five standard deviations
        assert bool(((counts - n * p).abs() < 5 * math.sqrt(n * p * (1 - p))).all())


def test_boxes_stay_inside_of_their_cell() -> None:
    rng, n, k = Rng(3), 10_000, 3
    cells = rng.integers(n, 0, k * k)
    boxes = within_cells(random_boxes(n, rng), cells, k)
    low = torch.stack([cells.div(k, rounding_mode="floor"), cells % k], 1).double() / k
    assert bool((boxes[:, :2] >= low - 1e-12).all())
    assert bool((boxes[:, :2] + boxes[:, 2:] <= low + 1 / k + 1e-12).all())


def test_cells_that_pictures_cannot_hold_are_one_line() -> None:
    check_cells(2, (1, 28, 28))
    check_cells(3, (3, 24, 48))
    check_cells(1, (1, 4, 4))
    with pytest.raises(
        ValueError, match=r"^k=2 must divide pictures of 8x8 .* of at least 8x8 pixels; possible: 1 \(whole pictures\)$"
    ):
        check_cells(2, (1, 8, 8))
    with pytest.raises(
        ValueError, match=r"^k=3 must divide pictures of 28x28 into .*; possible: 1 \(whole pictures\), 2$"
    ):
        check_cells(3, (1, 28, 28))
    with pytest.raises(ValueError, match=r"^k=1: samples of shape \[2\] are no pictures"):
        check_cells(1, (2,))
    with pytest.raises(ValueError, match=r"^3 pictures fill no square canvas"):
        combine(torch.zeros(3, 1, 4, 4))
    with pytest.raises(ValueError, match=r"^k=2 must divide the sides of the pictures, 4x5$"):
        combine(torch.zeros(4, 1, 4, 5))


def test_class_counts_are_exact_under_ties_and_ranking_is_over_the_whole_class() -> None:
    labels = torch.arange(60) % 3
    for keep in ("easy", "hard", "random"):
        chosen = select(torch.zeros(60), labels, 7, keep, Rng(0), 3)
        assert chosen.shape == (3, 7)
        assert torch.equal(labels[chosen], torch.arange(3)[:, None].expand(3, 7))
        assert len(chosen.unique()) == 21
    # the lowest and the highest stand at the end of the data, and equal ones keep its order
    scores = torch.ones(60)
    scores[57:], scores[54:57] = 0, 2
    assert select(scores, labels, 2, "easy", Rng(0), 3).tolist() == [[57, 0], [58, 1], [59, 2]]
    assert select(scores, labels, 2, "hard", Rng(0), 3).tolist() == [[54, 0], [55, 1], [56, 2]]


def test_a_random_choice_is_uniform_whatever_the_scores() -> None:
    labels, n = torch.tensor([0] * 5 + [1] * 3), 2000
    counts = torch.zeros(8)
    for seed in range(n):
        counts[select(torch.arange(8.0), labels, 1, "random", Rng(seed), 2).flatten()] += 1
    for group, p in ((slice(0, 5), 1 / 5), (slice(5, 8), 1 / 3)):
        assert bool(((counts[group] - n * p).abs() < 5 * math.sqrt(n * p * (1 - p))).all())


def test_what_cannot_be_selected_is_one_line() -> None:
    labels = torch.tensor([0, 0, 1, -1])
    with pytest.raises(ValueError, match=r"^2 examples of each class are asked for, and class 1 has 1$"):
        select(torch.zeros(4), labels, 2, "easy", Rng(0), 2)
    with pytest.raises(ValueError, match=r"^the score of example 1 is no number"):
        select(torch.tensor([0, torch.nan, 0, 0]), labels, 1, "easy", Rng(0), 2)
    with pytest.raises(ValueError, match=r"^keep='median' is not one of easy, hard, random$"):
        select(torch.zeros(4), labels, 1, "median", Rng(0), 2)
