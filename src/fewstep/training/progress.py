"""What a run tells: a line of JSON every so often for programs, a progress bar with time left for people."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Records:
    """``log.jsonl``: one object per logged step, in order; a resumed run drops the lines it will write again."""

    def __init__(self, path: Path, step: int) -> None:
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    record = json.loads(line)
                except ValueError:
                    continue  # a line cut short by a kill
                if record.get("step", 0) <= step:
                    kept.append(line)
        path.write_text("".join(line + "\n" for line in kept))
        self._file = path.open("a")

    def write(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(dict(record)) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class Bar:
    """A progress bar on a terminal; a line every ``every`` seconds elsewhere.  Silent when ``show`` is false."""

    def __init__(self, title: str, show: bool = True, every: float = 15.0) -> None:
        self._title, self._show, self._every = title, show, every
        self._start = self._told = time.monotonic()
        self._first: float | None = None
        self._bar: Any = None
        if show and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
                TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )  # fmt: skip
            self._task = self._bar.add_task(title, total=1.0, note="")
            self._bar.start()

    def update(self, fraction: float, note: str = "") -> None:
        """``fraction`` of the work is done; ``note`` is a short remark such as the loss."""
        if self._first is None:
            self._first = fraction
        if self._bar is not None:
            self._bar.update(self._task, completed=fraction, note=note)
        elif self._show and time.monotonic() - self._told >= self._every:
            self._told = time.monotonic()
            done = max(fraction - self._first, 1e-9)
            left = (self._told - self._start) * (1 - fraction) / done
            print(f"{self._title}: {100 * fraction:3.0f}%  {left:.0f} s left  {note}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
