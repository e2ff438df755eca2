"""The methods that train: their flags, and one line about each without importing any."""

from __future__ import annotations

import ast
import importlib.util
import re
import textwrap
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.cli.flags import Parameter, from_json, of_dataclass
from fewstep.methods import RECIPES, recipe_class

if TYPE_CHECKING:
    from fewstep.methods.method import Recipe


def summary(place: str) -> str:
    """The first sentence of the docstring of ``module:class``."""
    module, _, name = place.partition(":")
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return ""
    for node in ast.parse(Path(spec.origin).read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            first = without_marks(ast.get_docstring(node) or "").split(". ")[0]
            return textwrap.shorten(first.rstrip("."), 96, placeholder=" ...")
    return ""


def listing(names: Collection[str] = RECIPES) -> str:
    """The methods of these names with their summaries, for a help text."""
    width = max(map(len, names))
    return "\n".join(f"  {name:<{width}}  {summary(RECIPES[name])}" for name in names)


def parameters(method: str) -> list[Parameter]:
    """The hyper-parameters of a method."""
    return of_dataclass(recipe_class(method))


def build(method: str, given: dict[str, Any]) -> Recipe:
    """The recipe with these hyper-parameters, as :func:`~fewstep.cli.flags.from_json` checks them."""
    return recipe_class(method)(**from_json(parameters(method), given, f"method {method}"))


def without_marks(text: str) -> str:
    """A docstring on one line, without cross-reference marks."""
    return re.sub(r":\w+:`~?([^`]*)`", r"\1", " ".join(text.split())).replace("``", "")


def roles(method: str) -> tuple[str, ...]:
    """The parts that models besides the teacher may play in a method."""
    return recipe_class(method).roles


def about(method: str) -> str:
    """What a method's help starts with: its docstring, its paper and what here differs from it."""
    cls = recipe_class(method)
    paper = cls.paper
    first = (cls.__doc__ or "").split("\n\n")[0]  # the rest explains the fields, whose flags are below
    lines = [textwrap.fill(without_marks(first), 100), ""]
    lines.append(f"{paper.title} (arXiv {paper.arxiv}); evidence: {paper.evidence}")
    lines += [textwrap.fill(f"differs: {text}", 100, subsequent_indent="  ") for text in paper.deviations]
    return "\n".join(lines)
