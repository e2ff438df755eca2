"""``fs.sample``: data from a denoiser, with a solver and a grid by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from fewstep.denoisers import Cond, Denoiser, Guided
from fewstep.grids import GRIDS, Grid, check_grid
from fewstep.randomness import Rng
from fewstep.sampling.coefficients import NOISE
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
from fewstep.sampling.engine import Solver, solve
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
from fewstep.schedules import Schedule, align

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


def balanced(schedule: Schedule, steps: int, centre: float = 1.0, kappa: float = 1.5) -> Tensor:
    """Equally spaced in ``u^(1 / kappa)``, ``u = rho / (rho + centre)``, down to time 0 where that is pure data.

    ``u`` is flow matching's time when ``centre = 1``: half the grid lies above the noise level ``centre``, about the
    standard deviation of the data, and neither end is singular, so one rule serves every schedule.  Measured with the
    exact denoisers of a ring of Gaussians and of a mixture on digits, 5 to 20 calls: DPM-Solver++ 2M and UniPC make
    1.6 to 30 times smaller errors on it than on Karras' grid (rho 7, from 0.002, then 0).
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: a grid needs at least one step")
    ends = torch.tensor([schedule.t_max, schedule.t_min], dtype=torch.float64)
    ratio = schedule.ratio(ends)
    first, last = ((ratio / (ratio + centre)) ** (1 / kappa)).tolist()
    to_data = float(schedule.sigma(ends.new_zeros(()))) == 0
    if to_data and first / steps >= last:
        v = torch.linspace(first, 0, steps + 1, dtype=torch.float64)[1:-1]
    elif to_data:  # many steps: the last network call is at t_min
        v = torch.linspace(first, last, steps, dtype=torch.float64)[1:]
    else:
        v = torch.linspace(first, last, steps + 1, dtype=torch.float64)[1:-1]
    u = v**kappa
    inner = schedule.time_at(-(centre * u / (1 - u)).log())
    return check_grid(torch.cat([ends[:1], inner, ends.new_zeros(1) if to_data else ends[1:]]))


def named_solver(solver: str | Solver) -> Solver:
    """A solver from its name; ValueError names the choices."""
    if isinstance(solver, Solver):
        return solver
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r} is not known; choose one of {', '.join(sorted(SOLVERS))}")
    return SOLVERS[solver]()


def named_times(schedule: Schedule, solver: Solver, steps: int | None, grid: str | Grid | Tensor | None) -> Tensor:
    """The times ``[steps + 1]`` of a grid given by name, as a function or as the times themselves; None is
    :func:`balanced` with the solver's own centre.  ValueError when ``steps`` contradicts given times."""
    if isinstance(grid, Tensor):
        times = check_grid(grid, schedule)
        if steps is not None and steps != len(times) - 1:
            raise ValueError(f"steps={steps}, but the given grid of {len(times)} times has {len(times) - 1} steps")
        return times
    steps = DEFAULT_STEPS if steps is None else steps
    if grid is None:
        return balanced(schedule, steps, solver.centre)
    if not isinstance(grid, str):
        return grid(schedule, steps)
    grids = {**GRIDS, "balanced": balanced}
    if grid not in grids:
        raise ValueError(f"grid={grid!r} is not known; choose one of {', '.join(sorted(grids))}")
    return grids[grid](schedule, steps)


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
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """``n`` samples ``[n, *shape]`` on the device of the denoiser's weights.

    ``solver`` and ``grid`` are names (:data:`SOLVERS`, :data:`~fewstep.grids.GRIDS`) or objects; ``grid`` may be the
    times themselves.  ``steps`` (default 10) counts steps; a solver of k stages makes about k calls a step.  Class
    labels are cycled when the denoiser is conditional and ``cond`` is None.  ``noise`` ``[n, *shape]`` is standard
    normal; by default it is drawn from ``seed``, which also seeds stochastic solvers.  ``guidance`` w samples from
    ``unc + w (cond - unc)`` and doubles the calls.  ``progress(done, steps)`` is told after every step.

    Raises ValueError with the choices on an unknown name, and on a mismatch between ``n``, ``noise``, ``cond`` and
    the denoiser.
    """
    if not isinstance(denoiser, Denoiser):
        raise ValueError(
            f"sample() takes a Denoiser, got {type(denoiser).__name__}; a student samples itself: student.sample(n)"
        )
    if n < 1:
        raise ValueError(f"n={n}: need at least one sample")
    solver = named_solver(solver)
    times = named_times(denoiser.schedule, solver, steps, grid)
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
    if guidance is not None:
        if cond is None:
            raise ValueError(f"guidance={guidance} needs a conditional model: this one has no classes and cond is None")
        denoiser = Guided(denoiser, guidance)
    start = denoiser.schedule.sigma(times[:1]).to(device)
    with evaluating(denoiser):
        return solve(denoiser, align(start, noise) * noise, times, solver, cond, rng, progress=progress)


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
