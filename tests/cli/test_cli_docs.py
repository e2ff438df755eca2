"""The command lines in docs/cli.md and the README mean what they say."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fewstep import doctor
from fewstep.cli import COMMANDS, parsed

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "cli.md").read_text()
LINES = [line for block in re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
#: In the README a comment follows a command, two spaces on.
README = re.findall(r"^(fewstep .*?)(?: {2}.*)?$", (ROOT / "README.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("line", [*LINES, *README])
def test_every_line_parses(line: str) -> None:
    """No flag of the page is unknown or has a value of the wrong type."""
    program, *words = shlex.split(line)
    assert program == "fewstep"
    parsed(words)


@pytest.mark.parametrize("line", [line for line in README if "--dry-run" in line])
def test_a_plan_of_the_readme_is_made(line: str, cli: Callable[..., Any]) -> None:
    """It lacks nothing."""
    assert "memory" in cli(*shlex.split(line)[1:]).out


def test_every_command_is_there() -> None:
    """The table has a row for every command."""
    assert re.findall(r"^\| `([\w-]+)` \|", PAGE, re.MULTILINE) == list(COMMANDS)


def test_packages_are_called_what_they_are() -> None:
    """The doctor's core is what an installation brings, the rest optional, and an extra that a message names exists."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    core = {re.split(r"[><=]", need)[0] for need in project["dependencies"]}
    assert core == {"torch", *doctor.CORE}
    assert not {name.lower() for name in doctor.OPTIONAL} & core
    for file in sorted((ROOT / "src").rglob("*.py")):
        for extra in re.findall(r"fewstep\[(\w+)\]", file.read_text()):
            assert extra in project["optional-dependencies"], f"{file}: fewstep[{extra}]"
