"""Write what is generated of the documentation: the catalogue, the sections that method classes write, and the
reference with a page a room.

python tools/make_docs.py
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import griffe
from docstrings import source
from page_sections import fill

from fewstep.catalogue import markdown

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"

#: Parts of the package that the reference leaves out: the command line and what only serves the rest.
BACKSTAGE = {"api", "catalogue", "cli", "demo", "doctor", "files", "report", "schemas", "tangents", "values"}
#: What comes first, in this order; the rest follows by name.
ORDER = ["schedules", "denoisers", "flow_maps", "exact", "grids", "sampling", "discrete", "methods", "training"]


def entry(path: str, level: int, members: list[str] | bool = True) -> str:
    """What mkdocstrings turns into the description of a module."""
    chosen = str(members).lower() if isinstance(members, bool) else "[" + ", ".join(members) + "]"
    return f"::: {path}\n    options:\n      heading_level: {level}\n      members: {chosen}\n"


def defined(module: griffe.Module) -> list[str]:
    """Public names with a description that a module defines itself."""
    lines = source(module)
    return [
        name
        for name, member in module.members.items()
        if isinstance(member, griffe.Class | griffe.Function | griffe.Attribute)
        and not name.startswith("_")
        and (member.docstring or lines[(member.lineno or 2) - 2].lstrip().startswith("#:"))
    ]


def modules(module: griffe.Module) -> Iterator[griffe.Module]:
    """The public modules inside a package, by name."""
    for name, member in sorted(module.members.items()):
        if isinstance(member, griffe.Module) and not name.startswith("_"):
            yield member
            yield from modules(member)


def offered(module: griffe.Module) -> list[tuple[str, str]]:
    """The names that a package offers, each with the full name under which it is described."""
    package = import_module(module.path)
    found = []
    for name in getattr(package, "__all__", ()):
        thing, member = getattr(package, name), module.members.get(name)
        if isinstance(member, griffe.Alias):
            with suppress(griffe.AliasResolutionError):  # one of several names that one line gives a value
                found.append((name, member.canonical_path))
        elif hasattr(thing, "__qualname__"):
            found.append((name, f"{thing.__module__}.{thing.__qualname__}"))
    return found


def page(module: griffe.Module, inner: list[griffe.Module]) -> str:
    """The page of a room."""
    if not module.is_init_module:
        return entry(module.path, 1, defined(module))
    parts = [entry(module.path, 1, defined(module) or False)]
    if names := offered(module):
        links = ", ".join(f"[`{name}`][{path}]" for name, path in sorted(names, key=lambda pair: pair[0].lower()))
        parts.append(f"`from {module.path} import` ... {links}.\n")
    parts += [entry(m.path, 2, own) for m in inner if (own := defined(m))]
    return "\n".join(parts)


def main() -> None:
    (DOCS / "catalogue.md").write_text(markdown())
    for path in [ROOT / "README.md", *DOCS.glob("systems/*.md")]:
        path.write_text(fill(path.read_text()))
    folder = DOCS / "reference"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    package = griffe.load("fewstep", search_paths=[ROOT / "src"])
    assert isinstance(package, griffe.Module)
    rooms = {m.name: m for m in package.modules.values() if m.name not in BACKSTAGE and not m.name.startswith("_")}
    names = sorted(rooms, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
    (folder / "fewstep.md").write_text(page(package, [package.modules["api"]]))
    for name in names:
        (folder / f"{name}.md").write_text(page(rooms[name], list(modules(rooms[name]))))
    (folder / ".order").write_text("\n".join(["fewstep", *names]) + "\n")


if __name__ == "__main__":
    main()
