"""LowDiff on digits, 4x4 -> 8x8, beside the model of one resolution with equal training and sampling cost.

Both train for seconds, so both are far from done: a Fréchet distance of about 7, where ``benchmarks/lowdiff.py``, which
trains ten times as long, comes to 1.3.  The settings are the cheapest found at which the cascade has caught up; with
half of the training it is behind.
"""

from __future__ import annotations

import pytest
import torch

from fewstep.data import load as load_data
from fewstep.denoisers import NetworkDenoiser
from fewstep.methods.start import Start
from fewstep.methods.teachers.denoising import Denoising
from fewstep.methods.teachers.lowdiff import LowDiff
from fewstep.metrics import Evaluator, load_features
from fewstep.models import model_of
from fewstep.networks import CascadeUNet, UNet
from fewstep.predictions import EDMPrediction
from fewstep.sampling import sample
from fewstep.sampling.cascade import Cascade, StagePlan, downsample, effective_calls, flop_costs, sample_cascade
from fewstep.schedules import EDM
from fewstep.training.budget import Budget
from fewstep.training.trainer import Settings, train

SHAPE, SIZE = (1, 8, 8), {"channels": (32, 32), "blocks": 1, "width": 64, "classes": 10}
LAW = {"lr": 4e-3, "noise_mean": -0.5, "noise_std": 1.5, "warmup": 20, "label_dropout": 0.0}
LABELS = torch.arange(500) % 10
STEPS = 800


@pytest.fixture(scope="module")
def models() -> tuple[Cascade, tuple[float, ...], NetworkDenoiser]:
    """The cascade, the cost of its stages, and a plain model trained with as many operations."""
    data = load_data("digits")

    def trained(method: Denoising, net: UNet, steps: int) -> NetworkDenoiser:
        settings = Settings(Budget(steps), batch=32, precision="fp32")
        start = NetworkDenoiser(net, EDM(), EDMPrediction(0.75), SHAPE, 10)
        return model_of(train(method, Start(start, data), settings, show=False).model).teacher()

    torch.manual_seed(0)
    net = CascadeUNet(SHAPE, **SIZE)
    cascade = Cascade.shared(
        trained(LowDiff(augmentation_max=0.1, picture_dropout=0.0, **LAW), net, STEPS), net.resolutions
    )
    costs = flop_costs(cascade)
    single = trained(Denoising(**LAW), UNet(SHAPE, **SIZE), round(STEPS * sum(costs) / 2))
    return cascade, costs, single


@pytest.fixture(scope="module")
def judge() -> Evaluator:
    return Evaluator(load_data("digits", "test"), load_data("digits"), load_features("digits"))


def test_the_cascade_is_as_good_at_no_more_effective_calls(models, judge) -> None:
    """Three steps at 4x4 and two at 8x8 cost 2.8 calls and are no worse than three calls of the plain model (measured
    with three seeds: 6.7, 6.4 and 3.9 beside 7.2, 6.4 and 7.3); the classes are those that were asked for."""
    cascade, costs, single = models
    plans = [StagePlan(3), StagePlan(2)]
    assert effective_calls(cascade, plans, costs) < 3
    ours = judge(sample_cascade(cascade, 500, plans, cond=LABELS)[-1], LABELS)
    theirs = judge(sample(single, 500, steps=3, cond=LABELS), LABELS)
    assert ours.frechet.value < min(1.15 * theirs.frechet.value, 8.5), (ours.frechet, theirs.frechet)
    assert ours.accuracy is not None and ours.accuracy > 0.83


def test_the_high_stage_draws_the_low_picture(models) -> None:
    """Averaged, the 8x8 samples are the 4x4 ones within 0.08 (root mean square, measured 0.05; pictures span 2), and
    less than a third as far from them as from the low picture of another sample of the class (0.3)."""
    low, high = sample_cascade(models[0], 500, [StagePlan(3), StagePlan(2)], cond=LABELS)
    again = downsample(high, (4, 4))
    gap, other = (float((again - x).square().mean().sqrt()) for x in (low, low.roll(10, 0)))
    assert gap < 0.08 and gap < other / 3, (gap, other)
