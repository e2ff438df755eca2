"""What holds for every method there is, because the trainer and the runs see to it: a batch in one part, in several and
on two processes is the same batch; a run that was stopped ends with the same bits; what it made is saved and opened.

A method is in here as soon as it has its line in RECIPES.
"""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from child_processes import run_on_two
from torch import Tensor, nn

from fewstep.classifiers import NetworkClassifier
from fewstep.data import Dataset
from fewstep.denoisers import NetworkDenoiser
from fewstep.discrete.chains import Masked
from fewstep.discrete.denoisers import NetworkDiscreteDenoiser
from fewstep.files import load_tensors, save_tensors
from fewstep.hub import native
from fewstep.language_models import NetworkLanguageModel
from fewstep.methods import RECIPES, recipe_class
from fewstep.methods.method import Recipe
from fewstep.models import model_of
from fewstep.models.kinds import describe
from fewstep.networks import MLP, UNet
from fewstep.networks.causal import CausalTransformer, GRULanguageModel
from fewstep.networks.classifiers import ConvNet, MLPClassifier
from fewstep.networks.transformer import Transformer
from fewstep.predictions import EDMPrediction, TrigPrediction
from fewstep.runs.course import run_recipe
from fewstep.schedules import TrigFlow
from fewstep.training.budget import Budget
from fewstep.training.settings import Settings
from fewstep.training.trainer import Interrupted, Run

SHAPE, LENGTH, TOKENS, CLASSES = (1, 4, 4), 6, 5, 3
SETTINGS = Settings(Budget(3), batch=8, precision="fp32", save_seconds=0.0, log_steps=1)
#: What makes a short run of a method, where it has such a hyper-parameter.
SMALL = {
    "pairs": 16, "ode_steps": 2, "start": 2, "guidance": 1.5, "teacher_steps": 8, "s0": 2, "s1": 4, "gan_weight": 0.1,
    "label_dropout": 0.5, "gan_share": 1.0, "rank": 2, "ratio_decay": 0.5, "host": "dmd2:gan_weight=0.1", "nodes": 2,
    "parts": 2, "dm": "dmd:pairs=16,ode_steps=2,guidance=1.5", "adversary": "dmd2:gan_weight=0.1",
    "discriminator_rank": 2, "patch_size": 2, "mask_ratio": 0.3, "feature_epochs": 0.5, "per_class": 2, "k": 1,
    "nets": 2, "pool": ("convnet", "resnet"), "label_epochs": 8, "views": "none",
    "experts": 2, "epochs": 3, "max_start_epoch": 2, "stretches": 2, "expert_lr": 0.3, "lr_images": 0.1,
}  # fmt: skip
#: What only one method needs.
OWN: dict[str, dict[str, Any]] = {
    "lsd": {"steps": 4}, "lsd-plus": {"steps": 4},
    "distill-spec": {"fixed": 1.0, "target": 1.0, "texts": 16, "prompt": 2}, "distill-spec-garden": {"prompt": 2},
    "rad": {"rounds": 2, "queries": 4, "labels_per_class": 2},
    "diswot": {"student_norm": "none", "evaluations": 6, "draws": 2, "population": 4, "batch_scored": 8},
}  # fmt: skip
#: Methods by what kind of model they start from.
BY_TASK = {
    task: tuple(name for name in RECIPES if recipe_class(name).task == task)
    for task in ("generation", "classification", "language")
}
#: Methods of token models.
TOKEN_METHODS = ("discrete-denoising", "score-entropy", "lsd", "lsd-plus")
#: Methods that make networks or pairs of their own, which are float32; the others are tried in float64.
SINGLE = (
    *TOKEN_METHODS, "dmd", "dmd2", "dmd2-energy", "dmd2-stages", "f-distill", "reflow", "instaflow", "caf",
    "slim-flow", "swift-brush", "disback", "msd", "scott", "mlcm", "hyper-sd", "ladd", "dq", "cv-dd", "diswot",
)  # fmt: skip
#: Float32 methods with gradients so small that Adam makes steps of their rounding: ten times less than this was seen
#: with the kernels of AVX-512, and another seed is 1.5 and 0.009 away.
ROUGH = {"scott": 1e-4, "hyper-sd": 2e-5}
#: Every method, and DMD2 with a loss over the pairs of the whole batch.
CASES = (*RECIPES, "dmd2-energy")


def recipe(name: str) -> Recipe:
    if name == "dmd2-energy":
        return dataclasses.replace(recipe("dmd2"), energy_weight=0.5)  # type: ignore[call-arg]
    cls = recipe_class(name)
    fields = {field.name for field in dataclasses.fields(cls)}
    own = OWN.get(name, {})
    return cls(**{key: value for key, value in {**SMALL, **own}.items() if key in fields})  # type: ignore[arg-type]


def away_from_its_start(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in net.parameters():
            p += 0.1 * torch.randn_like(p)
    return net


def classifying_net(name: str) -> nn.Module:
    """A small classifier; one with maps of places for the method that looks at them."""
    return ConvNet(SHAPE, CLASSES, width=4, depth=1) if name == "dq" else MLPClassifier(SHAPE, CLASSES, width=8)


def teacher(name: str) -> Any:
    """A small model that the method can start from."""
    kind_of_number = torch.float32 if name in SINGLE else torch.float64
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        if name in BY_TASK["classification"]:
            net = away_from_its_start(classifying_net(name))
            return NetworkClassifier(net, SHAPE, CLASSES).to(kind_of_number).eval()
        if name in BY_TASK["language"]:
            return language_model(CausalTransformer(TOKENS, LENGTH, width=8, blocks=1, heads=2))
        if name in TOKEN_METHODS:
            net = away_from_its_start(Transformer(LENGTH, TOKENS, TOKENS + 1, width=8, blocks=1, heads=2))
            return NetworkDiscreteDenoiser(net, Masked(TOKENS), LENGTH).eval()
        kind = UNet(SHAPE, (8, 8), 1, 16, CLASSES) if name == "lowdiff" else MLP(SHAPE, 16, 1, CLASSES)
        net = away_from_its_start(kind)
    # what is told the angle already is not retimed
    prediction = EDMPrediction(sigma_data=0.7) if name == "retime" else TrigPrediction(sigma_data=0.7)
    return NetworkDenoiser(net, TrigFlow(sigma_data=0.7), prediction, SHAPE, CLASSES).to(kind_of_number).eval()


def data(name: str) -> Dataset:
    gen = torch.Generator().manual_seed(1)
    if name in (*TOKEN_METHODS, *BY_TASK["language"]):
        words, mask = (torch.randint(0, top, (24, LENGTH), generator=gen) for top in (TOKENS, 2))
        pairs = {"mask": mask.bool(), "rejected": words.flip(0), "rejected_mask": mask.bool().flip(0)}
        return Dataset("words", words, columns=pairs if name in ("sft", "redi") else {})
    kind = torch.float32 if name in SINGLE else torch.float64
    x = torch.randn(24, *SHAPE, generator=gen, dtype=kind)
    soft = {"logits": torch.randn(24, CLASSES, generator=gen, dtype=kind)} if name == "soft-supervised" else {}
    return Dataset("points", x, torch.arange(24) % CLASSES, columns=soft)


def language_model(net: nn.Module) -> NetworkLanguageModel:
    return NetworkLanguageModel(away_from_its_start(net), TOKENS, LENGTH).double().eval()


def given(name: str) -> dict[str, nn.Module]:
    """Small models for the roles that a method cannot do without."""
    roles = {"distill-spec": ("student",), "distill-spec-garden": ("student", "target")}
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        return {role: language_model(GRULanguageModel(TOKENS, LENGTH, width=4)) for role in roles.get(name, ())}


def made(name: str, settings: Settings = SETTINGS, folder: Path | None = None) -> Any:
    return run_recipe(recipe(name), teacher(name), data(name), settings, folder, given=given(name), show=False).model


def numbers(model: nn.Module) -> dict[str, Tensor]:
    """All that was learned: the weights, and what a model keeps in its description (learned times and coefficients)."""

    def floats(part: Any) -> Iterator[float]:
        for value in part.values() if isinstance(part, dict) else part if isinstance(part, list | tuple) else ():
            yield from [value] if isinstance(value, float) else floats(value)

    return {**model.state_dict(), "description": torch.tensor([*floats(describe(model))], dtype=torch.float64)}


def gap(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference between two sets of numbers, relative to the largest of each tensor."""
    assert one.keys() == other.keys()
    return max(
        float((one[key] - other[key]).abs().max() / one[key].abs().max().clamp_min(1e-3))
        for key in one
        if one[key].is_floating_point() and one[key].numel()
    )


@pytest.fixture(scope="module")
def whole() -> dict[str, dict[str, Tensor]]:
    """The weights that every method makes with its batch in one part."""
    return {name: numbers(made(name)) for name in CASES}


def process(rank: int, folder: Path) -> None:
    """One of two processes: every method, with half of each batch."""
    for name in CASES:
        weights = numbers(made(name))
        if rank == 0:
            save_tensors(folder / f"{name}.safetensors", weights)


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the weights that two gloo processes make."""
    folder = tmp_path_factory.mktemp("two")
    run_on_two(process, folder)
    yield folder


@pytest.mark.parametrize("name", CASES)
def test_parts_and_processes_do_not_matter(name: str, whole: dict[str, dict[str, Tensor]], on_two: Path) -> None:
    """Two and four micro-batches, and two processes, make the weights of one part; a batch that is cut otherwise does
    not.  Adam turns the last bits of small gradients into a share of an update: up to 8e-10 was seen in float64, 6e-7
    in float32 (but for :data:`ROUGH`); another seed is 1e-5 away at least, and 1e-3 for token models."""
    close = 5e-5 if name in TOKEN_METHODS else ROUGH.get(name, 1e-6)
    for parts in (2, 4):
        assert gap(whole[name], numbers(made(name, dataclasses.replace(SETTINGS, accumulate=parts)))) < close, parts
    assert gap(whole[name], load_tensors(on_two / f"{name}.safetensors")) < close
    if name != "lsd":  # whose coefficients of 1 already agree with so rough a teacher: three steps do not move them
        assert gap(whole[name], numbers(made(name, dataclasses.replace(SETTINGS, seed=1)))) > 10 * close


@pytest.mark.parametrize("name", RECIPES)
def test_a_stopped_run_ends_with_the_same_bits(
    name: str, whole: dict[str, dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked to stop in the second iteration, and called again; what is left in the folder opens and samples alike."""
    real, left = Run.step, [2]

    def step(run: Run, source: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        real(run, source)

    monkeypatch.setattr(Run, "step", step)
    with pytest.raises(Interrupted):
        made(name, folder=tmp_path / "run")
    model = made(name, folder=tmp_path / "run")
    weights = numbers(model)
    assert all(torch.equal(weights[key], value) for key, value in whole[name].items())
    opened = native.load(tmp_path / "run" / "model")
    model = model.float()  # models are opened in float32
    assert opened.state_dict().keys() == model.state_dict().keys()
    for key, value in opened.state_dict().items():
        assert torch.equal(value, model.state_dict()[key].to(value.dtype)), key
    if model_of(opened).task == "generation":
        assert torch.equal(model_of(opened).sample(2, seed=3), model_of(model).sample(2, seed=3))
