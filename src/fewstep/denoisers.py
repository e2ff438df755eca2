"""Denoisers: any network seen as ``D(x, t, cond) = E[x_0 | x_t = x]``.

Whatever a network was trained to predict is one line of algebra, ``D = c_skip x + c_out F(c_in x, time, cond)``: a
:class:`~fewstep.predictions.Prediction`.  The noise, the score and the velocity follow from the same line, with
coefficients in float64, so that they lose nothing to the difference of ``x`` and ``D`` where there is little noise.
``.on(schedule)`` views the same network on another schedule by matching the signal-to-noise ratio: a flow-matching
teacher *is* a TrigFlow teacher.
Guidance (:mod:`fewstep.guidance`) and thresholding are combinators that return a Denoiser.

Three gradient modes are explicit, see :func:`gradients`: ``"none"``, ``"input"`` (through the state only, parameters
held) and ``"all"``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewstep.conditions import Cond
from fewstep.predictions import Prediction
from fewstep.schedules import Schedule, align, as_time

GradientMode = Literal["none", "input", "all"]
#: Coefficients of the noise and the velocity, which divide by sigma, are those of this time where there is no noise.
LEAST_TIME = 1e-9


@contextmanager
def gradients(module: nn.Module, mode: GradientMode) -> Iterator[None]:
    """Call ``module`` without gradients ("none"), with gradients to its inputs only ("input"), or to inputs and
    parameters ("all")."""
    if mode == "none":
        with torch.no_grad():
            yield
        return
    if mode != "input":
        yield
        return
    held = [p for p in module.parameters() if p.requires_grad]
    for p in held:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in held:
            p.requires_grad_(True)


class Denoiser(nn.Module, ABC):
    """``D(x, t, cond) = E[x_0 | x_t = x]`` on a schedule.

    ``x`` is ``[B, ...]``; ``t`` is a number, ``[B]`` or ``[B, F]``; ``cond`` is what the network takes
    (:data:`~fewstep.conditions.Cond`), None for the unconditional branch.  ``shape`` is the shape of one sample,
    ``classes`` the number of class labels (None without) and ``null`` the condition of one row that stands for "no
    condition" (None: the model is unconditional, or knows none).  ``half_level`` is the noise level ``sigma / alpha``
    at which half of the prediction is decided, where it has been measured
    (:func:`fewstep.sampling.search.half_level`): solvers centre on it.
    """

    half_level: float | None = None

    def __init__(self, schedule: Schedule, shape: tuple[int, ...], classes: int | None = None) -> None:
        super().__init__()
        self.schedule = schedule
        self.shape = tuple(shape)
        self.classes = classes

    @property
    def null(self) -> Cond:
        return torch.tensor([-1]) if self.classes else None

    @property
    def network(self) -> NetworkDenoiser | None:
        """Itself where it is a network with its prediction, None for what is made of others or known exactly."""
        return None

    @property
    def guidance(self) -> float | Tensor | None:
        """The guidance scale that it puts on the model inside, None where it puts none."""
        return None

    @property
    def unguided(self) -> Denoiser:
        """The model without the classifier-free guidance that it is under."""
        return self

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor | float, cond: Cond = None) -> Tensor:
        """The posterior mean of the data, of the shape of ``x``."""

    def affine(self, x: Tensor, t: Tensor, cond: Cond = None, **extras: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(a, b, F)`` with ``D = a x + b F``: what the network itself says, and float64 coefficients of the shape of
        ``t``.  One call; ``(0, 1, D)`` where nothing better is known."""
        return torch.zeros_like(t), torch.ones_like(t), self(x, t, cond, **extras)

    def eps(self, x: Tensor, t: Tensor | float, cond: Cond = None) -> Tensor:
        """The expected noise, ``(x - alpha D) / sigma``."""
        time = as_time(t, x)
        a, b, f = self.affine(x, time, cond)
        alpha, sigma = self.schedule.alpha(time), self.schedule.sigma(time.clamp_min(LEAST_TIME))
        return align((1 - alpha * a) / sigma, x) * x - align(alpha * b / sigma, x) * f

    def score(self, x: Tensor, t: Tensor | float, cond: Cond = None) -> Tensor:
        """The score of the noised law, ``-eps / sigma``."""
        return -self.eps(x, t, cond) / align(self.schedule.sigma(as_time(t, x)), x)

    def velocity(self, x: Tensor, t: Tensor | float, cond: Cond = None, **extras: Tensor) -> Tensor:
        """The probability-flow velocity ``dx/dt = alpha' D + sigma' eps`` in the schedule's own time.

        With ``D = a x + b F`` and ``w = alpha sigma' - sigma alpha'`` it is ``[(sigma' - w a) x - w b F] / sigma``.
        """
        time = as_time(t, x).clamp_min(LEAST_TIME)
        schedule = self.schedule
        a, b, f = self.affine(x, time, cond, **extras)
        sigma, d_sigma, w = schedule.sigma(time), schedule.d_sigma(time), schedule.wronskian(time)
        return align((d_sigma - w * a) / sigma, x) * x - align(w * b / sigma, x) * f

    def label(self, t: Tensor, x: Tensor) -> Tensor:
        """A time as the network is told it, for states like ``x``: the rule for every further time that it takes."""
        raise TypeError(f"a {type(self).__name__} has no network that is told a time")

    def features(self, x: Tensor, t: Tensor | float, cond: Cond = None) -> Tensor:
        """Activations inside the network at ``(x, t)``, of :attr:`feature_shape` a sample, for discriminators."""
        raise TypeError(f"a {type(self).__name__} has no network with features")

    @property
    def feature_shape(self) -> tuple[int, ...]:
        raise TypeError(f"a {type(self).__name__} has no network with features")

    def on(self, schedule: Schedule) -> Denoiser:
        """The same denoiser on another schedule, exactly, by matching the signal-to-noise ratio."""
        return self if schedule == self.schedule else OnSchedule(self, schedule)

    def native(self) -> Denoiser:
        """The same denoiser on the schedule that its network was trained on."""
        return self


def check_prediction(x0: Any, x: Tensor, who: str = "denoiser") -> None:
    """ValueError unless a denoiser (or student) gave a data prediction for a state, and not what broadcasts to one."""
    if not isinstance(x0, Tensor):
        raise ValueError(f"the {who} gave a {type(x0).__name__}, not a tensor of shape {list(x.shape)}")
    if x0.shape != x.shape or not x0.is_floating_point():
        raise ValueError(f"the {who} gave {x0.dtype} of shape {list(x0.shape)} for states of shape {list(x.shape)}")


def denoisers_in(module: nn.Module) -> list[Denoiser]:
    """The denoisers that a module is and is made of, from the outside in."""
    return [part for part in module.modules() if isinstance(part, Denoiser)]


def networks_in(module: nn.Module) -> list[NetworkDenoiser]:
    """The networks with their predictions that a module is made of."""
    return [part.network for part in denoisers_in(module) if part.network is not None]


def half_level_of(denoiser: Denoiser) -> float | None:
    """The half level of a denoiser, or of one that it is made of; None where none was measured."""
    return next((part.half_level for part in denoisers_in(denoiser) if part.half_level is not None), None)


def predicts_noise(denoiser: Denoiser) -> bool:
    """Whether a network in a denoiser was trained to predict noise."""
    return any(part.prediction.noise for part in networks_in(denoiser))


class View(Denoiser):
    """A denoiser made of another one, ``inner``: of its samples and conditions, by default on its schedule."""

    def __init__(self, inner: Denoiser, schedule: Schedule | None = None) -> None:
        super().__init__(inner.schedule if schedule is None else schedule, inner.shape, inner.classes)
        self.inner = inner

    @property
    def null(self) -> Cond:
        return self.inner.null

    def label(self, t: Tensor, x: Tensor) -> Tensor:
        return self.inner.label(t, x)

    def features(self, x: Tensor, t: Tensor | float, cond: Cond = None) -> Tensor:
        return self.inner.features(x, t, cond)

    @property
    def feature_shape(self) -> tuple[int, ...]:
        return self.inner.feature_shape


class OnSchedule(View):
    """A denoiser seen on another schedule: ``D'(x, t) = D(k x, t')`` with equal log-SNR at ``t`` and ``t'``.

    ``k`` scales the state from one circle to the other.  Where the inner schedule does not reach the asked noise
    level, its nearest end is used.
    """

    def __init__(self, inner: Denoiser, schedule: Schedule) -> None:
        super().__init__(inner, schedule)

    def forward(self, x: Tensor, t: Tensor | float, cond: Cond = None, **extras: Tensor) -> Tensor:
        inner_time, scale = self.matched(as_time(t, x))
        return self.inner(align(scale, x) * x, inner_time, cond, **extras)

    def affine(self, x: Tensor, t: Tensor, cond: Cond = None, **extras: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inner_time, scale = self.matched(t)
        a, b, f = self.inner.affine(align(scale, x) * x, inner_time, cond, **extras)
        return a * scale, b, f

    def label(self, t: Tensor, x: Tensor) -> Tensor:
        return self.inner.label(self.matched(t)[0], x)

    def features(self, x: Tensor, t: Tensor | float, cond: Cond = None) -> Tensor:
        inner_time, scale = self.matched(as_time(t, x))
        return self.inner.features(align(scale, x) * x, inner_time, cond)

    def matched(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``(t', k)``: the inner time of the same noise level, and the scale of the state there."""
        outer, inner = self.schedule, self.inner.schedule
        inner_time = inner.time_at(outer.log_snr(t))
        scale = torch.sqrt(
            (inner.alpha(inner_time) ** 2 + inner.sigma(inner_time) ** 2) / (outer.alpha(t) ** 2 + outer.sigma(t) ** 2)
        )
        return inner_time, scale

    def on(self, schedule: Schedule) -> Denoiser:
        return self.inner.on(schedule)

    def native(self) -> Denoiser:
        return self.inner.native()


class NetworkDenoiser(Denoiser):
    """A network ``F(x, time, cond, **extras)`` with its :class:`Prediction` on a schedule.

    ``extras`` are the further inputs that a student's network takes (the target time ``s``, a guidance weight, a step
    size): keyword tensors that are handed through.  ``null`` is for networks that take other conditions than class
    labels: the one row that stands for "no condition".  A network may have ``net.features(x, time, cond)`` and
    ``net.feature_shape`` too, a pass that ends at activations in its middle: discriminators there are spared the rest.
    """

    net: Any

    def __init__(
        self,
        net: nn.Module,
        schedule: Schedule,
        prediction: Prediction,
        shape: tuple[int, ...],
        classes: int | None = None,
        null: Cond = None,
    ) -> None:
        super().__init__(schedule, shape, classes)
        self.net = net
        self.prediction = prediction
        self._null = null

    @property
    def null(self) -> Cond:
        return super().null if self._null is None else self._null

    @property
    def network(self) -> NetworkDenoiser:
        return self

    def forward(self, x: Tensor, t: Tensor | float, cond: Cond = None, **extras: Tensor) -> Tensor:
        skip, out, f = self.affine(x, as_time(t, x), cond, **extras)
        return align(skip, x) * x + align(out, x) * f

    def affine(self, x: Tensor, t: Tensor, cond: Cond = None, **extras: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        skip, out, scale = self.prediction.coefficients(self.schedule, t)
        return skip, out, self.net(align(scale, x) * x, self.label(t, x), cond, **extras)

    def on(self, schedule: Schedule) -> Denoiser:
        if not self.prediction.portable:
            return super().on(schedule)
        view = NetworkDenoiser(self.net, schedule, self.prediction, self.shape, self.classes, self._null)
        view.half_level = self.half_level
        return view

    def raw(self, x: Tensor, t: Tensor | float, cond: Cond = None, **extras: Tensor) -> Tensor:
        """``F`` itself, with its input scaled and its time mapped."""
        return self.net(*self.seen(x, as_time(t, x)), cond, **extras)

    def seen(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """State and time as the network is given them."""
        return align(self.prediction.coefficients(self.schedule, t)[2], x) * x, self.label(t, x)

    def features(self, x: Tensor, t: Tensor | float, cond: Cond = None) -> Tensor:
        if not hasattr(self.net, "features"):
            raise self.without_features()
        return self.net.features(*self.seen(x, as_time(t, x)), cond)

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """ValueError for a network without features of its own."""
        shape = getattr(self.net, "feature_shape", None)
        if shape is None:
            raise self.without_features()
        return tuple(shape)

    def without_features(self) -> ValueError:
        return ValueError(
            f"a {type(self.net).__name__} says no features: an energy distance needs a method features(x, t, cond) and "
            "a feature_shape"
        )

    def label(self, t: Tensor, x: Tensor) -> Tensor:
        """The time in float32, whatever the type of the state (float64 for float64)."""
        time = self.prediction.time(self.schedule, t)
        return time.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


class Clipped(View):
    """Static thresholding: the data prediction clamped to ``[low, high]`` (pixel models only)."""

    def __init__(self, inner: Denoiser, low: float = -1.0, high: float = 1.0) -> None:
        super().__init__(inner)
        self.low, self.high = low, high

    def forward(self, x: Tensor, t: Tensor | float, cond: Cond = None, **extras: Tensor) -> Tensor:
        return self.inner(x, t, cond, **extras).clamp(self.low, self.high)


class DynamicThreshold(View):
    """Dynamic thresholding (Saharia et al. 2022): per sample, clip at the ``quantile`` of |D| (at least ``ceiling``)
    and divide by it, so that the result lies in ``[-ceiling, ceiling]``."""

    def __init__(self, inner: Denoiser, quantile: float = 0.995, ceiling: float = 1.0) -> None:
        super().__init__(inner)
        self.quantile, self.ceiling = quantile, ceiling

    def forward(self, x: Tensor, t: Tensor | float, cond: Cond = None, **extras: Tensor) -> Tensor:
        x0 = self.inner(x, t, cond, **extras)
        bound = torch.quantile(x0.flatten(1).abs(), self.quantile, dim=1).clamp_min(self.ceiling)
        bound = align(bound, x0)
        return x0.clamp(-bound, bound) / bound * self.ceiling


class CountCalls(View):
    """Counts the network calls that pass through: ``.calls`` (per batch, guidance outside not included)."""

    def __init__(self, inner: Denoiser) -> None:
        super().__init__(inner)
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor | float, cond: Cond = None, **extras: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x, t, cond, **extras)

    def affine(self, x: Tensor, t: Tensor, cond: Cond = None, **extras: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.calls += 1
        return self.inner.affine(x, t, cond, **extras)
