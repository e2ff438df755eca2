"""Small causal networks over tokens: a transformer and stacked gated recurrent units, both with a cache.

``forward`` reads whole sequences; ``extend`` reads further tokens after those in a cache, which holds one row a token
and can therefore be cut back to any of them (:class:`~fewstep.language_models.Cache`).  The table that gives each token
its vector also gives its logit (tied), which halves the weights of small networks with large vocabularies.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor, nn

from fewstep.language_models import Cache
from fewstep.networks.attention import attend
from fewstep.networks.parts import Dropout
from fewstep.ranges import Count, Share
from fewstep.values import check_arguments


class Tied(nn.Module):
    """Tokens to vectors ``[..., width]`` of unit variance, and vectors back to logits ``[..., vocabulary]``."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocabulary, width) * width**-0.5)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.embedding(tokens, self.weight) * self.weight.shape[1] ** 0.5

    def logits(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, self.weight, self.bias)


class CausalTransformer(nn.Module):
    """Int64 tokens ``[B, L]`` in, logits ``[B, L, vocabulary]`` out, ``L`` at most ``length``.

    ``blocks`` residual blocks of ``width`` features with ``heads`` heads, normalised first; positions enter by what
    each head adds to its scores for every distance (:class:`Distances`).
    """

    def __init__(
        self,
        vocabulary: int,
        length: int,
        width: Annotated[Count, "features"] = 64,
        blocks: Annotated[Count, "residual blocks"] = 2,
        heads: Annotated[Count, "heads of attention"] = 4,
        dropout: Annotated[Share, "share of the features of a block dropped in training"] = 0.0,
    ) -> None:
        super().__init__()
        check_arguments(CausalTransformer, locals())
        if width % heads:
            raise ValueError(f"CausalTransformer: width={width} must be divisible by heads={heads}")
        self.config = {
            "vocabulary": vocabulary, "length": length, "width": width, "blocks": blocks, "heads": heads,
            "dropout": dropout,
        }  # fmt: skip
        self.token = Tied(vocabulary, width)
        self.blocks = nn.ModuleList(CausalBlock(length, width, heads, dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.extend(tokens, Cache())[0]

    def extend(self, tokens: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """The logits of tokens ``[B, k]`` that follow those in the cache: keys and values of each block."""
        hidden, kept = self.token(tokens), []
        for i, block in enumerate(self.blocks):
            hidden, keys, values = block(hidden, cache.parts[2 * i : 2 * i + 2])
            kept += [keys, values]
        return self.token.logits(self.norm(hidden)), Cache(cache.length + tokens.shape[1], tuple(kept))


class CausalBlock(nn.Module):
    """Attention to the tokens up to its own, then two linear layers, each normalised first and added after."""

    def __init__(self, length: int, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.distances = Distances(length, heads)
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.first = nn.Linear(width, 4 * width)
        self.second = nn.Linear(4 * width, width)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, past: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """``[B, k, width]`` and the ``past`` keys and values ``[B, heads, n, d]``, if any, to the same, ``n + k``."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.before(x)).chunk(3, -1)
        )
        if past:
            k, v = (torch.cat(pair, dim=-2) for pair in zip(past, (k, v), strict=True))
        seen = attend(q, k, v, self.distances(q.shape[-2], k.shape[-2]).to(q.dtype))
        x = x + self.dropout(self.mix(seen.transpose(1, 2).flatten(2)))
        x = x + self.dropout(self.second(nn.functional.gelu(self.first(self.between(x)))))
        return x, k, v


class Distances(nn.Module):
    """What is added to the scores ``[heads, M, N]`` of the last ``M`` of ``N`` tokens: a learned number for each head
    and distance back, minus infinity ahead.

    Head ``h`` starts out looking ``h`` tokens back, and less at others, so that a small network finds its neighbours at
    once.
    """

    def __init__(self, length: int, heads: int) -> None:
        super().__init__()
        away = (torch.arange(length) - torch.arange(heads)[:, None]).abs()
        self.bias = nn.Parameter(-torch.log1p(away.float()))

    def forward(self, queries: int, keys: int) -> Tensor:
        place = torch.arange(keys, device=self.bias.device)
        back = place[keys - queries :, None] - place
        return self.bias[:, back.clamp_min(0)].masked_fill(back < 0, -math.inf)


class GRULanguageModel(nn.Module):
    """Int64 tokens ``[B, L]`` in, logits ``[B, L, vocabulary]`` out: ``layers`` gated recurrent units of ``width``.

    ``length`` bounds nothing here: it is the longest sequence that the model is meant for.  Each layer is a unit of its
    own, so that its state after every token is at hand and the cache can be cut back.
    """

    def __init__(
        self,
        vocabulary: int,
        length: int,
        width: Annotated[Count, "features of each layer"] = 128,
        layers: Annotated[Count, "layers"] = 1,
    ) -> None:
        super().__init__()
        check_arguments(GRULanguageModel, locals())
        self.config = {"vocabulary": vocabulary, "length": length, "width": width, "layers": layers}
        self.token = Tied(vocabulary, width)
        self.layers = nn.ModuleList(nn.GRU(width, width, batch_first=True) for _ in range(layers))
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.extend(tokens, Cache())[0]

    def extend(self, tokens: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """The logits of tokens ``[B, k]`` that follow those in the cache: states ``[B, n, width]`` of each layer."""
        hidden, kept = self.token(tokens), []
        for i, layer in enumerate(self.layers):
            past = cache.parts[i : i + 1]
            hidden, _ = layer(hidden, past[0][:, -1][None].contiguous() if past else None)
            kept.append(torch.cat([*past, hidden], dim=-2))
        return self.token.logits(self.out(hidden)), Cache(cache.length + tokens.shape[1], tuple(kept))


CAUSAL: dict[str, type[nn.Module]] = {"causal-transformer": CausalTransformer, "gru": GRULanguageModel}
