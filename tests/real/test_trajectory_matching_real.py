"""TDM and Phased DMD on the bundled digits teacher, trained for seconds, against its own DDIM steps in as many calls.

The Fréchet distances are in pixels (500 samples, a real-against-real floor of about 0.54): the teacher has 5.8, 2.5 and
1.5 in one, two and four DDIM steps; measured with these settings were 5.1, 2.0 and 1.1 for TDM, 1.2 for Phased DMD.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fewstep import api
from fewstep.data import load as load_data
from fewstep.denoisers import Denoiser
from fewstep.methods.matching.phased_dmd import PhasedDMD
from fewstep.methods.matching.tdm import TDM
from fewstep.methods.method import Recipe
from fewstep.metrics import Evaluator, load_features
from fewstep.runs.course import run_recipe
from fewstep.sampling import sample
from fewstep.sampling.rollout import Student
from fewstep.training.budget import Budget
from fewstep.training.trainer import Settings

LABELS = torch.arange(500) % 10
Distance = Callable[[Tensor], float]


@pytest.fixture(scope="module")
def teacher() -> Denoiser:
    model = api.load("digits")
    assert isinstance(model, Denoiser)
    return model


@pytest.fixture(scope="module")
def distance() -> Distance:
    judge = Evaluator(load_data("digits", split="test"), load_data("digits"), load_features("pixels"))
    return lambda images: judge(images, LABELS).frechet.value


def distances(recipe: Recipe, steps: int, teacher: Denoiser, distance: Distance) -> dict[int, float]:
    """Of the student at each of its numbers of calls."""
    settings = Settings(Budget(steps), batch=64, precision="fp32")
    made = run_recipe(recipe, teacher, load_data("digits"), settings, show=False).model
    assert isinstance(made, Student)
    return {calls: distance(made.sample(500, LABELS, steps=calls)) for calls in made.plans}


def test_one_network_for_one_two_and_four_calls(teacher: Denoiser, distance: Distance) -> None:
    """TDM told the number of steps: more calls are better, and each number beats as many DDIM steps of the teacher."""
    found = distances(TDM(steps=(1, 2, 4)), 150, teacher, distance)
    assert found[1] > found[2] > found[4]
    for calls, value in found.items():
        assert value < distance(sample(teacher, 500, solver="ddim", steps=calls, cond=LABELS))


def test_two_experts_of_two_calls(teacher: Denoiser, distance: Distance) -> None:
    (found,) = distances(PhasedDMD(), 400, teacher, distance).values()
    assert found < distance(sample(teacher, 500, solver="ddim", steps=4, cond=LABELS))
