"""One sample of a data set of somebody's own: the forms that its items may have, and how they become a batch.

An item is a tensor, a pair of a tensor and a label or condition, or a dict with the sample under one of
:data:`SAMPLE`, and optionally a label under one of :data:`LABEL` or a condition under ``cond``; what else a dict
holds are columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fewstep.conditions import Cond, leaves
from fewstep.data.arrays import IMAGES, LABELS
from fewstep.data.dataset import Rows

SAMPLE = ("x", *(name for name in IMAGES if name != "x"), "img")
LABEL = LABELS


class Items(Protocol):
    """Samples by number, as a map-style data set of PyTorch has them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Item(NamedTuple):
    """A sample without a batch dimension, its condition and its columns."""

    x: Tensor
    cond: Cond
    columns: Mapping[str, Tensor]

    def parts(self) -> dict[str, Tensor]:
        """Every tensor by a name that says what it is."""
        cond = {f"condition '{name}'": leaf for name, leaf in leaves(self.cond).items()}
        return {"sample": self.x, **cond, **{f"column '{name}'": column for name, column in self.columns.items()}}


def as_item(given: Any) -> Item:
    """What a data set gave for one sample; ValueError when it is of no known form."""
    if isinstance(given, Mapping):
        x = next((name for name in SAMPLE if name in given), None)
        if x is None:
            raise ValueError(
                f"a dict without a sample: it holds {sorted(map(str, given))}, none of {', '.join(SAMPLE)}"
            )
        cond = next((name for name in ("cond", *LABEL) if name in given), None)
        columns = {name: as_tensor(value, name) for name, value in given.items() if name not in (x, cond)}
        return Item(as_tensor(given[x], x), None if cond is None else as_condition(given[cond]), columns)
    if isinstance(given, tuple | list):
        if len(given) != 2:
            raise ValueError(f"a sequence of {len(given)}, where a sample and its label or condition are two")
        return Item(as_tensor(given[0], "the sample"), as_condition(given[1]), {})
    return Item(as_tensor(given, "the sample"), None, {})


def as_condition(given: Any) -> Cond:
    """A label, an embedding, or tensors by name."""
    if isinstance(given, Mapping):
        return {str(name): as_tensor(value, str(name)) for name, value in given.items()}
    return as_tensor(given, "the label or condition")


def as_tensor(value: Any, name: str) -> Tensor:
    """A tensor of a value; labels are int64, and of NumPy's float64, which is its default, float32 is made.

    ValueError for what is no array of numbers, or holds NaN or infinity.
    """
    if isinstance(value, np.ndarray | np.generic):
        value = torch.from_numpy(np.array(value, np.float32 if value.dtype == np.float64 else None))
    if not isinstance(value, Tensor | int | float):
        raise ValueError(f"{name} is a {type(value).__name__}: give a tensor (pictures: uint8, or floats in [-1, 1])")
    tensor = torch.as_tensor(value)
    if tensor.is_floating_point():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} holds NaN or infinity")
        return tensor
    return tensor.long() if tensor.ndim == 0 else tensor


def check_like(first: Item, item: Item, classes: int | None) -> None:
    """ValueError unless an item has the parts and shapes of the first, and its label is a class."""
    expected = {name: (list(part.shape), part.dtype) for name, part in first.parts().items()}
    found = {name: (list(part.shape), part.dtype) for name, part in item.parts().items()}
    if expected.keys() != found.keys():
        raise ValueError(f"it has {', '.join(found)}, item 0 has {', '.join(expected)}")
    for name, (shape, dtype) in found.items():
        if (shape, dtype) != expected[name]:
            want, kind = expected[name]
            raise ValueError(f"its {name} is {dtype} {shape}, that of item 0 {kind} {want}")
    label = label_of(item)
    if label is not None and classes is not None and not -1 <= label < classes:
        raise ValueError(f"its label is {label}: labels are 0 to {classes - 1}, or -1 for none")


def label_of(item: Item) -> int | None:
    """The class label of an item, where its condition is one."""
    cond = item.cond
    return int(cond) if isinstance(cond, Tensor) and cond.ndim == 0 and not cond.is_floating_point() else None


def stack(items: Sequence[Item]) -> Rows:
    """Items as a batch; samples keep their type."""
    first = items[0]
    cond: Cond = None
    if isinstance(first.cond, Tensor):
        cond = torch.stack([leaves(item.cond)["cond"] for item in items])
    elif first.cond is not None:
        cond = {name: torch.stack([leaves(item.cond)[name] for item in items]) for name in first.cond}
    columns = {name: torch.stack([item.columns[name] for item in items]) for name in first.columns}
    return Rows(torch.stack([item.x for item in items]), cond, columns)
