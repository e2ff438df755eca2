"""A solver's run with somebody else in charge of the loop and of the network."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.randomness import Noise
from fewstep.sampling.coefficients import Levels
from fewstep.sampling.engine import Move, Table, moved
from fewstep.sampling.inputs import repeated


class Turn(NamedTuple):
    """One call: its number, whether it opens a step, and which of the table's rows belong to it: the move, and the lift
    of the next step."""

    call: int
    opens: bool
    row: int
    lift: int | None


def turns(table: Table) -> list[list[Turn]]:
    """The turns of every step."""
    steps: list[list[Turn]] = []
    call = row = 0
    for i, step in enumerate(table.steps):
        row += step.lift is not None
        steps.append([])
        for j in range(len(step.stages)):
            closes = j == len(step.stages) - 1 and i + 1 < len(table.steps)
            lift = row + 1 if closes and table.steps[i + 1].lift is not None else None
            steps[-1].append(Turn(call, j == 0, row, lift))
            call, row = call + 1, row + 1
    return steps


class Trajectory:
    """One run along a table from ``step`` on, one :meth:`advance` per network call: what
    :func:`fewstep.sampling.run` does.

    The lift (churn) of the first step is left out: whoever starts there adds the noise of the lifted level.  Later
    lifts are made at the end of the step before, because the network must see the lifted state.
    """

    def __init__(self, table: Table, step: int = 0) -> None:
        self.table = table
        self.turns = [turn for later in turns(table)[step:] for turn in later]
        self.made = 0
        self.moves: list[Move] = []
        self.history: tuple[Tensor, ...] = ()
        self.anchor: Tensor | None = None
        self.base: Tensor | None = None

    @property
    def over(self) -> bool:
        """Whether every call was made."""
        return self.made == len(self.turns)

    def undo(self) -> None:
        """Take the last call back."""
        self.made, self.history, self.anchor, self.base = self.earlier

    def repeated(self, times: int) -> Trajectory:
        """The same run for ``times`` copies of its batch, one behind the other."""
        other = copy(self)
        other.history = tuple(repeated(m, times) for m in self.history)
        other.anchor = None if self.anchor is None else repeated(self.anchor, times)
        other.base = None if self.base is None else repeated(self.base, times)
        return other

    def advance(self, x0: Tensor, sample: Tensor, noise: Noise) -> Tensor:
        """The state of the next call, from the data prediction ``x0`` at the state ``sample``.

        Computed in the type of ``x0``, given back in that of ``sample``.
        """
        self.earlier = (self.made, self.history, self.anchor, self.base)
        turn, x = self.turns[self.made], sample.to(x0.dtype)
        self.made += 1
        if not self.moves:
            self.moves = list(self.table.moves(x))
        if turn.opens:
            self.base = x
        assert self.base is not None  # a run starts at the opening of a step
        self.history = (self.table.stored(turn.call, x0, x), *self.history)[: self.table.memory]
        new = moved(self.moves[turn.row], self.base, self.history, noise, self.anchor)
        if self.table.anchor is not None and (turn is self.turns[0] or self.table.anchor == "previous"):
            self.anchor = self.table.eps(turn.call, x0, x)
        if turn.lift is not None:
            new = moved(self.moves[turn.lift], new, (), noise, None)
        return new.to(sample.dtype)


def independent(table: Table, step: int) -> bool:
    """Whether a run may start at ``step`` with no history."""
    seen = 0
    for later in table.steps[step:]:
        for stage in later.stages:
            seen += 1
            if len(stage.row.c) > seen:
                return False
    return table.anchor is None


def times_of(table: Table) -> list[float]:
    """The time of every call."""
    return [stage.time for step in table.steps for stage in step.stages]


def same_times(a: list[float], b: list[float]) -> bool:
    """Whether two runs make their calls at the same times, up to rounding."""
    return len(a) == len(b) and torch.allclose(torch.tensor(a).double(), torch.tensor(b).double(), rtol=1e-9, atol=0)


def part(levels: Levels, start: int = 0, stop: int | None = None) -> Levels:
    """Some of the levels of a grid."""
    kept = slice(start, stop)
    return replace(
        levels,
        times=levels.times[kept],
        alpha=levels.alpha[kept],
        sigma=levels.sigma[kept],
        log_snr=levels.log_snr[kept],
    )
