"""The direction of imports: every part of the package imports from the parts below it only.

    python tools/check_imports.py [FOLDER]

Prints ``file:line: message`` and exits with 1 for every import that points the wrong way.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

IDEAS = {
    "files", "digests", "schemas", "conditions", "schedules", "discrete_vp", "grids", "predictions", "denoisers",
    "guidance", "extras", "flow_maps", "constant_acceleration", "routing", "generators", "tangents", "randomness",
    "ranges", "values", "exact", "rewards", "classifiers", "divergences", "language_models",
}  # fmt: skip
BELOW_METHODS = IDEAS | {"sampling", "networks", "data", "discrete"}
TOP = {"cli", "api", "demo", "doctor", "catalogue", "__init__"}
#: Where methods live whose models are no generative ones.
OTHER_TASKS = {"condense", "students", "language"}
BELOW_TRAINING = BELOW_METHODS | OTHER_TASKS | {"methods", "models", "hub"}

#: part -> what it may import.  The top may import everything.
ALLOWED: dict[str, set[str]] = {
    **dict.fromkeys(IDEAS, IDEAS),
    "sampling": IDEAS,
    "networks": IDEAS - {"tangents"},
    "tangents": IDEAS | {"networks"},  # attention with its rules
    "data": IDEAS,
    "discrete": IDEAS | {"sampling", "networks", "data"},
    "metrics": IDEAS | {"sampling", "networks", "data", "discrete"},
    "methods": BELOW_METHODS | {"models"},
    **dict.fromkeys(("condense", "students", "language"), BELOW_METHODS | {"models", "methods"} | OTHER_TASKS),
    "evaluation": BELOW_TRAINING | {"training", "metrics", "runs"},
    "models": IDEAS | {"sampling", "networks", "discrete", "data"},
    "hub": IDEAS | {"sampling", "networks", "discrete", "models"},
    "training": BELOW_TRAINING,
    "runs": BELOW_TRAINING | {"training"},
    "report": BELOW_TRAINING | {"metrics", "evaluation", "training", "runs"},
}


def part_of(path: Path, root: Path) -> str:
    """The part of the package that a file belongs to."""
    return path.relative_to(root).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import, those inside functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            below = [f"{node.module}.{alias.name}" for alias in node.names]
            names = below if node.module == "fewstep" else [node.module]
            yield from ((node.lineno, name) for name in names)


def violations(root: Path) -> Iterator[str]:
    """One line for every import that points the wrong way."""
    for path in sorted(root.rglob("*.py")):
        part = part_of(path, root)
        if part in TOP:
            continue
        for line, name in imported(ast.parse(path.read_text())):
            head, _, rest = name.partition(".")
            target = rest.split(".")[0]
            if head == "fewstep" and rest and target != part and target not in ALLOWED.get(part, set()):
                yield f"{path}:{line}: {part} must not import {name}"


def main() -> int:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent / "src" / "fewstep"
    found = list(violations(root))
    print("\n".join(found) or "imports point one way")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
