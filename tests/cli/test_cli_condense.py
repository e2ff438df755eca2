"""The command line of what makes small data sets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fewstep as fs
from fewstep.data.condensed import Condensed


def test_a_plan_looks_at_all_data_and_a_run_keeps_what_it_says(cli: Callable[..., Any], tmp_path: Path) -> None:
    """Ten of each class are asked for: the first batch of 64 digits does not have them."""
    words = ("condense", "pca", "--data", "digits", "--k", "1", "--network", "mlp-classifier", "--budget", "30steps")
    plan = cli(*words, "--dry-run")
    assert "scorers" in plan.out and "export" not in plan.out
    cli(*words, "--out", tmp_path / "run")
    made = fs.load(tmp_path / "run" / "model")
    assert isinstance(made, Condensed) and made.bytes() == 100 * 65
    assert (tmp_path / "run" / "stores").is_dir()


def test_a_plan_says_how_long_experts_would_take(cli: Callable[..., Any]) -> None:
    plan = cli("condense", "ast", "--data", "digits", "--network", "mlp-classifier", "--augment", "none", "--dry-run")
    assert "experts:   about" in plan.out
    assert list(Path().iterdir()) == []


def test_a_batch_that_means_nothing_is_said_to(cli: Callable[..., Any], tmp_path: Path) -> None:
    """AST reads no batches: one line for another than the usual one, in a plan and in a run."""
    words = ("condense", "ast", "--data", "digits", "--network", "mlp-classifier", "--augment", "none")
    line = "batch=8 means nothing to ast: stretches says how many paths of experts an iteration matches"
    few = (*words, "--experts", "1", "--epochs", "5", "--budget", "2steps")
    assert line in cli(*few, "--batch", "8", "--dry-run").out
    assert line in cli(*few, "--batch", "8", "--out", tmp_path / "run").out
    assert "means nothing" not in cli(*few, "--dry-run").out
    assert "means nothing" not in cli("condense", "pca", *words[2:6], "--k", "1", "--batch", "8", "--dry-run").out


def test_cells_too_small_to_see_anything_in_are_refused(cli: Callable[..., Any]) -> None:
    done = cli("condense", "pca", "--data", "digits", "--dry-run", code=2)
    assert "k=2 must divide pictures of 8x8 into cells of at least 8x8 pixels; possible: 1 (whole pictures)" in done.err


def test_what_a_set_trained_is_measured_on_the_data_that_the_set_stands_for(
    cli: Callable[..., Any], tmp_path: Path
) -> None:
    """A classifier of a condensed set remembers the set; its held-out pictures are those of the digits."""
    a_set = ("condense", "pca", "--data", "digits", "--k", "1", "--network", "mlp-classifier")
    made, trained = tmp_path / "made", tmp_path / "trained"
    cli(*a_set, "--budget", "10steps", "--out", made)
    words = ("train", "names", "--method", "supervised", "--data", made, "--network", "mlp-classifier")
    cli(*words, "--batch", "8", "--budget", "10steps", "--out", trained)
    assert "accuracy" in cli("evaluate", trained).out
    cli("report", trained, "--out", tmp_path / "report.html")
    assert "accuracy" in (tmp_path / "report.html").read_text(encoding="utf-8")
