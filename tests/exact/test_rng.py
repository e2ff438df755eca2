"""Randomness that does not depend on how the work is split, and data order that is a function of the position."""

import math
import random
from typing import Any

import pytest
import torch

from fewstep.data.dataset import epoch_indices
from fewstep.randomness import Rng, derive_seed, seed_own_draws, words_per_number

#: What version 0.1.0 drew.
FIRST_UNIFORMS = [0.422536978992178, 1.1509569502695252]
FIRST_NORMALS = [-0.4102480411529541, -0.538698673248291]


def draws(rng: Rng, n: int) -> list[torch.Tensor]:
    """One of every kind of draw, in an order that every part repeats."""
    return [
        rng.normal(n, 3, 2), rng.uniform(n, low=-1.0, high=2.0), rng.integers(n, 0, 7),
        rng.normal_like(torch.zeros(n, 5)), rng.normal(n, dtype=torch.float64), rng.uniform(n, 3, 2),
        rng.choice(n, [1, 0, 3]), rng.stream("other").normal(n, 2),
        torch.tensor([rng.shared_integer(0, 1000)]), rng.shuffled(9), torch.tensor([rng.shared_choice([1, 2, 3])]),
    ]  # fmt: skip


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_parts_draw_slices_of_the_whole(parts: int) -> None:
    """The parts' draws put together are the draws of one batch; what is shared is the same for all."""
    whole = draws(Rng(1, "step", 5), 12)
    split = [draws(Rng(1, "step", 5, part=p, parts=parts), 12 // parts) for p in range(parts)]
    for i in range(8):
        assert torch.equal(torch.cat([s[i] for s in split]), whole[i])
    for i in (8, 9, 10):
        assert all(torch.equal(s[i], whole[i]) for s in split)


@pytest.mark.parametrize("shape", [(8, 16, 9), (7, 23, 5), (1, 1501), (333,)])
@pytest.mark.parametrize("kind", ["normal", "double", "uniform"])
def test_parts_of_large_draws_pass_over_the_others(shape: tuple[int, ...], kind: str, monkeypatch: Any) -> None:
    """With sizes that fill PyTorch's blocks of 16 numbers and that cut them: the same bits, the same generator at the
    end, and never more numbers drawn than the part's own and what fills their blocks."""
    drawn = []
    for name in ("randn", "rand"):
        draw = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda n, draw=draw, **how: (drawn.append(n), draw(n, **how))[1])

    def values(rng: Rng, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        if kind == "uniform":
            return rng.uniform(n, *shape[1:]), rng.generator.get_state()
        dtype = torch.float64 if kind == "double" else torch.float32
        return rng.normal(n, *shape[1:], dtype=dtype), rng.generator.get_state()

    mine = math.prod(shape)
    for parts in (2, 5, 16):
        whole, state = values(Rng(1), shape[0] * parts)
        for part in {0, 1, parts // 2, parts - 1}:
            drawn.clear()
            found, left = values(Rng(1, part=part, parts=parts), shape[0])
            assert torch.equal(found, whole[shape[0] * part :][: shape[0]]) and torch.equal(left, state)
            if mine * parts >= 1024:
                assert drawn[-1] <= mine + 46


def test_a_draw_that_cannot_be_cut_is_drawn_whole() -> None:
    """Where PyTorch draws in another way than is counted on, found by trial (it does so in bfloat16)."""
    assert words_per_number(torch.randn, torch.bfloat16) == 0
    assert [words_per_number(torch.randn, dtype) for dtype in (torch.float32, torch.float64)] == [1, 2]
    whole = Rng(1).normal(4, 1000, dtype=torch.bfloat16)
    assert torch.equal(Rng(1, part=1, parts=2).normal(2, 1000, dtype=torch.bfloat16), whole[2:])


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


def test_own_draws_are_seeded_as_pytorch_does_it(monkeypatch: Any) -> None:
    """On the CPU the same draws as after torch.manual_seed, without what that writes down for other devices."""
    with torch.random.fork_rng([]):
        torch.manual_seed(5)
        expected = torch.rand(3), torch.nn.functional.dropout(torch.ones(20), 0.5)
        monkeypatch.setattr(torch.cuda, "manual_seed_all", None)
        seed_own_draws(5, torch.device("cpu"))
        found = torch.rand(3), torch.nn.functional.dropout(torch.ones(20), 0.5)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_ranges() -> None:
    rng = Rng(0)
    u, k = rng.uniform(10_000, low=-1.0, high=2.0), rng.integers(10_000, 3, 6)
    assert u.dtype == torch.float64 and -1 <= float(u.min()) < -0.99 and 1.99 < float(u.max()) < 2
    assert k.unique().tolist() == [3, 4, 5]


def test_draws_stay_what_they_were() -> None:
    """Written down: a recorded run can only be repeated with these numbers."""
    rng = Rng(7, "step", 3)
    assert rng.uniform(2, low=-1.0, high=2.0).tolist() == FIRST_UNIFORMS
    assert rng.normal(2).tolist() == FIRST_NORMALS
    assert torch.equal(Rng(1).uniform(6), Rng(1).uniform(3, 2).flatten())


def test_a_stream_does_not_depend_on_what_was_drawn_before() -> None:
    """Known by its name: neither draws in front of it nor other streams change it, and it changes nothing here."""
    fresh, used = Rng(0, "step", 1), Rng(0, "step", 1)
    used.normal(100)
    used.stream("times").normal(3)
    assert torch.equal(fresh.stream("noise").normal(5), used.stream("noise").normal(5))
    again = Rng(0, "step", 1)
    again.normal(100)
    assert torch.equal(again.normal(4), used.normal(4))
    streams = [Rng(seed, "step", 1).stream(name).normal(4) for seed in (0, 1) for name in ("noise", "times")]
    streams.append(Rng(0, "step", 1).normal(4))
    assert len({tuple(s.tolist()) for s in streams}) == 5


def test_choices_are_as_frequent_as_their_weights() -> None:
    """40,000 draws: shares within four standard errors, nothing without a weight, weights need not sum to 1."""
    weights, n = [2.0, 0.0, 1.0, 5.0, 0.0], 40_000
    found = Rng(0).choice(n, weights).bincount(minlength=5) / n
    rng = Rng(1)
    shared = torch.tensor([rng.shared_choice(weights) for _ in range(4000)]).bincount(minlength=5) / 4000
    for k, share in enumerate(w / 8 for w in weights):
        assert abs(float(found[k]) - share) <= 4 * (share * (1 - share) / n) ** 0.5
        assert abs(float(shared[k]) - share) <= 4 * (share * (1 - share) / 4000) ** 0.5


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [1.0, -1.0], [float("nan"), 1.0], [[1.0], [2.0]]])
def test_weights_that_are_none_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="none negative and not all 0"):
        Rng(0).choice(3, weights)


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
