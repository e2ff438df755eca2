"""Samples by a solver, as ``fewstep sample`` makes them: guidance, settings and statistics from files, and the cost."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fewstep.cli.conditions import conditions, seeds, takes_guidance
from fewstep.cli.errors import UserError, choose
from fewstep.cli.inputs import extras_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fewstep.cli.models import Named
    from fewstep.denoisers import CountCalls, Denoiser
    from fewstep.models.denoisers import AnyDenoiser
    from fewstep.sampling import Solver


@contextmanager
def counted(module: nn.Module) -> Iterator[list[None]]:
    """A list that grows by one with every call of the module inside the context."""
    calls: list[None] = []
    hook = module.register_forward_pre_hook(lambda *_: calls.append(None))
    try:
        yield calls
    finally:
        hook.remove()


def by_solver(found: Named, chosen: argparse.Namespace) -> tuple[Tensor, int, int]:
    """Samples, steps and network calls of a solver."""
    from fewstep.grids import GRIDS
    from fewstep.sampling import sample
    from fewstep.sampling.named import ALL_SOLVERS

    kind: AnyDenoiser = found.kind  # type: ignore[assignment]  # the kinds that take a solver
    model = kind.inner
    extras_of(kind, chosen.model, chosen.extra)  # a teacher takes none
    if chosen.settings is not None:
        take_settings(chosen)
    grid = chosen.grid
    if chosen.statistics is None:
        solver: str | Solver = "abm" if chosen.solver is None else chosen.solver
        if isinstance(solver, str):
            choose("solver", solver.partition(":")[0], sorted(ALL_SOLVERS))
    else:
        solver = with_statistics(model, chosen)
    if grid is not None:
        choose("grid", grid.partition(":")[0], sorted(GRIDS))
    cond, negative = conditions(chosen, found.model)
    options = {}
    if kind.feedback is None:
        model, guides = guided(model, negative, chosen)
    else:  # guidance goes around the feedback
        guides, options = [], {"guidance": chosen.guidance, "self_conditioning": kind.feedback}
    steps: list[int] = []
    with counted(kind.inner) as calls:
        x = sample(
            model, chosen.n, solver=solver, steps=chosen.steps, grid=grid, cond=cond, seed=chosen.seed,
            seeds=seeds(chosen), threshold=chosen.threshold, denoise=chosen.denoise, one_path=chosen.one_path,
            progress=lambda done, total: steps.append(done), **options,
        )  # fmt: skip
    return x, len(steps), len(calls) + sum(guide.calls for guide in guides)


def with_statistics(model: Denoiser, chosen: argparse.Namespace) -> Solver:
    """DPM-Solver-v3 with the statistics of ``--statistics``, which must be those of this model under this guidance."""
    from fewstep.guidance import Guided
    from fewstep.hub import model_statistics
    from fewstep.sampling.solvers.dpm_solver_v3 import DPMSolverV3

    if chosen.solver is not None:
        raise UserError("--statistics FILE samples with DPM-Solver-v3: leave out --solver")
    if chosen.guide is not None or chosen.interval is not None:
        raise UserError("--statistics FILE knows no --guide and no --interval")
    seen = model if chosen.guidance is None else Guided(model, chosen.guidance)
    return DPMSolverV3(model_statistics.load(chosen.statistics, seen))


def guided(model: Denoiser, negative: Any, chosen: argparse.Namespace) -> tuple[Denoiser, list[CountCalls]]:
    """The model under ``--guidance`` (away from ``negative``), ``--guide`` and ``--interval``, and the guides, whose
    calls count too."""
    from fewstep.cli.models import named_model
    from fewstep.cli.runs import device_of
    from fewstep.denoisers import CountCalls
    from fewstep.guidance import Autoguided, Guidance, GuidanceInterval, Guided

    if chosen.guidance is None:
        for flag in ("guide", "interval"):
            if getattr(chosen, flag) is not None:
                raise UserError(f"--{flag} needs --guidance X, the weight")
        return model, []
    steered: Guidance
    guides = []
    if chosen.guide is not None:
        weak = named_model(chosen.guide, chosen.size)
        try:
            guides.append(CountCalls(weak.kind.denoiser().to(device_of(chosen.device))))
        except ValueError:
            raise UserError(f"--guide {chosen.guide}: {weak.kind.called} cannot guide, name a worse teacher") from None
        steered = Autoguided(model, guides[0], chosen.guidance)
    elif takes_guidance(model):
        if chosen.interval is not None:
            raise UserError(f"--interval: '{chosen.model}' takes its guidance as an input, at every noise level")
        return model, []  # it is in the condition
    else:
        if chosen.prompt is None and chosen.cond is None and not model.classes:
            raise UserError(f"--guidance {chosen.guidance:g}: '{chosen.model}' has no classes to guide to")
        steered = Guided(model, chosen.guidance, negative)
    if chosen.interval is None:
        return steered, guides
    low, comma, high = chosen.interval.partition(",")
    try:
        bounds = float(low), float(high)
    except ValueError:
        comma = ""
    if not comma:
        raise UserError(f"--interval {chosen.interval}: give two noise levels, such as 0.2,5 or 0.2,inf")
    return GuidanceInterval(steered, *bounds), guides


def take_settings(chosen: argparse.Namespace) -> None:
    """Fill in what ``fewstep tune-steps`` found; :class:`UserError` beside flags that say the same, or a wrong file."""
    from fewstep.hub.settings import load_settings

    for flag in ("solver", "grid", "steps", "threshold"):
        if getattr(chosen, flag) is not None:
            raise UserError(f"--{flag} stands in {chosen.settings} already: leave out one of the two")
    found = load_settings(chosen.settings)
    for flag in ("solver", "grid", "steps", "threshold"):
        setattr(chosen, flag, found[flag])
    if chosen.guidance is None:
        chosen.guidance = found["guidance"]
    elif not isinstance(chosen.solver, str) and chosen.guidance != found["guidance"]:
        taught = "no guidance" if found["guidance"] is None else f"guidance {found['guidance']:g}"
        raise UserError(f"--guidance {chosen.guidance:g}: the solver in {chosen.settings} was learned at {taught}")
