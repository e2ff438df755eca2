"""How a group of modules is optimized, as a method declares it; :mod:`fewstep.training.optimizers` does it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from fewstep.ranges import Least, NonNegative, Positive, Share
from fewstep.values import check_ranges, read


def constant(step: int, fraction: float, number: float) -> float:
    """1."""
    return 1.0


def linear(step: int, fraction: float, floor: float) -> float:
    """From 1 to ``floor`` over the budget."""
    return floor + (1 - floor) * (1 - fraction)


def warm_linear(step: int, fraction: float, start: float) -> float:
    """From 0 to 1 over the share ``start`` of the budget, then to 0 over the rest."""
    return min(fraction / start if start else 1.0, (1 - fraction) / (1 - start))


def cosine(step: int, fraction: float, floor: float) -> float:
    """Half a period of a cosine from 1 to ``floor`` over the budget."""
    return floor + (1 - floor) * ((1 + math.cos(math.pi * fraction)) / 2)


def stretched_cosine(step: int, fraction: float, length: float) -> float:
    """Half a period of a cosine that takes ``length`` times the budget, of which the budget sees the beginning: 2 ends
    at a half (the "smoothed" rate of Cui et al. 2025, CV-DD)."""
    return cosine(step, fraction / length, 0.0)


def inverse_sqrt(step: int, fraction: float, start: float) -> float:
    """1 for ``start`` steps, then falling as ``sqrt(start / step)`` (Karras et al. 2024, EDM2)."""
    return 1 / math.sqrt(max(step / start, 1.0))


Decayed = Literal["all", "matrices"]
#: The courses of a learning rate; the number behind a name is its floor, or where it starts to fall.
DECAYS: dict[str, Callable[[int, float, float], float]] = {
    "constant": constant, "linear": linear, "warm-linear": warm_linear, "cosine": cosine,
    "stretched-cosine": stretched_cosine, "inverse-sqrt": inverse_sqrt,
}  # fmt: skip
#: Those that are nothing without their number.
NUMBERED = ("stretched-cosine", "inverse-sqrt")
#: What that number must be.
FLOOR = ("a floor in [0, 1]", lambda number: 0 <= number <= 1)
NUMBERS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "linear": FLOOR, "cosine": FLOOR,
    "warm-linear": ("a share of the budget in [0, 1)", lambda number: 0 <= number < 1),
    "stretched-cosine": ("a length in budgets, at least 1", lambda number: 1 <= number < math.inf),
    "inverse-sqrt": ("a positive number of steps", lambda number: number > 0),
}  # fmt: skip


@dataclass(frozen=True)
class Optimizer:
    """How a group of modules is optimized; ValueError for what cannot work.

    ``modules`` are names in :class:`~fewstep.methods.method.Networks`; ``rates`` are factors on ``lr`` for some of
    them.  ``decay`` is the learning rate's course: "constant", "linear" or "cosine" to 0 over the budget, or to a floor
    ("cosine:0.5"), "stretched-cosine:2", which the budget sees half of, "warm-linear:0.1", which rises over that share
    of the budget before it falls to 0, or "inverse-sqrt:35000", which begins to fall at that step.  ``decayed`` are the
    weights that ``weight_decay`` is of: all, or "matrices" alone, those of two dimensions and more.  ``nonfinite`` says
    what happens when the gradient is no number: the run stops; or the step of the group is left out; or the entries
    that are none are put to 0.  Steps that were skipped or mended are counted in the log, and too many of them stop the
    run too.
    """

    modules: tuple[str, ...]
    lr: Annotated[NonNegative, "learning rate"]
    kind: Literal["adam", "adamw", "radam", "sgd"] = "adam"
    betas: Annotated[tuple[Share, Share], "decay of the moments; unused by sgd"] = (0.9, 0.999)
    eps: Annotated[NonNegative, "added to the root of the second moment; unused by sgd"] = 1e-8
    weight_decay: Annotated[NonNegative, "weight decay, decoupled in adamw"] = 0.0
    decayed: Annotated[Decayed, "which weights weight decay is of"] = "all"
    clip: Annotated[Positive | None, "bound on the gradient norm"] = None
    warmup: Annotated[int, Least(0), "steps over which the learning rate rises from 0"] = 0
    decay: Annotated[str, "course of the learning rate"] = "constant"
    momentum: Annotated[Share, "momentum of sgd"] = 0.0
    nesterov: Annotated[bool, "Nesterov's momentum, for sgd"] = False
    rates: Annotated[Mapping[str, float], "factors on lr by module"] = field(default_factory=dict)
    nonfinite: Annotated[Literal["stop", "skip", "zero"], "what a gradient that is no number does"] = "stop"

    def __post_init__(self) -> None:
        check_ranges(self)
        if unknown := set(self.rates) - set(self.modules):
            raise ValueError(f"Optimizer: rates name modules that are not in the group: {sorted(unknown)}")
        self.course()

    def course(self) -> Callable[[int, float], float]:
        """``decay`` as a function of the steps done and the part of the budget used, [0, 1]."""
        name, colon, word = self.decay.partition(":")
        if name not in DECAYS or (colon and name == "constant") or (not colon and name in NUMBERED):
            raise ValueError(
                f"Optimizer: decay='{self.decay}' is not one of constant, linear, cosine (with a floor: cosine:0.5), "
                "warm-linear:SHARE, stretched-cosine:LENGTH and inverse-sqrt:START"
            )
        number = read(float, word) if colon else 0.0
        if colon and not NUMBERS[name][1](number):
            raise ValueError(f"Optimizer: decay='{self.decay}' must have {NUMBERS[name][0]}")
        return lambda step, fraction: DECAYS[name](step, fraction, number)
