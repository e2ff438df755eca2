"""Randomness that does not depend on how the work is split, and data order that is a function of the position."""

import random

import pytest
import torch

from fewstep.data.dataset import epoch_indices
from fewstep.randomness import Rng, derive_seed


def draws(rng: Rng, n: int) -> list[torch.Tensor]:
    """One of every kind of draw, in an order that every part repeats."""
    return [
        rng.normal(n, 3, 2), rng.uniform(n, -1.0, 2.0), rng.integers(n, 0, 7), rng.normal_like(torch.zeros(n, 5)),
        rng.normal(n, dtype=torch.float64), torch.tensor([rng.shared_integer(0, 1000)]), rng.shuffled(9),
    ]  # fmt: skip


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_parts_draw_slices_of_the_whole(parts: int) -> None:
    """The parts' draws put together are the draws of one batch; what is shared is the same for all."""
    whole = draws(Rng(1, "step", 5), 12)
    split = [draws(Rng(1, "step", 5, part=p, parts=parts), 12 // parts) for p in range(parts)]
    for i in range(5):
        assert torch.equal(torch.cat([s[i] for s in split]), whole[i])
    for i in (5, 6):
        assert all(torch.equal(s[i], whole[i]) for s in split)


def test_seeds_are_functions_of_their_parts() -> None:
    """Equal parts, equal stream; a change anywhere, another stream; seeds fit a signed 64-bit integer."""
    assert torch.equal(Rng(1, "a", 2).normal(5), Rng(1, "a", 2).normal(5))
    seeds = {derive_seed(*parts) for parts in [(1, "a", 2), (1, "a", 3), (2, "a", 2), (1, "b", 2), (1, "a"), ("1a", 2)]}
    assert len(seeds) == 6 and all(0 <= seed < 2**63 for seed in seeds)


def test_seeds_are_the_same_on_every_machine() -> None:
    """The seed is a hash written down here, not Python's own, which changes from process to process."""
    assert derive_seed(0, "step", 1) == 1052031682935541021


def test_the_global_generator_is_not_used() -> None:
    before = torch.get_rng_state()
    draws(Rng(0), 4)
    epoch_indices(10, 3, 20, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_ranges() -> None:
    rng = Rng(0)
    u, k = rng.uniform(10_000, -1.0, 2.0), rng.integers(10_000, 3, 6)
    assert u.dtype == torch.float64 and -1 <= float(u.min()) < -0.99 and 1.99 < float(u.max()) < 2
    assert k.unique().tolist() == [3, 4, 5]


@pytest.mark.parametrize(("part", "parts"), [(2, 2), (-1, 2), (0, 0)])
def test_a_part_that_does_not_exist_is_named(part: int, parts: int) -> None:
    with pytest.raises(ValueError, match=f"part={part} of parts={parts}"):
        Rng(0, part=part, parts=parts)


def test_every_epoch_is_a_permutation() -> None:
    """Every sample once an epoch, in another order each time, for batches that do not divide it."""
    order = epoch_indices(17, 0, 3 * 17, seed=2).reshape(3, 17)
    assert all(sorted(epoch.tolist()) == list(range(17)) for epoch in order)
    assert not torch.equal(order[0], order[1]) and not torch.equal(order[1], order[2])
    assert not torch.equal(order, epoch_indices(17, 0, 3 * 17, seed=3).reshape(3, 17))


def test_data_order_is_a_function_of_the_position() -> None:
    """Read in pieces of any size from any start, the order is the same: what makes resume exact."""
    whole = epoch_indices(13, 0, 100, seed=0)
    draw = random.Random(0)
    for _ in range(50):
        start = draw.randrange(99)
        count = draw.randrange(1, 100 - start + 1)
        assert torch.equal(epoch_indices(13, start, count, seed=0), whole[start : start + count])
