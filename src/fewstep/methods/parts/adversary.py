"""Discriminators on the features of a diffusion network, with the non-saturating loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from fewstep.denoisers import Cond, NetworkDenoiser
from fewstep.schedules import align, as_time


class FeatureHead(nn.Module):
    """One logit ``[B]`` from bottleneck features: convolutions for ``(C, h, w)``, two linear layers for ``(d,)``."""

    def __init__(self, feature_shape: tuple[int, ...]) -> None:
        super().__init__()
        width = feature_shape[0]
        if len(feature_shape) == 1:
            self.layers = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))
        else:
            self.layers = nn.Sequential(
                nn.Conv2d(width, width, 4, stride=2, padding=1), nn.GroupNorm(8, width), nn.SiLU(),
                nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU(),
                nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1),
            )  # fmt: skip

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)[:, 0]


def logits(critic: NetworkDenoiser, head: FeatureHead, x: Tensor, t: Tensor, noise: Tensor, cond: Cond) -> Tensor:
    """``head(bottleneck_critic(x_t, t, cond))`` with ``x_t = alpha x + sigma noise``: DMD2's "diffusion GAN"."""
    x_t = critic.schedule.add_noise(x, noise, t)
    time = as_time(t, x)
    c_in = critic.prediction.coefficients(critic.schedule, time)[2]
    label = critic.prediction.time(critic.schedule, time).to(x)
    return head(critic.net.features(align(c_in, x) * x_t, label, cond))


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """``softplus(l(fake)) + softplus(-l(real))``."""
    return softplus(fake).mean() + softplus(-real).mean()


def generator_loss(fake: Tensor) -> Tensor:
    """``softplus(-l(fake))``."""
    return softplus(-fake).mean()


def accuracy(real: Tensor, fake: Tensor) -> Tensor:
    """The share of samples that the discriminator tells right; 0.5 is a tie."""
    return (torch.cat([real > 0, fake <= 0]).float()).mean()
