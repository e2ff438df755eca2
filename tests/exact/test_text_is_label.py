"""A text model whose prompts are one-hot classes is the label model, bit for bit, through every method."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.conditions import Cond
from fewstep.data import Dataset, Prior
from fewstep.denoisers import NetworkDenoiser
from fewstep.methods import RECIPES, recipe_class
from fewstep.methods.method import Recipe
from fewstep.networks import MLP
from fewstep.networks.inputs import TakesInputs
from fewstep.predictions import EDMPrediction, Prediction, TrigPrediction
from fewstep.runs.course import run_recipe
from fewstep.sampling import Student
from fewstep.schedules import TrigFlow
from fewstep.training.budget import Budget
from fewstep.training.trainer import Settings

CLASSES = 3
#: What trains networks of its own, or tokens.
OTHERS = {"discrete-denoising", "score-entropy", "lsd", "lsd-plus", "lowdiff", "analog-bits"}
METHODS = [name for name in RECIPES if name not in OTHERS and recipe_class(name).task == "generation"]


class Reader(nn.Module, TakesInputs):
    """A text network: prompts ``[B, 1, classes]`` with a mask in place of labels."""

    def __init__(self, net: MLP) -> None:
        super().__init__()
        self.net: Any = net
        self.feature_shape = net.feature_shape

    def labels(self, cond: Cond) -> Tensor | None:
        if cond is None:
            return None
        assert isinstance(cond, dict)
        return torch.where(cond["mask"][:, 0], cond["prompt_embeds"][:, 0].argmax(1), -1)

    @property
    def extra_inputs(self) -> tuple[str, ...]:
        return self.net.extra_inputs

    @property
    def beside_channels(self) -> int:
        return self.net.beside_channels

    def widened(self, spans: Mapping[str, float], beside: int) -> nn.Module:
        return Reader(self.net.widened(spans, beside))  # type: ignore[arg-type]

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None, **inputs: Tensor) -> Tensor:
        return self.net(x, t, self.labels(cond), **inputs)

    def features(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        return self.net.features(x, t, self.labels(cond))


def prompts(labels: Tensor) -> dict[str, Tensor]:
    return {
        "prompt_embeds": nn.functional.one_hot(labels, CLASSES).float()[:, None],
        "mask": torch.ones(len(labels), 1, dtype=torch.bool),
    }


NULL = {"prompt_embeds": torch.zeros(1, 1, CLASSES), "mask": torch.zeros(1, 1, dtype=torch.bool)}


def network() -> MLP:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        net = MLP((4,), 16, 1, CLASSES)
        for p in net.parameters():
            p += 0.2 * torch.randn_like(p)
    return net


def prediction(name: str) -> Prediction:
    return EDMPrediction() if name == "retime" else TrigPrediction()  # told the angle already, nothing is retimed


def of_labels(name: str = "") -> NetworkDenoiser:
    return NetworkDenoiser(network(), TrigFlow(), prediction(name), (4,), CLASSES).eval()


def of_text(name: str = "") -> NetworkDenoiser:
    return NetworkDenoiser(Reader(network()), TrigFlow(), prediction(name), (4,), null=NULL).eval()


def short(name: str, **further: object) -> Recipe:
    """A method with little to do, under guidance where it knows any."""
    cls = recipe_class(name)
    fields = {field.name for field in dataclasses.fields(cls)}
    wanted = {
        "guidance": 2.0, "pairs": 12, "ode_steps": 2, "start": 2, "host": "dmd2:guidance=2", "nodes": 2, "parts": 1,
        "dm": "dmd:pairs=12,ode_steps=2,guidance=2", "rank": 0, "projection": 0, **further,
    }  # fmt: skip
    return cls(**{key: value for key, value in wanted.items() if key in fields})  # type: ignore[arg-type]


X = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(12) % CLASSES
SETTINGS = Settings(budget=Budget(3), batch=6, precision="fp32")


@pytest.mark.parametrize("name", METHODS)
def test_one_hot_prompts_are_labels(name: str) -> None:
    """Weights and samples, guidance and dropped conditions included."""
    recipe = short(name)
    by_label = run_recipe(recipe, of_labels(name), Dataset("points", X, LABELS), SETTINGS, show=False).model
    by_text = run_recipe(recipe, of_text(name), Dataset("points", X, prompts(LABELS)), SETTINGS, show=False).model
    want = by_label.state_dict()
    got = {key.replace("net.net.", "net."): value for key, value in by_text.state_dict().items()}
    assert want.keys() == got.keys()
    assert all(torch.equal(want[key], got[key]) for key in want)
    untrained = of_labels().state_dict()
    trained = {key: value for key, value in want.items() if key.endswith("leave.weight")}
    assert trained and not any(torch.equal(value, untrained["net.leave.weight"]) for value in trained.values())
    if isinstance(by_label, Student) and isinstance(by_text, Student):
        drawn = torch.tensor([2, 0, 1])
        assert torch.equal(by_label.sample(3, drawn, seed=4), by_text.sample(3, prompts(drawn), seed=4))


def test_every_prompt_has_a_student_of_its_own() -> None:
    """Cut by embeddings, without data: three students that differ, each asked for its own prompt only."""
    recipe = short("msd", parts=3, by="embedding", adm=0.0, dm="diff-instruct:guidance=2,lr=1e-2")
    made: Any = run_recipe(recipe, of_text(), Prior((4,), prompts(LABELS)), SETTINGS, show=False).model
    drawn, noise = prompts(torch.tensor([2, 0, 1])), torch.randn(3, 4, generator=torch.Generator().manual_seed(2))
    owner = made.flow_map.router.route(noise, noise, drawn).tolist()
    assert sorted(owner) == [0, 1, 2]
    t = made.plans[1].times[0]
    alone = [expert.to_data(noise, t, drawn) for expert in made.flow_map.experts]
    whole = made.flow_map.to_data(noise, t, drawn)
    for row, own in enumerate(owner):
        gaps = [float((whole[row] - one[row]).abs().max()) for one in alone]
        assert gaps[own] < 1e-6 < 1e-4 < min(gap for k, gap in enumerate(gaps) if k != own)


@pytest.mark.parametrize("name", ["dmd", "dmd2", "reflow", "instaflow", "boot", "free-flow"])
def test_data_free_training_sees_conditions_only(name: str) -> None:
    """The weights are those of a run with data, whatever the data are."""
    recipe = short(name, gan_weight=0.0)
    free = run_recipe(recipe, of_text(), Prior((4,), prompts(LABELS)), SETTINGS, show=False).model.state_dict()
    for x in (X, 3 + X):
        given = run_recipe(recipe, of_text(), Dataset("prior", x, prompts(LABELS)), SETTINGS, show=False).model
        assert all(torch.equal(value, free[key]) for key, value in given.state_dict().items())


@pytest.mark.parametrize("name", ["cm", "pd", "denoising"])
def test_a_method_that_reads_samples_says_so(name: str) -> None:
    """One line instead of a traceback about None."""
    with pytest.raises(ValueError, match="reads samples, and the run was given none"):
        run_recipe(short(name), of_text(), Prior((4,), prompts(LABELS)), SETTINGS, show=False)


def test_conditions_of_the_wrong_kind_are_refused() -> None:
    """Labels for a text teacher, none for one of classes; nothing is dropped in silence."""
    cm = short("cm")
    with pytest.raises(ValueError, match="class labels, the model takes prompt_embeds, mask"):
        run_recipe(cm, of_text(), Dataset("points", X, LABELS), SETTINGS, show=False)
    with pytest.raises(ValueError, match="no labels, the model knows 3 classes"):
        run_recipe(cm, of_labels(), Dataset("points", X), SETTINGS, show=False)
    run_recipe(cm, of_labels(), Dataset("points", X, torch.full((12,), -1)), SETTINGS, show=False)
