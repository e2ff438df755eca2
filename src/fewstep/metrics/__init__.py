"""Quality and cost of samples.

The distances are pure functions of features ``[N, d]``; :func:`evaluate` puts them together for a set of pictures.
"""

from fewstep.metrics.classes import accuracy, diversity
from fewstep.metrics.cost import Cost, measure
from fewstep.metrics.couplings import coupling_preservation, path_straightness, psnr, straightness
from fewstep.metrics.estimates import Estimate, bootstrap, jackknife, real_against_real
from fewstep.metrics.features import Features, ModuleFeatures, Pixels, load_features
from fewstep.metrics.frechet import frechet_distance, gaussian_frechet_distance, principal_directions
from fewstep.metrics.kernel import GaussianKernel, PolynomialKernel, kernel_distance, kernel_estimate, median_distance
from fewstep.metrics.manifold import density_coverage, precision_recall
from fewstep.metrics.memorisation import Memorisation, memorisation, nearest_distances
from fewstep.metrics.quality import Evaluator, Quality, evaluate
from fewstep.metrics.transport import (
    energy_distance,
    energy_distance_unbiased,
    sliced_wasserstein,
    wasserstein_1d,
)

__all__ = [
    "Cost",
    "Estimate",
    "Evaluator",
    "Features",
    "GaussianKernel",
    "Memorisation",
    "ModuleFeatures",
    "Pixels",
    "PolynomialKernel",
    "Quality",
    "accuracy",
    "bootstrap",
    "coupling_preservation",
    "density_coverage",
    "diversity",
    "energy_distance",
    "energy_distance_unbiased",
    "evaluate",
    "frechet_distance",
    "gaussian_frechet_distance",
    "jackknife",
    "kernel_distance",
    "kernel_estimate",
    "load_features",
    "measure",
    "median_distance",
    "memorisation",
    "nearest_distances",
    "path_straightness",
    "precision_recall",
    "principal_directions",
    "psnr",
    "real_against_real",
    "sliced_wasserstein",
    "straightness",
    "wasserstein_1d",
]
