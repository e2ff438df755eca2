"""Flags made from what they set: the fields of a dataclass, or the arguments of a constructor.

A :class:`Parameter` knows its name, type, default and help; it reads a command-line word and checks a value from JSON
by the same rules.  Types are those of :mod:`fewstep.values`.  Ranges are left to the class that is made: its message
is then the same from Python, from a recipe and from a flag.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from fewstep.cli.errors import UserError
from fewstep.values import (
    arguments,
    as_words,
    bare,
    check,
    declared,
    element,
    help_of,
    is_written,
    read,
    suggestion,
    union,
)


@dataclass(frozen=True)
class Parameter:
    """One thing that a flag sets."""

    name: str
    kind: Any
    default: Any
    help: str = ""

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def metavar(self) -> str:
        return self.name.upper() if bare(self.kind) is str else metavar(self.kind)

    def add_to(self, group: argparse._ArgumentGroup) -> None:
        """Adds the flag; a flag that is not given leaves no trace in the namespace."""
        shown = f"(default {as_words(self.default)})"
        text = f"{self.help} {shown}".strip().replace("%", "%%")
        if bare(self.kind) is bool:
            group.add_argument(
                self.flag, dest=self.name, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
            )
            return
        group.add_argument(
            self.flag, dest=self.name, type=self.read, default=argparse.SUPPRESS, metavar=self.metavar, help=text
        )

    def read(self, word: str) -> Any:
        """The value of a command-line word."""
        try:
            return read(self.kind, word)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    def check(self, value: Any) -> Any:
        """The value of a JSON value."""
        try:
            return check(self.kind, value)
        except ValueError as error:
            raise UserError(f"{self.name}: {error}") from None


def metavar(kind: Any) -> str:
    """What stands for the value in the help."""
    kind = bare(kind)
    options = union(kind)
    if options:
        return f"{metavar(options[0])}|none"
    if get_origin(kind) is tuple:
        return ",".join([metavar(element(kind))] * 2) + (",.." if get_args(kind)[-1] is Ellipsis else "")
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    return kind.shown if is_written(kind) else {int: "N", float: "X", str: "NAME"}[kind]


def of_dataclass(cls: type) -> list[Parameter]:
    """The fields of a dataclass, with the help that stands at the field."""
    kinds = declared(cls)
    return [
        Parameter(f.name, kinds[f.name], default_of(f), help_of(kinds[f.name]))
        for f in dataclasses.fields(cls)
        if f.init
    ]


def default_of(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def of_constructor(cls: type, without: Collection[str]) -> list[Parameter]:
    """The arguments of a constructor, but for those that something else decides."""
    kinds = arguments(cls)
    return [
        Parameter(name, kinds[name], argument.default, help_of(kinds[name]))
        for name, argument in inspect.signature(cls).parameters.items()
        if name not in without
    ]


def given(parameters: Iterable[Parameter], chosen: argparse.Namespace) -> dict[str, Any]:
    """The values of the flags that were on the command line."""
    names = {parameter.name for parameter in parameters}
    return {name: value for name, value in vars(chosen).items() if name in names}


def from_json(parameters: Iterable[Parameter], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Checked values of plain data; :class:`UserError` naming ``where`` for an unknown name or a wrong value."""
    known = {parameter.name: parameter for parameter in parameters}
    checked = {}
    for name, value in values.items():
        if name not in known:
            raise UserError(f"{where} has no '{name}'{suggestion(name, known)}")
        try:
            checked[name] = known[name].check(value)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    return checked
