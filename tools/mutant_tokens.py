"""Every mutant of a file that changes one token: a sign, an arithmetic or comparison operator, a number, ``min`` or
``max``, ``True`` or ``False``; but for text, annotations, decorators, messages of errors and the sheets of papers."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass

OPERATORS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.Pow: "**", ast.FloorDiv: "//"}
SWAPS = {"+": "-", "-": "+", "*": "/", "/": "*", "**": "*", "//": "/"}
COMPARISONS: dict[type[ast.cmpop], tuple[str, tuple[str, ...]]] = {
    ast.Lt: ("<", ("<=", ">")), ast.LtE: ("<=", ("<", ">=")), ast.Gt: (">", (">=", "<")), ast.GtE: (">=", (">", "<=")),
    ast.Eq: ("==", ("!=",)), ast.NotEq: ("!=", ("==",)),
}  # fmt: skip
EXTREMES = {"min": "max", "minimum": "maximum", "amin": "amax", "clamp_min": "clamp_max", "argmin": "argmax"}
EXTREMES |= {other: name for name, other in EXTREMES.items()}
WORDS_ONLY = {"Paper", "System", "warn", "print", "progress"}  # calls that only say something
NO_CHANGE = {"strict", "foreach", "fused", "persistent", "inplace", "non_blocking"}  # arguments that change no number


@dataclass(frozen=True)
class Mutant:
    """One token of one line; ``function`` is the dotted name of what it stands in, empty at the top of a module."""

    file: str
    line: int
    column: int
    before: str
    after: str
    function: str

    def of(self, source: str) -> str:
        """The source with the token replaced."""
        lines = source.splitlines(keepends=True)
        text = lines[self.line - 1]
        lines[self.line - 1] = text[: self.column] + self.after + text[self.column + len(self.before) :]
        return "".join(lines)


def mutants_of(file: str, source: str) -> list[Mutant]:
    """All mutants of a file."""
    tokens = _Tokens(file, source)
    tokens.visit(ast.parse(source))
    return tokens.found


def another(value: bool | int | float) -> str:
    """The other truth value, the next integer, twice the number."""
    if isinstance(value, bool | int):
        return repr(not value if isinstance(value, bool) else value + 1)
    return repr(2 * value or 1.0)


class _Tokens(ast.NodeVisitor):
    def __init__(self, file: str, source: str) -> None:
        self.file, self.lines, self.path, self.found = file, source.splitlines(), [""], list[Mutant]()

    def add(self, line: int, column: int, before: str, afters: Iterable[str]) -> None:
        self.found += [Mutant(self.file, line, column, before, after, self.path[-1]) for after in afters]

    def column(self, line: int, offset: int) -> int:
        return len(self.lines[line - 1].encode()[:offset].decode())  # the syntax tree counts bytes

    def between(self, left: ast.expr, right: ast.expr, before: str, afters: Iterable[str]) -> None:
        """An operator: the first after its left side, there or on a line below."""
        line = left.end_lineno or 0
        column = self.column(line, left.end_col_offset or 0)
        while line <= right.lineno:
            if (at := self.lines[line - 1].split("  #")[0].find(before, column)) >= 0:
                return self.add(line, at, before, afters)
            line, column = line + 1, 0

    def within(self, name: str, parts: list[ast.AST]) -> None:
        self.path.append(f"{self.path[-1]}.{name}".lstrip("."))
        for part in parts:
            self.visit(part)
        self.path.pop()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.within(node.name, [*node.body])

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        defaults = [value for value in node.args.kw_defaults if value]
        self.within(node.name, [*node.args.defaults, *defaults, *node.body])

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value:
            self.visit(node.value)

    def visit_Raise(self, node: ast.Raise) -> None:
        pass

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        pass

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in WORDS_ONLY:
            return
        if name in EXTREMES:
            line = node.func.end_lineno or 0
            end = self.column(line, node.func.end_col_offset or 0)
            self.add(line, end - len(name), name, [EXTREMES[name]])
        self.visit(node.func)
        for value in [*node.args, *(word.value for word in node.keywords if word.arg not in NO_CHANGE)]:
            self.visit(value)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if before := OPERATORS.get(type(node.op)):
            self.between(node.left, node.right, before, [SWAPS[before]])
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if before := OPERATORS.get(type(node.op)):
            self.between(node.target, node.value, before, [SWAPS[before]])
        self.visit(node.value)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.USub):
            self.add(node.lineno, self.column(node.lineno, node.col_offset), "-", ["+"])
        self.visit(node.operand)

    def visit_Compare(self, node: ast.Compare) -> None:
        for left, op, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
            if type(op) in COMPARISONS:
                self.between(left, right, *COMPARISONS[type(op)])
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool | int | float):
            start, end = (self.column(node.lineno, at) for at in (node.col_offset, node.end_col_offset or 0))
            self.add(node.lineno, start, self.lines[node.lineno - 1][start:end], [another(node.value)])
