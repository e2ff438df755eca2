"""Discriminators on the features of a diffusion network, with the non-saturating loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from fewstep.conditions import Cond
from fewstep.denoisers import Denoiser


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


def logits(critic: Denoiser, head: FeatureHead, x: Tensor, t: Tensor, noise: Tensor, cond: Cond) -> Tensor:
    """``head(bottleneck_critic(x_t, t, cond))`` with ``x_t = alpha x + sigma noise``: DMD2's "diffusion GAN"."""
    return head(critic.features(critic.schedule.add_noise(x, noise, t), t, cond))


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """``softplus(l(fake)) + softplus(-l(real))``."""
    return softplus(fake).mean() + softplus(-real).mean()


def generator_loss(fake: Tensor) -> Tensor:
    """``softplus(-l(fake))``."""
    return softplus(-fake).mean()


def accuracy(real: Tensor, fake: Tensor) -> Tensor:
    """The share of samples that the discriminator tells right; 0.5 is a tie."""
    return (torch.cat([real > 0, fake <= 0]).float()).mean()
