"""``fewstep statistics``: a file that the solver takes, and one line for each mistake."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewstep import api
from fewstep.guidance import Guided
from fewstep.hub import model_statistics
from fewstep.hub.statistics import read_fingerprint
from fewstep.sampling import sample
from fewstep.sampling.solvers.dpm_solver_v3 import DPMSolverV3

Cli = Callable[..., Any]

SMALL = ("--samples", "6", "--grid", "10", "--batch", "4")


def test_statistics_of_a_bundled_teacher(cli: Cli) -> None:
    """The file says what it is of, the solver samples with it, and the same command writes the same bytes."""
    done = cli("statistics", "digits", *SMALL)
    path = Path("digits-statistics.safetensors")
    assert done.out.splitlines()[0].startswith("statistics at 11 noise levels from 6 samples, ")
    assert done.out.splitlines()[1] == str(path)
    found = read_fingerprint(path)
    assert (found["grid"], found["samples"], found["guidance"], found["shape"]) == (10, 6, 1.0, [1, 8, 8])
    teacher = api.load("digits")
    statistics = model_statistics.load(path, teacher)
    assert bool(sample(teacher, 2, solver=DPMSolverV3(statistics), steps=3).isfinite().all())
    cli("statistics", "digits", *SMALL, "--out", "again.safetensors")
    assert Path("again.safetensors").read_bytes() == path.read_bytes()


def test_guided_and_own_samples_and_differences(cli: Cli) -> None:
    """One file a guidance scale, refused for another; from the model's own samples; without forward mode."""
    cli("statistics", "digits", *SMALL, "--guidance", "2", "--data", "none", "--out", "guided.safetensors")
    teacher = api.load("digits")
    model_statistics.load("guided.safetensors", Guided(teacher, 2.0))
    with pytest.raises(ValueError, match=r"made for guidance = 2\.0, expected 1\.0"):
        model_statistics.load("guided.safetensors", teacher)
    cli("statistics", "digits", *SMALL, "--finite-difference", "--out", "differences.safetensors")
    cli("statistics", "digits", *SMALL, "--out", "forward.safetensors")
    forward = model_statistics.load("forward.safetensors", teacher)
    differences = model_statistics.load("differences.safetensors", teacher)
    assert float((forward.l - differences.l).abs().max()) < 5e-3


def test_mistakes_are_one_line(cli: Cli, tmp_path: Path) -> None:
    """Students, other data, missing folders, numbers out of range: said before anything is computed."""
    np.savez(tmp_path / "plain.npz", images=np.zeros((4, 1, 8, 8), np.uint8))
    cases = {
        ("fashion-1step",): "'fashion-1step' is a student, which samples in its own way: statistics are of teachers",
        ("digits", "--data", "fashion"): "'digits' makes samples [1, 8, 8], data 'fashion' has [1, 28, 28]",
        ("digits", "--data", "plain.npz"): "'digits' has 10 classes, data 'plain.npz' has no labels",
        ("digits", "--grid", "1"): "--grid 1 must be at least 2",
        ("digits", "--samples", "0"): "--samples 0 must be at least 1",
        ("digits", "--out", "there/x.safetensors"): "--out there/x.safetensors: the folder there does not exist",
        ("digits", "--out", "x.npz"): "--out x.npz: the name must end in .safetensors",
    }
    for words, message in cases.items():
        assert cli("statistics", *words, code=2).err == f"fewstep statistics: {message}\n"
