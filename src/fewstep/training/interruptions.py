"""What may come between a run and its end: a signal, a killed predecessor, another run in the same folder."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fewstep.files import locked

#: The file by which a folder is held.
LOCK = "run.lock"


@contextmanager
def stop_on_signals() -> Iterator[list[int]]:
    """SIGTERM and Ctrl-C become an entry in the list, so that the step in progress ends well."""
    caught: list[int] = []

    def note(number: int, _frame: object) -> None:
        caught.append(number)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread: signals are somebody else's business
        yield caught
        return
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Hold the folder's lock and clear what a killed run was writing; ValueError when another run has it."""
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / LOCK, f"{folder}: another run is training in this folder; wait for it or choose another"):
        for pattern in (".*.safetensors.*", ".*.json*.*"):
            for unfinished in list(folder.rglob(pattern)):
                shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink()
        yield
