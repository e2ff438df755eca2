"""What is wrong with a run, read off a scalar that it logs: an instability, a collapse, a one-sided game."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Alarm(ABC):
    """Goes off at a record whose scalar is far from what is healthy; ``advice`` says what to change then."""

    advice: str

    @abstractmethod
    def found(self, name: str, record: Record, before: Sequence[Record]) -> str | None:
        """What is wrong with the scalar ``name`` in ``record``, after the records ``before``; None where nothing is."""


@dataclass(frozen=True)
class Grows(Alarm):
    """More than ``times`` its first value other than 0: something is unstable."""

    times: float = 20.0

    def found(self, name: str, record: Record, before: Sequence[Record]) -> str | None:
        first = next((abs(line[name]) for line in before if line.get(name)), None)
        if first is None or name not in record or abs(record[name]) <= self.times * first:
            return None
        return f"{name} is {abs(record[name]) / first:.0f} times what it was at the start"


@dataclass(frozen=True)
class Falls(Alarm):
    """Below ``share`` of its highest value: samples become alike, modes are lost."""

    share: float = 0.5

    def found(self, name: str, record: Record, before: Sequence[Record]) -> str | None:
        highest = max((line[name] for line in before if name in line), default=0.0)
        if name not in record or record[name] >= self.share * highest:
            return None
        return f"{name} has fallen to {100 * record[name] / highest:.0f} % of its highest value"


@dataclass(frozen=True)
class Drops(Alarm):
    """More than ``by`` below its highest value, of a scalar that may be negative, such as a log-probability."""

    by: float = 1.0

    def found(self, name: str, record: Record, before: Sequence[Record]) -> str | None:
        highest = max((line[name] for line in before if name in line), default=-math.inf)
        if name not in record or record[name] >= highest - self.by:
            return None
        return f"{name} is {record[name]:.3g}, {highest - record[name]:.3g} below its highest value"


@dataclass(frozen=True)
class Stays(Alarm):
    """Above ``bound`` for ``records`` in turn: one side of a game has won."""

    bound: float = 0.98
    records: int = 5

    def found(self, name: str, record: Record, before: Sequence[Record]) -> str | None:
        lines = [line[name] for line in (*before, record) if name in line]
        if name not in record or len(lines) < self.records or min(lines[-self.records :]) <= self.bound:
            return None
        return f"{name} has stayed above {self.bound:g} for {self.records} records"
