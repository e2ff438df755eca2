"""Distances between samples without a Gaussian fit: energy distance and (sliced) Wasserstein."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.metrics.features import feature_pair
from fewstep.randomness import Rng

ROWS = 1024  # distance matrices are made this many rows at a time


def energy_distance(samples: Tensor, reference: Tensor) -> float:
    """``2 E|X - Y| - E|X - X'| - E|Y - Y'|`` of the two empirical laws (Székely & Rizzo 2013): 0 only where they agree.

    SciPy's one-dimensional ``energy_distance`` is the root of it.
    """
    x, y = feature_pair(samples, reference, least=1)
    return 2 * _mean_distance(x, y) - _mean_distance(x, x) - _mean_distance(y, y)


def energy_distance_unbiased(samples: Tensor, reference: Tensor) -> float:
    """The same for the laws that the samples were drawn from: its mean is 0 for equal laws, it can be negative."""
    x, y = feature_pair(samples, reference, least=2)
    within = sum(_mean_distance(z, z) * len(z) / (len(z) - 1) for z in (x, y))
    return 2 * _mean_distance(x, y) - within


def _mean_distance(x: Tensor, y: Tensor) -> float:
    exact = "donot_use_mm_for_euclid_dist"
    return float(sum(torch.cdist(rows, y, compute_mode=exact).sum() for rows in x.split(ROWS))) / (len(x) * len(y))


def wasserstein_1d(x: Tensor, y: Tensor, p: float = 2.0) -> Tensor:
    """``W_p^p`` of the columns of ``x [n, k]`` and ``y [m, k]``: ``[k]``.

    Exact for any n and m: both quantile functions are constant between the merged steps i/n and j/m.
    """
    if p < 1:
        raise ValueError(f"p={p}: a Wasserstein distance has p of at least 1")
    n, m = len(x), len(y)
    steps = torch.cat([torch.arange(n + 1, device=x.device) * m, torch.arange(1, m, device=x.device) * n]).unique()
    width = steps.diff().double() / (n * m)
    low = steps[:-1]
    gap = x.sort(dim=0).values[low // m] - y.sort(dim=0).values[low // n]
    return width @ gap.abs().pow(p)


def sliced_wasserstein(samples: Tensor, reference: Tensor, rng: Rng, slices: int = 256, p: float = 2.0) -> float:
    """The root mean ``W_p`` over random directions on the sphere, ``(mean W_p^p)^(1/p)`` (Bonneel et al. 2015)."""
    x, y = feature_pair(samples, reference, least=1)
    directions = torch.nn.functional.normalize(rng.normal(slices, x.shape[1], dtype=torch.float64), dim=1).to(x.device)
    return float(wasserstein_1d(x @ directions.T, y @ directions.T, p).mean() ** (1 / p))
