"""Every solver of fewstep as a drop-in diffusers scheduler, for pipelines as they are.

The class itself is in :mod:`fewstep.hub.solver_scheduler`, which imports diffusers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fewstep.hub.requires import require
from fewstep.hub.scheduler_config import plain_grid, replaced, written
from fewstep.sampling.engine import Solver


def as_scheduler(
    solver: str | Solver, like: Any, grid: str | Sequence[float] | Tensor | None = None, *, clean: bool = True
) -> Any:
    """A diffusers scheduler that samples with a solver of fewstep: ``pipe.scheduler = as_scheduler("unipc", pipe)``.

    ``solver`` is a name, with parameters if need be (``"unipc:p=3"``, see :mod:`fewstep.sampling.named`), or a solver.
    ``like`` says which model it serves: a diffusers scheduler, a pipeline, or a scheduler's config with its
    ``_class_name``.  Schedule, prediction, clipping and thresholding are read from it.

    ``grid`` is the times of the calls: None is the solver's own grid, with the pipeline's shift where it has one; a
    name with parameters; "original", the levels that the replaced scheduler visits; or the ``steps + 1`` times
    themselves, in the schedule's own time.  ``timesteps=`` and ``sigmas=`` of a pipeline's call go before it, except
    for the uniform sigmas that flow pipelines pass when nobody asked for any.  The last step ends at pure data,
    ``x = D``; with ``clean=False`` at the last time of the grid.

    The result is a :class:`~fewstep.hub.solver_scheduler.SolverScheduler` under the name of the class that it replaces.
    Its config is that of the replaced scheduler with ``solver``, ``grid`` and ``clean`` beside it, so a pipeline and
    ``from_config`` of another scheduler find what they look for.

    Raises ValueError with the choices on an unknown solver, grid or scheduler, on a solver that finds its steps as it
    goes ("dpm-12", "dpm-23"), and ModuleNotFoundError without diffusers.
    """
    require("diffusers", "as_scheduler")
    from fewstep.hub.solver_scheduler import in_place_of  # which imports diffusers

    original, _ = replaced(like, None, {})
    kind: Any = type(original)
    return in_place_of(kind)(original, written(solver), plain_grid(grid), clean)
