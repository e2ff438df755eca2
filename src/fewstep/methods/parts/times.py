"""Laws of training times: at which noise levels a loss looks, between which two times it jumps, and the segments that a
trajectory is cut into."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep import grids
from fewstep.randomness import Rng
from fewstep.schedules import Schedule, ShiftedFlow, karras_level


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


@dataclass(frozen=True)
class ShiftedUniform(TimeLaw):
    """Uniform in the time of flow matching, then shifted, ``k u / (1 + (k - 1) u)``: for ``shift`` above 1 more of the
    times are in noise (the training times of video models, k = 5).  Clamped to the schedule's range."""

    shift: float = 5.0

    def draw(self, schedule: Schedule, n: int, rng: Rng) -> Tensor:
        return schedule.time_at(ShiftedFlow(shift=self.shift).log_snr(rng.uniform(n)))


@dataclass(frozen=True)
class EarlyRamp(TimeLaw):
    """Uniform on EDM's ramp ``rho^(1/7)``, from its noisiest end over the share ``share`` of it (CTM's denoising)."""

    share: float = 0.7

    def draw(self, schedule: Schedule, n: int, rng: Rng) -> Tensor:
        return schedule.time_at(-karras_level(1 - rng.uniform(n, high=self.share)).log())


def chosen_rows(n: int, share: float, rng: Rng) -> Tensor:
    """Which rows of the whole batch a share of it is, bool ``[n]`` for this part's: each with probability ``share``,
    and always as many but for one at most (systematic sampling), so that networks see batches of the same sizes."""
    row = rng.part * n + torch.arange(n, dtype=torch.float64, device=rng.device)
    before = share * row + rng.shared_integer(0, 2**32) / 2**32
    return (before + share).floor() > before.floor()


class PairLaw(ABC):
    """Draws ``n`` pairs of float64 times ``(t, s)`` with ``t >= s``."""

    @abstractmethod
    def draw(self, schedule: Schedule, n: int, rng: Rng) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class GapFirst(PairLaw):
    """The length of the jump first, ``d = sigmoid(mean + std n)`` of the range, then its place, uniform where it fits
    (Align Your Flow)."""

    mean: float = -0.6
    std: float = 1.6

    def draw(self, schedule: Schedule, n: int, rng: Rng) -> tuple[Tensor, Tensor]:
        gap = torch.sigmoid(self.mean + self.std * rng.normal(n, dtype=torch.float64))
        low = rng.uniform(n) * (1 - gap)
        span = schedule.t_max - schedule.t_min
        return schedule.t_min + span * (low + gap), schedule.t_min + span * low


@dataclass(frozen=True)
class Ordered(PairLaw):
    """Two times of one logit-normal law, the later one first; a share ``equal`` of the pairs has ``s = t`` (MeanFlow,
    whose share is 0.75).

    Which rows these are is drawn for the whole batch at once (systematic sampling): each with probability ``equal``,
    and always as many but for one at most, so that the networks see batches of the same sizes.
    """

    mean: float = -0.4
    std: float = 1.0
    equal: float = 0.75

    def draw(self, schedule: Schedule, n: int, rng: Rng) -> tuple[Tensor, Tensor]:
        u = torch.sigmoid(self.mean + self.std * rng.normal(n, 2, dtype=torch.float64))
        u = schedule.t_min + (schedule.t_max - schedule.t_min) * u
        t, s = u.amax(1), u.amin(1)
        return t, torch.where(chosen_rows(n, self.equal, rng), t, s)


@dataclass(frozen=True)
class Segments:
    """The range of times cut into ``count`` parts of equal shares of the family's own index, told by their edges.

    A time that is an edge belongs to the part below it, so that a jump within the part of its start always goes down.
    ValueError where the schedule has no times in some of the parts.
    """

    count: int

    def indices(self, schedule: Schedule) -> Tensor:
        """``count + 1`` places in the own index from 0 up; of a table they are the steps of its
        :func:`~fewstep.grids.trailing` grid, 999, 749, 499 and 249 for four parts, and 0."""
        steps = schedule.table_length
        share = torch.linspace(0, 1, self.count + 1, dtype=torch.float64)
        if steps is None:
            return grids.last_index(schedule) * share
        return torch.where(share > 0, torch.round(steps * share) - 1, 0.0)

    def edges(self, schedule: Schedule) -> Tensor:
        """``count + 1`` times from ``t_min`` up."""
        times = grids.at_index(schedule, self.indices(schedule))
        if not bool((times.diff() > 0).all()):
            raise ValueError(f"{self.count} segments: {type(schedule).__name__} has no times in some, take fewer")
        return times

    def of(self, schedule: Schedule, t: Tensor) -> Tensor:
        """The number of the part, 0 for the one next to the data."""
        # an edge that comes out of another computation has a rounding error, and belongs to the part below it still
        inner = (self.indices(schedule)[1:-1] + 1e-6).to(t.device)
        return torch.searchsorted(inner, grids.own_index(schedule, t).contiguous())

    def within(self, schedule: Schedule, t: Tensor, share: Tensor) -> Tensor:
        """Times in the same part as ``t``, at a ``share`` of the way from its lower edge to its upper one."""
        places, part = self.indices(schedule).to(t.device), self.of(schedule, t)
        return grids.at_index(schedule, places[part] + share * (places[part + 1] - places[part]))

    def end(self, schedule: Schedule, t: Tensor) -> Tensor:
        """The lower edge of the part: where the jump from ``t`` ends."""
        return self.edges(schedule).to(t.device)[self.of(schedule, t)]
