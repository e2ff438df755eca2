"""Semi-discrete optimal transport: a continuous source onto n target points, by the heights of n planes.

The Brenier potential ``u_h(x) = max_j <x, y_j> + h_j`` is convex and piecewise linear; its gradient ``T(x) = y_j``
sends the cell of plane j to target j.  For quadratic cost T is optimal onto the law that gives ``y_j`` the mass of its
cell, and the heights that make these masses the wanted ``nu`` minimise a convex energy (Gu et al. 2016)::

    E(h) = int u_h dmu - sum_j nu_j h_j,      dE / dh_j = mu(cell j) - nu_j

The masses are counted over draws from the source.  Planes are compared block by block, so that memory does not grow
with the number of targets times that of draws.  Two ways to the heights: :class:`Adam` is that of DPM-OT (Li et al.
2023, and its code), :class:`AveragedGradient` reaches the same masses with far fewer draws.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.randomness import Rng

#: Rows of draws and of targets that are compared at a time (8 MB of scores in float32).
SOURCE_ROWS, TARGET_ROWS = 1024, 2048

#: Told after every check: draws used so far, draws allowed, masses found.
Report = Callable[[int, int, "Masses"], None]


class Source(ABC):
    """A law with independent coordinates of mean ``centre`` and standard deviation ``deviation``."""

    name: ClassVar[str]
    centre: ClassVar[float]
    deviation: ClassVar[float]

    @abstractmethod
    def draw(self, n: int, shape: tuple[int, ...], rng: Rng) -> Tensor:
        """``[n, *shape]``."""


class GaussianSource(Source):
    """Standard normal: the noise that samplers start from."""

    name = "gaussian"
    centre = 0.0
    deviation = 1.0

    def draw(self, n: int, shape: tuple[int, ...], rng: Rng) -> Tensor:
        return rng.normal(n, *shape)


class UniformSource(Source):
    """Uniform on the unit cube: what DPM-OT's code draws."""

    name = "uniform"
    centre = 0.5
    deviation = 12**-0.5

    def draw(self, n: int, shape: tuple[int, ...], rng: Rng) -> Tensor:
        return rng.uniform(n * math.prod(shape)).reshape(n, *shape).float()


SOURCES: dict[str, type[Source]] = {"gaussian": GaussianSource, "uniform": UniformSource}


@dataclass(frozen=True, eq=False)
class Masses:
    """How often each cell was hit, ``counts [n]``, beside the wanted ``weights [n]``."""

    counts: Tensor
    weights: Tensor

    @property
    def draws(self) -> int:
        return int(self.counts.sum())

    @property
    def shares(self) -> Tensor:
        """The masses found, ``[n]``."""
        return self.counts.double() / self.draws

    @property
    def empty(self) -> Tensor:
        """Indices of the cells that no draw hit.  A cell of the right mass stays unhit with probability
        ``exp(-nu_j draws)``."""
        return (self.counts == 0).nonzero()[:, 0]

    @property
    def error(self) -> float:
        """``sqrt(sum_j (p_j - nu_j)^2 / nu_j)``, for equal weights the root mean square relative error of the masses,
        with the part that comes from counting finitely many draws subtracted (unbiased in the square; 0 if negative).

        At least twice the total variation between p and nu.
        """
        p, n = self.shares, self.draws
        square = (((p - self.weights) ** 2 - p * (1 - p) / max(n - 1, 1)) / self.weights).sum()
        return math.sqrt(max(float(square), 0.0))


@dataclass(frozen=True, eq=False)
class BrenierPotential:
    """``targets`` ``[n, *shape]`` with their ``heights`` and ``weights`` ``[n]`` (float64; weights sum to 1).

    Works in the type of the targets.  Raises ValueError for shapes that do not fit and for weights that are not
    positive.
    """

    targets: Tensor
    heights: Tensor
    weights: Tensor
    source: Source

    def __post_init__(self) -> None:
        n = len(self.targets)
        if self.targets.ndim < 2 or n == 0 or not bool(torch.isfinite(self.targets).all()):
            raise ValueError(f"targets must be finite [n, ...], got shape {list(self.targets.shape)}")
        for name, given in (("heights", self.heights), ("weights", self.weights)):
            if given.shape != (n,) or not bool(torch.isfinite(given).all()):
                raise ValueError(f"{name} must be {n} finite numbers, one a target, got shape {list(given.shape)}")
        if float(self.weights.min()) <= 0 or abs(float(self.weights.double().sum()) - 1) > 1e-6:
            raise ValueError(
                f"weights must be positive and sum to 1, got {float(self.weights.min()):g} .. and a sum of "
                f"{float(self.weights.double().sum()):g}"
            )

    @classmethod
    def of(cls, targets: Tensor, source: Source, weights: Tensor | None = None) -> BrenierPotential:
        """All heights 0, targets in float32 unless they are float64; equal weights unless given (normalised here).

        ValueError for two equal targets, whose cells could not be told apart.
        """
        if targets.ndim > 1 and (twins := equal_rows(targets.flatten(1))) is not None:
            raise ValueError(f"targets {twins[0]} and {twins[1]} are equal: keep one, with the weight of both")
        kind = torch.float64 if targets.dtype == torch.float64 else torch.float32
        n, device = len(targets), targets.device
        given = torch.ones(n) if weights is None else weights
        shares = given.to(device, torch.float64) / given.double().sum().to(device)
        return cls(targets.to(kind), torch.zeros(n, dtype=torch.float64, device=device), shares, source)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one target, and of one draw."""
        return tuple(self.targets.shape[1:])

    def __call__(self, x: Tensor) -> Tensor:
        """``T(x)``: for each of ``x [B, *shape]`` the target of its cell."""
        return self.targets[self.cells(x)]

    def cells(self, x: Tensor) -> Tensor:
        """The index ``[B]`` of the highest plane above each of ``x [B, *shape]``."""
        return self.planes(x)[1][:, 0]

    def planes(self, x: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        """Values and indices ``[B, k]`` of the k highest planes above ``x [B, *shape]``, highest first."""
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"x of shape {list(x.shape)} does not fit targets of shape {list(self.shape)}")
        if not 1 <= k <= len(self.targets):
            raise ValueError(f"k={k}: there are {len(self.targets)} planes")
        flat, y = x.to(self.targets).flatten(1), self.targets.flatten(1)
        h = self.heights.to(y)
        blocks = [(i, y[i : i + TARGET_ROWS], h[i : i + TARGET_ROWS]) for i in range(0, len(y), TARGET_ROWS)]
        found = [self._highest(rows, blocks, k) for rows in flat.split(SOURCE_ROWS)]
        return torch.cat([values for values, _ in found]), torch.cat([index for _, index in found])

    def _highest(self, x: Tensor, blocks: list[tuple[int, Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
        values, index = x.new_empty(len(x), 0), torch.empty(len(x), 0, dtype=torch.long, device=x.device)
        for first, y, h in blocks:
            scores = torch.addmm(h, x, y.T)
            # max is three times faster than topk
            new, at = scores.max(1, keepdim=True) if k == 1 else scores.topk(min(k, len(y)), dim=1)
            values, index = torch.cat([values, new], 1), torch.cat([index, at + first], 1)
            values, order = values.topk(min(k, values.shape[1]), dim=1)
            index = index.gather(1, order)
        return values, index

    def energy(self, x: Tensor) -> float:
        """``E(h)`` over draws ``x [B, *shape]`` from the source."""
        mean = self.planes(x)[0].double().mean()
        return float(mean - (self.weights * self.heights).sum())

    def gradient(self, x: Tensor) -> Tensor:
        """``dE / dh`` ``[n]`` over draws ``x``: masses found less masses wanted."""
        return torch.bincount(self.cells(x), minlength=len(self.targets)) / len(x) - self.weights

    def masses(self, draws: int, rng: Rng) -> Masses:
        """The masses of the cells, counted over ``draws`` draws from the source."""
        counts = torch.zeros(len(self.targets), dtype=torch.long, device=self.targets.device)
        for x in self.drawn(draws, rng):
            counts += torch.bincount(self.cells(x), minlength=len(self.targets))
        return Masses(counts, self.weights)

    def drawn(self, draws: int, rng: Rng) -> Iterator[Tensor]:
        """``draws`` draws from the source, a block at a time, on the device of the targets."""
        for start in range(0, draws, SOURCE_ROWS):
            yield self.source.draw(min(SOURCE_ROWS, draws - start), self.shape, rng).to(self.targets)

    def at(self, heights: Tensor) -> BrenierPotential:
        """The same planes at other heights."""
        return replace(self, heights=heights.to(self.heights))

    def angles(self, x: Tensor, k: int = 2) -> Tensor:
        """Angles ``[B, k - 1]`` in radians between the highest plane above ``x`` and the next k - 1, that is between
        their normals ``(y_i, -1)``: large where T jumps between far targets, at its singular set (An et al. 2020).

        DPM-OT's code rescales the angles of a batch to [0, 1]; here a sample's angle does not depend on its batch.
        """
        if k < 2:
            raise ValueError(f"k={k}: an angle takes at least two planes")
        y = self.targets.flatten(1).double()
        normals = torch.nn.functional.normalize(torch.cat([y, -torch.ones_like(y[:, :1])], 1), dim=1)
        chosen = normals[self.planes(x, k)[1]]
        # the half-chord keeps the digits of small angles, which acos of a cosine near 1 would lose
        half = (chosen[:, :1] - chosen[:, 1:]).norm(dim=2) / 2
        return 2 * torch.asin(half.clamp_max(1))

    def regular(self, n: int, rng: Rng, angle: float, k: int = 2) -> Tensor:
        """``n`` draws from the source ``[n, *shape]`` whose angles are all ``angle`` or less: those nearer to the
        singular set are discarded.  ValueError when fewer than 1 in 100 draws are kept."""
        kept: list[Tensor] = []
        drawn = found = 0
        while found < n:
            x = self.source.draw(n, self.shape, rng).to(self.targets)
            kept.append(x[self.angles(x, k).amax(1) <= angle])
            drawn, found = drawn + n, found + len(kept[-1])
            if found * 100 < drawn:
                raise ValueError(f"angle={angle:g}: only {found} of {drawn} draws are below it; give a larger one")
        return torch.cat(kept)[:n]


def equal_rows(x: Tensor) -> tuple[int, int] | None:
    """Two equal rows of ``x [n, d]``, None if there are none.

    Rows are sorted by their inner product with one fixed vector, taken row by row so that equal rows get equal ones.
    """
    direction = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=torch.float64).sin()
    keys, order = torch.cat([(rows * direction).sum(1) for rows in x.split(SOURCE_ROWS)]).sort()
    for i in (keys.diff() == 0).nonzero()[:, 0].tolist():
        first, second = sorted((int(order[i]), int(order[i + 1])))
        if torch.equal(x[first], x[second]):
            return first, second
    return None


def spreads(potential: BrenierPotential) -> Tensor:
    """The standard deviation ``[n]`` of ``<x, y_j - mean y>`` over the source, at least a tenth of its root mean
    square: the scale on which heights count."""
    y = potential.targets.flatten(1).double()
    spread = potential.source.deviation * (y - potential.weights @ y).norm(dim=1)
    return spread.clamp_min(0.1 * float(spread.square().mean().sqrt()))


def as_if_independent(potential: BrenierPotential) -> Tensor:
    """The heights that would be right if the planes' values were independent Gaussians.

    Plane j is the highest where ``<x, y_j>`` exceeds a common level less ``h_j``, an event of mass nu_j at the quantile
    ``z_j`` of its spread: ``h_j = -<centre, y_j> - spread_j z_j``.  Good in high dimensions, useless on a line.
    """
    centre = potential.source.centre * potential.targets.flatten(1).double().sum(1)
    heights = -centre - spreads(potential) * torch.special.ndtri(1 - potential.weights)
    return heights - heights.mean()


class HeightSolver(ABC):
    """Finds heights; gives the potential at the best ones with the masses found there."""

    @abstractmethod
    def solve(self, potential: BrenierPotential, rng: Rng, report: Report | None) -> tuple[BrenierPotential, Masses]:
        """From the heights of ``potential`` on."""


@dataclass(frozen=True)
class AveragedGradient(HeightSolver):
    """Stochastic gradient descent with averaging, until the masses are right.

    ``h_j <- h_j - step D_j g_j`` with one draw or more a target, and ``D_j = spread_j / phi(z_j)`` the inverse of the
    slope of cell j's mass in its height if the planes' values were independent Gaussians: a step of 1 is then Newton's.
    Gradients larger than the noise of counting are scaled down to it.  A stage gives the mean of its last three
    quarters; its masses are counted over fresh draws; the next one starts from the best mean so far, is twice as long
    and has half the step.  Ends at ``tolerance`` (:attr:`Masses.error`) with no empty cell, or when another stage would
    take more than ``draws``.  In its favour: N draws a target cannot tell masses apart better than to ``1 / sqrt(N)``,
    and in high dimensions it ends within about a factor of two of that (averaged projected descent is minimax here,
    Genans et al. 2025).
    """

    tolerance: float = 0.1
    draws: int = 4_000_000
    step: float = 0.5
    first: int = 40
    check: int = 20  # draws a target

    def __post_init__(self) -> None:
        if self.tolerance <= 0 or self.draws < 1 or self.step <= 0 or self.first < 2 or self.check < 1:
            raise ValueError(
                f"AveragedGradient: tolerance={self.tolerance}, draws={self.draws}, step={self.step} and check="
                f"{self.check} must be positive, first={self.first} at least 2"
            )

    def solve(self, potential: BrenierPotential, rng: Rng, report: Report | None) -> tuple[BrenierPotential, Masses]:
        n = len(potential.targets)
        batch, check = max(n, 64), max(self.check * n, 20_000)
        quantile = torch.special.ndtri(1 - potential.weights)
        slope = torch.exp(-quantile.square() / 2) / math.sqrt(2 * math.pi) / spreads(potential)
        noise = math.sqrt(max(n - 1, 1) / batch)
        used, length, step = 2 * check, self.first, self.step
        starts = [potential, potential.at(as_if_independent(potential))]
        best, masses = min(((start, start.masses(check, rng)) for start in starts), key=lambda pair: pair[1].error)
        while not (masses.error <= self.tolerance and len(masses.empty) == 0):
            if report is not None:
                report(used, self.draws, masses)
            if used + length * batch + check > self.draws:
                break
            mean, now = torch.zeros_like(best.heights), best
            for i in range(length):
                g = now.masses(batch, rng).shares - best.weights
                size = math.sqrt(float((g.square() / best.weights).sum()))
                g = g * min(1.0, noise / size) if size > 0 else g
                h = now.heights - step * g / slope
                now = best.at(h - h.mean())
                if i >= length // 4:
                    mean += now.heights / (length - length // 4)
            found = best.at(mean)
            counted = found.masses(check, rng)
            if counted.error < masses.error:
                best, masses = found, counted
            used, length, step = used + length * batch + check, 2 * length, step / 2
        if report is not None:
            report(used, self.draws, masses)
        return best, masses


@dataclass(frozen=True)
class Adam(HeightSolver):
    """DPM-OT's own solver (its code): Adam without bias correction, about 10 draws a target, zero-mean heights.

    ``rate`` is in units of the standard deviation of ``<x, y>``, so that it means the same in every dimension (the
    paper's 0.1 and 20 are absolute).  Stops at a gradient norm of ``tolerance`` without empty cells; after ``patience``
    iterations without a smaller norm it doubles the draws and takes 0.8 of the rate, at most ``doublings`` times.  The
    heights with the smallest norm are kept.  The norm of a batch of B draws cannot fall below ``1 / sqrt(B)``: the
    paper's 8e-4 takes 1.6 million draws a gradient, whatever n.
    """

    rate: float = 0.03
    tolerance: float = 8e-4
    iterations: int = 10_000
    draws: int = 10  # a target and gradient
    patience: int = 50
    doublings: int = 3
    beta1: float = 0.9
    beta2: float = 0.999

    def solve(self, potential: BrenierPotential, rng: Rng, report: Report | None) -> tuple[BrenierPotential, Masses]:
        n, batch, rate = len(potential.targets), self.draws * len(potential.targets), self.rate
        scale = float(spreads(potential).square().mean().sqrt())
        m, v = torch.zeros_like(potential.heights), torch.zeros_like(potential.heights)
        now, best, masses = potential, potential, potential.masses(batch, rng)
        smallest, bad, doubled, used = math.inf, 0, 0, 0
        for i in range(self.iterations):
            found = now.masses(batch, rng) if i else masses
            g, used = found.shares - now.weights, used + batch
            norm = float(g.norm())
            bad += 1
            if norm < smallest:
                best, masses, smallest, bad = now, found, norm, 0
            if report is not None and (i + 1) % 50 == 0:
                report(used, self.iterations * self.draws * n, found)
            if norm < self.tolerance and len(found.empty) == 0:
                break
            if bad > self.patience and doubled < self.doublings:
                batch, rate, doubled, bad, smallest = 2 * batch, 0.8 * rate, doubled + 1, 0, math.inf
            m, v = self.beta1 * m + (1 - self.beta1) * g, self.beta2 * v + (1 - self.beta2) * g.square()
            h = now.heights - rate * scale * m / (v.sqrt() + 1e-8)
            now = now.at(h - h.mean())
        return best, masses


def transport(
    targets: Tensor,
    rng: Rng,
    source: Source | None = None,
    weights: Tensor | None = None,
    solver: HeightSolver | None = None,
    report: Report | None = None,
) -> tuple[BrenierPotential, Masses]:
    """The semi-discrete optimal transport of ``source`` (standard normal) onto ``targets [n, *shape]`` with ``weights``
    (equal), and the masses that its cells were found to have: ask them for ``error`` and ``empty``.

    The same law must be drawn from when the map is used.
    """
    start = BrenierPotential.of(targets, source or GaussianSource(), weights)
    if len(targets) == 1:
        return start, start.masses(1, rng)
    return (solver or AveragedGradient()).solve(start, rng, report)
