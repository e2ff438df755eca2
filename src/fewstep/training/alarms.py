"""Instabilities that are named while they happen: a logged scalar that leaves what is healthy by far."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

#: So many times its first value a scalar may become before it is called unstable.
MOST_GROWTH = 20.0


def grown(name: str, record: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> float | None:
    """How many times its first value a logged scalar is, where that is too much; None where it is not."""
    first = next((abs(line[name]) for line in lines if line.get(name)), None)
    if first is None or name not in record:
        return None
    ratio = abs(record[name]) / first
    return None if ratio <= MOST_GROWTH else ratio


class Alarms:
    """Watches the records of a run for the scalars that a method calls unstable when they grow, by name with what to
    change (:attr:`~fewstep.methods.method.Method.unstable`).

    Every record in which one has grown too much counts itself under ``alarms``; people are told once a scalar.
    """

    def __init__(self, unstable: Mapping[str, str], show: bool) -> None:
        self._unstable, self._show = unstable, show
        self._told: set[str] = set()

    def check(self, record: dict[str, Any], lines: Sequence[Mapping[str, Any]]) -> None:
        """Add ``alarms`` to a record that has any; ``lines`` are the records before it."""
        found = {name: ratio for name in self._unstable if (ratio := grown(name, record, lines)) is not None}
        if not found:
            return
        record["alarms"] = len(found)
        for name in found.keys() - self._told if self._show else ():
            print(
                f"unstable: {name} is {found[name]:.0f} times what it was at the start (step {record['step']}): "
                f"{self._unstable[name]}",
                file=sys.stderr, flush=True,
            )  # fmt: skip
        self._told |= found.keys()
