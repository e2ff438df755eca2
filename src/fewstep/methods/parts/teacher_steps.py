"""What losses ask of a teacher: one deterministic step with a time of its own for every sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.denoisers import Cond, Denoiser, networks_in
from fewstep.extras import Input
from fewstep.flow_maps import ddim_move
from fewstep.guidance import Guided
from fewstep.randomness import Rng
from fewstep.schedules import EDM, Schedule, align

#: Beyond this a number of the network has no digit left in float32.
MOST = 1e6


def guided(teacher: Denoiser, scale: float) -> Denoiser:
    """The teacher under classifier-free guidance, itself at scale 1; ValueError when it knows no "no condition" to be
    led away from."""
    if scale == 1:
        return teacher
    if teacher.null is None:
        raise ValueError(f"guidance={scale:g}: this teacher is unconditional, or knows no empty condition; set 1")
    return Guided(teacher, scale)


def guided_by_choice(teacher: Denoiser, scales: Sequence[float], n: int, rng: Rng) -> tuple[Denoiser, Tensor]:
    """The teacher under one of the ``scales`` a sample, all equally probable, and which they are, ``[n]`` in float32;
    errors as :func:`guided`.  A single scale is not drawn."""
    if len(scales) == 1:
        return guided(teacher, scales[0]), torch.full((n,), float(scales[0]), device=rng.device)
    for scale in scales:
        guided(teacher, scale)
    drawn = rng.choice(n, [1.0] * len(scales))
    w = torch.tensor(scales, dtype=torch.float32, device=rng.device)[drawn]
    return Guided(teacher, w), w


def guidance_input(teacher: Denoiser, scales: Sequence[float]) -> dict[str, Input]:
    """The guidance scale as an input ``w`` of a student, where there are several: the middle one unless asked.  Errors
    as :func:`guided`."""
    for scale in scales:
        guided(teacher, scale)
    scales = sorted(scales)
    middle = scales[len(scales) // 2]
    return {"w": Input(middle, scales[0], scales[-1], unguided=1.0)} if scales[0] < scales[-1] else {}


def ddim_step(denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, cond: Cond = None) -> Tensor:
    """One DDIM step from ``t`` to ``s``, both ``[B]``."""
    return ddim_move(x, denoiser(x, t, cond), t, s, denoiser.schedule)


def heun_step(denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, cond: Cond = None) -> Tensor:
    """One Heun step of ``d(x/alpha) / d(sigma/alpha) = eps`` from ``t`` to ``s``, both ``[B]`` (EDM, algorithm 1)."""
    schedule = denoiser.schedule
    first = denoiser.eps(x, t, cond)
    ahead = _along(x, first, t, s, schedule)
    second = denoiser.eps(ahead, s, cond)
    return _along(x, (first + second) / 2, t, s, schedule)


def _along(x: Tensor, eps: Tensor, t: Tensor, s: Tensor, schedule: Schedule) -> Tensor:
    """Move from ``t`` to ``s`` with constant noise ``eps``."""
    carry = schedule.alpha(s) / schedule.alpha(t)
    return align(carry, x) * x + align(schedule.sigma(s) - carry * schedule.sigma(t), x) * eps


def edm_like(schedule: Schedule, t_min: float = 0.002, t_max: float = 80.0) -> EDM:
    """The EDM schedule over the noise levels of another one, at most ``[t_min, t_max]``."""
    ends = schedule.ratio(torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64))
    return EDM(t_min=max(t_min, float(ends[0])), t_max=min(t_max, float(ends[1])))


def check_tells_data(teacher: Denoiser) -> None:
    """ValueError for a teacher whose data prediction magnifies what its network says more than ``MOST`` times at the
    noisiest time: a prediction of the noise where alpha vanishes."""
    t = torch.tensor(teacher.schedule.t_max, dtype=torch.float64)
    for inner in networks_in(teacher):
        own = inner.schedule.time_at(teacher.schedule.log_snr(t))
        _, factor, _ = inner.prediction.coefficients(inner.schedule, own)
        if not float(factor.abs()) <= MOST:
            raise ValueError(
                f"the teacher does not tell the data at t = {float(t):g}, where there is only noise: this method "
                "needs one that predicts velocity, v or the data"
            )
