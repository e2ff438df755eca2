"""Tables and progress on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def console() -> Console:
    """Rich's console on stdout; ImportError saying what to install when rich is missing."""
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        raise ImportError("tables need rich: pip install rich") from None
    return Console()


@contextmanager
def progress(title: str) -> Iterator[Callable[[float, str], None]]:
    """A bar on stderr, as a function of the share of the work that is done and of what is next."""
    from fewstep.training.progress import Bar

    bar = Bar(title)

    try:
        yield bar.update
    finally:
        bar.close()
