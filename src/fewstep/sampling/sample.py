"""``fs.sample``: data from a denoiser, with a solver and a grid by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from fewstep.denoisers import Clipped, Cond, Denoiser, DynamicThreshold, networks_in
from fewstep.guidance import Guided
from fewstep.sampling.engine import Solver
from fewstep.sampling.hooks import NO_HOOKS
from fewstep.sampling.inputs import Generators, Numbers, evaluating, guidance_of, start_of
from fewstep.sampling.named import AnyGrid, named_solver, named_times
from fewstep.sampling.self_conditioning import SelfConditioning
from fewstep.schedules import align

Threshold = Literal["static", "dynamic"]


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    n: int,
    *,
    solver: str | Solver = "abm",
    steps: int | None = None,
    grid: AnyGrid = None,
    cond: Cond = None,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    generator: Generators | None = None,
    noise: Numbers | None = None,
    size: tuple[int, int] | None = None,
    guidance: float | Numbers | None = None,
    threshold: Threshold | None = None,
    denoise: bool = False,
    one_path: bool = False,
    self_conditioning: SelfConditioning | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """``n`` samples ``[n, *shape]`` on the device of the denoiser's weights.

    ``solver`` and ``grid`` are names (:data:`~fewstep.sampling.SOLVERS`, :data:`~fewstep.sampling.grids.GRIDS`),
    with parameters if need be (:mod:`~fewstep.sampling.named`), or objects; ``grid`` may be the times themselves.
    ``steps`` (default 10) counts steps; a solver of k stages makes about k calls a step.  An adaptive one ("dpm-12",
    "dpm-23") finds its own: leave ``steps`` out; :class:`~fewstep.denoisers.CountCalls` tells the calls.  Class labels
    ``cond`` ``[n]`` are cycled when the denoiser is conditional and ``cond`` is None.

    ``noise`` ``[n, *shape]`` is standard normal; by default it is drawn from ``seed``, which also seeds stochastic
    solvers.  ``seeds`` are one a sample: then sample k does not depend on how many are drawn with it, and is that of
    ``sample(denoiser, 1, seed=seeds[k])``.  ``generator`` is a ``torch.Generator`` in the place of the seed, or one a
    sample, and draws as diffusers' pipelines do.  With ``one_path`` stochastic solvers draw from one Brownian path (one
    a sample), so that results with different ``steps`` can be compared sample by sample.

    ``size`` is the height and width in pixels of the pictures, of models that were read from a diffusers pipeline
    (default: their own).  ``guidance`` w, a number or one a sample ``[n]``, samples from ``unc + w (cond - unc)`` and
    doubles the calls.  ``threshold`` clips data predictions to [-1, 1] ("static") or to a quantile of their own
    ("dynamic"), for pixel models.  ``denoise`` adds a call at the last time and gives back what the network predicts
    there ("denoise to zero").  ``self_conditioning`` feeds its predictions back to a network that was trained for it.
    ``progress(done, steps)`` is told after every step.

    The state has the type of the weights (a world, which has none, takes that of ``noise``); in half precision the
    solver works in float32 and the network is called in half.

    Raises ValueError with the choices on an unknown name, on too few steps for a solver of third order or more, on a
    number out of range or not finite, and on a mismatch between ``n``, ``noise``, ``cond``, ``seeds`` and the denoiser;
    TypeError for an argument of another kind.  Lists and arrays stand for tensors.
    """
    if not isinstance(denoiser, Denoiser):
        raise ValueError(
            f"sample() takes a Denoiser, got {type(denoiser).__name__}; a student samples itself: student.sample(n)"
        )
    if threshold not in (None, "static", "dynamic"):
        raise ValueError(f"threshold={threshold!r} must be 'static', 'dynamic' or None")
    for name, flag in (("denoise", denoise), ("one_path", one_path)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name}={flag!r} must be True or False")
    if progress is not None and not callable(progress):
        raise TypeError(f"progress={progress!r} must be a function of (done, steps)")
    if size is not None:
        denoiser = at_size(denoiser, size)
    start = start_of(denoiser, n, cond, noise=noise, seed=seed, seeds=seeds, generator=generator, one_path=one_path)
    x, cond = start.noise, start.cond
    hooks = NO_HOOKS
    if self_conditioning is not None:
        if not isinstance(self_conditioning, SelfConditioning):
            raise TypeError(f"self_conditioning={self_conditioning!r} must be a SelfConditioning")
        if denoiser.network is None:
            raise ValueError(f"self_conditioning needs a network, got a {type(denoiser).__name__}")
        denoiser, hooks = self_conditioning.attached(denoiser.network)
    denoiser = steered(denoiser, len(x), cond, guidance, threshold)
    solver, times = laid_out(denoiser, solver, steps, grid)
    scale = denoiser.schedule.sigma(times[:1]).to(x.device)
    with evaluating(denoiser):
        return solver.move(denoiser, align(scale, x) * x, times, cond, start.fresh, hooks, progress, denoise)


def steered(
    denoiser: Denoiser, n: int, cond: Cond, guidance: float | Numbers | None, threshold: Threshold | None
) -> Denoiser:
    """The denoiser under guidance and thresholding, for ``n`` samples; ValueError for guidance without conditions."""
    if guidance is not None:
        if cond is None:
            raise ValueError(f"guidance={guidance} needs a conditional model: this one has no classes and cond is None")
        denoiser = Guided(denoiser, guidance_of(guidance, n))
    if threshold is not None:
        denoiser = Clipped(denoiser) if threshold == "static" else DynamicThreshold(denoiser)
    return denoiser


def laid_out(denoiser: Denoiser, solver: str | Solver, steps: int | None, grid: AnyGrid) -> tuple[Solver, Tensor]:
    """The solver for a model (with its guidance) and its times; ValueError for too few steps."""
    made = named_solver(solver).fitted_to(denoiser)
    times = named_times(denoiser.schedule, made, steps, grid)
    if len(times) - 1 < made.least_steps:
        raise ValueError(
            f"steps={len(times) - 1} are too few for solver {solver!r}, which needs {made.least_steps} to reach its "
            "order; take more steps or a solver of lower order (abm, unipc, dpmpp-2m, ddim)"
        )
    return made, times


def at_size(denoiser: Denoiser, size: tuple[int, int]) -> Denoiser:
    """The same denoiser, making pictures of ``size`` pixels; its network says what shape they are."""
    try:
        shape_of = networks_in(denoiser)[0].net.shape_of
    except (IndexError, AttributeError):
        raise ValueError(
            f"size={size[0]}x{size[1]}: only models read from a diffusers pipeline make other sizes than their own"
        ) from None
    other = copy.copy(denoiser)
    other.shape = shape_of(size)
    return other
