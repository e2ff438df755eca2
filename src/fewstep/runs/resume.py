"""A run folder as it is entered: held against other runs, holding the same run or none.

It holds ``recipe.json``, ``log.jsonl``, ``checkpoint.safetensors`` and ``model/``; the stages of a recipe of several
lie in ``stage-<k>-<name>/`` beside the finished ``model/``, and what stages train on in ``stores/``.  The same recipe
in the same folder is the same run, resumed; another one is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fewstep.files import write_atomically
from fewstep.runs import record as records
from fewstep.runs.record import NAME, Difference, Record, Seeds, with_precision
from fewstep.training.interruptions import LOCK, only_run_in
from fewstep.training.precision import resolve
from fewstep.training.settings import FREE


class OtherRun(ValueError):
    """The folder holds another run; ``difference`` is the first thing in which it is another."""

    def __init__(self, folder: Path, difference: Difference) -> None:
        super().__init__(
            f"{folder} holds another run: {difference}; choose another folder, or give what is there to resume it"
        )
        self.folder, self.difference = folder, difference


def begun(folder: Path) -> bool:
    """Whether a run has left anything in the folder."""
    return folder.is_dir() and any(e.name not in (NAME, LOCK) and not e.name.startswith(".") for e in folder.iterdir())


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make the folder and hold it against other runs; ValueError when another has it, or it holds something else."""
    refuse_strangers(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"{folder}: a file is in the way; choose another folder") from None
    with only_run_in(folder):
        yield


def refuse_strangers(folder: Path) -> None:
    """ValueError for a folder with files that no run left there."""
    if begun(folder) and not (folder / NAME).is_file():
        raise ValueError(f"{folder} is not empty and holds no {NAME}: choose a new folder")


def enter(folder: Path, record: Record, further: bool = False) -> Record:
    """Write the record into the folder, or find the same one there; the record to run, its precision resolved.

    With ``further`` the budget may be another than it was.  :class:`OtherRun` when the folder holds another run.
    """
    path = folder / NAME
    automatic = record.settings["precision"] == "auto"
    if not begun(folder):
        if automatic:
            record = with_precision(record, resolve("auto", torch.device(record.settings["device"])))
        write_atomically(path, record.to_json().encode())
        return record
    old = records.read(path)
    if automatic:
        record = with_precision(record, old.settings["precision"])
    if differs := records.difference(old, record, (*FREE, "budget") if further else FREE):
        raise OtherRun(folder, differs)
    if not further:
        return old
    old = Record(**vars(old) | {"settings": old.settings | {"budget": record.settings["budget"]}})
    write_atomically(path, old.to_json().encode())
    return old


def stage_seeds(folder: Path) -> Seeds:
    """How the run in a folder counts the seeds of its stages, as a process that does not write finds it."""
    return records.read(folder / NAME).stage_seeds if (folder / NAME).is_file() else "derived"
