"""What a run tells: a line of JSON every so often for programs, a progress bar with time left for people, and
TensorBoard events on request."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from fewstep.files import write_atomically
from fewstep.schemas import Count, read_records

#: A line of ``log.jsonl``, whatever else it tells.
LOGGED = {"step": Count, "images": Count, "seconds": float, ...: Any}


class Records:
    """``log.jsonl``: one object per logged step, in order; a resumed run drops the lines it will write again.

    ``lines`` holds all of them, also those before a resume; without a ``path`` they are kept in memory only.
    """

    def __init__(self, path: Path | None, step: int) -> None:
        self.lines: list[dict[str, Any]] = []
        self._file: TextIO | None = None
        if path is None:
            return
        self.lines = [record for record in read_records(path, LOGGED) if record["step"] <= step]
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in self.lines).encode())
        self._file = path.open("a")

    def write(self, record: Mapping[str, Any]) -> None:
        self.lines.append(dict(record))
        if self._file is not None:
            self._file.write(json.dumps(self.lines[-1]) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class TensorBoard:
    """The same records as TensorBoard events, for those who ask; ModuleNotFoundError when it is not installed."""

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                "tensorboard=True needs tensorboard: pip install 'fewstep[tensorboard]'; log.jsonl has the same numbers"
            ) from None
        # events of a killed run after the checkpoint are hidden
        self._writer: Any = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, record: Mapping[str, Any]) -> None:
        for name, value in record.items():
            if name != "step":
                self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class Bar:
    """A progress bar on a terminal; a line every ``every`` seconds elsewhere.  Silent when ``show`` is false."""

    def __init__(self, title: str, show: bool = True, every: float = 15.0) -> None:
        self._title, self._show, self._every = title, show, every
        self._start = self._told = time.monotonic()
        self._first: float | None = None
        self._bar: Any = None
        if show and sys.stderr.isatty() and importlib.util.find_spec("rich"):
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
            done = fraction - self._first
            left = f"{(self._told - self._start) * (1 - fraction) / done:.0f} s left  " if done > 0 else ""
            print(f"{self._title}: {100 * fraction:3.0f}%  {left}{note}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
