"""Further inputs of a student: ``--extra w=3``, and ``--guidance`` where one is declared to be the guidance weight."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fewstep.cli.errors import UserError

if TYPE_CHECKING:
    from fewstep.models import Model


def add_extra(parser: argparse.ArgumentParser, whose: str) -> None:
    """The flag; ``whose`` says which model's inputs it sets."""
    parser.add_argument(
        "--extra", metavar="NAME=X", action="append", default=[],
        help=f"an input of {whose}, such as w=3; may be given again",
    )  # fmt: skip


def read_extras(words: list[str]) -> dict[str, float]:
    """The inputs by name; :class:`UserError` for a word that sets none, and for one that is set twice."""
    found: dict[str, float] = {}
    for word in words:
        name, sign, value = word.partition("=")
        try:
            number = float(value)
        except ValueError:
            sign = ""
        if not sign or not name:
            raise UserError(f"--extra {word}: give the name of an input and a number, such as w=3")
        if name in found:
            raise UserError(f"--extra {word}: {name} is given twice")
        found[name] = number
    return found


def extras_of(kind: Model, name: str, words: list[str]) -> dict[str, float]:
    """What ``--extra`` sets for the model ``name``; :class:`UserError` for an input that it does not take, or out of
    its range."""
    from fewstep.extras import check_given

    given = read_extras(words)
    if given and not kind.inputs:
        raise UserError(f"--extra {words[0]}: '{name}' is {kind.called}, which takes no further inputs")
    try:
        check_given(kind.inputs, given)
    except ValueError as error:
        raise UserError(f"--extra {error}") from None
    return given


def with_guidance(kind: Model, given: Mapping[str, float], scale: float | None) -> dict[str, float]:
    """The inputs with ``--guidance`` among them, for a model that has an input declared to be the guidance weight."""
    from fewstep.extras import check_given, guidance_weight

    name = guidance_weight(kind.inputs)
    if scale is None or name is None:
        return dict(given)
    if name in given:
        raise UserError(f"--guidance {scale:g} and --extra {name}={given[name]:g} set the same input: leave out one")
    both = {**given, name: kind.inputs[name].at_scale(scale)}
    try:
        check_given(kind.inputs, both)
    except ValueError as error:
        raise UserError(f"--guidance {scale:g}: {error}") from None
    return both


def in_words(given: Mapping[str, float]) -> str:
    """Inputs as they are shown behind something else; empty when there are none."""
    return "".join(f", {name}={value:g}" for name, value in given.items())
