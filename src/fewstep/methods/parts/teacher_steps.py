"""What losses ask of a teacher: steps, deterministic or stochastic, with a time of its own for every sample."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewstep.denoisers import Cond, Denoiser, networks_in
from fewstep.extras import Input
from fewstep.flow_maps import ddim_move
from fewstep.grids import at_index, own_index
from fewstep.guidance import Guided
from fewstep.randomness import Rng
from fewstep.schedules import EDM, Schedule, align
from fewstep.values import Written, check, read, real, suggestion

#: Beyond this a number of the network has no digit left in float32.
MOST = 1e6


def guided(teacher: Denoiser, scale: float, field: str = "guidance") -> Denoiser:
    """The teacher under classifier-free guidance, itself at scale 1; ValueError, naming the method's ``field``, when it
    knows no "no condition" to be led away from."""
    if scale == 1:
        return teacher
    check_guidable(teacher, scale, field=field)
    return Guided(teacher, scale)


def steered(teacher: Denoiser, scale: float, plain: Tensor, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
    """What :func:`guided` makes of the teacher's ``plain`` prediction, which is known already."""
    if scale == 1:
        return plain
    check_guidable(teacher, scale)
    return Guided(teacher, scale).steered(plain, x, t, cond)


def check_guidable(teacher: Denoiser, *scales: float, field: str = "guidance") -> None:
    """ValueError, naming the method's ``field`` of these scales, where one is not 1 and the teacher knows no "no
    condition" to be led away from."""
    if teacher.null is None and any(scale != 1 for scale in scales):
        written = ", ".join(f"{scale:g}" for scale in scales)
        value = written if len(scales) == 1 else f"({written})"
        raise ValueError(
            f"{field}={value}: this teacher is unconditional, or knows no empty condition; its only scale is 1"
        )


def check_all_guidable(teacher: Denoiser, scales: Sequence[float], field: str = "guidances") -> None:
    """Errors as :func:`guided`, for a field of several scales."""
    check_guidable(teacher, *scales, field=field)
    for scale in scales:
        guided(teacher, scale, field)


def guided_by_choice(teacher: Denoiser, scales: Sequence[float], n: int, rng: Rng) -> tuple[Denoiser, Tensor]:
    """The teacher under one of the ``scales`` a sample, all equally probable, and which they are, ``[n]`` in float32;
    errors as :func:`guided`.  A single scale is not drawn."""
    check_all_guidable(teacher, scales)
    if len(scales) == 1:
        return guided(teacher, scales[0]), torch.full((n,), float(scales[0]), device=rng.device)
    drawn = rng.choice(n, [1.0] * len(scales))
    w = torch.tensor(scales, dtype=torch.float32, device=rng.device)[drawn]
    return Guided(teacher, w), w


def guidance_input(teacher: Denoiser, scales: Sequence[float]) -> dict[str, Input]:
    """The guidance scale as an input ``w`` of a student, where there are several: the middle one unless asked.  Errors
    as :func:`guided`."""
    check_all_guidable(teacher, scales)
    scales = sorted(scales)
    middle = scales[len(scales) // 2]
    return {"w": Input(middle, scales[0], scales[-1], unguided=1.0)} if scales[0] < scales[-1] else {}


def ddim_step(denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, cond: Cond = None) -> Tensor:
    """One DDIM step from ``t`` to ``s``, both ``[B]``."""
    return ddim_move(x, denoiser(x, t, cond), t, s, denoiser.schedule)


def ddim_steps(denoiser: Denoiser, x: Tensor, times: Tensor, cond: Cond = None) -> Tensor:
    """DDIM steps along falling ``times`` ``[K, B]``."""
    for t, s in pairwise(times):
        x = ddim_step(denoiser, x, t, s, cond)
    return x


@dataclass(frozen=True)
class StepNoise(Written, ABC):
    """How much of the noise of a state a stochastic step keeps, the rest being drawn anew; written ``0.3`` for DDIM's
    eta and ``er-sde:r^1.5`` for ER-SDE's phi."""

    shown: ClassVar[str] = "ETA|er-sde:PHI"

    @abstractmethod
    def kept(self, before: Tensor, after: Tensor) -> Tensor:
        """The share of the noise that stays in a step between two levels ``sigma / alpha``; 1 is deterministic."""

    @abstractmethod
    def check_levels(self, levels: Tensor) -> None:
        """ValueError where a step along falling ``levels`` would need noise of negative variance."""

    @classmethod
    def parse(cls, text: str) -> StepNoise:
        return ERSDE(text.removeprefix(ERSDE.prefix)) if text.startswith(ERSDE.prefix) else DDIMNoise(read(float, text))

    @classmethod
    def from_plain(cls, value: Any) -> StepNoise:
        return cls.parse(value) if isinstance(value, str) else DDIMNoise(check(float, value))


@dataclass(frozen=True)
class DDIMNoise(StepNoise):
    """DDIM's ``eta`` in [0, 1] (Song et al. 2021): 0 is the probability flow, 1 the posterior of DDPM."""

    eta: float = 0.0

    def __post_init__(self) -> None:
        real("eta", self.eta, 0, 1)

    def kept(self, before: Tensor, after: Tensor) -> Tensor:
        return torch.sqrt(1 - self.eta**2 * (1 - (after / before) ** 2))

    def check_levels(self, levels: Tensor) -> None:
        """Any will do."""

    def plain(self) -> float:
        return self.eta

    def __str__(self) -> str:
        return repr(self.eta).removesuffix(".0")


#: ER-SDE's noise scales by name (Cui et al. 2023, arXiv 2309.06169, and the authors' code, whose default is "5"): "r"
#: is the probability flow, "r^2" the reverse SDE.
PHI: dict[str, Callable[[Tensor], Tensor]] = {
    "r": lambda r: r,
    "r^1.5": lambda r: r**1.5,
    "r^2": lambda r: r**2,
    "r^2.5": lambda r: r**2.5,
    "log": lambda r: r**0.9 * torch.log10(1 + 100 * r**1.5),
    "5": lambda r: r * (torch.exp(r**0.3) + 10),
}
#: Between these levels phi is asked: it need not know pure noise or clean data.
LEVELS = (1e-8, 1e8)


@dataclass(frozen=True)
class ERSDE(StepNoise):
    """The first-order ER-SDE solver: with ``y = x / alpha`` and ``c = phi(r_s) / phi(r_t)``::

        y_s = c y_t + (1 - c) D + sqrt(r_s^2 - c^2 r_t^2) z

    so that ``phi(r) / r`` must not fall.  ``phi`` is one of :data:`PHI`, or a function of the level, which no file can
    record.
    """

    prefix: ClassVar[str] = "er-sde:"

    phi: str | Callable[[Tensor], Tensor] = "5"

    def __post_init__(self) -> None:
        if isinstance(self.phi, str) and self.phi not in PHI:
            raise ValueError(f"phi='{self.phi}' is not one of {', '.join(PHI)}{suggestion(self.phi, PHI)}")

    def stretch(self, level: Tensor) -> Tensor:
        """``phi(r) / r``."""
        r = level.clamp(*LEVELS)
        phi = PHI[self.phi] if isinstance(self.phi, str) else self.phi
        return phi(r) / r

    def kept(self, before: Tensor, after: Tensor) -> Tensor:
        return (self.stretch(after) / self.stretch(before)).clamp_max(1)

    def check_levels(self, levels: Tensor) -> None:
        share = self.stretch(levels[1:]) / self.stretch(levels[:-1])
        for k in (~(share <= 1 + 1e-9)).nonzero().flatten().tolist()[:1]:
            raise ValueError(
                f"noise={self}: from the level {float(levels[k]):.4g} to {float(levels[k + 1]):.4g} the variance of "
                "the noise would be negative: phi(r) / r must not fall with r"
            )

    def __str__(self) -> str:
        return self.prefix + (self.phi if isinstance(self.phi, str) else self.phi.__name__)

    def plain(self) -> str:
        if not isinstance(self.phi, str):
            raise ValueError(f"noise: '{self}' is a function, which no file can record: name one, or use no folder")
        return str(self)


def stochastic_step(
    denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, noise: StepNoise, rng: Rng, cond: Cond = None
) -> Tensor:
    """One first-order step of the reverse SDE from ``t`` to ``s``, both ``[B]``, of which ``k`` of the noise stays::

    x_s = alpha_s D + sigma_s (k eps + sqrt(1 - k^2) z)
    """
    schedule = denoiser.schedule
    x0 = denoiser(x, t, cond)
    kept = noise.kept(schedule.ratio(t), schedule.ratio(s))
    mean = align(kept, x) * ddim_move(x, x0, t, s, schedule) + align((1 - kept) * schedule.alpha(s), x) * x0
    return mean + align(schedule.sigma(s) * torch.sqrt(1 - kept**2), x) * rng.normal_like(x)


def stochastic_steps(
    denoiser: Denoiser, x: Tensor, times: Tensor, noise: StepNoise, rng: Rng, cond: Cond = None
) -> Tensor:
    """Steps along falling ``times`` ``[K, B]``, with noise of its own in each."""
    for t, s in pairwise(times):
        x = stochastic_step(denoiser, x, t, s, noise, rng, cond)
    return x


def times_between(schedule: Schedule, t: Tensor, s: Tensor, steps: int) -> Tensor:
    """The times ``[steps + 1, B]`` of equal steps from ``t`` to ``s`` in the teacher's own index."""
    first, last = own_index(schedule, t), own_index(schedule, s)
    shares = torch.arange(1, steps, dtype=torch.float64, device=t.device)[:, None] / steps
    return torch.cat([t[None], at_index(schedule, first + shares * (last - first)), s[None]])


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
