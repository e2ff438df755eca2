"""Paths of constant acceleration (Park et al. 2024, "Constant Acceleration Flow", arXiv 2411.00322).

Between noise ``n`` and data ``x`` a path has an initial velocity ``v``, whatever it is, and the one constant
acceleration that ends at ``x``.  With ``tau`` from 0 at the noise to 1 at the data, and velocities that point to the
noise as everywhere here (the paper's ``v`` is the negative)::

    x_tau = (1 - tau^2) n + tau^2 x - (tau - tau^2) v,     a = 2 (v - (n - x))

The velocity that is aimed at is ``v = h (n - x)``, and with it the path is the straight line at the noise level

    t(tau) = 1 - h tau - (1 - h) tau^2 = (1 - tau) (1 + tau - h tau)

so that ``h > 1`` slows down towards the data and ``h = 1`` is rectified flow.  Flow maps are told this ``t``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fewstep.conditions import Cond
from fewstep.denoisers import Denoiser, check_prediction
from fewstep.flow_maps import FlowMap
from fewstep.schedules import FlowMatching, align, as_time


def time_of(tau: Tensor, h: float) -> Tensor:
    """The noise level ``t`` at ``tau`` of the path."""
    return (1 - tau) * (1 + tau - h * tau)


def tau_of(t: Tensor, h: float) -> Tensor:
    """The inverse of :func:`time_of`."""
    done = 1 - t
    return 2 * done / (h + torch.sqrt(h**2 + 4 * (1 - h) * done))


def path_state(x: Tensor, noise: Tensor, v: Tensor, tau: Tensor) -> Tensor:
    """``x_tau = (1 - tau^2) n + tau^2 x - (tau - tau^2) v``, ``tau`` ``[B]``."""
    done = align(tau**2, x)
    return (1 - done) * noise + done * x - align(tau - tau**2, x) * v


def acceleration(displacement: Tensor, v: Tensor) -> Tensor:
    """``a = 2 (v - (n - x))``, the constant acceleration of the path that starts with ``v`` and is displaced by
    ``n - x``."""
    return 2 * (v - displacement)


class ConstantAcceleration(FlowMap):
    """The flow map of two networks: a velocity ``v`` that is found once a rollout, and an acceleration at every call::

        x_tau' = x_tau - v (tau' - tau) + a (tau' + tau) / 2 (tau' - tau)

    exact for a constant ``a``, between any two times.  ``velocity`` and ``accelerated`` are denoisers on flow matching.
    ``h`` times the velocity of the first is ``v``, which the network of the second is told as its second sample
    ``beside``; its velocity is the displacement ``n - x``, from which :func:`acceleration` follows.  ``N`` steps take
    ``N + 1`` calls.  ValueError unless ``0 < h < 2``: beyond, paths turn round before they reach the data.
    """

    calls_to_begin = 1

    def __init__(self, velocity: Denoiser, accelerated: Denoiser, h: float = 1.5) -> None:
        if not 0 < h < 2:
            raise ValueError(f"ConstantAcceleration: h={h:g} must lie in (0, 2), or paths turn before the data")
        super().__init__(FlowMatching(), velocity.shape, velocity.classes)
        self.velocity = velocity
        self.accelerated = accelerated
        self.h = h

    @property
    def null(self) -> Cond:
        return self.velocity.null

    def begin(self, x: Tensor, t: Tensor | float, cond: Cond = None) -> Mapping[str, Tensor]:
        """The initial velocity ``v`` of the paths that pass through ``x`` at ``t``."""
        return {"v": initial_velocity(self.velocity, x, as_time(t, x), self.h, cond)}

    def mean_velocity(
        self, x: Tensor, t: Tensor | float, s: Tensor | float, cond: Cond = None, **extras: Tensor
    ) -> Tensor:
        """``(v - a (tau + tau') / 2) / (h + (1 - h) (tau + tau'))``: the move over ``tau' - tau``, per ``s - t``."""
        time, target = as_time(t, x), as_time(s, x)
        v = (extras or self.begin(x, time, cond))["v"]
        a = acceleration(displacement(self.accelerated, x, time, v, cond), v)
        both = tau_of(time, self.h) + tau_of(target, self.h)
        return (v - align(both / 2, x) * a) / align(self.h + (1 - self.h) * both, x)

    def forward(self, x: Tensor, t: Tensor | float, s: Tensor | float, cond: Cond = None, **extras: Tensor) -> Tensor:
        F = self.mean_velocity(x, t, s, cond, **extras)
        check_prediction(F, x)
        return self.schedule.move(x, F, as_time(t, x), as_time(s, x))

    def teacher(self) -> Denoiser:
        return self.velocity


def initial_velocity(net: Denoiser, x: Tensor, t: Tensor, h: float, cond: Cond = None) -> Tensor:
    """``h`` times a denoiser's velocity on flow matching, from any point of the path."""
    return h * net.velocity(x, t.clamp_min(net.schedule.t_min), cond)


def displacement(net: Denoiser, x: Tensor, t: Tensor, v: Tensor, cond: Cond = None) -> Tensor:
    """``n - x`` as the second network says it, being told ``v`` too."""
    return net.velocity(x, t.clamp_min(net.schedule.t_min), cond, beside=v)
