"""How often a target accepts what a draft writes, from their laws on the target's own text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.language.decoding import SAMPLED, Decoding
from fewstep.language.rollouts import prompt_lengths, rollout
from fewstep.language.speculative import acceptance_of
from fewstep.language_models import LanguageModel
from fewstep.randomness import Rng


@dataclass(frozen=True)
class Acceptance:
    """``rate`` alpha = 1 - E[sum TVD] / E[length], ``by_place`` the mean of 1 - TVD for the first, second, ... token
    after a prompt, and over how many ``tokens`` it was measured."""

    rate: float
    by_place: tuple[float, ...]
    tokens: int


@torch.no_grad()
def measure_acceptance(
    target: LanguageModel,
    draft: LanguageModel,
    prompts: Tensor,
    rng: Rng,
    length: int,
    *,
    decoding: Decoding = SAMPLED,
    end: int | None = None,
    prompt_mask: Tensor | None = None,
) -> Acceptance:
    """The acceptance of a draft on texts of at most ``length`` tokens that the target writes after prompts ``[B, P]``.

    On texts of somebody else it would be another number: the draft is asked where the target goes.  ``decoding`` is
    that of both.  Errors as of :func:`~fewstep.language.rollouts.rollout`.
    """
    tokens, mask = rollout(
        target, prompts, rng, length, temperature=decoding.temperature, top_k=decoding.top_k, top_p=decoding.top_p,
        end=end, prompt_mask=prompt_mask,
    )  # fmt: skip
    p, q = (decoding.law(model(tokens))[:, :-1] for model in (target, draft))
    agreed = acceptance_of(p, q) * mask[:, 1:]
    first = prompt_lengths(prompts, prompt_mask)[:, None] - 1 + torch.arange(length, device=tokens.device)
    agreed, written = agreed.gather(1, first), mask[:, 1:].gather(1, first)
    counts = written.sum(0)
    places = (agreed.sum(0) / counts)[counts > 0]
    return Acceptance(float(agreed.sum() / counts.sum()), tuple(places.tolist()), int(counts.sum()))
