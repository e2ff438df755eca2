"""What losses ask of a teacher: one deterministic step with a time of its own for every sample."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.denoisers import Cond, Denoiser, Guided
from fewstep.flow_maps import ddim_move
from fewstep.schedules import EDM, Schedule, align


def guided(teacher: Denoiser, scale: float) -> Denoiser:
    """The teacher under classifier-free guidance; itself when the scale is 1 or it knows no labels."""
    return teacher if scale == 1 or not teacher.classes else Guided(teacher, scale)


def ddim_step(denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, cond: Cond = None) -> Tensor:
    """One DDIM step from ``t`` to ``s``, both ``[B]``."""
    return ddim_move(x, denoiser(x, t, cond), t, s, denoiser.schedule)


def heun_step(denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, cond: Cond = None) -> Tensor:
    """One Heun step of ``d(x/alpha) / d(sigma/alpha) = eps`` from ``t`` to ``s``, both ``[B]`` (EDM, algorithm 1)."""
    schedule = denoiser.schedule
    first = denoiser.eps(x, t, cond)
    ahead = _along(x, first, t, s, schedule)
    return _along(x, (first + denoiser.eps(ahead, s, cond)) / 2, t, s, schedule)


def _along(x: Tensor, eps: Tensor, t: Tensor, s: Tensor, schedule: Schedule) -> Tensor:
    """Move from ``t`` to ``s`` with constant noise ``eps``."""
    carry = schedule.alpha(s) / schedule.alpha(t)
    return align(carry, x) * x + align(schedule.sigma(s) - carry * schedule.sigma(t), x) * eps


def edm_like(schedule: Schedule, t_min: float = 0.002, t_max: float = 80.0) -> EDM:
    """The EDM schedule over the noise levels of another one, at most ``[t_min, t_max]``."""
    ends = schedule.ratio(torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64))
    return EDM(t_min=max(t_min, float(ends[0])), t_max=min(t_max, float(ends[1])))
