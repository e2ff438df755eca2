"""One self-contained source file out of our own modules, for exported folders.

The definition of a class is followed through the package it lives in: every function, class and constant that it names,
and theirs in turn, are copied out as they are written; imports of other packages are kept, imports of our own become
unnecessary.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from types import ModuleType


def standalone(cls: type) -> str:
    """The source of ``cls`` and of all it uses, importing nothing of the package it was written in.

    Raises ValueError for a construction that cannot be carried over: ``import package.module`` of the own package,
    a renamed import, or two different things of the same name.
    """
    package = cls.__module__.partition(".")[0]
    chosen: dict[str, tuple[ModuleType, ast.stmt]] = {}
    imports: set[str] = set()
    wanted = [(importlib.import_module(cls.__module__), cls.__name__)]
    order: list[str] = []
    while wanted:
        module, name = wanted.pop()
        definitions, foreign, own = _top_level(module, package)
        if name in own:
            source = importlib.import_module(own[name])
            if not any(name in names for names in _top_level(source, package)):
                raise ValueError(f"{module.__name__}: '{name}' is a module; import what is used of it by name")
            wanted.append((source, name))
        elif name in foreign:
            imports.add(foreign[name])
        elif name in definitions:
            node = definitions[name]
            if name in chosen:
                if chosen[name][1] is not node and ast.dump(chosen[name][1]) != ast.dump(node):
                    raise ValueError(f"two different definitions of '{name}' are used by {cls.__name__}")
                continue
            chosen[name] = (module, node)
            order.append(name)
            used = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
            wanted.extend((module, inner) for inner in sorted(used) if inner != name)
    # base classes and constants must come before what uses them at import time; calls at run time do not care
    written = _sorted(order, {name: chosen[name][1] for name in order})
    texts = [ast.get_source_segment(inspect.getsource(chosen[name][0]), _whole(chosen[name][1])) for name in written]
    header = "from __future__ import annotations\n\n" + "\n".join(sorted(imports))
    return header + "\n\n\n" + "\n\n\n".join(text for text in texts if text) + "\n"


def _whole(node: ast.stmt) -> ast.stmt:
    """``node`` with its decorators inside its extent."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.decorator_list:
        node.lineno = node.decorator_list[0].lineno
        node.col_offset = 0
    return node


def _top_level(module: ModuleType, package: str) -> tuple[dict[str, ast.stmt], dict[str, str], dict[str, str]]:
    """What a module defines (name to statement), what it imports from elsewhere (name to import line) and what it
    imports from its own package (name to module)."""
    definitions: dict[str, ast.stmt] = {}
    foreign: dict[str, str] = {}
    own: dict[str, str] = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            definitions[node.name] = node
        elif isinstance(node, ast.Assign):
            definitions.update({target.id: node for target in node.targets if isinstance(target, ast.Name)})
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            definitions[node.target.id] = node
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == package:
                    raise ValueError(f"{module.__name__}: 'import {alias.name}' cannot be inlined; import by name")
                shown = alias.name if alias.asname is None else f"{alias.name} as {alias.asname}"
                foreign[alias.asname or alias.name.partition(".")[0]] = f"import {shown}"
        elif isinstance(node, ast.ImportFrom) and node.module and node.module != "__future__":
            for alias in node.names:
                name = alias.asname or alias.name
                if node.module.partition(".")[0] != package:
                    shown = alias.name if alias.asname is None else f"{alias.name} as {alias.asname}"
                    foreign[name] = f"from {node.module} import {shown}"
                elif alias.asname:
                    raise ValueError(f"{module.__name__}: '{alias.name} as {name}' cannot be inlined; import by name")
                else:
                    own[name] = node.module
    return definitions, foreign, own


def _sorted(names: list[str], nodes: dict[str, ast.stmt]) -> list[str]:
    """``names`` so that everything comes after what it names (cycles, which only run-time calls make, are cut)."""
    done: list[str] = []

    def visit(name: str, above: tuple[str, ...]) -> None:
        if name in done or name in above:
            return
        for inner in ast.walk(nodes[name]):
            if isinstance(inner, ast.Name) and inner.id in nodes:
                visit(inner.id, (*above, name))
        done.append(name)

    for name in names:
        visit(name, ())
    return done
