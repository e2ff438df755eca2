"""``fewstep inspect``: the calls of a student as pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds_of_models import SHAPE, moved

from fewstep.denoisers import NetworkDenoiser
from fewstep.extras import Input
from fewstep.flow_maps import Jump
from fewstep.hub import native
from fewstep.networks import MLP
from fewstep.predictions import TrigPrediction
from fewstep.report.pictures import sheet
from fewstep.report.rollouts import as_pictures, looked_at
from fewstep.sampling import Plan, Student
from fewstep.schedules import TrigFlow

Cli = Callable[..., Any]


def student() -> Student:
    torch.manual_seed(0)
    net = moved(MLP(SHAPE, 16, 1, classes=10, extras=("w",)))
    torch.nn.init.normal_(net.conditioning.extras["w"].weight)
    inputs = {"w": Input(1.5, 0.0, 14.0, unguided=0.0)}
    jump = Jump(NetworkDenoiser(net, TrigFlow(), TrigPrediction(), SHAPE, 10), extras=inputs)
    return Student(jump, {1: Plan((1.5,)), 3: Plan((1.5, 1.0, 0.5), gamma=0.6)})


def test_the_pictures_are_the_calls() -> None:
    """State and data prediction of every call, then the sample, which is the one of the same seed; states are at the
    scale of data."""
    made = student()
    calls = looked_at(made, 2, torch.tensor([4, 7]), steps=3, seed=5, extras={"w": 2.0})
    shown = as_pictures(made, calls).unflatten(0, (2, 7))
    sample = made.sample(2, torch.tensor([4, 7]), steps=3, seed=5, w=2.0)
    assert torch.equal(shown[:, 6], sample)
    for i, call in enumerate(calls):
        t = torch.tensor(call.t, dtype=torch.float64)
        radius = float((t.cos() ** 2 + (made.flow_map.schedule.sigma_data * t.sin()) ** 2).sqrt())
        torch.testing.assert_close(shown[:, 2 * i], call.x / radius)
        g = made.flow_map.denoiser(call.x, call.t, torch.tensor([4, 7]), w=torch.full((2,), 2.0))
        torch.testing.assert_close(shown[:, 2 * i + 1], g, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="steps=2: this student has plans for"):
        looked_at(made, 2, steps=2)


def test_inspect_writes_them(cli: Cli) -> None:
    """The picture of the command is that of the functions; it says where the calls go, by default of the longest
    plan."""
    native.save(student(), "few", {"method": "made here", "data": "digits"})
    said = cli("inspect", "few", "--n", 2, "--class", "4,7", "--seed", 5, "--extra", "w=2", "--out", "x.png").out
    made = native.load("few")
    calls = looked_at(made, 2, torch.tensor([4, 7]), steps=3, seed=5, extras={"w": 2.0})
    assert Path("x.png").read_bytes() == sheet(as_pictures(made, calls), 7, side=56)
    lines = said.splitlines()
    assert len(lines) == 4 and lines[3] == "x.png"
    assert lines[0].startswith("call 1: from time 1.5 to ") and lines[0].endswith(", noise lifts it to 1")
    assert lines[2] == "call 3: from time 0.5 to 0"
    assert cli("inspect", "few", "--steps", 1, "--n", 1).out.splitlines() == [
        "call 1: from time 1.5 to 0",
        "few-calls.png",
    ]
    assert Path("few-calls.png").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("digits",), "'digits' is a denoiser, which is no flow map along fixed times: there are no calls to look at"),
        (("few", "--steps", 2), "--steps"),
        (("few", "--n", 0), "--n 0 must be at least 1"),
        (("few", "--extra", "v=2"), "--extra v=2: this student takes w"),
        (("few", "--class", 12), "--class 12: 'few' has the classes 0 to 9"),
        (("few", "--out", "x.npz"), "--out x.npz: the name must end in .png"),
    ],
)
def test_what_cannot_be_shown_is_said_in_one_line(cli: Cli, words: tuple[Any, ...], message: str) -> None:
    native.save(student(), "few", {"method": "made here", "data": "digits"})
    err = cli("inspect", *words, code=2).err
    assert message in err and err.count("\n") == 1
