"""Pictures in files: decoding with Pillow, and folders whose sub-folders are classes."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fewstep.data.dataset import Dataset

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
PARTS = {"train": ("train",), "test": ("test", "validation", "val")}


def read_picture_folder(path: Path, split: Literal["train", "test"]) -> Dataset:
    """A folder of pictures of one size: ``class/**/picture.png``, or pictures without classes directly in it.

    Classes are numbered in the order of their names (as numbers when all names are); the held-out part uses the
    numbers of the training part.  Hidden files and files that are no pictures are left out.
    """
    folders = set(class_folders(path))
    known = {name for names in PARTS.values() for name in names}
    # A lone "train" among other names is a class of vehicles.
    if not folders or (folders - known and not ("train" in folders and folders & set(PARTS["test"]))):
        if split == "test":
            raise ValueError(f"'{path}' has no held-out part: no sub-folder 'test', 'validation' or 'val'")
        return read_classes(path, class_folders(path))
    chosen = [path / name for name in PARTS[split] if name in folders]
    if not chosen:
        raise FileNotFoundError(f"'{path}' has no sub-folder '{split}', only {sorted(folders)}")
    return read_classes(chosen[0], class_folders(path / "train" if "train" in folders else chosen[0]))


def class_folders(path: Path) -> tuple[str, ...]:
    """The names of the sub-folders, in the order of the labels."""
    names = [entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    return tuple(sorted(names, key=int if all(name.isdecimal() for name in names) else None))


def read_classes(path: Path, classes: tuple[str, ...]) -> Dataset:
    """The pictures under ``path`` with the labels that ``classes`` gives to its sub-folders."""
    loose = [entry for entry in path.iterdir() if is_picture(entry)]
    if not classes:
        if not loose:
            raise FileNotFoundError(f"no pictures in '{path}' ({' '.join(SUFFIXES)})")
        return Dataset(path.name, stack((str(file), decode(file, str(file))) for file in sorted(loose)))
    if loose:
        raise ValueError(f"'{path}' holds '{loose[0].name}' beside sub-folders: put every picture into a class folder")
    present = class_folders(path)
    strangers = set(present) - set(classes)
    if strangers:
        raise ValueError(f"'{path / min(strangers)}': the training part has no class '{min(strangers)}'")
    files, labels = [], []
    for name in present:
        members = sorted(file for file in (path / name).rglob("*") if is_picture(file))
        if not members:
            raise FileNotFoundError(f"no pictures in the class folder '{path / name}' ({' '.join(SUFFIXES)})")
        files += members
        labels += [classes.index(name)] * len(members)
    pictures = stack((str(file), decode(file, str(file))) for file in files)
    return Dataset(path.name, pictures, torch.tensor(labels), classes)


def is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def decode(file: Path | BytesIO, name: str) -> np.ndarray:
    """A picture as uint8 ``[1, H, W]`` (grey) or ``[3, H, W]``; the first frame of a film, upright as its EXIF says.

    Transparent pictures are laid on white.  Raises ValueError naming ``name`` for what cannot be read.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError("reading picture files needs Pillow: pip install pillow") from error
    try:
        with Image.open(file) as opened:
            picture = ImageOps.exif_transpose(opened)
            if picture.mode.startswith(("I", "F")):
                raise ValueError(f"mode {picture.mode}")
            if picture.has_transparency_data:
                solid = Image.new("RGBA", picture.size, "white")
                picture = Image.alpha_composite(solid, picture.convert("RGBA"))
            grey = picture.mode in ("1", "L")
            array = np.array(picture.convert("L" if grey else "RGB"))
    except ValueError as error:
        raise ValueError(f"cannot read picture '{name}': {error}; 8-bit pictures are needed") from error
    except (OSError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read picture '{name}': not a picture, damaged or cut short") from error
    return array[None] if grey else array.transpose(2, 0, 1)


def stack(pictures: Iterable[tuple[str, np.ndarray]]) -> Tensor:
    """Named pictures of one size as uint8 ``[N, C, H, W]``; grey ones become RGB when any other is in colour."""
    decoded = list(one_size(pictures))
    channels = max(picture.shape[0] for picture in decoded)
    x = torch.empty((len(decoded), channels, *decoded[0].shape[1:]), dtype=torch.uint8)
    for i, picture in enumerate(decoded):
        x[i] = torch.from_numpy(picture)
    return x


def one_size(pictures: Iterable[tuple[str, np.ndarray]]) -> Iterator[np.ndarray]:
    first: tuple[str, np.ndarray] | None = None
    for name, picture in pictures:
        first = first or (name, picture)
        if picture.shape[1:] != first[1].shape[1:]:
            (h, w), (h0, w0) = picture.shape[1:], first[1].shape[1:]
            raise ValueError(f"'{name}' is {h}x{w} but '{first[0]}' is {h0}x{w0}: resize all pictures to one size")
        yield picture
