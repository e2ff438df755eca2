"""GraphCut: the identity of its gains, submodularity, greedy selection three ways, and bins that partition a set."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fewstep.condense.graph_cut import (
    FacilityLocation,
    Gains,
    GraphCut,
    Kernel,
    Products,
    bins,
    cosine,
    greedy,
    inner_product,
    lazy_greedy,
    peel,
)

ALL = torch.arange(24)


def features(seed: int = 0, n: int = 24) -> Tensor:
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrix(kernel: Kernel) -> Tensor:
    everyone = torch.arange(len(kernel))
    return kernel.between(everyone, everyone)


def cut(k: Tensor, chosen: list[int]) -> float:
    """``f(S)`` by its definition."""
    return float(k[:, chosen].sum() - k[chosen][:, chosen].sum())


def cover(k: Tensor, chosen: list[int]) -> float:
    """Facility location by its definition; 0 of nothing."""
    return float(k[:, chosen].amax(1).clamp_min(0).sum()) if chosen else 0.0


def naive(k: Tensor, count: int, value: Callable[[Tensor, list[int]], float]) -> list[int]:
    """Greedy selection that computes the set function anew for every candidate."""
    chosen: list[int] = []
    for _ in range(count):
        rest = [e for e in range(len(k)) if e not in chosen]
        chosen.append(max(rest, key=lambda e: (round(value(k, [*chosen, e]) - value(k, chosen), 9), -e)))
    return chosen


def after(function: type[Gains], kernel: Kernel, chosen: list[int]) -> Tensor:
    """The gains of all items once ``chosen`` are in the set."""
    gains = function(kernel)
    for item in chosen:
        gains.add(item)
    return gains.of(torch.arange(len(kernel)))


def test_the_gain_is_representativeness_less_redundancy() -> None:
    """For any set: the sum over V without S less that over S, and the growth of ``f`` plus ``k(e, e)``, which is 1."""
    kernel = cosine(features())
    k = matrix(kernel)
    for chosen in ([], [3], [0, 7, 11, 20], list(range(0, 24, 2))):
        gains = after(GraphCut, kernel, chosen)
        rest = [i for i in range(24) if i not in chosen]
        assert torch.allclose(gains, k[rest].sum(0) - k[chosen].sum(0), atol=1e-12)
        for e in rest:
            assert float(gains[e]) - 1 == pytest.approx(cut(k, [*chosen, e]) - cut(k, chosen), abs=1e-11)


@pytest.mark.parametrize("function", [GraphCut, FacilityLocation])
def test_gains_fall_as_the_set_grows(function: type[Gains]) -> None:
    """Submodularity: no item gains more beside a larger set."""
    kernel = cosine(features(1))
    chain = [2, 9, 4, 17, 0, 21, 13]
    found = [after(function, kernel, chain[:size]) for size in range(len(chain) + 1)]
    rest = [i for i in range(24) if i not in chain]
    for smaller, larger in pairwise(found):
        assert bool((smaller[rest] - larger[rest] >= -1e-12).all())
    assert float((found[0] - found[-1])[rest].min()) > 0.1  # and by no rounding


@pytest.mark.parametrize("seed", range(5))
def test_greedy_selection_is_the_same_three_ways(seed: int) -> None:
    """By incremental gains, lazily, and from the definition of the set function; for both functions, down to the last
    item, where gains are equal."""
    kernel = cosine(features(seed))
    for function, value in ((GraphCut, cut), (FacilityLocation, cover)):
        expected = naive(matrix(kernel), 24, value)
        assert greedy(kernel, 24, function).tolist() == expected
        assert lazy_greedy(kernel, 24, function).tolist() == expected


def test_of_equal_items_the_first_is_picked_both_ways() -> None:
    same = cosine(torch.ones(6, 3))
    assert greedy(same, 4).tolist() == lazy_greedy(same, 4).tolist() == [0, 1, 2, 3]


def test_totals_and_chunks_are_the_sums_of_the_matrix() -> None:
    for kernel in (cosine(features()), inner_product(features())):
        assert torch.allclose(kernel.totals(), matrix(kernel).sum(0), atol=1e-12)
        once, many = FacilityLocation(kernel), FacilityLocation(kernel, chunk=5)
        assert torch.allclose(once.of(ALL), many.of(ALL), atol=1e-13)
        some = torch.tensor([5, 1, 8])
        assert torch.allclose(matrix(kernel.of(some)), matrix(kernel)[some][:, some], atol=1e-14)


def test_the_kernel_of_products_is_that_of_the_products_themselves() -> None:
    u, v = features(6), features(7)[:, :3]
    products = (u[:, :, None] * v[:, None]).flatten(1)
    for kernel, same in ((cosine(u, v), cosine(products)), (Products(u, v), inner_product(products))):
        assert torch.allclose(matrix(kernel), matrix(same), atol=1e-13)
        assert torch.allclose(kernel.totals(), same.totals(), atol=1e-12)


def test_a_remembered_kernel_is_the_same() -> None:
    kernel = cosine(features(8))
    table, some = kernel.remembered(), torch.tensor([4, 0, 19])
    assert table is not kernel and kernel.remembered(most=24 * 24 - 1) is kernel
    assert torch.allclose(table.totals(), kernel.totals(), atol=1e-12) and len(table) == 24
    assert torch.allclose(matrix(table.of(some)), matrix(kernel.of(some)), atol=1e-14)
    assert torch.equal(greedy(table, 24), greedy(kernel, 24))


def test_similarities_lie_in_0_to_1_and_zero_vectors_are_half_like_everything() -> None:
    """Also vectors whose squares are below the smallest number."""
    x = features()
    x[3] = 0
    x[5] = 1e-200 * x[6]
    k = matrix(cosine(x))
    assert float(k.min()) >= -1e-15 and float(k.max()) <= 1 + 1e-15
    assert bool((k[3] == 0.5).all()) and bool((k[:, 3] == 0.5).all())
    assert float(k[5, 6]) == pytest.approx(1, abs=1e-12)
    angle = torch.nn.functional.cosine_similarity(x[0], x[1], dim=0)
    assert float(k[0, 1]) == pytest.approx((1 + float(angle)) / 2, abs=1e-14)
    assert torch.equal(matrix(cosine(torch.zeros(3, 4))), torch.full((3, 3), 0.5, dtype=torch.float64))
    assert sorted(bins(cosine(torch.zeros(6, 4)), 3).tolist()) == [0, 0, 1, 1, 2, 2]


def test_bins_partition_every_class() -> None:
    """Every item in one bin; sizes of a class differ by one at most."""
    labels = torch.arange(50) % 3
    found = bins(cosine(features(2, 50)), 4, labels)
    for name in range(3):
        sizes = torch.bincount(found[labels == name], minlength=4)
        assert int(sizes.sum()) == int((labels == name).sum()) and int(sizes.max() - sizes.min()) <= 1
    few = bins(cosine(features(3, 3)), 10)
    assert sorted(few.tolist()) == [0, 1, 2]  # fewer items than bins: one each, the rest empty


def test_the_first_bin_is_classical_graph_cut_of_each_class() -> None:
    labels = torch.arange(24) % 2
    found = bins(cosine(features(4)), 3, labels)
    for name in range(2):
        members = (labels == name).nonzero()[:, 0]
        k = matrix(cosine(features(4)[members]))
        assert set(members[naive(k, 4, cut)].tolist()) == set(
            ((found == 0) & (labels == name)).nonzero()[:, 0].tolist()
        )


def test_later_bins_stand_for_what_is_left() -> None:
    """The second set is the greedy choice among the rest, which alone counts as what is stood for."""
    kernel = cosine(features(5))
    first, second, third = peel(kernel, [6, 6, 12])
    rest = torch.tensor([i for i in range(24) if i not in first.tolist()])
    assert rest[naive(matrix(kernel.of(rest)), 6, cut)].tolist() == second.tolist()
    assert sorted([*first.tolist(), *second.tolist(), *third.tolist()]) == list(range(24))
    # among all items it would be another one
    among_all = after(GraphCut, kernel, first.tolist())
    among_all[first] = -torch.inf
    assert int(among_all.argmax()) != int(second[0])


def test_one_bin_is_everything() -> None:
    assert bool((bins(cosine(features()), 1) == 0).all())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: greedy(cosine(torch.ones(3, 2)), 4), r"count=4 must lie in \[0, 3\]"),
        (lambda: lazy_greedy(cosine(torch.ones(3, 2)), -1), r"count=-1 must lie in \[0, 3\]"),
        (lambda: bins(cosine(torch.ones(3, 2)), 0), "count=0 must be at least 1 bin"),
        (lambda: cosine(torch.tensor([[1.0], [torch.nan]])), "item 1 hold NaN"),
    ],
)
def test_what_cannot_be_done_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
