"""Score matching: the denoising loss, and the score-distillation vector with its surrogate loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.conditions import Cond, count, where
from fewstep.denoisers import Denoiser
from fewstep.randomness import Rng
from fewstep.schedules import Schedule, align


def denoising_loss(model: Denoiser, x0: Tensor, t: Tensor, cond: Cond, rng: Rng, eps: Tensor | None = None) -> Tensor:
    """``E || F(c_in x_t) - target ||^2``, mean over everything; ``t`` ``[B]``, ``eps`` fresh unless given.

    The target is what ``F`` must be for the denoiser ``a x + b F`` to give back ``x0``.
    """
    eps = rng.normal_like(x0) if eps is None else eps
    x_t = model.schedule.add_noise(x0, eps, t)
    return data_loss(model, x_t, t, cond, x0)


def data_loss(model: Denoiser, x_t: Tensor, t: Tensor, cond: Cond, target: Tensor) -> Tensor:
    """``E || F - (target - a x_t) / b ||^2``: the squared error of a data prediction, as ``F`` sees it."""
    a, b, f = model.affine(x_t, t, cond)
    return torch.nn.functional.mse_loss(f, (target - align(a, x_t) * x_t) / align(b, x_t))


def velocity_loss(model: Denoiser, x0: Tensor, t: Tensor, cond: Cond, rng: Rng) -> Tensor:
    """``E || dx/dt - (alpha' x0 + sigma' eps) ||^2``, mean over everything, whatever the network predicts.  On TrigFlow
    it is ``|| D - x0 ||^2 / sin^2 t`` exactly."""
    eps = rng.normal_like(x0)
    x_t = model.schedule.add_noise(x0, eps, t)
    return torch.nn.functional.mse_loss(model.velocity(x_t, t, cond), model.schedule.velocity(x0, eps, t))


def known_at(schedule: Schedule, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(alpha_s, sigma_s, a, sd)`` of a state that is known at ``s <= t``, with the kernel ``x_t = a x_s + sd n``.

    A state at ``t_min`` counts as data, ``(1, 0, alpha_t, sigma_t)``, as where a student's last call ends.
    """
    data = s <= schedule.t_min
    alpha, sigma = torch.where(data, 1.0, schedule.alpha(s)), torch.where(data, 0.0, schedule.sigma(s))
    a = schedule.alpha(t) / alpha
    return alpha, sigma, a, (schedule.sigma(t) ** 2 - (a * sigma) ** 2).clamp_min(0).sqrt()


def noised_from(schedule: Schedule, x_s: Tensor, s: Tensor, t: Tensor, n: Tensor) -> Tensor:
    """States at ``t`` ``[B]`` from states ``x_s`` at ``s``, ``[B]`` or one time: ``(alpha_t / alpha_s) x_s +
    sigma_{t|s} n`` with ``sigma_{t|s}^2 = sigma_t^2 - (alpha_t sigma_s / alpha_s)^2``."""
    _, _, a, sd = known_at(schedule, s, t)
    return align(a, x_s) * x_s + align(sd, x_s) * n


def interval_target(schedule: Schedule, x_s: Tensor, s: Tensor, t: Tensor, n: Tensor) -> Tensor:
    """``x_s / alpha_s - alpha_t sigma_s^2 / (alpha_s^2 sigma_{t|s}) n``, whose mean given ``x_t`` is what a denoiser of
    the law of ``x_t`` says (Phased DMD).

    ``E[-n / sigma_{t|s} | x_t]`` is the score, and this is what makes data of it; the data themselves are not needed.
    It grows without bound where ``t`` comes near ``s``.
    """
    alpha, sigma, a, sd = known_at(schedule, s, t)
    return align(1 / alpha, x_s) * x_s - align(a * sigma**2 / (alpha * sd.clamp_min(1e-12)), x_s) * n


def interval_denoising_loss(
    critic: Denoiser, x_s: Tensor, s: Tensor, t: Tensor, cond: Cond, rng: Rng, bound: float | None = None
) -> Tensor:
    """The denoising loss at ``t`` ``[B]`` of a law that is known by its states ``x_s`` at ``s < t`` only; at ``t_min``
    it is :func:`denoising_loss`.

    ``bound`` weighs a sample by ``min(1, bound sigma_{t|s}^2)``, so that none counts without bound near ``s``.
    """
    n = rng.normal_like(x_s)
    x_t = noised_from(critic.schedule, x_s, s, t, n)
    a, b, f = critic.affine(x_t, t, cond)
    target = (interval_target(critic.schedule, x_s, s, t, n) - align(a, x_t) * x_t) / align(b, x_t)
    if bound is None:
        return torch.nn.functional.mse_loss(f, target)
    weight = (bound * known_at(critic.schedule, s, t)[3] ** 2).clamp_max(1)
    return (align(weight, f) * (f - target).square()).mean()


def drop_condition(cond: Cond, null: Cond, probability: float, rng: Rng) -> Cond:
    """Conditions with a share replaced by ``null``, the model's "no condition", for classifier-free guidance."""
    n = count(cond)
    if n is None or probability == 0:
        return cond
    return where(rng.uniform(n) < probability, null, cond)


def sample_std(x: Tensor) -> Tensor:
    """The standard deviation of samples ``[B, ...]`` among themselves, mean over dimensions: falls when modes are
    lost."""
    return x.detach().std(0, correction=0).mean()


def surrogate(x: Tensor, g: Tensor) -> Tensor:
    """``0.5 mean || x - sg(x - g) ||^2``: a loss whose gradient in ``x`` is ``g / x.numel()``."""
    return 0.5 * torch.nn.functional.mse_loss(x, (x - g).detach())


@dataclass(frozen=True)
class TwoScores:
    """Two data predictions at the same states: what a matching vector is made of.

    ``x`` are samples ``[B, ...]`` and ``x_t`` the same noised to ``t`` ``[B]`` on ``schedule``; ``real`` is the
    teacher's prediction and ``fake`` the critic's.
    """

    x: Tensor
    x_t: Tensor
    t: Tensor
    real: Tensor
    fake: Tensor
    schedule: Schedule


#: The weight of a sample's difference of two predictions, ``[B]``.
Weight = Callable[[TwoScores], Tensor]


def by_distance(found: TwoScores) -> Tensor:
    """DMD's ``1 / mean|x - D_teacher|``."""
    return 1 / (found.x - found.real).abs().flatten(1).mean(1).clamp_min(1e-8)


def by_noise(found: TwoScores) -> Tensor:
    """Variational score distillation's ``sigma alpha``, with which the vector is ``sigma^2 (eps_teacher - eps_critic)``
    (ProlificDreamer, SwiftBrush)."""
    return found.schedule.sigma(found.t) * found.schedule.alpha(found.t)


def weighted_difference(found: TwoScores, weight: Weight = by_distance) -> Tensor:
    """``weight (D_critic - D_teacher)``: since ``s_critic - s_teacher = alpha / sigma^2 (D_critic - D_teacher)``, along
    this the reverse KL divergence of the noised laws grows."""
    difference = found.fake - found.real
    return align(weight(found), difference) * difference


@torch.no_grad()
def matching_vector(
    x: Tensor,
    x_t: Tensor,
    t: Tensor,
    teacher: Denoiser,
    critic: Denoiser,
    cond: Cond = None,
    weight: Weight = by_distance,
) -> Tensor:
    """DMD's ``g = (D_critic(x_t) - D_teacher(x_t)) / mean|x - D_teacher(x_t)|``, the mean per sample, or with another
    weight (Yin et al. 2023, eq. 8, as in the official code, which drops a factor alpha_t)."""
    found = TwoScores(x, x_t, t, teacher(x_t, t, cond), critic(x_t, t, cond), teacher.schedule)
    return weighted_difference(found, weight)
