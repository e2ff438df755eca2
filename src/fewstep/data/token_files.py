"""Token sequences with what stands beside them (masks, other responses) in array files."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from fewstep.data.dataset import Dataset
from fewstep.files import save_tensors

TOKENS, ALPHABET = "tokens", "alphabet"


def read_tokens(path: Path, held: list[str], read: Callable[[Path, str], np.ndarray], prefix: str = "") -> Dataset:
    """The array ``tokens`` ``[N, L]`` of whole numbers from 0 on, and as columns by name the other arrays, one row a
    sequence; in a file of two parts names begin with ``train_`` or ``test_``, the ``prefix``.  ``alphabet`` ``[K]``, if
    it is there, holds the code points of the characters that the tokens stand for, of both parts.

    ValueError for tokens that are no whole numbers or of another shape, and for an alphabet that is none or too short.
    """
    tokens = read(path, prefix + TOKENS)
    if tokens.ndim != 2 or tokens.dtype.kind not in "iu" or not tokens.size or tokens.min() < 0:
        raise ValueError(
            f"'{path}': array '{prefix + TOKENS}' is {tokens.dtype} {list(tokens.shape)}: tokens are whole numbers "
            "from 0 on, [N, L]"
        )
    columns = {
        name.removeprefix(prefix): torch.from_numpy(read(path, name))
        for name in held
        if name.startswith(prefix)
        and name not in (prefix + TOKENS, ALPHABET)
        and (prefix or not name.startswith("test_"))
    }
    x = torch.from_numpy(tokens.astype(np.int64))
    alphabet = read_alphabet(path, read(path, ALPHABET), int(x.max())) if ALPHABET in held else None
    return Dataset(path.stem, x, columns=columns, alphabet=alphabet)


def read_alphabet(path: Path, codes: np.ndarray, highest: int) -> str:
    """The characters with these code points; ValueError for what are none, or fewer than the ``highest`` token asks."""
    if codes.ndim != 1 or codes.dtype.kind not in "iu" or len(set(codes.tolist())) != len(codes):
        raise ValueError(
            f"'{path}': array '{ALPHABET}' is {codes.dtype} {list(codes.shape)}: code points [K], no two the same"
        )
    if codes.size <= highest or codes.min() < 0 or codes.max() > sys.maxunicode:
        raise ValueError(f"'{path}': array '{ALPHABET}' has {codes.size} characters, and there is a token {highest}")
    return "".join(map(chr, codes.tolist()))


def write_tokens(data: Dataset, path: str | Path, held_out: Dataset | None = None) -> Path:
    """Write a data set of tokens as a ``.safetensors`` file that commands read as ``--data``, with its alphabet, and
    with its ``held_out`` part where there is one.

    ValueError for data that are no tokens, and for a file of another name.
    """
    place = Path(path)
    if place.suffix != ".safetensors":
        raise ValueError(f"'{place}': the name of a file of tokens ends in .safetensors")
    tensors: dict[str, torch.Tensor] = {}
    parts = {"": data} if held_out is None else {"train_": data, "test_": held_out}
    for prefix, part in parts.items():
        if part.x.is_floating_point() or part.x.dtype == torch.uint8 or part.x.ndim != 2:
            raise ValueError(f"data '{part.name}' are no tokens, which are whole numbers [N, L] (int64)")
        tensors |= {prefix + name: column for name, column in {TOKENS: part.x, **part.columns}.items()}
    if data.alphabet is not None:
        tensors[ALPHABET] = torch.tensor([ord(character) for character in data.alphabet])
    save_tensors(place, tensors)
    return place
