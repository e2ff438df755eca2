"""The ranges of numbers, declared at the field that they bound::

    lr: Annotated[NonNegative, "learning rate"] = 3e-4
    steps: Annotated[tuple[Count, ...], "network calls that the student is made for"] = (1, 2, 4)

The text beside a range is the field's help.  A range bounds every number that the field holds: the members of a tuple,
both ends of a :class:`~fewstep.methods.parts.ramp.Ramp`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class Range(ABC):
    """A set of numbers; ``str`` says what a number must be or where it must lie."""

    @abstractmethod
    def __contains__(self, number: float) -> bool: ...


@dataclass(frozen=True)
class Above(Range):
    """Greater than ``low``."""

    low: float

    def __contains__(self, number: float) -> bool:
        return number > self.low

    def __str__(self) -> str:
        return f"be above {self.low:g}" if self.low else "be positive"


@dataclass(frozen=True)
class Least(Range):
    """At least ``low``."""

    low: float

    def __contains__(self, number: float) -> bool:
        return number >= self.low

    def __str__(self) -> str:
        return f"be at least {self.low:g}"


@dataclass(frozen=True)
class Most(Range):
    """At most ``high``."""

    high: float

    def __contains__(self, number: float) -> bool:
        return number <= self.high

    def __str__(self) -> str:
        return f"be at most {self.high:g}"


@dataclass(frozen=True)
class Within(Range):
    """From ``low`` to ``high``, both included."""

    low: float
    high: float

    def __contains__(self, number: float) -> bool:
        return self.low <= number <= self.high

    def __str__(self) -> str:
        return f"lie in [{self.low:g}, {self.high:g}]"


@dataclass(frozen=True)
class Multiple(Range):
    """A positive multiple of ``unit``."""

    unit: int

    def __contains__(self, number: float) -> bool:
        return number > 0 and number % self.unit == 0

    def __str__(self) -> str:
        return f"be a positive multiple of {self.unit}"


Positive = Annotated[float, Above(0)]
NonNegative = Annotated[float, Least(0)]
Share = Annotated[float, Within(0, 1)]
Count = Annotated[int, Least(1)]
