"""Check this installation: versions, what breaks imports, devices, precision, bundled files.

Ends in exit code 1 when something is bad.
"""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Sequence


def add_arguments(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    parser.usage = "fewstep doctor"


def run(chosen: argparse.Namespace) -> int:
    from fewstep.doctor import examine

    bad = False
    width = max(60, shutil.get_terminal_size().columns)
    for finding in examine():
        bad |= finding.state == "bad"
        start = f"{finding.state:<6}{finding.what:<39}"
        print(textwrap.fill(start + finding.text, width, subsequent_indent=" " * len(start)), flush=True)
    return 1 if bad else 0
