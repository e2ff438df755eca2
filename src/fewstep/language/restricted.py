"""A small vocabulary inside a large one: a draft pays for every token that it has a logit for."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.language_models import LanguageModel, State, checked


class RestrictedVocabulary(LanguageModel):
    """A model of ``K + 1`` tokens as one of ``vocabulary`` tokens, of which it writes the ``K`` in ``kept`` alone.

    Its token ``K`` stands for all others, which it can read and never writes: as a draft it leaves them to the target,
    and what comes out has the target's law all the same.  ValueError where the numbers do not fit.
    """

    kept: Tensor
    inside: Tensor

    def __init__(self, inner: LanguageModel, kept: Tensor, vocabulary: int) -> None:
        super().__init__()
        if kept.ndim != 1 or len(kept) + 1 != inner.vocabulary:
            raise ValueError(f"kept {list(kept.shape)}: [K] tokens for a model of K + 1, which has {inner.vocabulary}")
        if len(kept.unique()) != len(kept) or int(kept.min()) < 0 or int(kept.max()) >= vocabulary:
            raise ValueError(f"kept: different tokens from 0 to {vocabulary - 1}")
        self.inner, self.vocabulary, self.length = inner, vocabulary, inner.length
        self.register_buffer("kept", kept)
        inside = torch.full((vocabulary,), len(kept), device=kept.device)
        inside[kept] = torch.arange(len(kept), device=kept.device)
        self.register_buffer("inside", inside)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.outside(self.inner(self.inside[checked(tokens, mask, self.length)], mask))

    def begin(self) -> State:
        return self.inner.begin()

    def extend(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        logits, state = self.inner.extend(self.inside[tokens], state)
        return self.outside(logits), state

    def outside(self, logits: Tensor) -> Tensor:
        """Logits ``[..., K + 1]`` as ``[..., vocabulary]``."""
        whole = torch.full((*logits.shape[:-1], self.vocabulary), -torch.inf, dtype=logits.dtype, device=logits.device)
        return whole.index_copy(-1, self.kept, logits[..., :-1])
