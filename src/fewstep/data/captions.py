"""Words as conditions: captions of pictures, prompts without pictures, and what an encoder makes of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.data.dataset import Draw, Prior, Rows, Samples, Unlabelled
from fewstep.data.encoded import Described, Embed, Tell, make_table
from fewstep.data.stored import Strings
from fewstep.schemas import Place, check, parse_json

#: Captions of a folder of pictures in one file, one JSON object a line.
METADATA = "metadata.jsonl"
TEXTS = ("text", "caption", "prompt")


class Captioned(Samples):
    """Samples with a caption each, or prompts without samples: words that an encoder makes conditions of.

    As they are the samples are read without conditions; :meth:`encoded` gives them those of their captions.  ValueError
    unless there is one caption a sample.
    """

    def __init__(self, captions: Sequence[str], inner: Samples | None = None, name: str = "prompts") -> None:
        if not captions:
            raise ValueError(f"data '{name}': no prompts")
        if inner is not None and len(inner) != len(captions):
            raise ValueError(f"data '{inner.name}': {len(inner)} samples but {len(captions)} captions")
        self.captions: Sequence[str] = captions
        self.class_names, self.bare = (), inner is None
        self.inner = Prior((), name=name) if inner is None else Unlabelled(inner)
        self.name = self.inner.name

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def uncaptioned(self) -> Samples:
        return self.inner

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    @property
    def classes(self) -> int | None:
        return None

    def rows(self, indices: Tensor | slice) -> Rows:
        return self.inner.rows(indices)

    def feed(self, draws: Iterable[Draw]) -> Iterator[Rows]:
        return self.inner.feed(draws)

    def sha256(self) -> str:
        return hashlib.sha256(f"{self.inner.sha256()} {self.words_sha256()}".encode()).hexdigest()

    def words_sha256(self) -> str:
        """Over all captions, in their order."""
        digest = hashlib.sha256()
        for caption in self.captions:
            digest.update(caption.encode("utf-8", "surrogateescape") + b"\0")
        return digest.hexdigest()

    def encoded(
        self,
        embed: Embed,
        shape: tuple[int, ...] | None = None,
        *,
        folder: Path | None = None,
        tell: Tell | None = None,
    ) -> Described:
        """The samples under what ``embed`` makes of their captions: each of them encoded once, in the order in which
        they first come, :data:`~fewstep.data.encoded.CALL` at a time.

        What is large is kept in ``folder``, one for each encoder.  ``shape`` is that of a sample, where there are none.
        """
        known: dict[str, int] = {}
        index = torch.tensor([known.setdefault(caption, len(known)) for caption in self.captions])
        words = list(known)

        def conditions(call: slice) -> Mapping[str, Tensor]:
            found = embed(words[call])
            for name, tensor in found.items():
                if tensor.ndim == 0 or len(tensor) != len(words[call]):
                    raise ValueError(f"{name} of {len(words[call])} prompts has the shape {list(tensor.shape)}")
            return found

        identity = self.words_sha256()
        place = None if folder is None else folder / f"captions-{identity[:16]}"
        inner = Prior(shape, name=self.name) if self.bare and shape is not None else self.inner
        return Described(self.name, inner, make_table(conditions, len(words), place, tell), index, identity)


def captions_beside(root: Path, files: Sequence[str]) -> Strings | None:
    """The captions of pictures: ``metadata.jsonl`` (``file_name`` and ``text``, ``caption`` or ``prompt``), or a text
    file of its own beside each (``x.txt`` beside ``x.png``).  None where there are none.

    ValueError when some pictures have one and others none.
    """
    if (root / METADATA).is_file():
        written = read_metadata(root / METADATA)
        found = [written.get(name.replace(os.sep, "/")) for name in files]
        where = f"'{root / METADATA}' has no line for it"
    else:
        beside = (root / Path(name).with_suffix(".txt") for name in files)
        found = [read_words(path) if path.is_file() else None for path in beside]
        if not any(caption is not None for caption in found):
            return None
        where = "there is no .txt beside it"
    missing = [name for name, caption in zip(files, found, strict=True) if caption is None]
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(files)} pictures in '{root}' have no caption, such as '{missing[0]}': {where}"
        )
    return Strings(caption for caption in found if caption is not None)


def read_words(path: Path) -> str:
    """A text file as one line of words; ValueError when it is not UTF-8."""
    try:
        return " ".join(path.read_text("utf-8").split())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def read_prompts(path: Path) -> Strings:
    """The prompts of a text file, one a line; empty lines are left out.  ValueError when there is none."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    prompts = [" ".join(line.split()) for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"'{path}' holds no prompts: one a line is needed")
    return Strings(prompts)


def read_metadata(path: Path) -> dict[str, str]:
    """File name -> caption."""
    found: dict[str, str] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            entry = check(parse_json(line, where), {"file_name": str, ...: Any}, Place(where))
            key = next((name for name in TEXTS if name in entry), None)
            if key is None or not isinstance(entry[key], str):
                raise ValueError(f"{where}: it has no caption under {', '.join(map(repr, TEXTS))}")
            found[entry["file_name"]] = " ".join(entry[key].split())
    return found
