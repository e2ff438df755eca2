"""How to train, whatever the method.

The flags of the command line are made from it; nothing here needs torch, so that help is instant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from fewstep.ranges import Count, Most, NonNegative
from fewstep.training.budget import Budget
from fewstep.training.profiles import Power, Profile
from fewstep.values import check_fields

TWO_MINUTES = Budget(120, "seconds")
TENTH = (Power(0.1),)

#: A larger batch is a slip of the hand: already its noise would take all memory.
MOST_SAMPLES = 1_000_000

Precision = Literal["auto", "fp32", "bf16"]
#: Settings that change where or how a run works, but not what it computes.
FREE = ("device", "save_seconds", "log_steps", "tensorboard")


@dataclass(frozen=True)
class Settings:
    """How to train, whatever the method; ValueError for values that cannot work.

    The first of ``averages`` is what the run hands out; with two or more :class:`~fewstep.training.profiles.Power`
    profiles the run keeps ``snapshots/`` from which other widths are made afterwards
    (:mod:`fewstep.training.snapshots`).  ``shard`` is :mod:`fewstep.training.sharding`.
    """

    budget: Annotated[Budget, "how long: 500steps, 20k images, 90s, 2min, 1h; split over the stages"] = TWO_MINUTES
    batch: Annotated[
        Count, Most(MOST_SAMPLES), "samples an iteration, over all processes and micro-batches together"
    ] = 64
    accumulate: Annotated[Count, "micro-batches that a batch is split into, to save memory"] = 1
    seed: Annotated[int, "seed of every random draw"] = 0
    precision: Annotated[Precision, "arithmetic; auto measures which is faster here"] = "auto"
    averages: Annotated[tuple[Profile, ...], "relative widths of the weight averages; the first is the model"] = TENTH
    device: Annotated[str, "where to train: cpu, cuda, cuda:1, mps"] = "cpu"
    save_seconds: Annotated[NonNegative, "seconds between checkpoints, 0 for one after every step"] = 60.0
    log_steps: Annotated[Count, "steps between lines of log.jsonl"] = 10
    shard: Annotated[bool, "cut the networks over the processes of torchrun, where they do not fit in one"] = False
    tensorboard: Annotated[bool, "also write event files for TensorBoard"] = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.batch % self.accumulate:
            raise ValueError(
                f"batch={self.batch} must be divisible by accumulate={self.accumulate}: batch counts all "
                "micro-batches together"
            )
