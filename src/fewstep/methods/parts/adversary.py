"""Discriminators on the features of a diffusion network.

A discriminator is small heads on features of a *body*, a denoiser, at samples that were noised: the critic of
distribution matching (DMD2) or the frozen teacher (LADD).  Its best logit is the log-ratio of the two noised laws,
``log p_t - log q_t`` of real over generated.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, relu, softplus

from fewstep.conditions import Cond, join
from fewstep.denoisers import Denoiser
from fewstep.methods.parts.times import Own, TimeLaw
from fewstep.networks.taps import feature_shapes, tapped
from fewstep.randomness import Rng


class AdversarialLoss(ABC):
    """A game of two losses on logits ``[B, ...]`` of real and generated samples, pair by pair."""

    @abstractmethod
    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor: ...

    @abstractmethod
    def generator(self, fake: Tensor, real: Tensor | None = None) -> Tensor:
        """``real`` is read by games of pairs only; ValueError where such a one is not given it."""


class NonSaturating(AdversarialLoss):
    """``softplus(l(fake)) + softplus(-l(real))`` against ``softplus(-l(fake))``."""

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return softplus(fake).mean() + softplus(-real).mean()

    def generator(self, fake: Tensor, real: Tensor | None = None) -> Tensor:
        return softplus(-fake).mean()


class Hinge(AdversarialLoss):
    """``(relu(1 - l(real)) + relu(1 + l(fake))) / 2``, which is 1 where all logits are 0, against ``-l(fake)``."""

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return 0.5 * (relu(1 - real).mean() + relu(1 + fake).mean())

    def generator(self, fake: Tensor, real: Tensor | None = None) -> Tensor:
        return -fake.mean()


class Relativistic(AdversarialLoss):
    """``softplus(l(fake) - l(real))`` of pairs, against the same with its sides exchanged (Jolicoeur-Martineau
    2018)."""

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return softplus(fake - real).mean()

    def generator(self, fake: Tensor, real: Tensor | None = None) -> Tensor:
        if real is None:
            raise ValueError("a relativistic game compares pairs: its generator needs logits of real samples")
        return softplus(real - fake).mean()


class FeatureHead(nn.Module):
    """One logit ``[B]`` from features inside a network: convolutions for grids ``(C, h, w)`` and ``(C, f, h, w)``,
    linear layers for vectors ``(d,)`` and, with a mean over them, for tokens ``(L, d)``."""

    def __init__(self, feature_shape: tuple[int, ...]) -> None:
        super().__init__()
        if len(feature_shape) > 2:
            width, *sides = feature_shape
            conv: type[nn.Conv2d] | type[nn.Conv3d] = nn.Conv2d if len(sides) == 2 else nn.Conv3d
            # the published kernel needs two places on every side
            first = conv(width, width, 4, 2, 1) if min(sides) > 1 else conv(width, width, 3, 1, 1)
            groups = math.gcd(8, width)
            self.layers = nn.Sequential(
                first, nn.GroupNorm(groups, width), nn.SiLU(),
                conv(width, width, 3, padding=1), nn.GroupNorm(groups, width), nn.SiLU(),
                nn.AdaptiveAvgPool2d(1) if len(sides) == 2 else nn.AdaptiveAvgPool3d(1), nn.Flatten(),
                nn.Linear(width, 1),
            )  # fmt: skip
        else:
            width = feature_shape[-1]
            self.layers = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features).flatten(1).mean(1)


class Heads(nn.Module):
    """A head for the features of each of several layers, whose names may be kept here: logits ``[B, K]``."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], layers: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.layers = layers
        self.heads = nn.ModuleList(FeatureHead(shape) for shape in shapes)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return torch.stack([head(found) for head, found in zip(self.heads, features, strict=True)], 1)


#: DMD2's times: all of the family's own index.
EVERYWHERE = Own(0.0, 1.0)


@dataclass(frozen=True)
class Adversary:
    """A discriminator's rules: the game, the noise levels at which it looks, and the layers whose features it sees.

    Without ``layers`` it sees the bottleneck, by a pass that need not go further, and gives a logit ``[B]``; with
    some, one for each, ``[B, K]``.  ``r1`` is the weight of a penalty for logits of real samples that change when the
    samples are moved by ``r1_sigma``, ``r2`` that for generated ones: the gradient penalties R1 and R2 by differences
    (Lin et al. 2025, arXiv 2501.08316), for one more pass.
    """

    loss: AdversarialLoss = field(default_factory=NonSaturating)
    law: TimeLaw = EVERYWHERE
    layers: tuple[str, ...] = ()
    r1: float = 0.0
    r2: float = 0.0
    r1_sigma: float = 0.1

    def heads(self, body: Denoiser) -> nn.Module:
        """Untrained heads for the features of ``body``, in float32 at least."""
        heads = (
            Heads(feature_shapes(body, self.layers), self.layers) if self.layers else FeatureHead(body.feature_shape)
        )
        like = next(body.parameters(), None)
        return heads if like is None else heads.to(like.device, torch.promote_types(like.dtype, torch.float32))

    def logits(self, body: Denoiser, heads: nn.Module, x: Tensor, t: Tensor, noise: Tensor, cond: Cond) -> Tensor:
        """The logits of samples ``x`` ``[B, ...]`` noised to ``t`` ``[B]``."""
        return self.logits_at(body, heads, body.schedule.add_noise(x, noise, t), t, cond)

    def logits_at(self, body: Denoiser, heads: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The logits of states ``x_t`` ``[B, ...]`` at ``t`` ``[B]``."""
        found = tapped(body, self.layers, x_t, t, cond)[1] if self.layers else [body.features(x_t, t, cond)]
        features = [f.to(torch.promote_types(f.dtype, torch.float32)) for f in found]
        logits: Tensor = heads(features if self.layers else features[0])
        return logits

    def student_loss(
        self, body: Denoiser, heads: nn.Module, x: Tensor, cond: Cond, rng: Rng, real: Tensor | None = None
    ) -> Tensor:
        """The generator's side for its samples ``x``, whose gradient passes through the body to ``x``: hold the
        weights of body and heads.  ``real`` are data under the same conditions, which only games of pairs look at, at
        the same times."""
        t = self.law.draw(body.schedule, len(x), rng)
        fake = self.logits(body, heads, x, t, rng.normal_like(x), cond)
        if real is None:
            return self.loss.generator(fake)
        with torch.no_grad():
            told = self.logits(body, heads, real, t, rng.normal_like(real), cond)
        return self.loss.generator(fake, told)

    def discriminator_loss(
        self,
        body: Denoiser,
        heads: nn.Module,
        real: Tensor,
        fake: Tensor,
        cond: Cond,
        rng: Rng,
        real_cond: Cond = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's side for data and samples without a graph, in one pass, both under ``cond`` unless data
        have their own, and what there is to record: ``discriminator_accuracy`` is 0.5 at a tie."""
        t = self.law.draw(body.schedule, len(fake), rng)
        noise = torch.cat([rng.normal_like(fake), rng.normal_like(fake)])
        both, times = torch.cat([real, fake]), torch.cat([t, t])
        conds = join([cond if real_cond is None else real_cond, cond])
        told = self.logits(body, heads, both, times, noise, conds)
        of_real, of_fake = told.chunk(2)
        loss, logs = self.judge(of_real, of_fake)
        if self.r1 or self.r2:
            moved = both + self.r1_sigma * torch.cat([rng.normal_like(real), rng.normal_like(fake)])
            of_moved, of_moved_fake = self.logits(body, heads, moved, times, noise, conds).chunk(2)
            penalty = self.r1 * mse_loss(of_moved, of_real) + self.r2 * mse_loss(of_moved_fake, of_fake)
            loss, logs["gradient_penalty"] = loss + penalty, penalty.detach()
        return loss, logs

    def tell_apart(
        self, body: Denoiser, heads: nn.Module, real: Tensor, fake: Tensor, t: Tensor, cond: Cond
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """:meth:`discriminator_loss` of states at times ``t`` ``[B]``, without penalties."""
        told = self.logits_at(body, heads, torch.cat([real, fake]), torch.cat([t, t]), join([cond, cond]))
        return self.judge(*told.chunk(2))

    def judge(self, real: Tensor, fake: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's loss of logits, and what there is to record."""
        logs = {"discriminator_accuracy": accuracy(real.detach(), fake.detach())}
        return self.loss.discriminator(real, fake), logs


def accuracy(real: Tensor, fake: Tensor) -> Tensor:
    """The share of logits that tell right; 0.5 is a tie."""
    return (torch.cat([real > 0, fake <= 0]).float()).mean()
