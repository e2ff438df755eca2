"""How long to train: in steps, images or minutes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from fewstep.values import Written

_UNITS: dict[str, tuple[Literal["steps", "images", "seconds"], float]] = {
    "": ("steps", 1), "step": ("steps", 1), "steps": ("steps", 1), "it": ("steps", 1),
    "image": ("images", 1), "images": ("images", 1), "img": ("images", 1),
    "s": ("seconds", 1), "sec": ("seconds", 1), "second": ("seconds", 1), "seconds": ("seconds", 1),
    "m": ("seconds", 60), "min": ("seconds", 60), "minute": ("seconds", 60), "minutes": ("seconds", 60),
    "h": ("seconds", 3600), "hour": ("seconds", 3600), "hours": ("seconds", 3600),
}  # fmt: skip


@dataclass(frozen=True)
class Budget(Written):
    """An amount of training.  Runs with a budget in steps or images repeat bit for bit; one in minutes depends on the
    machine's speed."""

    shown: ClassVar[str] = "AMOUNT"

    amount: float
    unit: Literal["steps", "images", "seconds"] = "steps"

    def __post_init__(self) -> None:
        if not 0 < self.amount < float("inf"):
            raise ValueError(f"budget {self.amount:g} {self.unit}: it must be positive and finite")

    @classmethod
    def parse(cls, text: str) -> Budget:
        """From ``"500"``, ``"500 steps"``, ``"20k images"``, ``"90s"``, ``"2min"``, ``"1.5h"``."""
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(k|M)?\s*([a-zA-Z]*)\s*", text)
        if match is None or match[3].lower() not in _UNITS:
            raise ValueError(
                f"budget '{text}' is not an amount of training; write 500steps, 20k images, 90s, 2min or 1h"
            )
        unit, factor = _UNITS[match[3].lower()]
        amount = float(match[1]) * {None: 1, "k": 1e3, "M": 1e6}[match[2]] * factor
        if unit != "seconds" and not amount.is_integer():
            raise ValueError(f"budget '{text}': steps and images are whole numbers")
        return cls(amount, unit)

    def fraction(self, steps: int, images: int, seconds: float) -> float:
        """How much of it is used, 0 to 1."""
        return min(1.0, {"steps": steps, "images": images, "seconds": seconds}[self.unit] / self.amount)

    def __str__(self) -> str:
        minutes = self.unit == "seconds" and self.amount >= 60
        return f"{self.amount / 60:.15g}min" if minutes else f"{self.amount:.15g}{self.unit}"
