"""``fewstep tune-steps`` and the flags of ``fewstep sample`` that go with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Cli = Callable[..., Any]

SMALL = ("--n", 4, "--reference", 20, "--solvers", "ddim", "unipc", "--grids", "karras", "balanced:centre=1")


def test_what_tuning_finds_is_sampled_with(cli: Cli) -> None:
    """The winner's file holds its figures beside the default's, a picture lies beside it, and sample reads it."""
    said = cli("tune-steps", "digits", "--calls", 6, *SMALL, "--guidance", 2, "--threshold").out
    found = json.loads(Path("digits-6calls.json").read_text())
    assert found["setting"]["calls"] == 6 and found["guidance"] == 2
    assert found["error"] <= found["error_of_the_default"] * 1.5
    assert "the default (unipc)" in said and Path("digits-6calls.png").read_bytes()[:4] == b"\x89PNG"
    sampled = cli("sample", "digits", "--n", 4, "--settings", "digits-6calls.json", "--no-preview").out
    assert "6 steps, 12 network calls each" in sampled  # guidance is the file's too


def test_sample_takes_solvers_and_grids_with_parameters(cli: Cli) -> None:
    """Parameters after a colon; a stochastic solver on one path; thresholding and a last call."""
    words = ("--solver", "dpmpp-2m-sde:eta=0.5", "--grid", "karras:rho=5", "--steps", 4, "--n", 2, "--no-preview")
    assert "4 steps, 4 network calls each" in cli("sample", "digits", *words, "--one-path").out
    assert cli("sample", "digits", *words, "--denoise", "--threshold", "static", "--out", "x.npz").out
    assert abs(np.load("x.npz")["samples"]).max() <= 1


def test_guides_and_intervals(cli: Cli) -> None:
    """A model guided by itself is itself; an interval saves the calls outside it; both count the guide's calls."""
    words = ("digits", "--steps", 4, "--n", 3, "--no-preview", "--out", "x.npz")
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
        (("tune-steps", "digits", "--out", "there/x.json"), "in a folder that exists"),
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
    assert "not a file of 'fewstep tune-steps'" in cli("sample", "digits", "--settings", "other.json", code=2).err
    Path("x.json").write_text('{"setting": {"solver": "ddim", "grid": "karras", "steps": 3, "threshold": null}}')
    said = cli("sample", "digits", "--settings", "x.json", "--steps", 4, code=2).err
    assert "--steps stands in x.json already" in said
