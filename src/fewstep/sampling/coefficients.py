"""What every solver's coefficients are made of: the levels of a grid and the exponential integrals.

Between two times ``s > t`` with ``h = lambda_t - lambda_s > 0`` the probability-flow ODE has the exact solution

    x_t = (sigma_t / sigma_s) x_s + alpha_t sum_k psi_k(h) h^k D^(k)        (data prediction, :data:`DATA`)
    x_t = (alpha_t / alpha_s) x_s - sigma_t sum_k chi_k(h) h^k eps^(k)      (noise prediction, :data:`NOISE`)

where ``D^(k)`` is the k-th derivative along lambda (Lu et al. 2022, DPM-Solver++, eq. 9; DPM-Solver, eq. 3.4).  The two
are one :class:`Form` each, so that a solver is written once for both.  Everything here is float64 in Python numbers: a
table of a few dozen rows is made once per grid.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fewstep.grids import check_grid
from fewstep.schedules import LOG_SNR_BOUND, Schedule

OutputKind = Literal["x0", "eps"]


def chi(n: int, h: float) -> list[float]:
    """``[chi_0, .., chi_n]`` with ``chi_k(h) = sum_m h^(m+1) / (m+k+1)!``, that is ``h phi_(k+1)(h)``; accurate for
    every h, infinite ones too.

    The recursion ``chi_k = chi_(k-1) / h - 1/k!`` loses the digits of small h at every k, so below 1 the power series
    gives ``chi_n`` and the recursion runs down from it.
    """
    if abs(h) >= 1:
        up = [math.expm1(h)]
        for k in range(1, n + 1):
            up.append(up[-1] / h - 1 / math.factorial(k))
        return up
    term = h / math.factorial(n + 1)
    total, m = term, n + 2
    while abs(term) > 1e-17 * abs(total):
        term *= h / m
        total += term
        m += 1
    down = [total]
    for k in range(n, 0, -1):
        down.append(h * (down[-1] + 1 / math.factorial(k)))
    return down[::-1]


def psi(n: int, h: float) -> list[float]:
    """``[psi_0, .., psi_n]``: ``psi_0 = 1 - exp(-h)``, ``psi_k = 1/k! - psi_(k-1) / h = -chi_k(-h)``."""
    return [-value for value in chi(n, -h)]


def vandermonde(nodes: Sequence[float], moments: Sequence[float]) -> list[float]:
    """The weights ``w`` with ``sum_i w_i nodes_i^k = moments_k`` for ``k = 0 .. n-1`` (Bjorck & Pereyra 1970)."""
    w, n = list(moments), len(nodes)
    for k in range(n - 1):
        for j in range(n - 1, k, -1):
            w[j] -= nodes[k] * w[j - 1]
    for k in range(n - 2, -1, -1):
        for j in range(k + 1, n):
            w[j] /= nodes[j] - nodes[j - k - 1]
        for j in range(k, n - 1):
            w[j] -= w[j + 1]
    return w


@cache
def gauss_legendre(n: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of the quadrature on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return (nodes + 1) / 2, weights / 2


class Point(NamedTuple):
    """The coefficients of one noise level: ``x = alpha x_0 + sigma eps``."""

    alpha: float
    sigma: float
    log_snr: float


@dataclass(frozen=True)
class Levels:
    """A grid seen through its schedule: ``steps + 1`` times with alpha, sigma and lambda as Python floats.

    Lambda is -inf at a start of pure noise and +inf at an end of pure data (the schedules bound it at +-20; beyond
    lies nothing that float64 could tell from the limit).  Solvers take the exact first-order step there.
    """

    schedule: Schedule
    times: tuple[float, ...]
    alpha: tuple[float, ...]
    sigma: tuple[float, ...]
    log_snr: tuple[float, ...]

    @classmethod
    def of(cls, schedule: Schedule, times: Tensor) -> Levels:
        """The levels of a grid ``[steps + 1]``.

        Raises ValueError unless the times fall strictly, lie in the schedule's range, and lambda rises strictly with
        infinities at the ends only.
        """
        times = check_grid(times, schedule).cpu()
        alpha, sigma = schedule.alpha(times).tolist(), schedule.sigma(times).tolist()
        if float(times[-1]) == schedule.data_time:
            alpha[-1], sigma[-1] = 1.0, 0.0
        log_snr = [_log_snr(a, s) for a, s in zip(alpha, sigma, strict=True)]
        for i in range(len(log_snr) - 1):
            if not log_snr[i] < log_snr[i + 1]:
                raise ValueError(
                    f"times {float(times[i])!r} and {float(times[i + 1])!r} have no distinct noise levels on "
                    f"{type(schedule).__name__} (half log-SNR {log_snr[i]:g} and {log_snr[i + 1]:g}); drop one"
                )
        return cls(schedule, tuple(times.tolist()), tuple(alpha), tuple(sigma), tuple(log_snr))

    @property
    def steps(self) -> int:
        return len(self.times) - 1

    def point(self, i: int) -> Point:
        """The level of time ``i``."""
        return Point(self.alpha[i], self.sigma[i], self.log_snr[i])

    def denoised(self) -> Levels:
        """The same levels with pure data (``alpha = 1``, ``sigma = 0``) at the end, on any schedule: one more step, in
        which every solver returns the network's own prediction at the last time ("denoise to zero").

        Itself when it ends at pure data already.  The added time is -1: nothing is evaluated there.
        """
        if self.log_snr[-1] == math.inf:
            return self
        return Levels(
            self.schedule, (*self.times, -1.0), (*self.alpha, 1.0), (*self.sigma, 0.0), (*self.log_snr, math.inf)
        )

    def inside(self, i: int, fraction: float) -> tuple[float, Point]:
        """Time and level at a fraction of step ``i`` in lambda; the step must be finite."""
        log_snr = torch.tensor(self.log_snr[i] + fraction * self.h(i), dtype=torch.float64)
        time = self.schedule.time_at(log_snr)
        alpha, sigma = float(self.schedule.alpha(time)), float(self.schedule.sigma(time))
        return float(time), Point(alpha, sigma, math.log(alpha) - math.log(sigma))

    def h(self, i: int) -> float:
        """The length of step ``i`` in lambda; infinite when it starts at pure noise or ends at pure data."""
        return self.log_snr[i + 1] - self.log_snr[i]


def _log_snr(alpha: float, sigma: float) -> float:
    if alpha <= sigma * math.exp(-LOG_SNR_BOUND):
        return -math.inf
    if sigma <= alpha * math.exp(-LOG_SNR_BOUND):
        return math.inf
    return math.log(alpha) - math.log(sigma)


class Form(ABC):
    """How the exact solution is written: which prediction is integrated, and what the rest of the step is.

    ``output`` is what the history holds.
    """

    output: ClassVar[OutputKind]

    @abstractmethod
    def exact(self, s: Point, t: Point) -> tuple[float, float]:
        """``(a, c)`` of the exact step ``x_t = a x_s + c m`` for a constant prediction ``m``: DDIM.

        Written without lambda: in the data form it holds from pure noise and to pure data, where it is ``alpha_t D``.
        """

    @abstractmethod
    def step(self, s: Point, t: Point, n: int, eta: float = 0.0) -> tuple[float, list[float]]:
        """``(a, [w_0 .. w_n])`` of ``x_t = a x_s + sum_k w_k h^k m^(k)``, a step of finite length; ``eta`` is the share
        of the reverse SDE, whose fresh noise comes on top."""

    @abstractmethod
    def front(self, t: Point) -> float:
        """What stands before the integral: ``w_0 / h`` in the limit of small steps."""


@dataclass(frozen=True)
class DataForm(Form):
    """``x_t = (sigma_t / sigma_s) e^(-eta h) x_s + alpha_t sum_k psi_k((1 + eta) h) h^k D^(k)``."""

    output = "x0"

    def exact(self, s: Point, t: Point) -> tuple[float, float]:
        a = t.sigma / s.sigma
        return a, t.alpha - a * s.alpha

    def step(self, s: Point, t: Point, n: int, eta: float = 0.0) -> tuple[float, list[float]]:
        h = t.log_snr - s.log_snr
        return t.sigma / s.sigma * math.exp(-eta * h), [t.alpha * value for value in psi(n, (1 + eta) * h)]

    def front(self, t: Point) -> float:
        return t.alpha


@dataclass(frozen=True)
class NoiseForm(Form):
    """``x_t = (alpha_t / alpha_s) x_s - sigma_t sum_k chi_k(h) h^k eps^(k)``."""

    output = "eps"

    def exact(self, s: Point, t: Point) -> tuple[float, float]:
        a = t.alpha / s.alpha
        return a, t.sigma - a * s.sigma

    def step(self, s: Point, t: Point, n: int, eta: float = 0.0) -> tuple[float, list[float]]:
        if eta:
            raise ValueError(f"eta={eta} needs data prediction: the SDE solvers are written in the form DATA")
        return t.alpha / s.alpha, [-t.sigma * value for value in chi(n, t.log_snr - s.log_snr)]

    def front(self, t: Point) -> float:
        return -t.sigma


DATA, NOISE = DataForm(), NoiseForm()


def tensor(values: Sequence[float]) -> Tensor:
    """A float64 vector."""
    return torch.tensor(values, dtype=torch.float64)
