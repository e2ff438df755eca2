"""Gaussian mixtures: exact multi-modal teachers, with classes.

In one dimension the probability flow preserves quantiles, so the flow map between two times is ``F_s^{-1} o F_t`` with
``F`` the distribution function: an exact *non-linear* flow map and consistency function.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.denoisers import Cond
from fewstep.exact.ode import probability_flow
from fewstep.exact.world import Labelled, normalized
from fewstep.randomness import Rng
from fewstep.schedules import Schedule, VPLinear


class GaussianMixture(Labelled):
    """``sum_k w_k N(mean_k, covariance_k)``.

    ``means`` is ``[K, *shape]``; ``covariances`` is ``[K]`` (a variance each) or ``[K, d, d]`` over the flattened
    sample.  ``labels`` gives every component its class (several may share one), None for no classes.  The flow map is
    integrated in ``steps`` steps (:func:`probability_flow`; 2e-12 on the ring of 8, where 16 leave 2e-7).  ValueError
    for covariances that are not positive definite.
    """

    steps = 40

    means: Tensor
    basis: Tensor
    variances: Tensor

    def __init__(
        self,
        schedule: Schedule,
        weights: Tensor,
        means: Tensor,
        covariances: Tensor,
        labels: Tensor | list[int] | None = None,
    ) -> None:
        super().__init__(schedule, tuple(means.shape[1:]), weights, labels)
        k, d = len(means), means[0].numel()
        matrices = covariances.double()
        self.round = matrices.ndim == 1  # every direction is an eigenvector
        if self.round:
            matrices = matrices[:, None, None] * torch.eye(d, dtype=torch.float64)
        if len(weights) != k or matrices.shape != (k, d, d) or not torch.allclose(matrices, matrices.mT, atol=1e-12):
            raise ValueError(
                f"{len(weights)} weights, {k} means of {d} numbers and covariances of shape {list(covariances.shape)} "
                f"do not fit: need [{k}] variances or symmetric [{k}, {d}, {d}]"
            )
        variances, basis = torch.linalg.eigh(matrices)
        if float(variances.min()) <= 0:
            raise ValueError(f"covariances must be positive definite, smallest eigenvalue {float(variances.min())}")
        self.register_buffer("means", means.double().flatten(1))
        self.register_buffer("basis", basis)
        self.register_buffer("variances", variances)

    def _components(self, x: Tensor, alpha: Tensor, sigma: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """Log joint density of component and state ``[B, K]``, and the deviations over their variances ``[B, K, d]`` in
        the components' eigenbases."""
        alpha, sigma = alpha[:, None], sigma[:, None]
        deviation = x[:, None] - alpha * self.means.to(x)
        if not self.round:
            deviation = torch.einsum("bki,kij->bkj", deviation, self.basis.to(x))
        variance = alpha**2 * self.variances.to(x) + sigma**2
        white = deviation / variance
        density = -0.5 * (deviation * white + torch.log(2 * math.pi * variance)).sum(2)
        return self.log_prior(cond, x) + density, white

    def moments(self, x: Tensor, alpha: Tensor, sigma: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        joint, white = self._components(x, alpha, sigma, cond)
        posterior = normalized(joint)
        weighted = posterior[..., None] * white
        shift, score = (self._sum(part) for part in (self.variances.to(x) * weighted, -weighted))
        return posterior @ self.means.to(x) + alpha * shift, score

    def _sum(self, parts: Tensor) -> Tensor:
        """The sum of vectors ``[B, K, d]`` in the components' eigenbases."""
        return parts.sum(1) if self.round else torch.einsum("bkj,kij->bi", parts, self.basis.to(parts))

    def posterior(self, x: Tensor, t: Tensor | float, cond: Cond = None) -> Tensor:
        """The probability of each component given the state, ``[B, K]``."""
        return normalized(self._components(*self.columns(x, t), cond)[0])

    def log_density(self, x: Tensor, t: Tensor | float, cond: Cond = None) -> Tensor:
        return torch.logsumexp(self._components(*self.columns(x, t), cond)[0], 1)

    def flow(self, x: Tensor, t: Tensor | float, s: Tensor | float, cond: Cond = None) -> Tensor:
        spread = self.variances.sqrt()
        scales = float(spread.min()), max(float(self.means.norm(dim=1).max()), 2 * float(spread.max()))
        return probability_flow(self, x.double(), t, s, cond, scales, self.steps).to(x)

    def sample(self, n: int, rng: Rng, cond: Cond = None) -> Tensor:
        part = self._parts(n, rng, cond)
        noise = rng.normal(n, self.means.shape[1], dtype=torch.float64).to(self.means)
        shift = torch.einsum("bj,bij->bi", noise * self.variances[part].sqrt(), self.basis[part])
        return (self.means[part] + shift).reshape(n, *self.shape)


class Mixture1D(GaussianMixture):
    """A mixture on the line: samples of shape ``[1]``, flow map in closed form by quantiles.

    ``means`` and ``sds`` are ``[K]``.  The flow map can be differentiated in the state and in both times (once).  It
    keeps its digits far into both tails, but not where the density between two modes is below about 1e-12.
    """

    def __init__(
        self,
        schedule: Schedule,
        weights: Tensor,
        means: Tensor,
        sds: Tensor,
        labels: Tensor | list[int] | None = None,
    ) -> None:
        super().__init__(schedule, weights, means.reshape(-1, 1), sds.reshape(-1) ** 2, labels)

    def _standardised(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Deviations ``[B, K]`` from every component's mean in its standard deviations, and these."""
        spread = torch.sqrt(alpha**2 * self.variances.T.to(x) + sigma**2)
        return (x - alpha * self.means.T.to(x)) / spread, spread

    def cdf(self, x: Tensor, t: Tensor | float, cond: Cond = None) -> Tensor:
        """The distribution function of the noised law, of the shape of ``x``."""
        z, _ = self._standardised(*self.columns(x, t))
        return _log_tail(self.log_prior(cond, x), z).exp()

    def flow(self, x: Tensor, t: Tensor | float, s: Tensor | float, cond: Cond = None) -> Tensor:
        flat, alpha, sigma = self.columns(x.double(), t)
        _, alpha_s, sigma_s = self.columns(flat, s)
        prior, (z, _) = self.log_prior(cond, flat), self._standardised(flat, alpha, sigma)
        # Each half of the line works with its own, smaller tail, on a log scale: digits are kept arbitrarily far out.
        side = torch.where(_log_tail(prior, z) < _log_tail(prior, -z), 1.0, -1.0).to(flat)
        level = _log_tail(prior, side * z)

        def excess(y: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
            """Increasing in ``y`` and zero at the quantile."""
            return side * (_log_tail(prior, side * self._standardised(y, alpha, sigma)[0]) - level)

        held = alpha_s.detach(), sigma_s.detach()
        root, width = self._bisect(lambda y: excess(y, *held).detach(), z.detach(), *held)
        for _ in range(2):  # Newton finishes the digits
            root = root.detach()
            tail = _log_tail(prior, side * self._standardised(root, *held)[0])
            density = torch.logsumexp(self._components(root, *held, cond)[0], 1, keepdim=True)
            slope = torch.exp(density - tail).clamp_min(1e-300)  # between far modes it underflows: no step, not 0 / 0
            # With the root and the slope held, a step has the derivatives of the implicit function.
            root = root - (excess(root, alpha_s, sigma_s) / slope).clamp(-width, width)
        return root.to(x)

    def _bisect(
        self, excess: Callable[[Tensor], Tensor], z: Tensor, alpha: Tensor, sigma: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The root of ``excess`` and a bound on its error; ``z`` is the standardised deviations of the start, whose
        smallest and largest bracket those of the end."""
        centre = alpha * self.means.T.to(z)
        spread = self._standardised(centre[:, :1], alpha, sigma)[1]
        low = (centre + spread * z.amin(1, keepdim=True)).amin(1, keepdim=True)
        high = (centre + spread * z.amax(1, keepdim=True)).amax(1, keepdim=True)
        error = 1e-6 * (high - low + spread.amax(1, keepdim=True))
        for _ in range(22):
            middle = (low + high) / 2
            short = excess(middle) < 0
            low, high = torch.where(short, middle, low), torch.where(short, high, middle)
        return (low + high) / 2, error


def _log_tail(log_prior: Tensor, z: Tensor) -> Tensor:
    """Log of the mixture's distribution function at standardised deviations ``z`` ``[B, K]``, as ``[B, 1]``."""
    return torch.logsumexp(log_prior + torch.special.log_ndtr(z), 1, keepdim=True)


def three_modes(schedule: Schedule | None = None, labels: list[int] | None = None) -> Mixture1D:
    """A standard one-dimensional test-bed for solvers: weights .3, .5, .2; means -1.2, .3, 1.5; sds .3, .35, .3; on
    linear VP down to t = 0.01 unless told otherwise."""
    return Mixture1D(
        schedule or VPLinear(t_min=1e-2),
        torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64),
        torch.tensor([-1.2, 0.3, 1.5], dtype=torch.float64),
        torch.tensor([0.3, 0.35, 0.3], dtype=torch.float64),
        labels,
    )


def ring(
    schedule: Schedule, modes: int = 8, radius: float = 2.0, sd: float = 0.25, labels: list[int] | None = None
) -> GaussianMixture:
    """Equal Gaussians on a circle in the plane, the first at angle 0."""
    if modes < 1:
        raise ValueError(f"modes={modes}: a ring needs at least one")
    angle = torch.arange(modes, dtype=torch.float64) * (2 * math.pi / modes)
    means = radius * torch.stack([angle.cos(), angle.sin()], 1)
    return GaussianMixture(schedule, torch.ones(modes), means, torch.full((modes,), sd**2), labels)
