"""Differentiable siamese augmentation: each operation on pictures where its result is known, and its draws."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewstep.data.siamese import (
    BLACK,
    OPERATIONS,
    Siamese,
    brightness,
    contrast,
    cutout,
    flip,
    rotate,
    saturation,
    scale,
    shift,
)
from fewstep.randomness import Rng


@pytest.fixture
def x() -> Tensor:
    """Two pictures, wider than high, none of whose pixels are black."""
    return 0.9 * torch.tanh(Rng(0).normal(2, 3, 4, 6, dtype=torch.float64))


def test_flip_mirrors_the_pictures_that_it_is_told_to(x: Tensor) -> None:
    seen = flip(x, torch.tensor([True, False]))
    assert torch.equal(seen[0], x[0].flip(-1))
    assert torch.equal(seen[1], x[1])


def test_shift_moves_whole_pixels_and_black_comes_in(x: Tensor) -> None:
    seen = shift(x, torch.tensor([[0.25, 0.0], [0.0, -1 / 3]], dtype=torch.float64))  # one row down; two columns left
    assert torch.equal(seen[0, :, 1:], x[0, :, :-1])
    assert torch.equal(seen[1, :, :, :-2], x[1, :, :, 2:])
    assert bool((seen[0, :, 0] == BLACK).all()) and bool((seen[1, :, :, -2:] == BLACK).all())


def test_scale_by_one_changes_nothing_and_by_two_halves_what_is_seen(x: Tensor) -> None:
    assert torch.allclose(scale(x, torch.ones(2, 2)), x, rtol=0, atol=1e-14)
    ramp = torch.arange(8.0, dtype=torch.float64).expand(1, 1, 8, 8)
    seen = scale(ramp, torch.tensor([[1.0, 2.0]]))
    # pixel i is read at 3.5 + (i - 3.5) / 2: a ramp of half the slope
    assert torch.allclose(seen[0, 0], (3.5 + (ramp[0, 0] - 3.5) / 2), atol=1e-14)
    shrunk = scale(torch.zeros(1, 1, 8, 8, dtype=torch.float64), torch.tensor([[0.5, 1.0]]))
    assert bool((shrunk[0, 0, :2] == BLACK).all()) and bool((shrunk[0, 0, 2:6] == 0).all())


def test_rotate_turns_counter_clockwise() -> None:
    x = Rng(0).normal(1, 1, 5, 5, dtype=torch.float64)
    assert torch.allclose(rotate(x, torch.tensor([90.0])), torch.rot90(x, 1, (2, 3)), atol=1e-12)
    # the middle of the right edge of an oblong picture comes to the middle column, as far up as it was right
    oblong = torch.full((1, 1, 9, 15), BLACK, dtype=torch.float64)
    oblong[0, 0, 4, 10] = 1.0  # three to the right of the middle
    assert float(rotate(oblong, torch.tensor([90.0]))[0, 0, 1, 7]) == pytest.approx(1.0, abs=1e-12)


def test_colours(x: Tensor) -> None:
    by = torch.tensor([0.25, -0.5])
    assert torch.allclose(brightness(x, by) - x, by.double()[:, None, None, None].expand_as(x))
    assert torch.allclose(saturation(x, torch.zeros(2)), x.mean(1, keepdim=True).expand_as(x))
    assert torch.allclose(saturation(x, torch.ones(2)), x)
    grey = x[:, :1]
    assert torch.allclose(saturation(grey, torch.full((2,), 2.0)), grey)
    doubled = contrast(x, torch.full((2,), 2.0))
    assert torch.allclose(doubled.mean((1, 2, 3)), x.mean((1, 2, 3)))
    assert torch.allclose(doubled.flatten(1).std(1), 2 * x.flatten(1).std(1))


def test_cutout_makes_a_hole_of_half_the_size_about_its_centre() -> None:
    seen = cutout(torch.zeros(2, 1, 8, 8), torch.tensor([[0.5, 0.5], [0.0, 1.0]]))
    hole = seen[:, 0] == BLACK
    assert bool(hole[0, 2:6, 2:6].all()) and int(hole[0].sum()) == 16
    assert bool(hole[1, :2, 6:].all()) and int(hole[1].sum()) == 4  # three quarters lie outside


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_can_be_differentiated_in_the_pictures(name: str, x: Tensor) -> None:
    augment = Siamese((name,))
    drawn = augment.draw(2, Rng(3))
    assert torch.autograd.gradcheck(lambda at: augment(at, drawn), x.requires_grad_())


@pytest.mark.parametrize("name", OPERATIONS)
def test_draws_fill_their_ranges_and_no_more(name: str) -> None:
    drawn = Siamese((name,)).draw(2000, Rng(0)).values.view(2000, -1)
    operation = OPERATIONS[name]
    low, high = torch.tensor(operation.low), torch.tensor(operation.high)
    assert bool((drawn >= low).all()) and bool((drawn <= high).all())
    # of 2000 uniform numbers none in an outer twentieth happens once in 10^44
    edge = (high - low) / 20
    assert bool((drawn.amin(0) < low + edge).all()) and bool((drawn.amax(0) > high - edge).all())


def test_a_draw_is_for_every_picture_or_one_for_all() -> None:
    augment = Siamese.parse("rotate")
    assert len(augment.draw(5, Rng(0)).values.unique()) == 5
    assert len(augment.draw(5, Rng(0), shared=True).values.unique()) == 1
    one = torch.linspace(-0.9, 0.9, 24, dtype=torch.float64).view(1, 1, 4, 6).expand(5, 1, 4, 6)
    seen = augment(one, augment.draw(5, Rng(0), shared=True))
    assert torch.equal(seen, seen[:1].expand_as(seen))


def test_about_half_of_the_pictures_are_mirrored(x: Tensor) -> None:
    augment, many = Siamese.parse("flip"), x[:1].expand(1000, -1, -1, -1)
    seen = augment(many, augment.draw(1000, Rng(0)))
    mirrored = (seen == x[:1].flip(-1)).flatten(1).all(1)
    assert bool((mirrored | (seen == x[:1]).flatten(1).all(1)).all())
    assert abs(int(mirrored.sum()) - 500) < 80  # five standard deviations


def test_one_of_the_operations_is_drawn_for_a_batch_and_each_comes() -> None:
    augment, rng = Siamese(), Rng(0)
    assert {augment.draw(1, rng).operation for _ in range(100)} == set(OPERATIONS)


def test_none_changes_nothing_and_draws_nothing(x: Tensor) -> None:
    augment, rng = Siamese.parse("none"), Rng(0)
    assert augment(x, augment.draw(2, rng)) is x
    assert rng.shared_integer(0, 2**40) == Rng(0).shared_integer(0, 2**40)
    assert str(augment) == "none" and str(Siamese.parse("crop+flip")) == "crop+flip"


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(ValueError, match=r"'crpo' is not one of color, crop, .*did you mean 'crop'"):
        Siamese.parse("flip+crpo")
    augment = Siamese.parse("flip")
    with pytest.raises(ValueError, match=r"augment=flip is for pictures \[C, H, W\], the samples are \[7\]"):
        augment(torch.zeros(2, 7), augment.draw(2, Rng(0)))
