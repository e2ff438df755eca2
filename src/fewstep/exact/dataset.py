"""A finite data set as an exact teacher: no training, only memory.

The data law puts a Gaussian of width ``h`` on every point (h = 0: the points themselves), so the posterior mean is
a softmax-weighted average of the points, drawn towards the state.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fewstep.denoisers import Cond
from fewstep.exact.ode import probability_flow
from fewstep.exact.world import Labelled, normalized
from fewstep.randomness import Rng
from fewstep.schedules import Schedule


class FiniteData(Labelled):
    """``x_0 = x_i + width * noise`` for a uniformly drawn ``i``.

    ``points`` is ``[N, *shape]``, ``labels`` ``[N]`` or None.  A call costs two ``[B, N]`` matrix products.  With
    ``width = 0`` the law at ``sigma = 0`` has no density and no finite score; the denoiser there is the nearest point.
    The flow map is integrated in ``steps`` steps (:func:`probability_flow`); small widths and far points make it
    stiff, so double them to see the error (64 leave 1e-10 on the 1,797 digits).
    """

    steps = 64
    points: Tensor

    def __init__(
        self, schedule: Schedule, points: Tensor, width: float = 0.0, labels: Tensor | list[int] | None = None
    ) -> None:
        if width < 0:
            raise ValueError(f"width={width} must be at least 0")
        if points.ndim < 2 or len(points) == 0:
            raise ValueError(f"points must be [N, ...], got shape {list(points.shape)}")
        super().__init__(schedule, tuple(points.shape[1:]), torch.ones(len(points)), labels)
        self.width = width
        self.register_buffer("points", points.double().flatten(1))

    def _joint(self, x: Tensor, alpha: Tensor, sigma: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """Log joint density ``[B, N]`` of point and state but for ``-|x|^2 / 2V``, and the variance ``V`` ``[B, 1]``.

        The floor turns the limit of no noise at all into the nearest point instead of 0 / 0.
        """
        points = self.points.to(x)
        variance = ((alpha * self.width) ** 2 + sigma**2).clamp_min(1e-30)
        likeness = alpha * (x @ points.T) - alpha**2 * (points**2).sum(1) / 2
        return self.log_prior(cond, x) + likeness / variance, variance

    def moments(self, x: Tensor, alpha: Tensor, sigma: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        joint, variance = self._joint(x, alpha, sigma, cond)
        centre = normalized(joint) @ self.points.to(x)
        score = (alpha * centre - x) / variance
        return centre - alpha * self.width**2 * score, score

    def log_density(self, x: Tensor, t: Tensor | float, cond: Cond = None) -> Tensor:
        flat, alpha, sigma = self.columns(x, t)
        joint, variance = self._joint(flat, alpha, sigma, cond)
        rest = (flat**2).sum(1) / variance[:, 0] + flat.shape[1] * torch.log(2 * math.pi * variance[:, 0])
        return torch.logsumexp(joint, 1) - rest / 2

    def flow(self, x: Tensor, t: Tensor | float, s: Tensor | float, cond: Cond = None) -> Tensor:
        largest = float(self.points.norm(dim=1).max()) + 2 * self.width
        finest = float(self.schedule.ratio(torch.tensor(self.schedule.t_min, dtype=torch.float64)))
        scales = max(self.width, finest, 1e-4 * largest), 2 * largest
        return probability_flow(self, x.double(), t, s, cond, scales, self.steps).to(x)

    def sample(self, n: int, rng: Rng, cond: Cond = None) -> Tensor:
        part = self._parts(n, rng, cond)
        noise = rng.normal(n, self.points.shape[1], dtype=torch.float64).to(self.points)
        return (self.points[part] + self.width * noise).reshape(n, *self.shape)
