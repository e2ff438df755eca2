"""Every kind of model in the table: what it says of itself, and that a folder gives back the same samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kinds_of_models import MAKERS, SHAPE, network
from torch import nn

from fewstep.denoisers import Denoiser, NetworkDenoiser
from fewstep.flow_maps import FlowMap
from fewstep.hub import native
from fewstep.models import KINDS, Model, model_of
from fewstep.models.kinds import SAVED, build, describe
from fewstep.randomness import Rng
from fewstep.sampling import Student

every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
GENERATING = [kind for kind in KINDS if kind.task == "generation"]
every_generating_kind = pytest.mark.parametrize("kind", GENERATING, ids=lambda kind: kind.__name__)


def test_every_kind_of_the_table_has_a_model_here() -> None:
    """A kind that is new in the table needs one model in ``kinds_of_models``, and is then in all of these tests."""
    assert set(MAKERS) == set(KINDS)
    assert len(SAVED) == sum(bool(kind.kind) for kind in KINDS), "two kinds of one name"


@every_kind
def test_the_table_finds_the_kind_of_a_model(kind: type[Model]) -> None:
    """The kind of an object is that of its own class, or of the nearest one above."""
    made = MAKERS[kind]()
    assert type(model_of(made)) is kind

    class Other(type(made)):  # type: ignore[misc]
        """A researcher's own."""

    made.__class__ = Other
    assert type(model_of(made)) is kind


@every_kind
def test_a_folder_gives_back_the_samples(kind: type[Model], tmp_path: Path) -> None:
    """Saved and loaded, a model makes the same samples bit for bit; what has no name in config.json is refused by its
    class, before anything is written."""
    made = MAKERS[kind]()
    if not kind.kind:
        with pytest.raises(TypeError, match=f"cannot describe a {type(made).__name__}"):
            native.save(made, tmp_path / "model")
        return
    native.save(made, tmp_path / "model", {"method": "made here"})
    again = native.load(tmp_path / "model")
    assert type(again) is type(made) and describe(again) == describe(made)
    assert all(torch.equal(value, made.state_dict()[key]) for key, value in again.state_dict().items())
    if kind.task != "generation":
        return
    before, after = (model_of(m).sample(5, seed=3) for m in (made, again))
    assert torch.equal(before, after) and before.dtype == after.dtype
    assert not torch.equal(before, model_of(again).sample(5, seed=4))


@every_kind
def test_a_subclass_is_not_saved_as_what_it_inherits_from(kind: type[Model]) -> None:
    """A class of its own would come back as another."""
    made = MAKERS[kind]()

    class Other(type(made)):  # type: ignore[misc]
        """A researcher's own."""

    made.__class__ = Other
    with pytest.raises(TypeError, match="cannot describe a Other"):
        native.describe(made)


@every_generating_kind
def test_calls_are_what_sampling_takes(kind: type[Model]) -> None:
    """``calls`` is the number of times that a network is called for a sample, for every number of steps; shapes and
    classes are those of the samples."""
    made = MAKERS[kind]()
    model = model_of(made)
    for steps in model.plans or (None, 1, 3):
        rows: list[int] = []
        hooks = [
            called.register_forward_pre_hook(lambda _, inputs, rows=rows: rows.append(len(inputs[0])))
            for called in innermost(made)
        ]
        x = model.sample(4, steps=steps, seed=1)
        for hook in hooks:
            hook.remove()
        assert sum(rows) == 4 * model.calls(steps)
        assert x.shape == (4, *model.shape)
        assert x.is_floating_point() == (model.tokens is None)


def innermost(made: nn.Module) -> list[nn.Module]:
    """The modules that are called once a network call: the networks, or of an exact model the model itself."""
    nets = [module.net for module in made.modules() if isinstance(getattr(module, "net", None), nn.Module)]
    return nets or [made]


@every_generating_kind
def test_samples_start_from_the_noise_that_is_given(kind: type[Model]) -> None:
    """The same noise and source give the same samples; models that start from normal noise follow the noise, models of
    tokens follow the source alone."""
    model = model_of(MAKERS[kind]())
    noise = Rng(1).normal(3, *model.shape)
    cond = torch.arange(3) if model.classes else None

    def drawn(start: torch.Tensor, seed: int) -> torch.Tensor:
        return model.sample_from(start, cond, steps=None, rng=Rng(seed, "more"))

    first = drawn(noise, 0)
    assert torch.equal(first, drawn(noise, 0))
    assert torch.equal(first, drawn(-noise, 0)) == (model.tokens is not None)


@every_generating_kind
def test_what_teaches_and_what_solvers_follow(kind: type[Model]) -> None:
    """A denoiser is its own; a kind without one says in one line what it is instead."""
    made = MAKERS[kind]()
    model = model_of(made)
    if isinstance(made, Denoiser):
        assert model.denoiser() is made and model.teacher() is made
        return
    followed = isinstance(made, FlowMap | Student)  # along fixed times
    for ask in (model.denoiser,) if followed else (model.denoiser, model.student):
        with pytest.raises(ValueError, match=f"^{model.called}") as told:
            ask()
        assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind.task in ("classification", "data")], ids=lambda k: k.kind
)
def test_what_makes_no_samples_says_so(kind: type[Model]) -> None:
    """Whatever it is asked for that only samplers have."""
    model = model_of(MAKERS[kind]())
    noise = Rng(1).normal(3, *model.shape)
    for ask in (
        lambda: model.sample(2),
        lambda: model.sample_from(noise, None, steps=None, rng=Rng(0)),
        model.calls,
        model.denoiser,
    ):
        with pytest.raises(ValueError, match=f"^{model.called}, which makes no samples$"):
            ask()
    assert model.shape == SHAPE and model.classes == 10


def test_teachers_are_the_denoisers_inside() -> None:
    """What the next training starts from."""
    for kind in KINDS:
        made: Any = MAKERS[kind]()
        if "denoiser" in kind.holds:
            assert model_of(made).teacher() is made.denoiser
    assert model_of(MAKERS[KINDS[0]]()).teacher().shape == SHAPE


def test_what_is_no_model_is_named() -> None:
    """A module of another make is refused with the classes that are known."""
    with pytest.raises(TypeError, match=r"a Linear is not a model: those are Student, "):
        model_of(nn.Linear(1, 1))


def test_descriptions_are_checked() -> None:
    """A wrong field is named with its place, also inside other models."""
    held = describe(MAKERS[next(kind for kind in KINDS if kind.kind == "cascade")]())
    held["plans"][1]["steps"] = 0
    with pytest.raises(ValueError, match=r"description: plans\[1\]\.steps = 0 must be a whole number, at least 1"):
        build(held)
    told = describe(network())
    with pytest.raises(ValueError, match=r"the model's classes is 7, that of its network 10"):
        build({**told, "classes": 7})
    with pytest.raises(TypeError, match="a Linear is not one of fewstep's reference networks"):
        describe(NetworkDenoiser(nn.Linear(1, 1), network().schedule, network().prediction, SHAPE))
