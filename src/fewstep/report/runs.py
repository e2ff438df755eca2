"""Training runs as a report tells them: what was trained, how it went, what a healthy course looks like.

A run folder holds ``log.jsonl`` and ``model/``, or one such folder a stage; ``recipe.json``, where there is one, says
what was asked for, so that a page can print the exact command that repeats the run.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from fewstep import schemas
from fewstep.hub import native
from fewstep.hub.places import check_buildable
from fewstep.methods import RECIPES, recipe_class
from fewstep.methods.method import Method

RECIPE_FILE = "recipe.json"
#: Settings that a command repeats where they are not the default.
_SETTINGS = {
    "accumulate": 1, "averages": (0.1,), "device": "cpu", "order": "epochs", "on_alarm": "go-on",
    **dict.fromkeys(("lora_rank", "lora_alpha", "lora_targets")),
}  # fmt: skip


@dataclass(frozen=True)
class Note:
    """What was asked for: ``recipe`` is the method's name, ``arguments`` the hyper-parameters that differ from its
    defaults (all of them where the method is not in :data:`~fewstep.methods.RECIPES`), ``settings`` the trainer's,
    ``given`` the names of models besides the teacher by role; ``command`` is "distill", "train" or "condense".
    ``digests`` are the SHA-256 of teacher and data, where they were noted."""

    command: str
    recipe: str
    arguments: Mapping[str, Any]
    teacher: str
    data: str
    settings: Mapping[str, Any]
    given: Mapping[str, str] = dataclasses.field(default_factory=dict)
    digests: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def shell(self, folder: str) -> str:
        """The command that repeats the run, in lines of at most about 90 characters."""
        if self.command in ("train", "condense"):  # the flags of its network are in the recipe only
            return f"fewstep {self.command} --recipe {shlex.quote(f'{folder}/{RECIPE_FILE}')}"
        if self.recipe not in RECIPES:
            return f"# {folder}: by the method '{self.recipe}', which is none of fewstep's: run its own program"
        others = {k: v for k, v in self.settings.items() if k in _SETTINGS and _plain(v) != _SETTINGS[k]}
        always = {k: self.settings[k] for k in ("budget", "batch", "seed") if k in self.settings}
        flags: dict[str, Any] = {"teacher": self.teacher} if self.teacher else {}
        flags |= self.given
        flags |= {"data": self.data, **self.arguments, **always, **others, "out": folder}
        lines = [f"fewstep {self.command} {self.recipe}"]
        for name, value in flags.items():
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                text = f"--{flag}" if value else f"--no-{flag}"
            else:
                text = f"--{flag} {shlex.quote(_words(value))}"
            if len(lines[-1]) + len(text) < 88:
                lines[-1] += f" {text}"
            else:
                lines.append(text)
        return " \\\n    ".join(lines)

    def call(self, folder: str = "") -> str:
        """The same in Python, without a folder; of a run that trained from scratch, where its model lies."""
        if self.command in ("train", "condense"):
            return f"fs.load({folder!r})  # trained from scratch: fewstep {self.command}"
        if self.recipe not in RECIPES:
            return f"fs.load({folder!r})  # made by the method {self.recipe!r}, which is none of fewstep's"
        arguments = ", ".join(f"{name}={_plain(value)!r}" for name, value in self.arguments.items())
        others = "".join(f", {k}={self.settings[k]!r}" for k in ("budget", "batch", "seed") if k in self.settings)
        others += "".join(f", {role}={name!r}" for role, name in self.given.items())
        recipe = f"fs.{recipe_class(self.recipe).__name__}({arguments})"
        return f"fs.distill(\n    {self.teacher!r}, {recipe}, data={self.data!r}{others},\n)"


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _words(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


#: What is looked at in ``recipe.json``.
TEACHER = {"name": str | None, ...: Any}
NOTED = {
    "command": str, "method": str, "hyper_parameters": dict, "settings": dict,
    "start": {"model": schemas.Maybe(str), "teacher": schemas.Maybe(TEACHER), ...: Any},
    "data": {"source": str, "sha256": schemas.Maybe(str), ...: Any}, ...: Any,
}  # fmt: skip


def read_note(folder: Path) -> Note | None:
    """What the recipe in a run folder says, None when there is none; ValueError naming the file when it is damaged."""
    path = folder / RECIPE_FILE
    if not path.is_file():
        return None
    written = schemas.read_json(path, NOTED)
    recipe = written["method"]
    fields = dataclasses.fields(recipe_class(recipe)) if recipe in RECIPES else ()
    defaults = {f.name: f.default for f in fields}
    changed = {
        name: value
        for name, value in written["hyper_parameters"].items()
        if name not in defaults or _plain(value) != defaults[name]
    }
    given = names_of(written["start"])
    teacher = given.pop("teacher", "")
    whole = {"teacher": written["start"].get("teacher", written["start"]), "data": written["data"]}
    digests = {what: source["sha256"] for what, source in whole.items() if isinstance(source.get("sha256"), str)}
    return Note(
        written["command"], recipe, changed, teacher, written["data"]["source"], written["settings"], given, digests
    )


def names_of(start: Mapping[str, Any]) -> dict[str, str]:
    """The names of the models that a run started from, by role, also of one of an earlier version."""
    if "model" in start:
        return {"teacher": start["model"]}
    found = {role: source.get("name") for role, source in start.items() if isinstance(source, dict)}
    return {role: name for role, name in found.items() if isinstance(name, str)}


@dataclass(frozen=True)
class StageCourse:
    """One stage of a run: its method by name, its records in order, its cost.  ``choosing`` are the seconds in which
    the order of the data said what to read, None where nobody counted them."""

    method: str
    records: tuple[Mapping[str, float], ...]
    steps: int
    images: int
    seconds: float
    choosing: float | None = None

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        """``(seconds, values)`` of a logged scalar, where it was logged."""
        kept = [r for r in self.records if key in r]
        return [float(r["seconds"]) for r in kept], [float(r[key]) for r in kept]

    def scalars(self) -> list[str]:
        """The logged scalars, losses first, then as the log names them."""
        found = dict.fromkeys(key for r in self.records for key in r if key not in ("step", "images", "seconds"))
        return sorted(found, key=lambda key: (not key.endswith("/loss"), key.endswith("/grad_norm")))


@dataclass(frozen=True)
class RunCourse:
    """A run: its name (the folder's), its stages, its note if it left one."""

    name: str
    folder: str
    stages: tuple[StageCourse, ...]
    note: Note | None = None

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def choosing(self) -> float | None:
        """The seconds of all stages in which something said what to read; None where one has not counted them."""
        found = [stage.choosing for stage in self.stages if stage.choosing is not None]
        return sum(found) if len(found) == len(self.stages) else None

    @property
    def order(self) -> str:
        """The order in which data were read, by name."""
        return str(self.note.settings.get("order", "epochs")) if self.note else "epochs"

    @property
    def recipe(self) -> str:
        """The recipe's name; of a run without a note, its last stage's method."""
        return self.note.recipe if self.note else self.stages[-1].method


@dataclass(frozen=True)
class Sign:
    """A declared sign of health beside the measured course: medians over the first and the last tenth."""

    key: str
    sentence: str
    first: float
    last: float


def signs(stage: StageCourse) -> list[Sign]:
    """The method's signs of health with what this stage measured; a sign that was never logged is left out, and of a
    method that is not known there are none."""
    found = []
    method = method_class(stage.method)
    for key, sentence in ({} if method is None else method.healthy).items():
        _, values = stage.curve(key)
        if values:
            tenth = max(1, math.ceil(len(values) / 10))
            found.append(Sign(key, sentence, median(values[:tenth]), median(values[-tenth:])))
    return found


@cache
def _methods() -> dict[str, type[Method]]:
    return {s.method.name: type(s.method) for name in RECIPES for s in recipe_class(name)().stages()}


def method_class(name: str) -> type[Method] | None:
    """The method behind a stage's name; None for one that is not fewstep's, or of another version."""
    return _methods().get(name)


def read_run(folder: str | Path) -> RunCourse:
    """A run folder; FileNotFoundError when no run has finished a stage in it."""
    folder = Path(folder)
    places = sorted(folder.glob("stage-*"), key=_stage) or [folder]
    done = [place for place in places if (place / "model" / "config.json").is_file()]
    if not done:
        check_buildable(folder)
        raise FileNotFoundError(f"{folder}: no finished run here (no model/config.json); run the same command again")
    return RunCourse(folder.name, str(folder), tuple(_read_stage(place) for place in done), read_note(folder))


def model_folder(folder: str | Path) -> Path:
    """Where the finished model of a run lies: its own ``model/``, or that of its last stage."""
    folder = Path(folder)
    if (folder / "model").is_dir():
        return folder / "model"
    return sorted(folder.glob("stage-*/model"), key=lambda path: _stage(path.parent))[-1]


def _stage(folder: Path) -> int:
    number = folder.name.split("-")[1]
    return int(number) if number.isdigit() else -1


def _read_stage(folder: Path) -> StageCourse:
    card = native.card(folder / "model")
    return StageCourse(
        str(card.get("method", "")),
        tuple(read_records(folder / "log.jsonl")),
        int(card.get("steps", 0)), int(card.get("images", 0)), float(card.get("seconds", 0)),
        float(card["choosing"]) if "choosing" in card else None,
    )  # fmt: skip


def read_records(path: Path) -> list[dict[str, float]]:
    """The records of a run, without lines that are cut short or damaged; none when there is no log."""
    return schemas.read_records(path, {"seconds": float, ...: int | float})
