"""IDX files, the format of MNIST and Fashion-MNIST: a magic number, the sizes, the bytes.

The magic number is ``00 00 08 d`` for unsigned bytes in ``d`` dimensions (big-endian sizes follow): 2051 for
pictures ``[N, H, W]``, 2049 for labels ``[N]``.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from fewstep.data.dataset import Dataset
from fewstep.data.labels import as_labels

#: Bytes that one byte of a .gz file can stand for, at most.
MOST_RATIO = 1100
PREFIX = {"train": "train", "test": "t10k"}


def is_idx(name: str) -> bool:
    """Whether a file name is one of IDX pictures or labels."""
    return name.removesuffix(".gz").endswith(("ubyte", ".idx")) or "-idx" in name


def read_idx_folder(path: Path, split: Literal["train", "test"]) -> Dataset:
    """The pictures and labels ``train-*`` or ``t10k-*`` of a folder."""
    images, labels = f"{PREFIX[split]}-images-idx3-ubyte", f"{PREFIX[split]}-labels-idx1-ubyte"
    pictures = one_of(path, images)
    if pictures is None or one_of(path, labels) is None:
        raise FileNotFoundError(f"'{path}' lacks '{images}' or '{labels}' (plain or .gz), which are its {split} part")
    return read_idx_file(pictures)


def read_idx_file(path: Path) -> Dataset:
    """A file of pictures, with the labels of the file beside it whose name says ``labels-idx1``, if there is one."""
    pictures = torch.from_numpy(read_idx(path, dimensions=3))[:, None]
    if "images-idx3" not in path.name:
        return Dataset(path.name, pictures)
    beside = one_of(path.parent, path.name.removesuffix(".gz").replace("images-idx3", "labels-idx1"))
    labels = None if beside is None else as_labels(read_idx(beside, dimensions=1), len(pictures), beside)
    return Dataset(path.resolve().parent.name, pictures, labels)


def one_of(folder: Path, name: str) -> Path | None:
    """The file ``name`` or ``name.gz`` of a folder, if there is one."""
    return next((folder / candidate for candidate in (name, f"{name}.gz") if (folder / candidate).exists()), None)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array of an IDX file of ``dimensions`` dimensions.

    Raises ValueError when the file is not one, is damaged, or is shorter or longer than its header says.
    """
    what = "pictures [N, H, W]" if dimensions == 3 else "labels [N]"
    start = 4 + 4 * dimensions
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(start)
            magic = int.from_bytes(header[:4], "big")
            if magic != 0x0800 + dimensions:
                raise ValueError(
                    f"'{path}' does not hold IDX {what}: magic number {magic}, expected {0x0800 + dimensions}"
                )
            if len(header) < start:
                raise ValueError(f"'{path}' ends inside its header; copy it again")
            shape = struct.unpack(f">{dimensions}I", header[4:])
            size = math.prod(shape)
            possible = size <= path.stat().st_size * MOST_RATIO
            held = file.read(size + 1) if possible else b""  # of what is longer no more than shows that it is
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"'{path}' is a damaged or incomplete .gz file of {what}; copy it again") from error
    if len(held) != size:
        found = "more" if len(held) > size else f"{len(held)}" if possible else "fewer"
        raise ValueError(
            f"'{path}': the header promises {list(shape)} = {size} bytes, but {found} follow; copy it again"
        )
    return np.frombuffer(bytearray(held), dtype=np.uint8).reshape(shape)
