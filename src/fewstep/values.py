"""Values of a declared type: read from a word, on a command line or behind a solver's name, or checked as they are.

Types are bool, int, float, str, ``Literal``, ``tuple[X, ...]``, fixed tuples, and any of these ``| None``; classes are
checked, and not read.  Every mistake is a ValueError that says what would be right.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import re
import types
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from torch import Tensor

KIND_NAMES = {int: "a whole number", float: "a finite number", str: "a word", bool: "true or false"}


def read(kind: Any, word: str) -> Any:
    """``word`` as a value of type ``kind``; ValueError saying what would be right."""
    options = union(kind)
    if options:
        return None if word.lower() == "none" and types.NoneType in options else read(options[0], word)
    if get_origin(kind) is tuple:
        return check(kind, [read(element(kind), part) for part in word.strip("()[]").split(",") if part.strip()])
    if get_origin(kind) is Literal:
        return check(kind, word)
    if kind is int:
        if not re.fullmatch(r"[+-]?[0-9_]+", word.strip()):
            raise ValueError(f"'{word}' is not a whole number")
        return int(word)
    if kind is float:
        try:
            return check(float, float(word))
        except ValueError:
            raise ValueError(f"'{word}' is not a finite number") from None
    if kind is bool:
        if word not in ("true", "false"):
            raise ValueError(f"'{word}' is not true or false")
        return word == "true"
    if kind is str:
        return word
    raise TypeError(f"no word can stand for a {kind}")


def check(kind: Any, value: Any) -> Any:
    """``value`` (plain data, or an object) as a value of type ``kind``; ValueError saying what would be right."""
    options = union(kind)
    if options:
        return None if value is None and types.NoneType in options else check(options[0], value)
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple) or not value:
            raise ValueError(f"'{value}' is not a list such as 1,2,4")
        length = None if get_args(kind)[-1] is Ellipsis else len(get_args(kind))
        if length not in (None, len(value)):
            raise ValueError(f"'{as_words(value)}' has {len(value)} values, {length} are needed")
        return tuple(check(element(kind), part) for part in value)
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            near = suggestion(str(value), get_args(kind))
            raise ValueError(f"'{value}' is not one of {', '.join(get_args(kind))}{near}")
        return value
    number = {int: numbers.Integral, float: numbers.Real}.get(kind)
    if number is None:
        if isinstance(value, kind):
            return value
    elif isinstance(value, number) and not isinstance(value, bool) and math.isfinite(value):
        return kind(value)
    raise ValueError(f"'{value}' is not {KIND_NAMES.get(kind, f'a {kind.__name__}')}")


def whole(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """``value`` as an int; TypeError unless it is a whole number, ValueError outside of ``least .. most``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}={value!r} must be a whole number")
    if least is not None and int(value) < least:
        raise ValueError(f"{name}={value} must be at least {least}")
    if most is not None and int(value) > most:
        raise ValueError(f"{name}={value} must be at most {most}")
    return int(value)


def real(name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> float:
    """``value`` as a float; TypeError unless it is a real number, ValueError outside of ``least .. most``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}={value!r} must be a number")
    if not least <= float(value) <= most:
        raise ValueError(f"{name}={value} must lie in [{least:g}, {most:g}]")
    return float(value)


def tensor_of(name: str, value: Any) -> Tensor:
    """A tensor, array or nested list as a tensor; TypeError for what is none."""
    import numpy as np
    import torch  # here, because command lines are read without it

    if isinstance(value, torch.Tensor):
        return value
    try:
        return torch.from_numpy(np.asarray(value))
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a tensor, an array or a list of numbers, got {value!r}") from None


def check_fields(made: Any) -> None:
    """ValueError when a field of a dataclass holds a value of another type than it declares, or a number that is not
    finite."""
    cls: Any = type(made)
    for name, kind in declared(cls).items():
        try:
            check(kind, getattr(made, name))
        except ValueError as error:
            raise ValueError(f"{type(made).__name__}: {name}: {error}") from None


@cache
def declared(cls: type) -> dict[str, Any]:
    """The types of a dataclass's fields."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def union(kind: Any) -> tuple[Any, ...]:
    """The members of ``X | None``, None last; empty for other types."""
    if get_origin(kind) not in (Union, types.UnionType):
        return ()
    return tuple(sorted(get_args(kind), key=lambda member: member is types.NoneType))


def element(kind: Any) -> Any:
    """The type of a tuple's elements."""
    return get_args(kind)[0]


def as_words(value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, tuple | list):
        return ",".join(map(as_words, value))
    if isinstance(value, float):
        return f"{value:.6g}"
    return "none" if value is None else str(value)


def suggestion(word: str, choices: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for a near miss, else nothing."""
    near = difflib.get_close_matches(word, list(choices), n=1)
    return f"; did you mean '{near[0]}'?" if near else ""
