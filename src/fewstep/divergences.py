"""Divergences between the laws that two sets of logits give, and means over the tokens of a sequence.

``p`` is the teacher's law (the target's), ``q`` the student's (the draft's); both are logits ``[..., K]``.  Everything
is computed in float32 or wider, and a temperature divides both logits; there is no factor of its square unless one is
multiplied on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.values import Written, read


def log_law(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """The log-probabilities ``[..., K]`` at a temperature above 0."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return (wide / temperature).log_softmax(-1)


def kl(p: Tensor, q: Tensor, temperature: float = 1.0) -> Tensor:
    """Forward: ``sum p log(p / q)`` ``[...]``, 0 where they agree."""
    log_p, log_q = log_law(p, temperature), log_law(q, temperature)
    return relative_entropy(log_p, log_q)


def reverse_kl(p: Tensor, q: Tensor, temperature: float = 1.0) -> Tensor:
    """``sum q log(q / p)`` ``[...]``."""
    return kl(q, p, temperature)


def jsd(p: Tensor, q: Tensor, beta: float = 0.5, temperature: float = 1.0) -> Tensor:
    """Generalised Jensen-Shannon: ``beta KL(p || m) + (1 - beta) KL(q || m)`` with ``m = beta p + (1 - beta) q``, beta
    in (0, 1).  Over beta it tends to the forward KL as beta goes to 0, over 1 - beta to the reverse one as it goes to
    1; at both ends itself is 0."""
    log_p, log_q = log_law(p, temperature), log_law(q, temperature)
    least = torch.finfo(log_p.dtype).min / 2  # where both are -inf, logaddexp has no gradient
    log_m = torch.logaddexp(log_p.clamp_min(least) + math.log(beta), log_q.clamp_min(least) + math.log1p(-beta))
    return beta * relative_entropy(log_p, log_m) + (1 - beta) * relative_entropy(log_q, log_m)


def total_variation(p: Tensor, q: Tensor, temperature: float = 1.0) -> Tensor:
    """``1/2 sum |p - q|`` ``[...]`` in [0, 1]: 1 minus the probability that a draft token is accepted."""
    return (log_law(p, temperature).exp() - log_law(q, temperature).exp()).abs().sum(-1) / 2


def relative_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``sum p (log p - log q)`` over the last dimension; what p never takes counts nothing, in gradients too."""
    gap = torch.where(log_p == -math.inf, 0.0, log_p - log_q)  # before the product: 0 times infinity has no gradient
    return (log_p.exp() * gap).sum(-1)


#: Name -> the function of (p, q, temperature).
PLAIN: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "kl": kl, "reverse-kl": reverse_kl, "tvd": total_variation,
}  # fmt: skip


@dataclass(frozen=True)
class Divergence(Written):
    """A divergence by name: "kl", "reverse-kl", "tvd", or "jsd:BETA" with 0 < BETA < 1 (alone: 0.5)."""

    shown: ClassVar[str] = "kl|reverse-kl|jsd:BETA|tvd"

    name: str
    beta: float = 0.5

    @classmethod
    def parse(cls, text: str) -> Divergence:
        name, colon, number = text.partition(":")
        if name not in (*PLAIN, "jsd") or (colon and name != "jsd"):
            raise ValueError(f"divergence '{text}' is not one of kl, reverse-kl, tvd, jsd:BETA")
        beta = read(float, number) if colon else 0.5
        if not 0 < beta < 1:
            raise ValueError(f"divergence '{text}': beta must lie between 0 and 1, at which it vanishes")
        return cls(name, beta)

    def __str__(self) -> str:
        return f"jsd:{self.beta:g}" if self.name == "jsd" else self.name

    def __call__(self, p: Tensor, q: Tensor, temperature: float = 1.0) -> Tensor:
        """``D(p || q)`` ``[...]`` of logits ``[..., K]``."""
        if self.name == "jsd":
            return jsd(p, q, self.beta, temperature)
        return PLAIN[self.name](p, q, temperature)


def sequence_means(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of ``values`` ``[B, L]`` over the tokens of each sequence that ``mask`` ``[B, L]`` counts, ``[B]``; 0
    where it counts none."""
    counted = mask.to(values.dtype)
    return (values * counted).sum(-1) / counted.sum(-1).clamp_min(1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean over tokens of each sequence, then over the sequences: a long one counts no more than a short one."""
    return sequence_means(values, mask).mean()
