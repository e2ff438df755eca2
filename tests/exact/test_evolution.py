"""Evolution over a discrete space: it finds what there is to find, and never leaves its budgets."""

from __future__ import annotations

import pytest

from fewstep.randomness import Rng
from fewstep.students.evolution import Individual, evolve, fitting, mutated

STAR = (4, 0, 3, 1, 2, 4)


def nearness(individual: Individual) -> float:
    return -sum(abs(a - b) for a, b in zip(individual, STAR, strict=True))


def within(individual: Individual) -> bool:
    return sum(individual) <= 14


@pytest.mark.parametrize("seed", range(4))
def test_it_finds_the_best_of_a_large_space_within_its_budget(seed: int) -> None:
    """5^6 individuals, of which 600 are made; the best lies on the edge of the budget, and nothing beyond is scored."""
    asked: list[Individual] = []

    def score(individual: Individual) -> float:
        asked.append(individual)
        return nearness(individual)

    found = evolve(score, [5] * 6, Rng(seed), fits=within, evaluations=600)
    assert (found.best, found.score) == (STAR, 0)
    assert all(map(within, asked)) and len(asked) == len(set(asked)) == len(found.scores) < 600
    assert max(found.scores.values()) == 0


def test_what_it_makes_depends_on_its_draws_alone() -> None:
    one, same, other = (evolve(nearness, [5] * 6, Rng(seed), evaluations=80) for seed in (0, 0, 1))
    assert one == same and list(one.scores) != list(other.scores)


def test_the_best_of_a_tournament_has_the_child() -> None:
    """With everybody in the tournament every child is a neighbour of the best alive, and of nobody else; the age limit
    lets the best die in the end."""
    made: list[Individual] = []

    def score(individual: Individual) -> float:
        made.append(individual)
        return -float(len(made))  # the first is the best for as long as it lives

    evolve(score, [50] * 4, Rng(0), population=10, tournament=10, evaluations=30)
    assert len(made) == 30
    for k in range(10, 30):
        assert sum(a != b for a, b in zip(made[k], made[k - 10], strict=True)) == 1  # the oldest alive


def test_a_child_differs_in_one_choice_and_fits() -> None:
    rng = Rng(0)
    seen = {mutated((0, 2, 1), [2, 3, 2], rng) for _ in range(200)}
    assert seen == {(1, 2, 1), (0, 0, 1), (0, 1, 1), (0, 2, 0)}
    assert {mutated((0, 2, 1), [2, 3, 2], rng, lambda a: sum(a) <= 3) for _ in range(100)} == seen - {(1, 2, 1)}
    assert mutated((0, 0), [2, 2], rng, lambda a: sum(a) == 0) == (0, 0)


def test_what_cannot_be_searched_is_refused() -> None:
    with pytest.raises(ValueError, match="none of 1000 individuals"):
        fitting([3, 3], Rng(0), lambda individual: False)
    with pytest.raises(ValueError, match="tournament=9 must be from 1 to the population of 8"):
        evolve(nearness, [5] * 6, Rng(0), population=8, tournament=9)
    with pytest.raises(ValueError, match="a choice or more"):
        evolve(nearness, [5, 0], Rng(0))
