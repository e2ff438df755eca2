"""Pictures in files: decoding with Pillow, and folders whose sub-folders are classes."""

from __future__ import annotations

import hashlib
import os
import struct
import warnings
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fewstep.data.captions import captions_beside
from fewstep.data.stored import Stored, Strings

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
#: Files of so many bytes in all are known by their contents, not only by their names and sizes.
SMALL = 256 << 20
#: The most pixels of one picture; of more the header is not believed.
MOST_PIXELS = 8192 * 8192
PARTS = {"train": ("train",), "test": ("test", "validation", "val")}


class PictureFiles(Stored):
    """The pictures of a folder, listed: ``files`` under ``root``, in the order in which they are read."""

    def __init__(
        self, root: Path, files: Strings, labels: Tensor | None = None, class_names: tuple[str, ...] = ()
    ) -> None:
        self.root, self.name, self.files, self.class_names = root, root.name, files, class_names
        self.known_labels = labels

    @property
    def labels(self) -> Tensor | None:
        return self.known_labels

    def __len__(self) -> int:
        return len(self.files)

    def picture(self, index: int) -> tuple[str, np.ndarray]:
        name = os.path.join(self.root, self.files[index])
        return name, decode(name, name)

    def identity(self) -> str:
        """Over the names and sizes of the files, and over their bytes when these are at most :data:`SMALL` in all."""
        paths = [os.path.join(self.root, name) for name in self.files]
        sizes = [os.stat(path).st_size for path in paths]
        digest = hashlib.sha256()
        for name, size in zip(self.files, sizes, strict=True):
            digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))
        if sum(sizes) <= SMALL:
            for path in paths:
                digest.update(Path(path).read_bytes())
        return digest.hexdigest()

    @property
    def captions(self) -> Strings | None:
        return captions_beside(self.root, self.files)


def list_picture_folder(path: Path, split: Literal["train", "test"]) -> PictureFiles:
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
        return list_classes(path, class_folders(path))
    chosen = [path / name for name in PARTS[split] if name in folders]
    if not chosen:
        raise FileNotFoundError(f"'{path}' has no sub-folder '{split}', only {sorted(folders)}")
    return list_classes(chosen[0], class_folders(path / "train" if "train" in folders else chosen[0]))


def class_folders(path: Path) -> tuple[str, ...]:
    """The names of the sub-folders, in the order of the labels."""
    with os.scandir(path) as entries:
        names = [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir()]
    return tuple(sorted(names, key=int if all(name.isdecimal() for name in names) else None))


def list_classes(path: Path, classes: tuple[str, ...]) -> PictureFiles:
    """The pictures under ``path`` with the labels that ``classes`` gives to its sub-folders."""
    with os.scandir(path) as entries:
        loose = sorted(entry.name for entry in entries if is_picture(entry))
    if not classes:
        if not loose:
            raise FileNotFoundError(f"no pictures in '{path}' ({' '.join(SUFFIXES)})")
        return PictureFiles(path, Strings(loose))
    if loose:
        raise ValueError(f"'{path}' holds '{loose[0]}' beside sub-folders: put every picture into a class folder")
    present = class_folders(path)
    strangers = set(present) - set(classes)
    if strangers:
        raise ValueError(f"'{path / min(strangers)}': the training part has no class '{min(strangers)}'")
    files: list[str] = []
    counts: list[int] = []
    for name in present:
        # as paths are ordered: by their parts
        members = sorted(pictures_below(path / name), key=lambda file: file.replace(os.sep, "\0"))
        if not members:
            raise FileNotFoundError(f"no pictures in the class folder '{path / name}' ({' '.join(SUFFIXES)})")
        files += [os.path.join(name, file) for file in members]
        counts.append(len(members))
    labels = torch.tensor([classes.index(name) for name in present]).repeat_interleave(torch.tensor(counts))
    return PictureFiles(path, Strings(files), labels, classes)


def pictures_below(folder: Path, prefix: str = "") -> Iterator[str]:
    """The pictures of a folder and of its sub-folders, as paths in it; what a listing tells is not asked again."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from pictures_below(folder / entry.name, os.path.join(prefix, entry.name))
            elif is_picture(entry):
                yield os.path.join(prefix, entry.name)


def is_picture(entry: os.DirEntry[str]) -> bool:
    name = entry.name
    return name.lower().endswith(SUFFIXES) and not name.startswith(".") and entry.is_file()


def decode(file: str | BytesIO, name: str) -> np.ndarray:
    """A picture as uint8 ``[1, H, W]`` (grey) or ``[3, H, W]``; the first frame of a film, upright as its EXIF says.

    Transparent pictures are laid on white.  Raises ValueError naming ``name`` for what cannot be read.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError("reading picture files needs Pillow: pip install pillow") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bound is ours
            unread = Image.open(file)
        with unread as opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise ValueError(f"{opened.width} x {opened.height} pixels, more than 8192 x 8192")
            opened.verify()  # the checksums, which decoding does not look at
        if isinstance(file, BytesIO):
            file.seek(0)
        with Image.open(file) as opened:
            picture = ImageOps.exif_transpose(opened)
            if picture.mode.startswith(("I", "F")):
                raise ValueError(f"mode {picture.mode}; 8-bit pictures are needed")
            if picture.has_transparency_data:
                solid = Image.new("RGBA", picture.size, "white")
                picture = Image.alpha_composite(solid, picture.convert("RGBA"))
            grey = picture.mode in ("1", "L")
            array = np.array(picture.convert("L" if grey else "RGB"))
    except ValueError as error:
        raise ValueError(f"cannot read picture '{name}': {error}") from error
    except (OSError, SyntaxError, EOFError, struct.error, TypeError, Image.DecompressionBombError) as error:
        # TypeError: Pillow takes a TIFF's entry to be of the type that the damaged file says
        raise ValueError(f"cannot read picture '{name}': not a picture, damaged or cut short") from error
    return array[None] if grey else array.transpose(2, 0, 1)
