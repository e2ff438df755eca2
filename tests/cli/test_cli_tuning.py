"""``fewstep tune-steps`` and the flags of ``fewstep sample`` that go with it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewstep.hub.settings import save_settings
from fewstep.sampling import LearnedSolver, learning
from fewstep.sampling.search import Setting

Cli = Callable[..., Any]

RUNGE_KUTTA = ("--solvers", "heun", "--grids", "karras", "--n", 2, "--reference", 20)
SMALL = ("--n", 4, "--reference", 20, "--solvers", "ddim", "unipc", "--grids", "karras", "balanced:centre=1")


def test_what_tuning_finds_is_sampled_with(cli: Cli) -> None:
    """The winner's file holds its figures beside the default's, a picture lies beside it, and sample reads it."""
    said = cli("tune-steps", "digits", "--calls", 6, *SMALL, "--guidance", 2, "--threshold").out
    found = json.loads(Path("digits-6calls.json").read_text())
    assert found["setting"]["calls"] == 6 and found["guidance"] == 2
    assert found["error"] <= found["error_of_the_default"] * 1.5
    assert "the default: 0." in said and Path("digits-6calls.png").read_bytes()[:4] == b"\x89PNG"
    sampled = cli("sample", "digits", "--n", 4, "--settings", "digits-6calls.json", "--no-preview").out
    assert "6 steps, 12 network calls each" in sampled  # guidance is the file's too


def test_what_is_learned_is_sampled_with(cli: Cli) -> None:
    """The file holds a solver whose error on held-out points is below the start's; the lines name both on fresh noise;
    sample reads it, in as many calls."""
    said = cli("tune-steps", "digits", "--calls", 5, *SMALL, "--n", 16, "--guidance", 2, "--learn", 0.5).out
    found = json.loads(Path("digits-5calls.json").read_text())
    assert len(found["learned"]["times"]) == 5 and found["held_out_error"] < found["error"]
    assert len(re.findall(r"^on fresh noise: [\d.]+ \+- [\d.]+  (?:learned|.* on .*)$", said, re.M)) == 2
    assert Path("digits-5calls-learned.png").read_bytes()[:4] == b"\x89PNG"
    assert "5 steps, 10 network calls each" in cli("sample", "digits", "--settings", "digits-5calls.json").out


def test_interrupted_learning_keeps_the_best(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the second iteration: what the first one found is written, and the command ends well."""
    equations, made = learning.normal_equations, []

    def interrupted(*args: Any) -> Any:
        made.append(args)
        if len(made) == 2:
            raise KeyboardInterrupt
        return equations(*args)

    monkeypatch.setattr(learning, "normal_equations", interrupted)
    said = cli("tune-steps", "digits", "--calls", 4, *SMALL, "--n", 16, "--learn").out
    found = json.loads(Path("digits-4calls.json").read_text())
    assert len(found["learned"]["rows"]) == 4 and "stopped" in said and "fresh" not in said
    assert cli("sample", "digits", "--n", 2, "--settings", "digits-4calls.json").out


def test_a_solver_learned_at_another_guidance_is_refused(cli: Cli) -> None:
    """Upwards it may be many times worse than a hand-made one."""
    save_settings("x.json", Setting("ddim", "karras", 1, 1), 2.0, {}, LearnedSolver("EDM-0", (80.0,), ((0.0, 1.0),)))
    words = ("sample", "digits", "--settings", "x.json", "--guidance")
    assert "--guidance 3: the solver in x.json was learned at guidance 2" in cli(*words, 3, code=2).err
    assert "learned on the schedule EDM-0" in cli(*words, 2, code=2).err


def test_a_solver_learned_on_another_schedule_is_refused(cli: Cli) -> None:
    """One line that names both schedules."""
    learned = LearnedSolver("EDM-00000000", (80.0,), ((0.0, 1.0),))
    save_settings("edm.json", Setting("ddim", "karras", 1, 1), None, {}, learned)
    err = cli("sample", "digits", "--settings", "edm.json", code=2).err
    assert "learned on the schedule EDM-00000000, the model is on TrigFlow-" in err and err.count("\n") == 1


def test_sample_takes_solvers_and_grids_with_parameters(cli: Cli) -> None:
    """Parameters after a colon; a stochastic solver on one path; thresholding and a last call."""
    words = ("--solver", "dpmpp-2m-sde:eta=0.5", "--grid", "karras:rho=5", "--steps", 4, "--n", 2, "--no-preview")
    assert "4 steps, 4 network calls each" in cli("sample", "digits", *words, "--one-path").out
    assert cli("sample", "digits", *words, "--denoise", "--threshold", "static", "--out", "x.npz").out
    assert abs(np.load("x.npz")["samples"]).max() <= 1


def test_guides_and_intervals(cli: Cli) -> None:
    """A model guided by itself is itself; an interval saves the calls outside it; both count the guide's calls."""
    words = ("digits", "--solver", "unipc", "--steps", 4, "--n", 3, "--no-preview", "--out", "x.npz")
    cli("sample", *words)
    plain = np.load("x.npz")["samples"]
    assert "8 network calls each" in cli("sample", *words, "--guide", "digits", "--guidance", 3).out
    assert np.array_equal(np.load("x.npz")["samples"], plain)
    assert "6 network calls each" in cli("sample", *words, "--guidance", 3, "--interval", "0.5,2").out
    assert not np.array_equal(np.load("x.npz")["samples"], plain)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("tune-steps", "digits", "--calls", 0), "--calls 0 must be at least 1"),
        (("tune-steps", "fashion-1step"), "is a student"),
        (("tune-steps", "digits", "--solvers", "unipcc"), "solver='unipcc' is not known"),
        (("tune-steps", "digits", "--grids", "karras:rho"), "'rho' has no value"),
        (("tune-steps", "digits", "--calls", 2, "--solvers", "unipc-3"), "none of the solvers fits"),
        (("tune-steps", "digits", "--out", "there/x.json"), "--out there/x.json: the folder there does not exist"),
        (("tune-steps", "digits", "--learn", 0), "--learn 0: minutes, more than 0"),
        (("tune-steps", "digits", "--learn", "--calls", 17), "--calls 17: --learn takes at most 16"),
        (("tune-steps", "digits", "--learn", *RUNGE_KUTTA), "--learn: none of these solvers calls the network once a"),
        (("sample", "digits", "--solver", "unipc:q=1"), "'q' is not a parameter"),
        (("sample", "digits", "--solver", "unipc-3", "--steps", 2), "steps=2 are too few for solver 'unipc-3'"),
        (("sample", "digits", "--threshold", "hard"), "threshold='hard' must be"),
        (("sample", "digits", "--settings", "nothing.json"), "nothing.json"),
        (("sample", "digits", "--guide", "fashion"), "--guide needs --guidance"),
        (("sample", "digits", "--guide", "fashion", "--guidance", 2), "the guide makes samples [1, 28, 28]"),
        (("sample", "digits", "--guide", "fashion-1step", "--guidance", 2), "a student cannot guide"),
        (("sample", "digits", "--interval", "1,2"), "--interval needs --guidance"),
        (("sample", "digits", "--guidance", 2, "--interval", "1"), "--interval 1: give two noise levels"),
        (("sample", "digits", "--guidance", 2, "--interval", "2,1"), "need 0 <= low < high"),
        (("sample", "fashion-1step", "--settings", "nothing.json"), "--settings is for teachers"),
    ],
)
def test_mistakes_get_one_line(cli: Cli, words: tuple[Any, ...], said: str) -> None:
    """Exit code 2 and one line that names the flag or the value."""
    err = cli(*words, code=2).err
    assert said in err and err.count("\n") == 1


def test_a_settings_file_must_be_one(cli: Cli) -> None:
    """Other JSON, and flags that say the same as the file, are refused by name."""
    Path("other.json").write_text('{"a": 1}')
    assert "other.json: 'setting' is missing" in cli("sample", "digits", "--settings", "other.json", code=2).err
    Path("x.json").write_text('{"setting": {"solver": "ddim", "grid": "karras", "steps": 3, "threshold": null}}')
    said = cli("sample", "digits", "--settings", "x.json", "--steps", 4, code=2).err
    assert "--steps stands in x.json already" in said
