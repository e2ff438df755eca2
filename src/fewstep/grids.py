"""Time grids: the ``steps + 1`` strictly decreasing times a sampler visits, from ``t_max`` (noise) down to data.

The last time may be the schedule's ``data_time``, pure data: nothing is evaluated there.

A grid is a float64 tensor made by a plain function of a schedule; :func:`check_grid` refuses anything that is not
strictly decreasing, because a repeated level is a silent division by zero in every multistep solver.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from fewstep.schedules import LOG_SNR_BOUND, Schedule
from fewstep.values import real, tensor_of, whole

Grid = Callable[[Schedule, int], Tensor]


#: Times as they may be given: a vector, an array or numbers.
AnyTimes = Tensor | np.ndarray | Sequence[float]

#: More steps than any sampler is asked for; a larger number is a slip.
MOST_STEPS = 100_000


def check_grid(times: AnyTimes, schedule: Schedule | None = None) -> Tensor:
    """``times`` as a float64 vector; ValueError unless it is finite, strictly decreasing, at least two long, and
    inside the schedule's range when one is given (its ``data_time`` is allowed as the last one).  TypeError for what
    are not real numbers."""
    times = tensor_of("a time grid", times)
    if times.is_complex() or times.dtype == torch.bool:
        raise TypeError(f"a time grid is a vector of real numbers, got {times.dtype}")
    times = times.double()
    if times.ndim != 1 or len(times) < 2 or not bool(torch.isfinite(times).all()):
        raise ValueError(f"a time grid is a vector of at least two finite times, got shape {list(times.shape)}")
    if not bool((times[1:] < times[:-1]).all()):
        k = int((times[1:] >= times[:-1]).nonzero()[0])
        raise ValueError(
            f"a time grid must be strictly decreasing, times {k} and {k + 1} are {float(times[k])!r} and "
            f"{float(times[k + 1])!r}"
        )
    if schedule is not None:
        slack = 1e-9 * schedule.t_max
        inner = times[:-1] if float(times[-1]) == schedule.data_time else times
        if float(times[0]) > schedule.t_max + slack or float(inner[-1]) < schedule.t_min - slack:
            raise ValueError(
                f"times {float(times[0]):g} .. {float(inner[-1]):g} leave the schedule's range "
                f"[{schedule.t_min:g}, {schedule.t_max:g}]"
            )
    return times


def check_steps(steps: int) -> int:
    """``steps`` as an int; TypeError unless it is a whole number, ValueError unless it lies in 1 .. MOST_STEPS."""
    return whole("steps", steps, 1, MOST_STEPS)


def check_spacing(**values: float) -> None:
    """ValueError unless the parameters of a grid are positive, and in a range that float64 can tell apart; TypeError
    for what are not numbers."""
    for name, value in values.items():
        real(name, value, 1e-6, 1e6)


def _unit(steps: int) -> Tensor:
    return torch.linspace(0, 1, check_steps(steps) + 1, dtype=torch.float64)


def _ends(schedule: Schedule, end: float | None) -> tuple[Tensor, Tensor]:
    last = schedule.t_min if end is None else real("end", end)
    if last != 0 and not schedule.t_min <= last < schedule.t_max:
        raise ValueError(f"end={last} must be 0 or a time in [{schedule.t_min:g}, {schedule.t_max:g})")
    first = torch.tensor(schedule.t_max, dtype=torch.float64)
    return first, torch.tensor(last, dtype=torch.float64)


def uniform(schedule: Schedule, steps: int, end: float | None = None) -> Tensor:
    """Equally spaced in the schedule's own time, ``t_max`` to ``end`` (default ``t_min``)."""
    return power(schedule, steps, 1.0, end)


def even(schedule: Schedule, steps: int) -> Tensor:
    """Equal steps for students: of the schedule's own time where those are sensible (:attr:`Schedule.even`), else of
    TrigFlow's angle ``atan(2 sigma / alpha)``, which is EDM's grid seen on a circle."""
    return _with_ends(even_time(schedule, _unit(steps)), schedule, None)


def student_grid(schedule: Schedule, steps: int) -> Tensor:
    """The times of a student's calls, equally spaced, and the end: of a table the integer times of :func:`trailing`
    (999, 749, 499 and 249 of 1000 for four), which schedulers of diffusers have too; else :func:`even`."""
    return even(schedule, steps) if schedule.table_length is None else trailing(schedule, steps)


def even_time(schedule: Schedule, u: Tensor) -> Tensor:
    """The time at a share ``u`` in [0, 1] of the way along :func:`even` grids, from noise to data."""
    if schedule.even:
        first, last = _ends(schedule, None)
        return first + u * (last - first)
    first, last = torch.atan(2 * reach(schedule, None))
    return schedule.time_at(-torch.log(torch.tan(first + u * (last - first)) / 2))


def power(schedule: Schedule, steps: int, kappa: float = 2.0, end: float | None = None) -> Tensor:
    """Equally spaced in ``t ** (1 / kappa)``; kappa = 2 is DDIM's and DEIS's quadratic grid."""
    check_spacing(kappa=kappa)
    first, last = _ends(schedule, end)
    a, b = first ** (1 / kappa), last ** (1 / kappa)
    grid = (a + _unit(steps) * (b - a)) ** kappa
    grid[0], grid[-1] = first, last
    return check_grid(grid)


def log_snr(schedule: Schedule, steps: int, end: float | None = None) -> Tensor:
    """Equally spaced in lambda = log(alpha / sigma)."""
    first, last = -reach(schedule, end).log()
    return _with_ends(schedule.time_at(first + _unit(steps) * (last - first)), schedule, end)


def karras(schedule: Schedule, steps: int, rho: float = 7.0, end: float | None = None) -> Tensor:
    """Equally spaced in ``(sigma / alpha) ** (1 / rho)`` (Karras et al. 2022, eq. 5), mapped back to time."""
    check_spacing(rho=rho)
    first, last = reach(schedule, end) ** (1 / rho)
    ratio = (first + _unit(steps) * (last - first)) ** rho
    return _with_ends(schedule.time_at(-torch.log(ratio)), schedule, end)


def shifted(schedule: Schedule, steps: int, shift: float = 3.0, end: float | None = None) -> Tensor:
    """``t' = k t / (1 + (k - 1) t)`` of a uniform grid on the unit interval: more steps at high noise for k > 1
    (Stable Diffusion 3, Flux)."""
    check_spacing(shift=shift)
    first, last = _ends(schedule, end)
    u = uniform(schedule, steps, end) / schedule.t_max
    grid = schedule.t_max * shift * u / (1 + (shift - 1) * u)
    grid[0], grid[-1] = first, last
    return check_grid(grid)


def trailing(schedule: Schedule, steps: int, end: float | None = None) -> Tensor:
    """Integer times spaced from the last one back, as few-step diffusers schedulers do ("trailing")."""
    n = int(schedule.t_max) + 1
    if check_steps(steps) > n:
        raise ValueError(f"steps={steps}: a schedule of {n} discrete times has no trailing grid that long")
    times = torch.round(n - torch.arange(steps, dtype=torch.float64) * n / steps) - 1
    last = _ends(schedule, end)[1][None]
    return check_grid(torch.cat([times, last])) if times[-1] > last[0] else check_grid(times)


def to_data(grid: Tensor, schedule: Schedule) -> Tensor:
    """The same grid with its last time replaced by that of pure data: the last step becomes a plain "denoise"."""
    return check_grid(torch.cat([grid[:-1], grid.new_tensor([schedule.data_time])]), schedule)


def reach(schedule: Schedule, end: float | None) -> Tensor:
    """The noise levels ``sigma / alpha`` at the two ends.  Pure noise and pure data, which flow matching reaches, are
    infinitely far away: the levels are spaced between EDM's 80 and 0.002 there, and the ends follow in one step."""
    log_snr = schedule.log_snr(torch.stack(_ends(schedule, end)))
    ratio = torch.exp(-log_snr)
    return torch.where(log_snr.abs() < LOG_SNR_BOUND, ratio, ratio.clamp(0.002, 80.0))


def _with_ends(grid: Tensor, schedule: Schedule, end: float | None) -> Tensor:
    grid = grid.clone()
    grid[0], grid[-1] = _ends(schedule, end)
    return check_grid(grid)


def balanced(schedule: Schedule, steps: int, centre: float = 1.0, kappa: float = 1.5) -> Tensor:
    """Equally spaced in ``u^(1 / kappa)``, ``u = rho / (rho + centre)``, down to pure data.

    ``u`` is flow matching's time when ``centre = 1``: half the grid lies above the noise level ``centre``, about the
    standard deviation of the data, and neither end is singular, so one rule serves every schedule.  No time lies below
    ``t_min``: with many steps the last network call is there.
    """
    check_steps(steps)
    check_spacing(centre=centre, kappa=kappa)
    ratio = schedule.ratio(torch.tensor([schedule.t_max, schedule.t_min], dtype=torch.float64))
    first, last = ((ratio / (ratio + centre)) ** (1 / kappa)).tolist()
    if first / steps >= last:
        v = torch.linspace(first, 0, steps + 1, dtype=torch.float64)[1:-1]
    else:
        v = torch.linspace(first, last, steps, dtype=torch.float64)[1:]
    u = v**kappa
    inner = schedule.time_at(-(centre * u / (1 - u)).log())
    ends = torch.tensor([schedule.t_max, schedule.data_time], dtype=torch.float64)
    return check_grid(torch.cat([ends[:1], inner, ends[1:]]))


def last_index(schedule: Schedule) -> int:
    """The last place of the index in which a teacher counts its times: that of its table, 1000 without one."""
    return 1000 if schedule.table_length is None else schedule.table_length - 1


def own_index(schedule: Schedule, t: Tensor) -> Tensor:
    """The place of a time in the teacher's own index: the step of its table, or the thousandth of its range in the
    family's own index (:meth:`~fewstep.schedules.Schedule.own_share`), 0 at ``t_min``."""
    if schedule.table_length is not None:
        return t
    first, last = own_range(schedule)
    return last_index(schedule) * (schedule.own_share(t) - first) / (last - first)


def at_index(schedule: Schedule, n: Tensor) -> Tensor:
    """The times at float64 places of :func:`own_index`, the ends of which are exactly those of the schedule."""
    end = last_index(schedule)
    first, last = own_range(schedule)
    t = n if schedule.table_length is not None else schedule.own_time(first + n / end * (last - first))
    return torch.where(n <= 0, schedule.t_min, torch.where(n >= end, schedule.t_max, t))


def own_range(schedule: Schedule) -> tuple[float, float]:
    """The shares of the family's own index at the two ends of a schedule."""
    first, last = schedule.own_share(torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64)).tolist()
    return first, last


def skipping(schedule: Schedule, skip: int, edges: Tensor | None = None) -> Tensor:
    """The falling times of a solver that takes ``skip`` steps of the :func:`own_index` at once: 999, 979, ..., 19, 0 of
    a table of 1000, for 20 (Latent Consistency Models).

    ``edges``, rising places in the index from 0 to its last, cut it into parts: the solver starts again at each.
    """
    cuts = [0.0, float(last_index(schedule))] if edges is None else edges.tolist()
    # counted, because places that are a rounding error apart are one
    counts = [math.ceil((high - low) / skip - 1e-6) for low, high in pairwise(cuts)]
    places = [high - skip * torch.arange(n, dtype=torch.float64) for n, high in zip(counts, cuts[1:], strict=True)]
    return check_grid(at_index(schedule, torch.cat([*reversed(places), torch.zeros(1, dtype=torch.float64)])))


#: Grids by name: functions of a schedule and a number of steps, and of parameters with defaults.
GRIDS: dict[str, Grid] = {
    "uniform": uniform,
    "quadratic": power,
    "log-snr": log_snr,
    "karras": karras,
    "shifted": shifted,
    "trailing": trailing,
    "balanced": balanced,
}
