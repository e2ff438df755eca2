"""Data in array files: ``.npz`` (never with pickled objects) and ``.safetensors``."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewstep.data.dataset import Dataset
from fewstep.data.labels import as_labels
from fewstep.data.token_files import TOKENS, read_tokens

IMAGES = ("images", "image", "x")
#: Floats from 0 up to more than this were bytes once.
MOST_FLOAT = 100
LABELS = ("labels", "label", "y")


def read_arrays(path: Path, split: Literal["train", "test"]) -> Dataset:
    """An array file as a data set.

    Arrays of one part are named ``images`` / ``labels`` (or ``image``, ``x`` / ``label``, ``y``), of two parts
    ``train_images`` or ``x_train`` and so on.  uint8 arrays are pictures ``[N, C, H, W]``, ``[N, H, W, C]`` with
    1 or 3 channels, or ``[N, H, W]``; floating-point arrays ``[N, ...]`` are read as they are, in float32.  A file with
    an array ``tokens`` holds sequences (:mod:`fewstep.data.token_files`).
    """
    names, read = (npz_names, npz_array) if path.suffix == ".npz" else (safetensors_names, safetensors_array)
    held = names(path)
    if (tokens := find(held, (TOKENS,), split)) is not None and not tokens.startswith(f"{TOKENS}_"):
        return read_tokens(path, held, read, tokens.removesuffix(TOKENS))
    x_name, y_name = find(held, IMAGES, split), find(held, LABELS, split)
    if x_name is None:
        wanted = f"array '{split}_images'" if split == "test" else "array 'images'"
        raise ValueError(f"'{path}' has no {wanted}: it holds {sorted(held)}")
    x = as_samples(read(path, x_name), f"{path}' array '{x_name}")
    return Dataset(path.stem, x, None if y_name is None else as_labels(read(path, y_name), len(x), path))


def find(held: list[str], names: tuple[str, ...], split: str) -> str | None:
    """The array that is one of ``names`` for ``split``; a name without a part means training."""
    for name in names:
        for candidate in (f"{split}_{name}", f"{name}_{split}", *([name] if split == "train" else [])):
            if candidate in held:
                return candidate
    return None


def counted(x: np.ndarray) -> bool:
    """Whether these are whole numbers, as of pictures with few colours."""
    return x.ndim == 4 and bool(x.max() > 2 and (x == x.round()).all())


def as_samples(x: np.ndarray, where: str) -> Tensor:
    """Pictures as uint8 ``[N, C, H, W]``, other samples as float32 ``[N, ...]``."""
    if x.dtype.kind == "f":
        samples = torch.from_numpy(x.astype(np.float32))
        if x.ndim in (3, 4) and x.size and x.min() >= 0 and (x.max() > MOST_FLOAT or counted(x)):
            raise ValueError(
                f"'{where}' is {x.dtype} with numbers in 0..{x.max():g}: store such pictures as uint8, or scale "
                "them to [-1, 1]"
            )
        return samples
    if x.dtype != np.uint8:
        raise ValueError(f"'{where}' is {x.dtype}: pictures are uint8 in 0..255, other samples floating point")
    if x.ndim not in (3, 4):
        raise ValueError(f"'{where}': uint8 pictures have shape [N, C, H, W] or [N, H, W], found {list(x.shape)}")
    if x.ndim == 3:
        x = x[:, None]
    elif x.shape[3] in (1, 3) and x.shape[1] not in (1, 3):
        x = x.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(x))


def npz_names(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except (zipfile.BadZipFile, OSError, RuntimeError) as error:
        raise ValueError(f"'{path}' is not an .npz file, or is damaged or cut short") from error


def npz_array(path: Path, name: str) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return archive[name]
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, KeyError) as error:
        raise ValueError(f"'{path}': array '{name}' is damaged or cut short") from error
    except ValueError as error:
        raise ValueError(f"'{path}': array '{name}' is not a plain numeric array; objects are not unpickled") from error


def safetensors_names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as archive:
            return list(archive.keys())
    except SafetensorError as error:
        raise ValueError(f"'{path}' is not a .safetensors file, or is damaged or cut short") from error


def safetensors_array(path: Path, name: str) -> np.ndarray:
    with safe_open(path, framework="pt") as archive:
        tensor: Tensor = archive.get_tensor(name)
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()
