"""Token sequences with what stands beside them (masks, other responses) in array files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from fewstep.data.dataset import Dataset
from fewstep.files import save_tensors

TOKENS = "tokens"


def read_tokens(path: Path, held: list[str], read: Callable[[Path, str], np.ndarray], prefix: str = "") -> Dataset:
    """The array ``tokens`` ``[N, L]`` of whole numbers from 0 on, and as columns by name the other arrays, one row a
    sequence; in a file of two parts names begin with ``train_`` or ``test_``, the ``prefix``.

    ValueError for tokens that are no whole numbers or of another shape.
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
        if name.startswith(prefix) and name != prefix + TOKENS and (prefix or not name.startswith("test_"))
    }
    return Dataset(path.stem, torch.from_numpy(tokens.astype(np.int64)), columns=columns)


def write_tokens(data: Dataset, path: str | Path) -> Path:
    """Write a data set of tokens as a ``.safetensors`` file that commands read as ``--data``.

    ValueError for data that are no tokens, and for a file of another name.
    """
    place = Path(path)
    if place.suffix != ".safetensors":
        raise ValueError(f"'{place}': the name of a file of tokens ends in .safetensors")
    if data.x.is_floating_point() or data.x.dtype == torch.uint8 or data.x.ndim != 2:
        raise ValueError(f"data '{data.name}' are no tokens, which are whole numbers [N, L] (int64)")
    save_tensors(place, {TOKENS: data.x, **data.columns})
    return place
