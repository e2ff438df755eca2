"""The command lines in docs/cli.md mean what they say."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fewstep.cli import COMMANDS, parsed

PAGE = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
LINES = [line for block in re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]


@pytest.mark.parametrize("line", LINES)
def test_every_line_parses(line: str) -> None:
    """No flag of the page is unknown or has a value of the wrong type."""
    program, *words = shlex.split(line)
    assert program == "fewstep"
    parsed(words)


def test_every_command_is_there() -> None:
    """The table has a row for every command."""
    assert re.findall(r"^\| `([\w-]+)` \|", PAGE, re.MULTILINE) == list(COMMANDS)
