"""Routers as plain data."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from fewstep.routing import ByClass, ByEmbedding, ByTime, Router
from fewstep.schemas import Choice, Count, Size

#: More numbers than the centers of any router hold.
MOST_CENTERS = 2**26

_CLASSES: dict[str, type[Router]] = {"by-class": ByClass, "by-time": ByTime, "by-embedding": ByEmbedding}
_NAMES = {cls: name for name, cls in _CLASSES.items()}
#: What config.json may hold of a router.
ROUTER = Choice(
    "name",
    {
        "by-class": {"parts": list[list[Count]]},
        "by-time": {"bounds": list[float]},
        "by-embedding": {"shape": tuple[Size, ...], "leaf": str},
    },
)


def describe_router(router: Router) -> dict[str, Any]:
    """A router as plain data, from which :func:`build_router` makes it again; TypeError for one of another class."""
    if type(router) not in _NAMES:
        raise TypeError(f"a {type(router).__name__} is not one of fewstep's routers ({', '.join(ROUTER.kinds)})")
    return {"name": _NAMES[type(router)], **router.config}


def build_router(config: dict[str, Any]) -> Router:
    """The router of :func:`describe_router`, its tensors without values; ValueError for what makes none."""
    arguments = dict(config)
    makers: dict[str, Callable[..., Router]] = {**_CLASSES, "by-embedding": _empty_centers}
    return makers[arguments.pop("name")](**arguments)


def _empty_centers(shape: tuple[int, ...], leaf: str) -> ByEmbedding:
    if math.prod(shape) > MOST_CENTERS:
        raise ValueError(f"centers of shape {list(shape)} are more than any router has")
    return ByEmbedding(torch.zeros(shape), leaf)
