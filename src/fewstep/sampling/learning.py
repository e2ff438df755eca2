"""Learn a solver for one model: its times and coefficients, against where the model's own fine trajectories end.

The error of a sample is the root mean square of ``r = x_N - x*``, as everywhere in :mod:`fewstep.sampling.search`.  It
depends on few numbers (74 at 10 calls) and through them on a long and badly conditioned chain, so the fit is
Gauss-Newton and not stochastic gradients: one forward pass carries the derivatives of the state in every number through
the sampler, and the damped least-squares problem (Levenberg 1944, Marquardt 1963)

    (H + mu diag H) delta = -g,        H = mean J^T J / |r|,        g = mean J^T r / |r|,

whose gradient is that of the mean error, is solved for the change.  Five iterations on a few dozen starting points are
enough.

What the derivatives cost: until call i each of ``i (i + 5) / 2`` numbers has moved the state in a direction of its own,
and each direction is one more call of the network, by one-sided differences (for any network: no rule for forward mode
is needed).  Calls for one sample and iteration: 22 at 4 calls, 65 at 6, 140 at 8, 255 at 10.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.denoisers import Cond, Denoiser
from fewstep.sampling.coefficients import Levels
from fewstep.sampling.engine import run
from fewstep.sampling.inputs import evaluating, repeated, start_of
from fewstep.sampling.learned import LearnedSolver
from fewstep.sampling.sample import Threshold, steered
from fewstep.sampling.search import Reference, distances, picked
from fewstep.schedules import Schedule

#: Beyond, the derivatives cost more than a student would, and hand-made solvers are close to the flow.
MOST_CALLS = 16


def derivative_calls(calls: int) -> int:
    """The network calls that the derivatives of one sample take."""
    return sum(i * (i + 5) // 2 for i in range(calls))


class Iterate(NamedTuple):
    """A solver and its mean error on the points that it was learned from and on the held-out ones."""

    solver: LearnedSolver
    train: float
    held_out: float


class Task(NamedTuple):
    """A model under the guidance of a reference, and that reference with checked noise and conditions."""

    denoiser: Denoiser
    target: Reference

    @classmethod
    def of(cls, model: Denoiser, target: Reference, threshold: Threshold | None) -> Task:
        """From a reference as :func:`~fewstep.sampling.search.reference` makes it."""
        start = start_of(model, len(target.noise), target.cond, noise=target.noise)
        denoiser = steered(model, len(target.noise), start.cond, target.guidance, threshold)
        return cls(denoiser, replace(target, noise=start.noise, cond=start.cond))

    @property
    def start(self) -> Tensor:
        """The states that the solver starts from ``[n, *shape]``."""
        return self.denoiser.schedule.prior(self.target.noise)

    @property
    def ends(self) -> Tensor:
        """Where it should end ``[n, *shape]``."""
        return self.target.ends

    @property
    def cond(self) -> Cond:
        return self.target.cond

    def part(self, first: int, n: int) -> Task:
        """The samples from ``first`` on, ``n`` of them."""
        return Task(self.denoiser, self.target.part(first, n))

    def error(self, solver: LearnedSolver) -> float:
        """The mean over the samples of their distance from where they should end."""
        schedule = self.denoiser.schedule
        table = solver.table(Levels.of(schedule, solver.grid(schedule, len(solver.times))))
        return float(distances(run(self.denoiser, self.start, table, self.cond), self.ends).mean())


def learning(
    model: Denoiser,
    solver: LearnedSolver,
    train: Reference,
    held_out: Reference,
    threshold: Threshold | None = None,
    iterations: int = 8,
    batch: int = 256,
    progress: Callable[[float], None] | None = None,
) -> Iterator[Iterate]:
    """Learn from ``solver`` on: the start and then one :class:`Iterate` an iteration, to be stopped at any time.

    The first two iterations take their derivatives from a quarter of ``train`` (16 points at least), which is as good
    that far from the end.  Ends by itself when a damped step lowers the error on ``train`` by less than a thousandth.
    ``batch`` bounds the rows of a network call; ``progress`` is told the share of an iteration that is done.

    ValueError for a solver of more than :data:`MOST_CALLS` calls, or one of another schedule.
    """
    if len(solver.times) > MOST_CALLS:
        raise ValueError(f"{len(solver.times)} calls are too many to learn: take at most {MOST_CALLS}")
    solver.check(model.schedule)
    seen, unseen = (Task.of(model, target, threshold) for target in (train, held_out))
    with torch.no_grad(), evaluating(model):
        now = Iterate(solver, seen.error(solver), unseen.error(solver))
        yield now
        damping, total = 1e-3, len(seen.start)
        for i in range(iterations):
            few = max(16, total // 4)
            points = min(few, total) if i < 2 else total
            equations = normal_equations(seen.part(0, points), now.solver, batch, progress)
            before, (now, damping) = now, damped_step(seen, now, equations, damping)
            if now is not before:
                now = now._replace(held_out=unseen.error(now.solver))
                yield now
            if points == total and now.train > 0.999 * before.train:
                return


def damped_step(task: Task, now: Iterate, equations: tuple[Tensor, Tensor], damping: float) -> tuple[Iterate, float]:
    """The best step that was found, from ``damping`` down by tens while that lowers the error further, else up; ``now``
    itself when no step lowers it.  And the damping that it had."""
    hessian, gradient = equations
    diagonal = hessian.diagonal()
    scale = diagonal.clamp_min(1e-12 * float(diagonal.max())).diag()  # a number may have no effect at all

    def attempt(damping: float) -> Iterate:
        change = torch.linalg.solve(hessian + damping * scale, -gradient)
        candidate = moved(now.solver, change.tolist(), task.denoiser.schedule)
        return now if candidate is None else Iterate(candidate, task.error(candidate), math.nan)

    best = attempt(damping)
    while best.train < now.train and damping > 1e-8:
        bolder = attempt(damping / 10)
        if not bolder.train < best.train:
            return best, damping
        best, damping = bolder, damping / 10
    while not best.train < now.train:
        if damping > 1e2:
            return now, 1e-3
        damping *= 10
        best = attempt(damping)
    return best, damping


def learn(
    model: Denoiser,
    solver: LearnedSolver,
    train: Reference,
    held_out: Reference,
    threshold: Threshold | None = None,
    iterations: int = 8,
) -> LearnedSolver:
    """The iterate of :func:`learning` that does best on the held-out points, the start included."""
    return min(learning(model, solver, train, held_out, threshold, iterations), key=lambda it: it.held_out).solver


def moved(solver: LearnedSolver, change: list[float], schedule: Schedule) -> LearnedSolver | None:
    """The solver with ``change`` added to its numbers, in the order of :func:`sensitivities`; None when its times then
    fall no more, or ``change`` is not finite."""
    if not all(map(math.isfinite, change)):
        return None
    left = iter(change)
    times, rows = [], []
    for i, (t, row) in enumerate(zip(solver.times, solver.rows, strict=True)):
        if i:
            log_snr = schedule.log_snr(torch.tensor(t, dtype=torch.float64))
            t = float(schedule.time_at(log_snr - next(left)))
        times.append(t)
        rows.append(tuple(number + next(left) for number in row))
    if any(t <= s for t, s in pairwise(times)):
        return None
    return LearnedSolver(solver.schedule, tuple(times), tuple(rows))


def normal_equations(
    task: Task, solver: LearnedSolver, batch: int = 256, progress: Callable[[float], None] | None = None
) -> tuple[Tensor, Tensor]:
    """``H`` ``[P, P]`` and ``g`` ``[P]`` of the module's least-squares problem, float64."""
    count = len(solver.times) - 1 + sum(map(len, solver.rows))
    hessian, gradient = torch.zeros(count, count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    total, size = len(task.start), max(1, batch // count)
    for first in range(0, total, size):
        part = task.part(first, size)
        end, tangents = sensitivities(part, solver)
        residual = (end - part.ends).flatten(1).cpu().double()
        jacobian = tangents.flatten(2).cpu().double()
        weighted = jacobian / residual.norm(dim=1, keepdim=True).clamp_min(1e-12)
        hessian += weighted.flatten(1) @ jacobian.flatten(1).T / total
        gradient += weighted.flatten(1) @ residual.flatten() / total
        if progress is not None:
            progress(min(1.0, (first + size) / total))
    return hessian, gradient


def sensitivities(task: Task, solver: LearnedSolver) -> tuple[Tensor, Tensor]:
    """The end ``x_N`` ``[B, ...]`` and its derivatives ``[P, B, ...]`` in every number of the solver: for every call
    the logarithm of its noise level (the first one is fixed), then its row.

    The state's derivatives so far travel with it.  A prediction is moved by those of its state and by its own time;
    the new row then adds directions of its own, the state and the predictions themselves.
    """
    x, schedule = task.start, task.denoiser.schedule
    outputs: list[Tensor] = []  # newest first, like the rows
    slopes: list[Tensor] = []
    tangents = x.new_zeros(0, *x.shape)
    for i, (time, (a, *weights)) in enumerate(zip(solver.times, solver.rows, strict=True)):
        t = torch.full((len(x),), time, dtype=torch.float64, device=x.device)
        outputs.insert(0, task.denoiser(x, t, task.cond))
        if i:  # the state of call i does not depend on its time
            tangents = torch.cat([tangents, torch.zeros_like(x)[None]])
        slopes.insert(0, prediction_slopes(task, schedule, x, t, outputs[0], tangents))
        tangents = a * tangents
        for c, slope in zip(weights, slopes, strict=True):
            tangents[: len(slope)] += c * slope
        tangents = torch.cat([tangents, x[None], torch.stack(outputs)])
        x = a * x
        for c, output in zip(weights, outputs, strict=True):
            x = x + c * output
    return x, tangents


def prediction_slopes(task: Task, schedule: Schedule, x: Tensor, t: Tensor, x0: Tensor, tangents: Tensor) -> Tensor:
    """How the prediction ``x0`` at ``(x, t)`` changes along ``tangents`` ``[k, B, ...]`` of the state; the last one is
    that of log rho, in which the state stays and the time moves.

    One-sided differences with a step that is the cube root of the rounding error, relative to the state: it leaves an
    error of about a thousandth, which costs least squares nothing.
    """
    k = len(tangents)
    if not k:
        return tangents
    small = torch.finfo(x.dtype).eps ** (1 / 3)
    sizes = tangents.flatten(1).square().mean(1).sqrt()
    steps = small * x.square().mean().sqrt() / sizes.clamp_min(torch.finfo(x.dtype).tiny)
    steps[-1] = small
    along = steps.reshape(k, *[1] * x.ndim)
    times = t.repeat(k)
    times[-len(t) :] = schedule.time_at(schedule.log_snr(t) - small)
    ahead = task.denoiser((x + along * tangents).flatten(0, 1), times, picked(task.cond, lambda c: repeated(c, k)))
    return (ahead.unflatten(0, (k, len(x))) - x0) / along
