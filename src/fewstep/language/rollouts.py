"""What a policy writes after prompts.  No gradient flows through it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.language.decoding import Decoding, drawn
from fewstep.language_models import LanguageModel
from fewstep.randomness import Rng


class Rollout(NamedTuple):
    """``tokens`` ``[B, P + length]``, or up to a limit: each prompt, what was written right behind it, and zeros;
    ``mask`` of the same shape is True where the policy wrote, the end token included."""

    tokens: Tensor
    mask: Tensor


@torch.no_grad()
def rollout(
    policy: LanguageModel,
    prompts: Tensor,
    rng: Rng,
    length: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    end: int | None = None,
    prompt_mask: Tensor | None = None,
    limit: int | None = None,
) -> Rollout:
    """At most ``length`` tokens after each of the prompts ``[B, P]``, up to and with ``end`` where that is a token.

    Prompts of different lengths stand at the left, with a ``prompt_mask`` ``[B, P]`` that is True on their tokens:
    every sequence is read from its own first token on, and what a row gets depends on nothing in other rows.  The
    policy is used as it is: its dropout, if it is on, too.  With a ``limit`` prompt and text have at most so many
    tokens together, so that a long prompt gets a shorter text.  ValueError for an empty prompt, and where that is more
    than the policy can read.
    """
    decoding = Decoding(temperature, top_k, top_p)
    lengths = prompt_lengths(prompts, prompt_mask)
    total = prompts.shape[1] + length if limit is None else max(prompts.shape[1], min(limit, prompts.shape[1] + length))
    if length < 1 or total > policy.length:
        raise ValueError(
            f"length={length} after prompts of {prompts.shape[1]} tokens: at least 1, and the model reads at most "
            f"{policy.length} tokens"
        )
    u = rng.uniform(len(prompts), length)
    tokens = torch.nn.functional.pad(prompts, (0, total - prompts.shape[1]))
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    done = torch.zeros_like(lengths, dtype=torch.bool)
    first = int(lengths.min())
    fresh, state = tokens[:, :first], policy.begin()
    for t in range(first, total):
        logits, state = policy.extend(fresh, state)
        place = t - lengths
        writes = (place >= 0) & (place < length) & ~done
        chosen = drawn(decoding.law(logits[:, -1]), u.gather(1, place.clamp(0, length - 1)[:, None])[:, 0])
        given = tokens[:, t].masked_fill(place >= 0, 0)
        tokens[:, t] = torch.where(writes, chosen, given)
        mask[:, t] = writes
        if end is not None:
            done = done | (writes & (tokens[:, t] == end))
        if bool((done | (place >= length - 1)).all()):
            break
        fresh = tokens[:, t : t + 1]
    return Rollout(torch.where(mask | (torch.arange(total, device=mask.device) < lengths[:, None]), tokens, 0), mask)


def prompt_lengths(prompts: Tensor, mask: Tensor | None) -> Tensor:
    """How many tokens ``[B]`` the prompts ``[B, P]`` have; ValueError for one without any."""
    if mask is None:
        mask = torch.ones_like(prompts, dtype=torch.bool)
    if mask.shape != prompts.shape or bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise ValueError(f"prompt_mask {list(mask.shape)}: one boolean a token {list(prompts.shape)}, padding behind")
    lengths = mask.sum(1)
    if prompts.shape[1] == 0 or bool((lengths == 0).any()):
        raise ValueError("prompts: a model needs one token to begin with, and a prompt is empty")
    return lengths
