"""Which exceptions are a user's mistake, and the one line that they become."""

from __future__ import annotations

import linecache
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from fewstep.values import suggestion

PACKAGE = str(Path(__file__).parent.parent)


class UserError(ValueError):
    """A mistake in what the command was given."""


class Stopped(Exception):
    """The command was asked to stop by signal ``number``; the shell sees ``128 + number``."""

    def __init__(self, number: int, message: str = "stopped") -> None:
        super().__init__(message)
        self.number = number


def choose(what: str, word: str, choices: Iterable[str]) -> str:
    """``word`` when it is one of the choices; :class:`UserError` naming the nearest, and all of them, when not."""
    known = list(choices)
    if word not in known:
        raise UserError(f"{what} '{word}' is unknown{suggestion(word, known)} (choices: {', '.join(known)})")
    return word


def explain(error: BaseException) -> str | None:
    """The line for a user's mistake; None for what must be a bug and keeps its traceback.

    Values, files and memory are the user's.  A TypeError, a missing module and the like are only when this package
    raised them on purpose: the same types come out of ordinary bugs.
    """
    if isinstance(error, OSError):
        return os_line(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and no_memory(str(error))):
        return "out of memory: lower --batch or --n, or raise --accumulate"
    if isinstance(error, ValueError):
        return one_line(error)
    if isinstance(error, TypeError | ImportError) and raised_here(error.__traceback__):
        return one_line(error)
    return None


def no_memory(message: str) -> bool:
    """Whether this is PyTorch's way to say that memory ran out, on an accelerator or on the processor."""
    return "out of memory" in message or "can't allocate memory" in message


def os_line(error: OSError) -> str:
    """A file error as "place: what is wrong", whether Python or this package raised it."""
    if error.errno is None or error.strerror is None:
        return one_line(error)
    place = f"{error.filename}: " if error.filename is not None else ""
    return f"{place}{error.strerror[:1].lower()}{error.strerror[1:]}"


def one_line(error: BaseException) -> str:
    """The message of an exception on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def raised_here(trace: TracebackType | None) -> bool:
    """Whether the innermost frame is a ``raise`` statement of this package."""
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    file = trace.tb_frame.f_code.co_filename
    return file.startswith(PACKAGE) and linecache.getline(file, trace.tb_lineno).lstrip().startswith("raise ")
