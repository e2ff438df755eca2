"""Flags made from what they set: the fields of a dataclass, or the arguments of a constructor.

A :class:`Parameter` knows its name, type, default and help; it reads a command-line word and checks a value from JSON
by the same rules.  Types are bool, int, float, str, ``Literal``, ``tuple[X, ...]``, fixed tuples, and any of these
``| None``.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fewstep.cli.errors import UserError
from fewstep.values import as_words, check, element, read, suggestion, union

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
