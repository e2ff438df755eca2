"""Two samplers of a chain with the same dice: their states differ for what they do, and for nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.discrete.chains import choose, gumbels, uniforms
from fewstep.randomness import Rng


@dataclass(frozen=True)
class Draws:
    """The randomness of one interval: ``level`` in [0, 1) and ``gumbel`` for every position."""

    level: Tensor  # [B, L]
    gumbel: Tensor  # [B, L, states]

    @classmethod
    def fresh(cls, rng: Rng, n: int, length: int, states: int) -> Draws:
        return cls(uniforms(rng, (n, length)), gumbels(rng, (n, length, states)))


class Moves:
    """Moves the positions of a state during one interval, in one step or in many.

    A position moves when the probability of having moved by now passes its ``level``; where to, its ``gumbel`` decides.
    That is the law of the steps exactly, however many there are, and samplers with the same draws move as alike as
    their laws let them: with equal steps they are equal.  A position that has moved needs new draws to move again.
    """

    def __init__(self, draws: Draws) -> None:
        self.level, self.gumbel = draws.level, draws.gumbel
        self.stayed = torch.ones_like(draws.level)
        self.moved = torch.zeros_like(draws.level, dtype=torch.bool)

    def __call__(self, x: Tensor, law: Tensor) -> Tensor:
        """``x`` after a step with this law ``[B, L, states]``."""
        here = x[..., None]
        self.stayed = self.stayed * law.gather(-1, here).squeeze(-1).double()
        moves = (1 - self.stayed > self.level) & ~self.moved
        self.moved = self.moved | moves
        return torch.where(moves, choose(law.scatter(-1, here, 0.0), self.gumbel), x)

    def renew(self, rng: Rng) -> None:
        """New draws for the positions that have moved."""
        fresh = Draws.fresh(rng, *self.gumbel.shape)
        self.level = torch.where(self.moved, fresh.level, self.level)
        self.gumbel = torch.where(self.moved[..., None], fresh.gumbel, self.gumbel)
        self.stayed = torch.where(self.moved, 1.0, self.stayed)
        self.moved = torch.zeros_like(self.moved)
