"""How to train, whatever the method.

The flags of the command line are made from it; nothing here needs torch, so that help is instant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from fewstep.ranges import Count, Most, NonNegative, Positive
from fewstep.training.budget import Budget
from fewstep.training.orders import Epochs, Order
from fewstep.training.profiles import Power, Profile
from fewstep.values import Written, check_fields, read

if TYPE_CHECKING:
    from fewstep.networks.lora import LowRank

TWO_MINUTES = Budget(120, "seconds")
TENTH = (Power(0.1),)
EPOCHS = Epochs()

#: A larger batch is a slip of the hand: already its noise would take all memory.
MOST_SAMPLES = 1_000_000

Precision = Literal["auto", "fp32", "bf16"]
#: Settings that change where or how a run works, but not what it computes.
FREE = ("device", "save_seconds", "log_steps", "tensorboard")


@dataclass(frozen=True)
class Rank(Written):
    """The rank of low-rank weights; None is "auto", the largest power of two up to 64 at which less than 5% of the
    weights train."""

    shown: ClassVar[str] = "N|auto"

    value: int | None

    def __post_init__(self) -> None:
        if self.value is not None and self.value < 1:
            raise ValueError(f"rank {self.value}: it must be at least 1")

    @classmethod
    def parse(cls, text: str) -> Rank:
        return cls(None if text == "auto" else read(int, text))

    @classmethod
    def from_plain(cls, value: Any) -> Rank:
        return cls.parse(str(value))

    def plain(self) -> str | float:
        return "auto" if self.value is None else self.value

    def __str__(self) -> str:
        return str(self.plain())


@dataclass(frozen=True)
class Settings:
    """How to train, whatever the method; ValueError for values that cannot work.

    The first of ``averages`` is what the run hands out; with two or more :class:`~fewstep.training.profiles.Power`
    profiles the run keeps ``snapshots/`` from which other widths are made afterwards
    (:mod:`fewstep.training.snapshots`).  ``shard`` is :mod:`fewstep.training.sharding`.  With ``lora_rank`` the
    networks that the run makes train low-rank weights (:mod:`fewstep.networks.lora`).
    """

    budget: Annotated[Budget, "how long: 500steps, 20k images, 90s, 2min, 1h; split over the stages"] = TWO_MINUTES
    batch: Annotated[
        Count, Most(MOST_SAMPLES), "samples an iteration, over all processes and micro-batches together"
    ] = 64
    accumulate: Annotated[Count, "micro-batches that a batch is split into, to save memory"] = 1
    seed: Annotated[int, "seed of every random draw"] = 0
    order: Annotated[Order, "how data are read: random:0.1 is a tenth of them a round, a new one each (RS2)"] = EPOCHS
    precision: Annotated[Precision, "arithmetic; auto measures which is faster here"] = "auto"
    averages: Annotated[tuple[Profile, ...], "relative widths of the weight averages; the first is the model"] = TENTH
    device: Annotated[str, "where to train: cpu, cuda, cuda:1, mps"] = "cpu"
    save_seconds: Annotated[NonNegative, "seconds between checkpoints, 0 for one after every step"] = 60.0
    log_steps: Annotated[Count, "steps between lines of log.jsonl"] = 10
    on_alarm: Annotated[
        Literal["go-on", "stop"], "what an alarm does: tells, or ends the run on the weights of the last record without"
    ] = "go-on"
    shard: Annotated[bool, "cut the networks over the processes of torchrun, where they do not fit in one"] = False
    tensorboard: Annotated[bool, "also write event files for TensorBoard"] = False

    lora_rank: Annotated[Rank | None, "train low-rank weights of this rank, on the memory of the teacher"] = None
    lora_alpha: Annotated[Positive | None, "their factor is alpha / rank; none: 1"] = None
    lora_targets: Annotated[
        tuple[str, ...] | None, "endings of the names of the layers they go on; none: attention in diffusers, else all"
    ] = None

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("lora_alpha", "lora_targets"):
            if getattr(self, name) is not None and self.lora_rank is None:
                raise ValueError(f"{name} says nothing without lora_rank")
        if self.batch % self.accumulate:
            raise ValueError(
                f"batch={self.batch} must be divisible by accumulate={self.accumulate}: batch counts all "
                "micro-batches together"
            )

    @property
    def low_rank(self) -> LowRank | None:
        """The low-rank weights that are to be trained; None for all weights."""
        from fewstep.networks.lora import LowRank  # which imports torch

        if self.lora_rank is None:
            return None
        return LowRank(self.lora_rank.value, self.lora_alpha, self.lora_targets)
