"""Docstrings as the reference shows them: the marks of reStructuredText become Markdown, ``#:`` comments count."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`([^`]+)`")
LITERAL = re.compile(r"``(.+?)``", re.DOTALL)
DOCTEST = re.compile(r"(?:^ *>>> .*\n?(?:^ *(?:\.\.\.|>>>).*\n?)*)+", re.MULTILINE)
#: A paragraph that ends in ``::``, and the indented lines that follow.
BLOCK = re.compile(r"::\n\n((?:(?: {2,}.*)?\n)*(?: {2,}.*))")


def fenced(text: str, language: str) -> str:
    """A code block."""
    return f"\n\n```{language}\n{text}\n```\n\n"


def block(found: re.Match[str]) -> str:
    """An indented block of code or of equations, as it is."""
    lines = found[1].split("\n")
    indent = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    text = "\n".join(line[indent:] for line in lines)
    return ":" + fenced(text.strip("\n"), "text")


def doctest(found: re.Match[str]) -> str:
    """An example without its prompts."""
    return fenced(re.sub(r"^ *(?:>>>|\.\.\.) ?", "", found[0].rstrip(), flags=re.MULTILINE), "python")


def canonical(name: str, scope: griffe.Object) -> str | None:
    """The full name behind a name that a docstring uses, where the package has it."""
    try:
        full = name if name.startswith("fewstep.") else scope.resolve(name)
        return str(scope.modules_collection[full].canonical_path)
    except (griffe.GriffeError, KeyError):
        return None


def link(found: re.Match[str], scope: griffe.Object) -> str:
    """A role as a link to what it names, or as code where that has no entry."""
    name = found[1]
    short = name.startswith("~")
    name = name.lstrip("~.")
    shown = f"`{name.rsplit('.', 1)[-1] if short else name}`"
    full = canonical(name, scope)
    return f'<autoref optional identifier="{full}">{shown}</autoref>' if full else shown


def markdown(text: str, scope: griffe.Object) -> str:
    """A docstring in Markdown."""
    parts = re.split(r"(```.*?```)", BLOCK.sub(block, DOCTEST.sub(doctest, text)), flags=re.DOTALL)
    for i in range(0, len(parts), 2):  # the odd ones are code
        prose = LITERAL.sub(lambda found: "`" + " ".join(found[1].split()) + "`", parts[i])
        parts[i] = ROLE.sub(lambda found: link(found, scope), prose)
    return "".join(parts)


def source(thing: griffe.Object) -> list[str]:
    """The lines of the file that an object is in."""
    assert isinstance(thing.filepath, Path)
    return thing.lines_collection[thing.filepath]


def comment_above(lines: list[str], number: int) -> str:
    """The ``#:`` comment that ends above a line."""
    found: list[str] = []
    while number >= 2 and lines[number - 2].lstrip().startswith("#:"):
        found.insert(0, lines[number - 2].lstrip()[2:].strip())
        number -= 1
    return "\n".join(found)


class Docstrings(griffe.Extension):
    """Rewrites every docstring of the package, once all of it is known."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        self.rewrite(pkg)

    def rewrite(self, scope: griffe.Object) -> None:
        """The docstring of an object, then those of its members."""
        if isinstance(scope, griffe.Attribute) and scope.docstring is None and scope.lineno:
            comment = comment_above(source(scope), scope.lineno)
            scope.docstring = griffe.Docstring(comment, parent=scope) if comment else None
        if scope.docstring is not None:
            scope.docstring.value = markdown(scope.docstring.value, scope)
        for member in scope.members.values():
            if isinstance(member, griffe.Object):
                self.rewrite(member)
