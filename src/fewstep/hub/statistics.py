"""Statistics of a model as files: tensors with a fingerprint of what they were measured on.

Statistics (empirical model statistics, heights of a transport map) are right for one model, schedule or data set only
and look like any other numbers.  The fingerprint is plain data, kept as JSON in the metadata of a safetensors file;
reading names what must hold and refuses a file that says otherwise.
"""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewstep.files import load_tensors, save_tensors
from fewstep.schemas import Place, check, parse_json

KEY = "fingerprint"


def save_statistics(path: str | Path, tensors: dict[str, Tensor], fingerprint: dict[str, Any]) -> Path:
    """Write ``tensors`` with their ``fingerprint`` (plain data: numbers, strings, lists, dicts), atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, tensors, {KEY: json.dumps(fingerprint)})
    return path


def load_statistics(path: str | Path, expected: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors in ``path``, once every field of ``expected`` is found equal in its fingerprint.

    Fields that ``expected`` does not name may be anything.  Raises ValueError naming the first field that differs,
    what the file has and what was expected; FileNotFoundError and ValueError for a missing or damaged file.
    """
    found, wanted = flattened(read_fingerprint(path)), flattened(json.loads(json.dumps(expected)))
    for field, value in wanted.items():
        if field not in found:
            raise ValueError(f"{path}: its fingerprint has no {field}, expected {reprlib.repr(value)}")
        if found[field] != value:
            raise ValueError(
                f"{path}: made for {field} = {reprlib.repr(found[field])}, expected {reprlib.repr(value)}; "
                "make these statistics again"
            )
    return load_tensors(Path(path))


def read_fingerprint(path: str | Path) -> dict[str, Any]:
    """What the tensors in ``path`` were measured on."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such statistics file")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}); copy or make it again") from None
    if KEY not in metadata:
        raise ValueError(f"{path}: holds tensors but no fingerprint: not a file of statistics")
    found: dict[str, Any] = check(parse_json(metadata[KEY], path), dict, Place(path, KEY))
    return found


def flattened(fields: dict[str, Any]) -> dict[str, Any]:
    """Nested fields under dotted names: ``{"schedule": {"t_max": 1}}`` as ``{"schedule.t_max": 1}``."""
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{inner}": deeper for inner, deeper in flattened(value).items()}
        else:
            flat[name] = value
    return flat


def digest(tensors: Tensor | Iterable[Tensor]) -> str:
    """16 hexadecimal digits of the SHA-256 of type, shape and bytes: equal for equal tensors in the same order."""
    hashed = hashlib.sha256()
    for tensor in [tensors] if isinstance(tensors, Tensor) else tensors:
        hashed.update(f"{tensor.dtype} {list(tensor.shape)} ".encode())
        hashed.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()[:16]
