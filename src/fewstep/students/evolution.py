"""Regularised evolution (Real et al. 2019) over a discrete space, within budgets.

An individual is a tuple of choices, one for each coordinate of the space.  A tournament of a few drawn at random is won
by the *best* of them, whose copy differs in one coordinate; the oldest of the population makes room.  Every individual,
in the first population and later, must fit the budgets.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from fewstep.randomness import Rng

#: Which choice is made at each coordinate, counted from 0.
Individual = tuple[int, ...]
#: So many draws in a row that do not fit say that next to nothing does.
TRIES = 1000


class Evolved(NamedTuple):
    """The best individual and its score, and all that were scored in the order of their first appearance."""

    best: Individual
    score: float
    scores: dict[Individual, float]


def anything(individual: Individual) -> bool:
    """No budget."""
    return True


def evolve(
    score: Callable[[Individual], float],
    sizes: Sequence[int],
    rng: Rng,
    *,
    fits: Callable[[Individual], bool] = anything,
    population: int = 36,
    tournament: int = 8,
    evaluations: int = 300,
) -> Evolved:
    """The individual with the largest score that was found in a space of ``sizes[i]`` choices at coordinate ``i``.

    ``evaluations`` individuals are made in all, the first population among them; one that comes again keeps its score
    and counts.  ``fits`` says whether an individual is within the budgets, and is asked about each before it is scored.
    ValueError when the space has no choices, the tournament is larger than the population, or (next to) nothing fits.
    """
    if not sizes or min(sizes) < 1:
        raise ValueError(f"sizes={list(sizes)} must be a choice or more for each coordinate")
    if not 1 <= tournament <= population:
        raise ValueError(f"tournament={tournament} must be from 1 to the population of {population}")
    scores: dict[Individual, float] = {}
    alive: deque[Individual] = deque(maxlen=population)  # the oldest leaves when another comes
    for k in range(max(evaluations, population)):
        if k < population:
            made = fitting(sizes, rng, fits)
        else:
            some = [alive[i] for i in rng.shuffled(population)[:tournament].tolist()]
            parent = max(some, key=scores.__getitem__)
            made = mutated(parent, sizes, rng, fits)
        if made not in scores:
            scores[made] = score(made)
        alive.append(made)
    best = max(scores, key=scores.__getitem__)
    return Evolved(best, scores[best], scores)


def fitting(sizes: Sequence[int], rng: Rng, fits: Callable[[Individual], bool] = anything) -> Individual:
    """An individual within the budgets, each as probable as any other; ValueError where none is drawn."""
    for _ in range(TRIES):
        made = tuple(rng.shared_integer(0, size) for size in sizes)
        if fits(made):
            return made
    raise ValueError(f"none of {TRIES} individuals drawn is within the budgets: allow more, or a smaller space")


def mutated(
    parent: Individual, sizes: Sequence[int], rng: Rng, fits: Callable[[Individual], bool] = anything
) -> Individual:
    """The parent with another choice at one coordinate; itself where no such neighbour fits."""
    neighbours = [
        near
        for at, size in enumerate(sizes)
        for choice in range(size)
        if choice != parent[at] and fits(near := (*parent[:at], choice, *parent[at + 1 :]))
    ]
    return neighbours[rng.shared_integer(0, len(neighbours))] if neighbours else parent
