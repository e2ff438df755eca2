"""Discrete denoisers: any network seen as the posterior ``p(x_0 | x_t)`` of every token.

The discrete twin of :mod:`fewstep.denoisers`.  The concrete score, the reverse rates and the law of a step follow from
the posterior and the chain (:mod:`fewstep.discrete.chains`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.denoisers import Cond
from fewstep.discrete.chains import Chain
from fewstep.schedules import as_time


class DiscreteDenoiser(nn.Module, ABC):
    """``q[b, i, y] = p(x_0 at place i is y | x_t)``, ``[B, L, tokens]``, rows summing to 1.

    ``x`` is int64 ``[B, L]``; ``t`` is a number or ``[B]``; ``cond`` is class labels ``[B]`` or None.  ``shape`` is
    ``(L,)`` and ``classes`` the number of class labels (None for unconditional models).  Subclasses give
    :meth:`posterior_of`; what a chain leaves visible is certain whatever they say.
    """

    def __init__(self, chain: Chain, length: int, classes: int | None = None) -> None:
        super().__init__()
        if length < 1:
            raise ValueError(f"length={length}: a sequence has at least one token")
        self.chain = chain
        self.shape = (length,)
        self.classes = classes

    @property
    def null(self) -> Cond:
        """The label that stands for none, one row; None for unconditional models."""
        return torch.tensor([-1]) if self.classes else None

    @abstractmethod
    def posterior_of(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The posterior for float64 times ``[B]``."""

    def forward(self, x: Tensor, t: Tensor | float, cond: Cond = None) -> Tensor:
        time = as_time(t, x)
        if time.shape != x.shape[:1]:
            raise ValueError(f"times of shape {list(time.shape)}: a chain takes one time, or one per sample [{len(x)}]")
        found = self.posterior_of(x, time, cond)
        visible = self.chain.visible(x)
        certain = nn.functional.one_hot(torch.where(visible, x, 0), self.chain.tokens).to(found)
        return torch.where(visible[..., None], certain, found)

    def score(self, x: Tensor, t: Tensor | float, cond: Cond = None) -> Tensor:
        """The concrete score ``[B, L, states]``."""
        return self.chain.score(self(x, t, cond), x, as_time(t, x))

    def rates(self, x: Tensor, t: Tensor | float, cond: Cond = None) -> Tensor:
        """The rates ``[B, L, states]`` at which the reverse chain leaves ``x``."""
        return self.chain.rates(self.score(x, t, cond), x, as_time(t, x))


class NetworkDiscreteDenoiser(DiscreteDenoiser):
    """A network ``F(x, time, cond)`` with logits ``[B, L, tokens]``, seen as a denoiser.

    The network gets tokens (states of the chain) and float32 times.
    """

    net: Any

    def __init__(self, net: nn.Module, chain: Chain, length: int, classes: int | None = None) -> None:
        super().__init__(chain, length, classes)
        self.net = net

    def logits(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """``F`` itself."""
        return self.net(x, t.float(), cond)

    def posterior_of(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.logits(x, t, cond).float().softmax(-1)
