"""Solvers and time grids by name: ``"unipc"``, ``"dpmpp-2m-sde:eta=0.5"``, ``"balanced:centre=2"``.

After a colon come parameters, ``name=value`` with commas between: the fields of the solver, or the arguments of the
grid function.  Everything that takes a name takes the object itself too.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from fewstep.grids import GRIDS, Grid, check_grid, to_data
from fewstep.sampling.abm import ABM
from fewstep.sampling.coefficients import DATA, NOISE
from fewstep.sampling.deis import IPNDM, TAB, RhoAB
from fewstep.sampling.dpm_solver import (
    Ancestral,
    DPMSolverPP2M,
    DPMSolverPP2MTaylor,
    DPMSolverPP3M,
    DPMSolverPP3MPublished,
    DPMSolverPPSDE,
    Fast,
    Single,
)
from fewstep.sampling.dualfast import DualFast
from fewstep.sampling.engine import Solver
from fewstep.sampling.runge_kutta import (
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
from fewstep.sampling.stochastic import DDIM, DDPMLarge
from fewstep.sampling.unipc import UniPC
from fewstep.schedules import Schedule

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

DEFAULT_STEPS = 10

ALL_GRIDS = GRIDS


def named_solver(solver: str | Solver) -> Solver:
    """A solver from its name and parameters; ValueError names the choices."""
    if isinstance(solver, Solver):
        return solver
    name, options = parsed("solver", solver, SOLVERS)
    made = SOLVERS[name]()
    fields = {f.name: getattr(made, f.name) for f in dataclasses.fields(made) if f.init}  # type: ignore[arg-type]
    try:
        return dataclasses.replace(made, **checked(f"solver={solver!r}", options, fields))  # type: ignore[type-var]
    except ValueError as error:
        raise ValueError(str(error)) from None


def named_grid(grid: str) -> Grid:
    """A grid function from its name and parameters; ValueError names the choices."""
    name, options = parsed("grid", grid, GRIDS)
    known = {
        p.name: p.default for p in inspect.signature(GRIDS[name]).parameters.values() if p.default is not p.empty
    }
    values = checked(f"grid={grid!r}", options, known)
    return partial(GRIDS[name], **values) if values else GRIDS[name]


def parsed(what: str, text: str, known: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """``name:key=value,key=value``; ValueError for a name that is not known and for a parameter without a value."""
    name, _, rest = text.partition(":")
    if name not in known:
        raise ValueError(f"{what}={name!r} is not known; choose one of {', '.join(sorted(known))}")
    pairs = [pair.partition("=") for pair in rest.split(",") if pair]
    for key, equals, value in pairs:
        if not equals or not value:
            raise ValueError(f"{what}={text!r}: '{key}' has no value; write {what}='{name}:{key}=...'")
    return name, {key: value for key, _, value in pairs}


def checked(where: str, options: dict[str, str], known: dict[str, Any]) -> dict[str, Any]:
    """The values in the types of the defaults; ValueError for an unknown parameter or a value of another type."""
    values: dict[str, Any] = {}
    for key, text in options.items():
        if key not in known:
            raise ValueError(f"{where}: '{key}' is not a parameter; it has {', '.join(known) or 'none'}")
        values[key] = _value(where, key, text, known[key])
    return values


def _value(where: str, key: str, text: str, default: Any) -> Any:
    if key == "form":
        if text not in FORMS:
            raise ValueError(f"{where}: form={text!r} must be 'data' or 'noise'")
        return FORMS[text]
    if isinstance(default, bool):
        if text not in ("true", "false"):
            raise ValueError(f"{where}: {key}={text!r} must be true or false")
        return text == "true"
    if isinstance(default, str):
        return text
    try:
        return int(text) if isinstance(default, int) else float(text)
    except ValueError:
        kind = "a whole number" if isinstance(default, int) else "a number"
        raise ValueError(f"{where}: {key}={text!r} must be {kind}") from None


FORMS = {"data": DATA, "noise": NOISE}


def named_times(schedule: Schedule, solver: Solver, steps: int | None, grid: str | Grid | Tensor | None) -> Tensor:
    """The times ``[steps + 1]`` of a grid given by name, as a function or as the times themselves; None is the solver's
    own grid.

    A named grid of a schedule that starts in noise (a table of betas) ends at pure data, unless its ``end`` is given.
    ValueError when ``steps`` contradicts given times.
    """
    if isinstance(grid, Tensor):
        times = check_grid(grid, schedule)
        if steps is not None and steps != len(times) - 1:
            raise ValueError(f"steps={steps}, but the given grid of {len(times)} times has {len(times) - 1} steps")
        return times
    steps = DEFAULT_STEPS if steps is None else steps
    if grid is None:
        return solver.grid(schedule, steps)
    if not isinstance(grid, str):
        return grid(schedule, steps)
    times = named_grid(grid)(schedule, steps)
    return to_data(times, schedule) if schedule.data_time < 0 and "end=" not in grid else times
