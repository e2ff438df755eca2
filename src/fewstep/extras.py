"""Further inputs of a student's network that sampling may set: a guidance weight, a number of steps."""

from __future__ import annotations

import keyword
import math
import numbers
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.values import suggestion, tensor_of

#: How the name of an input must look.
NAME = r"[a-z]\w{0,30}"
#: Names of what networks and samplers are given anyway.
TAKEN = frozenset({"x", "t", "s", "cond", "beside", "n", "noise", "steps", "seed", "seeds", "generator", "rng"})


@dataclass(frozen=True)
class Input:
    """A further input: its default and its range, both ends included.

    ``unguided`` declares it to be the guidance weight: its value where there is no guidance, 1 for the scale ``w`` of
    ``unc + w (cond - unc)``, 0 for the ``w - 1`` of LCM's networks; None for every other input.

    ValueError for numbers that are not finite, and for a default or an ``unguided`` out of the range.
    """

    default: float
    low: float
    high: float
    unguided: float | None = None

    def __post_init__(self) -> None:
        for field, value in (("low", self.low), ("high", self.high)):
            if not math.isfinite(value):
                raise ValueError(f"an input's {field}={value:g} must be finite")
        if not self.low <= self.default <= self.high:
            raise ValueError(f"an input's default {self.default:g} must lie in [{self.low:g}, {self.high:g}]")
        if self.unguided is not None and not math.isfinite(self.unguided):
            raise ValueError(f"an input's unguided={self.unguided:g} must be finite")

    def __str__(self) -> str:
        return f"from {self.low:g} to {self.high:g} (default {self.default:g})"

    def at_scale(self, scale: float) -> float:
        """The value of a guidance weight for the guidance scale ``scale``, which is 1 where there is no guidance."""
        return scale - 1 + (1.0 if self.unguided is None else self.unguided)


def check_declared(extras: Mapping[str, Input]) -> None:
    """ValueError for names that no input can have, and for a second guidance weight."""
    for name in extras:
        if not re.fullmatch(NAME, name, re.ASCII) or keyword.iskeyword(name):
            raise ValueError(f"'{name}' cannot be the name of an input: give a word in small letters, such as w")
        if name in TAKEN:
            raise ValueError(f"'{name}' cannot be the name of a further input: networks or samplers are given one")
    if len(weights := [name for name, declared in extras.items() if declared.unguided is not None]) > 1:
        raise ValueError(f"{' and '.join(weights)} are both declared to be the guidance weight: there can be one")


def guidance_weight(extras: Mapping[str, Input]) -> str | None:
    """The name of the input that is declared to be the guidance weight; None where none is."""
    return next((name for name, declared in extras.items() if declared.unguided is not None), None)


def listed(extras: Mapping[str, Input]) -> str:
    """Names, ranges and defaults, as messages list them."""
    return ", ".join(f"{name} {declared}" for name, declared in extras.items()) or "no further inputs"


def check_given(extras: Mapping[str, Input], given: Mapping[str, Any]) -> dict[str, float | Tensor]:
    """The values that are given for inputs: numbers as floats, anything else as tensors of real numbers.

    ValueError for a name that is not declared and for a value out of its range, TypeError for what is no number; both
    name the input, its range and default, and list those there are.
    """
    found: dict[str, float | Tensor] = {}
    takes = f"this student takes {listed(extras)}"
    for name, value in given.items():
        if name not in extras:
            raise ValueError(f"{name}={brief(value)}: {takes}{suggestion(name, extras)}")
        found[name] = number_of(name, value, takes)
        low, high = extras[name].low, extras[name].high
        least, most = ends_of(found[name])
        if not (low <= least and most <= high):
            wrong = most if low <= least else least
            raise ValueError(f"{name}={wrong:g} must lie in [{low:g}, {high:g}]: {takes}")
    return found


def number_of(name: str, value: Any, takes: str) -> float | Tensor:
    """A value as a float, or as a tensor where it is more than a number; TypeError for what is neither."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, bool | str):
        raise TypeError(f"{name}={value!r} must be a number, or one a sample: {takes}")
    try:
        values = tensor_of(name, value)
    except TypeError:
        raise TypeError(f"{name}={brief(value)} must be a number, or one a sample: {takes}") from None
    if values.dtype == torch.bool or values.is_complex():
        raise TypeError(f"{name} of type {values.dtype} must be real numbers: {takes}")
    return values


def ends_of(value: float | Tensor) -> tuple[float, float]:
    """The least and the greatest number of a value; NaN where there is one, and where there are none."""
    if isinstance(value, float):
        return value, value
    if not value.numel():
        return math.nan, math.nan
    low, high = value.double().aminmax()
    return float(low), float(high)


def values_for(x: Tensor, extras: Mapping[str, Input], given: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every input for the states ``x`` ``[B, ...]``: what is ``given``, a number or one a sample ``[B]``, and defaults
    for the rest; each as ``[B]`` in float32, or float64 where the states are.

    Errors as in :func:`check_given`, and ValueError for a value of another shape.
    """
    values = {name: declared.default for name, declared in extras.items()} | check_given(extras, given)
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    found = {}
    for name, value in values.items():
        if isinstance(value, Tensor) and value.shape not in ((), (len(x),)):
            raise ValueError(
                f"{name} of shape {list(value.shape)} must be a number, or one a sample [{len(x)}]: this student takes "
                f"{listed(extras)}"
            )
        found[name] = torch.as_tensor(value, dtype=kind, device=x.device).expand(len(x)).contiguous()
    return found


def brief(value: Any) -> str:
    """A value in a message."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return f"{float(value):g}"
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"{value!r:.40}"
