"""Fidelity and coverage from k-nearest-neighbour balls.

Precision and recall: Kynkäänniemi et al. 2019 (k = 3).  Density and coverage: Naeem et al. 2020 (k = 5).  The radius
of a point is its distance to its k-th nearest neighbour in its own set, itself not counted; balls are closed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.metrics.features import feature_pair

ROWS = 1024  # distance matrices are made this many rows at a time


def precision_recall(samples: Tensor, reference: Tensor, k: int = 3) -> tuple[float, float]:
    """The share of samples inside any ball of the reference, and the share of the reference inside any of the samples'.

    Features are ``[n, d]`` and ``[m, d]``.  Both depend on n and m: only equal counts compare.
    """
    samples, reference = feature_pair(samples, reference, least=k + 1)
    precision = _counts(samples, reference, radii(reference, k)) > 0
    recall = _counts(reference, samples, radii(samples, k)) > 0
    return float(precision.double().mean()), float(recall.double().mean())


def density_coverage(samples: Tensor, reference: Tensor, k: int = 5) -> tuple[float, float]:
    """Density: in how many balls of the reference a sample lies, over k (about 1 for equal laws, can exceed 1).
    Coverage: the share of the reference whose ball holds a sample (``1 - 2^-k`` expected for equal laws and counts)."""
    samples, reference = feature_pair(samples, reference, least=k + 1)
    around = radii(reference, k)
    nearest = torch.cat([_distances(rows, samples).amin(1) for rows in reference.split(ROWS)])
    density = _counts(samples, reference, around).double().mean() / k
    return float(density), float((nearest <= around).double().mean())


def radii(x: Tensor, k: int) -> Tensor:
    """The distance of every row of ``x [N, d]`` to its k-th nearest other row."""
    found = []
    for start in range(0, len(x), ROWS):
        distances = _distances(x[start : start + ROWS], x)
        distances.diagonal(start).fill_(torch.inf)
        found.append(distances.topk(k, dim=1, largest=False).values[:, -1])
    return torch.cat(found)


def _counts(points: Tensor, centres: Tensor, around: Tensor) -> Tensor:
    """In how many balls each point lies."""
    return torch.cat([(_distances(rows, centres) <= around).sum(1) for rows in points.split(ROWS)])


def _distances(x: Tensor, y: Tensor) -> Tensor:
    # Through a matrix product the distance of equal points would come out as 1e-8 rather than 0.
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
