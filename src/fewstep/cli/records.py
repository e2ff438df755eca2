"""``recipe.json``: everything that a run is made of, as plain data that runs again.

A record holds the command, the method with all its hyper-parameters, the teacher (or the network to be trained from
scratch), the data, the settings and the versions.  Weights and data are known by their SHA-256, so that a recipe is
never run on something else unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import fewstep
from fewstep.cli.flags import as_words
from fewstep.cli.settings import FREE, SETTINGS
from fewstep.data import Samples
from fewstep.hub import native
from fewstep.schemas import Choice, Place, check, read_json
from fewstep.training.budget import Budget

FORMAT = 1
NAME = "recipe.json"
#: What recipe.json holds.  Hyper-parameters and settings are checked by the types of what they set.
_SHARED = {
    "format": Literal[1], "method": str, "hyper_parameters": dict, "settings": dict, "versions": dict,
    "data": {"source": str, "sha256": str, ...: Any},
}  # fmt: skip
RECIPE = Choice(
    "command", {"train": {**_SHARED, "start": dict}, "distill": {**_SHARED, "start": {"model": str, "sha256": str}}}
)


@dataclass(frozen=True)
class Record:
    """A run as plain data.

    ``start`` is the teacher as ``{"model": name, "sha256": ...}`` for ``distill`` and the description of a fresh model
    for ``train``; ``data`` is ``{"source": name, "samples": N, "sha256": ...}``.
    """

    command: Literal["train", "distill"]
    method: str
    hyper_parameters: dict[str, Any]
    start: dict[str, Any]
    data: dict[str, Any]
    settings: dict[str, Any]
    versions: dict[str, str]

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"


def versions() -> dict[str, str]:
    """What a repetition bit for bit depends on."""
    return {"fewstep": fewstep.__version__, "torch": torch.__version__, "python": platform.python_version()}


def read(path: Path) -> Record:
    """The record in a file; ValueError naming the file and what is wrong with it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recipe file")
    written = read_json(path, RECIPE)
    if written["command"] == "train":
        check(written["start"], native.DENOISER, Place(path, "start"))
    del written["format"]
    known = {parameter.name: parameter.default for parameter in SETTINGS}
    return Record(**written | {"settings": known | written["settings"]})


def difference(old: Record, new: Record) -> str | None:
    """The first thing that makes ``new`` another run than ``old``, as "NAME is A there and B here"."""
    before, after = parts(old), parts(new)
    for name in before | after:
        key, shown = before.get(name, (None, "absent"))
        new_key, new_shown = after.get(name, (None, "absent"))
        if key != new_key:
            return f"{name} is {shown} there and {new_shown} here"
    return None


def parts(record: Record) -> dict[str, tuple[Any, str]]:
    """What must agree for one run to be the continuation of another: name -> (what is compared, what is shown)."""
    found: dict[str, tuple[Any, str]] = {
        "command": (record.command, record.command), "method": (record.method, record.method)
    }  # fmt: skip
    if record.command == "train":
        found |= {f"the network's {k}": (plain(v), as_words(plain(v))) for k, v in flat(record.start).items()}
    else:
        found["the teacher"] = named(record.start, "model")
    found["the data"] = named(record.data, "source")
    values = record.hyper_parameters | {k: v for k, v in record.settings.items() if k not in FREE}
    for name, value in values.items():
        key = Budget.parse(value) if name == "budget" else plain(value)
        found["--" + name.replace("_", "-")] = (key, as_words(value))
    return found


def named(source: dict[str, Any], name: str) -> tuple[Any, str]:
    """A teacher or data set: the same when its bytes are, whatever its name."""
    return source.get("sha256"), f"'{source.get(name)}' (sha256 {str(source.get('sha256'))[:12]})"


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


def data_sha256(data: Samples) -> str:
    """What tells a data set from any other."""
    return data.sha256()
