"""Words as conditions: captions of pictures, prompts without pictures, and what an encoder makes of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fewstep.data.stored import Strings
from fewstep.schemas import Place, check, parse_json

#: Captions of a folder of pictures in one file, one JSON object a line.
METADATA = "metadata.jsonl"
TEXTS = ("text", "caption", "prompt")


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
