"""The names of the package itself."""

from __future__ import annotations

import importlib
from types import FunctionType

import pytest
import torch

import fewstep as fs
from fewstep.data import Dataset
from fewstep.denoisers import NetworkDenoiser
from fewstep.methods import RECIPES, recipe_class
from fewstep.networks import MLP
from fewstep.predictions import TrigPrediction
from fewstep.schedules import TrigFlow


def test_distill_is_a_function_whatever_was_imported() -> None:
    """``fs.distill`` is an ordinary function, and trains."""
    importlib.import_module("fewstep.methods.method")
    assert isinstance(fs.distill, FunctionType)
    teacher = NetworkDenoiser(MLP((2,), 8, 1), TrigFlow(), TrigPrediction(), (2,))
    data = Dataset("points", torch.zeros(8, 2))
    student = fs.distill(teacher, fs.DMD2(gan_weight=0.0), data, "2steps", batch=4, show=False)
    assert student.sample(3).shape == (3, 2)


@pytest.mark.parametrize("name", fs.__all__)
def test_every_name_exists(name: str) -> None:
    """What ``__all__`` promises can be reached."""
    assert getattr(fs, name) is not None


def test_every_method_is_a_name_of_the_package() -> None:
    """A line in RECIPES is enough."""
    for name in RECIPES:
        cls = recipe_class(name)
        assert getattr(fs, cls.__name__) is cls and cls.name == name
