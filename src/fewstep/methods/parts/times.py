"""Laws of the training time: at which noise levels a loss looks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.randomness import Rng
from fewstep.schedules import Schedule


@dataclass(frozen=True)
class TimeLaw(ABC):
    """Draws ``n`` float64 times of a schedule."""

    @abstractmethod
    def draw(self, schedule: Schedule, n: int, rng: Rng) -> Tensor: ...


@dataclass(frozen=True)
class LogNormal(TimeLaw):
    """``log(sigma / alpha) ~ N(mean, std^2)`` (EDM's and sCM's law), clamped to the schedule's range."""

    mean: float = -1.2
    std: float = 1.2

    def draw(self, schedule: Schedule, n: int, rng: Rng) -> Tensor:
        return schedule.time_at(-(self.mean + self.std * rng.normal(n, dtype=torch.float64)))


@dataclass(frozen=True)
class Uniform(TimeLaw):
    """Uniform in the schedule's time between two fractions of its range."""

    low: float = 0.0
    high: float = 1.0

    def draw(self, schedule: Schedule, n: int, rng: Rng) -> Tensor:
        span = schedule.t_max - schedule.t_min
        return schedule.t_min + span * rng.uniform(n, low=self.low, high=self.high)


@dataclass(frozen=True)
class Own(TimeLaw):
    """Uniform between two shares of the family's own index (:meth:`~fewstep.schedules.Schedule.own_time`).

    DMD2's "uniform in the index of the 1000-step grid", on EDM and on a trained table alike; ``low, high`` = 0.02, 0.98
    in its generator loss.
    """

    low: float = 0.02
    high: float = 0.98

    def draw(self, schedule: Schedule, n: int, rng: Rng) -> Tensor:
        return schedule.own_time(rng.uniform(n, low=self.low, high=self.high))
