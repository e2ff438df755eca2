"""A language model in closed form: a Markov chain, whose law of whole continuations is a product of its table."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from fewstep.language_models import LanguageModel, checked


class MarkovChain(LanguageModel):
    """The next token's law is a row of ``table`` ``[V] * order + [V]``, chosen by the last ``order`` tokens, oldest
    first; before the first token stands token 0.  ``length`` bounds the sequences.

    ValueError for a table that is no law.
    """

    table: Tensor

    def __init__(self, table: Tensor, length: int = 64) -> None:
        super().__init__()
        if table.ndim < 2 or len(set(table.shape)) != 1:
            raise ValueError(f"table {list(table.shape)}: one side of V states for each token looked at, and the next")
        if bool((table < 0).any()) or not torch.allclose(table.sum(-1), torch.ones_like(table[..., 0])):
            raise ValueError("table: every row must be a law, no entry negative and the sum 1")
        self.register_buffer("table", table)
        self.order, self.vocabulary, self.length = table.ndim - 1, table.shape[-1], length

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        tokens = checked(tokens, mask, self.length)
        padded = torch.nn.functional.pad(tokens, (self.order - 1, 0))
        seen = tuple(padded[:, i : i + tokens.shape[1]] for i in range(self.order))
        return self.table[seen].log()

    def law(self, prompt: Tensor, count: int) -> Tensor:
        """The joint law ``[V] * count`` of the ``count`` tokens after a prompt ``[L]``."""
        law = self.table.new_ones(())
        for _ in range(count):
            tails = torch.tensor(list(product(range(self.vocabulary), repeat=law.ndim)), dtype=torch.long)
            whole = torch.cat([prompt.expand(len(tails), -1), tails], dim=1)
            law = law[..., None] * self(whole)[:, -1].exp().reshape(*law.shape, self.vocabulary)
        return law

    def stationary(self) -> Tensor:
        """The law ``[V] * order`` of the last ``order`` tokens in the long run, where there is one."""
        states = self.vocabulary**self.order
        step = self.table.new_zeros(states, states)
        place = torch.arange(states)
        for token in range(self.vocabulary):
            step[place, place * self.vocabulary % states + token] = self.table.reshape(states, -1)[:, token]
        one = torch.ones(1, states, dtype=step.dtype)
        system = torch.cat([step.T - torch.eye(states, dtype=step.dtype), one])
        right = torch.zeros(states + 1, 1, dtype=step.dtype)
        right[-1] = 1
        return torch.linalg.lstsq(system, right).solution[:, 0].reshape(self.table.shape[:-1])
