"""Further inputs of students on the command line: set, measured, exported, told, or refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kinds_of_models import MAKERS, SHAPE, moved

from fewstep.denoisers import NetworkDenoiser
from fewstep.extras import Input
from fewstep.flow_maps import Jump
from fewstep.hub import native
from fewstep.models.students import StudentModel
from fewstep.networks import MLP
from fewstep.predictions import TrigPrediction
from fewstep.report import compare_models
from fewstep.report.comparison import timed_samples
from fewstep.sampling import Plan, Student
from fewstep.schedules import TrigFlow

Cli = Callable[..., Any]

TAKES = "this student takes w from 0 to 14 (default 1.5), k from 1 to 8 (default 4)"


def student() -> Student:
    """A network that is told a guidance weight, and a number of steps that each plan sets."""
    torch.manual_seed(0)
    net = moved(MLP(SHAPE, 16, 1, classes=10, extras=("w", "k")))
    torch.nn.init.normal_(net.conditioning.extras["w"].weight)
    inputs = {"w": Input(1.5, 0.0, 14.0, unguided=0.0), "k": Input(4.0, 1.0, 8.0)}
    jump = Jump(NetworkDenoiser(net, TrigFlow(), TrigPrediction(), SHAPE, 10), extras=inputs)
    return Student(jump, {1: Plan((1.5,), extras={"k": 1.0}), 2: Plan((1.5, 0.7), extras={"k": 2.0})})


def saved(folder: str = "guided") -> Student:
    native.save(student(), folder, {"method": "made here", "data": "digits"})
    made: Student = native.load(folder)
    return made


def test_sample_sets_inputs(cli: Cli) -> None:
    """``--extra`` by name, again and again; ``--guidance`` sets the weight in its own unit, which begins at 0 here."""
    made = saved()
    for words, given in (
        ((), {}), (("--extra", "w=3"), {"w": 3.0}), (("--extra", "w=3", "--extra", "k=7"), {"w": 3.0, "k": 7.0}),
        (("--guidance", 4), {"w": 3.0}), (("--guidance", 1, "--extra", "k=7"), {"w": 0.0, "k": 7.0}),
    ):  # fmt: skip
        cli("sample", "guided", "--n", 3, "--seed", 2, "--out", "x.npz", *words)
        assert np.array_equal(np.load("x.npz")["samples"], made.sample(3, seed=2, **given).numpy())
    assert not torch.equal(made.sample(3, w=3.0), made.sample(3))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--extra", "v=3"), f"--extra v=3: {TAKES}"),
        (("--extra", "w=20"), f"--extra w=20 must lie in [0, 14]: {TAKES}"),
        (("--extra", "w=nan"), "--extra w=nan must lie in [0, 14]"),
        (("--extra", "w=x"), "--extra w=x: give the name of an input and a number, such as w=3"),
        (("--extra", "w"), "--extra w: give the name of an input and a number, such as w=3"),
        (("--extra", "=3"), "--extra =3: give the name of an input and a number, such as w=3"),
        (("--extra", "w=3", "--extra", "w=4"), "--extra w=4: w is given twice"),
        (("--guidance", 30), f"--guidance 30: w=29 must lie in [0, 14]: {TAKES}"),
        (("--guidance", "nan"), "--guidance nan: w=nan must lie in [0, 14]"),
        (("--guidance", 3, "--extra", "w=3"), "--guidance 3 and --extra w=3 set the same input: leave out one"),
        (("--solver", "ddim"), "--solver is for teachers: 'guided' is a student and samples in its own way; --extra"),
    ],
)
def test_what_cannot_be_is_one_line(words: tuple[object, ...], said: str, cli: Cli) -> None:
    """Exit code 2, with the input, its range and default, and what there is."""
    saved()
    err = cli("sample", "guided", "--n", 2, "--out", "x.npz", *words, code=2).err
    assert said in err and err.count("\n") == 1


def test_models_without_inputs_take_none(cli: Cli) -> None:
    """Of teachers and of students, in every command; guidance of a student that declares no weight stays refused."""
    native.save(MAKERS[StudentModel](), "plain", {"data": "digits"})
    for command in ("sample", "evaluate"):
        err = cli(command, "digits", "--extra", "w=3", code=2).err
        assert "--extra w=3: 'digits' is a denoiser, which takes no further inputs" in err
        err = cli(command, "plain", "--extra", "w=3", code=2).err
        assert "--extra w=3: 'plain' is a student, which takes no further inputs" in err
    assert "takes no further inputs" in cli("export", "plain", "out", "--extra", "w=3", code=2).err
    err = cli("sample", "plain", "--guidance", 2, code=2).err
    assert err.endswith("--guidance is for teachers: 'plain' is a student and samples in its own way\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("tune-steps", "digits", "--extra", "w=3"), "'--extra' is not an argument of fewstep tune-steps"),
        (("statistics", "digits", "--extra", "w=3"), "'--extra' is not an argument of fewstep statistics"),
        (("distill", "cm", "--teacher", "digits", "--extra", "w=3"), "'--extra' is not an argument of fewstep distill"),
        (("train", "new", "--extra", "w=3"), "'--extra' is not an argument of fewstep train"),
        (("tune-steps", "guided"), "'guided' is a student, which samples in its own way"),
        (("statistics", "guided"), "'guided' is a student, which samples in its own way"),
        (
            ("distill", "cm", "--teacher", "guided", "--data", "digits"),
            "'guided' is a student of 1, 2 calls, not a",
        ),
        (
            ("distill", "cm", "--teacher", "digits", "--student", "guided", "--data", "digits", "--budget", "1steps"),
            "the student: a student with the further input k, which this training does not pass on",
        ),
    ],
)
def test_other_commands_take_no_inputs(words: tuple[str, ...], said: str, cli: Cli) -> None:
    """Neither the flag nor a model that has them: one line."""
    saved()
    err = cli(*words, code=2).err
    assert said in err and err.count("\n") == 1


def test_evaluate_measures_with_inputs(cli: Cli) -> None:
    """The figures are those of samples with the input; the teacher's stay as they are."""
    made = saved()
    shown = {}
    for words in ((), ("--extra", "w=9")):
        done = cli(
            "evaluate", "guided", "--n", 40, "--steps", 2, "--teacher", "digits", "--json", "x.json", *words,
            "--features", "pixels",
        )  # fmt: skip
        assert ("40 samples of each, w=9" in done.out) == bool(words)
        told = json.loads(Path("x.json").read_text())
        assert told["extras"] == ({"w": 9.0} if words else {})
        shown[words] = {row["model"]: row["quality"]["frechet"] for row in told["rows"]}
    one, other = shown.values()
    assert one["digits"] == other["digits"] and one["guided"] != other["guided"]
    x = timed_samples(made, 2, 40, 0, None, 100, extras={"w": 9.0})[0]
    assert torch.equal(x, timed_samples(made, 2, 40, 0, None, 100, extras={"w": 9.0, "k": 2.0})[0])
    assert not torch.equal(x, timed_samples(made, 2, 40, 0, None, 100)[0])


def test_report_measures_with_inputs(cli: Cli) -> None:
    """Of the students that take it, and the page says so; an input that none takes is refused with those there are."""
    for name, made in (("guided", student()), ("plain", MAKERS[StudentModel]())):
        native.save(made, f"runs/{name}/model", {"method": "cm"})
        told = {
            "command": "distill", "method": "cm", "hyper_parameters": {}, "settings": {}, "start": {"model": "digits"},
            "data": {"source": "digits"},
        }  # fmt: skip
        Path(f"runs/{name}/recipe.json").write_text(json.dumps(told))
    cli("report", "runs/guided", "runs/plain", "--n", 20, "--extra", "w=9")
    page = Path("report.html").read_text()
    assert "seed 0 · w=9" in page and "fewstep report runs/guided runs/plain --extra w=9" in page
    err = cli("report", "runs/guided", "runs/plain", "--n", 20, "--extra", "v=9", code=2).err
    assert "v=9: no student here takes it (guided: w from 0 to 14" in err and "plain: no further inputs" in err
    err = cli("report", "runs/guided", "runs/plain", "--n", 20, "--extra", "w=20", code=2).err
    assert f"w=20 must lie in [0, 14]: {TAKES}" in err


def test_compare_gives_inputs_to_those_that_take_them() -> None:
    """The samples of one student change, those of the other and of the teacher do not."""
    models = {"guided": student(), "plain": MAKERS[StudentModel]()}
    rows = [
        compare_models(
            MAKERS[StudentModel](), models, "digits", 20, features="pixels", rows=1, extras=given
        ).rows
        for given in ({}, {"w": 9.0})
    ]  # fmt: skip
    for one, other in zip(*rows, strict=True):
        assert torch.equal(one.pictures, other.pictures) == (one.model != "guided")


def test_systems_tells_the_inputs_of_a_model(cli: Cli) -> None:
    """What a saved model makes, in which steps, and what it takes."""
    saved()
    assert cli("systems", "guided").out.splitlines() == [
        "guided: a student, samples of shape [1, 8, 8], 10 classes",
        "steps: 1, 2",
        "input w from 0 to 14 (default 1.5); the guidance weight, 0 for none",
        "input k from 1 to 8 (default 4); set by its plans",
    ]
    lines = cli("systems", "digits").out.splitlines()
    assert lines[1:] == ["steps: any", "no further inputs"]
    assert "no-such-model" in cli("systems", "no-such-model", code=2).err


def test_export_keeps_an_input_constant(cli: Cli) -> None:
    """Refused without a value, which the line says how to give; with one the folder says what is constant."""
    pytest.importorskip("diffusers")
    saved()
    err = cli("export", "guided", "out", code=2).err
    assert "input w from 0 to 14 (default 1.5)" in err and "fix it with --extra w=1.5" in err
    assert not Path("out").exists()
    cli("export", "guided", "out", "--extra", "w=3")
    card = Path("out/README.md").read_text()
    assert "Its input w is 3. Its input k is 1, 2 in 1, 2 steps." in card
    plans = json.loads(Path("out/scheduler/scheduler_config.json").read_text())["plans"]
    assert plans["2"]["calls"][1]["inputs"] == {"w": 3.0, "k": 2.0}
    err = cli("export", "guided", "copy", "--native", "--extra", "w=3", code=2).err
    assert "--native folders keep the student's inputs" in err
    cli("export", "guided", "copy", "--native")
    assert native.load("copy").extras == student().extras
