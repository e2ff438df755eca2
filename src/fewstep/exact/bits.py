"""Independent bits: the exact world of analog bits.

``x_0`` is ``b`` with probability p and ``-b`` otherwise, coordinate by coordinate.  The posterior mean is
``D = b tanh(alpha b x / sigma^2 + log(p / (1 - p)) / 2)``, and the probability flow keeps every coordinate's quantile:
at the data it is a threshold, and a bit comes out 1 where the noise it started from lies above.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fewstep.denoisers import Cond
from fewstep.exact.world import World
from fewstep.randomness import Rng
from fewstep.schedules import Schedule


class BernoulliBits(World):
    """``scale`` or ``-scale`` in every coordinate, independently, the former with ``probabilities`` ``[*shape]``.

    No class labels.  The flow map is in closed form up to a bisection, can be differentiated once in the state and in
    both times, and keeps its digits in both tails and around the threshold.  ValueError for probabilities outside
    (0, 1) or a scale that is not positive.
    """

    log_odds: Tensor  # of a bit being 1, flat [d]

    def __init__(self, schedule: Schedule, probabilities: Tensor, scale: float = 1.0) -> None:
        super().__init__(schedule, tuple(probabilities.shape))
        p = probabilities.double().flatten()
        if p.numel() == 0 or not bool(((p > 0) & (p < 1)).all()):
            raise ValueError(f"probabilities of bits must lie in (0, 1), got {probabilities.tolist()}")
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale={scale} of bits must be positive and finite")
        self.scale = scale
        self.register_buffer("log_odds", torch.logit(p))

    def moments(self, x: Tensor, alpha: Tensor, sigma: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        _unconditional(cond)
        b = self.scale
        mean = b * torch.tanh(alpha * b * x / sigma**2 + self.log_odds.to(x) / 2)
        return mean, (alpha * mean - x) / sigma**2

    def log_density(self, x: Tensor, t: Tensor | float, cond: Cond = None) -> Tensor:
        _unconditional(cond)
        flat, alpha, sigma = self.columns(x, t)
        odds, shift = self.log_odds.to(x), alpha * self.scale
        both = [
            torch.nn.functional.logsigmoid(sign * odds) - (flat - sign * shift) ** 2 / (2 * sigma**2)
            for sign in (1, -1)
        ]
        return (torch.logaddexp(*both) - torch.log(2 * math.pi * sigma**2) / 2).sum(1)

    def threshold(self, t: float) -> Tensor:
        """The state of shape ``[*shape]`` at time ``t`` above which the flow ends at ``scale``."""
        start, alpha, sigma = self.columns(torch.zeros(1, *self.shape).to(self.log_odds), t)
        middle = torch.ones(start.shape, dtype=torch.long)
        # the zero of the excess lies within the modes where the noise is small and near its quantile where it is large
        width = alpha * self.scale + sigma * 40
        return self._root(torch.zeros_like(start), middle, -width, width, alpha, sigma).reshape(self.shape)

    def flow(self, x: Tensor, t: Tensor | float, s: Tensor | float, cond: Cond = None) -> Tensor:
        _unconditional(cond)
        flat, alpha, sigma = self.columns(x.double(), t)
        _, alpha_s, sigma_s = self.columns(flat, s)
        found = self._levels(flat, alpha, sigma)
        best = found.detach().abs().argmin(0)  # the form with the most digits
        level = _chosen(found, best)
        to_data = sigma_s == 0
        spread = torch.where(to_data, 1.0, sigma_s)
        held = alpha_s.detach(), spread.detach()
        # with every deviation from a mode at least as large (small) as at the start, so is the distribution function
        z_low, z_high = ((flat + sign * alpha * self.scale) / sigma for sign in (-1, 1))
        low, high = (held[1] * z + sign * held[0] * self.scale for z, sign in ((z_low, -1), (z_high, 1)))
        root = self._root(level.detach(), best, low.detach(), high.detach(), *held)
        # one step of Newton, whose derivatives are those of the implicit function
        gap = _chosen(self._levels(root, alpha_s, spread), best) - level
        step = gap / self._density(root, *held).clamp_min(1e-300)
        moved = root - step.clamp(-1e-6 * held[1], 1e-6 * held[1])
        data = alpha_s * self.scale * torch.where(found[1].detach() > 0, 1.0, -1.0)
        return torch.where(to_data, data, moved).reshape(x.shape).to(x)

    def sample(self, n: int, rng: Rng, cond: Cond = None) -> Tensor:
        _unconditional(cond)
        u = torch.stack([rng.uniform(n) for _ in range(self.log_odds.numel())], 1).to(self.log_odds)
        bits = torch.where(u < torch.sigmoid(self.log_odds), self.scale, -self.scale)
        return bits.reshape(n, *self.shape)

    def _levels(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The distribution function F of every coordinate, less 0, less ``1 - p`` and less 1, ``[3, B, d]``: each
        without cancellation where it is small, which is in the lower tail, at the threshold and in the upper tail."""
        p, q = torch.sigmoid(self.log_odds.to(x)), torch.sigmoid(-self.log_odds.to(x))
        up, down = (x - alpha * self.scale) / sigma, (x + alpha * self.scale) / sigma
        below, above = q * _normal_cdf(down) + p * _normal_cdf(up), q * _normal_cdf(-down) + p * _normal_cdf(-up)
        return torch.stack([below, p * _normal_cdf(up) - q * _normal_cdf(-down), -above])

    def _density(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The density of every coordinate, the slope of all three levels."""
        odds, shift = self.log_odds.to(x), alpha * self.scale
        parts = [torch.sigmoid(k * odds) * torch.exp(-(((x - k * shift) / sigma) ** 2) / 2) for k in (1, -1)]
        return (parts[0] + parts[1]) / (sigma * math.sqrt(2 * math.pi))

    def _root(self, level: Tensor, form: Tensor, low: Tensor, high: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Where the chosen ``form`` of the distribution function is ``level``, between ``low`` and ``high``."""
        for _ in range(64):
            middle = (low + high) / 2
            short = _chosen(self._levels(middle, alpha, sigma), form) < level
            low, high = torch.where(short, middle, low), torch.where(short, high, middle)
        return (low + high) / 2


def _chosen(levels: Tensor, form: Tensor) -> Tensor:
    return levels.gather(0, form[None])[0]


def _normal_cdf(z: Tensor) -> Tensor:
    """The normal distribution function, with all digits of its lower tail."""
    return torch.erfc(-z / math.sqrt(2)) / 2


def _unconditional(cond: Cond) -> None:
    if cond is not None:
        raise ValueError("class labels were given to an unconditional world")
