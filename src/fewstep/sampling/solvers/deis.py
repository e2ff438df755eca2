"""DEIS: the noise prediction as a polynomial in time, integrated exactly against the linear part.

With ``rho = sigma / alpha`` the probability flow is ``d(x / alpha) / d rho = eps`` on every schedule, so a step is

    x_t = (alpha_t / alpha_s) x_s + alpha_t int_rho_s^rho_t eps d rho

and the solvers of Zhang & Chen 2022 ("Fast Sampling of Diffusion Models with Exponential Integrator") differ in the
variable in which the polynomial through the last noise predictions is written: time itself (:class:`TAB`) or rho
(:class:`RhoAB`, ordinary Adams-Bashforth).  Their rhoRK solvers are the tableaux of
:mod:`~fewstep.sampling.solvers.runge_kutta` in the ratio frame.  The official code sums a table of 10,000 points from
the left; here the integral is Gauss-Legendre.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.sampling.coefficients import NOISE, Form, Levels, gauss_legendre, vandermonde
from fewstep.sampling.rows import Row
from fewstep.sampling.solvers.multistep import Multistep
from fewstep.schedules import Schedule


def quadrature() -> tuple[Tensor, Tensor]:
    """Gauss-Legendre nodes and weights on [0, 1] as tensors."""
    nodes, weights = gauss_legendre()
    return torch.from_numpy(nodes), torch.from_numpy(weights)


@dataclass(frozen=True)
class AdamsBashforth(Multistep):
    """The polynomial of ``degree`` 0 to 3 through the latest ``degree + 1`` noise predictions, of order ``degree + 1``
    once they are there."""

    degree: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.degree <= 3:
            raise ValueError(f"{type(self).__name__}: degree={self.degree} must lie in 0 .. 3")

    @property
    def form(self) -> Form:
        return NOISE

    @property
    def outputs(self) -> int:
        return self.degree + 1

    @abstractmethod
    def clock(self, levels: Levels, i: int) -> float:
        """The variable of the polynomial at time ``i``."""

    @abstractmethod
    def moments(self, levels: Levels, i: int, n: int) -> list[float]:
        """``int u^k d rho`` over step ``i`` for ``k < n``, with ``u`` the clock, 0 at the start and 1 at the end."""

    def row(self, levels: Levels, i: int, outputs: int) -> Row:
        a, c = NOISE.exact(levels.point(i), levels.point(i + 1))
        if outputs == 1:
            return Row(a, (c,))
        start = self.clock(levels, i)
        length = self.clock(levels, i + 1) - start
        nodes = [(self.clock(levels, i - j) - start) / length for j in range(outputs)]
        weights = vandermonde(nodes, self.moments(levels, i, outputs))
        return Row(a, tuple(levels.alpha[i + 1] * w for w in weights))


def ratio(levels: Levels, i: int) -> float:
    """rho at time ``i``."""
    return levels.sigma[i] / levels.alpha[i]


@dataclass(frozen=True)
class RhoAB(AdamsBashforth):
    """rhoAB-DEIS: Adams-Bashforth in rho.  ``degree=3`` is k-diffusion's and diffusers' LMS."""

    def clock(self, levels: Levels, i: int) -> float:
        return ratio(levels, i)

    def moments(self, levels: Levels, i: int, n: int) -> list[float]:
        return [(ratio(levels, i + 1) - ratio(levels, i)) / (k + 1) for k in range(n)]


@dataclass(frozen=True)
class TAB(AdamsBashforth):
    """tAB-DEIS: the polynomial is in the schedule's own time, so the solver is not the same on every schedule."""

    def clock(self, levels: Levels, i: int) -> float:
        return levels.times[i]

    def moments(self, levels: Levels, i: int, n: int) -> list[float]:
        nodes, weights = quadrature()
        first, last = ratio(levels, i), ratio(levels, i + 1)
        times = levels.schedule.time_at(-(first + nodes * (last - first)).log())
        u = (times - levels.times[i]) / (levels.times[i + 1] - levels.times[i])
        powers = u ** torch.arange(n, dtype=torch.float64)[:, None]
        return ((last - first) * (powers @ weights)).tolist()


@dataclass(frozen=True)
class IPNDM(Multistep):
    """iPNDM: DDIM with the noise prediction replaced by a fixed Adams-Bashforth mix of the last ``p`` = 1 .. 4.

    The mixes are those of equal steps, whatever the grid, and of growing length at the start: second order on smooth
    grids, first on others, which is what is declared.
    """

    p: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.p not in MIXES:
            raise ValueError(f"IPNDM: p={self.p} must lie in 1 .. 4")

    @property
    def form(self) -> Form:
        return NOISE

    @property
    def order(self) -> int:
        return 1

    @property
    def outputs(self) -> int:
        return self.p

    def row(self, levels: Levels, i: int, outputs: int) -> Row:
        a, c = NOISE.exact(levels.point(i), levels.point(i + 1))
        return Row(a, tuple(c * share for share in MIXES[outputs]))


MIXES: dict[int, tuple[float, ...]] = {
    1: (1,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


@dataclass(frozen=True)
class ScoreExponential(Multistep):
    """The exponential integrator with the *score* held fixed over a step instead of the noise prediction.

    The first half of the paper's argument only, worse than plain Euler near the data, because the score's scale
    1 / sigma changes fast there: for its ablation, not for use.
    """

    @property
    def form(self) -> Form:
        return NOISE

    @property
    def order(self) -> int:
        return 1

    @property
    def outputs(self) -> int:
        return 1

    def row(self, levels: Levels, i: int, outputs: int) -> Row:
        a, c = NOISE.exact(levels.point(i), levels.point(i + 1))
        if math.isinf(levels.h(i)):
            return Row(a, (c,))
        nodes, weights = quadrature()
        first, last = ratio(levels, i), ratio(levels, i + 1)
        sigma = _sigma(levels.schedule, first + nodes * (last - first))
        return Row(a, (levels.alpha[i + 1] * (last - first) * float(sigma @ weights) / levels.sigma[i],))


def _sigma(schedule: Schedule, rho: Tensor) -> Tensor:
    return schedule.sigma(schedule.time_at(-rho.log()))
