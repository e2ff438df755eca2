"""The tool that asks whether tests can fail: which tokens it changes, and which it leaves alone."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

TOOL = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "mutant_tokens.py"))

SOURCE = '''"""A docstring of 1 - 2."""

__all__ = ["f"]
Angle = Annotated[float, "from -1 to 1"]


@dataclass(frozen=True)
class A:
    n: Annotated[int, Least(0)] = 3

    def f(self, x: float = -0.5) -> bool:
        if x <= 0:
            raise ValueError(f"x={x + 1} is below {0}")
        é = (x + 1) ** 2  # a + comment
        return min(é, x) > zip(x, é, strict=True)
'''


def test_the_tokens_of_a_file() -> None:
    """Signs, operators, comparisons, numbers and extremes, at their places even behind letters of two bytes; no text,
    no annotation, no decorator, no message, and no argument that changes no number."""
    found = [(m.line, m.before, m.after, m.function) for m in TOOL["mutants_of"]("a.py", SOURCE)]
    assert found == [
        (9, "3", "4", "A"),
        (11, "-", "+", "A.f"), (11, "0.5", "1.0", "A.f"),
        (12, "<=", "<", "A.f"), (12, "<=", ">=", "A.f"), (12, "0", "1", "A.f"),
        (14, "**", "*", "A.f"), (14, "+", "-", "A.f"), (14, "1", "2", "A.f"), (14, "2", "3", "A.f"),
        (15, ">", ">=", "A.f"), (15, ">", "<", "A.f"), (15, "min", "max", "A.f"),
    ]  # fmt: skip


def test_a_mutant_changes_its_token_only() -> None:
    """Every mutant differs from the source in one line, from the token on, and can still be read."""
    for mutant in TOOL["mutants_of"]("a.py", SOURCE):
        lines, changed = SOURCE.splitlines(), mutant.of(SOURCE).splitlines()
        assert [i + 1 for i, pair in enumerate(zip(lines, changed, strict=True)) if pair[0] != pair[1]] == [mutant.line]
        line, new = lines[mutant.line - 1], changed[mutant.line - 1]
        end = mutant.column + len(mutant.before)
        assert line[mutant.column : end] == mutant.before
        assert new == line[: mutant.column] + mutant.after + line[end:]
        compile(mutant.of(SOURCE), "a.py", "exec")


@pytest.mark.parametrize(("value", "other"), [(True, "False"), (2, "3"), (0, "1"), (0.5, "1.0"), (0.0, "1.0")])
def test_another_value(value: bool | int | float, other: str) -> None:
    """No constant is its own mutant."""
    assert TOOL["another"](value) == other
