"""Language models: the law of the next token given those before, with a state that can be extended and cut back.

Tokens are int64 ``[B, L]`` in ``0 .. vocabulary - 1``.  The logits ``[B, L, V]`` at position ``t`` are the law of token
``t + 1`` given the tokens ``0 .. t``: a model needs one token to begin with.  Models are causal, so that sequences of
different lengths are padded *after* their tokens, with anything, and the padding never reaches what stands before it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, Self, cast

import torch
from torch import Tensor, nn

#: What decoders write for the bytes of a character that has not ended.
UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class State(Protocol):
    """What a model has kept of the tokens that it read.  It never changes: extending and cutting make new ones."""

    @property
    def length(self) -> int:
        """How many tokens were read."""

    def cut(self, length: int) -> Self:
        """The state after the first ``length`` of them; ValueError where there are not so many."""


@dataclass(frozen=True)
class Cache:
    """Tensors ``[..., length, d]`` with one row a token: the keys and values of attention, the hidden states of a
    recurrence, or the tokens themselves."""

    length: int = 0
    parts: tuple[Tensor, ...] = ()

    def cut(self, length: int) -> Self:
        check_cut(length, self.length)
        return type(self)(length, tuple(part[..., :length, :] for part in self.parts) if length else ())


class Tokenizer(Protocol):
    """How a text becomes tokens, and back."""

    def encode(self, text: str) -> Tensor:
        """The tokens of a text, int64 ``[L]``; ValueError for a text that has none."""

    def decode(self, tokens: Tensor) -> list[str]:
        """What tokens ``[B, L]`` stand for, one string a row."""


def check_cut(length: int, read: int) -> None:
    """ValueError where a state of ``read`` tokens cannot be cut back to ``length``."""
    if not 0 <= length <= read:
        raise ValueError(f"cut({length}): the state holds {read} tokens; from 0 to {read}")


class LanguageModel(nn.Module, ABC):
    """A causal model of sequences over ``vocabulary`` tokens, at most ``length`` of them."""

    vocabulary: int
    length: int
    #: Whether every token has a probability above 0 after any text, as it has in a softmax of finite logits.
    writes_all: bool = True

    @abstractmethod
    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits ``[B, L, V]`` of tokens ``[B, L]``.

        ``mask`` ``[B, L]`` is True where a token is there, and False behind the last one of a shorter sequence; what
        stands there need not be a token, and the logits there mean nothing.  ValueError for more than ``length`` tokens
        and for a mask with a hole.
        """

    def begin(self) -> State:
        """The state before the first token."""
        return Cache()

    def extend(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """The logits ``[B, k, V]`` of ``k`` further tokens ``[B, k]``, and the state with them.

        Without a cache of its own a model reads all tokens again.
        """
        held = cast("Cache", state)
        seen = torch.cat([part[..., 0] for part in held.parts] + [tokens], dim=-1)
        return self(seen)[:, held.length :], Cache(seen.shape[-1], (seen[..., None],))

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that a model came with; None for one without."""
        return None

    def decode(self, tokens: Tensor) -> list[str]:
        """What tokens ``[B, L]`` stand for, one string a row; their numbers where nobody has said."""
        if self.tokenizer is not None:
            return self.tokenizer.decode(tokens)
        return [" ".join(map(str, row)) for row in tokens.tolist()]

    def pieces(self, tokens: Tensor) -> list[str]:
        """What each of the tokens ``[L]`` adds to the text of those before it; joined, they are the text of all.

        A character that takes several tokens is in the piece of the last one.
        """
        begun = [self.decode(tokens[None, :end])[0].rstrip(UNFINISHED) for end in range(1, len(tokens))]
        texts = ["", *begun, *self.decode(tokens[None])] if len(tokens) else [""]
        return [text[len(before) :] for before, text in pairwise(texts)]


def checked(tokens: Tensor, mask: Tensor | None, length: int) -> Tensor:
    """``tokens`` with 0 where the mask is False; ValueError for shapes, lengths and masks that do not fit."""
    if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= length:
        raise ValueError(f"tokens {list(tokens.shape)}: the model reads [B, L] with L from 1 to {length}")
    if mask is None:
        return tokens
    if mask.shape != tokens.shape or mask.dtype != torch.bool:
        raise ValueError(f"mask {list(mask.shape)} of {mask.dtype}: booleans {list(tokens.shape)} as the tokens")
    if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise ValueError("mask: padding stands behind the tokens of a sequence, never before or between them")
    return tokens.masked_fill(~mask, 0)


class FunctionLanguageModel(LanguageModel):
    """Any function of tokens ``[B, L]`` that gives logits ``[B, L, V]``, as a model without a cache."""

    def __init__(self, function: Callable[[Tensor], Tensor], vocabulary: int, length: int) -> None:
        super().__init__()
        self.function, self.vocabulary, self.length = function, vocabulary, length

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.function(checked(tokens, mask, self.length))


class CausalNetwork(Protocol):
    """What :class:`NetworkLanguageModel` asks of a network (:mod:`fewstep.networks.causal`)."""

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits ``[B, L, V]``."""

    def extend(self, tokens: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """Logits ``[B, k, V]`` of further tokens, and the cache with them."""


class NetworkLanguageModel(LanguageModel):
    """A network of ours as a language model.

    ``alphabet`` are the characters that the tokens stand for, token 0 first; None where they stand for something else.
    A network that came with a tokenizer has it as its attribute ``tokenizer``.
    ValueError for an alphabet of another length than the vocabulary.
    """

    def __init__(self, net: nn.Module, vocabulary: int, length: int, alphabet: str | None = None) -> None:
        super().__init__()
        if alphabet is not None and len(alphabet) != vocabulary:
            raise ValueError(f"alphabet: {len(alphabet)} characters for a vocabulary of {vocabulary} tokens; one each")
        self.net, self.vocabulary, self.length, self.alphabet = net, vocabulary, length, alphabet

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        return cast("Tensor", self.net(checked(tokens, mask, self.length)))

    def extend(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        if state.length + tokens.shape[1] > self.length:
            raise ValueError(f"{state.length} tokens and {tokens.shape[1]} more: the model reads at most {self.length}")
        return cast("CausalNetwork", self.net).extend(tokens, cast("Cache", state))

    @property
    def tokenizer(self) -> Tokenizer | None:
        return getattr(self.net, "tokenizer", None)

    def decode(self, tokens: Tensor) -> list[str]:
        if self.alphabet is None:
            return super().decode(tokens)
        return ["".join(self.alphabet[token] for token in row) for row in tokens.tolist()]


class RestrictedVocabulary(LanguageModel):
    """A model of ``K + 1`` tokens as one of ``vocabulary`` tokens, of which it writes the ``K`` in ``kept`` alone.

    Its token ``K`` stands for all others, which it can read and never writes: as a draft it leaves them to the target,
    and what comes out has the target's law all the same.  ValueError where the numbers do not fit.
    """

    writes_all = False
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
