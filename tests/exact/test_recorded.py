"""The weights that every method makes in four steps, as they were recorded: a change in the order of the draws, in a
law, a weight or a sign is red, wherever it is.

    PYTHONPATH=tests python tests/exact/test_recorded.py [CASE ...]

records them anew, all or some: for a new method, and after a change that is meant to make other weights.  The file says
which version wrote it last.

The bits of a matrix product depend on the processor, so recordings are compared within what rounding explains, and two
runs here bit for bit.  Networks, noise and data are float64.
"""

from __future__ import annotations

import dataclasses
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from test_every_method import (
    BY_TASK,
    CLASSES,
    LENGTH,
    SETTINGS,
    SHAPE,
    SINGLE,
    TOKEN_METHODS,
    TOKENS,
    classifying_net,
    gap,
    numbers,
    recipe,
)
from test_every_method import data as small_data
from test_every_method import given as roles_given
from torch import Tensor, nn

import fewstep
from fewstep.classifiers import NetworkClassifier
from fewstep.data import Dataset
from fewstep.denoisers import NetworkDenoiser
from fewstep.discrete.chains import Masked
from fewstep.discrete.denoisers import NetworkDiscreteDenoiser
from fewstep.files import load_tensors, save_tensors
from fewstep.language_models import NetworkLanguageModel
from fewstep.methods import RECIPES
from fewstep.networks import MLP, UNet
from fewstep.networks.causal import CausalTransformer, GRULanguageModel
from fewstep.networks.transformer import Transformer
from fewstep.predictions import EDMPrediction, TrigPrediction
from fewstep.randomness import Rng
from fewstep.runs.course import run_recipe
from fewstep.schedules import TrigFlow
from fewstep.training.budget import Budget
from fewstep.training.settings import Settings

FILE = Path(__file__).with_name("recorded.safetensors")
FOUR_STEPS = dataclasses.replace(SETTINGS, budget=Budget(4))
#: Largest relative difference of a tensor.  With the kernels of other processors (ATEN_CPU_CAPABILITY=default or avx2,
#: MKL_CBWR=COMPATIBLE) up to 2e-14 was seen; another seed is 1e-5 away at least, and 0.2 in what is logged.
TOLERANCE = 1e-12
#: Where it is more, ten times what was seen: Adam makes steps of the rounding of gradients that are 0 in exact
#: arithmetic (biases before a group norm or inside attention), sCM's time weights are float32, LSD logs the small
#: difference of two losses, TBCM the norm of a gradient that is 0 but for rounding at the first step, and SANA-Sprint
#: and LADD losses of games whose terms nearly cancel.
ROUGH = {
    "discrete-denoising": 1e-10, "score-entropy": 2e-6, "lowdiff": 2e-6, "lsd": 1e-4, "lsd-plus": 1e-4,
    "lsd-student": 1e-4, "scm": 1e-6, "scm-training": 1e-6, "tbcm": 1e-6,
    "sana-sprint": 1e-7, "ladd": 2e-11,
}  # fmt: skip

#: Every method, and what its defaults do not reach: the hyper-parameters that are changed.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in RECIPES},
    "dmd2": ("dmd2", {"critic_steps": 2}),  # so that the student moves twice, under a head that has moved
    "dmd2-4": ("dmd2", {"critic_steps": 2, "steps": 4}),
    **{f"{name}-gan": (name, {"gan_share": 1.0}) for name in ("ctm", "pcm", "ayf", "caf")},
    "dmd2-teacher": ("dmd2", {"critic_steps": 2, "discriminator": "teacher", "r1": 1.0}),
    "f-distill": ("f-distill", {"critic_steps": 2}),
    "f-distill-kl": ("f-distill", {"critic_steps": 2, "divergence": "kl", "discriminator": "critic"}),
    "cm-mu": ("cm", {"mu": 0.9, "distance": "l1"}),
    "pd-4": ("pd", {"start": 4}),
    "instaflow-2": ("instaflow", {"steps": 2, "reflow_guidance": 1.5}),
    "lsd-student": ("lsd-plus", {"teacher_start": "student", "target": "accumulated", "stepper": "tweedie"}),
}


@contextmanager
def double_by_default(name: str) -> Iterator[None]:
    """float64 for what a method makes itself: networks, and the noise of pairs."""
    kind = torch.get_default_dtype()
    double = torch.float64 if name in SINGLE else kind
    torch.set_default_dtype(double)
    try:
        with patch.dict(Rng.normal.__kwdefaults__, dtype=double):
            yield
    finally:
        torch.set_default_dtype(kind)


def teacher(name: str) -> Any:
    """A small network with weights that are drawn in float64: in float32 the draws depend on the processor."""
    if name in BY_TASK["classification"]:
        net: Any = classifying_net(name)
    elif name in TOKEN_METHODS:
        net = Transformer(LENGTH, TOKENS, TOKENS + 1, width=8, blocks=1, heads=2)
    elif name in BY_TASK["language"]:
        return language_model(CausalTransformer(TOKENS, LENGTH, width=8, blocks=1, heads=2), "weights")
    else:
        net = UNet(SHAPE, (8, 8), 1, 8, CLASSES) if name == "lowdiff" else MLP(SHAPE, 8, 1, CLASSES)
    rng = Rng(0, "weights")
    for p in net.double().parameters():
        p.data = 0.3 * rng.normal_like(p.data)
    if name in BY_TASK["classification"]:
        return NetworkClassifier(net, SHAPE, CLASSES).eval()
    if name in TOKEN_METHODS:
        return NetworkDiscreteDenoiser(net, Masked(TOKENS), LENGTH).eval()
    # what is told the angle already is not retimed
    prediction = EDMPrediction(sigma_data=0.7) if name == "retime" else TrigPrediction(sigma_data=0.7)
    return NetworkDenoiser(net, TrigFlow(sigma_data=0.7), prediction, SHAPE, CLASSES).double().eval()


def language_model(net: nn.Module, stream: str) -> NetworkLanguageModel:
    rng = Rng(0, stream)
    for p in net.double().parameters():
        p.data = 0.3 * rng.normal_like(p.data)
    return NetworkLanguageModel(net, TOKENS, LENGTH).eval()


def given(name: str) -> dict[str, nn.Module]:
    """Small models for the roles that a method cannot do without."""
    return {role: language_model(GRULanguageModel(TOKENS, LENGTH, width=4), role) for role in roles_given(name)}


def data(name: str) -> Dataset:
    """Words, or points with labels."""
    if name in BY_TASK["language"]:
        return small_data(name)
    rng = Rng(0, "data")
    if name in TOKEN_METHODS:
        return Dataset("words", rng.integers(24 * LENGTH, 0, TOKENS).reshape(24, LENGTH))
    x = rng.normal(24, *SHAPE, dtype=torch.float64)
    soft = {"logits": rng.normal(24, CLASSES, dtype=torch.float64)} if name == "soft-supervised" else {}
    return Dataset("points", x, torch.arange(24) % CLASSES, columns=soft)


def trained(case: str, settings: Settings = FOUR_STEPS) -> dict[str, Tensor]:
    """Up to 32 numbers of every tensor of the product, and all that was logged on the way: Adam does not see the scale
    of a loss."""
    name, changes = CASES[case]
    with double_by_default(name):
        method = recipe(name)
        at_once = {field.name: 0 for field in dataclasses.fields(method) if field.name in ("warmup", "gan_share")}
        method = dataclasses.replace(method, **{**at_once, **changes})
        made = run_recipe(method, teacher(name), data(name), settings, None, given=given(name), show=False)
    logged: dict[str, list[float]] = {}
    for record in made.records:
        for key, value in record.items():
            if "/" in key:
                logged.setdefault(key, []).append(value)
    weights = {key: value.flatten()[:32].clone() for key, value in numbers(made.model).items()}
    return weights | {f"log {key}": torch.tensor(v, dtype=torch.float64) for key, v in logged.items()}


def recorded() -> dict[str, dict[str, Tensor]]:
    """The recordings by case."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in load_tensors(FILE).items():
        case, _, name = key.partition("/")
        found.setdefault(case, {})[name] = value
    return found


@pytest.fixture(scope="module")
def kept() -> dict[str, dict[str, Tensor]]:
    return recorded()


@pytest.mark.parametrize("case", CASES)
def test_the_weights_are_the_recorded_ones(case: str, kept: dict[str, dict[str, Tensor]]) -> None:
    """And a second run makes the same bits."""
    assert case in kept, f"no recording: python tests/exact/{Path(__file__).name} {case}"
    made, again = trained(case), trained(case)
    assert all(torch.equal(value, again[key]) for key, value in made.items())
    assert gap(kept[case], made) < ROUGH.get(case, TOLERANCE)


if __name__ == "__main__":
    torch.set_num_threads(1)
    wanted = sys.argv[1:] or list(CASES)
    held = {} if not sys.argv[1:] else recorded()
    held |= {case: trained(case) for case in wanted}
    tensors = {f"{case}/{key}": value for case in CASES for key, value in held[case].items()}
    made_by = f"fewstep {fewstep.__version__}, PyTorch {torch.__version__}, {platform.machine()}"
    save_tensors(FILE, tensors, {"made by": made_by, "again": f"python tests/exact/{Path(__file__).name}"})
