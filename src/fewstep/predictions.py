"""What a network was trained to predict, ``D = c_skip x + c_out F(c_in x, time)``: one line of algebra each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from fewstep.ranges import Positive
from fewstep.schedules import Schedule, align
from fewstep.values import check_ranges


@dataclass(frozen=True)
class Prediction(ABC):
    """What a network ``F`` predicts: ``D = c_skip x + c_out F(c_in x, time(t))``.

    ``coefficients`` and ``time`` take a schedule and float64 times and are differentiable in the times.
    ``time_scale`` multiplies the time that the network is given (1000 for networks that count milli-times).
    ``portable`` predictions depend on the noise level only, not on how a schedule counts time, so the same network
    and prediction make the same denoiser on every schedule.
    """

    portable: ClassVar[bool] = False
    #: Whether it is the noise, or the data, that the network predicts.
    noise: ClassVar[bool] = False
    data: ClassVar[bool] = False

    time_scale: Annotated[Positive, "factor on the time that the network sees"] = 1.0

    def __post_init__(self) -> None:
        check_ranges(self)

    @abstractmethod
    def coefficients(self, schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(c_skip, c_out, c_in)``, each of the shape of ``t``."""

    def time(self, schedule: Schedule, t: Tensor) -> Tensor:
        """The time input of the network."""
        return self.time_scale * t

    def target(self, x: Tensor, x0: Tensor, schedule: Schedule, t: Tensor) -> Tensor:
        """What ``F`` must return for the denoiser to return ``x0``: the regression target of training."""
        skip, out, _ = self.coefficients(schedule, t)
        return (x0 - align(skip, x) * x) / align(out, x)


@dataclass(frozen=True)
class X0(Prediction):
    """The network predicts the data."""

    data: ClassVar[bool] = True

    def coefficients(self, schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        one = torch.ones_like(t)
        return torch.zeros_like(t), one, one


@dataclass(frozen=True)
class Eps(Prediction):
    """The network predicts the noise; singular where alpha is 0."""

    noise: ClassVar[bool] = True

    def coefficients(self, schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        alpha = schedule.alpha(t)
        return 1 / alpha, -schedule.sigma(t) / alpha, torch.ones_like(t)


@dataclass(frozen=True)
class V(Prediction):
    """The network predicts ``v = alpha eps - sigma x_0`` (Salimans & Ho 2022)."""

    def coefficients(self, schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        power = alpha**2 + sigma**2
        return alpha / power, -sigma / power, torch.ones_like(t)


@dataclass(frozen=True)
class Velocity(Prediction):
    """The network predicts ``d x_t / dt = alpha' x_0 + sigma' eps``; for flow matching ``eps - x_0``."""

    def coefficients(self, schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        d_alpha, d_sigma = schedule.d_alpha(t), schedule.d_sigma(t)
        wronskian = alpha * d_sigma - sigma * d_alpha
        return d_sigma / wronskian, -sigma / wronskian, torch.ones_like(t)


@dataclass(frozen=True)
class EDMPrediction(Prediction):
    """EDM's preconditioning (Karras et al. 2022, table 1) with time input ``log(rho) / 4``, on any schedule."""

    portable: ClassVar[bool] = True

    sigma_data: Annotated[Positive, "standard deviation of the data"] = 0.5

    def coefficients(self, schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        power = (alpha * self.sigma_data) ** 2 + sigma**2
        return alpha * self.sigma_data**2 / power, sigma * self.sigma_data / power.sqrt(), power.rsqrt()

    def time(self, schedule: Schedule, t: Tensor) -> Tensor:
        return -schedule.log_snr(t) / 4 * self.time_scale


@dataclass(frozen=True)
class TrigPrediction(Prediction):
    """TrigFlow's preconditioning ``D = cos(a) x - sin(a) sigma_data F(x / sigma_data, a)`` (Lu & Song 2024, eq. 5),
    on any schedule: ``a = atan(rho / sigma_data)`` and the state is first scaled onto the circle.

    Equal to EDM's coefficients but for the sign of ``F``; the time input is the angle ``a`` itself.
    """

    portable: ClassVar[bool] = True

    sigma_data: Annotated[Positive, "standard deviation of the data"] = 0.5

    def coefficients(self, schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        radius = torch.sqrt((alpha * self.sigma_data) ** 2 + sigma**2)
        cos, sin = alpha * self.sigma_data / radius, sigma / radius
        return cos * self.sigma_data / radius, -sin * self.sigma_data, 1 / radius

    def time(self, schedule: Schedule, t: Tensor) -> Tensor:
        return torch.atan2(schedule.sigma(t), schedule.alpha(t) * self.sigma_data) * self.time_scale


PREDICTIONS: dict[str, type[Prediction]] = {
    "x0": X0,
    "eps": Eps,
    "v": V,
    "velocity": Velocity,
    "edm": EDMPrediction,
    "trig": TrigPrediction,
}


@dataclass(frozen=True)
class Retimed(Prediction):
    """Another prediction, ``of`` by name, whose network is told TrigFlow's angle ``atan(rho / sigma_data)`` instead of
    its own time: a logarithm or a count of steps changes fast, and continuous-time losses differentiate it.

    ``sigma_data`` is that of the angle, and of the prediction where it has one.  A network that was trained with its
    own time has to learn the angle first (:class:`~fewstep.methods.teachers.retime.Retime`).
    """

    of: Annotated[str, "name of the prediction"] = "v"
    sigma_data: Annotated[Positive, "standard deviation of the data"] = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.of not in PREDICTIONS:
            raise ValueError(f"Retimed: of='{self.of}' is unknown; choose from {', '.join(PREDICTIONS)}")

    @property
    def inner(self) -> Prediction:
        """The prediction itself."""
        return self.carried(PREDICTIONS[self.of])

    def carried(self, cls: type[Prediction]) -> Prediction:
        """A prediction of a class with what it shares with this one."""
        own = {field.name for field in fields(cls)} & {"sigma_data"}
        return cls(**dict.fromkeys(own, self.sigma_data))

    @property
    def portable(self) -> bool:  # type: ignore[override]
        return PREDICTIONS[self.of].portable

    @property
    def noise(self) -> bool:  # type: ignore[override]
        return PREDICTIONS[self.of].noise

    @property
    def data(self) -> bool:  # type: ignore[override]
        return PREDICTIONS[self.of].data

    def coefficients(self, schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.inner.coefficients(schedule, t)

    def time(self, schedule: Schedule, t: Tensor) -> Tensor:
        return torch.atan2(schedule.sigma(t), schedule.alpha(t) * self.sigma_data) * self.time_scale


def retimed(prediction: Prediction, sigma_data: float = 0.5) -> Prediction:
    """A prediction whose network is told the angle; itself where it is already.  Its own ``sigma_data`` stays."""
    name = next((name for name, cls in PREDICTIONS.items() if cls is type(prediction)), "trig")
    if name == "trig":
        return prediction
    sd = float(vars(prediction).get("sigma_data", sigma_data))
    return Retimed(of=name, sigma_data=sd)


#: What saved models may have besides.
ALL_PREDICTIONS: dict[str, type[Prediction]] = {**PREDICTIONS, "retimed": Retimed}
