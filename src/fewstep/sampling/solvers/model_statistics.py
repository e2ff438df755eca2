"""Empirical model statistics of a teacher, for DPM-Solver-v3 (Zheng et al. 2023, section 3.1 and appendix C.1).

With ``y = x / alpha`` and D the data prediction, everything the paper writes in eps and x is, on every schedule,

    l = 1 - k,   k = E[diag dD/dy]                      Hutchinson: mean of v J v, v of random signs
    f = k y - D,   f' = k (D - y) + k' y - D'           y' = D - y along the flow
    s, b = least squares of f' on f

D' is the total derivative along the flow, one forward-mode pass with tangents ``(dx, dt) / dlambda``; k' are central
differences.  f and f' are linear in (y, D, D') with coefficients known only at the end,
so the sums of the products of the three are kept, in float64, and one pass over the data is enough.

Differs from the released code, which draws noise and signs anew at every level and then smooths k' by a moving average
over 5 levels on both sides: here the same ones serve at every level, k is smooth in lambda by itself, and the average
would only blur k' (measured on digits and on a mixture: errors of the solver up to 10 times smaller without it, and as
good from 64 samples as from 1024).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fewstep.denoisers import Cond, Denoiser
from fewstep.randomness import Rng
from fewstep.sampling.inputs import evaluating
from fewstep.sampling.solvers.dpm_solver_v3 import Statistics, statistics_grid
from fewstep.schedules import Schedule, align
from fewstep.tangents import Field, finite_difference, tangent

#: ``(field, x, t, dx, dt) -> (value, slope)``: a directional derivative.
Derivative = Callable[[Field, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

#: For networks without a forward-mode rule.  Tangents are in units of the noise and of lambda; a hundredth of either
#: leaves about 1e-4 of truncation and, in float32, 1e-5 of rounding.
by_differences: Derivative = partial(finite_difference, step=1e-2)

#: Where f varies by less than this share of its natural scale, s fades to 0: its estimate is 0 / 0 there.
RIDGE = 1e-3


def flow_direction(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(on_x, on_x0, dt)``: along the probability flow ``dx / dlambda = on_x x + on_x0 D`` and ``dt / dlambda``."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    d_alpha, d_sigma = schedule.d_alpha(t), schedule.d_sigma(t)
    dt = alpha * sigma / (d_alpha * sigma - alpha * d_sigma)
    return dt * d_sigma / sigma, dt * (d_alpha - alpha * d_sigma / sigma), dt


def diagonal(
    denoiser: Denoiser, x: Tensor, t: Tensor, signs: Tensor, cond: Cond, derivative: Derivative
) -> tuple[Tensor, Tensor]:
    """``D`` and Hutchinson's ``v (dD/dy) v``, whose mean over signs ``v`` is ``diag dD/dy``."""
    noise, ratio = denoiser.schedule.sigma(t), denoiser.schedule.ratio(t)
    # t, not t_: a derivative in x alone costs half as much
    x0, slope = derivative(lambda x_, t_: denoiser(x_, t, cond), x, t, align(noise, x) * signs, torch.zeros_like(t))
    return x0, slope * signs / align(ratio, x)


def total_derivative(
    denoiser: Denoiser, x: Tensor, t: Tensor, x0: Tensor, cond: Cond, derivative: Derivative
) -> Tensor:
    """``dD / dlambda`` along the probability flow through ``(x, t)``, where the prediction is ``x0``."""
    on_x, on_x0, dt = flow_direction(denoiser.schedule, t)
    dx = align(on_x, x) * x + align(on_x0, x) * x0
    return derivative(lambda x_, t_: denoiser(x_, t_, cond), x, t, dx, dt)[1]


class Moments:
    """Sums over samples, at every level and for every number of a sample."""

    def __init__(self, levels: int, x: Tensor) -> None:
        shape = (9, levels, *x.shape[1:])
        self._sums = torch.zeros(shape, dtype=torch.float64, device=x.device)
        self._count = [0] * levels

    def add(self, level: int, k: Tensor, y: Tensor, x0: Tensor, x0_slope: Tensor) -> None:
        """Samples ``[B, ...]`` of one level."""
        k, y, d, e = (part.double() for part in (k, y, x0, x0_slope))
        products = (k, y, d, e, y * y, y * d, d * d, y * e, d * e)
        for i, product in enumerate(products):
            self._sums[i, level] += product.sum(0)
        self._count[level] += len(k)

    def means(self) -> tuple[Tensor, ...]:
        """``E[k, y, D, D', y y, y D, D D, y D', D D']``, each ``[levels, ...]``."""
        count = torch.tensor(self._count, dtype=torch.float64, device=self._sums.device)
        return tuple((self._sums / count.reshape(-1, *[1] * (self._sums.ndim - 2))).unbind(0))


def moving_average(values: Tensor, half_window: int) -> Tensor:
    """The mean over ``2 half_window + 1`` rows, over fewer but as many on both sides near the ends: a straight line
    stays one."""
    n = len(values)
    sums = torch.cat([torch.zeros_like(values[:1]), values.cumsum(0)])
    at = torch.arange(n, device=values.device)
    half = torch.minimum(at, n - 1 - at).clamp_max(half_window)
    return (sums[at + half + 1] - sums[at - half]) / (2 * half + 1).to(values).reshape(-1, *[1] * (values.ndim - 1))


def fitted(log_snr: Tensor, means: tuple[Tensor, ...], data_square: float, half_window: int) -> Statistics:
    """The statistics from the means of :class:`Moments` and the mean square of the data.

    A pixel that is nearly Gaussian, or always the same, has an ``f`` that does not vary (and so has every pixel at high
    noise), which leaves ``s`` undetermined.  A ridge of ``RIDGE^2`` times the variance that noise and data leave open,
    ``rho^2 v / (rho^2 + v)``, then gives ``s = 0, b = E f'``.
    """
    k, y, d, e, yy, yd, dd, ye, de = means
    spacing = float(log_snr[1] - log_snr[0])
    k_slope = moving_average(torch.gradient(k, spacing=spacing, dim=0, edge_order=2)[0], half_window)
    on_y = k_slope - k  # f' = on_y y + k D - D'
    f, f_slope = k * y - d, on_y * y + k * d - e
    variance = (k**2 * yy - 2 * k * yd + dd - f**2).clamp_min(0)
    covariance = k * on_y * yy + (k**2 - on_y) * yd - k * ye - k * dd + de - f * f_slope
    noise = torch.exp(-2 * log_snr).to(k).reshape(-1, *[1] * (k.ndim - 1))
    s = covariance / (variance + RIDGE**2 * noise * data_square / (noise + data_square))
    return Statistics(log_snr, 1 - k, s, f_slope - s * f)


def estimate(
    denoiser: Denoiser,
    x0: Tensor,
    rng: Rng,
    *,
    cond: Cond = None,
    log_snr: Tensor | None = None,
    batch: int = 128,
    half_window: int = 0,
    derivative: Derivative = tangent,
    progress: Callable[[int, int], None] | None = None,
) -> Statistics:
    """The statistics of ``denoiser`` (guided or not, any schedule) from data ``x0`` ``[K, *shape]``, or samples of the
    model itself, with their condition ``cond`` ``[K]``.

    ``log_snr`` are the levels, by default those of
    :func:`~fewstep.sampling.solvers.dpm_solver_v3.statistics_grid`; paper: 120 to 1200
    of them and K of 1024 to 4096.  ``half_window`` smooths ``l'`` over so many levels on both sides (paper: 5).
    ``derivative`` is forward mode; :data:`by_differences` is for networks without it.  ``progress(done, of)`` is told
    after every level of every batch.  Works in the type of ``x0`` and sums in float64.

    Raises ValueError on an empty, all-zero or ill-shaped ``x0``, and when the statistics come out non-finite.
    """
    if x0.ndim < 1 or len(x0) == 0 or tuple(x0.shape[1:]) != denoiser.shape:
        raise ValueError(f"x0 of shape {list(x0.shape)}: need samples [K, {', '.join(map(str, denoiser.shape))}]")
    if not bool(x0.any()):
        raise ValueError("x0 is zero throughout: the statistics need data of the model's law")
    if batch < 1 or half_window < 0:
        raise ValueError(f"batch={batch} must be at least 1 and half_window={half_window} not negative")
    if isinstance(cond, Tensor) and len(cond) != len(x0):
        raise ValueError(f"cond holds {len(cond)} conditions for {len(x0)} samples")
    schedule = denoiser.schedule
    log_snr = statistics_grid(schedule) if log_snr is None else log_snr.double()
    times = schedule.time_at(log_snr).to(x0.device)
    alphas = schedule.alpha(times)
    moments = Moments(len(log_snr), x0)
    starts = range(0, len(x0), batch)
    with torch.no_grad(), evaluating(denoiser):
        for i, start in enumerate(starts):
            clean = x0[start : start + batch]
            labels = cond[start : start + batch] if isinstance(cond, Tensor) else cond
            noise, signs = rng.normal_like(clean), rng.normal_like(clean).sign()
            for level, (time, alpha) in enumerate(zip(times, alphas, strict=True)):
                t = time.repeat(len(clean))
                x = schedule.add_noise(clean, noise, t)
                predicted, k = diagonal(denoiser, x, t, signs, labels, derivative)
                slope = total_derivative(denoiser, x, t, predicted, labels, derivative)
                moments.add(level, k, x.double() / alpha, predicted, slope)
                if progress is not None:
                    progress(i * len(times) + level + 1, len(starts) * len(times))
    means = tuple(mean.cpu() for mean in moments.means())
    return fitted(log_snr.cpu(), means, float(x0.double().square().mean()), half_window)
