"""Autoguidance on digits: a small model trained for seconds, and a guide of half its width trained for an eighth."""

from __future__ import annotations

import pytest
import torch

from fewstep.data import load as load_data
from fewstep.denoisers import CountCalls, Denoiser, NetworkDenoiser
from fewstep.guidance import Autoguided, GuidanceInterval, Guided
from fewstep.methods.teachers.denoising import Denoising
from fewstep.metrics import frechet_distance, load_features, precision_recall
from fewstep.networks import MLP
from fewstep.predictions import TrigPrediction
from fewstep.runs.course import run_recipe
from fewstep.sampling import sample
from fewstep.schedules import TrigFlow
from fewstep.training.autoguidance import Choice, autoguided, moments, search
from fewstep.training.budget import Budget
from fewstep.training.profiles import Power
from fewstep.training.trainer import Settings

STEPS = 800
N = 500


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run folders of main model and guide, as ``fewstep train --averages 0.05,0.1`` leaves them."""
    data, folder = load_data("digits"), tmp_path_factory.mktemp("runs")
    found = []
    for name, width, steps in (("main", 96, STEPS), ("guide", 48, STEPS // 8)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(width)
            net = MLP(data.shape, width=width, blocks=2, classes=data.classes)
        schedule, prediction = TrigFlow(t_max=1.5614218, sigma_data=0.75), TrigPrediction(sigma_data=0.75)
        model = NetworkDenoiser(net, schedule, prediction, data.shape, data.classes)
        method = Denoising(lr=2e-3, noise_mean=-0.5, noise_std=1.5)
        settings = Settings(Budget(steps), batch=64, averages=(Power(0.05), Power(0.1)), precision="fp32")
        run_recipe(method, model, data, settings, folder / name, show=False)
        found.append(folder / name)
    return found


@pytest.fixture(scope="module")
def features():
    return load_features("digits")


def drawn(model: Denoiser, seed: int = 0) -> torch.Tensor:
    return sample(model, N, solver="unipc", steps=10, cond=torch.arange(N) % 10, seed=seed).clamp(-1, 1)


def test_autoguidance_is_nearer_to_the_data_and_keeps_its_recall(runs, features) -> None:
    """The search on the training data picks a weight of 2; with other noise, against held-out data, the pick is far
    nearer to the data than no guidance and nearer than classifier-free guidance at its best weight, with more precision
    and no less recall.  Measured: Fréchet 16.7 without, 4.0 classifier-free, 2.4; precision 0.52, 0.59, 0.64; recall
    0.71, 0.70, 0.70."""
    train, held_out = features(load_data("digits")), features(load_data("digits", split="test"))
    assert moments(runs[0]) == [STEPS * k // 8 for k in range(1, 9)]
    trials = search(
        *runs, lambda model: frechet_distance(features(drawn(model, 1)), train),
        scales=(1.0, 1.5, 2.0, 3.0), main_widths=(0.05,), guide_widths=(0.05, 0.15),
    )  # fmt: skip
    assert len(trials) == 7 and trials[0].choice.scale == 2 and trials[-1].choice.scale == 1
    best = autoguided(*runs, trials[0].choice)

    def judged(model: Denoiser) -> tuple[float, float, float]:
        x = features(drawn(model))
        return frechet_distance(x, held_out), *precision_recall(x, held_out)

    plain, auto = judged(best.inner), judged(best)
    free = min(judged(Guided(best.inner, w)) for w in (1.5, 2.0, 3.0))
    assert auto[0] < 0.25 * plain[0] and auto[0] < 0.8 * free[0]
    assert auto[1] > plain[1] + 0.07 and auto[1] > free[1] + 0.02
    assert auto[2] > plain[2] - 0.05


def test_an_interval_saves_the_guide_and_stays_better_than_none(runs, features) -> None:
    """Autoguidance at noise levels up to 1 only asks the guide 6 times in 10 and is still far nearer to the data than
    no guidance (measured: 6.4 against 16.7)."""
    held_out = features(load_data("digits", split="test"))
    best = autoguided(*runs, Choice(2.0, 0.05, 0.15, STEPS // 8))
    counted = Autoguided(best.inner, guide := CountCalls(best.bad), 2.0)
    limited, plain = (
        frechet_distance(features(drawn(model)), held_out)
        for model in (GuidanceInterval(counted, 0.0, 1.0), best.inner)
    )
    assert guide.calls == 6 and limited < plain / 2
