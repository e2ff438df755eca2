"""Flow maps: students that move a state from one time to another in one network call.

``jump(x, t, s, cond)`` takes ``x`` from time ``t`` to a cleaner time ``s``.  It is a DDIM move in which a learned
``g(x, t, s)`` stands in for the denoiser::

    x_s = alpha_s g + (sigma_s / sigma_t) (x - alpha_t g)

so ``jump(x, t, t) = x`` whatever the network says, ``s = t_min`` is a consistency model, and ``t = t_max``,
``s = t_min`` a one-step generator.  With the variance-exploding schedule this is CTM's ``(s/t) x + (1 - s/t) g``; on
TrigFlow with ``s = 0`` it is sCM's ``cos t x - sin t sigma_data F``.  A student made from a teacher,
``Jump(copy of the teacher)``, equals the teacher's own DDIM move until it is trained.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.conditions import Cond
from fewstep.denoisers import Denoiser, View, check_prediction
from fewstep.extras import Input, check_declared, values_for
from fewstep.grids import own_index
from fewstep.schedules import EDM, Schedule, align, as_time


class FlowMap(nn.Module, ABC):
    """A learned jump between two times of one schedule; ``shape``, ``classes`` and ``null`` as in :class:`Denoiser`.

    ``extras`` are the further inputs that sampling may set, by name; calls are given each as ``[B]``.  ``two_times``
    says whether its network is told the target time too, ``only_to_data`` whether it knows jumps to ``t_min`` only,
    ``calls_to_begin`` how many network calls :meth:`begin` makes.
    """

    two_times: bool = False
    only_to_data: bool = False
    calls_to_begin: int = 0

    def __init__(
        self,
        schedule: Schedule,
        shape: tuple[int, ...],
        classes: int | None,
        extras: Mapping[str, Input] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.schedule = schedule
        self.shape = shape
        self.classes = classes
        check_declared(extras)
        self.extras = dict(extras)

    @property
    def null(self) -> Cond:
        """The condition of one row that stands for none; None where there is none."""
        return torch.tensor([-1]) if self.classes else None

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor | float, s: Tensor | float, cond: Cond = None, **extras: Tensor) -> Tensor:
        """The jump: ``x`` at time ``t`` moved to time ``s``."""

    def jump(self, x: Tensor, t: Tensor | float, s: Tensor | float, cond: Cond = None, **extras: Tensor) -> Tensor:
        """``x`` at time ``t`` moved to time ``s <= t``; equal to ``x`` at ``s = t``."""
        return self(x, t, s, cond, **extras)

    def to_data(self, x: Tensor, t: Tensor | float, cond: Cond = None, **extras: Tensor) -> Tensor:
        """The consistency function ``f(x, t)``: the jump to ``t_min``."""
        return self(x, t, self.schedule.t_min, cond, **extras)

    def mean_velocity(
        self, x: Tensor, t: Tensor | float, s: Tensor | float, cond: Cond = None, **extras: Tensor
    ) -> Tensor:
        """``F(x, t, s)``, the jump in velocity form: ``x_s = schedule.move(x, F, t, s)``, and ``dx/dt`` at ``s = t``.

        What identities between two times are written in, because it loses nothing where the times meet or where there
        is little noise.  TypeError for a map that has no such form.
        """
        raise TypeError(f"a {type(self).__name__} has no velocity form")

    def jump_up(self, x: Tensor, t: Tensor | float, s: Tensor | float, cond: Cond = None, **extras: Tensor) -> Tensor:
        """``x`` at time ``t`` moved up its path to a noisier time ``s >= t``, which is what encoding needs.  ValueError
        for a map that jumps to data only; one that was never trained upward says what its network happens to say."""
        if self.only_to_data:
            raise ValueError(f"a {type(self).__name__} jumps to data only: it knows no way up to noise")
        return self(x, t, s, cond, **extras)

    def begin(self, x: Tensor, t: Tensor | float, cond: Cond = None) -> Mapping[str, Tensor]:
        """What the map is told in every call of one rollout, by name, found once from the state ``x`` at time ``t``
        where the rollout starts: ``[B]``, or of the shape of a state.  Nothing, unless a map says otherwise."""
        return {}

    def instant(self) -> Denoiser:
        """The denoiser that the map is where it does not move, ``g(x, t, t)``: what can teach a next stage.  ValueError
        for a map that has none."""
        raise ValueError(f"a {type(self).__name__} knows where its paths end, not what a state is the mean of")

    def teacher(self) -> Denoiser:
        """The denoiser that a next training starts from; TypeError or ValueError for a map that has none."""
        raise TypeError(f"a {type(self).__name__} cannot be the teacher of a next stage")

    def start(self, extras: tuple[str, ...]) -> Denoiser:
        """The denoiser that a training goes on from whose network takes the further inputs ``extras``; errors as
        :meth:`teacher`."""
        return self.teacher()

    def inputs(self, x: Tensor, given: Mapping[str, Any]) -> dict[str, Tensor]:
        """The further inputs for the states ``x`` ``[B, ...]``, ``[B]`` each: those ``given``, numbers or one a sample,
        and the defaults of the rest.

        ValueError or TypeError for an input that the map does not take, a value out of its range or of another shape.
        """
        return values_for(x, self.extras, given)


def ddim_move(x: Tensor, x0: Tensor, t: Tensor, s: Tensor, schedule: Schedule) -> Tensor:
    """``alpha_s x0 + (sigma_s / sigma_t) (x - alpha_t x0)``: where the straight line through ``x`` at ``t`` and the
    data prediction ``x0`` is at ``s``.  Times are float64 tensors; a ``t`` without noise moves nowhere."""
    noise = schedule.sigma(t)
    clean = noise == 0
    carry = torch.where(clean, 1.0, schedule.sigma(s) / torch.where(clean, 1.0, noise))
    return align(carry, x) * x + align(schedule.alpha(s) - carry * schedule.alpha(t), x) * x0


class Jump(FlowMap):
    """The DDIM-form jump with ``g`` given by a denoiser.

    ``two_times`` says whether the denoiser's network takes the target time ``s`` as an extra input (CTM, flow maps);
    without it ``g`` depends on ``(x, t)`` only (consistency models, progressive distillation, one-step students).
    The target time is handed over as the *network* sees times.

    ``upward`` says that it was trained to jump to noisier times: an encoder, from data to noise
    (:func:`~fewstep.sampling.encode`).  ValueError when it is asked for a jump down.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        two_times: bool = False,
        extras: Mapping[str, Input] = MappingProxyType({}),
        upward: bool = False,
    ) -> None:
        super().__init__(denoiser.schedule, denoiser.shape, denoiser.classes, extras)
        self.denoiser = denoiser
        self.two_times = two_times
        self.upward = upward

    @property
    def null(self) -> Cond:
        return self.denoiser.null

    def forward(self, x: Tensor, t: Tensor | float, s: Tensor | float, cond: Cond = None, **extras: Tensor) -> Tensor:
        if self.upward:
            raise ValueError("this student is an encoder, from data to noise: it makes no samples, encode() uses it")
        time, target = as_time(t, x), as_time(s, x)
        x0 = self.predict(x, time, target, cond, **extras)
        check_prediction(x0, x)
        return ddim_move(x, x0, time, target, self.schedule)

    def jump_up(self, x: Tensor, t: Tensor | float, s: Tensor | float, cond: Cond = None, **extras: Tensor) -> Tensor:
        """In velocity form, which leaves data without noise as well: there the mean of the data says nothing about the
        noise to come."""
        time, target = as_time(t, x), as_time(s, x)
        return self.schedule.move(x, self.mean_velocity(x, time, target, cond, **extras), time, target)

    def predict(self, x: Tensor, t: Tensor | float, s: Tensor | float, cond: Cond = None, **extras: Tensor) -> Tensor:
        """``g(x, t, s)``, the data prediction whose DDIM move is the jump."""
        return self.denoiser(x, t, cond, **self.told(x, s), **extras)

    def mean_velocity(
        self, x: Tensor, t: Tensor | float, s: Tensor | float, cond: Cond = None, **extras: Tensor
    ) -> Tensor:
        return self.denoiser.velocity(x, t, cond, **self.told(x, s), **extras)

    def told(self, x: Tensor, s: Tensor | float) -> dict[str, Tensor]:
        """The target time, for a network that takes it."""
        return {"s": self.denoiser.label(as_time(s, x), x)} if self.two_times else {}

    def teacher(self) -> Denoiser:
        return self.start(())

    def start(self, extras: tuple[str, ...]) -> Denoiser:
        if self.upward:
            raise ValueError("an encoder, whose network is no denoiser to start from")
        if self.two_times and "s" not in extras:
            raise ValueError("a student of two times, whose network is no denoiser to start from")
        check_passed_on(self.extras, extras)
        return self.denoiser

    def instant(self) -> Denoiser:
        return AtItself(self.denoiser) if self.two_times else self.denoiser


class AtItself(View):
    """The denoiser of a two-time jump: its target time is its time."""

    def forward(self, x: Tensor, t: Tensor | float, cond: Cond = None, **extras: Tensor) -> Tensor:
        return self.inner(x, t, cond, s=self.label(as_time(t, x), x), **extras)

    def affine(self, x: Tensor, t: Tensor, cond: Cond = None, **extras: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.inner.affine(x, t, cond, s=self.label(t, x), **extras)


class Consistency(FlowMap):
    """A consistency function: it jumps to the data, ``t_min`` of its schedule, only.

    ValueError for another target time.
    """

    only_to_data = True

    def __init__(self, denoiser: Denoiser, sigma_data: float, extras: Mapping[str, Input]) -> None:
        if not sigma_data > 0:
            raise ValueError(f"{type(self).__name__}: sigma_data={sigma_data} must be positive")
        super().__init__(denoiser.schedule, denoiser.shape, denoiser.classes, extras)
        self.denoiser = denoiser
        self.sigma_data = sigma_data

    @property
    def null(self) -> Cond:
        return self.denoiser.null

    @abstractmethod
    def to_data(self, x: Tensor, t: Tensor | float, cond: Cond = None, **extras: Tensor) -> Tensor: ...

    def forward(self, x: Tensor, t: Tensor | float, s: Tensor | float, cond: Cond = None, **extras: Tensor) -> Tensor:
        time, target = as_time(t, x), as_time(s, x)
        if bool((target != self.schedule.t_min).any()):
            raise ValueError(f"a {type(self).__name__} jumps to t_min={self.schedule.t_min} only")
        return self.to_data(x, time, cond, **extras)

    def teacher(self) -> Denoiser:
        return self.start(())

    def start(self, extras: tuple[str, ...]) -> Denoiser:
        check_passed_on(self.extras, extras)
        return self.denoiser


class EDMConsistency(Consistency):
    """The consistency function of Song et al. 2023 (eq. 5 and appendix C) on the EDM schedule::

        f(x, t) = c_skip(t) x + c_out(t) F(c_in x, time(t)),   eps = t_min
        c_skip = sd^2 / ((t - eps)^2 + sd^2),  c_out = sd (t - eps) / sqrt(t^2 + sd^2)

    with the ``F`` of EDM's preconditioning, ``D = sd^2 / (t^2 + sd^2) x + sd t / sqrt(t^2 + sd^2) F``.  Eliminating
    ``F`` writes it for any denoiser: ``f = c_skip x + (1 - eps / t) (D - sd^2 / (t^2 + sd^2) x)``, so it starts as
    the teacher's denoiser where ``t >> eps``.
    """

    def __init__(
        self, denoiser: Denoiser, sigma_data: float = 0.5, extras: Mapping[str, Input] = MappingProxyType({})
    ) -> None:
        if not isinstance(denoiser.schedule, EDM):
            raise TypeError(f"EDMConsistency is written on EDM, the denoiser is on {type(denoiser.schedule).__name__}")
        super().__init__(denoiser, sigma_data, extras)

    def to_data(self, x: Tensor, t: Tensor | float, cond: Cond = None, **extras: Tensor) -> Tensor:
        time, variance, eps = as_time(t, x), self.sigma_data**2, self.schedule.t_min
        skip = variance / ((time - eps) ** 2 + variance)
        out = 1 - eps / time
        rest = skip - out * variance / (time**2 + variance)
        x0 = self.denoiser(x, time, cond, **extras)
        check_prediction(x0, x)
        return align(rest, x) * x + align(out, x) * x0


class LatentConsistency(Consistency):
    """The consistency function of Luo et al. 2023 on any schedule::

        f(x, t) = c_skip x + c_out D(x, t),   c_skip = sd^2 / (k^2 + sd^2),  c_out = k / sqrt(k^2 + sd^2)

    with ``k = time_scale n`` and ``n`` the step of the table at ``t``, in thousandths of the family's own index where
    there is no table.  It is ``x`` at ``t_min`` and ``D`` to six digits from ``n = 20`` on, at the paper's
    ``time_scale`` of 10.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        sigma_data: float = 0.5,
        time_scale: float = 10.0,
        extras: Mapping[str, Input] = MappingProxyType({}),
    ) -> None:
        super().__init__(denoiser, sigma_data, extras)
        if not time_scale > 0:
            raise ValueError(f"LatentConsistency: time_scale={time_scale} must be positive")
        self.time_scale = time_scale

    def to_data(self, x: Tensor, t: Tensor | float, cond: Cond = None, **extras: Tensor) -> Tensor:
        time = as_time(t, x)
        scaled, variance = self.time_scale * own_index(self.schedule, time), self.sigma_data**2
        x0 = self.denoiser(x, time, cond, **extras)
        check_prediction(x0, x)
        skip, out = variance / (scaled**2 + variance), scaled / (scaled**2 + variance).sqrt()
        return align(skip, x) * x + align(out, x) * x0


def check_passed_on(taken: Mapping[str, Input], extras: tuple[str, ...]) -> None:
    """ValueError for a further input of a student that a training which passes on ``extras`` would leave out."""
    if lacking := sorted(set(taken) - set(extras)):
        raise ValueError(f"a student with the further input {lacking[0]}, which this training does not pass on")
