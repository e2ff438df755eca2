"""Discriminators on the features of a diffusion network.

A discriminator is small heads on features of a *body*, a denoiser, at samples that were noised: the critic of
distribution matching (DMD2) or the frozen teacher (LADD).  Its best logit is the log-ratio of the two noised laws,
``log p_t - log q_t`` of real over generated.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, relu, softplus

from fewstep.conditions import Cond, join
from fewstep.denoisers import Denoiser
from fewstep.methods.parts.heads import FeatureHead, HeadKind, Heads, Told, ToldHeads
from fewstep.methods.parts.times import Own, TimeLaw
from fewstep.networks.taps import as_grid, feature_shapes, grid_shape, tapped
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

    Without ``layers`` it sees the bottleneck, by a pass that need not go further, and gives a logit ``[B]``; with
    some, those of a ``head`` for each, ``[B, K]``; where that is the bottleneck alone, ``stops``
    (:func:`~fewstep.networks.taps.stops_at`) keeps the pass from going further.  With ``grids`` tokens that are the
    patches of a picture are laid out as its grid.  With ``projection`` patch heads of so many channels are told the
    time and the condition.  With ``apart`` data are looked at at times of their own.

    ``r1`` is the weight of a penalty for logits of real samples that change when the samples are moved by ``r1_sigma``,
    ``r2`` that for generated ones: the gradient penalties R1 and R2 by differences (Lin et al. 2025, arXiv 2501.08316),
    for one more pass.
    """

    loss: AdversarialLoss = field(default_factory=NonSaturating)
    law: TimeLaw = EVERYWHERE
    layers: tuple[str, ...] = ()
    head: HeadKind = FeatureHead
    grids: bool = False
    projection: int = 0
    apart: bool = False
    stops: bool = False
    r1: float = 0.0
    r2: float = 0.0
    r1_sigma: float = 0.1

    def heads(self, body: Denoiser, cond: Cond = None) -> Any:
        """Untrained heads for the features of ``body``, in float32 at least; ``follow()`` is to be called after each of
        their updates.  ``cond`` is a condition of one row, for networks that need more than their "no condition"
        holds."""
        heads = self.untrained(body, cond)
        like = next(body.parameters(), None)
        return heads if like is None else heads.to(like.device, torch.promote_types(like.dtype, torch.float32))

    def untrained(self, body: Denoiser, cond: Cond) -> nn.Module:
        if not self.layers:
            return self.head(body.feature_shape)
        shapes = feature_shapes(body, self.layers, cond)
        if self.grids:
            shapes = [grid_shape(shape, body.shape) for shape in shapes]
        if not self.projection:
            return Heads(shapes, self.head, self.layers)
        return ToldHeads(shapes, Told(body.null, body.classes, self.projection), self.projection)

    def logits(self, body: Denoiser, heads: nn.Module, x: Tensor, t: Tensor, noise: Tensor, cond: Cond) -> Tensor:
        """The logits of samples ``x`` ``[B, ...]`` noised to ``t`` ``[B]``."""
        return self.logits_at(body, heads, body.schedule.add_noise(x, noise, t), t, cond)

    def logits_at(self, body: Denoiser, heads: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The logits of states ``x_t`` ``[B, ...]`` at ``t`` ``[B]``."""
        further = bool(self.layers) and not self.stops
        found = tapped(body, self.layers, x_t, t, cond)[1] if further else [body.features(x_t, t, cond)]
        features = [f.to(torch.promote_types(f.dtype, torch.float32)) for f in found]
        if not self.layers:
            alone: Tensor = heads(features[0])
            return alone
        if self.grids:
            features = [as_grid(f, body.shape) for f in features]
        told = (body.schedule.log_snr(t), cond) if self.projection else ()
        logits: Tensor = heads(features, *told)
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
        wrong: Tensor | None = None,
        real_cond: Cond = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's side for data and samples without a graph, in one pass, both under ``cond`` unless data
        have their own, and what there is to record: ``discriminator_accuracy`` is 0.5 at a tie.  ``wrong`` are data
        that do not belong to ``cond``, which count as generated."""
        t = self.law.draw(body.schedule, len(fake), rng)
        noise = [rng.normal_like(fake), rng.normal_like(fake)]
        times, parts = [t, t], [real, fake]
        if self.apart:
            times[0] = self.law.draw(body.schedule, len(real), rng)
        if wrong is not None:
            parts.append(wrong)
            times.append(self.law.draw(body.schedule, len(wrong), rng) if self.apart else t)
            noise.append(rng.normal_like(wrong))
        conds = join([cond if real_cond is None else real_cond, *[cond] * (len(parts) - 1)])
        x, at, drawn = torch.cat(parts), torch.cat(times), torch.cat(noise)
        of_real, of_fake = apart(self.logits(body, heads, x, at, drawn, conds), len(real))
        loss, logs = self.judge(of_real, of_fake)
        if self.r1 or self.r2:
            moved = x + self.r1_sigma * torch.cat([rng.normal_like(part) for part in parts])
            of_moved, of_moved_fake = apart(self.logits(body, heads, moved, at, drawn, conds), len(real))
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


class Discriminator(nn.Module):
    """Rules with heads of their own for the features of a ``body``, which stays outside: it is given to every loss.

    ``forward`` is that of the heads: features in, logits out.
    """

    def __init__(self, rules: Adversary, body: Denoiser, cond: Cond = None) -> None:
        super().__init__()
        self.rules = rules
        self.heads = rules.heads(body, cond)

    def forward(self, *given: Any) -> Tensor:
        logits: Tensor = self.heads(*given)
        return logits

    def student_loss(self, body: Denoiser, x: Tensor, cond: Cond, rng: Rng, real: Tensor | None = None) -> Tensor:
        """:meth:`Adversary.student_loss`."""
        return self.rules.student_loss(body, self, x, cond, rng, real)

    def loss(
        self, body: Denoiser, real: Tensor, fake: Tensor, cond: Cond, rng: Rng, wrong: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """:meth:`Adversary.discriminator_loss`."""
        return self.rules.discriminator_loss(body, self, real, fake, cond, rng, wrong)

    def follow(self) -> None:
        """What is to be done after every update of the heads."""
        self.heads.follow()


def apart(logits: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Those of ``n`` data, and those of what counts as generated."""
    return logits[:n], logits[n:]


def accuracy(real: Tensor, fake: Tensor) -> Tensor:
    """The mean of the shares of data and of generated samples whose logits tell right; 0.5 is a tie."""
    return ((real > 0).float().mean() + (fake <= 0).float().mean()) / 2
