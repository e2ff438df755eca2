"""How the next token is chosen from logits: the law that temperature, top-k and top-p leave of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from fewstep.ranges import Least, NonNegative, Share
from fewstep.values import check_fields


@dataclass(frozen=True)
class Decoding:
    """Logits are divided by ``temperature`` (0: the most likely token alone), then the ``top_k`` largest stay (0: all;
    equals of the last one too), then the fewest of those whose mass is at least ``top_p``."""

    temperature: Annotated[NonNegative, "divides the logits; 0 always takes the most likely token"] = 1.0
    top_k: Annotated[int, Least(0), "how many of the most likely tokens stay; 0: all"] = 0
    top_p: Annotated[Share, "the mass of the most likely tokens that stay"] = 1.0

    def __post_init__(self) -> None:
        check_fields(self)

    def law(self, logits: Tensor) -> Tensor:
        """Probabilities ``[..., V]``, in float32 at least."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.temperature == 0:
            return torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
        logits = logits / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        law = logits.softmax(-1)
        if self.top_p < 1:
            mass, order = law.sort(-1, descending=True)
            kept = (mass.cumsum(-1) - mass < self.top_p) | (torch.arange(mass.shape[-1], device=mass.device) == 0)
            law = law * torch.zeros_like(law).scatter(-1, order, kept.to(law))
            law = law / law.sum(-1, keepdim=True)
        return law


#: From the model's own law.
SAMPLED = Decoding()


def drawn(law: Tensor, u: Tensor) -> Tensor:
    """One token ``[B]`` of each law ``[B, V]``, by uniform numbers ``u`` ``[B]`` in [0, 1)."""
    edges = law.double().cumsum(-1)
    found = torch.searchsorted(edges, u[:, None] * edges[:, -1:], right=True)[:, 0]
    return torch.minimum(found, (edges < edges[:, -1:]).sum(-1))
