"""The config of a scheduler that plays one of fewstep's solvers: the solver as plain JSON beside what was replaced.

Nothing here imports diffusers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from inspect import signature
from operator import attrgetter
from typing import Any, get_args, get_type_hints

from torch import Tensor

from fewstep.hub.requires import require
from fewstep.hub.schedulers import READ
from fewstep.sampling.engine import Solver
from fewstep.sampling.named import named_grid, named_solver

#: The grid that the replaced scheduler makes, beside the names in :data:`fewstep.grids.GRIDS`.
ORIGINAL = "original"
#: The keys of our own in a scheduler's config, beside those of the scheduler that it replaces.
DEFAULTS: dict[str, Any] = {"solver": "abm", "grid": None, "clean": True}
OWN = tuple(DEFAULTS)
#: The keys that say what the model is.  Where a class has them by default they are its model all the same, and are
#: handed on to classes with other defaults.
MODEL = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
    "rescale_betas_zero_snr", "snr_shift_scale", "clip_sample", "clip_sample_range", "thresholding",
    "dynamic_thresholding_ratio", "sample_max_value", "timestep_spacing", "steps_offset", "use_flow_sigmas",
    "flow_shift", "shift", "sigma_min", "sigma_max", "sigma_data",
)  # fmt: skip


def replaced(like: Any, kind: Any, changes: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The scheduler of diffusers that ``like`` (a scheduler, a pipeline, a config) describes, with ``changes`` to its
    config, and those of them that it does not know.

    ``kind`` is the class to make; None is the one that ``like`` is of.
    """
    diffusers = require("diffusers", "as_scheduler")
    if isinstance(like, diffusers.DiffusionPipeline):
        like = like.scheduler
    if isinstance(like, diffusers.SchedulerMixin):
        like = plain_config(like.config, type(like).__name__)
    if not isinstance(like, Mapping):
        raise ValueError(f"like={type(like).__name__}: give a diffusers scheduler, a pipeline, or a scheduler's config")
    name = class_of(like) if kind is None else kind.__name__
    if name not in READ:
        raise ValueError(f"scheduler class {name!r} is unknown; fewstep replaces {', '.join(READ)}")
    config = {key: value for key, value in plain_config(like, name).items() if key not in OWN}
    made: tuple[Any, dict[str, Any]] = attrgetter(name)(diffusers).from_config(
        config, return_unused_kwargs=True, **changes
    )
    return made


def class_of(config: Mapping[str, Any]) -> str:
    """The class that a config is of: the one it names, else the first with these very parameters (classes that share
    them share the model); ValueError when there is none."""
    if "_class_name" in config:
        return str(config["_class_name"])
    diffusers = require("diffusers", "as_scheduler")
    keys = {key for key in config if not key.startswith("_")} - set(OWN)
    for name in READ:
        if keys == signature(attrgetter(name)(diffusers)).parameters.keys():
            return name
    raise ValueError("the config has no _class_name that says which scheduler it is of; give the scheduler itself")


def plain_config(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The config of a scheduler of class ``name``, in which the model does not count as left at its default."""
    plain = {key: value for key, value in config.items() if key != "_use_default_values"}
    unset = [key for key in config.get("_use_default_values", ()) if key not in MODEL]
    return {**plain, "_class_name": name, **({"_use_default_values": unset} if unset else {})}


def plain_grid(grid: str | Sequence[float] | Tensor | None) -> str | list[float] | None:
    """A grid as plain JSON; ValueError when it is not known, or a function."""
    if isinstance(grid, str):
        if grid != ORIGINAL:
            named_grid(grid)  # refuses what does not exist
        return grid
    if grid is None or isinstance(grid, Sequence | Tensor):
        return None if grid is None else [float(t) for t in grid]
    raise ValueError(f"grid={grid!r}: give a name or the times themselves, a function cannot be kept in a config")


def written(solver: str | Mapping[str, Any] | Solver) -> str | dict[str, Any] | Solver:
    """A solver as plain JSON: its name as it is, else its class and what differs from the defaults.

    A solver that holds more than numbers (the statistics of DPM-Solver-v3) stays itself, and cannot be saved.
    """
    if isinstance(solver, str):
        named_solver(solver)  # refuses what does not exist
        return solver
    if isinstance(solver, Mapping):
        return dict(solver)
    try:
        value: dict[str, Any] = _to_json(solver)
    except TypeError:
        return solver
    return value


def read(value: str | Mapping[str, Any] | Solver) -> Solver:
    """The solver that :func:`written` wrote."""
    if not isinstance(value, Mapping):
        return named_solver(value)
    solver: Solver = _from_json(dict(value), Solver)
    return solver


def _to_json(value: Any) -> Any:
    """Nested dataclasses as dicts with their "class"; what has its default value is left out."""
    if is_dataclass(value):
        kept = {}
        for field in fields(value):
            default = field.default if field.default_factory is MISSING else field.default_factory()
            given = _to_json(vars(value)[field.name])
            if default is MISSING or given != _to_json(default):
                kept[field.name] = given
        return {"class": type(value).__name__, **kept}
    if isinstance(value, tuple | list):
        return [_to_json(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a {type(value).__name__} is not plain JSON")


def _from_json(value: Any, hint: Any) -> Any:
    if isinstance(value, list):
        return tuple(_from_json(v, Any) for v in value)
    if not isinstance(value, dict):
        return value
    settings = {key: inner for key, inner in value.items() if key != "class"}
    kind = _subclass(get_args(hint) or (hint,), value.get("class"))
    hints = {} if kind is None else get_type_hints(kind)
    if kind is None or settings.keys() - hints.keys():
        raise ValueError(f"the config of a SolverScheduler holds {value}, which this version does not know")
    return kind(**{key: _from_json(inner, hints[key]) for key, inner in settings.items()})


def _subclass(bases: Iterable[Any], name: str | None) -> Any:
    """The class called ``name`` among classes and all that derive from them; None when there is none."""
    for base in bases:
        if isinstance(base, type) and base is not type(None):
            found = base if base.__name__ == name else _subclass(base.__subclasses__(), name)
            if found is not None:
                return found
    return None
