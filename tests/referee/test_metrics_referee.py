"""Metrics against SciPy and scikit-learn, on inputs without a closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import linalg, stats
from sklearn.decomposition import PCA
from sklearn.metrics.pairwise import pairwise_distances, polynomial_kernel, rbf_kernel
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from fewstep.metrics import (
    GaussianKernel,
    PolynomialKernel,
    bootstrap,
    density_coverage,
    energy_distance,
    frechet_distance,
    gaussian_frechet_distance,
    kernel_distance,
    median_distance,
    nearest_distances,
    precision_recall,
    principal_directions,
    wasserstein_1d,
)
from fewstep.randomness import Rng


def draw(seed: int, n: int, d: int) -> Tensor:
    """Skewed, correlated features."""
    rng = Rng(seed, "referee")
    return rng.normal(n, d, dtype=torch.float64).exp() @ rng.normal(d, d, dtype=torch.float64)


def test_frechet_distance_is_scipys_matrix_root():
    """The formula of FID as usually coded, with SciPy's sqrtm of the product of the covariances."""
    x, y = draw(0, 300, 12), draw(1, 400, 12)
    a, b = x.numpy(), y.numpy()
    s, s_r = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(s @ s_r).real
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(s + s_r - 2 * root)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)
    moments = (x.mean(0), torch.from_numpy(s), y.mean(0), torch.from_numpy(s_r))
    assert gaussian_frechet_distance(*moments) == pytest.approx(expected, rel=1e-9)


def test_principal_directions_are_scikit_learns():
    """The same subspace as PCA, direction by direction up to the sign."""
    x = draw(2, 200, 8)
    theirs = torch.from_numpy(PCA(3).fit(x.numpy()).components_)
    assert torch.allclose((principal_directions(x, 3).T * theirs).sum(1).abs(), torch.ones(3).double(), atol=1e-10)


@pytest.mark.parametrize("name", ["polynomial", "gaussian"])
def test_kernel_distance_is_that_of_scikit_learns_kernels(name: str):
    """KID's kernel is polynomial_kernel(degree=3, gamma=1/d, coef0=1), the Gaussian one rbf_kernel(1 / (2 b^2))."""
    x, y = draw(3, 80, 5), draw(4, 60, 5)
    bandwidth = median_distance(y)
    assert bandwidth == pytest.approx(np.quantile(pairwise_distances(y)[np.triu_indices(60, 1)], 0.5), rel=1e-2)
    kernel = PolynomialKernel() if name == "polynomial" else GaussianKernel(bandwidth)

    def theirs(a: Tensor, b: Tensor) -> np.ndarray:
        if name == "polynomial":
            return polynomial_kernel(a.numpy(), b.numpy(), degree=3, gamma=1 / 5, coef0=1)
        return rbf_kernel(a.numpy(), b.numpy(), gamma=1 / (2 * bandwidth**2))

    def within(a: Tensor) -> float:
        matrix = theirs(a, a)
        return (matrix.sum() - np.trace(matrix)) / (len(a) * (len(a) - 1))

    expected = within(x) + within(y) - 2 * theirs(x, y).mean()
    assert kernel_distance(x, y, kernel) == pytest.approx(expected, rel=1e-9)


def test_manifold_measures_are_those_of_scikit_learns_neighbours():
    """The papers' definitions on scikit-learn's distances and nearest neighbours."""
    drawn, k = draw(5, 280, 4), 4
    samples, reference = 1.2 * drawn[:150], drawn[150:] + 0.2
    a, b = samples.numpy(), reference.numpy()

    def radii(z: np.ndarray) -> np.ndarray:
        return NearestNeighbors(n_neighbors=k).fit(z).kneighbors()[0][:, -1]  # without arguments: others only

    between = pairwise_distances(a, b)
    inside = between <= radii(b)[None]
    expected = (inside.any(1).mean(), (between <= radii(a)[:, None]).any(0).mean())
    assert min(expected) > 0.1 and max(expected) < 1
    assert precision_recall(samples, reference, k) == pytest.approx(expected, abs=1e-12)
    assert density_coverage(samples, reference, k) == pytest.approx((inside.sum() / (k * 150), inside.any(0).mean()))


def test_energy_distance_is_the_square_of_scipys():
    """On the line."""
    x, y = draw(6, 90, 1), draw(7, 70, 1)
    expected = stats.energy_distance(x[:, 0].numpy(), y[:, 0].numpy()) ** 2
    assert energy_distance(x, y) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("n", "m"), [(90, 70), (64, 64), (1, 5), (33, 99)])
def test_wasserstein_is_scipys(n: int, m: int):
    """W_1 on the line, columns one by one, for any counts."""
    x, y = draw(8, n, 3), draw(9, m, 3)
    expected = [stats.wasserstein_distance(x[:, i].numpy(), y[:, i].numpy()) for i in range(3)]
    assert wasserstein_1d(x, y, p=1).tolist() == pytest.approx(expected, rel=1e-10)


def test_nearest_distances_are_scikit_learns():
    """On skewed features in more than one block of training data."""
    x, train = draw(10, 200, 6), draw(11, 5000, 6)
    expected = NearestNeighbors(n_neighbors=1).fit(train.numpy()).kneighbors(x.numpy())[0][:, 0]
    assert torch.allclose(nearest_distances(x, train), torch.from_numpy(expected), rtol=1e-6)


def test_bootstrap_is_scipys():
    """The standard error of a median by 2,000 resamples each, which agree within 4 of their own errors (1.6 % each)."""
    x = draw(12, 300, 1)
    ours = bootstrap(lambda rows: float(rows.quantile(0.5)), x, Rng(0), repeats=2000)
    theirs = stats.bootstrap((x[:, 0].numpy(),), np.median, n_resamples=2000, rng=np.random.default_rng(0))
    assert ours.error == pytest.approx(theirs.standard_error, rel=4 * 0.016 * 2**0.5)
