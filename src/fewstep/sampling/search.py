"""Which solver, grid and thresholding for a budget of network calls: by rule, or measured on your model.

:func:`solver_for` applies the rule that did best on a population of exact models; :func:`tune` searches, on a small
reference set: a few starting points and where many steps take them. Both answer with a :class:`Setting`::

    images = fs.sample(teacher, 64, **fs.solver_for(steps=8).options())
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fewstep.denoisers import Cond, Denoiser, half_level_of, predicts_noise
from fewstep.guidance import Guided
from fewstep.randomness import Rng, derive_seed
from fewstep.sampling.coefficients import Levels
from fewstep.sampling.engine import run
from fewstep.sampling.hooks import Hooks
from fewstep.sampling.inputs import evaluating, start_of
from fewstep.sampling.named import named_solver, named_times
from fewstep.sampling.rollout import Student
from fewstep.sampling.sample import Threshold, sample
from fewstep.sampling.solvers.abm import ABM, USUAL, order_for, scale_for
from fewstep.schedules import Schedule, align
from fewstep.values import whole

#: What is searched.  Stochastic solvers follow no path that a reference could give.
SEARCHED_SOLVERS = (
    *(f"abm:p={p},c={c}" for p in (1, 2, 3, 4) for c in (0.5, 1, 2, 4)),
    "ddim", "dualfast", "dpmpp-2m", "dpmpp-2m-taylor", "dpmpp-3m", "dpmpp-3m:lower_order_final=true", "dpm-2m",
    "unipc", "unipc:variant=bh1", "unipc-3", "unipc-3:variant=bh1", "deis-1", "deis-2", "deis", "lms", "ipndm", "heun",
    "dpmpp-2s-fast", "dpmpp-3s-fast", "dpmpp-3s", "rk4",
)  # fmt: skip
SEARCHED_GRIDS = (
    "balanced:centre=0.5", "balanced:centre=1", "balanced:centre=2", "balanced:centre=1,kappa=1",
    "balanced:centre=2,kappa=1", "balanced:centre=1,kappa=2", "balanced:centre=2,kappa=2", "karras", "log-snr",
    "uniform", "quadratic",
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """How to sample: ``steps`` steps of a named solver on a named grid (None: its own), ``calls`` network calls (twice
    that under classifier-free guidance)."""

    solver: str
    grid: str | None
    steps: int
    calls: int
    threshold: Threshold | None = None

    def options(self) -> dict[str, object]:
        """The arguments of :func:`~fewstep.sampling.sample`."""
        return {"solver": self.solver, "grid": self.grid, "steps": self.steps, "threshold": self.threshold}

    def __str__(self) -> str:
        threshold = f", {self.threshold} threshold" if self.threshold else ""
        return f"{self.solver} on {self.grid or 'its own grid'}{threshold}, {self.steps} steps"


@dataclass(frozen=True)
class Trial:
    """A setting and how far it ends from the reference: the root mean square deviation of a sample, averaged over the
    samples, and the standard error of that average."""

    setting: Setting
    error: float
    spread: float


def setting_of(
    solver: str, grid: str | None, calls: int, schedule: Schedule, threshold: Threshold | None = None
) -> Setting | None:
    """As many steps as the budget of calls allows; None when it allows none, or the grid is not for the schedule."""
    made = named_solver(solver)
    for steps in range(calls, 0, -1):
        if steps < made.least_steps:
            return None
        try:
            times = named_times(schedule, made, steps, grid)
            table = made.table(Levels.of(schedule, times))
        except ValueError:
            return None
        if table.calls <= calls:
            return Setting(solver, grid, steps, table.calls, threshold)
    return None


def candidates(
    calls: int,
    schedule: Schedule,
    thresholds: Sequence[Threshold | None] = (None,),
    solvers: Sequence[str] = SEARCHED_SOLVERS,
    grids: Sequence[str] = SEARCHED_GRIDS,
) -> list[Setting]:
    """Every searched setting within the budget."""
    found = (setting_of(s, g, calls, schedule, t) for s in solvers for g in grids for t in thresholds)
    return [setting for setting in found if setting is not None]


@dataclass(frozen=True)
class Reference:
    """Starting points ``noise`` ``[n, *shape]``, their conditions and guidance, and where the flow takes them."""

    noise: Tensor
    ends: Tensor
    cond: Cond = None
    guidance: float | None = None

    def part(self, first: int, n: int) -> Reference:
        """The points from ``first`` on, ``n`` of them."""
        chosen = slice(first, first + n)
        cond = picked(self.cond, lambda leaf: leaf[chosen])
        return Reference(self.noise[chosen], self.ends[chosen], cond, self.guidance)


def picked(cond: Cond, choose: Callable[[Tensor], Tensor]) -> Cond:
    """``choose`` applied to every tensor of a condition."""
    return tree_map(lambda leaf: choose(leaf) if isinstance(leaf, Tensor) else leaf, cond)


def reference(
    denoiser: Denoiser, noise: Tensor, cond: Cond = None, guidance: float | None = None, calls: int = 200
) -> Reference:
    """The ends that UniPC-3 reaches in ``calls`` calls."""
    ends = sample(
        denoiser, len(noise), solver="unipc-3", steps=calls, grid="balanced:centre=1", cond=cond, noise=noise,
        guidance=guidance,
    )  # fmt: skip
    return Reference(noise, ends, cond, guidance)


def distances(x: Tensor, y: Tensor) -> Tensor:
    """The root mean square difference of every sample, ``[B]``, float64."""
    return (x - y).flatten(1).double().square().mean(1).sqrt()


def measured(denoiser: Denoiser, options: Mapping[str, Any], target: Reference) -> tuple[float, float]:
    """How far samples drawn with ``options`` (of :func:`~fewstep.sampling.sample`) end from a reference: the mean over
    the samples of their distance and its standard error; infinity where a result is not finite."""
    got = sample(denoiser, len(target.noise), cond=target.cond, noise=target.noise, guidance=target.guidance, **options)
    gap = distances(got, target.ends)
    if not bool(gap.isfinite().all()):
        return float("inf"), float("inf")
    return float(gap.mean()), float(gap.std() / len(gap) ** 0.5)


def tried(denoiser: Denoiser, setting: Setting, target: Reference) -> Trial:
    """A setting, measured."""
    return Trial(setting, *measured(denoiser, setting.options(), target))


def tune(
    denoiser: Denoiser,
    settings: Sequence[Setting],
    target: Reference,
    progress: Callable[[int, int], None] | None = None,
) -> list[Trial]:
    """All settings measured, the best first.  ``progress(done, settings)`` is told after every one.

    ValueError when there are no settings.
    """
    if not settings:
        raise ValueError("no setting fits: give a larger budget of calls, or other solvers and grids")
    trials = []
    for i, setting in enumerate(settings):
        trials.append(tried(denoiser, setting, target))
        if progress is not None:
            progress(i + 1, len(settings))
    return sorted(trials, key=lambda trial: trial.error)


def shortlist(
    denoiser: Denoiser,
    settings: Sequence[Setting],
    target: Reference,
    keep: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> list[Setting]:
    """The ``keep`` settings that do best on the first quarter of the points (8 at least)."""
    few = target.part(0, max(8, len(target.noise) // 4))
    return [trial.setting for trial in tune(denoiser, settings, few, progress)[:keep]]


def solver_for(steps: int, guided: bool | float = False, model: Denoiser | None = None, cond: Cond = None) -> Setting:
    """The setting for ``steps`` network calls: the default solver, centred on the model.

    ``guided`` is the guidance scale, True for a usual one (7.5) and False or 1 for none.  With a ``model`` its half
    level is used, measured where it has none, and measured under that guidance (512 calls of one sample each; see
    :func:`half_level`); without, the setting is the one for models of which nothing is known.  ValueError for fewer
    than 1 step.
    """
    steps = whole("steps", steps, 1)
    scale = 7.5 if guided is True else max(float(guided), 1.0)
    plain = steered = None
    if model is not None and half_level_of(model) is None and predicts_noise(model):
        solver = ABM(guidance=scale).for_noise_prediction()
        c = solver.scale
        return Setting(f"abm:p={solver.p},c={c:.4g}", f"balanced:centre={c:.4g},kappa=2", steps, steps)
    if model is not None:
        plain = half_level_of(model) or half_level(model, cond)
        steered = None if scale == 1 else half_level(Guided(model, scale), cond)
    c = scale_for(plain, scale, steered)
    return Setting(f"abm:p={order_for(steps, scale)},c={c:.4g}", f"balanced:centre={c:.4g},kappa=2", steps, steps)


@torch.no_grad()
def half_level(denoiser: Denoiser, cond: Cond = None, n: int = 32, steps: int = 16, seed: int = 0) -> float:
    """The noise level ``sigma / alpha`` at which half of the prediction is decided: the mean of ``|D(x_t) - D(x_T)|^2``
    along ``n`` trajectories is half of what it is at their end.

    For Gaussian data it is about the standard deviation; for data of several scales (principal components, far modes)
    the scale that carries half of the change.  Costs ``n`` times ``steps`` calls, once a model: assign it to
    ``denoiser.half_level``.  ValueError when the prediction does not depend on the state.
    """
    if isinstance(cond, Tensor):
        n = min(n, len(cond))
    start, seen = start_of(denoiser, n, picked(cond, lambda leaf: leaf[:n]), seed=seed), []

    def look(k: int, x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
        seen.append((float(denoiser.schedule.ratio(t[:1])), x0))
        return x0

    solver = ABM()
    table = solver.table(Levels.of(denoiser.schedule, solver.grid(denoiser.schedule, steps)))
    with evaluating(denoiser):
        run(denoiser, denoiser.schedule.prior(start.noise), table, start.cond, None, Hooks(output=look))
    change = [float((x0 - seen[0][1]).square().mean()) for _, x0 in seen]
    if not change[-1] > 0:
        raise ValueError("half_level: the prediction is the same at every noise level, there is nothing to measure")
    half = next(i for i, found in enumerate(change) if found >= change[-1] / 2)
    share = (change[-1] / 2 - change[half - 1]) / (change[half] - change[half - 1])
    above, below = (rho / (rho + USUAL) for rho, _ in (seen[half - 1], seen[half]))  # finite at pure noise
    v = above + share * (below - above)
    return USUAL * v / (1 - v)


@torch.no_grad()
def best_noise(
    student: Student,
    score: Callable[[Tensor, Cond], Tensor],
    n: int,
    of: int = 16,
    cond: Cond = None,
    *,
    seed: int = 0,
    **extras: float | Tensor,
) -> tuple[Tensor, Cond]:
    """Standard normal noise ``[n, *shape]`` whose samples in the student's fewest calls score highest, each the best
    ``of`` so many, and the conditions that go with it.

    A student keeps its teacher's noise, so that a search at one call a candidate serves many calls of the teacher
    (FreeFlow's best of N)::

        noise, cond = best_noise(student, score, 16, of=32)
        pictures = sample(teacher, 16, noise=noise, cond=cond)

    ``score(samples, cond)`` gives ``[n]`` numbers.  The candidates of a sample share its condition; ``extras`` set
    further inputs of the student.  ValueError for fewer than one candidate.
    """
    best = chosen = None
    with evaluating(student):
        for k in range(whole("of", of, 1)):
            start = start_of(student.flow_map, n, cond, seed=derive_seed(seed, "candidate", k))
            found = score(student(start.noise, start.cond, None, start.fresh, **extras), start.cond)
            if best is None or chosen is None:
                best, chosen = found, start.noise
            else:
                better = found > best
                best, chosen = (
                    torch.where(better, found, best),
                    torch.where(align(better, chosen) > 0, start.noise, chosen),
                )
    assert chosen is not None
    return chosen, start.cond


def noise_for(denoiser: Denoiser, n: int, seed: int) -> Tensor:
    """Starting noise ``[n, *shape]`` in the type of the denoiser's weights."""
    weights = next((p for p in denoiser.parameters() if p.is_floating_point()), None)
    exact = weights is None or weights.dtype == torch.float64
    device = "cpu" if weights is None else weights.device
    return Rng(seed, "tune", device=device).normal(n, *denoiser.shape, dtype=torch.float64 if exact else torch.float32)
