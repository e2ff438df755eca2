"""A masked diffusion model as a language model: one token is revealed at a time, in an order given beforehand.

What is revealed has then a law of the next token, ``p(y_t | revealed)``, and with it everything that is built on such
laws: roll-outs, speculative decoding, distillation of a draft.  Two things differ from a causal network.  The network
reads the whole sequence for every token, so that reading ``k`` tokens is ``k`` sequences in one batch; and revealing
several tokens in one call, which is what these models are fast with, draws them independently: no law of the tokens
after each other is kept there, and a draft has nothing to be compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from fewstep.discrete.denoisers import DiscreteDenoiser
from fewstep.language_models import Cache, LanguageModel, State, checked


class RevealInOrder(LanguageModel):
    """``order`` are the places ``0 .. L - 1`` in the order in which they are revealed (None: as they stand).

    Tokens are those at these places, in this order.  The time that the denoiser is told is the one at which so many of
    its tokens are revealed on average.  ValueError for a chain without a mask, and for an order that leaves places out.
    """

    order: Tensor

    def __init__(self, denoiser: DiscreteDenoiser, order: Sequence[int] | None = None) -> None:
        super().__init__()
        (length,) = denoiser.shape
        places = torch.arange(length) if order is None else torch.tensor(order)
        if not denoiser.chain.absorbing:
            raise ValueError(f"a masked chain reveals tokens one after the other, {type(denoiser.chain).__name__} none")
        if not torch.equal(places.sort().values, torch.arange(length)):
            raise ValueError(f"order={places.tolist()}: every place from 0 to {length - 1} once")
        self.denoiser, self.vocabulary, self.length = denoiser, denoiser.chain.tokens, length
        self.register_buffer("order", places)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.after(checked(tokens, mask, self.length), 0)

    def extend(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        held = cast("Cache", state)
        seen = checked(torch.cat([part[..., 0] for part in held.parts] + [tokens], dim=-1), None, self.length)
        return self.after(seen, held.length), Cache(seen.shape[1], (seen[..., None],))

    def after(self, tokens: Tensor, start: int) -> Tensor:
        """The logits ``[B, L - start, V]`` after each token from ``start`` on: as many sequences in one call.  The last
        token of all has none after it, and gets its own place's."""
        batch, count = tokens.shape
        masked = self.denoiser.chain.states - 1
        number = torch.arange(start + 1, count + 1, device=tokens.device)
        hidden = torch.full((batch, len(number), self.length), masked, device=tokens.device)
        shown = torch.arange(count, device=tokens.device) < number[:, None]
        hidden[..., self.order[:count]] = torch.where(shown, tokens[:, None], masked)
        noise = self.denoiser.chain.noise
        t = noise.time_at(number.double() / self.length).clamp(self.denoiser.chain.t_min, self.denoiser.chain.t_max)
        posterior = self.denoiser(hidden.flatten(0, 1), t.repeat(batch)).unflatten(0, (batch, len(number)))
        place = self.order[number.clamp_max(self.length - 1)]
        return posterior.gather(2, place[None, :, None, None].expand(batch, -1, 1, self.vocabulary))[:, :, 0].log()
