"""Text as tokens: an alphabet, and windows of a fixed length cut from any plain text file, of its letters or of the
tokens of a tokenizer.

``shakespeare`` comes with the library: Romeo and Juliet and Macbeth, 245 kB, see ``assets/LICENCE-shakespeare.txt``.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fewstep.data.dataset import Dataset
from fewstep.language_models import Tokenizer

#: One block in four of the tokens of a text is held out.
BLOCK, EVERY = 4096, 4


@dataclass(frozen=True)
class Alphabet:
    """The characters that tokens stand for, token 0 first.

    With ``folded`` a text is written in lower case first and every run of other characters becomes one space.
    """

    characters: str
    folded: bool = False

    def __post_init__(self) -> None:
        if len(set(self.characters)) != len(self.characters) or len(self.characters) < 2:
            raise ValueError(f"an alphabet needs at least two different characters, got {self.characters!r}")
        if self.folded and " " not in self.characters:
            raise ValueError("a folded alphabet needs the space, which stands for everything else")

    @classmethod
    def of(cls, text: str) -> Alphabet:
        """All characters of a text."""
        return cls("".join(sorted(set(text))))

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> Tensor:
        """int64 tokens; ValueError naming the first character that is not in the alphabet."""
        table = {character: token for token, character in enumerate(self.characters)}
        if self.folded:
            spaced = "".join(c if c in table else " " for c in text.lower())
            text = " ".join(spaced.split())
        try:
            return torch.tensor([table[character] for character in text], dtype=torch.long)
        except KeyError as error:
            raise ValueError(f"character {error} is not in the alphabet {self.characters!r}") from None

    def decode(self, tokens: Tensor, unknown: str = "_") -> list[str]:
        """One string per row of ``[N, L]``; tokens outside the alphabet (MASK) become ``unknown``."""
        known = self.characters
        return ["".join(known[i] if i < len(known) else unknown for i in row) for row in tokens.tolist()]


#: The 26 letters and the space (as in text8).
LETTERS = Alphabet(" abcdefghijklmnopqrstuvwxyz", folded=True)


def alphabet_of(characters: str) -> Alphabet:
    """The alphabet of these characters; of those of :data:`LETTERS`, that one, which is folded."""
    return LETTERS if characters == LETTERS.characters else Alphabet(characters)


def read_text(source: str | Path) -> str:
    """A bundled text by name, or a UTF-8 file; FileNotFoundError or ValueError."""
    if source == "shakespeare":
        return (resources.files("fewstep") / "assets" / "shakespeare.txt").read_text("utf-8")
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"no text at '{source}': give 'shakespeare' or the path of a plain text file")
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def load_text(
    source: str | Path = "shakespeare",
    split: Literal["train", "test"] = "train",
    *,
    length: int = 64,
    stride: int | None = None,
    alphabet: Tokenizer = LETTERS,
) -> Dataset:
    """Windows ``[N, length]`` of tokens, ``stride`` apart (default: a quarter of the length for training, else the
    length, so that held-out windows do not overlap).

    Every fourth block of 4096 tokens is held out, so that both parts are of the same kind.  ``alphabet`` says what the
    tokens are; a tokenizer does too.  ValueError when a part is shorter than a window.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split='{split}': data have two parts, 'train' and 'test'")
    step = (max(1, length // 4) if split == "train" else length) if stride is None else stride
    if length < 1 or step < 1:
        raise ValueError(f"length={length} and stride={step} must be at least 1")
    tokens = alphabet.encode(read_text(source))
    windows = [
        block.unfold(0, length, step)
        for i, block in enumerate(tokens.split(BLOCK))
        if (i % EVERY == EVERY - 1) == (split == "test") and len(block) >= length
    ]
    if not windows:
        raise ValueError(f"'{source}' has {len(tokens)} tokens: too few for windows of {length} in its part '{split}'")
    return Dataset(Path(source).stem, torch.cat(windows))
