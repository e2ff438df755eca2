"""What a safetensors file says of itself, and a bound on the networks that are built for it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch.nn.modules.module import register_module_parameter_registration_hook


class Header(NamedTuple):
    """A tensor in a file: its shape, and its type as safetensors writes it (F32, BF16, I64, ..)."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def floating(self) -> bool:
        return self.dtype.startswith(("F", "BF"))


@contextmanager
def opened(path: Path) -> Iterator[None]:
    """FileNotFoundError or ValueError naming a safetensors file that is missing or damaged."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weights file")
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}); copy or make it again") from None


def headers(path: Path) -> dict[str, Header]:
    """The tensors of a safetensors file by name, without reading their values."""
    with opened(path), safe_open(path, "pt") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: Header(tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}


def sha256(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def no_larger_than(tensors: int) -> Iterator[None]:
    """ValueError from whatever is built inside once it has many more parameters than there are tensors to fill them:
    a config of ten million layers would take hours and all memory to find that out.

    A parameter may be registered several times (tied, moved, filled): four times, and a thousand, are let pass.
    """
    made = 0

    def count(*_: Any) -> None:
        nonlocal made
        made += 1
        if made > 4 * tensors + 1000:
            raise ValueError(f"this network has more than {made - 1} tensors of weights, where {tensors} were expected")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()
