"""Hyper-parameters that move over the budget: guidance, clips, time ranges, weights of losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from fewstep.values import Written, check, read

Course = Literal["linear", "cosine", "exponential"]
#: What is left of the way after ``u`` times the time that it takes.
COURSES: dict[Course, Callable[[float], float]] = {
    "linear": lambda u: 1 - min(1.0, u),
    "cosine": lambda u: (1 + math.cos(math.pi * min(1.0, u))) / 2,
    "exponential": lambda u: math.exp(-u),
}


@dataclass(frozen=True)
class Ramp(Written):
    """From ``start`` in a straight line to ``end``, which is reached at the share ``until`` of the budget and kept.

    Another ``course`` than a straight line is half a period of a cosine, or an exponential, which has ``exp(-1)`` of
    its way left at ``until`` and goes on.  Written ``100->50@0.2`` or ``cosine:100->50@0.2``; ``100->50`` ends with the
    budget, and ``100`` (or a plain number) does not move.  A method
    declares ``guidance: Annotated[Ramp, Least(1), "..."] = Ramp(3.0)`` and asks for
    ``self.guidance.at(progress.fraction)``; the range bounds both ends.
    """

    shown: ClassVar[str] = "X|[COURSE:]X->X@SHARE"

    start: float
    end: float | None = None
    until: float = 1.0
    course: Course = "linear"

    def __post_init__(self) -> None:
        check(Course, self.course)
        if not 0 < self.until <= 1:
            raise ValueError(f"Ramp: until={self.until:g} must lie in (0, 1], a share of the budget")

    @classmethod
    def parse(cls, text: str) -> Ramp:
        course, colon, line = text.partition(":")
        first, arrow, rest = (line if colon else text).partition("->")
        if not arrow:
            return cls(read(float, text))
        last, at, share = rest.partition("@")
        until = read(float, share) if at else 1.0
        return cls(read(float, first), read(float, last), until, read(Course, course) if colon else "linear")

    @classmethod
    def from_plain(cls, value: Any) -> Ramp:
        return cls.parse(value) if isinstance(value, str) else cls(check(float, value))

    def plain(self) -> str | float:
        return self.start if self.end is None else str(self)

    def numbers(self) -> tuple[float, ...]:
        return (self.start,) if self.end is None else (self.start, self.end)

    def __str__(self) -> str:
        words = [repr(number).removesuffix(".0") for number in (*self.numbers(), self.until)]
        course = f"{self.course}:" * (self.course != "linear")
        return words[0] if self.end is None else f"{course}{words[0]}->{words[1]}" + f"@{words[2]}" * (self.until != 1)

    def at(self, fraction: float) -> float:
        """The value when this part of the budget is used, [0, 1]."""
        if self.end is None:
            return self.start
        return self.end + (self.start - self.end) * COURSES[self.course](fraction / self.until)
