"""The pages of the systems name what there is: code in tables of what it does, tests in tables of what is verified."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "systems").glob("*.md"))
#: ``package.module.name`` at the beginning of a piece of code, and the files and functions of tests.
CODE = re.compile(r"`((?!test_)[a-z_]\w*(?:\.\w+)+)")
TESTS = re.compile(r"`(test_\w+)`")
FILES = re.compile(r"`(?:tests/[a-z]+/)?(test_\w+\.py)")


def found(name: str) -> Any:
    """What a dotted name inside the package stands for; ImportError or AttributeError when nothing does."""
    *package, last = name.split(".")
    try:
        return getattr(import_module(".".join(["fewstep", *package])), last)
    except AttributeError:
        return import_module(f"fewstep.{name}")


def unknown(page: str, functions: set[str], files: set[str]) -> list[str]:
    """The names on a page that stand for nothing."""
    missing = [name for name in TESTS.findall(page) if name not in functions]
    missing += [name for name in FILES.findall(page) if name not in files]
    first = [line.split("|")[1] for line in page.splitlines() if line.startswith("|")]
    for name in CODE.findall("\n".join(first)):
        try:
            found(name)
        except (ImportError, AttributeError):
            missing.append(name)
    return missing


@pytest.fixture(scope="module")
def tests() -> tuple[set[str], set[str]]:
    """The names of all test functions and of all files of tests."""
    paths = list((ROOT / "tests").rglob("test_*.py"))
    written = "\n".join(path.read_text() for path in paths)
    return set(re.findall(r"^def (test_\w+)", written, re.MULTILINE)), {path.name for path in paths}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_names_what_there_is(page: Path, tests: tuple[set[str], set[str]]) -> None:
    assert unknown(page.read_text(), *tests) == []


def test_the_check_can_fail(tests: tuple[set[str], set[str]]) -> None:
    page = "| `methods.matching.dmd2.DMD3` | x |\n| `test_nothing` | in `tests/exact/test_no.py` |\n| `dmd.page` | |"
    assert unknown(page, *tests) == ["test_nothing", "test_no.py", "methods.matching.dmd2.DMD3", "dmd.page"]
