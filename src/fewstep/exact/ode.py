"""The probability flow of any denoiser, integrated to near machine precision.

Every schedule is one circle: ``y = x / sqrt(alpha^2 + sigma^2)`` and the angle ``theta = atan2(sigma, alpha)``, on
which the flow is ``dy/dtheta = cos(theta) eps - sin(theta) D``: finite at pure noise (alpha = 0) and at the data
(sigma = 0).  The independent variable is ``w`` with ``e^w = (rho + a) / (1 + rho / b)``, ``rho = tan(theta)``: linear
in the noise level below the smallest scale ``a`` of the data, logarithmic between the scales, linear in ``1 / rho``
above the largest one ``b``; the whole circle is a finite interval on which the flow is smooth.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fewstep.denoisers import Cond, Denoiser
from fewstep.schedules import TrigFlow, align, as_time

#: Sub-steps of the modified midpoint rule; their extrapolation has order 12.
SUBSTEPS = (2, 4, 6, 8, 10, 12)

CIRCLE = TrigFlow(t_min=0.0, t_max=math.pi / 2, sigma_data=1.0)


@dataclass(frozen=True)
class CirclePath:
    """The probability flow of a denoiser on the circle, along ``w``: what integrators walk.

    ``scales`` are the smallest and the largest length in the data; ValueError for scales that are not ordered.
    """

    denoiser: Denoiser
    cond: Cond
    scales: tuple[float, float]

    def __post_init__(self) -> None:
        small, large = self.scales
        if not 0 < small < large:
            raise ValueError(f"scales={self.scales}: need 0 < smallest < largest")

    @cached_property
    def on_circle(self) -> Denoiser:
        """The denoiser as it is on the circle."""
        return self.denoiser.on(CIRCLE)

    def place(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Radius ``sqrt(alpha^2 + sigma^2)`` and place ``w`` of a time of the denoiser's schedule."""
        (small, large), schedule = self.scales, self.denoiser.schedule
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        w = torch.log(sigma + small * alpha) - torch.log(alpha + sigma / large)
        return torch.sqrt(alpha**2 + sigma**2), w

    def slope(self, y: Tensor, w: Tensor) -> Tensor:
        """``dy/dw`` at states ``y = x / radius``; ``w`` is of the shape of a time."""
        small, large = self.scales
        grown = torch.exp(w)
        p, q = (grown - small).clamp_min(0), (1 - grown / large).clamp_min(0)
        rate = grown * (1 - small / large) / (p**2 + q**2)
        return align(rate, y) * self.on_circle.velocity(y, torch.atan2(p, q), self.cond)


def probability_flow(
    denoiser: Denoiser,
    x: Tensor,
    t: Tensor | float,
    s: Tensor | float,
    cond: Cond = None,
    scales: tuple[float, float] = (0.1, 4.0),
    steps: int = 40,
) -> Tensor:
    """``x`` at time ``t`` carried along the probability flow of ``denoiser`` to time ``s`` (either direction).

    ``scales`` are the smallest and the largest length in the data; ``steps`` extrapolated steps of 42 calls each.
    The number of steps is fixed, so that a sample does not depend on its batch and the map can be differentiated.
    Works in the type of ``x``; float64 is what it is for.  Raises ValueError for scales that are not ordered.
    """
    path = CirclePath(denoiser, cond, scales)
    (radius, start), (end_radius, end) = path.place(as_time(t, x)), path.place(as_time(s, x))
    y = x / align(radius, x)
    for i in range(steps):
        y = _extrapolated_step(path.slope, y, start + (end - start) * (i / steps), (end - start) / steps)
    return align(end_radius, x) * y


def _extrapolated_step(slope: Callable[[Tensor, Tensor], Tensor], y: Tensor, w: Tensor, h: Tensor) -> Tensor:
    """One step of Gragg's modified midpoint rule, extrapolated to zero sub-step (Gragg-Bulirsch-Stoer)."""
    row: list[Tensor] = []
    first = slope(y, w)
    for j, n in enumerate(SUBSTEPS):
        sub = h / n
        before, now = y, y + align(sub, y) * first
        for k in range(1, n):
            before, now = now, before + align(2 * sub, y) * slope(now, w + k * sub)
        new = [now]
        for k in range(1, j + 1):
            new.append(new[-1] + (new[-1] - row[k - 1]) / ((n / SUBSTEPS[j - k]) ** 2 - 1))
        row = new
    return row[-1]
