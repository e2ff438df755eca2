"""A method inside another one: what it trains stays its own, the one around it changes what it is trained on.

A host is written as its name and, behind a colon, those of its hyper-parameters that are not at their defaults::

    --host dmd2
    --host dmd2:gan_weight=0,critic_steps=2
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from fewstep.methods import RECIPES, recipe_class
from fewstep.methods.method import Method, Networks
from fewstep.values import Written, check_fields, declared, read, suggestion


@dataclass(frozen=True)
class Host(Written):
    """A method of one stage, by name or as it is."""

    shown = "METHOD[:FIELD=VALUE,..]"

    method: Method

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def parse(cls, text: str) -> Host:
        name, _, rest = text.partition(":")
        if name not in RECIPES:
            raise ValueError(f"'{name}' is no method{suggestion(name, RECIPES)}")
        kinds, fields = declared(recipe_class(name)), {}
        for part in re.split(r",(?=[\w-]+=)", rest) if rest else ():
            word, _, value = part.partition("=")
            field = word.strip().replace("-", "_")
            if field not in kinds or not value:
                what = f"has no '{word}'{suggestion(field, kinds)}" if field not in kinds else f"'{word}' has no value"
                raise ValueError(f"{name} {what}")
            try:
                fields[field] = read(kinds[field], value)
            except ValueError as error:
                raise ValueError(f"{name}: {field}: {error}") from None
        return cls.from_plain(recipe_class(name)(**fields))

    @classmethod
    def from_plain(cls, value: Any) -> Host:
        """A host by its word or as a method."""
        return cls.parse(value) if isinstance(value, str) else cls(value)

    def __str__(self) -> str:
        made = self.method
        values = ((f.name, getattr(made, f.name), f.default) for f in dataclasses.fields(made))
        words = [f"{name}={as_word(value)}" for name, value, default in values if value != default]
        return f"{made.name}:{','.join(words)}" if words else made.name


def as_word(value: Any) -> str:
    """What :func:`fewstep.values.read` reads as this value, with all its digits."""
    if isinstance(value, tuple):
        return ",".join(map(as_word, value))
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value)


def check_critic(host: Method, nets: Networks) -> None:
    """ValueError unless a method keeps a critic of its own beside its student."""
    if "critic" not in nets.groups or "student" not in nets.groups:
        raise ValueError(f"host {host.name}: it trains {', '.join(nets.groups)}, not a student beside a critic")
