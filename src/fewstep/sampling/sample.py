"""``fs.sample``: data from a denoiser, with a solver and a grid by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Literal

import torch
from torch import Tensor, nn

from fewstep.denoisers import Clipped, Cond, Denoiser, DynamicThreshold, Guided, NetworkDenoiser
from fewstep.grids import Grid
from fewstep.randomness import Noise, Rng
from fewstep.sampling.brownian import BrownianPath
from fewstep.sampling.coefficients import Levels
from fewstep.sampling.engine import Solver, run
from fewstep.sampling.hooks import NO_HOOKS
from fewstep.sampling.named import named_solver, named_times
from fewstep.sampling.self_conditioning import SelfConditioning
from fewstep.schedules import align

Threshold = Literal["static", "dynamic"]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Switch dropout and its like off for a while; every submodule gets its own mode back."""
    training = [m for m in module.modules() if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    n: int,
    *,
    solver: str | Solver = "unipc",
    steps: int | None = None,
    grid: str | Grid | Tensor | None = None,
    cond: Cond = None,
    seed: int = 0,
    noise: Tensor | None = None,
    guidance: float | None = None,
    threshold: Threshold | None = None,
    denoise: bool = False,
    one_path: bool = False,
    self_conditioning: SelfConditioning | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """``n`` samples ``[n, *shape]`` on the device of the denoiser's weights.

    ``solver`` and ``grid`` are names (:data:`~fewstep.sampling.SOLVERS`, :data:`~fewstep.sampling.named.ALL_GRIDS`),
    with parameters if need be (:mod:`~fewstep.sampling.named`), or objects; ``grid`` may be the times themselves.
    ``steps`` (default 10) counts steps; a solver of k stages makes about k calls a step.  Class labels are cycled when
    the denoiser is conditional and ``cond`` is None.  ``noise`` ``[n, *shape]`` is standard normal; by default it is
    drawn from ``seed``, which also seeds stochastic solvers; with ``one_path`` they draw from one Brownian path, so
    that results with different ``steps`` can be compared sample by sample.  ``guidance`` w samples from
    ``unc + w (cond - unc)`` and doubles the calls.  ``threshold`` clips data predictions to [-1, 1] ("static") or to a
    quantile of their own ("dynamic"), for pixel models.  ``denoise`` adds a call at the last time and gives back what
    the network predicts there ("denoise to zero").  ``self_conditioning`` feeds its predictions back to a network that
    was trained for it.  ``progress(done, steps)`` is told after every step.

    Raises ValueError with the choices on an unknown name, on too few steps for a solver of third order or more, and on
    a mismatch between ``n``, ``noise``, ``cond`` and the denoiser.
    """
    if not isinstance(denoiser, Denoiser):
        raise ValueError(
            f"sample() takes a Denoiser, got {type(denoiser).__name__}; a student samples itself: student.sample(n)"
        )
    if n < 1:
        raise ValueError(f"n={n}: need at least one sample")
    if threshold not in (None, "static", "dynamic"):
        raise ValueError(f"threshold={threshold!r} must be 'static', 'dynamic' or None")
    solver, asked = named_solver(solver), solver
    times = named_times(denoiser.schedule, solver, steps, grid)
    if len(times) - 1 < solver.least_steps:
        raise ValueError(
            f"steps={len(times) - 1} are too few for solver {asked!r}, which needs {solver.least_steps} to reach its "
            "order; take more steps or a solver of lower order (unipc, dpmpp-2m, ddim)"
        )
    tensors = (t for t in chain(denoiser.parameters(), denoiser.buffers()) if t.is_floating_point())
    weights = next(tensors, torch.empty(0))
    device = weights.device if noise is None else noise.device
    rng = Rng(seed, "sample", device=device)
    if noise is None:
        precision = torch.float64 if weights.dtype == torch.float64 else torch.float32
        noise = rng.normal(n, *denoiser.shape, dtype=precision)
    elif noise.shape != (n, *denoiser.shape):
        raise ValueError(f"noise of shape {list(noise.shape)} does not fit {n} samples of {list(denoiser.shape)}")
    cond = _labels(denoiser, n, cond, device)
    hooks = NO_HOOKS
    if self_conditioning is not None:
        if not isinstance(denoiser, NetworkDenoiser):
            raise ValueError(f"self_conditioning needs a network, got a {type(denoiser).__name__}")
        denoiser, hooks = self_conditioning.attached(denoiser)
    if guidance is not None:
        if cond is None:
            raise ValueError(f"guidance={guidance} needs a conditional model: this one has no classes and cond is None")
        denoiser = Guided(denoiser, guidance)
    if threshold is not None:
        denoiser = Clipped(denoiser) if threshold == "static" else DynamicThreshold(denoiser)
    levels = Levels.of(denoiser.schedule, times)
    table = solver.table(levels.denoised() if denoise else levels)
    fresh: Noise = BrownianPath(seed, "sample", device=device) if one_path else rng
    start = denoiser.schedule.sigma(times[:1]).to(device)
    with evaluating(denoiser):
        return run(denoiser, align(start, noise) * noise, table, cond, fresh, hooks, progress)


def _labels(denoiser: Denoiser, n: int, cond: Cond, device: torch.device) -> Cond:
    if cond is None:
        return torch.arange(n, device=device) % denoiser.classes if denoiser.classes else None
    if isinstance(cond, Tensor) and len(cond) != n:
        raise ValueError(f"cond holds {len(cond)} conditions for {n} samples")
    if denoiser.classes and isinstance(cond, Tensor) and not cond.is_floating_point():
        if int(cond.min()) < -1 or int(cond.max()) >= denoiser.classes:
            raise ValueError(
                f"cond: labels must lie in 0 .. {denoiser.classes - 1} (-1 for none), got "
                f"{int(cond.min())} .. {int(cond.max())}"
            )
        return cond.to(device)
    return cond
