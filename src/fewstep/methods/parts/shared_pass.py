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
from fewstep.methods.parts.adversary import Adversary, Discriminator
from fewstep.methods.parts.distribution_matching import IN_THE_MIDDLE
from fewstep.methods.parts.score_matching import TwoScores
from fewstep.methods.parts.teacher_steps import guided, steered
from fewstep.methods.parts.times import TimeLaw
from fewstep.networks.taps import tapped
from fewstep.randomness import Rng

#: Whose features a discriminator sees.
Body = Literal["critic", "teacher"]


def tapped_discriminator(rules: Adversary, body: Denoiser, cond: Cond = None) -> Discriminator:
    """A discriminator whose features are had beside the prediction; ValueError where they are no layer's own."""
    made = Discriminator(rules, body, cond)
    if not made.layers:
        raise ValueError("the features of this network are no layer's own, and cannot be had beside its prediction")
    return made


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
    ``law``, and the logits ``[B, K]`` there of ``nets.discriminator`` on the features of ``body``.

    Guidance steers the teacher's prediction, not the features.  The predictions have no gradient.  Logits on the
    teacher have one, to ``x``: hold the discriminator.
    """
    schedule, layers = nets.teacher.schedule, nets.discriminator.layers
    t = law.draw(schedule, len(x), rng)
    x_t = schedule.add_noise(x, rng.normal_like(x), t)
    held = x_t.detach()
    if body == "teacher":
        with torch.no_grad():
            fake = nets.critic(held, t, cond)  # first, as the graph of the teacher's pass takes memory
        plain, features = tapped(nets.teacher, layers, x_t, t, cond)
        plain = plain.detach()  # which lets go of what is behind the features
        with torch.no_grad():
            real = steered(nets.teacher, guidance, plain, held, t, cond)
    else:
        with torch.no_grad():
            real = guided(nets.teacher, guidance)(held, t, cond)
            fake, features = tapped(nets.critic, layers, held, t, cond)
    return TwoScores(x.detach(), held, t, real, fake, schedule), nets.discriminator(features, schedule.log_snr(t), cond)
