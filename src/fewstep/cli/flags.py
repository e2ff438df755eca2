"""Flags made from what they set: the fields of a dataclass, or the arguments of a constructor.

A :class:`Parameter` knows its name, type, default and help; it reads a command-line word and checks a value from JSON
by the same rules.  Types are bool, int, float, str, ``Literal``, ``tuple[X, ...]``, fixed tuples, and any of these
``| None``.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import math
import re
import textwrap
import types
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fewstep.cli.errors import UserError, suggestion

#: Help for names that mean the same everywhere and that docstrings therefore leave out.
COMMON = {
    "lr": "learning rate",
    "critic_lr": "learning rate of the critic",
    "clip": "bound on the gradient norm",
    "warmup": "steps over which the learning rate rises from 0",
    "guidance": "weight of the teacher's classifier-free guidance, 1 for none",
    "steps": "network calls that the student is made for",
    "pairs": "pairs of noise and the teacher's output for it",
    "ode_steps": "steps of the teacher for each pair",
    "reflows": "reflow stages before the distillation",
    "mu0": "decay of the target network at the start",
    "gan_weight": "weight of the adversarial term",
    "discriminator_weight": "weight of the discriminator's loss beside the critic's own",
    "start": "steps of the teacher",
    "end": "steps of the student",
    "sigma_data": "standard deviation of the data",
    "distance": "how predictions are compared",
    "label_dropout": "share of samples without their label",
    "noise_mean": "mean of log(sigma / alpha) at the times that training looks at",
    "noise_std": "standard deviation of log(sigma / alpha) at the times that training looks at",
    "weighting": "weight of the loss over noise levels",
    "width": "size of the conditioning, and of an MLP's layers",
    "blocks": "residual blocks, at each resolution of a U-Net",
    "channels": "channels at each resolution",
    "dropout": "dropout inside the residual blocks",
    "t_min": "least time (nearly data)",
    "t_max": "greatest time (noise)",
    "time_scale": "factor on the time that the network sees",
}

#: Longest help of a flag, in characters.
HELP_LENGTH = 200

KIND_NAMES = {int: "a whole number", float: "a finite number", str: "a word", bool: "true or false"}


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
        return self.name.upper() if self.kind is str else metavar(self.kind)

    def add_to(self, group: argparse._ArgumentGroup) -> None:
        """Adds the flag; a flag that is not given leaves no trace in the namespace."""
        shown = f"(default {as_words(self.default)})"
        text = f"{self.help} {shown}".strip().replace("%", "%%")
        if self.kind is bool:
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
    if kind is str:
        return word
    raise TypeError(f"no flag can set a {kind}")


def check(kind: Any, value: Any) -> Any:
    """``value`` (plain data) as a value of type ``kind``; ValueError saying what would be right."""
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
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)) and kind is not float:
        return value
    raise ValueError(f"'{value}' is not {KIND_NAMES[kind]}")


def union(kind: Any) -> tuple[Any, ...]:
    """The members of ``X | None``, None last; empty for other types."""
    if get_origin(kind) not in (Union, types.UnionType):
        return ()
    return tuple(sorted(get_args(kind), key=lambda member: member is types.NoneType))


def element(kind: Any) -> Any:
    """The type of a tuple's elements."""
    return get_args(kind)[0]


def metavar(kind: Any) -> str:
    """What stands for the value in the help."""
    options = union(kind)
    if options:
        return f"{metavar(options[0])}|none"
    if get_origin(kind) is tuple:
        return ",".join([metavar(element(kind))] * 2) + (",.." if get_args(kind)[-1] is Ellipsis else "")
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    return {int: "N", float: "X", str: "NAME"}[kind]


def as_words(value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, tuple | list):
        return ",".join(map(as_words, value))
    if isinstance(value, float):
        return f"{value:.6g}"
    return "none" if value is None else str(value)


def of_dataclass(cls: type) -> list[Parameter]:
    """The fields of a dataclass, helped by the docstrings of the class and its parents."""
    hints = get_type_hints(cls)
    return [
        Parameter(f.name, hints[f.name], default_of(f), help_for(f.name, docstrings(cls)))
        for f in dataclasses.fields(cls)
        if f.init
    ]


def default_of(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def of_constructor(cls: Callable[..., Any], without: Collection[str]) -> list[Parameter]:
    """The arguments of a constructor, but for those that something else decides."""
    hints = get_type_hints(cls.__init__)
    signature = inspect.signature(cls)
    return [
        Parameter(name, hints[name], argument.default, COMMON.get(name, ""))
        for name, argument in signature.parameters.items()
        if name not in without
    ]


def docstrings(cls: type) -> list[str]:
    """What the authors of a class and of its parents wrote about it, nearest first."""
    written = [(base.__dict__.get("__doc__") or "", base.__name__) for base in cls.__mro__]
    # a dataclass without a docstring is given its signature as one
    return [plain(text) for text, name in written if text and not text.startswith(f"{name}(")]


def plain(text: str) -> str:
    """A docstring on one line, without cross-reference marks."""
    return re.sub(r":\w+:`~?([^`]*)`", r"\1", " ".join(text.split()))


def help_for(name: str, texts: Iterable[str]) -> str:
    """What a docstring says about ``name``: the clause that begins with it; else what the name means everywhere;
    else any clause that mentions it, cut to a readable length."""
    clauses = [clause for text in texts for clause in re.split(r"(?<=[;.])\s+|,\s+(?=``\w+`` )", text)]
    begins = [clause for clause in clauses if re.match(rf"``{name}\b", clause)]
    if not begins and name in COMMON:
        return COMMON[name]
    mentions = begins or [clause for clause in clauses if re.search(rf"``{name}\b", clause)]
    if not mentions:
        return ""
    said = re.sub(rf"^``{name}`` (?!and )(is |are )?", "", mentions[0]).replace("``", "").rstrip(";., ")
    said = said[:1].lower() + said[1:] if re.match(r"[A-Z][a-z]*\s", said) else said
    return textwrap.shorten(said, HELP_LENGTH, placeholder=" ...")


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
