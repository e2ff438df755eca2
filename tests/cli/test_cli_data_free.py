"""Runs without data: ``--data none`` and ``fs.distill`` without any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fewstep as fs
from fewstep.data import Prior
from fewstep.denoisers import NetworkDenoiser
from fewstep.files import load_tensors
from fewstep.networks import MLP
from fewstep.predictions import TrigPrediction
from fewstep.runs.conditions import without_data
from fewstep.schedules import TrigFlow


def weights(folder: str) -> dict[str, torch.Tensor]:
    return load_tensors(Path(folder) / "model" / "model.safetensors")


@pytest.mark.parametrize("method", ["boot", "free-flow"])
def test_a_method_that_needs_no_data_runs_without(cli: Any, method: str) -> None:
    """It is trained over the classes, recorded, run again to the same weights, sampled; what it was made from is no
    data to compare it with."""
    common = ("--batch", 8, "--precision", "fp32", "--quiet")
    cli("distill", method, "--teacher", "digits", "--data", "none", "--budget", "2steps", "--out", "run", *common)
    written = json.loads(Path("run/recipe.json").read_text())
    assert written["data"]["source"] == "none" and written["data"]["samples"] == 10
    cli("distill", "--recipe", "run/recipe.json", "--out", "again", "--quiet")
    one, two = weights("run"), weights("again")
    assert one.keys() == two.keys() and all(torch.equal(value, two[key]) for key, value in one.items())
    cli("sample", "run", "--n", 2, "--out", "grid.png")
    teacher = fs.load("digits")
    recipe = fs.BOOT() if method == "boot" else fs.FreeFlow()
    for nothing in ({}, {"data": "none"}, {"data": None}):
        made = fs.distill(teacher, recipe, budget="2steps", batch=8, precision="fp32", show=False, **nothing)
        found = made.state_dict()
        assert all(torch.equal(value, found[key]) for key, value in one.items())
    assert "say with data=" in cli("report", "run", "--out", "page.html", code=2).err
    assert "data" not in cli("distill", method, "--teacher", "digits", "--data", "none", "--dry-run").err


def test_a_method_that_reads_samples_says_so(cli: Any) -> None:
    found = cli("distill", "cm", "--teacher", "digits", "--data", "none", "--budget", "1step", "--quiet", code=2)
    assert "this method reads samples, and the run was given none" in found.err and found.err.count("\n") == 1


def test_what_is_drawn_without_data() -> None:
    """The classes, or nothing; prompts must be given."""

    def teacher(classes: int | None, null: Any = None) -> NetworkDenoiser:
        return NetworkDenoiser(MLP((3,), 8, 1, classes), TrigFlow(), TrigPrediction(), (3,), classes, null)

    labelled = without_data(teacher(4))
    assert isinstance(labelled, Prior) and labelled.cond is not None
    assert labelled.cond.tolist() == [0, 1, 2, 3] and labelled.shape == (3,)  # type: ignore[union-attr]
    assert without_data(teacher(None)).cond is None
    with pytest.raises(ValueError, match=r"takes prompt_embeds, not classes: give a text file of prompts, one a line"):
        without_data(teacher(None, {"prompt_embeds": torch.zeros(1, 2, 3)}))
