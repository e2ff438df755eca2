"""Guidance: a model steered away from another prediction, at all noise levels or at some."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fewstep.conditions import Cond, without
from fewstep.denoisers import Denoiser, View, denoisers_in
from fewstep.schedules import align, as_time
from fewstep.values import real

#: A larger weight is a slip: already this one leaves float16.
MOST_GUIDANCE = 1e5


def guidance_scale(denoiser: Denoiser) -> float:
    """The largest guidance scale at work in a denoiser; 1 for none."""
    scales = [part.guidance for part in denoisers_in(denoiser) if part.guidance is not None]
    return max((float(torch.as_tensor(scale).max()) for scale in scales), default=1.0)


class Guidance(View, ABC):
    """A model steered away from another prediction, ``D = D_away + w (D_plain - D_away)``; w = 1 is no guidance.

    ``scale`` is w, a number or one weight per sample ``[B]`` (ValueError when called with another count, or when a
    number is out of range).  Costs two calls, unless :class:`GuidanceInterval` leaves one out.
    """

    def __init__(self, inner: Denoiser, scale: float | Tensor) -> None:
        super().__init__(inner)
        if not isinstance(scale, Tensor):
            real("guidance", scale, -MOST_GUIDANCE, MOST_GUIDANCE)
        self.scale = scale

    @property
    def guidance(self) -> float | Tensor:
        return self.scale

    def plain(self, x: Tensor, t: Tensor | float, cond: Cond = None) -> Tensor:
        """The model without guidance."""
        return self.inner(x, t, cond)

    @abstractmethod
    def steered(self, plain: Tensor, x: Tensor, t: Tensor | float, cond: Cond = None) -> Tensor:
        """What guidance makes of the plain prediction, with the second call."""

    def forward(self, x: Tensor, t: Tensor | float, cond: Cond = None) -> Tensor:
        return self.steered(self.plain(x, t, cond), x, t, cond)

    def extrapolated(self, plain: Tensor, away: Tensor) -> Tensor:
        """``away + w (plain - away)`` in float32 at least, rounded once to the type of ``plain``.

        Exactly ``plain`` at w = 1, exactly ``away`` at w = 0 and where the two are equal.
        """
        kind = torch.promote_types(plain.dtype, torch.float32)
        scale: Any = self.scale
        if isinstance(scale, Tensor):
            if any(n not in (1, b) for n, b in zip(scale.shape, plain.shape, strict=False)):
                raise ValueError(
                    f"guidance scale of shape {list(scale.shape)} for {len(plain)} samples: give a number or one "
                    f"weight per sample [{len(plain)}]"
                )
            scale = align(scale.to(plain.device, kind), plain.to(kind))
        return torch.lerp(away.to(kind), plain.to(kind), scale).to(plain.dtype)


class Guided(Guidance):
    """Classifier-free guidance, ``D = D_unc + w (D_cond - D_unc)``.

    ``negative`` replaces the unconditional branch (a negative prompt).  What the model has no "no condition" for (a
    picture beside the prompt) is given to both branches.  Without a condition and without a negative one there is
    nothing to guide between: the unconditional model, one call.
    """

    def __init__(self, inner: Denoiser, scale: float | Tensor, negative: Cond = None) -> None:
        super().__init__(inner, scale)
        self.negative = negative

    @property
    def unguided(self) -> Denoiser:
        return self.inner

    def steered(self, plain: Tensor, x: Tensor, t: Tensor | float, cond: Cond = None) -> Tensor:
        if cond is None and self.negative is None:
            return plain
        return self.extrapolated(plain, self.inner(x, t, self.away(cond, len(x))))

    def affine(self, x: Tensor, t: Tensor, cond: Cond = None, **extras: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b, plain = self.inner.affine(x, t, cond, **extras)
        if cond is None and self.negative is None:
            return a, b, plain
        return a, b, self.extrapolated(plain, self.inner.affine(x, t, self.away(cond, len(x)), **extras)[2])

    def away(self, cond: Cond, n: int) -> Cond:
        """The condition that ``n`` samples are led away from."""
        if self.negative is not None or not isinstance(cond, Mapping) or not isinstance(self.null, Mapping):
            return self.negative
        return without(self.null, cond, n)


class Autoguided(Guidance):
    """Guidance away from a worse version of the model, ``D = D_bad + w (D_good - D_bad)`` (Karras et al. 2024, "Guiding
    a Diffusion Model with a Bad Version of Itself").

    Both see the same state, noise level and condition; ``bad`` may live on another schedule.  ValueError when it
    makes other samples or knows other classes.
    """

    def __init__(self, good: Denoiser, bad: Denoiser, scale: float | Tensor) -> None:
        super().__init__(good, scale)
        if bad.shape != good.shape:
            raise ValueError(
                f"the guide makes samples {list(bad.shape)}, the model {list(good.shape)}: autoguidance needs a worse "
                "version of the same model"
            )
        if bad.classes != good.classes:
            raise ValueError(
                f"the guide knows {bad.classes or 'no'} classes, the model {good.classes or 'no'}: autoguidance gives "
                "both the same condition"
            )
        self.bad = bad.on(good.schedule)

    def steered(self, plain: Tensor, x: Tensor, t: Tensor | float, cond: Cond = None) -> Tensor:
        return self.extrapolated(plain, self.bad(x, t, cond))

    def velocity(self, x: Tensor, t: Tensor | float, cond: Cond = None, **extras: Tensor) -> Tensor:
        # of the velocities themselves, which lose nothing where there is little noise
        plain = self.inner.velocity(x, t, cond, **extras)
        return self.extrapolated(plain, self.bad.velocity(x, t, cond, **extras))


class GuidanceInterval(View):
    """Guidance at noise levels ``low <= sigma / alpha <= high`` only (Kynkäänniemi et al. 2024, "Applying Guidance in a
    Limited Interval"); the plain model, with one call, elsewhere.

    The bounds are in the units of the data whatever the schedule; ``high`` may be infinity.  In a batch of several
    noise levels the second call is made for the whole batch, unless all are outside.  ValueError unless
    ``0 <= low < high``.
    """

    inner: Guidance

    def __init__(self, guided: Guidance, low: float, high: float) -> None:
        super().__init__(guided)
        if not 0 <= low < high:
            raise ValueError(f"guidance interval [{low:g}, {high:g}]: need 0 <= low < high, noise levels sigma / alpha")
        self.low, self.high = low, high

    def forward(self, x: Tensor, t: Tensor | float, cond: Cond = None) -> Tensor:
        plain = self.inner.plain(x, t, cond)
        inside = self.inside(as_time(t, x))
        if not bool(inside.any()):
            return plain
        steered = self.inner.steered(plain, x, t, cond)
        return steered if bool(inside.all()) else torch.where(align(inside, x).bool(), steered, plain)

    def inside(self, t: Tensor) -> Tensor:
        """Which of the times ``t`` are guided."""
        # a bound that is a level of the grid counts, although rho comes out of the schedule with a rounding error
        level = self.schedule.ratio(t)
        return (level >= self.low * (1 - 1e-9)) & (level <= self.high * (1 + 1e-9))
