"""Generators: whatever makes samples that a loss moves.

Score distillation does not ask what its samples come from: it gives every one of them a direction, and the gradient
finds its way to the parameters behind it.  Behind them may be a student (:class:`~fewstep.sampling.StudentGenerator`),
the samples themselves (:class:`Particles`), or a scene that is looked at from a camera.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from fewstep.conditions import Cond, count, rows, to
from fewstep.randomness import Rng


class Generator(nn.Module, ABC):
    """Samples with a graph; ``shape`` is the shape of one."""

    shape: tuple[int, ...]

    @abstractmethod
    def draw(self, n: int, rng: Rng, cond: Cond = None) -> tuple[Tensor, Cond]:
        """``n`` samples ``[n, *shape]`` made under ``cond`` (one row a sample), through which gradients reach the
        parameters, and the conditions that go with them: those given, or what the generator itself knows of a sample.
        """


class Particles(Generator):
    """Free samples ``x`` ``[N, *shape]``, each a parameter of its own; ``cond`` holds a row for each, or None.

    ValueError for conditions of another number.
    """

    def __init__(self, x: Tensor, cond: Cond = None) -> None:
        super().__init__()
        if count(cond) not in (None, len(x)):
            raise ValueError(f"cond holds {count(cond)} conditions for {len(x)} particles: one each")
        self.x = nn.Parameter(x.clone())
        self.shape = tuple(x.shape[1:])
        self.cond = cond

    def draw(self, n: int, rng: Rng, cond: Cond = None) -> tuple[Tensor, Cond]:
        """``n`` different particles in random order, with their own conditions where they have any.  ValueError for
        more than there are, and for conditions of two kinds."""
        if not 1 <= n * rng.parts <= len(self.x):
            raise ValueError(f"n={n * rng.parts} must lie in 1 .. {len(self.x)}, the number of particles")
        if cond is not None and self.cond is not None:
            raise ValueError("cond: these particles have conditions of their own")
        chosen = rng.shuffled(len(self.x))[rng.part * n :][:n].to(self.x.device)
        return self.x[chosen], cond if self.cond is None else rows(to(self.cond, chosen.device), chosen)
