"""Files: written so that a reader never sees a part, tensors as safetensors only, folders held by one at a time."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that a reader sees the old file or the whole new one, never a part."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """One safetensors file, written atomically; tensors that share memory, as tied weights do, are written each."""
    with replacing(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            save_file(apart({k: v.detach().cpu().contiguous() for k, v in tensors.items()}), temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written ({error})") from None
        temporary.chmod(mode)  # safetensors makes files that only their owner can read
        with temporary.open("rb") as file:
            os.fsync(file.fileno())


def apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same with memory of its own for every tensor: weights may be tied, one network may be several experts."""
    held: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if place in held else tensor
        held.add(place)
    return found


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file that takes the place of ``path`` when all goes well and is removed when not; OSError names
    ``path``."""
    try:
        part = part_of(path)  # safetensors leaves files of its own beside the one that it is killed at
        part.mkdir()
        try:
            yield part / path.name
            os.replace(part / path.name, path)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def check_writable(path: Path) -> None:
    """OSError naming ``path`` when no file can be written there: asked before the work that is to be written; makes the
    folder around it."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = part_of(path)
        part.mkdir()
        part.rmdir()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def part_of(path: Path) -> Path:
    """Where this process writes what is to become ``path``, a hidden name beside it: nothing is there, and what other
    writers of ``path`` left when they were killed is removed."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
        pid = left.name.removeprefix(f".{path.name}.")
        if pid.isdecimal() and (int(pid) == os.getpid() or not _alive(int(pid))):
            shutil.rmtree(left, ignore_errors=True)
    return path.with_name(f".{path.name}.{os.getpid()}")


def _alive(pid: int) -> bool:
    if os.name != "posix":  # where asking is killing
        return True
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno != errno.ESRCH
    return True


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file; ValueError naming the file when it is damaged or not safetensors."""
    with opened(path):
        return load_file(path)


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
def locked(path: Path, busy: str) -> Iterator[None]:
    """Hold the lock file ``path``, made where it is missing; ValueError with the message ``busy`` when another process
    has it.  A killed process holds nothing."""
    with path.open("a") as file:
        if not _taken(file):
            raise ValueError(busy)
        yield


if sys.platform == "win32":
    import msvcrt

    def _taken(file: IO[str]) -> bool:
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _taken(file: IO[str]) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True
