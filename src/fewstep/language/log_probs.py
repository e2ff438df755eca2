"""What a language model says of tokens: log-probabilities and entropies, token by token and over responses.

``logits[:, t]`` is the law of token ``t + 1``, and ``mask`` is true where a token belongs to the response: not in the
prompt, not in the padding.  All results stand at the token that they are about.  The first token has no law: it counts
as part of the prompt, whatever the mask says of it.  Arithmetic is float32 or wider, whatever the logits are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

#: What :func:`torch.nn.functional.cross_entropy` passes over.
PASSED_OVER = -100


class ResponseLogProbs(NamedTuple):
    """The log-probability of each response, summed over its tokens ``[B]`` and a token ``[B]``."""

    total: Tensor
    mean: Tensor


def token_log_prob(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """``log p(token t | tokens before it)`` at ``t``, ``[B, L]``; 0 outside of the response.

    ``logits`` ``[B, L, V]``, ``tokens`` int64 ``[B, L]``, which outside of the response may hold anything, ``mask``
    bool ``[B, L]``.
    """
    asked = tokens[:, 1:].masked_fill(~mask[:, 1:], PASSED_OVER)
    laws = wide(logits[:, :-1]).transpose(1, 2)
    surprise = nn.functional.cross_entropy(laws, asked, ignore_index=PASSED_OVER, reduction="none")
    return nn.functional.pad(-surprise, (1, 0))


def token_entropy(logits: Tensor, mask: Tensor) -> Tensor:
    """The entropy in nats of the law of each token of the response, ``[B, L]``; 0 outside."""
    log_p = wide(logits[:, :-1]).log_softmax(-1)
    entropy = torch.special.entr(log_p.exp()).sum(-1)
    return nn.functional.pad(entropy.masked_fill(~mask[:, 1:], 0), (1, 0))


def response_lengths(mask: Tensor) -> Tensor:
    """How many tokens each response has, ``[B]``."""
    return mask[:, 1:].sum(1)


def response_sum(values: Tensor, mask: Tensor) -> Tensor:
    """The sum of ``values`` ``[B, L]`` over each response, ``[B]``."""
    return values[:, 1:].masked_fill(~mask[:, 1:], 0).sum(1)


def response_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of ``values`` ``[B, L]`` over each response, ``[B]``; 0 where it has no tokens."""
    return response_sum(values, mask) / response_lengths(mask).clamp_min(1)


def response_log_probs(logits: Tensor, tokens: Tensor, mask: Tensor) -> ResponseLogProbs:
    """The log-probability of each response, of what :func:`token_log_prob` takes."""
    values = token_log_prob(logits, tokens, mask)
    return ResponseLogProbs(response_sum(values, mask), response_mean(values, mask))


def wide(logits: Tensor) -> Tensor:
    """Logits in float32 where they are narrower."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
