"""Runs that go wrong are told so while they do."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from fewstep.methods.alarm import Alarm


class Alarms:
    """Watches the records of a run for what its method calls unstable
    (:attr:`~fewstep.methods.method.Method.unstable`).

    Every record that sets alarms off counts them under ``alarms``; people are told once a scalar.
    """

    def __init__(self, unstable: Mapping[str, Alarm], show: bool) -> None:
        self._unstable, self._show = unstable, show
        self._told: set[str] = set()

    def check(self, record: dict[str, Any], before: Sequence[Mapping[str, Any]]) -> None:
        """Add ``alarms`` to a record that sets any off; ``before`` are the records before it."""
        alarms = {name: said for name, alarm in self._unstable.items() if (said := alarm.found(name, record, before))}
        if not alarms:
            return
        record["alarms"] = len(alarms)
        for name in alarms.keys() - self._told if self._show else ():
            said = f"unstable: {alarms[name]} (step {record['step']}): {self._unstable[name].advice}"
            print(said, file=sys.stderr, flush=True)
        self._told |= alarms.keys()

    def tell_end(self, record: Mapping[str, Any]) -> None:
        """Tell people where an alarm has ended the run and what it leaves."""
        if self._show and "healthy" in record:
            said = f"stopped at step {record['step']}: the weights are those of step {record['healthy']}"
            print(said, file=sys.stderr, flush=True)
