"""A Gaussian seen through a linear observation: the denoiser of the conditional law, in closed form.

For ``x_0 ~ N(m, S)`` and ``y = A x_0 + s n`` the law of ``x_0`` given ``y`` is ``N(m + K (y - A m), S - K A S)`` with
``K = S A^T (A S A^T + s^2 I)^-1``; noised, it is a Gaussian again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.denoisers import Cond, Denoiser
from fewstep.exact.gaussian import Gaussian
from fewstep.schedules import Schedule, align, as_time

#: Eigenvalues below this share of the largest are directions that the observation fixes.
FIXED = 1e-12


class ConditionalGaussian(Denoiser):
    """``E[x_0 | x_t, y]`` for ``x_0 ~ N(mean, covariance)`` and ``y = observe x_0 + s n``.

    ``mean`` has the shape of one sample, ``covariance`` is ``[d, d]`` over the flattened sample and ``observe`` ``[m,
    d]``.  The observation comes in as a sample that agrees with it: ``y = observe beside`` (for average pooling, the
    enlarged low-resolution picture).  ``augmentation`` is its noise level ``s``, one for the whole batch; 0 holds
    ``observe x_0 = y`` exactly.  Without ``beside``, and at infinite ``s``, the law is unconditional.
    """

    mean: Tensor
    covariance: Tensor
    observe: Tensor

    def __init__(self, schedule: Schedule, mean: Tensor, covariance: Tensor, observe: Tensor) -> None:
        super().__init__(schedule, tuple(mean.shape))
        Gaussian(schedule, mean, covariance)  # raises for what is no covariance
        if observe.ndim != 2 or observe.shape[1] != mean.numel():
            raise ValueError(f"observe must be a matrix [m, {mean.numel()}], got {list(observe.shape)}")
        self.register_buffer("mean", mean.double().flatten())
        self.register_buffer("covariance", covariance.double())
        self.register_buffer("observe", observe.double())

    def posterior(self, beside: Tensor | None, augmentation: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
        """Mean ``[1 or B, d]`` and covariance ``[d, d]`` of ``x_0`` given the observation, in float64."""
        levels = torch.as_tensor(augmentation, dtype=torch.float64, device=self.mean.device).unique()
        if len(levels) != 1:
            raise ValueError("augmentation: an exact conditional law takes one noise level for the whole batch")
        s = float(levels)
        if beside is None or s == torch.inf:
            return self.mean[None], self.covariance
        cross = self.covariance @ self.observe.T
        noisy = self.observe @ cross + s**2 * torch.eye(len(self.observe)).to(cross)
        gain = torch.linalg.solve(noisy, cross.T).T
        deviation = (beside.double().flatten(1) - self.mean) @ self.observe.T
        return self.mean + deviation @ gain.T, self.covariance - gain @ cross.T

    def forward(
        self,
        x: Tensor,
        t: Tensor | float,
        cond: Cond = None,
        beside: Tensor | None = None,
        augmentation: Tensor | float = 0.0,
    ) -> Tensor:
        mean, covariance = self.posterior(beside, augmentation)
        variances, basis = torch.linalg.eigh((covariance + covariance.T) / 2)
        free = variances > FIXED * variances[-1]  # rounding must not let the observation slip
        variances, basis = variances[free], basis[:, free]
        time = as_time(t, x)
        flat = x.double().flatten(1)
        alpha, sigma = align(self.schedule.alpha(time), flat), align(self.schedule.sigma(time), flat)
        along = (flat - alpha * mean) @ basis
        x0 = mean + (alpha * variances / (alpha**2 * variances + sigma**2) * along) @ basis.T
        return x0.to(x).reshape(x.shape)

    def on(self, schedule: Schedule) -> Denoiser:
        """The same law on another schedule."""
        return ConditionalGaussian(schedule, self.mean.reshape(self.shape), self.covariance, self.observe)
