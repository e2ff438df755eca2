"""One door to all data: ``load("digits")``, ``load("photos/")``, ``load("cifar10-train.parquet")``.

Nothing is ever downloaded and nothing is ever unpickled.  What is wrong with a source is said in one line that names
the file.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, get_args

from fewstep.data.arrays import read_arrays
from fewstep.data.bundled import BUNDLED, read_bundled
from fewstep.data.captions import Captioned, read_prompts
from fewstep.data.dataset import Dataset, Samples
from fewstep.data.idx import is_idx, read_idx_file, read_idx_folder
from fewstep.data.parquet import list_parquet_file, list_parquet_folder
from fewstep.data.pictures import list_picture_folder
from fewstep.data.stored import Stored
from fewstep.data.tables import read_arrow_folder
from fewstep.data.text import LETTERS, load_text
from fewstep.language_models import Tokenizer
from fewstep.randomness import Rng

Split = Literal["train", "test"]
#: Pictures that take more bytes than these (4 GiB) are read as training goes, by so many processes.
MEMORY, WORKERS = 4 << 30, 2


def load(source: str | Path, split: Split = "train", *, tokenizer: Tokenizer | None = None) -> Dataset:
    """The training part of ``source``, or its held-out part with ``split="test"``.

    ``source`` is one of

    * ``"digits"``, ``"fashion"`` or ``"shapes3d"`` (voxels), which come with the library;
    * ``"shakespeare"``, which does too, or a ``.txt`` file: windows of 64 letters, or tokens of a ``tokenizer``, see
      :mod:`fewstep.data.text`;
    * a folder of pictures, sub-folders being classes (needs Pillow); with sub-folders ``train`` and ``test`` (or
      ``validation``, ``val``) these are the two parts;
    * IDX files, plain or ``.gz``: a folder with the four files of MNIST or Fashion-MNIST, or one file of pictures,
      whose labels are looked for beside it;
    * a ``.parquet`` file, or a folder of them (parts told apart by "train" and "test" in their names), with a column
      ``img`` or ``image`` of encoded pictures and optionally a column ``label`` (needs pyarrow and Pillow);
    * a Hugging Face data set on disk (``save_to_disk``), with the same columns;
    * an ``.npz`` or ``.safetensors`` file with an array ``images`` (or ``image``, ``x``) and optionally ``labels``
      (or ``label``, ``y``); parts are arrays named ``train_images`` or ``x_train`` and so on.

    A path that is named like a bundled set is reached as ``./digits``.

    Raises FileNotFoundError for what does not exist, ImportError when a reader needs a package that is missing, and
    ValueError for everything that is wrong inside the files.
    """
    return listed(source, split, tokenizer).in_memory()


def load_samples(
    source: str | Path,
    split: Split = "train",
    *,
    captions: bool = False,
    tokenizer: Tokenizer | None = None,
    memory: int = MEMORY,
    workers: int = WORKERS,
) -> Samples:
    """What :func:`load` reads, where it fits in ``memory`` bytes; of more pictures than that (a folder of them, or
    parquet files) only the listing is read, and ``workers`` processes read the pictures as training goes.

    The size is that of the decoded pictures, one byte a number.  Training makes the same weights either way.

    With ``captions`` a ``.txt`` file is a list of prompts, one a line, and pictures come with their captions in the
    place of labels (:class:`~fewstep.data.captions.Captioned`), where they have some: a column ``text``, ``caption`` or
    ``prompt`` of parquet files; of a folder ``metadata.jsonl`` or a text file beside each picture.
    """
    if captions and Path(source).suffix == ".txt" and Path(source).is_file():
        return Captioned(read_prompts(Path(source)), name=Path(source).stem)
    found = listed(source, split, tokenizer)
    pictures = found.within(memory, workers)
    words = found.captions if captions else None
    return pictures if words is None else Captioned(words, pictures)


def listed(source: str | Path, split: Split, tokenizer: Tokenizer | None = None) -> Dataset | Stored:
    """A source as its files say what it is: pictures that are listed but not yet read, or data in memory."""
    if split not in get_args(Split):
        raise ValueError(f"split='{split}': data have two parts, 'train' and 'test'")
    if source in BUNDLED:
        return read_bundled(str(source), split)
    path = Path(source)
    if source == "shakespeare" or path.suffix == ".txt":
        return load_text(source, split, alphabet=tokenizer or LETTERS)
    if path.is_dir():
        return list_folder(path, split)
    if not path.exists():
        names = ", ".join(f"'{name}'" for name in BUNDLED)
        raise FileNotFoundError(f"no data at '{source}': give {names}, or the path of a folder or file of pictures")
    return read_file(path, split)


def list_folder(path: Path, split: Split) -> Dataset | Stored:
    """A folder, as what its files say it is."""
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return read_arrow_folder(path, split)
    with os.scandir(path) as entries:
        idx = any(is_idx(entry.name) and entry.is_file() for entry in entries)
    if idx:
        return read_idx_folder(path, split)
    for folder in (path, path / "data"):
        if folder.is_dir() and any(folder.glob("*.parquet")):
            return list_parquet_folder(folder, split)
    return list_picture_folder(path, split)


def read_file(path: Path, split: Split) -> Dataset | Stored:
    """A single file, as what its name says it is."""
    if path.suffix in (".npz", ".safetensors"):
        return read_arrays(path, split)
    if path.suffix != ".parquet" and not is_idx(path.name):
        raise ValueError(
            f"cannot read '{path}': a data file is .npz, .safetensors, .parquet or IDX (…-images-idx3-ubyte[.gz])"
        )
    if split == "test":
        raise ValueError(f"'{path}' is one file without a held-out part: give its folder, or load the test file itself")
    return list_parquet_file(path) if path.suffix == ".parquet" else read_idx_file(path)


def held_out(data: Dataset, count: int, seed: int = 0) -> tuple[Dataset, Dataset]:
    """``(training, held-out)``: ``count`` random samples of ``data`` put aside, for sources without a test part."""
    if not 0 < count < len(data):
        raise ValueError(f"count={count}: put aside at least 1 and fewer than all {len(data)} samples of '{data.name}'")
    order = Rng(seed, "held out").shuffled(len(data))
    return data.subset(order[count:]), data.subset(order[:count])
