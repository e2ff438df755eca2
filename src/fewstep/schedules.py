"""Noise schedules: how much data and how much noise a state holds at a time.

Every schedule says ``x_t = alpha(t) x_0 + sigma(t) eps`` with ``eps ~ N(0, I)``, and time runs from data (``t_min``)
to noise (``t_max``).  Nothing else in the library knows which family it is looking at: solvers, denoisers and losses
see ``alpha``, ``sigma`` and ``log_snr`` only.

Times are tensors that align with the *leading* dimensions of a state: ``[]`` (one time for all), ``[B]`` (one per
sample) or ``[B, F]`` (one per frame).  Coefficients are computed in float64 whatever the type of the state;
:func:`align` casts and views them for multiplication.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from fewstep.ranges import Least, Positive
from fewstep.values import check_ranges

Earliest = Annotated[float, Least(0), "least time (nearly data)"]
Latest = Annotated[float, Least(0), "greatest time (noise)"]

#: The angle at which noise is 160 times the data, EDM's 80 at sigma_data = 0.5.
TRIG_LATEST = math.atan(160.0)

#: Half-log-SNRs are kept inside +-LOG_SNR_BOUND, so that a time of pure noise or pure data still has a finite one.
LOG_SNR_BOUND = 20.0


def align(coefficient: Tensor, x: Tensor) -> Tensor:
    """View ``coefficient`` (shape ``[]``, ``[B]``, ``[B, F]``, ...) so that it multiplies ``x`` along its leading
    dimensions, in the type and on the device of ``x``.

    Raises ValueError when the coefficient does not match the leading dimensions of ``x``.
    """
    if coefficient.ndim > x.ndim or any(c not in (1, n) for c, n in zip(coefficient.shape, x.shape, strict=False)):
        raise ValueError(
            f"times of shape {list(coefficient.shape)} do not align with the leading dimensions of a state of shape "
            f"{list(x.shape)}; give one time, one per sample [B] or one per frame [B, F]"
        )
    return coefficient.to(x).reshape(coefficient.shape + (1,) * (x.ndim - coefficient.ndim))


def karras_level(u: Tensor, low: float = 0.002, high: float = 80.0) -> Tensor:
    """The noise level at a share ``u`` of EDM's ramp, equal steps of ``rho^(1/7)`` from ``low`` to ``high``."""
    first, last = low ** (1 / 7), high ** (1 / 7)
    return (first + u * (last - first)) ** 7


def karras_share(level: Tensor, low: float = 0.002, high: float = 80.0) -> Tensor:
    """The share of EDM's ramp at a noise level, 0 below it and 1 above it."""
    first, last = low ** (1 / 7), high ** (1 / 7)
    return ((level ** (1 / 7) - first) / (last - first)).clamp(0, 1)


def described(schedule: Schedule) -> dict[str, Any]:
    """A schedule as plain data: its name and its fields."""
    return {"name": type(schedule).__name__, **asdict(schedule)}


def as_time(t: Tensor | float, x: Tensor) -> Tensor:
    """``t`` as a float64 tensor on the device of ``x``: a plain number becomes one time per sample ``[B]``."""
    time = torch.as_tensor(t, dtype=torch.float64, device=x.device)
    return time.expand(x.shape[0]) if time.ndim == 0 else time


@dataclass(frozen=True)
class Schedule(ABC):
    """``x_t = alpha(t) x_0 + sigma(t) eps``; frozen and stateless.

    Subclasses give the four coefficient functions and ``time_at``; everything else follows from them.  All functions
    take a float64 tensor of times of any shape and return one of the same shape, and are differentiable in ``t``
    (forward and backward).
    """

    #: Whether equal steps of its time are a sensible grid; not where the time is the noise level.
    even: ClassVar[bool] = True
    #: The name of the grid of few-step plans for a denoiser.
    few_steps: ClassVar[str] = "karras"
    #: Whether networks of the family are trained along EDM's ramp of noise levels, and not of times.
    ramped: ClassVar[bool] = False

    t_min: Earliest
    t_max: Latest

    def __post_init__(self) -> None:
        if not (math.isfinite(self.t_min) and math.isfinite(self.t_max) and 0 <= self.t_min < self.t_max):
            raise ValueError(
                f"{type(self).__name__}: t_min={self.t_min} and t_max={self.t_max} must be finite with "
                "0 <= t_min < t_max"
            )
        check_ranges(self)

    @property
    def table_length(self) -> int | None:
        """The number of trained noise levels, which are at the times 0, 1, ...; None where all times are trained."""
        return None

    @cached_property
    def data_time(self) -> float:
        """The time of pure data, at which a grid may end: 0 where ``sigma(0) = 0``; else -1, which is no time of the
        schedule and only says that the last step gives back the prediction (a table of betas starts in noise)."""
        return 0.0 if float(self.sigma(torch.zeros((), dtype=torch.float64))) == 0 else -1.0

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Signal coefficient."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Noise coefficient, increasing in the ratio to alpha."""

    @abstractmethod
    def d_alpha(self, t: Tensor) -> Tensor:
        """d alpha / dt."""

    @abstractmethod
    def d_sigma(self, t: Tensor) -> Tensor:
        """d sigma / dt."""

    @abstractmethod
    def time_at(self, log_snr: Tensor) -> Tensor:
        """Inverse of :meth:`log_snr`, clamped to ``[t_min, t_max]``."""

    def log_snr(self, t: Tensor) -> Tensor:
        """lambda = log(alpha / sigma), *half* the log signal-to-noise ratio, clamped to +-20."""
        tiny = math.exp(-2 * LOG_SNR_BOUND)
        ratio = self.alpha(t).clamp_min(tiny).log() - self.sigma(t).clamp_min(tiny).log()
        return ratio.clamp(-LOG_SNR_BOUND, LOG_SNR_BOUND)

    def ratio(self, t: Tensor) -> Tensor:
        """rho = sigma / alpha, the noise level in the units of the data (the "sigma" of EDM)."""
        return torch.exp(-self.log_snr(t))

    def transition(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The forward kernel from ``s`` to a noisier ``t``: ``x_t = a x_s + sd n``; returns ``(a, sd)``."""
        a = self.alpha(t) / self.alpha(s)
        return a, (self.sigma(t) ** 2 - (a * self.sigma(s)) ** 2).clamp_min(0).sqrt()

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """``alpha(t) x_0 + sigma(t) eps``."""
        return align(self.alpha(t), x0) * x0 + align(self.sigma(t), x0) * eps

    def velocity(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """``d x_t / dt = alpha'(t) x_0 + sigma'(t) eps`` along the straight conditional path."""
        return align(self.d_alpha(t), x0) * x0 + align(self.d_sigma(t), x0) * eps

    def wronskian(self, t: Tensor) -> Tensor:
        """``alpha sigma' - sigma alpha'``, positive: what divides when data and noise are told from state and
        velocity."""
        return self.alpha(t) * self.d_sigma(t) - self.sigma(t) * self.d_alpha(t)

    def move(self, x: Tensor, velocity: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """``x`` at ``t`` moved to ``s`` along the path of the one pair of data and noise that passes there with
        ``velocity``: ``x_s = A x + B v`` with the coefficients of :meth:`coefficients_of_move`.  A DDIM step in
        velocity form: ``x + (s - t) v`` on flow matching, the rotation on TrigFlow, the identity at ``s = t``.
        """
        keep, go = self.coefficients_of_move(t, s)
        return align(keep, x) * x + align(go, x) * velocity

    def coefficients_of_move(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """``(A, B)`` of :meth:`move`, with the :meth:`wronskian` ``w``::

        A = (alpha_s sigma'_t - sigma_s alpha'_t) / w_t,   B = (alpha_t sigma_s - alpha_s sigma_t) / w_t
        """
        w = self.wronskian(t)
        keep = (self.alpha(s) * self.d_sigma(t) - self.sigma(s) * self.d_alpha(t)) / w
        go = (self.alpha(t) * self.sigma(s) - self.alpha(s) * self.sigma(t)) / w
        return keep, go

    def own_time(self, u: Tensor) -> Tensor:
        """The time at a share ``u`` in [0, 1] of the family's own index, in which its networks are trained: the time
        itself for tables and flows, ``rho^(1/7)`` for the noise levels of EDM."""
        if self.ramped:
            return self.time_at(-torch.log(karras_level(u)))
        return self.t_min + (self.t_max - self.t_min) * u

    def own_share(self, t: Tensor) -> Tensor:
        """The share of the family's own index at a time: the inverse of :meth:`own_time`, inside [0, 1]."""
        return karras_share(self.ratio(t)) if self.ramped else (t - self.t_min) / (self.t_max - self.t_min)

    def prior(self, noise: Tensor) -> Tensor:
        """The start state ``sigma(t_max) noise`` of a sampler, from standard normal ``noise``."""
        return noise * float(self.sigma(torch.tensor(self.t_max, dtype=torch.float64)))


@dataclass(frozen=True)
class VPLinear(Schedule):
    """Variance-preserving with ``beta(t) = beta_min + t (beta_max - beta_min)`` (Song et al. 2021, eq. 32)."""

    t_min: Earliest = 1e-3
    t_max: Latest = 1.0
    beta_min: Annotated[Positive, "beta at time 0"] = 0.1
    beta_max: Annotated[Positive, "beta at time 1"] = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.beta_min < self.beta_max:
            raise ValueError(f"VPLinear: need 0 < beta_min < beta_max, got {self.beta_min} and {self.beta_max}")

    def _log_alpha(self, t: Tensor) -> Tensor:
        return -(t**2) * (self.beta_max - self.beta_min) / 4 - t * self.beta_min / 2

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(self._log_alpha(t))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(2 * self._log_alpha(t)))

    def _half_beta(self, t: Tensor) -> Tensor:
        return (self.beta_min + t * (self.beta_max - self.beta_min)) / 2

    def d_alpha(self, t: Tensor) -> Tensor:
        return -self._half_beta(t) * self.alpha(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return self._half_beta(t) * self.alpha(t) ** 2 / self.sigma(t)

    def time_at(self, log_snr: Tensor) -> Tensor:
        q = 2 * (self.beta_max - self.beta_min) * torch.nn.functional.softplus(-2 * log_snr)
        t = q / ((torch.sqrt(self.beta_min**2 + q) + self.beta_min) * (self.beta_max - self.beta_min))
        return t.clamp(self.t_min, self.t_max)


@dataclass(frozen=True)
class VPCosine(Schedule):
    """Variance-preserving on a circle: ``alpha = cos(a t + b)``, ``sigma = sin(a t + b)``.

    The end angles are set by the half-log-SNR at the two ends (Salimans & Ho 2022 use +-10, a log-SNR of +-20).
    """

    t_min: Earliest = 0.0
    t_max: Latest = 1.0
    log_snr_max: Annotated[Positive, "half the log-SNR at t_min, at most 20"] = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.log_snr_max <= LOG_SNR_BOUND or self.t_max > 1:
            raise ValueError(
                f"VPCosine: need 0 < log_snr_max <= {LOG_SNR_BOUND:g} and t_max <= 1, "
                f"got {self.log_snr_max} and {self.t_max}"
            )

    @cached_property
    def _angles(self) -> tuple[float, float]:
        b = math.atan(math.exp(-self.log_snr_max))
        return math.atan(math.exp(self.log_snr_max)) - b, b

    def _angle(self, t: Tensor) -> Tensor:
        slope, start = self._angles
        return slope * t + start

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(self._angle(t))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(self._angle(t))

    def d_alpha(self, t: Tensor) -> Tensor:
        return -self._angles[0] * torch.sin(self._angle(t))

    def d_sigma(self, t: Tensor) -> Tensor:
        return self._angles[0] * torch.cos(self._angle(t))

    def time_at(self, log_snr: Tensor) -> Tensor:
        slope, start = self._angles
        return ((torch.atan(torch.exp(-log_snr)) - start) / slope).clamp(self.t_min, self.t_max)


@dataclass(frozen=True)
class EDM(Schedule):
    """Variance-exploding with time = noise level: ``alpha = 1``, ``sigma = t`` (Karras et al. 2022)."""

    even: ClassVar[bool] = False
    ramped: ClassVar[bool] = True

    t_min: Earliest = 0.002
    t_max: Latest = 80.0

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def time_at(self, log_snr: Tensor) -> Tensor:
        return torch.exp(-log_snr).clamp(self.t_min, self.t_max)


@dataclass(frozen=True)
class FlowMatching(Schedule):
    """Straight lines: ``alpha = 1 - t``, ``sigma = t``; t = 1 is noise (rectified flow, flow matching)."""

    few_steps: ClassVar[str] = "uniform"

    t_min: Earliest = 0.0
    t_max: Latest = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.t_max > 1:
            raise ValueError(f"FlowMatching: t_max={self.t_max} must be at most 1, pure noise")

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def d_alpha(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def time_at(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-log_snr).clamp(self.t_min, self.t_max)


@dataclass(frozen=True)
class ShiftedFlow(Schedule):
    """Flow matching whose own time is shifted, ``sigma = k t / (1 + (k - 1) t)``: for k > 1 a uniform time spends more
    of itself at high noise (Esser et al. 2024, "Scaling Rectified Flow Transformers", eq. 23; SD3, Flux).

    The levels are those of :class:`FlowMatching`, so a model of either is one of the other, with ``.on(schedule)``.
    """

    t_min: Earliest = 0.0
    t_max: Latest = 1.0
    shift: Annotated[Positive, "shift k of the time; above 1 more of it is spent in noise"] = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.t_max > 1:
            raise ValueError(f"ShiftedFlow: t_max={self.t_max} must be at most 1, pure noise")

    def alpha(self, t: Tensor) -> Tensor:
        return (1 - t) / (1 + (self.shift - 1) * t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.shift * t / (1 + (self.shift - 1) * t)

    def d_alpha(self, t: Tensor) -> Tensor:
        return -self.d_sigma(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return self.shift / (1 + (self.shift - 1) * t) ** 2

    def time_at(self, log_snr: Tensor) -> Tensor:
        sigma = torch.sigmoid(-log_snr)
        return (sigma / (self.shift - (self.shift - 1) * sigma)).clamp(self.t_min, self.t_max)


@dataclass(frozen=True)
class TrigFlow(Schedule):
    """A rotation: ``alpha = cos t``, ``sigma = sigma_data sin t`` (Lu & Song 2024; their noise is N(0, sigma_data^2)).

    ``t_max`` defaults to ``atan(80 / 0.5)``, the noise level at which EDM starts.
    """

    few_steps: ClassVar[str] = "uniform"
    ramped: ClassVar[bool] = True

    t_min: Earliest = 0.0
    t_max: Latest = TRIG_LATEST
    sigma_data: Annotated[Positive, "standard deviation of the data"] = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.t_max > math.pi / 2:
            raise ValueError(f"TrigFlow: t_max={self.t_max} must be at most pi/2, pure noise")

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_data * torch.sin(t)

    def d_alpha(self, t: Tensor) -> Tensor:
        return -torch.sin(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return self.sigma_data * torch.cos(t)

    def time_at(self, log_snr: Tensor) -> Tensor:
        return torch.atan(torch.exp(-log_snr) / self.sigma_data).clamp(self.t_min, self.t_max)
