"""The sections of the documentation that method classes write: between ``<!-- KIND: NAME -->`` and ``<!-- end -->``.

KIND is ``deviations`` (what differs from the paper), ``healthy`` (what a healthy run logs) or ``methods`` (a table of
those that work); NAME is a method's name, for the table "all" generative ones or the "others".
"""

from __future__ import annotations

import re

from fewstep.catalogue import systems
from fewstep.methods import RECIPES, recipe_class

SECTION = re.compile(r"<!-- (\w+): ([\w-]+) -->\n.*?<!-- end -->", re.DOTALL)


def sentence(text: str) -> str:
    """A clause as a sentence."""
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith('.') else '.'}"


def deviations(name: str) -> list[str]:
    """What a method does otherwise than its paper."""
    return [f"* {sentence(text)}" for text in recipe_class(name).paper.deviations] or ["None is known."]


def healthy(name: str) -> list[str]:
    """What the logs of a healthy run look like, of all stages of a recipe."""
    found: dict[str, str] = {}
    for stage in recipe_class(name)().stages():
        found |= stage.method.healthy
    return [f"* `{key}`: {text}." for key, text in found.items()]


def methods(kind: str) -> list[str]:
    """The methods that work, by command: all that make generative models ("all"), or the others."""
    made = {row.cls: row for row in systems() if row.state == "works"}
    generative = kind == "all"
    lines = [f"| method | call it | {'network calls' if generative else 'needs'} |", "|---|---|---|"]
    for name, place in RECIPES.items():
        cls = recipe_class(name)
        if (row := made.get(place)) and (cls.task == "generation") == generative:
            others = [o for o in RECIPES if RECIPES[o] not in made and recipe_class(o).paper.arxiv == cls.paper.arxiv]
            called = ", ".join(f"`{word}`" for word in (name, *others))
            lines.append(f"| {row.name}: {row.about} | {called} | {row.calls if generative else row.needs} |")
    return lines


KINDS = {"deviations": deviations, "healthy": healthy, "methods": methods}


def fill(text: str) -> str:
    """A page with its sections as the classes have them now; KeyError for a section of no kind."""

    def written(found: re.Match[str]) -> str:
        kind, name = found[1], found[2]
        return "\n".join([f"<!-- {kind}: {name} -->", *KINDS[kind](name), "<!-- end -->"])

    return SECTION.sub(written, text)
