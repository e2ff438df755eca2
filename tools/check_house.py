"""The house rules that can be counted: short files, few questions after classes of our own, no circle of imports.

    python tools/check_house.py [FOLDER]

Prints one line for every rule that is broken and exits with 1.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

#: The most lines of a file, and the most ``isinstance`` checks against classes that the package defines.
LINES, CHECKS = 400, 29

Trees = Mapping[Path, ast.Module]


def long_files(root: Path) -> Iterator[str]:
    """One line for every file that is too long."""
    for path in sorted(root.rglob("*.py")):
        length = len(path.read_text().splitlines())
        if length > LINES:
            yield f"{path}: {length} lines, at most {LINES}: split it along a seam"


def own_checks(trees: Trees) -> list[str]:
    """Where ``isinstance`` asks for a class of the package."""
    own = {node.name for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    found = []
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
                asked = {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)} & own
                if asked:
                    found.append(f"{path}:{node.lineno}: {', '.join(sorted(asked))}")
    return found


def import_graph(trees: Trees, root: Path) -> dict[str, set[str]]:
    """Which modules every module imports, inside functions too, but not for type checkers only."""
    named = {name_of(path, root): tree for path, tree in trees.items()}
    graph: dict[str, set[str]] = {}
    for name, tree in named.items():
        blocks = (node for node in ast.walk(tree) if isinstance(node, ast.If))
        typing = (block for block in blocks if "TYPE_CHECKING" in ast.dump(block.test))
        left_out = {inner for block in typing for inner in ast.walk(block)}
        found: set[str] = set()
        for node in ast.walk(tree):
            if node in left_out:
                continue
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                below = {f"{node.module}.{alias.name}": node.module for alias in node.names}
                found |= {inner if inner in named else module for inner, module in below.items()}
        graph[name] = found & named.keys()
    return graph


def name_of(path: Path, root: Path) -> str:
    """The dotted name of a module."""
    return ".".join(path.relative_to(root.parent).with_suffix("").parts).removesuffix(".__init__")


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Modules of which each imports the next, the first again at the end; empty where there is no circle."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        # the error has them the other way round
        return list(reversed(error.args[1]))
    return []


def broken(root: Path) -> Iterator[str]:
    """One line for every rule that is broken."""
    trees = {path: ast.parse(path.read_text()) for path in sorted(root.rglob("*.py"))}
    yield from long_files(root)
    checks = own_checks(trees)
    if len(checks) > CHECKS:
        yield from checks
        yield f"{len(checks)} isinstance checks against our own classes, at most {CHECKS}: let the object say it"
    if found := circle(import_graph(trees, root)):
        yield f"a circle of imports: {' -> '.join(found)}"


def main() -> int:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent / "src" / "fewstep"
    found = list(broken(root))
    print("\n".join(found) or "the house rules that can be counted are kept")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
