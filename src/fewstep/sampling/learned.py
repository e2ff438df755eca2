"""A solver whose times and coefficients are numbers of its own, and any multistep solver written as one.

Every deterministic table is linear in the start ``x_0`` and the data predictions ``D_j``, so after ``i`` calls

    x_i = A_i x_0 + sum_(j<i) B_ij D_j,        that is        x_(i+1) = a_i x_i + sum_(j<=i) c_ij D_j,

whatever the history holds and whether steps are corrected (Shaul et al. 2024, "Bespoke Non-Stationary Solvers", arXiv
2403.01329).  N calls are ``N (N + 3) / 2`` coefficients and N times.  :mod:`fewstep.sampling.learning` fits them to a
model.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fewstep.denoisers import Cond, Denoiser
from fewstep.sampling.coefficients import Levels
from fewstep.sampling.engine import Solver, Stage, Step, Table, run
from fewstep.sampling.rows import Row
from fewstep.schedules import Schedule, described


def schedule_id(schedule: Schedule) -> str:
    """The name of a schedule and eight hexadecimal digits that tell its parameters: equal for equal schedules."""
    text = json.dumps(described(schedule), sort_keys=True)
    return f"{type(schedule).__name__}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class LearnedSolver(Solver):
    """One call at each of ``times`` (falling, from the schedule's ``t_max``) and the row that follows it.

    ``rows[i]`` is ``(a, c_0, .., c_i)`` of ``x' = a x + sum_j c_j D_j``, the latest prediction first; the last row ends
    where the solver was taught to end.  ``schedule`` is the :func:`schedule_id` of the only schedule that it is for.
    ValueError for times that do not fall, rows of a wrong length, and numbers that are not finite.
    """

    schedule: str
    times: tuple[float, ...]
    rows: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.times:
            raise ValueError("LearnedSolver: times is empty: a solver calls the network once at least")
        if len(self.times) != len(self.rows):
            raise ValueError(f"LearnedSolver: {len(self.times)} times and {len(self.rows)} rows: need one row a time")
        for i, row in enumerate(self.rows):
            if len(row) != i + 2:
                raise ValueError(f"LearnedSolver: rows[{i}] has {len(row)} numbers, need {i + 2}: a and c_0 to c_{i}")
        if any(t <= s for t, s in pairwise(self.times)):
            raise ValueError(f"LearnedSolver: times must fall strictly, got {list(self.times)}")

    @property
    def order(self) -> int:
        """1: with one grid only, there is nothing that could converge."""
        return 1

    @property
    def least_steps(self) -> int:
        return len(self.times)

    @property
    def usual_steps(self) -> int:
        return len(self.times)

    def grid(self, schedule: Schedule, steps: int, shift: float = 1.0) -> Tensor:
        """Its times and that of pure data, whatever the ``shift``.  ValueError for another number of steps than its
        own, or another schedule."""
        self.check(schedule)
        if steps != len(self.times):
            raise ValueError(f"steps={steps}: this solver was learned for {len(self.times)} steps")
        return torch.tensor([*self.times, schedule.data_time], dtype=torch.float64)

    def check(self, schedule: Schedule) -> None:
        """ValueError unless it was learned on this schedule."""
        if schedule_id(schedule) != self.schedule:
            raise ValueError(
                f"this solver was learned on the schedule {self.schedule}, the model is on {schedule_id(schedule)}: "
                "learn it again for this model"
            )

    def table(self, levels: Levels) -> Table:
        """Its rows.  ValueError for another schedule, or other times than its own."""
        self.check(levels.schedule)
        if levels.times[:-1] != self.times:
            raise ValueError(
                f"a learned solver has times of its own, {len(self.times)} calls from {self.times[0]:g}: leave out the "
                "grid, the start and the last call that were asked for"
            )
        rows = (Row(a, tuple(c)) for a, *c in self.rows)
        return Table(levels, [Step((Stage(t, row),)) for t, row in zip(self.times, rows, strict=True)])


class UnitPredictions(Denoiser):
    """Predicts the k-th unit vector at call k and keeps the states and times that it was shown: run on unit vectors,
    the engine works with the coordinates ``(A, B_0, .., B_(N-1))`` of its states."""

    def __init__(self, schedule: Schedule, calls: int) -> None:
        super().__init__(schedule, (calls + 1,))
        self.states: list[Tensor] = []
        self.times: list[float] = []

    def forward(self, x: Tensor, t: Tensor | float, cond: Cond = None) -> Tensor:
        self.states.append(x)
        self.times.append(float(torch.as_tensor(t).flatten()[0]))
        unit = torch.zeros_like(x)
        unit[:, len(self.states)] = 1
        return unit


def folded(table: Table) -> LearnedSolver:
    """A deterministic table as a :class:`LearnedSolver` that makes the same states from the same predictions.

    ValueError for a table that draws noise, has coefficients for every pixel, or whose calls do not fall in time (two
    stages at one level).
    """
    if table.noisy or table.by_element:
        raise ValueError("only a deterministic solver with one coefficient for all pixels can be written as rows")
    seen = UnitPredictions(table.schedule, table.calls)
    start = torch.zeros(1, table.calls + 1, dtype=torch.float64)
    start[0, 0] = 1
    end = run(seen, start, table)
    rows = []
    for i, (x, after) in enumerate(pairwise([*seen.states, end])):
        a = float(after[0, 0] / x[0, 0])
        coordinates = (after - a * x)[0, 1 : i + 2].flip(0)
        rows.append((a, *coordinates.tolist()))
    return LearnedSolver(schedule_id(table.schedule), tuple(seen.times), tuple(rows))
