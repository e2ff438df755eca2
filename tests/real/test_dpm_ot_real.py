"""DPM-OT on digits: 1000 noisy training pictures as targets, the bundled teacher without class labels after that.

Measured with these settings (500 samples, three calls): mode mixture at 0.1 falls from 0.42 to between 0.09 and 0.15
(four draws of the targets' noise), memorisation from 1.27 to 0.84 (1 for fresh data, 0 for copies), Fréchet distance in
classifier features from 20 to 3.5.
"""

from __future__ import annotations

import math

import pytest
import torch

from fewstep import api
from fewstep.data import load as load_data
from fewstep.metrics import Evaluator, load_features, memorisation
from fewstep.metrics.mode_mixture import mode_mixture
from fewstep.randomness import Rng
from fewstep.sampling import sample
from fewstep.sampling.dpm_ot.expressway import Expressway, express, noisy_targets, transport_error
from fewstep.sampling.dpm_ot.optimal_transport import AveragedGradient, transport

N = 500
NO_CLASS = torch.full((N,), -1)


@pytest.fixture(scope="module")
def teacher():
    return api.load("digits")


@pytest.fixture(scope="module")
def train():
    return load_data("digits")


def road_at(teacher, train, ratio: float) -> Expressway:
    """An expressway onto 1000 training pictures at a noise-to-signal ratio."""
    time = float(teacher.schedule.time_at(torch.tensor(-math.log(ratio))))
    chosen = Rng(0, "rows").shuffled(len(train))[:1000]
    y = noisy_targets(teacher.schedule, time, train.read(chosen), Rng(0, "noise"))
    potential, masses = transport(y, Rng(0), solver=AveragedGradient(tolerance=0.2))
    assert masses.error < 0.2 and len(masses.empty) == 0
    return Expressway(potential, teacher.schedule, time, train.labels[chosen])


@pytest.fixture(scope="module")
def road(teacher, train):
    return road_at(teacher, train, 0.5)


def test_all_cells_have_about_their_mass(road) -> None:
    """Fresh draws hit every one of 1000 cells; the bound on the total variation is below a quarter."""
    masses = road.potential.masses(50_000, Rng(7))
    assert len(masses.empty) == 0 and masses.error < 0.25
    assert masses.error / 2 < transport_error(road.potential, Rng(8), 50_000).total_variation < 0.25


def test_fewer_samples_between_classes_at_equal_calls(road, teacher, train) -> None:
    """Three calls, no class labels: far less mode mixture and a far smaller distance than the solver alone, at the
    price of nearer training pictures; given the targets' classes, the samples show them."""
    features = load_features("digits")
    judge = Evaluator(load_data("digits", "test"), train, features)

    def figures(x: torch.Tensor) -> tuple[float, float, float]:
        quality = judge(x)
        probabilities = features.classify(features(x.clamp(-1, 1))).softmax(dim=1)
        return quality.frechet.value, mode_mixture(probabilities, 0.1), quality.memorisation.ratio

    noise = road.draw(N, Rng(1))
    plain = figures(sample(teacher, N, solver="unipc", steps=3, cond=NO_CLASS, noise=noise))
    fast = figures(express(teacher, road, noise, solver="unipc", steps=3, cond=NO_CLASS)[0])
    assert plain[0] > 15 and plain[1] > 0.3 and plain[2] > 1.1
    assert fast[0] < 6 and fast[1] < 0.2 and 0.7 < fast[2] < 1.0
    x, labels = express(teacher, road, noise, solver="unipc", steps=3)
    assert judge(x, labels).accuracy > 0.97


def test_a_later_landing_remembers_more(teacher, train) -> None:
    """The nearest training picture comes closer as the noise of the targets falls; nearly clean targets are copied."""
    real = load_data("digits", "test").read(slice(None))
    ratios = []
    for noise_ratio in (1.2, 0.05):
        road = road_at(teacher, train, noise_ratio)
        x, _ = express(teacher, road, road.draw(N, Rng(1)), solver="unipc", steps=2, cond=NO_CLASS)
        found = memorisation(x.clamp(-1, 1), train.read(slice(None)), real)
        ratios.append((found.ratio, found.close))
    assert ratios[0][0] > 1.0 and ratios[0][1] < 0.05
    assert ratios[1][0] < 0.25 and ratios[1][1] > 0.95
