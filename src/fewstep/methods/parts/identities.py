"""The three identities of flow maps, each as a direction in which the mean velocity ``F(x, t, s)`` is wrong.

The exact map takes every state of a trajectory to the same point, moves its end along the trajectory, and composes.
With ``x_s = A x + B F`` (:meth:`~fewstep.schedules.Schedule.coefficients_of_move`) that is, for any schedule::

    Eulerian     d/dt x_s = 0               the start moves along v:    A v + A_t x + B_t F + B dF/dt = 0
    Lagrangian   d/ds x_s = u(x_s, s)       the end moves:              A_s x + B_s F + B dF/ds = u(x_s, s)
    semigroup    x_s = f(f(x, t, m), m, s)  one jump lands where two land

The first two give the student's own ``F^-`` and what is left of the identity, ``g``, both without a graph; ``g = 0`` at
the exact map.  The third gives the ``F`` that fulfils it.  :func:`regression` moves ``F`` against ``g``.  On flow
matching ``g`` is ``(F - v) + (t - s) dF/dt`` (MeanFlow, Align Your Flow) and ``F + (s - t) dF/ds - u`` (Align Your
Flow, FreeFlow), and the target of two equal halves ``(F_1 + F_2) / 2`` (Shortcut); on TrigFlow at ``s = 0`` the first
is sCM's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fewstep.conditions import Cond
from fewstep.denoisers import Denoiser
from fewstep.flow_maps import FlowMap
from fewstep.networks.parts import PositionalEmbedding, zeroed
from fewstep.randomness import repeated_draws
from fewstep.schedules import Schedule, align
from fewstep.tangents import Field, forward, tangent

#: How a directional derivative is taken: :func:`~fewstep.tangents.tangent` or one of its twins.
Engine = Callable[[Field, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Direction(NamedTuple):
    """``F`` is the student's own mean velocity, ``g`` what it is wrong by; no graph, ``g = 0`` at the exact map."""

    F: Tensor
    g: Tensor


@torch.no_grad()
def eulerian(
    flow_map: FlowMap,
    x: Tensor,
    t: Tensor,
    s: Tensor,
    v: Tensor,
    cond: Cond = None,
    *,
    r: float = 1.0,
    scale: Tensor | None = None,
    engine: Engine = tangent,
    **extras: Tensor,
) -> Direction:
    """The start moves: ``g = -scale [A v + B_t F + r (A_t x + B dF/dt)]`` with ``dF/dt`` along ``(v, 1)``.

    ``x`` are states ``[B, ...]`` at times ``t`` ``[B]`` with the velocities ``v``; ``s`` ``[B]`` are the target times.
    ``r`` in [0, 1] is the warm-up of the part that can explode: at 0 the direction is that of velocity matching.
    ``scale`` ``[B]`` multiplies all of it, the tangents before the derivative is taken, so that nothing large is
    computed where it is small (sCM takes ``cos t``).  Dropout masks are those that the next call will draw, and
    autocast is off: times and norms are in float32 at least.
    """
    schedule = flow_map.schedule
    (keep, go), (d_keep, d_go) = slopes(schedule, t, s, move_start=True)
    factor = torch.ones_like(t) if scale is None else scale
    small = factor * go
    with repeated_draws(x.device), torch.autocast(x.device.type, enabled=False):
        f, j = engine(
            lambda x_, t_: flow_map.mean_velocity(x_, t_, s, cond, **extras), x, t, align(small, x) * v, small
        )
    steady = align(factor * keep, x) * v + align(factor * d_go, x) * f
    return Direction(f, -(steady + r * (align(factor * d_keep, x) * x + j)))


@torch.no_grad()
def lagrangian(
    flow_map: FlowMap,
    x: Tensor,
    t: Tensor,
    s: Tensor,
    teacher: Denoiser,
    cond: Cond = None,
    *,
    r: float = 1.0,
    engine: Engine = tangent,
    **extras: Tensor,
) -> Direction:
    """The end moves: ``g = A_s x + B_s F + r B dF/ds - u(x_s, s)``, ``u`` the velocity of the teacher at the student's
    own ``x_s``; the teacher is on the schedule of the map.  Arguments as in :func:`eulerian`."""
    schedule = flow_map.schedule
    (keep, go), (d_keep, d_go) = slopes(schedule, t, s, move_start=False)
    with repeated_draws(x.device), torch.autocast(x.device.type, enabled=False):
        f, j = engine(lambda x_, s_: flow_map.mean_velocity(x_, t, s_, cond, **extras), x, s, torch.zeros_like(x), go)
    end = align(keep, x) * x + align(go, x) * f
    u = teacher.velocity(end, s, cond)
    return Direction(f, align(d_keep, x) * x + align(d_go, x) * f + r * j - u)


@torch.no_grad()
def semigroup(
    flow_map: FlowMap,
    x: Tensor,
    t: Tensor,
    mid: Tensor,
    s: Tensor,
    cond: Cond = None,
    *,
    second: FlowMap | None = None,
    clean: bool = False,
    **extras: Tensor,
) -> Tensor:
    """One jump against two: the mean velocity with which ``x`` at ``t`` lands where ``flow_map`` to ``mid`` and then
    ``second`` (itself unless given) to ``s`` land; what a student's ``F(x, t, s)`` is moved :func:`towards`.

    The times may rise as well as fall.  With ``clean`` jumps to ``t_min`` count as jumps to pure data: the data
    predictions agree there, whatever noise the schedule leaves.
    """
    f_1 = flow_map.mean_velocity(x, t, mid, cond, **extras)
    x_mid = flow_map.schedule.move(x, f_1, t, mid)
    f_2 = (second or flow_map).mean_velocity(x_mid, mid, s, cond, **extras)
    return composed(flow_map.schedule, x, f_1, f_2, t, mid, s, clean)


def towards(f: Tensor, target: Tensor) -> Direction:
    """The direction from a target: ``g = F - target``."""
    held = f.detach()
    return Direction(held, held - target)


def composed(
    schedule: Schedule,
    x: Tensor,
    f_1: Tensor,
    f_2: Tensor,
    t: Tensor,
    mid: Tensor,
    s: Tensor,
    clean: bool = False,
) -> Tensor:
    """The mean velocity of the jump ``t -> s`` that lands where ``f_1`` to ``mid`` and then ``f_2`` land; half their
    sum for equal halves on flow matching.  The coefficients are float64: no digit is lost at any ``t != s``; ``clean``
    as in :func:`semigroup`."""
    keep_1, go_1 = schedule.coefficients_of_move(t, mid)
    (keep, go), (keep_2, go_2) = (landing(schedule, start, s, clean) for start in (t, mid))
    parts = ((keep_2 * keep_1 - keep, x), (keep_2 * go_1, f_1), (go_2, f_2))
    return sum((align(c / go, x) * part for c, part in parts), start=torch.zeros_like(x))


def landing(schedule: Schedule, t: Tensor, s: Tensor, clean: bool) -> tuple[Tensor, Tensor]:
    """The coefficients of a move to ``s``; with ``clean`` those of the data prediction where ``s`` is ``t_min``."""
    keep, go = schedule.coefficients_of_move(t, s)
    if not clean:
        return keep, go
    last, w = s <= schedule.t_min, schedule.wronskian(t)
    return torch.where(last, schedule.d_sigma(t) / w, keep), torch.where(last, -schedule.sigma(t) / w, go)


def slopes(
    schedule: Schedule, t: Tensor, s: Tensor, *, move_start: bool
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """``(A, B)`` and their derivatives in ``t`` (or in ``s``), float64 ``[B]``."""
    if move_start:
        return forward(lambda t_: schedule.coefficients_of_move(t_, s), (t,), (torch.ones_like(t),))
    return forward(lambda s_: schedule.coefficients_of_move(t, s_), (s,), (torch.ones_like(s),))


def normalize(g: Tensor, c: float) -> Tensor:
    """``g / (||g|| + c)``, the norm over the whole sample."""
    return g / align(sizes(g) + c, g)


def sizes(g: Tensor) -> Tensor:
    """The norm of every sample, ``[B]``."""
    return torch.linalg.vector_norm(g.flatten(1), dim=1)


def adaptive_weight(g: Tensor, power: float, c: float) -> Tensor:
    """``1 / (||g||^2 + c)^power`` a sample ``[B]``, without a graph: MeanFlow's weight (c = 0.01, power 1)."""
    return (g.detach().flatten(1).square().sum(1) + c) ** -power


class TimeWeight(nn.Module):
    """``w(t)``, a linear layer on the time embedding that starts at 0: the learned weight of a loss."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embedding = PositionalEmbedding(width)
        self.out = zeroed(nn.Linear(width, 1))

    def forward(self, t: Tensor) -> Tensor:
        return self.out(self.embedding(t.float()))[:, 0]


def regression(
    f: Tensor,
    direction: Direction,
    *,
    c: float | None = None,
    weight: Tensor | None = None,
    log_weight: Tensor | None = None,
) -> Tensor:
    """``w ||F - sg(F^- - g)||^2 / d`` a sample ``[B]``: its gradient moves ``F`` against ``g``.

    ``f`` is the student's mean velocity with a graph; its own value stands for ``F^-``, so that a pass in half
    precision and a tangent in float32 may differ.  With ``c`` the direction is normalised (:func:`normalize`);
    ``weight`` ``[B]`` multiplies; a ``log_weight`` ``[B]`` that is learned (:class:`TimeWeight`) multiplies by its
    exponential and is subtracted: ``e^w (...) - w``.
    """
    g = direction.g if c is None else normalize(direction.g, c)
    error = (f - f.detach() + g).square().flatten(1).mean(1)
    if weight is not None:
        error = weight.to(error) * error
    return error if log_weight is None else log_weight.exp() * error - log_weight
