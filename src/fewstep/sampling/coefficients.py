"""What every solver's coefficients are made of: the levels of a grid and the exponential integrals.

Between two times ``s > t`` with ``h = lambda_t - lambda_s > 0`` the probability-flow ODE has the exact solution

    x_t = (sigma_t / sigma_s) x_s + alpha_t sum_k psi_k(h) h^k D^(k)        (data prediction)
    x_t = (alpha_t / alpha_s) x_s - sigma_t sum_k chi_k(h) h^k eps^(k)      (noise prediction)

where ``D^(k)`` is the k-th derivative along lambda (Lu et al. 2022, DPM-Solver++, eq. 9; DPM-Solver, eq. 3.4).
Everything here is float64 in Python numbers: a table of a few dozen rows is made once per grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.grids import check_grid
from fewstep.schedules import LOG_SNR_BOUND, Schedule


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

    def h(self, i: int) -> float:
        """The length of step ``i`` in lambda; infinite when it starts at pure noise or ends at pure data."""
        return self.log_snr[i + 1] - self.log_snr[i]


def _log_snr(alpha: float, sigma: float) -> float:
    if alpha <= sigma * math.exp(-LOG_SNR_BOUND):
        return -math.inf
    if sigma <= alpha * math.exp(-LOG_SNR_BOUND):
        return math.inf
    return math.log(alpha) - math.log(sigma)


def first_order(levels: Levels, i: int) -> tuple[float, float]:
    """``(a, c)`` of the exact step for a constant ``D``, ``x_t = a x_s + c D``: DDIM.

    Written without lambda, so it holds from pure noise (``alpha_s = 0``) and to pure data (``sigma_t = 0``, where it
    is ``x = alpha_t D``).
    """
    a = levels.sigma[i + 1] / levels.sigma[i]
    return a, levels.alpha[i + 1] - a * levels.alpha[i]


def tensor(values: Sequence[float]) -> Tensor:
    """A float64 vector."""
    return torch.tensor(values, dtype=torch.float64)
