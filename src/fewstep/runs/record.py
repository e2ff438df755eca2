"""``recipe.json``: everything that a run is made of, as plain data that runs again.

A record holds the command, the method with all its hyper-parameters, the models that it starts from by role (or the
network to be trained from scratch), the data, the settings and the versions.  Weights and data are known by their
digests, so that a recipe is never run on something else unnoticed, and may have a name, by which they are found again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import fewstep
from fewstep import values
from fewstep.data import Samples
from fewstep.digests import model_sha256
from fewstep.methods import RECIPES, recipe_class
from fewstep.methods.method import Recipe
from fewstep.models.kinds import FRESH
from fewstep.schemas import Choice, Maybe, Place, check, read_json
from fewstep.training.budget import Budget
from fewstep.training.settings import FREE, Settings
from fewstep.values import as_words

FORMAT = 2
NAME = "recipe.json"
Seeds = Literal["derived", "counted"]
# What recipe.json holds.  Hyper-parameters and settings are checked by the types of what they set.
_SHARED = {
    "format": Literal[1, 2], "method": str, "hyper_parameters": dict, "start": dict, "settings": dict, "versions": dict,
    "data": {"source": str, "sha256": str, ...: Any}, "stage_seeds": Maybe(Seeds),
}  # fmt: skip
RECIPE = Choice("command", {"train": _SHARED, "condense": _SHARED, "distill": _SHARED})
_SOURCE = {"name": str | None, "sha256": Maybe(str), "digest": Maybe(str)}
#: What a distillation starts from, by format.
_STARTS: dict[int, Any] = {1: {"model": str, "sha256": str}, 2: {"teacher": _SOURCE, ...: _SOURCE}}


#: Hyper-parameters that earlier versions wrote and that had no effect, by method.
_IDLE = {"flow-matching": ("noise_mean", "noise_std")}


@dataclass(frozen=True)
class Record:
    """A run as plain data.

    ``start`` are the models that ``distill`` starts from, ``{role: {"name": .., "sha256": .., "digest": ..}}`` as
    :func:`model_source` makes them, and the description of a fresh model for the other commands; ``data`` is
    ``{"source": name, "samples": N, "shape": [..], "sha256": ..}``.  ``stage_seeds`` says how the seeds of stages after
    the first follow from the run's (:func:`fewstep.runs.stages.stage_seed`).
    """

    command: Literal["train", "condense", "distill"]
    method: str
    hyper_parameters: dict[str, Any]
    start: dict[str, Any]
    data: dict[str, Any]
    settings: dict[str, Any]
    versions: dict[str, str]
    stage_seeds: Seeds = "derived"

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"


@dataclass(frozen=True)
class Part:
    """Something that two runs must agree in: as it is compared (by any common digest, where there are some), as it is
    shown, and whether it is a hyper-parameter or a setting."""

    value: Any
    shown: str
    digests: frozenset[str] = frozenset()
    setting: bool = False

    def agrees(self, other: Part) -> bool:
        known = self.digests or other.digests
        return bool(self.digests & other.digests) if known else self.value == other.value


@dataclass(frozen=True)
class Difference:
    """What makes a run another one."""

    name: str
    there: str
    here: str
    setting: bool

    def __str__(self) -> str:
        return f"{self.name} is {self.there} there and {self.here} here"


def record_of(
    recipe: Recipe, start: dict[str, Any], data: dict[str, Any], settings: Settings, command: Any = "distill"
) -> Record:
    """The record of a run that begins now."""
    return Record(command, recipe.name, hyper_parameters(recipe), start, data, settings_data(settings), versions())


def hyper_parameters(recipe: Recipe) -> dict[str, Any]:
    """The hyper-parameters of a recipe as plain data."""
    return {field.name: values.plain(getattr(recipe, field.name)) for field in dataclasses.fields(recipe)}


def settings_data(settings: Settings) -> dict[str, Any]:
    """Settings as plain data, in the words of the command line."""
    return {name: values.plain(value) for name, value in vars(settings).items()}


def model_source(name: str | None, model: nn.Module, folder: Path | None = None) -> dict[str, Any]:
    """How a record knows a model: by its name, its digest, and what ``sha256sum`` says of the files it came from."""
    files = {} if folder is None else {"sha256": weights_sha256(folder)}
    return {"name": name, **files, "digest": model_sha256(model)}


def data_source(source: str, data: Samples) -> dict[str, Any]:
    """How a record knows a data set."""
    return {"source": source, "samples": len(data), "shape": list(data.shape), "sha256": data.sha256()}


def versions() -> dict[str, str]:
    """What a repetition bit for bit depends on."""
    return {"fewstep": fewstep.__version__, "torch": torch.__version__, "python": platform.python_version()}


def read(path: Path) -> Record:
    """The record in a file; ValueError naming the file and what is wrong with it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recipe file")
    written = read_json(path, RECIPE)
    version = written.pop("format")
    if written["command"] != "distill":
        check(written["start"], FRESH, Place(path, "start"))
    else:
        start = check(written["start"], _STARTS[version], Place(path, "start"))
        if version == 1:
            written["start"] = {"teacher": {"name": start["model"], "sha256": start["sha256"]}}
    for name in _IDLE.get(written["method"], ()):
        written["hyper_parameters"].pop(name, None)
    if written["method"] in RECIPES:  # what came after it was written
        written["hyper_parameters"] = hyper_parameters(recipe_class(written["method"])()) | written["hyper_parameters"]
    if version == 1:
        written["stage_seeds"] = "counted"
    return Record(**written | {"settings": settings_data(Settings()) | written["settings"]})


def difference(old: Record, new: Record, free: tuple[str, ...] = FREE) -> Difference | None:
    """The first thing that makes ``new`` another run than ``old``."""
    before, after, absent = parts(old, free), parts(new, free), Part(None, "absent")
    for name in before | after:
        there, here = before.get(name, absent), after.get(name, absent)
        if not there.agrees(here):
            return Difference(name, there.shown, here.shown, there.setting or here.setting)
    return None


def parts(record: Record, free: tuple[str, ...]) -> dict[str, Part]:
    """What must agree for one run to be the continuation of another."""
    found = {"command": Part(record.command, record.command), "method": Part(record.method, record.method)}
    if record.command != "distill":
        found |= {f"the network's {k}": Part(plain(v), as_words(plain(v))) for k, v in flat(record.start).items()}
    else:
        found |= {f"the {role}": named(source) for role, source in record.start.items()}
    found["the data"] = named(record.data)
    values = record.hyper_parameters | {k: v for k, v in record.settings.items() if k not in free}
    for name, value in values.items():
        key = Budget.parse(value) if name == "budget" else plain(value)
        found[name] = Part(key, as_words(value), setting=True)
    return found


def named(source: Mapping[str, Any]) -> Part:
    """A model or data set: the same when its bytes are, whatever its name."""
    digests = [source[key] for key in ("sha256", "digest") if source.get(key)]
    name = source.get("name", source.get("source"))
    shown = "one without a name" if name is None else f"'{name}'"
    return Part(None, f"{shown} (sha256 {digests[0][:12] if digests else '?'})", frozenset(digests))


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of a nested description by their dotted names."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves


def plain(value: Any) -> Any:
    """A value as it looks after a round trip through JSON."""
    return json.loads(json.dumps(value))


def weights_sha256(folder: Path) -> str:
    """SHA-256 over the weight files of a model folder, in the order of their paths (of one file: what sha256sum says).

    Raises FileNotFoundError when there are none.
    """
    files = sorted(folder.rglob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder}: no .safetensors weights here")
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def with_precision(record: Record, precision: Any) -> Record:
    return dataclasses.replace(record, settings=record.settings | {"precision": precision})
