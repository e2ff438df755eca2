"""Zero-shot editing with a student (Song et al. 2023, section 5 and algorithm 4), and with any solver.

Inpainting, colourisation and super-resolution are one thing: in an orthonormal basis ``A`` some coordinates of the
picture are known.  After every call of the student the known coordinates of its prediction are replaced by the
reference's, ``x0 <- A^T [mask * A y + (1 - mask) * A x0]``, and sampling goes on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fewstep.denoisers import Cond
from fewstep.flow_maps import FlowMap
from fewstep.randomness import Noise
from fewstep.sampling.hooks import Hooks
from fewstep.sampling.inputs import Numbers, evaluating, given_conditions, normal_like, states_for
from fewstep.sampling.rollout import Plan, rollout
from fewstep.schedules import align, as_time
from fewstep.values import real, tensor_of, whole


class LinearMeasurement(ABC):
    """An orthonormal change of basis ``A`` and the mask of the coordinates that are known (1) or free (0)."""

    @abstractmethod
    def transform(self, x: Tensor) -> Tensor:
        """``A x``."""

    @abstractmethod
    def inverse(self, z: Tensor) -> Tensor:
        """``A^T z``."""

    @abstractmethod
    def mask(self, z: Tensor) -> Tensor:
        """1 where the coordinates ``z = A x`` are known, 0 where they are free; broadcasts to ``z``."""

    def measure(self, y: Tensor) -> Tensor:
        """The known coordinates of ``y``, 0 elsewhere."""
        z = self.transform(y)
        return z * self.mask(z)

    def replace(self, x0: Tensor, reference: Tensor) -> Tensor:
        """``x0`` with its known coordinates taken from ``reference`` (one a sample, or one for all)."""
        if reference.shape[1:] != x0.shape[1:] or len(reference) not in (1, len(x0)):
            raise ValueError(f"reference of shape {list(reference.shape)} for samples of shape {list(x0.shape)}")
        mine, known = self.transform(x0), self.transform(reference.to(x0))
        return self.inverse(torch.where(self.mask(mine).bool(), known, mine))


@dataclass(frozen=True, eq=False)
class Inpainting(LinearMeasurement):
    """``known`` pixels, 1 or 0, broadcast to the samples (``[H, W]``, ``[1, H, W]``, ``[B, 1, H, W]``); A = I.

    ValueError for other numbers, and for samples that the pixels do not fit.
    """

    known: Numbers

    def __post_init__(self) -> None:
        if not bool(((self.pixels == 0) | (self.pixels == 1)).all()):
            raise ValueError("Inpainting: known must be 1 (known) or 0 (free) everywhere")

    @cached_property
    def pixels(self) -> Tensor:
        """``known`` as a tensor."""
        return tensor_of("Inpainting: known", self.known)

    def transform(self, x: Tensor) -> Tensor:
        return x

    def inverse(self, z: Tensor) -> Tensor:
        return z

    def mask(self, z: Tensor) -> Tensor:
        shape = (1,) * (z.ndim - self.pixels.ndim) + tuple(self.pixels.shape)
        if len(shape) != z.ndim or any(side not in (1, n) for side, n in zip(shape, z.shape, strict=True)):
            raise ValueError(f"Inpainting: known of shape {list(self.pixels.shape)} for samples {list(z.shape)}")
        return self.pixels.to(z)


@dataclass(frozen=True)
class Colorization(LinearMeasurement):
    """The weighted grey value of three channels (dimension 1) is known; two orthogonal colour axes are free."""

    weights: tuple[float, float, float] = (0.2989, 0.587, 0.114)

    def __post_init__(self) -> None:
        weights = [real("Colorization: weights", weight, -1e6, 1e6) for weight in self.weights]
        if len(weights) != 3 or not any(weights):
            raise ValueError(f"Colorization: weights={self.weights} must be three numbers, not all 0")

    @cached_property
    def matrix(self) -> Tensor:
        """``[3, 3]``, its first column the normalised weights."""
        return completed(torch.tensor(self.weights, dtype=torch.float64))

    def transform(self, x: Tensor) -> Tensor:
        if x.ndim < 2 or x.shape[1] != 3:
            raise ValueError(f"colourisation needs samples of 3 channels, got shape {list(x.shape)}")
        return torch.einsum("bc...,cd->bd...", x, self.matrix.to(x))

    def inverse(self, z: Tensor) -> Tensor:
        return torch.einsum("bd...,cd->bc...", z, self.matrix.to(z))

    def mask(self, z: Tensor) -> Tensor:
        return align(torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64), z)


@dataclass(frozen=True)
class SuperResolution(LinearMeasurement):
    """The mean of every ``factor x factor`` patch (last two dimensions) is known, the detail inside it is free."""

    factor: int = 2

    def __post_init__(self) -> None:
        whole("SuperResolution: factor", self.factor, 2)

    @cached_property
    def matrix(self) -> Tensor:
        """``[factor^2, factor^2]`` with a constant first column."""
        return completed(torch.ones(self.factor**2, dtype=torch.float64))

    def transform(self, x: Tensor) -> Tensor:
        f = self.factor
        if x.ndim < 3 or x.shape[-1] % f or x.shape[-2] % f:
            raise ValueError(f"super-resolution by {f} needs sides that are multiples of it, got {list(x.shape)}")
        patches = x.unflatten(-1, (-1, f)).unflatten(-3, (-1, f)).transpose(-3, -2).flatten(-2)
        return patches @ self.matrix.to(x)

    def inverse(self, z: Tensor) -> Tensor:
        f = self.factor
        patches = (z @ self.matrix.T.to(z)).unflatten(-1, (f, f)).transpose(-3, -2)
        return patches.flatten(-2).flatten(-3, -2)

    def mask(self, z: Tensor) -> Tensor:
        return (torch.arange(self.factor**2, device=z.device) == 0).to(z)

    def enlarge(self, small: Tensor) -> Tensor:
        """A reference whose patch means are the pixels of ``small``."""
        return small.repeat_interleave(self.factor, -1).repeat_interleave(self.factor, -2)


def completed(first: Tensor) -> Tensor:
    """An orthogonal matrix whose first column is ``first``, normalised."""
    n = len(first)
    start = torch.eye(n, dtype=first.dtype)
    start[:, 0] = first
    q, r = torch.linalg.qr(start)
    return q * r.diagonal().sign()


class Edited(FlowMap):
    """A student whose every prediction has the known coordinates of ``reference`` put in place.

    Predictions of data are clamped to ``[-bound, bound]`` first (None: not), as in the paper's code.  A jump to a time
    ``s`` above ``t_min`` gets the reference noised to ``s``, ``alpha_s y + sigma_s noise``, with the one ``noise``
    given here.
    """

    def __init__(
        self,
        inner: FlowMap,
        measurement: LinearMeasurement,
        reference: Tensor,
        noise: Tensor,
        bound: float | None = None,
    ) -> None:
        super().__init__(inner.schedule, inner.shape, inner.classes, inner.extras)
        self.inner, self.measurement, self.bound = inner, measurement, bound
        self.reference, self.noise = reference, noise

    def forward(self, x: Tensor, t: Tensor | float, s: Tensor | float, cond: Cond = None, **extras: Tensor) -> Tensor:
        noisy = self.schedule.add_noise(self.reference, self.noise, as_time(s, x))
        return self.measurement.replace(self.inner.jump(x, t, s, cond, **extras), noisy)

    def begin(self, x: Tensor, t: Tensor | float, cond: Cond = None) -> Mapping[str, Tensor]:
        return self.inner.begin(x, t, cond)

    def to_data(self, x: Tensor, t: Tensor | float, cond: Cond = None, **extras: Tensor) -> Tensor:
        x0 = self.inner.to_data(x, t, cond, **extras)
        if self.bound is not None:
            x0 = x0.clamp(-self.bound, self.bound)
        return self.measurement.replace(x0, self.reference)


def edit(
    flow_map: FlowMap,
    reference: Numbers,
    measurement: LinearMeasurement,
    plan: Plan,
    rng: Noise,
    cond: Cond = None,
    bound: float | None = None,
    *,
    extras: Mapping[str, float | Numbers] | None = None,
) -> Tensor:
    """Fill in what ``measurement`` leaves free of ``reference`` ``[B, ...]``.

    The rollout starts as the paper's does, from the reference with its free coordinates set to 0 and noised to the
    first time.  The known coordinates of the result are the reference's.  The paper walks the whole training grid
    (18 to 40 times), re-noising (``gamma = 1``).

    The result has the type of the student's weights, and so has the noise, drawn from ``rng`` (with
    :class:`~fewstep.randomness.PerSample` one source a sample).  Without ``cond`` the student is called without a
    label.  ``extras`` set further inputs of the student.  Dropout is off meanwhile.  What does not fit is refused as by
    :func:`~fewstep.sampling.sample`.
    """
    check_parts(flow_map, plan)
    if not isinstance(measurement, LinearMeasurement):
        raise TypeError(
            f"measurement is a {type(measurement).__name__}: give a LinearMeasurement, such as Inpainting(known)"
        )
    if bound is not None:
        real("bound", bound, 0)
    y = states_for(flow_map, "reference", reference)
    noise = normal_like(rng, y)
    edited = Edited(flow_map, measurement, y, normal_like(rng, y), bound)
    known = measurement.inverse(measurement.measure(y))
    start = flow_map.schedule.add_noise(known, noise, as_time(plan.times[0], y))
    with evaluating(edited):
        return rollout(edited, None, plan, given_conditions(flow_map, y, cond), rng, start=(0, start), extras=extras)


def stroke_to_image(
    flow_map: FlowMap,
    stroke: Numbers,
    plan: Plan,
    rng: Noise,
    cond: Cond = None,
    *,
    extras: Mapping[str, float | Numbers] | None = None,
) -> Tensor:
    """Turn a rough picture ``[B, ...]`` into a sample near it: noise it to ``plan.times[0]``, an intermediate time, and
    roll out from there (the later the time, the freer the result).  Types, noise, ``extras`` and errors are those of
    :func:`edit`."""
    check_parts(flow_map, plan)
    y = states_for(flow_map, "stroke", stroke)
    start = flow_map.schedule.add_noise(y, normal_like(rng, y), as_time(plan.times[0], y))
    with evaluating(flow_map):
        return rollout(flow_map, None, plan, given_conditions(flow_map, y, cond), rng, start=(0, start), extras=extras)


def check_parts(flow_map: FlowMap, plan: Plan) -> None:
    """TypeError for what is no flow map or no plan, ValueError for a plan that starts beyond the schedule's times or
    without noise."""
    if not isinstance(flow_map, FlowMap):
        raise TypeError(f"flow_map is a {type(flow_map).__name__}: give a FlowMap, of a student student.flow_map")
    if not isinstance(plan, Plan):
        raise TypeError(f"plan={plan!r} must be a Plan, such as student.plans[4]")
    first, schedule = plan.times[0], flow_map.schedule
    if first > schedule.t_max or not float(schedule.sigma(torch.tensor(first, dtype=torch.float64))) > 0:
        raise ValueError(f"the plan starts at {first}: it must be a noisy time of {schedule}")


def slerp(a: Tensor, b: Tensor, u: float | Tensor) -> Tensor:
    """Spherical interpolation between noises ``a`` and ``b`` ``[B, ...]``, per sample: ``u = 0`` is a, ``u = 1`` is b.

    Keeps the norm that noise has, so that every point between is noise that a student knows.  ``u`` is a number or
    one per sample ``[B]``.  Parallel noises are interpolated linearly.
    """
    if a.shape != b.shape:
        raise ValueError(f"noises of shape {list(a.shape)} and {list(b.shape)}: they must be of one shape")
    u = as_time(u, a)
    if not bool(u.isfinite().all()):
        raise ValueError(f"u={u.tolist()} must be finite")
    left, right = a.flatten(1).double(), b.flatten(1).double()
    cosine = torch.nn.functional.cosine_similarity(left, right, dim=1)
    angle = torch.acos(cosine.clamp(-1, 1))
    sine = torch.sin(angle)
    straight = sine < 1e-6
    safe = torch.where(straight, 1.0, sine)
    first = torch.where(straight, 1 - u, torch.sin((1 - u) * angle) / safe)
    second = torch.where(straight, u, torch.sin(u * angle) / safe)
    return align(first, a) * a + align(second, b) * b


def measured(measurement: LinearMeasurement, reference: Tensor) -> Hooks:
    """The same replacement for any solver: an output hook on the denoiser's predictions.

    On a grid that ends at pure data the known coordinates of the result are the reference's.
    """
    return Hooks(output=lambda k, x0, x, t: measurement.replace(x0, reference))
