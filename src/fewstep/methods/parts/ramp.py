"""Hyper-parameters that move over the budget: guidance, clips, time ranges, weights of losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fewstep.values import Written, check, read


@dataclass(frozen=True)
class Ramp(Written):
    """From ``start`` in a straight line to ``end``, which is reached at the share ``until`` of the budget and kept.

    Written ``100->50@0.2``; ``100->50`` ends with the budget, and ``100`` (or a plain number) does not move.  A method
    declares ``guidance: Annotated[Ramp, Least(1), "..."] = Ramp(3.0)`` and asks for
    ``self.guidance.at(progress.fraction)``; the range bounds both ends.
    """

    shown: ClassVar[str] = "X|X->X@SHARE"

    start: float
    end: float | None = None
    until: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.until <= 1:
            raise ValueError(f"Ramp: until={self.until:g} must lie in (0, 1], a share of the budget")

    @classmethod
    def parse(cls, text: str) -> Ramp:
        first, arrow, rest = text.partition("->")
        if not arrow:
            return cls(read(float, text))
        last, at, share = rest.partition("@")
        return cls(read(float, first), read(float, last), read(float, share) if at else 1.0)

    @classmethod
    def from_plain(cls, value: Any) -> Ramp:
        return cls.parse(value) if isinstance(value, str) else cls(check(float, value))

    def plain(self) -> str | float:
        return self.start if self.end is None else str(self)

    def numbers(self) -> tuple[float, ...]:
        return (self.start,) if self.end is None else (self.start, self.end)

    def __str__(self) -> str:
        words = [repr(number).removesuffix(".0") for number in (*self.numbers(), self.until)]
        return words[0] if self.end is None else f"{words[0]}->{words[1]}" + f"@{words[2]}" * (self.until != 1)

    def at(self, fraction: float) -> float:
        """The value when this part of the budget is used, [0, 1]."""
        if self.end is None:
            return self.start
        return self.start + (self.end - self.start) * min(1.0, fraction / self.until)
