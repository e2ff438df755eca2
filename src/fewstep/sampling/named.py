"""Solvers and time grids by name: ``"unipc"``, ``"dpmpp-2m-sde:eta=0.5"``, ``"balanced:centre=2"``.

After a colon come parameters, ``name=value`` with commas between: the fields of the solver, or the arguments of the
grid function.  Runge-Kutta solvers take EDM's churn as ``"heun:churn=40,churn_low=0.05,churn_high=50,
churn_noise=1.003"`` (S_churn, S_min, S_max and S_noise; :class:`~fewstep.sampling.Churn`).  Everything that takes a
name takes the object itself too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, get_origin, get_type_hints

import numpy as np
from torch import Tensor

from fewstep.grids import GRIDS, AnyTimes, Grid, check_grid, check_steps, to_data
from fewstep.sampling.coefficients import DATA, NOISE, Form
from fewstep.sampling.engine import Solver
from fewstep.sampling.solvers.abm import ABM
from fewstep.sampling.solvers.adaptive import AdaptiveDPMSolver
from fewstep.sampling.solvers.deis import IPNDM, TAB, RhoAB
from fewstep.sampling.solvers.dpm_solver import (
    Ancestral,
    DPMSolverPP2M,
    DPMSolverPP2MTaylor,
    DPMSolverPP3M,
    DPMSolverPP3MPublished,
    DPMSolverPPSDE,
    Fast,
    Single,
)
from fewstep.sampling.solvers.dualfast import DualFast
from fewstep.sampling.solvers.runge_kutta import (
    EULER,
    HEUN2,
    HEUN3,
    HOUWEN3,
    KUTTA3,
    MIDPOINT,
    NATIVE,
    RALSTON3,
    RK4,
    SSP3,
    RungeKutta,
)
from fewstep.sampling.solvers.stochastic import DDIM, Churn, DDPMLarge
from fewstep.sampling.solvers.unipc import UniPC
from fewstep.schedules import Schedule
from fewstep.values import declared, read

#: A grid by name, as a function or as the times themselves; None is the default.
AnyGrid = str | Grid | AnyTimes | None

#: Solvers by name: constructors that take the solver's hyper-parameters.
SOLVERS: dict[str, Callable[..., Solver]] = {
    "euler": partial(RungeKutta, EULER, NATIVE),
    "euler-ancestral": partial(DDIM, eta=1.0),
    "ddim": DDIM,
    "ddpm": partial(DDIM, eta=1.0),
    "ddpm-large": DDPMLarge,
    "heun": partial(RungeKutta, HEUN2),
    "heun-native": partial(RungeKutta, HEUN2, NATIVE),
    "midpoint": partial(RungeKutta, MIDPOINT),
    "kutta3": partial(RungeKutta, KUTTA3),
    "heun3": partial(RungeKutta, HEUN3),
    "ralston3": partial(RungeKutta, RALSTON3),
    "houwen3": partial(RungeKutta, HOUWEN3),
    "ssp3": partial(RungeKutta, SSP3),
    "rk4": partial(RungeKutta, RK4),
    "dpm2": partial(Single, 2, NOISE),
    "dpm3": partial(Single, 3, NOISE),
    "dpm2-ancestral": partial(Ancestral, NOISE),
    "dpm-2m": partial(DPMSolverPP2M, form=NOISE),
    "dpmpp-2s": Single,
    "dpmpp-3s": partial(Single, 3),
    "dpmpp-2s-ancestral": Ancestral,
    "dpmpp-2s-fast": partial(Fast, 2),
    "dpmpp-3s-fast": Fast,
    "dpmpp-2m": DPMSolverPP2M,
    "dpmpp-2m-taylor": DPMSolverPP2MTaylor,
    "dpmpp-3m": DPMSolverPP3M,
    "dpmpp-3m-published": DPMSolverPP3MPublished,
    "dpmpp-sde": DPMSolverPPSDE,
    "dpmpp-2m-sde": partial(DPMSolverPP2M, eta=1.0),
    "dpmpp-3m-sde": partial(DPMSolverPP3M, eta=1.0),
    "abm": ABM,
    "abm-1": partial(ABM, p=1),
    "abm-3": partial(ABM, p=3),
    "abm-4": partial(ABM, p=4),
    "abm-sde": partial(ABM, corrector=False, eta=1.0),
    "unipc": UniPC,
    "unipc-1": partial(UniPC, p=1),
    "unipc-3": partial(UniPC, p=3),
    "deis": TAB,
    "deis-1": partial(TAB, degree=1),
    "deis-2": partial(TAB, degree=2),
    "rho-ab-1": partial(RhoAB, degree=1),
    "rho-ab-2": partial(RhoAB, degree=2),
    "lms": RhoAB,
    "ipndm": IPNDM,
    "dualfast": DualFast,
    "dualfast-2m": partial(DualFast, DPMSolverPP2M(), weight=0.05),
    "dualfast-deis": partial(DualFast, TAB(), weight=0.05),
}

#: Solvers that find their steps as they go: no table, and no scheduler can be made of them.
ADAPTIVE: dict[str, Callable[..., Solver]] = {
    "dpm-12": partial(AdaptiveDPMSolver, 2),
    "dpm-23": AdaptiveDPMSolver,
}
ALL_SOLVERS = SOLVERS | ADAPTIVE


def named_solver(solver: str | Solver) -> Solver:
    """A solver from its name and parameters; ValueError names the choices."""
    if isinstance(solver, Solver):
        return solver
    if not isinstance(solver, str):
        raise TypeError(f"solver={solver!r} must be a name such as 'unipc', or a Solver")
    name, words = parsed("solver", solver, ALL_SOLVERS)
    made = ALL_SOLVERS[name]()
    if not words:
        return made
    kinds = {name: kind for name, kind in declared(type(made)).items() if readable(kind)}
    fields = values_of(f"solver={solver!r}", words, kinds | (CHURN if "churn" in declared(type(made)) else {}))
    churn = {CHURN_FIELDS[key]: fields.pop(key) for key in list(fields) if key in CHURN_FIELDS}
    if churn:
        fields["churn"] = Churn(**churn)
    return dataclasses.replace(made, **fields)  # type: ignore[type-var]


#: The parameters of EDM's churn, behind the name of a Runge-Kutta solver.
CHURN_FIELDS = {"churn": "amount", "churn_low": "low", "churn_high": "high", "churn_noise": "inflation"}
CHURN = dict.fromkeys(CHURN_FIELDS, float)


def named_grid(grid: str) -> Grid:
    """A grid function from its name and parameters; ValueError names the choices."""
    name, words = parsed("grid", grid, GRIDS)
    hints = get_type_hints(GRIDS[name])
    kinds = {name: kind for name, kind in hints.items() if readable(kind) and name != "steps"}
    values = values_of(f"grid={grid!r}", words, kinds)
    return partial(GRIDS[name], **values) if values else GRIDS[name]


def parsed(what: str, text: str, known: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """``name:key=value,key=value``; ValueError for a name that is not known, and for a parameter without a value or
    given twice."""
    name, colon, rest = text.partition(":")
    if name not in known:
        raise ValueError(f"{what}={name!r} is not known; choose one of {', '.join(sorted(known))}")
    words: dict[str, str] = {}
    for pair in rest.split(",") if colon else ():
        key, _, value = (part.strip() for part in pair.partition("="))
        if not value:
            raise ValueError(f"{what}={text!r}: '{key}' has no value; write {what}='{name}:{key or 'parameter'}=...'")
        if key in words:
            raise ValueError(f"{what}={text!r}: '{key}' is given twice")
        words[key] = value
    return name, words


def values_of(where: str, words: dict[str, str], kinds: dict[str, Any]) -> dict[str, Any]:
    """The words in their types; ValueError for an unknown parameter or a value of another type."""
    values: dict[str, Any] = {}
    for key, word in words.items():
        if key not in kinds:
            raise ValueError(f"{where}: '{key}' is not a parameter; it has {', '.join(kinds) or 'none'}")
        try:
            values[key] = read_form(word) if kinds[key] is Form else read(kinds[key], word)
        except ValueError as error:
            raise ValueError(f"{where}: {key}: {error}") from None
    return values


def readable(kind: Any) -> bool:
    """Whether a word can stand for a value of this type: not for a tableau, or a solver inside a solver."""
    return kind is Form or get_origin(kind) is not None or kind in (bool, int, float, str)


def read_form(word: str) -> Form:
    """ "data" or "noise"."""
    forms: dict[str, Form] = {"data": DATA, "noise": NOISE}
    if word not in forms:
        raise ValueError(f"'{word}' is not data or noise")
    return forms[word]


def named_times(schedule: Schedule, solver: Solver, steps: int | None, grid: AnyGrid) -> Tensor:
    """The times ``[steps + 1]`` of a grid given by name, as a function or as the times themselves; None is the solver's
    own grid.

    A named grid of a schedule that starts in noise (a table of betas) ends at pure data, unless its ``end`` is given.
    ValueError when ``steps`` contradicts given times, TypeError for what is neither.
    """
    if isinstance(grid, Tensor | Sequence | np.ndarray) and not isinstance(grid, str):
        times = check_grid(grid, schedule)
        if steps is not None and steps != len(times) - 1:
            raise ValueError(f"steps={steps}, but the given grid of {len(times)} times has {len(times) - 1} steps")
        return times
    steps = solver.usual_steps if steps is None else check_steps(steps)
    if not (grid is None or isinstance(grid, str) or callable(grid)):
        raise TypeError(f"grid={grid!r} must be a name such as 'karras', a function or the times themselves")
    return _made_times(schedule, solver, steps, grid).clone()


@lru_cache(maxsize=64)
def _made_times(schedule: Schedule, solver: Solver, steps: int, grid: str | Grid | None) -> Tensor:
    if grid is None:
        return solver.grid(schedule, steps)
    make = named_grid(grid) if isinstance(grid, str) else grid
    try:
        times = check_grid(make(schedule, steps), schedule)
    except ValueError as error:
        if not isinstance(grid, str):
            raise
        raise ValueError(f"grid={grid!r} with steps={steps}: {error}") from None
    if len(times) != steps + 1:
        raise ValueError(f"grid={grid!r} gave {len(times)} times for steps={steps}, which need {steps + 1}")
    to_the_data = isinstance(grid, str) and schedule.data_time < 0 and "end=" not in grid
    return to_data(times, schedule) if to_the_data else times
