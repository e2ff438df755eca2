"""What earlier versions saved still opens, computes the same numbers, goes on and runs again.

``tests/earlier/`` was written in November 2026 by versions 0.1.0 whose recipes were of format 1: the folders of runs
(``teacher``, ``cm``, and ``ladder``, stopped in its second stage) by the command line as it was on the 21st, three
kinds of model by the library as it was on the 29th.  ``values.safetensors`` holds what those versions computed: each
model at ``x``, ``t`` and ``tokens``, and the weights that the ladder ended with when nothing stopped it.  These files
are never made anew; a format that comes after them gets files of its own.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep import api
from fewstep.files import load_tensors
from fewstep.models import model_of
from fewstep.report import read_run

Cli = Callable[..., Any]

EARLIER = Path(__file__).parents[1] / "earlier"
#: Everything is float32, and the last bits of its matrix products depend on the processor.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
#: How the runs were started, apart from budget and method.
SETTINGS = ("--batch", "4", "--precision", "fp32", "--log-steps", "1", "--save-seconds", "0", "--quiet")


@pytest.fixture
def here(cli: Cli) -> Cli:
    """The command line in a folder that holds a copy of what earlier versions left."""
    shutil.copytree(EARLIER, Path(), dirs_exist_ok=True)
    return cli


def computed(name: str, model: Any, given: dict[str, Tensor]) -> Tensor:
    """What the earlier version computed of a model."""
    x, t, cond = given["x"], given["t"], torch.arange(3)
    ways: dict[str, Callable[[], Tensor]] = {
        "teacher": lambda: model(x, t, cond),
        "on-schedule": lambda: model(x, t, cond),
        "cm": lambda: model.flow_map(x, t, model.flow_map.schedule.t_min, cond),
        "two-times": lambda: model.flow_map(x, t, t / 2, cond),
        "learned-sampler": lambda: model.denoiser(given["tokens"], t),
    }
    return ways[name]()


@pytest.mark.parametrize("name", ["teacher", "cm", "two-times", "on-schedule", "learned-sampler"])
def test_a_model_computes_what_it_did(name: str, here: Cli) -> None:
    """And is sampled by name."""
    given = load_tensors(EARLIER / "values.safetensors")
    model = api.load(name)
    torch.testing.assert_close(computed(name, model, given), given[name], **CLOSE)
    assert len(model_of(model).sample(2, seed=3)) == 2
    here("sample", name, "--n", "2", "--out", "samples.npz")
    assert Path("samples.npz").is_file()


def ladder(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("ladder/"): value for key, value in given.items() if key.startswith("ladder/")}


def assert_ends_as_it_did(folder: Path) -> None:
    made, expected = load_tensors(folder / "model.safetensors"), ladder(load_tensors(EARLIER / "values.safetensors"))
    assert made.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(made[key], value, **CLOSE)


def test_a_stopped_run_goes_on(here: Cli) -> None:
    """The command that began the run takes up its checkpoint, with the seed that its second stage had, and ends with
    the weights of the run that was not stopped."""
    words = ("--teacher", "teacher", "--data", "points.npz", "--out", "ladder", "--start", "4")
    before = load_tensors(Path("ladder/stage-0-pd-halving/checkpoint.safetensors"))
    here("distill", "pd", *words, "--budget", "6steps", *SETTINGS)
    after = load_tensors(Path("ladder/stage-0-pd-halving/checkpoint.safetensors"))
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    lines = Path("ladder/stage-1-pd-halving/log.jsonl").read_text().splitlines()
    assert lines[:2] == (EARLIER / "ladder/stage-1-pd-halving/log.jsonl").read_text().splitlines()
    assert len(lines) == 3
    assert_ends_as_it_did(Path("ladder/model"))


@pytest.mark.parametrize(("name", "command"), [("teacher", "train"), ("cm", "distill"), ("ladder", "distill")])
def test_a_recipe_runs_again(name: str, command: str, here: Cli) -> None:
    """To the weights that it made."""
    here(command, "--recipe", f"{name}/recipe.json", "--out", "again", "--quiet")
    if name == "ladder":
        assert_ends_as_it_did(Path("again/model"))
        return
    made, expected = (
        load_tensors(Path("again/model/model.safetensors")),
        load_tensors(EARLIER / name / "model" / "model.safetensors"),
    )
    for key, value in expected.items():
        torch.testing.assert_close(made[key], value, **CLOSE)


def test_a_run_is_reported(here: Cli) -> None:
    run = read_run(Path("cm"))
    assert run.note is not None and (run.note.recipe, run.note.teacher) == ("cm", "teacher")
    assert run.stages[0].steps == 3
