"""Values of a declared type: read from a word, on a command line or behind a solver's name, or checked as they are.

Types are bool, int, float, str, ``Literal``, ``tuple[X, ...]``, fixed tuples, what is :class:`Written` in a word, and
any of these ``| None``; other classes are checked, and not read.  ``Annotated`` types carry a range
(:mod:`fewstep.ranges`) and a line of help.  Every mistake is a ValueError that says what would be right.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import re
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints

from fewstep.ranges import Range

if TYPE_CHECKING:
    from torch import Tensor

KIND_NAMES = {int: "a whole number", float: "a finite number", str: "a word", bool: "true or false"}


class Written(ABC):
    """A value that is written as one word: :meth:`parse` reads what ``str`` gives."""

    #: What stands for the value in a help text.
    shown: ClassVar[str]

    @classmethod
    @abstractmethod
    def parse(cls, text: str) -> Self:
        """The value of a word; ValueError saying what would be right."""

    @classmethod
    def from_plain(cls, value: Any) -> Self:
        """The value of what a recipe file holds, see :meth:`plain`."""
        return cls.parse(check(str, value))

    def plain(self) -> str | float:
        """What a recipe file holds for it."""
        return str(self)

    def numbers(self) -> tuple[float, ...]:
        """What a range bounds."""
        return ()


def read(kind: Any, word: str) -> Any:
    """``word`` as a value of type ``kind``; ValueError saying what would be right."""
    kind = bare(kind)
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
    if is_written(kind):
        return kind.parse(word)
    raise TypeError(f"no word can stand for a {kind}")


def check(kind: Any, value: Any) -> Any:
    """``value`` (plain data, or an object) as a value of type ``kind``; ValueError saying what would be right.

    Ranges are not looked at here: a class looks at those of its own fields, see :func:`check_fields`.
    """
    kind = bare(kind)
    options = union(kind)
    if options:
        return None if value is None and types.NoneType in options else check(options[0], value)
    if get_origin(kind) is tuple:
        # an empty list in a file is a slip, () in Python says none
        if not isinstance(value, list | tuple) or value == []:
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
    if kind is Any:
        return value
    kind = get_origin(kind) or kind
    if is_written(kind) and not isinstance(value, kind):
        return kind.from_plain(value)
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
    """ValueError when a field of a dataclass holds a value of another type than it declares, a number that is not
    finite, or one outside of the field's range.  What is given as plain data (a list, the word of something
    :class:`Written`) is put into the field as what it stands for."""
    cls: Any = type(made)
    for name, kind in declared(cls).items():
        value = getattr(made, name)
        try:
            found = check(kind, value)
        except ValueError as error:
            raise ValueError(f"{cls.__name__}: {name}: {error}") from None
        if found is not value and found != value:
            object.__setattr__(made, name, found)
        check_range(f"{cls.__name__}: {name}", kind, found)


def check_ranges(made: Any) -> None:
    """ValueError when a number in a field of a dataclass is outside of the range that the field declares."""
    cls: Any = type(made)
    for name, kind in declared(cls).items():
        check_range(f"{cls.__name__}: {name}", kind, getattr(made, name))


def check_arguments(cls: type, given: Mapping[str, Any]) -> None:
    """ValueError when an argument of a constructor is outside of the range that it declares; ``given`` may hold more
    (``locals()``)."""
    for name, kind in arguments(cls).items():
        check_range(f"{cls.__name__}: {name}", kind, given[name])


def check_range(name: str, kind: Any, value: Any) -> None:
    """ValueError ``name=value must ...`` when a number in ``value`` is outside of a range that ``kind`` declares."""
    for bound in (note for note in notes(kind) if isinstance(note, Range)):
        for number in numbers_in(value):
            if number not in bound:
                raise ValueError(f"{name}={number:g} must {bound}")
            if math.isinf(number):
                raise ValueError(f"{name}={number:g} must be finite")
    kind = bare(kind)
    if get_origin(kind) is tuple and notes(element(kind)) and isinstance(value, Iterable):
        for part in value:
            check_range(name, element(kind), part)
    elif value is not None and union(kind):
        check_range(name, union(kind)[0], value)


def numbers_in(value: Any) -> tuple[float, ...]:
    """The numbers that a value is made of."""
    if isinstance(value, Written):
        return value.numbers()
    if isinstance(value, tuple | list):
        return tuple(number for part in value for number in numbers_in(part))
    return (float(value),) if isinstance(value, numbers.Real) and not isinstance(value, bool) else ()


@cache
def declared(cls: type) -> dict[str, Any]:
    """The types of a dataclass's fields, with their ranges and help."""
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


@cache
def arguments(cls: Callable[..., Any]) -> dict[str, Any]:
    """The types of a constructor's arguments, with their ranges and help."""
    hints = get_type_hints(cls.__init__, include_extras=True)
    return {name: kind for name, kind in hints.items() if name != "return"}


def bare(kind: Any) -> Any:
    """A type without its range and help."""
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def notes(kind: Any) -> tuple[Any, ...]:
    """What an ``Annotated`` type carries."""
    return get_args(kind)[1:] if get_origin(kind) is Annotated else ()


def help_of(kind: Any) -> str:
    """The line of help that a type carries, empty without one."""
    return next((note for note in notes(kind) if isinstance(note, str)), "")


def is_written(kind: Any) -> bool:
    """Whether a class is :class:`Written`."""
    return isinstance(kind, type) and issubclass(kind, Written)


def read_fields(name: str, cls: type, text: str) -> dict[str, Any]:
    """The values of ``field=value,field=value`` by the fields of a dataclass; ValueError for a word that is none of
    them, naming those it could be, or a value that cannot be."""
    kinds, found = declared(cls), {}
    for part in re.split(r",(?=[\w-]+=)", text) if text else ():
        word, _, value = part.partition("=")
        field = word.strip().replace("-", "_")
        if field not in kinds or not value:
            what = f"has no '{word}'{suggestion(field, kinds)}" if field not in kinds else f"'{word}' has no value"
            raise ValueError(f"{name} {what}")
        try:
            found[field] = read(kinds[field], value)
        except ValueError as error:
            raise ValueError(f"{name}: {field}: {error}") from None
    return found


def written_fields(made: Any) -> str:
    """What :func:`read_fields` reads as the fields of a dataclass that are not at their defaults."""
    values = ((field.name, getattr(made, field.name), field.default) for field in dataclasses.fields(made))
    return ",".join(f"{name}={as_read(value)}" for name, value, default in values if value != default)


def as_read(value: Any) -> str:
    """What :func:`read` reads as this value, with all its digits."""
    if isinstance(value, tuple):
        return ",".join(map(as_read, value))
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value)


def plain(value: Any) -> Any:
    """A value as a recipe file holds it."""
    if isinstance(value, Written):
        return value.plain()
    return [plain(part) for part in value] if isinstance(value, tuple | list) else value


def union(kind: Any) -> tuple[Any, ...]:
    """The members of ``X | None``, None last; empty for other types."""
    kind = bare(kind)
    if get_origin(kind) not in (Union, types.UnionType):
        return ()
    return tuple(sorted(get_args(kind), key=lambda member: member is types.NoneType))


def element(kind: Any) -> Any:
    """The type of a tuple's elements."""
    kind = bare(kind)
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
