"""Gaussian data: every quantity in closed form on every schedule.

``N(m, S)`` noised is ``N(alpha m, alpha^2 S + sigma^2 I)``; in the eigenbasis of ``S`` the probability flow scales each
direction by the ratio of its standard deviations at the two times.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from fewstep.denoisers import Cond
from fewstep.exact.world import ExactDenoiser, World
from fewstep.extras import Input
from fewstep.flow_maps import FlowMap
from fewstep.randomness import Rng
from fewstep.schedules import Schedule


class Gaussian(World):
    """``x_0 ~ N(mean, covariance)``.

    ``mean`` has the shape of one sample; ``covariance`` is a variance (isotropic) or a matrix ``[d, d]`` over the
    flattened sample.  ValueError unless it is symmetric and positive definite.
    """

    mean: Tensor
    basis: Tensor
    variances: Tensor

    def __init__(self, schedule: Schedule, mean: Tensor, covariance: Tensor | float) -> None:
        super().__init__(schedule, tuple(mean.shape))
        d = mean.numel()
        matrix = torch.as_tensor(covariance, dtype=torch.float64)
        matrix = matrix * torch.eye(d, dtype=torch.float64) if matrix.ndim == 0 else matrix
        if matrix.shape != (d, d) or not torch.allclose(matrix, matrix.T, atol=1e-12):
            raise ValueError(f"covariance must be a variance or a symmetric [{d}, {d}], got {list(matrix.shape)}")
        variances, basis = torch.linalg.eigh(matrix)
        if float(variances[0]) <= 0:
            raise ValueError(f"covariance must be positive definite, its smallest eigenvalue is {float(variances[0])}")
        self.register_buffer("mean", mean.double().flatten())
        self.register_buffer("basis", basis)
        self.register_buffer("variances", variances)

    def _whitened(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Deviation from the mean in the eigenbasis, the variances there, and the basis."""
        basis, variances = self.basis.to(x), self.variances.to(x)
        return (x - alpha * self.mean.to(x)) @ basis, alpha**2 * variances + sigma**2, basis

    def moments(self, x: Tensor, alpha: Tensor, sigma: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        deviation, variance, basis = self._whitened(x, alpha, sigma)
        white = deviation / variance
        return self.mean.to(x) + (alpha * self.variances.to(x) * white) @ basis.T, -white @ basis.T

    def log_density(self, x: Tensor, t: Tensor | float, cond: Cond = None) -> Tensor:
        deviation, variance, _ = self._whitened(*self.columns(x, t))
        return -0.5 * (deviation**2 / variance + torch.log(2 * math.pi * variance)).sum(1)

    def flow(self, x: Tensor, t: Tensor | float, s: Tensor | float, cond: Cond = None) -> Tensor:
        deviation, before, basis = self._whitened(*self.columns(x, t))
        _, alpha, sigma = self.columns(x, s)
        after = alpha**2 * self.variances.to(x) + sigma**2
        moved = alpha * self.mean.to(x) + (deviation * torch.sqrt(after / before)) @ basis.T
        return moved.reshape(x.shape)

    def sample(self, n: int, rng: Rng, cond: Cond = None) -> Tensor:
        noise = rng.normal(n, self.mean.numel(), dtype=torch.float64).to(self.mean)
        return (self.mean + (noise * self.variances.sqrt()) @ self.basis.T).reshape(n, *self.shape)

    def kl(self, other: Gaussian) -> Tensor:
        """``KL(self || other)`` of the two data laws."""
        inverse = (other.basis / other.variances) @ other.basis.T
        covariance = (self.basis * self.variances) @ self.basis.T
        gap = other.mean - self.mean
        log_ratio = other.variances.log().sum() - self.variances.log().sum()
        return 0.5 * ((inverse * covariance).sum() - len(gap) + gap @ inverse @ gap + log_ratio)

    def noised(self, t: float) -> Gaussian:
        """The law at time ``t`` as a Gaussian of its own (so ``p.noised(t).kl(q.noised(t))`` is the KL at ``t``)."""
        time = torch.tensor(t, dtype=torch.float64)
        alpha, sigma = self.schedule.alpha(time), self.schedule.sigma(time)
        covariance = (self.basis * (alpha**2 * self.variances + sigma**2)) @ self.basis.T
        return Gaussian(self.schedule, (alpha * self.mean).reshape(self.shape), covariance)


class GuidedGaussian(ExactDenoiser):
    """Guidance between two zero-mean Gaussians, ``D = D_wide + w (D_narrow - D_wide)``.

    The flow map is a power law, ``x (S_n(s) / S_n(t))^w (S_w(s) / S_w(t))^(1 - w)`` with ``S^2 = alpha^2 c^2 +
    sigma^2``: the "conditional" law has variance ``narrow``, the "unconditional" one ``wide``, both numbers or one per
    coordinate.  ``scale`` is w, a number or one a sample ``[B]``.  Not a data law: guidance leaves the noised laws of
    no data set.
    """

    narrow: Tensor
    wide: Tensor

    def __init__(
        self,
        schedule: Schedule,
        shape: tuple[int, ...],
        narrow: Tensor | float,
        wide: Tensor | float,
        scale: float | Tensor,
    ) -> None:
        super().__init__(schedule, shape)
        self.scale = scale
        for name, variance in (("narrow", narrow), ("wide", wide)):
            full = torch.as_tensor(variance, dtype=torch.float64).expand(shape).flatten()
            if float(full.min()) <= 0:
                raise ValueError(f"{name}={variance}: variances must be positive")
            self.register_buffer(name, full.clone())

    def moments(self, x: Tensor, alpha: Tensor, sigma: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        narrow, wide = self.narrow.to(x), self.wide.to(x)
        v_narrow, v_wide = alpha**2 * narrow + sigma**2, alpha**2 * wide + sigma**2
        w = self._weight(x)
        mean = alpha * x * (w * narrow / v_narrow + (1 - w) * wide / v_wide)
        return mean, -x * (w / v_narrow + (1 - w) / v_wide)

    def flow(self, x: Tensor, t: Tensor | float, s: Tensor | float, cond: Cond = None) -> Tensor:
        flat, alpha_t, sigma_t = self.columns(x, t)
        _, alpha_s, sigma_s = self.columns(x, s)

        def growth(variance: Tensor) -> Tensor:
            return torch.sqrt((alpha_s**2 * variance + sigma_s**2) / (alpha_t**2 * variance + sigma_t**2))

        w = self._weight(x)
        factor = growth(self.narrow.to(x)) ** w * growth(self.wide.to(x)) ** (1 - w)
        return (flat * factor).reshape(x.shape)

    def _weight(self, x: Tensor) -> float | Tensor:
        return self.scale.to(x)[:, None] if isinstance(self.scale, Tensor) else self.scale


class GuidedFlowMap(FlowMap):
    """The flow maps of a :class:`GuidedGaussian` at every guidance scale, which is an input ``w``: what a student that
    takes the guidance weight should learn.  By default ``w`` is the scale of ``world``."""

    def __init__(self, world: GuidedGaussian, low: float = 0.0, high: float = 14.0) -> None:
        default = float(world.scale)  # of one number: a default is one for all samples
        weight = Input(default, low, high, unguided=1.0)
        super().__init__(world.schedule, world.shape, world.classes, {"w": weight})
        self.world = world

    def forward(self, x: Tensor, t: Tensor | float, s: Tensor | float, cond: Cond = None, **extras: Tensor) -> Tensor:
        world = copy.copy(self.world)
        world.scale = extras["w"]
        return world.flow(x, t, s, cond)
