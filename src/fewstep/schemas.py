"""JSON files that come from outside: read within limits, and checked against a schema before anything is made of them.

A schema is a type (``bool``, ``int``, ``float``, ``str``, ``X | None``, ``Literal``, ``list[X]``, ``tuple[X, ...]``,
``Annotated[X, Range(low, high)]``, ``Any``), a dict of schemas by key for an object (with ``...`` among the keys: and
others), or a :class:`Schema`, such as a :class:`Choice` or a :class:`Map`.  Booleans are no numbers, and NaN and
infinity are refused unless a range allows infinity.
"""

from __future__ import annotations

import inspect
import json
import re
import reprlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from fewstep.values import suggestion

#: A longer or deeper file is refused: the longest that are read here are lists of a large model's tensors.
MAX_BYTES, MAX_DEPTH = 16 * 2**20, 64


@dataclass(frozen=True)
class Range:
    """Bounds of a number, both included."""

    low: float = -sys.float_info.max
    high: float = sys.float_info.max


class Schema(ABC):
    """What is checked by more than a type."""

    @abstractmethod
    def check(self, value: Any, place: Place) -> Any:
        """``value`` when it fits; else ValueError."""


@dataclass(frozen=True)
class Maybe(Schema):
    """The schema of a key that may be absent."""

    schema: Any

    def check(self, value: Any, place: Place) -> Any:
        return check(value, self.schema, place)


@dataclass(frozen=True)
class Choice(Schema):
    """An object whose ``key`` names one of ``kinds``, which says what else it holds."""

    key: str
    kinds: Mapping[str, Mapping[str, Any]]

    def check(self, value: Any, place: Place) -> dict[str, Any]:
        if self.key not in place.as_object(value):
            raise place.missing(self.key)
        kind = value[self.key]
        if not isinstance(kind, str) or kind not in self.kinds:
            right = f"one of {', '.join(self.kinds)}{suggestion(str(kind), self.kinds)}"
            raise place.inside(self.key).wrong(kind, right)
        return check_object(value, {self.key: str, **self.kinds[kind]}, place)


@dataclass(frozen=True)
class Map(Schema):
    """An object with any keys that match the pattern ``key``; ``said`` is the pattern in words."""

    key: str
    said: str
    schema: Any

    def check(self, value: Any, place: Place) -> dict[str, Any]:
        for key in place.as_object(value):
            if not re.fullmatch(self.key, key, re.ASCII):
                raise place.inside("key").wrong(key, self.said)
        return {key: check(inner, self.schema, place.inside(key)) for key, inner in value.items()}


#: A number of things, or the size of one side of an array.
MOST = 2**31 - 1
Count = Annotated[int, Range(0, MOST)]
Size = Annotated[int, Range(1, MOST)]


def read_json(path: Path, schema: Any = Any) -> Any:
    """The content of a JSON file, checked; lists where the schema says ``tuple`` become tuples.

    FileNotFoundError for a missing file; ValueError naming the file for one that is too long, too deep or no JSON, and
    the field, its value and what would be right for content that does not fit.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"{path}: longer than {MAX_BYTES >> 20} MB, which no such file is")
    return check(parse_json(data, path), schema, Place(path))


def read_records(path: Path, schema: Any) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, without lines that are cut short (by a kill) or damaged; none when there is
    no such file."""
    if not path.is_file():
        return []
    found = []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                found.append(check(parse_json(line, path), schema, Place(path)))
            except ValueError:
                continue
    return found


def parse_json(data: bytes | str, where: Path | str) -> Any:
    """JSON text as plain data; ValueError naming ``where`` when it is damaged, too deep, or has a key twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
            raise ValueError(f"key {reprlib.repr(twice)} stands in one object twice")
        return found

    try:
        content = json.loads(data if isinstance(data, str) else data.decode(), object_pairs_hook=unique)
    except RecursionError:
        raise ValueError(f"{where}: nested deeper than {MAX_DEPTH} levels") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not valid JSON (no UTF-8 text at byte {error.start})") from None
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from None
    level, depth = [content], 0
    while level := [inner for value in level for inner in children(value)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"{where}: nested deeper than {MAX_DEPTH} levels")
    return content


def children(value: Any) -> list[Any]:
    """The values inside an object or a list."""
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


@dataclass(frozen=True)
class Place:
    """A field of a file, for messages."""

    file: Path | str
    field: str = ""

    def inside(self, key: str) -> Place:
        return Place(self.file, f"{self.field}.{key}" if self.field else key)

    def wrong(self, value: Any, right: str) -> ValueError:
        what = f"{self.field} = {brief(value)}" if self.field else brief(value)
        return ValueError(f"{self.file}: {what} must be {right}")

    def missing(self, key: str) -> ValueError:
        return ValueError(f"{self.file}: '{self.inside(key).field}' is missing")

    def as_object(self, value: Any) -> dict[str, Any]:
        """A value that must be an object; ValueError for any other."""
        if not isinstance(value, dict):
            raise self.wrong(value, "an object")
        return value


def check(value: Any, schema: Any, place: Place) -> Any:
    """``value`` when it fits ``schema``; else ValueError naming the place, the value and what would be right."""
    origin, members = get_origin(schema), get_args(schema)
    if isinstance(schema, Schema):
        return schema.check(value, place)
    if isinstance(schema, Mapping):
        return check_object(value, schema, place)
    if origin in (list, tuple):
        any_length = origin is list or members[-1] is Ellipsis
        if not isinstance(value, list | tuple) or not (any_length or len(value) == len(members)):
            raise place.wrong(value, in_words(schema))
        each = (members[0],) * len(value) if any_length else members
        found = [
            check(v, m, Place(place.file, f"{place.field}[{i}]"))
            for i, (v, m) in enumerate(zip(value, each, strict=True))
        ]
        return tuple(found) if origin is tuple else found
    if origin in (Union, UnionType):
        for option in members:
            try:
                return check(value, option, place)
            except ValueError:
                continue
        raise place.wrong(value, in_words(schema))
    if not fits(value, schema):
        raise place.wrong(value, in_words(schema))
    return float(value) if schema is float else value


def check_object(value: Any, schema: Mapping[Any, Any], place: Place) -> dict[str, Any]:
    """An object that a dict of schemas describes."""
    given = place.as_object(value)
    for key, inner in schema.items():
        if key not in given and key is not ... and not isinstance(inner, Maybe):
            raise place.missing(key)
    for key in given:
        if key not in schema and ... not in schema:
            known = f"{', '.join(schema)}{suggestion(key, schema)}"
            raise ValueError(f"{place.file}: '{place.inside(brief(key)[1:-1]).field}' is not among {known}")
    return {key: check(inner, schema.get(key, schema.get(...)), place.inside(key)) for key, inner in given.items()}


def is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)


def fits(value: Any, schema: Any) -> bool:
    """Whether a value is of a plain type, within its range."""
    if get_origin(schema) is Annotated:
        kind, bounds = get_args(schema)
        return is_number(value, kind) and bounds.low <= value <= bounds.high
    if get_origin(schema) is Literal:
        return any(value == option and type(value) is type(option) for option in get_args(schema))
    if schema is float or schema is int:
        return is_number(value, schema) and abs(value) <= sys.float_info.max
    return schema is Any or (value is None if schema is NoneType else isinstance(value, schema))


def in_words(schema: Any) -> str:
    """What fits a schema."""
    origin, arguments = get_origin(schema), get_args(schema)
    if origin is Annotated:
        low, high = arguments[1].low, arguments[1].high
        least = f", at least {low:g}" if low > -MOST else ""
        return in_words(arguments[0]) + (f" from {low:g} to {high:g}" if low > -MOST and high < MOST else least)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(in_words, arguments)))
    if origin is Literal:
        return "one of " + ", ".join(map(brief, arguments)) if len(arguments) > 1 else brief(arguments[0])
    if origin in (list, tuple):
        fixed = origin is tuple and arguments[-1] is not Ellipsis
        return f"a list{f' of {len(arguments)}' * fixed}, each {in_words(arguments[0])}"
    names: dict[Any, str] = {
        int: "a whole number", float: "a finite number", str: "text", bool: "true or false", NoneType: "null",
        dict: "an object", list: "a list", Any: "anything",
    }  # fmt: skip
    return next((name for kind, name in names.items() if kind is schema), "an object")


def brief(value: Any) -> str:
    """A value as JSON, cut to a readable length."""
    text = reprlib.repr(value) if isinstance(value, dict | list | tuple) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def arguments_of(cls: type) -> dict[str, Any]:
    """The schema of a constructor's arguments, from its annotations: whole numbers are :data:`Count`, in lists
    :data:`Size`; what has a default may be absent."""
    given = inspect.signature(cls).parameters
    absent = {name for name, parameter in given.items() if parameter.default is not inspect.Parameter.empty}
    return {name: Maybe(schema) if name in absent else schema for name, schema in fields_of(cls).items()}


def fields_of(cls: type) -> dict[str, Any]:
    """The schema of a dataclass that was written whole: like :func:`arguments_of`, and nothing may be absent."""
    hints = get_type_hints(cls.__init__)  # type: ignore[misc]
    return {name: with_sizes(hints[name], Count) for name in inspect.signature(cls).parameters}


def with_sizes(hint: Any, whole: Any) -> Any:
    """``hint`` with ``whole`` for ``int``, and :data:`Size` inside lists."""
    if get_origin(hint) in (Union, UnionType):
        return Union[tuple(with_sizes(member, whole) for member in get_args(hint))]  # noqa: UP007
    if get_origin(hint) is tuple:
        return tuple[tuple(with_sizes(member, Size) for member in get_args(hint))]  # type: ignore[misc]
    if get_origin(hint) is Mapping:
        return Map(".{1,100}", "a name", with_sizes(get_args(hint)[1], whole))
    return whole if hint is int else hint


@contextmanager
def blaming(place: Path | str) -> Iterator[None]:
    """What a library raises inside becomes one ValueError that names ``place``, the file whose content it was given.

    Memory that runs out stays what it is, a package that is missing an ImportError.
    """
    try:
        yield
    except MemoryError:
        raise
    except ImportError as error:
        raise ImportError(f"{place}: {error}") from error
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith(str(place)):
            raise  # it is said already
        first = (str(error).strip().splitlines() or [""])[0]
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{place}: {kind}{first[:300]}") from error
