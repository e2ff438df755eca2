"""A method inside another one: what it trains stays its own, the one around it changes what it is trained on.

A host is written as its name and, behind a colon, those of its hyper-parameters that are not at their defaults::

    --host dmd2
    --host dmd2:gan_weight=0,critic_steps=2
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fewstep.methods import RECIPES, recipe_class
from fewstep.methods.method import Method, Networks
from fewstep.values import Written, check_fields, read_fields, suggestion, written_fields


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
        fields = read_fields(name, recipe_class(name), rest)
        return cls.from_plain(recipe_class(name)(**fields))

    @classmethod
    def from_plain(cls, value: Any) -> Host:
        """A host by its word or as a method."""
        return cls.parse(value) if isinstance(value, str) else cls(value)

    def __str__(self) -> str:
        words = written_fields(self.method)
        return f"{self.method.name}:{words}" if words else self.method.name


def check_critic(host: Method, nets: Networks) -> None:
    """ValueError unless a method keeps a critic of its own beside its student."""
    if "critic" not in nets.groups or "student" not in nets.groups:
        raise ValueError(f"host {host.name}: it trains {', '.join(nets.groups)}, not a student beside a critic")
