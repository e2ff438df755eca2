"""What ``fewstep tune-steps`` found, as a small JSON file: a named setting, or a learned solver beside it.

::

    settings = fs.load_settings("digits-8calls.json")
    images = fs.sample(teacher, 64, **settings)
    pipe.scheduler = as_scheduler(settings["solver"], pipe)      # num_inference_steps = settings["steps"]
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from fewstep.files import write_atomically
from fewstep.sampling.learned import LearnedSolver
from fewstep.sampling.search import Setting
from fewstep.schemas import Maybe, Size, read_json

LEARNED = {"schedule": str, "times": tuple[float, ...], "rows": tuple[tuple[float, ...], ...]}
#: What is read of a file.
SETTINGS_FILE = {
    "setting": {
        "solver": str, "grid": str | None, "steps": Size, "threshold": Literal["static", "dynamic"] | None, ...: Any,
    },
    "guidance": Maybe(float | None), "learned": Maybe(LEARNED), ...: Any,
}  # fmt: skip


def save_settings(
    path: str | Path,
    setting: Setting,
    guidance: float | None,
    about: dict[str, Any],
    learned: LearnedSolver | None = None,
) -> Path:
    """Write a setting, the guidance that it is for, plain data ``about`` where they come from, and a learned solver
    that is used in place of the setting's."""
    content: dict[str, Any] = {"setting": asdict(setting), "guidance": guidance, **about}
    if learned is not None:
        content["learned"] = asdict(learned)
    write_atomically(Path(path), (json.dumps(content, indent=1) + "\n").encode())
    return Path(path)


def load_settings(path: str | Path) -> dict[str, Any]:
    """The arguments of :func:`fewstep.sample` in a file: ``solver``, ``grid``, ``steps``, ``threshold``, ``guidance``.

    A learned solver is the ``solver``, with None for the ``grid``: its own; it refuses other schedules than the one
    that it was learned on.  FileNotFoundError and ValueError for a missing, damaged or foreign file.
    """
    found = read_json(Path(path), SETTINGS_FILE)
    options = {name: found["setting"][name] for name in ("solver", "grid", "steps", "threshold")}
    options["guidance"] = found.get("guidance")
    if "learned" not in found:
        return options
    try:
        solver = LearnedSolver(**found["learned"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return {**options, "solver": solver, "grid": None, "steps": len(solver.times)}
