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


def test_cells_too_small_to_see_anything_in_are_refused(cli: Callable[..., Any]) -> None:
    done = cli("condense", "pca", "--data", "digits", "--dry-run", code=2)
    assert "k=2 must divide pictures of 8x8 into cells of at least 8x8; possible: 1" in done.err
