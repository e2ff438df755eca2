"""Logits where the scores are taken: one pass of a network at the noised samples gives its prediction and the features
that a discriminator sees.

The discriminator's body is the frozen teacher (as in NVIDIA's FastGen) or the critic (as in DMD2).  Its logit is about
``log p_t - log q_t``, data over generated samples, at the very states that the difference of scores is taken at.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fewstep.conditions import Cond
from fewstep.denoisers import Denoiser
from fewstep.methods.method import Networks
from fewstep.methods.parts.adversary import Adversary, Heads
from fewstep.methods.parts.distribution_matching import IN_THE_MIDDLE
from fewstep.methods.parts.score_matching import TwoScores
from fewstep.methods.parts.teacher_steps import guided, steered
from fewstep.methods.parts.times import TimeLaw
from fewstep.networks.taps import bottleneck, feature_shapes, spread_layers, stops_at, tapped
from fewstep.randomness import Rng

#: Whose features a discriminator sees.
Body = Literal["critic", "teacher"]


def tapped_heads(body: Denoiser, count: int = 1) -> Heads:
    """Untrained heads for features that are tapped in a pass that goes on: of the bottleneck, or of ``count`` layers
    over the depth of the network.  ValueError for the bottleneck of a network that has none."""
    try:
        layers = (bottleneck(body),) if count == 1 else spread_layers(body, count)
    except ValueError as error:
        raise ValueError(f"{error}; more heads than one look at layers over the depth") from None
    return Heads(feature_shapes(body, layers), layers=layers, stops=stops_at(body, layers))


def tapping_adversary(heads: Heads, r1: float = 0.0) -> Adversary:
    """DMD2's game on the layers of such heads, by passes that stop at the bottleneck where that is all they see."""
    return Adversary(layers=heads.layers, stops=heads.stops, r1=r1)


def scores_and_logits(
    nets: Networks,
    body: Body,
    x: Tensor,
    cond: Cond,
    rng: Rng,
    guidance: float = 1.0,
    law: TimeLaw = IN_THE_MIDDLE,
) -> tuple[TwoScores, Tensor]:
    """The predictions of ``nets.teacher`` and ``nets.critic`` for samples ``x`` ``[B, ...]`` noised to times of
    ``law``, and the logits ``[B, K]`` there of ``nets.head`` on the features of ``body``.

    Guidance steers the teacher's prediction, not the features.  The predictions have no gradient.  Logits on the
    teacher have one, to ``x``: hold the heads.
    """
    schedule = nets.teacher.schedule
    t = law.draw(schedule, len(x), rng)
    x_t = schedule.add_noise(x, rng.normal_like(x), t)
    held = x_t.detach()
    if body == "teacher":
        with torch.no_grad():
            fake = nets.critic(held, t, cond)  # first, as the graph of the teacher's pass takes memory
        plain, features = tapped(nets.teacher, nets.head.layers, x_t, t, cond)
        plain = plain.detach()  # which lets go of what is behind the features
        with torch.no_grad():
            real = steered(nets.teacher, guidance, plain, held, t, cond)
    else:
        with torch.no_grad():
            real = guided(nets.teacher, guidance)(held, t, cond)
            fake, features = tapped(nets.critic, nets.head.layers, held, t, cond)
    return TwoScores(x.detach(), held, t, real, fake, schedule), nets.head(features)
