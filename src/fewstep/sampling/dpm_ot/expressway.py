"""DPM-OT (Li et al. 2023, arXiv 2307.11308): from noise to a late state in one transport, then a few ordinary steps.

Noisy data at a late time t_M are the targets of a semi-discrete optimal transport of the noise
(:mod:`fewstep.sampling.dpm_ot.optimal_transport`).  A sample is ``T(noise)``, one inner product a target, followed by
any solver of the library from t_M down.  Two clusters of targets stay apart, because T jumps between them instead of
bending continuous paths; in return every sample starts at one of n stored states, so memorisation belongs beside every
figure of quality.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewstep.denoisers import Cond, Denoiser
from fewstep.grids import Grid, check_grid
from fewstep.randomness import Rng
from fewstep.sampling.dpm_ot.optimal_transport import SOURCES, BrenierPotential, Masses
from fewstep.sampling.engine import Solver, solve
from fewstep.sampling.inputs import evaluating
from fewstep.sampling.named import named_solver, named_times
from fewstep.schedules import Schedule, align, as_time, described


@dataclass(frozen=True, eq=False)
class Expressway:
    """A transport whose targets are states at ``time`` of ``schedule``; ``labels`` ``[n]`` are their classes, or None.

    Calling it with noise drawn from its source gives states at ``time``: a start hook of the engine, and what
    :func:`express` uses.
    """

    potential: BrenierPotential
    schedule: Schedule
    time: float
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.schedule.t_min < self.time <= self.schedule.t_max:
            raise ValueError(
                f"time={self.time:g} must lie above t_min={self.schedule.t_min:g} and not above "
                f"t_max={self.schedule.t_max:g}"
            )
        n = len(self.potential.targets)
        if self.labels is not None and self.labels.shape != (n,):
            raise ValueError(f"labels of shape {list(self.labels.shape)} for {n} targets: need one a target")

    def __call__(self, noise: Tensor) -> Tensor:
        return self.potential(noise)

    def draw(self, n: int, rng: Rng) -> Tensor:
        """``n`` draws from the source."""
        return self.potential.source.draw(n, self.potential.shape, rng).to(self.potential.targets)

    def land(self, noise: Tensor) -> tuple[Tensor, Tensor | None]:
        """``T(noise)`` and the classes of the targets that were hit."""
        cells = self.potential.cells(noise)
        return self.potential.targets[cells], None if self.labels is None else self.labels[cells]

    def tensors(self) -> dict[str, Tensor]:
        """What a file must hold; :meth:`of` reads it."""
        kept = {name: getattr(self.potential, name) for name in ("targets", "heights", "weights")}
        return kept if self.labels is None else kept | {"labels": self.labels}

    def fingerprint(self, data: str) -> dict[str, Any]:
        """What these heights belong to, as plain data; ``data`` is a digest of what the targets were made from."""
        return fingerprint(self.schedule, self.time, self.potential.source.name, data)

    @classmethod
    def of(cls, tensors: dict[str, Tensor], schedule: Schedule, time: float, source: str) -> Expressway:
        """From :meth:`tensors`."""
        parts = tensors["targets"], tensors["heights"], tensors["weights"]
        return cls(BrenierPotential(*parts, SOURCES[source]()), schedule, time, tensors.get("labels"))


def fingerprint(schedule: Schedule, time: float, source: str, data: str) -> dict[str, Any]:
    """What an expressway must have been made for to be used: system, schedule, time, source law and data digest."""
    return {"system": "dpm-ot", "schedule": described(schedule), "time": time, "source": source, "data": data}


def noisy_targets(schedule: Schedule, time: float, x0: Tensor, rng: Rng) -> Tensor:
    """Targets from data: ``alpha x_0 + sigma z`` at ``time``, of the shape of ``x0 [n, ...]``.

    The same data may come several times: their noise differs.
    """
    return schedule.add_noise(x0, rng.normal_like(x0), as_time(time, x0))


@torch.no_grad()
def reverse_targets(
    denoiser: Denoiser,
    n: int,
    time: float,
    rng: Rng,
    *,
    solver: str | Solver = "unipc",
    steps: int = 50,
    grid: str | Grid | None = None,
    cond: Cond = None,
) -> Tensor:
    """Targets without data: the states at ``time`` of n long runs of ``steps`` steps in all, stopped there."""
    solver = named_solver(solver)
    schedule = denoiser.schedule
    times = named_times(schedule, solver, steps, grid)
    above = torch.cat([times[times > time], times.new_tensor([time])])
    noise = rng.normal(n, *denoiser.shape)
    with evaluating(denoiser):
        return solve(denoiser, align(schedule.sigma(times[:1]), noise) * noise, above, solver, cond, rng)


@torch.no_grad()
def express(
    denoiser: Denoiser,
    expressway: Expressway,
    noise: Tensor,
    *,
    solver: str | Solver = "unipc",
    steps: int | None = None,
    grid: str | Grid | Tensor | None = None,
    cond: Cond = None,
    rng: Rng | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, Cond]:
    """Samples from ``noise [B, *shape]``, draws from the expressway's source, and the conditions they were made with.

    ``steps`` steps of ``solver`` on ``grid`` lead from the expressway's time to data; a grid by name or function is
    laid over that part only, given times must start there.  ``cond`` defaults to the classes of the targets that were
    hit, where the denoiser takes classes; ``rng`` is for stochastic solvers.

    Raises ValueError when the denoiser lives on another schedule than the targets (see :meth:`Denoiser.on`), and when
    given times start elsewhere.
    """
    if denoiser.schedule != expressway.schedule:
        raise ValueError(
            f"the expressway leads to states on {expressway.schedule}, the denoiser lives on {denoiser.schedule}: "
            "use denoiser.on(...)"
        )
    solver = named_solver(solver)
    times = named_times(replace(expressway.schedule, t_max=expressway.time), solver, steps, grid)
    if abs(float(times[0]) - expressway.time) > 1e-9 * expressway.time:
        raise ValueError(f"grid starts at {float(times[0]):g}, the expressway ends at time {expressway.time:g}")
    x, labels = expressway.land(noise)
    if cond is None and denoiser.classes is not None:
        cond = labels
    with evaluating(denoiser):
        return solve(denoiser, x, times, solver, cond, rng, progress=progress), cond


@torch.no_grad()
def annealed_langevin(
    denoiser: Denoiser,
    x: Tensor,
    times: Tensor,
    rng: Rng,
    *,
    step_lr: float = 6.2e-6,
    steps_each: int = 5,
    cond: Cond = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """The paper's base sampler (Song & Ermon 2020): ``steps_each`` Langevin steps at each of ``times``, from ``x`` on::

        a_i = step_lr (sigma_i / sigma_L)^2,      x <- x + a_i s(x, sigma_i) + sqrt(2 a_i) z

    and the data prediction at the last level.  ``len(times) * steps_each + 1`` calls.  For schedules with alpha = 1
    (``denoiser.on(EDM(...))``); ``times[0]`` is the time of the states ``x``.  The defaults are CIFAR-10's, which go
    with 232 levels from 50 down to 0.01.  ValueError for a ``step_lr`` of ``2 sigma_L^2`` or more: it diverges.
    """
    schedule = denoiser.schedule
    times = torch.as_tensor(times, dtype=torch.float64)
    if len(times) > 1:
        check_grid(times, schedule)
    if float((schedule.alpha(times) - 1).abs().max()) > 1e-12:
        raise ValueError(f"annealed Langevin takes alpha = 1, not {type(schedule).__name__}: use denoiser.on(EDM())")
    sigma = schedule.sigma(times).tolist()
    if not 0 < step_lr < 2 * sigma[-1] ** 2:
        raise ValueError(f"step_lr={step_lr:g} must lie between 0 and 2 sigma^2 = {2 * sigma[-1] ** 2:g} at the end")
    with evaluating(denoiser):
        for i, level in enumerate(sigma):
            size = step_lr * (level / sigma[-1]) ** 2
            for _ in range(steps_each):
                drift = size * denoiser.score(x, float(times[i]), cond)
                x = x + drift + math.sqrt(2 * size) * rng.normal_like(x)
            if progress is not None:
                progress(i + 1, len(sigma))
        return denoiser(x, float(times[-1]), cond)


@dataclass(frozen=True)
class TransportError:
    """How far the law of ``T(noise)`` is from the targets' law nu: bounds that hold together with ``confidence``.

    ``total_variation`` and ``distance`` (Wasserstein-2) follow from masses counted over fresh draws.  T is optimal onto
    the masses that it has, whatever the heights, so wrong masses are its only error.  ``energy_gap``
    bounds ``E(h) - min E``, up to the error of counting.
    """

    total_variation: float
    distance: float
    energy_gap: float
    draws: int
    confidence: float


def transport_error(potential: BrenierPotential, rng: Rng, draws: int, confidence: float = 0.95) -> TransportError:
    """Count the masses over ``draws`` draws and bound the error of the transport.

    With p the true masses, p' those counted and ``R_j = |y_j - mean y|^2``: moving the surplus costs
    ``W_2^2 <= 2 sum_j R_j |p_j - nu_j|`` (Villani 2009, theorem 6.15); ``sum_j R_j |p'_j - p_j|`` has a mean of at most
    ``sqrt(sum_j R_j^2 / draws)`` and exceeds it by ``max R sqrt(2 log(1 / delta) / draws)`` with probability delta at
    most (McDiarmid).  The total variation is the same with ``R = 1 / 2``.
    """
    if draws < 1 or not 0 < confidence < 1:
        raise ValueError(f"draws={draws} must be positive and confidence={confidence} lie between 0 and 1")
    y = potential.targets.flatten(1).double()
    y = y - potential.weights @ y
    counts, squares = torch.zeros(len(y), dtype=torch.long, device=y.device), 0.0
    for x in potential.drawn(draws, rng):
        cells = potential.cells(x)
        counts += torch.bincount(cells, minlength=len(y))
        squares += float((x.flatten(1).double() - potential.source.centre - y[cells]).square().sum())
    masses = Masses(counts, potential.weights)
    tail = math.log(2 / (1 - confidence))
    radii = y.square().sum(1)

    def moved(cost: Tensor) -> float:
        surplus = (cost * (masses.shares - potential.weights).abs()).sum()
        return float(surplus + (cost.square().sum() / draws).sqrt() + cost.max() * math.sqrt(2 * tail / draws))

    distance = math.sqrt(2 * moved(radii))
    # duality: E(h) - min E = W^2(mu, nu) / 2 - dual value at h, and W(mu, nu) <= W(mu, p) + W(p, nu)
    heights = potential.heights + potential.source.centre * y.sum(1)
    dual = float(((masses.shares - potential.weights) * (radii / 2 + heights)).sum())
    gap = dual + distance * math.sqrt(squares / draws) + distance**2 / 2
    return TransportError(min(moved(torch.full_like(radii, 0.5)), 1.0), distance, max(gap, 0.0), draws, confidence)


@dataclass(frozen=True)
class ErrorBound:
    """``total = transport + score``, a bound on the Wasserstein-2 distance of the samples at the end of the grid, in
    units of the data; ``growth`` is the factor by which an error at the start can have grown by then."""

    transport: float
    score: float
    growth: float

    @property
    def total(self) -> float:
        return self.transport + self.score


def error_bound(distance: float, ratios: Tensor, eps_errors: Tensor, rates: Tensor) -> ErrorBound:
    """What ``distance`` at the start of the last part, and the errors of the denoiser on it, can come to.

    In ``xbar = x / alpha`` the flow is ``d xbar / d rho = eps``, rho the noise-to-signal ratio.  ``ratios [K]`` fall
    from the expressway's to the last one; ``eps_errors [K]`` are the root mean square errors ``|eps - eps*|`` of the
    denoiser's noise over the exact law at each; ``rates [K]`` bound how fast two of its trajectories part: the largest
    eigenvalue of the symmetric part of ``-d eps / d xbar`` over all states.  Gronwall's lemma along the exact
    trajectories, with ``G(rho) = exp(int_rho_end^rho rate)``::

        W_2(samples, exact flow of nu) <= G(rho_M) distance / alpha_M + int G(rho) error(rho) d rho

    ``distance`` is given divided by alpha.  Proven for the exact flow of the denoiser: the solver's own error comes on
    top, and the integrals are trapezoids.  Not in it: how far n targets are from the law that they were drawn from,
    ``W_2(nu, q)``, which falls as ``n^(-1/d)``.  Rates and errors that were measured on samples make an estimate of the
    bound, not a bound; for networks on pictures it is far from sharp.
    """
    if not len(ratios) == len(eps_errors) == len(rates) >= 2 or not bool((ratios.diff() < 0).all()):
        raise ValueError(
            f"{len(ratios)} ratios, {len(eps_errors)} errors and {len(rates)} rates: need equally many, two or more, "
            "ratios falling strictly"
        )
    rho, errors, rates = (v.double().flip(0) for v in (ratios, eps_errors, rates))
    growth = torch.cat([rho.new_zeros(1), torch.cumulative_trapezoid(rates, rho)]).exp()
    score = torch.trapezoid(growth * errors, rho)
    return ErrorBound(float(growth[-1]) * distance, float(score), float(growth[-1]))
