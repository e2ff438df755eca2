"""The likelihood of data under a denoiser, by its probability flow.

Along the flow ``dx/dt = v(x, t)`` the log-density of what flows falls by the divergence of ``v``, so that of data is
that of the noise it flows to, which is known, and an integral on the way (Chen et al. 2018, "Neural Ordinary
Differential Equations"; Song et al. 2021, "Score-Based Generative Modeling", section 4.3)::

    log p(x, t_min) = log N(x_T; 0, sigma_T^2) + int div v dt   from t_min to T = t_max

The flow is walked on the circle of :mod:`fewstep.exact.ode`, where it is smooth from clean data to pure noise, by
Dormand and Prince's pair of orders 5 and 4, with steps as long as the error allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.denoisers import Cond, Denoiser, gradients
from fewstep.exact.ode import CirclePath
from fewstep.randomness import Noise
from fewstep.sampling.inputs import Numbers, evaluating, given_conditions, normal_like, states_for
from fewstep.values import real, whole

#: The most numbers a sample may have for the exact trace, which takes a backward pass each.
EXACT = 1024
#: More steps than any tolerance asks for.
MOST_STEPS = 10_000
#: The stages of Dormand and Prince's pair: their places, their rows, and the row of the error (order 5 less order 4).
PLACES = (0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1)
ROWS = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
ERROR = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


@dataclass(frozen=True, eq=False)
class Likelihood:
    """The log-likelihoods ``nats`` (float64 ``[B]``) of samples of ``dims`` numbers, and the network ``calls`` made."""

    nats: Tensor
    dims: int
    calls: int

    def bits_per_dim(self, width: float = 1.0) -> Tensor:
        """The bits that a number of a sample costs, ``[B]``: ``-nats / (dims log 2) - log2 width``, with the ``width``
        of the bins that the numbers were rounded to (1 / 128 for 256 levels in [-1, 1]; 1 for numbers without bins)."""
        real("width", width, 1e-300)
        return -self.nats / (self.dims * math.log(2)) - math.log2(width)


def log_likelihood(
    denoiser: Denoiser,
    x: Numbers,
    cond: Cond = None,
    *,
    probes: int | None = None,
    rng: Noise | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    scales: tuple[float, float] = (0.1, 4.0),
) -> Likelihood:
    """The log-likelihood of data ``x`` ``[B, ...]`` under a denoiser, for a student ``student.flow_map.instant()``.

    It is the density at ``t_min`` of what the denoiser's flow makes of ``N(0, sigma(t_max)^2)``, from which sampling
    starts.  Numbers that were rounded to bins have no density: add uniform noise of one bin first, and
    :meth:`Likelihood.bits_per_dim` is a bound for them.

    The divergence is exact, with a backward pass for every number of a sample, or with ``probes`` an unbiased estimate
    (Hutchinson's) from so many random signs a sample out of ``rng``, kept for the whole way.  ``rtol`` and ``atol`` are
    what a step may be wrong by, in the state and in nats; all samples take the steps that the worst one needs.
    ``scales`` are the smallest and the largest length in the data, which only change the number of steps.

    The state is kept in float64, the network is called in the type of its weights, without dropout.  ValueError for
    arguments that do not fit, for samples that are too large for the exact divergence, and where the network's
    predictions are not finite.
    """
    x = states_for(denoiser, "x", x)
    cond, dims = given_conditions(denoiser, x, cond), x[0].numel()
    for name, tolerance in (("rtol", rtol), ("atol", atol)):
        real(name, tolerance, 1e-12, 1.0)
    if probes is None and dims > EXACT:
        raise ValueError(f"the exact divergence of {dims} numbers takes as many backward passes a call: give probes=1")
    if probes is not None and rng is None:
        raise ValueError(f"probes={probes} are drawn: pass rng")
    signs = (
        None
        if probes is None or rng is None
        else [normal_like(rng, x).sign() for _ in range(whole("probes", probes, 1))]
    )
    path, schedule = CirclePath(denoiser, cond, scales), denoiser.schedule
    ends = torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64, device=x.device)
    radius, (start, end) = path.place(ends)

    def flow(y: Tensor, w: float) -> tuple[Tensor, Tensor]:
        return slope_and_divergence(path, y.to(x.dtype), w, signs)

    with evaluating(denoiser), gradients(denoiser, "input"):
        y, gathered, calls = walk(flow, x.double() / radius[0], float(start), float(end), rtol, atol)
    level = schedule.sigma(ends[1]) / radius[1]
    prior = -0.5 * (y / level).square().flatten(1).sum(1) - dims * (level.log() + 0.5 * math.log(2 * math.pi))
    return Likelihood(prior + gathered - dims * radius[0].log(), dims, calls)


def slope_and_divergence(path: CirclePath, y: Tensor, w: float, signs: list[Tensor] | None) -> tuple[Tensor, Tensor]:
    """``dy/dw`` and its divergence ``[B]``, in float64: exact, or from random ``signs`` of the shape of ``y``."""
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        slope = path.slope(y, torch.full((len(y),), w, dtype=torch.float64, device=y.device))
    found = torch.zeros(len(y), dtype=torch.float64, device=y.device)
    if signs is not None:
        for sign in signs:
            (pulled,) = torch.autograd.grad(slope, y, sign, retain_graph=True)
            found += (pulled * sign).flatten(1).double().sum(1) / len(signs)
        return slope.detach().double(), found
    flat = slope.flatten(1)
    for k in range(flat.shape[1]):
        (pulled,) = torch.autograd.grad(flat[:, k].sum(), y, retain_graph=True)
        found += pulled.flatten(1)[:, k].double()
    return slope.detach().double(), found


def walk(
    flow: Callable[[Tensor, float], tuple[Tensor, Tensor]],
    y: Tensor,
    start: float,
    end: float,
    rtol: float,
    atol: float,
) -> tuple[Tensor, Tensor, int]:
    """The state ``y`` carried along ``flow`` from ``start`` to ``end``, what the rates ``[B]`` that come with its slope
    add up to on the way, and the calls made."""
    gathered = torch.zeros(len(y), dtype=torch.float64, device=y.device)
    w, h, first, calls = start, (end - start) / 50, flow(y, start), 1
    for _ in range(MOST_STEPS):
        h = min(h, end - w)
        outputs = [first]
        for place, row in zip(PLACES[1:], ROWS, strict=True):
            state = y + h * _sum(row, [slope for slope, _ in outputs])
            outputs.append(flow(state, w + place * h))
        calls += len(ROWS)
        slopes, rates = [slope for slope, _ in outputs], [rate for _, rate in outputs]
        wrong = h * _sum(ERROR, slopes) / (atol + rtol * torch.maximum(y.abs(), state.abs()))
        error = float(
            torch.maximum(wrong.flatten(1).square().mean(1).sqrt(), (h * _sum(ERROR, rates)).abs() / atol).max()
        )
        if not math.isfinite(error):
            raise ValueError("the likelihood is not finite: the denoiser's predictions, or their derivatives, are not")
        if error <= 1:
            y, gathered, first = state, gathered + h * _sum(ROWS[-1], rates[:-1]), outputs[-1]
            if w + h >= end - 1e-12 * abs(end - start):
                return y, gathered, calls
            w += h
        h *= min(5.0, max(0.2, 0.9 * max(error, 1e-10) ** -0.2))
    raise ValueError(f"no {MOST_STEPS} steps are enough for rtol={rtol:g} and atol={atol:g}: raise them")


def _sum(row: tuple[float, ...], outputs: list[Tensor]) -> Tensor:
    """What a row of weights makes of outputs."""
    total = torch.zeros_like(outputs[0])
    for weight, output in zip(row, outputs, strict=True):
        total += weight * output
    return total
