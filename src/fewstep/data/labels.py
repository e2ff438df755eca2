"""Class labels as the files give them, checked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def as_labels(values: np.ndarray, count: int, where: str | Path) -> Tensor:
    """int64 labels ``[count]`` from integers ``[count]`` or ``[count, 1]``, 0 or more.

    Raises ValueError naming ``where`` otherwise.
    """
    if values.dtype.kind not in "iu":
        raise ValueError(f"'{where}': labels must be integers 0, 1, 2, ..., found {values.dtype}")
    if values.shape not in ((count,), (count, 1)):
        raise ValueError(f"'{where}': {count} pictures need {count} labels, found labels of shape {list(values.shape)}")
    labels = torch.from_numpy(values.astype(np.int64).reshape(count))
    if count and int(labels.min()) < 0:
        raise ValueError(f"'{where}': labels start at 0, found {int(labels.min())}")
    return labels
