"""Discriminators on the features of a diffusion network.

A discriminator is small heads on features of a *body*, a denoiser, at samples that were noised: the critic of
distribution matching (DMD2), the frozen teacher (LADD), or a copy of it with low-rank weights that train (SCott).  Its
best logit is the log-ratio of the two noised laws, ``log p_t - log q_t`` of real over generated.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, relu, softplus

from fewstep.conditions import Cond, join
from fewstep.denoisers import Denoiser
from fewstep.methods.parts.heads import FeatureHead, HeadKind, Heads, Told, ToldHeads
from fewstep.methods.parts.times import Own, TimeLaw
from fewstep.networks.taps import (
    as_grid,
    bottleneck,
    feature_shapes,
    grid_shape,
    spread_layers,
    stops_at,
    tapped,
)
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


#: DMD2's times: all of the family's own index.
EVERYWHERE = Own(0.0, 1.0)


@dataclass(frozen=True)
class Adversary:
    """A discriminator's rules: the game, the noise levels at which it looks, and the layers whose features it sees.

    These are ``layers``, or without names so many ``blocks`` over the depth of the body, or with one the bottleneck
    (:func:`~fewstep.networks.taps.bottleneck`).  Each has a ``head`` of its own.  With ``grids`` tokens that are the
    patches of a picture are laid out as its grid.  With ``projection`` patch heads of so many channels are told the
    time and the condition.  With ``apart`` data are looked at at times of their own.

    ``r1`` is the weight of a penalty for logits of real samples that change when the samples are moved by ``r1_sigma``,
    ``r2`` that for generated ones: the gradient penalties R1 and R2 by differences (Lin et al. 2025, arXiv 2501.08316),
    for one more pass.
    """

    loss: AdversarialLoss = field(default_factory=NonSaturating)
    law: TimeLaw = EVERYWHERE
    layers: tuple[str, ...] = ()
    blocks: int = 1
    head: HeadKind = FeatureHead
    grids: bool = False
    projection: int = 0
    apart: bool = False
    r1: float = 0.0
    r2: float = 0.0
    r1_sigma: float = 0.1


class Discriminator(nn.Module):
    """Heads on the features of a ``body``, which stays outside: it is given to every loss.

    ``forward`` is that of the heads: the features of the layers in, logits ``[B, K]`` out, those of all heads and
    places.  A pass for the bottleneck alone goes no further.  ``cond`` is a condition of one row, for networks that
    need more than their "no condition" holds.  Heads are made in float32 at least.
    """

    def __init__(self, rules: Adversary, body: Denoiser, cond: Cond = None) -> None:
        super().__init__()
        self.rules = rules
        self.picture = body.shape
        self.layers, self.stops = seen_layers(rules, body, cond)
        shapes = feature_shapes(body, self.layers, cond) if self.layers else [body.feature_shape]
        if rules.grids:
            shapes = [grid_shape(shape, body.shape) for shape in shapes]
        if rules.projection:
            told = Told(body.null, body.classes, rules.projection)
            heads: nn.Module = ToldHeads(shapes, told, rules.projection)
        else:
            heads = Heads(shapes, rules.head)
        like = next(body.parameters(), None)
        if like is not None:
            heads = heads.to(like.device, torch.promote_types(like.dtype, torch.float32))
        self.heads: Any = heads

    def forward(self, features: Sequence[Tensor], log_snr: Tensor, cond: Cond = None) -> Tensor:
        found = [f.to(torch.promote_types(f.dtype, torch.float32)) for f in features]
        if self.rules.grids:
            found = [as_grid(f, self.picture) for f in found]
        logits: Tensor = self.heads(found, *((log_snr, cond) if self.rules.projection else ()))
        return logits

    def logits(self, body: Denoiser, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The logits ``[B, K]`` of states ``x_t`` ``[B, ...]`` at ``t`` ``[B]``."""
        found = [body.features(x_t, t, cond)] if self.stops else tapped(body, self.layers, x_t, t, cond)[1]
        told: Tensor = self(found, body.schedule.log_snr(t), cond)
        return told

    def noised_logits(self, body: Denoiser, x: Tensor, t: Tensor, noise: Tensor, cond: Cond) -> Tensor:
        """The logits ``[B, K]`` of samples ``x`` ``[B, ...]`` noised to ``t`` ``[B]``."""
        return self.logits(body, body.schedule.add_noise(x, noise, t), t, cond)

    def student_loss(self, body: Denoiser, x: Tensor, cond: Cond, rng: Rng, real: Tensor | None = None) -> Tensor:
        """The generator's side for its samples ``x``, whose gradient passes through the body to ``x``: hold the
        weights of both.  ``real`` are data under the same conditions, which only games of pairs look at, at the same
        times."""
        t = self.rules.law.draw(body.schedule, len(x), rng)
        fake = self.noised_logits(body, x, t, rng.normal_like(x), cond)
        if real is None:
            return self.rules.loss.generator(fake)
        with torch.no_grad():
            told = self.noised_logits(body, real, t, rng.normal_like(real), cond)
        return self.rules.loss.generator(fake, told)

    def loss(
        self,
        body: Denoiser,
        real: Tensor,
        fake: Tensor,
        cond: Cond,
        rng: Rng,
        wrong: Tensor | None = None,
        real_cond: Cond = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's side for data and samples without a graph, in one pass, both under ``cond`` unless data
        have their own, and what there is to record: ``discriminator_accuracy`` is 0.5 at a tie.  ``wrong`` are data
        that do not belong to ``cond``, which count as generated."""
        rules = self.rules
        t = rules.law.draw(body.schedule, len(fake), rng)
        noise = [rng.normal_like(fake), rng.normal_like(fake)]
        times, parts = [t, t], [real, fake]
        if rules.apart:
            times[0] = rules.law.draw(body.schedule, len(real), rng)
        if wrong is not None:
            parts.append(wrong)
            times.append(rules.law.draw(body.schedule, len(wrong), rng) if rules.apart else t)
            noise.append(rng.normal_like(wrong))
        conds = join([cond if real_cond is None else real_cond, *[cond] * (len(parts) - 1)])
        x, at, drawn = torch.cat(parts), torch.cat(times), torch.cat(noise)
        of_real, of_fake = apart(self.noised_logits(body, x, at, drawn, conds), len(real))
        loss, logs = self.judge(of_real, of_fake)
        if rules.r1 or rules.r2:
            moved = x + rules.r1_sigma * torch.cat([rng.normal_like(part) for part in parts])
            of_moved, of_moved_fake = apart(self.noised_logits(body, moved, at, drawn, conds), len(real))
            penalty = rules.r1 * mse_loss(of_moved, of_real) + rules.r2 * mse_loss(of_moved_fake, of_fake)
            loss, logs["gradient_penalty"] = loss + penalty, penalty.detach()
        return loss, logs

    def tell_apart(
        self, body: Denoiser, real: Tensor, fake: Tensor, t: Tensor, cond: Cond
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """:meth:`loss` of states at times ``t`` ``[B]``, without penalties."""
        told = self.logits(body, torch.cat([real, fake]), torch.cat([t, t]), join([cond, cond]))
        return self.judge(*told.chunk(2))

    def judge(self, real: Tensor, fake: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's loss of logits, and what there is to record."""
        logs = {"discriminator_accuracy": accuracy(real.detach(), fake.detach())}
        return self.rules.loss.discriminator(real, fake), logs

    def follow(self) -> None:
        """What is to be done after every update."""
        self.heads.follow()


def seen_layers(rules: Adversary, body: Denoiser, cond: Cond) -> tuple[tuple[str, ...], bool]:
    """The layers that a discriminator sees, and whether a pass for them stops there, at ``body.features``; no layer
    where these are what it sees and no layer's own.  ValueError for a body that has nothing to see."""
    layers = rules.layers or (spread_layers(body, rules.blocks, cond) if rules.blocks > 1 else ())
    if layers:
        return layers, stops_at(body, layers, cond)
    try:
        own = bottleneck(body, cond)
    except ValueError:
        body.feature_shape  # noqa: B018 - the refusal of a body without features is the better one
        return (), True
    return (own,), stops_at(body, (own,), cond)


def apart(logits: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Those of ``n`` data, and those of what counts as generated."""
    return logits[:n], logits[n:]


def accuracy(real: Tensor, fake: Tensor) -> Tensor:
    """The mean of the shares of data and of generated samples whose logits tell right; 0.5 is a tie."""
    return ((real > 0).float().mean() + (fake <= 0).float().mean()) / 2
