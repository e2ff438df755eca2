"""Stochastic pieces: DDIM(eta), DDPM's ancestral steps, and EDM's churn.

With the oracle ``D = x_0`` a step of :class:`DDIM` takes N(alpha_s x_0, sigma_s^2) to N(alpha_t x_0, sigma_t^2)
exactly, whatever eta.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fewstep.sampling.coefficients import Levels, tensor
from fewstep.sampling.rows import Row
from fewstep.sampling.solvers.multistep import Multistep
from fewstep.values import real


def check_eta(name: str, eta: float) -> None:
    """ValueError unless ``eta`` is a share of noise."""
    real(f"{name}: eta", eta, 0, 1)


@dataclass(frozen=True)
class DDIM(Multistep):
    """DDIM (Song et al. 2021, eq. 12 and 16): ``eta = 0`` is the first-order step of the probability flow, ``eta = 1``
    the ancestral step of DDPM with its posterior ("small") variance::

        x_t = alpha_t D + sqrt(sigma_t^2 - n^2) eps + n z,   n = eta sigma_t sqrt(1 - exp(-2h))
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_eta(type(self).__name__, self.eta)

    @property
    def order(self) -> int:
        return 1

    @property
    def outputs(self) -> int:
        return 1

    def row(self, levels: Levels, i: int, outputs: int) -> Row:
        fresh = self.eta**2 * -math.expm1(-2 * levels.h(i))
        carry = math.sqrt(1 - fresh) * levels.sigma[i + 1] / levels.sigma[i]
        noise = math.sqrt(fresh) * levels.sigma[i + 1]
        return Row(carry, (levels.alpha[i + 1] - carry * levels.alpha[i],), noise)


@dataclass(frozen=True)
class DDPMLarge(DDIM):
    """DDPM's ancestral step with the forward kernel's variance (Ho et al. 2020, section 3.2, "sigma_t^2 = beta_t").

    The mean is that of ``DDIM(1)``; the noise is that of the kernel ``t -> s``, right for data of unit variance.  No
    noise in a step to pure data.
    """

    eta: float = 1.0

    def row(self, levels: Levels, i: int, outputs: int) -> Row:
        mean = super().row(levels, i, outputs)
        if levels.sigma[i + 1] == 0:
            return mean
        kept = math.exp(-levels.h(i)) * levels.sigma[i]  # what the kernel keeps of the noise at t
        return Row(mean.a, mean.c, math.sqrt(levels.sigma[i] ** 2 - kept**2))


@dataclass(frozen=True)
class Churn:
    """EDM's churn (Karras et al. 2022, algorithm 2): before a step at noise level ``rho = sigma / alpha`` within
    ``[low, high]``, noise lifts the state to ``(1 + gamma) rho``, ``gamma = min(amount / steps, sqrt 2 - 1)``.

    ``inflation`` (S_noise, 0 to 10) is the standard deviation of that noise.  A level above the schedule's ``t_max`` is
    cut there (EDM's code goes on).
    """

    amount: float = 0.0
    low: float = 0.0
    high: float = math.inf
    inflation: float = 1.0

    def __post_init__(self) -> None:
        real("Churn: amount", self.amount, 0)
        real("Churn: low", self.low, 0, real("Churn: high", self.high, 0))
        real("Churn: inflation", self.inflation, 0, 10)

    def lifts(self, levels: Levels) -> tuple[tuple[float, ...], list[Row | None]]:
        """For every step, the time that it starts from after the lift, and the lift (None: stay)."""
        gamma = min(self.amount / levels.steps, math.sqrt(2) - 1)
        if gamma == 0:
            return levels.times[:-1], [None] * levels.steps
        schedule, starts = levels.schedule, tensor(levels.times[:-1])
        ratio = schedule.ratio(starts)
        inside = (ratio >= self.low) & (ratio <= self.high)
        raised = schedule.time_at(-(ratio * (1 + gamma)).log())
        starts = raised.where(inside & (raised > starts), starts)
        carry = schedule.alpha(starts) / tensor(levels.alpha[:-1])
        added = (schedule.sigma(starts) ** 2 - (carry * tensor(levels.sigma[:-1])) ** 2).clamp_min(0).sqrt()
        lifts = [
            Row(a, (), n * self.inflation) if t > old else None
            for a, n, t, old in zip(carry.tolist(), added.tolist(), starts.tolist(), levels.times, strict=False)
        ]
        return tuple(starts.tolist()), lifts


NO_CHURN = Churn()
