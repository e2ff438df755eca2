"""Score matching: the denoising loss, and the score-distillation vector with its surrogate loss."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.conditions import Cond, count, where
from fewstep.denoisers import Denoiser
from fewstep.randomness import Rng
from fewstep.schedules import align


def denoising_loss(model: Denoiser, x0: Tensor, t: Tensor, cond: Cond, rng: Rng, eps: Tensor | None = None) -> Tensor:
    """``E || F(c_in x_t) - target ||^2``, mean over everything; ``t`` ``[B]``, ``eps`` fresh unless given.

    The target is what ``F`` must be for the denoiser ``a x + b F`` to give back ``x0``.
    """
    eps = rng.normal_like(x0) if eps is None else eps
    x_t = model.schedule.add_noise(x0, eps, t)
    a, b, f = model.affine(x_t, t, cond)
    return torch.nn.functional.mse_loss(f, (x0 - align(a, x_t) * x_t) / align(b, x_t))


def velocity_loss(model: Denoiser, x0: Tensor, t: Tensor, cond: Cond, rng: Rng) -> Tensor:
    """``E || dx/dt - (alpha' x0 + sigma' eps) ||^2``, mean over everything, whatever the network predicts.  On TrigFlow
    it is ``|| D - x0 ||^2 / sin^2 t`` exactly."""
    eps = rng.normal_like(x0)
    x_t = model.schedule.add_noise(x0, eps, t)
    return torch.nn.functional.mse_loss(model.velocity(x_t, t, cond), model.schedule.velocity(x0, eps, t))


def drop_condition(cond: Cond, null: Cond, probability: float, rng: Rng) -> Cond:
    """Conditions with a share replaced by ``null``, the model's "no condition", for classifier-free guidance."""
    n = count(cond)
    if n is None or probability == 0:
        return cond
    return where(rng.uniform(n) < probability, null, cond)


def surrogate(x: Tensor, g: Tensor) -> Tensor:
    """``0.5 mean || x - sg(x - g) ||^2``: a loss whose gradient in ``x`` is ``g / x.numel()``."""
    return 0.5 * torch.nn.functional.mse_loss(x, (x - g).detach())


@torch.no_grad()
def matching_vector(
    x: Tensor, x_t: Tensor, t: Tensor, teacher: Denoiser, critic: Denoiser, cond: Cond = None
) -> Tensor:
    """DMD's ``g = (D_critic(x_t) - D_teacher(x_t)) / mean|x - D_teacher(x_t)|``, the mean per sample.

    ``x_t`` is ``x`` noised to ``t`` ``[B]``.  Since ``s_critic - s_teacher = alpha / sigma^2 (D_critic - D_teacher)``
    this is the reverse-KL gradient of the noised laws, with DMD's weight (Yin et al. 2023, eq. 8, as in the official
    code, which drops a factor alpha_t).
    """
    real = teacher(x_t, t, cond)
    scale = (x - real).abs().flatten(1).mean(1).clamp_min(1e-8)
    return (critic(x_t, t, cond) - real) / align(scale, x)
