"""Tokenizers in folders of transformers: text as the tokens of a model, and back.

A tokenizer is opened when a text is first read or written, so that a model whose tokenizer cannot be opened is as good
as ever for tokens.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.hub.folders import offline, refuse_elsewhere
from fewstep.hub.requires import require
from fewstep.schemas import blaming

#: Files that each make a tokenizer, some of them with others beside them.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
#: What a folder holds beside the weights that a model saved back keeps.
KEPT = (
    *VOCABULARIES, "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "generation_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class FolderTokenizer:
    """The tokenizer in a ``folder``, of a model of so many tokens (``vocabulary``) whose config names the type
    ``model_type`` and, in some, a ``tokenizer_class``.

    A text has the tokens that transformers gives it, with those at its beginning or end that the tokenizer adds by
    itself.  ValueError, of every method, for a tokenizer that cannot be opened.
    """

    folder: Path
    vocabulary: int
    model_type: str
    tokenizer_class: str | None = None

    def encode(self, text: str) -> Tensor:
        tokens = torch.tensor(self.opened()(text, verbose=False).input_ids).long()
        if len(tokens) and int(tokens.max()) >= self.vocabulary:
            raise ValueError(
                f"{self.folder}: its tokenizer writes token {int(tokens.max())}, the model has {self.vocabulary}"
            )
        return tokens

    def decode(self, tokens: Tensor) -> list[str]:
        tokenizer = self.opened()
        return [tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in tokens.tolist()]

    def opened(self) -> Any:
        """transformers' own object."""
        changed = tuple(path.stat().st_mtime_ns for name in KEPT if (path := self.folder / name).is_file())
        return open_tokenizer(self, changed)


@lru_cache(maxsize=4)
def open_tokenizer(found: FolderTokenizer, _changed: tuple[int, ...]) -> Any:
    """transformers' object for a tokenizer whose files were changed at these times; no host is asked and no code of the
    folder is run."""
    refuse_elsewhere(found.folder)
    transformers = require("transformers", "a tokenizer")
    with offline(), blaming(found.folder):
        config = transformers.AutoConfig.for_model(found.model_type)
        config.tokenizer_class = found.tokenizer_class
        return transformers.AutoTokenizer.from_pretrained(
            found.folder, config=config, local_files_only=True, trust_remote_code=False
        )


def tokenizer_in(folder: Path, vocabulary: int, config: Any) -> FolderTokenizer | None:
    """The tokenizer in the folder of a model with a ``config`` of transformers, None where there is none."""
    if not any((folder / name).is_file() for name in VOCABULARIES):
        return None
    return FolderTokenizer(folder, vocabulary, config.model_type, getattr(config, "tokenizer_class", None))


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the files of a tokenizer, where they are elsewhere."""
    if source.resolve() == folder.resolve():
        return
    for name in KEPT:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
