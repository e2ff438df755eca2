"""The Fréchet distance between Gaussians fitted to features (Dowson & Landau 1982; Heusel et al. 2017, FID).

``|m - m'|^2 + tr(S + S' - 2 (S S')^(1/2))``.  The trace of the root is the nuclear norm of ``R R'^T`` for any factors
``S = R^T R``; factors from a QR decomposition of the centred features never form a covariance, so rank-deficient
features (constant pixels, fewer samples than dimensions) lose no digits and need no regularisation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.metrics.features import feature_pair


def frechet_distance(samples: Tensor, reference: Tensor, directions: int | None = None) -> float:
    """The (squared) Fréchet distance of features ``[n, d]`` and ``[m, d]``, with covariances over n - 1.

    ``directions`` projects both on the first so many principal directions of the reference before: at a few thousand
    samples the distance of high-dimensional features is mostly small-sample bias.  The bias falls as 1/n, so only
    equal sample counts compare.
    """
    samples, reference = feature_pair(samples, reference, least=2)
    if directions is not None:
        basis = principal_directions(reference, directions)
        samples, reference = samples @ basis, reference @ basis
    (mean, factor), (mean_r, factor_r) = moments(samples), moments(reference)
    return _distance(mean, factor, mean_r, factor_r)


def gaussian_frechet_distance(mean: Tensor, covariance: Tensor, mean_r: Tensor, covariance_r: Tensor) -> float:
    """The same for means ``[d]`` and covariances ``[d, d]``, where no samples are kept."""
    factor, factor_r = (_symmetric_root(c.double()) for c in (covariance, covariance_r))
    return _distance(mean.double(), factor, mean_r.double(), factor_r)


def principal_directions(reference: Tensor, count: int) -> Tensor:
    """The orthonormal directions ``[d, count]`` of largest variance of ``reference``."""
    if not 1 <= count <= min(reference.shape):
        raise ValueError(f"directions={count}: features {list(reference.shape)} have 1 to {min(reference.shape)}")
    _, factor = moments(reference.double())
    return torch.linalg.svd(factor, full_matrices=False).Vh[:count].T.contiguous()


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean ``[d]`` and a factor ``R`` of the covariance ``R^T R`` of features ``[n, d]``."""
    mean = x.mean(dim=0)
    factor = torch.linalg.qr((x - mean) / (len(x) - 1) ** 0.5, mode="r").R
    return mean, factor


def _symmetric_root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    if float(values[0]) < -1e-8 * max(float(values[-1]), 1e-300):
        raise ValueError(f"a covariance is not positive semi-definite: its least eigenvalue is {float(values[0]):.3g}")
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def _distance(mean: Tensor, factor: Tensor, mean_r: Tensor, factor_r: Tensor) -> float:
    traces = factor.square().sum() + factor_r.square().sum()
    root = torch.linalg.svdvals(factor @ factor_r.T).sum()
    # Rounding can leave a distance of -1e-15 between equal sets.
    return float(((mean - mean_r).square().sum() + traces - 2 * root).clamp_min(0))
