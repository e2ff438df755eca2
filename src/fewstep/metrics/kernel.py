"""The kernel distance: unbiased squared maximum mean discrepancy (Gretton et al. 2012; Binkowski et al. 2018, KID)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.metrics.estimates import Estimate
from fewstep.metrics.features import feature_pair

Kernel = Callable[[Tensor, Tensor], Tensor]
ROWS = 1024  # kernel matrices are made this many rows at a time


@dataclass(frozen=True)
class PolynomialKernel:
    """``(x . y / d + 1) ** degree`` with the number of features d; degree 3 is KID's kernel."""

    degree: int = 3

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** self.degree


@dataclass(frozen=True)
class GaussianKernel:
    """``exp(-|x - y|^2 / (2 bandwidth^2))``; the usual bandwidth is :func:`median_distance` of the reference."""

    bandwidth: float

    def __post_init__(self) -> None:
        if not self.bandwidth > 0:
            raise ValueError(f"bandwidth={self.bandwidth} must be positive")

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(x, y).square() / (2 * self.bandwidth**2))


def median_distance(x: Tensor, limit: int = 2000) -> float:
    """The median distance between two different rows of ``x [N, d]`` (of its first ``limit`` rows)."""
    return float(torch.pdist(x[:limit].double()).median())


def kernel_distance(samples: Tensor, reference: Tensor, kernel: Kernel = PolynomialKernel()) -> float:
    """The unbiased squared MMD of features ``[n, d]`` and ``[m, d]``: its mean is 0 for equal laws, so it can be
    negative."""
    samples, reference = feature_pair(samples, reference, least=2)
    return float(_distance_and_influences(samples, reference, kernel)[0])


def kernel_estimate(samples: Tensor, reference: Tensor, kernel: Kernel = PolynomialKernel()) -> Estimate:
    """The same with its delete-one jackknife error over the samples, at no further cost."""
    samples, reference = feature_pair(samples, reference, least=3)
    value, left_out = _distance_and_influences(samples, reference, kernel)
    n = len(samples)
    variance = (n - 1) / n * (left_out - left_out.mean()).square().sum()
    return Estimate(float(value), float(variance.sqrt()))


def _distance_and_influences(x: Tensor, y: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """The distance, and the distances ``[n]`` with each sample left out, all from row sums of the kernel."""
    n, m = len(x), len(y)
    xx, xy = _row_sums_within(x, kernel), torch.cat([kernel(rows, y).sum(1) for rows in x.split(ROWS)])
    yy = _row_sums_within(y, kernel).sum() / (m * (m - 1))
    value = xx.sum() / (n * (n - 1)) + yy - 2 * xy.sum() / (n * m)
    pairs = max((n - 1) * (n - 2), 1)
    return value, (xx.sum() - 2 * xx) / pairs + yy - 2 * (xy.sum() - xy) / ((n - 1) * m)


def _row_sums_within(x: Tensor, kernel: Kernel) -> Tensor:
    """``sum_{j != i} k(x_i, x_j)`` for every i."""
    sums = []
    for start in range(0, len(x), ROWS):
        block = kernel(x[start : start + ROWS], x)
        block.diagonal(start).zero_()
        sums.append(block.sum(1))
    return torch.cat(sums)
