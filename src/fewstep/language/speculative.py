"""Speculative decoding: a small model drafts, a large one reads the draft in one call and keeps what it agrees with.

With the target's law ``p`` and the draft's ``q`` after the same tokens (Leviathan et al. 2023; Chen et al. 2023)::

    y ~ q,   accepted with probability min(1, f(p(y)) / q(y)),   else a token from norm(max(0, p - q))

Up to ``gamma`` tokens are drafted; the first that is rejected is replaced and the rest dropped, and where none is, the
target's call gives one more token.  With ``f(p) = p`` what comes out has exactly the target's law, whatever the draft
is.  A larger ``f`` (:class:`Lenience`; Zhou et al. 2023) accepts more and leaves that law.

Greedy decoding is the same algorithm on laws of one token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, Self

import torch
from torch import Tensor

from fewstep.language.decoding import SAMPLED, Decoding
from fewstep.language_models import LanguageModel, State
from fewstep.values import Written


@dataclass(frozen=True)
class Lenience(Written):
    """What stands for ``p`` in the acceptance: ``linear`` p / eps, ``square`` p / eps^2, ``power`` p^eps, with ``eps``
    in (0, 1]; 1 is lossless, and written so."""

    kind: Literal["linear", "square", "power"] = "linear"
    eps: float = 1.0

    shown: ClassVar[str] = "lossless, linear:EPS, square:EPS or power:EPS"

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "square", "power") or not 0 < self.eps <= 1:
            raise ValueError(f"lenience {self.kind}:{self.eps:g}: {self.shown}, with EPS above 0 and at most 1")

    @classmethod
    def parse(cls, text: str) -> Self:
        if text == "lossless":
            return cls()
        kind, _, eps = text.partition(":")
        try:
            return cls(kind, float(eps))  # type: ignore[arg-type]  # checked there
        except ValueError:
            raise ValueError(f"lenience '{text}': {cls.shown}, with EPS above 0 and at most 1") from None

    def __str__(self) -> str:
        return "lossless" if self.eps == 1 else f"{self.kind}:{self.eps:g}"

    def of(self, p: Tensor) -> Tensor:
        if self.kind == "power":
            return p**self.eps
        return p / (self.eps if self.kind == "linear" else self.eps**2)


LOSSLESS = Lenience()


def accepted_with(p: Tensor, q: Tensor, lenience: Lenience = LOSSLESS) -> Tensor:
    """The probability ``[..., V]`` that a drafted token is accepted; 1 where it is never drafted."""
    f = lenience.of(p)
    return torch.where(f >= q, 1.0, f / torch.where(q > 0, q, 1.0))


def residual(p: Tensor, q: Tensor) -> Tensor:
    """The law ``[..., V]`` after a rejection, ``norm(max(0, p - q))``; ``p`` where that is 0 / 0, because nothing is
    rejected there.

    It is the same after a lenient rejection, which is a choice: the token is then one that the target wants more than
    the draft does.
    """
    more = (p - q).clamp_min(0)
    total = more.sum(-1, keepdim=True)
    return torch.where(total > 0, more / torch.where(total > 0, total, 1.0), p)


def acceptance_of(p: Tensor, q: Tensor, lenience: Lenience = LOSSLESS) -> Tensor:
    """The probability ``[...]`` that a token of the draft is accepted: ``sum min(p, q) = 1 - TVD`` if lossless."""
    return torch.minimum(lenience.of(p), q).sum(-1)


def law_of_one_token(p: Tensor, q: Tensor, lenience: Lenience = LOSSLESS) -> Tensor:
    """The law ``[..., V]`` of the token that comes out where one is drafted; ``p`` itself if lossless."""
    kept = q * accepted_with(p, q, lenience)
    return kept + (1 - kept.sum(-1, keepdim=True)) * residual(p, q)


def tokens_per_call(alpha: float, gamma: int) -> float:
    """tau = (1 - alpha^(gamma + 1)) / (1 - alpha): the tokens that a call of the target brings where each of ``gamma``
    drafted ones is accepted with probability ``alpha``, whatever became of the others."""
    return sum(alpha**i for i in range(gamma + 1))


def speed_up(alpha: float, gamma: int, cost: float) -> float:
    """tau / (c gamma + 1): how many times as fast as the target alone, where a call of the draft costs ``cost`` of one
    of the target, and reading ``gamma + 1`` tokens costs the target what reading one does."""
    return tokens_per_call(alpha, gamma) / (cost * gamma + 1)


@dataclass(frozen=True)
class Statistics:
    """What speculative decoding did: ``tokens`` that came out, ``target_calls`` and ``draft_calls``, and for each place
    in a block how many drafted tokens were ``drafted``, ``examined`` (none before was rejected) and ``accepted``."""

    tokens: int = 0
    target_calls: int = 0
    draft_calls: int = 0
    drafted: tuple[int, ...] = ()
    examined: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()

    @classmethod
    def of_block(cls, drafted: int, kept: int, tokens: int) -> Statistics:
        """One call of the target on so many drafted tokens, of which the first ``kept`` were accepted."""
        examined = min(kept + 1, drafted)
        return cls(tokens, 1, drafted, (1,) * drafted, marks(examined, drafted), marks(kept, drafted))

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(
            self.tokens + other.tokens,
            self.target_calls + other.target_calls,
            self.draft_calls + other.draft_calls,
            added(self.drafted, other.drafted),
            added(self.examined, other.examined),
            added(self.accepted, other.accepted),
        )

    @property
    def acceptance(self) -> float:
        """The part of the examined tokens that was accepted; NaN where none was drafted."""
        return sum(self.accepted) / sum(self.examined) if self.examined else float("nan")

    @property
    def by_position(self) -> tuple[float, ...]:
        """The same for each place in a block."""
        return tuple(a / n if n else float("nan") for a, n in zip(self.accepted, self.examined, strict=True))

    @property
    def block_efficiency(self) -> float:
        """Tokens for each call of the target."""
        return self.tokens / self.target_calls if self.target_calls else float("nan")


def marks(count: int, places: int) -> tuple[int, ...]:
    """1 at the first ``count`` places, 0 at the others."""
    return (1,) * count + (0,) * (places - count)


def added(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    """Counts by place added up, those of the shorter one taken as 0."""
    size = max(len(a), len(b))
    return tuple(x + y for x, y in zip(a + (0,) * (size - len(a)), b + (0,) * (size - len(b)), strict=True))


class Choices(Protocol):
    """Who chooses: an :class:`~fewstep.randomness.Rng`, or a test that walks through all that can happen."""

    def choice(self, n: int, weights: Tensor) -> Tensor:
        """``n`` indices into weights ``[K]``."""


@dataclass(frozen=True)
class Decoded:
    """``tokens`` ``[n]`` after the prompt; ``accepted`` ``[n]``: those that the draft wrote, the others are the
    target's own; ``rejected``: which token the draft had wanted, by the place of the one that stands there instead."""

    tokens: Tensor
    accepted: Tensor
    rejected: Mapping[int, int]
    statistics: Statistics


@torch.no_grad()
def speculative_decode(
    target: LanguageModel,
    draft: LanguageModel,
    prompt: Tensor,
    rng: Choices,
    length: int,
    *,
    gamma: int = 7,
    decoding: Decoding = SAMPLED,
    lenience: Lenience = LOSSLESS,
    end: int | None = None,
) -> Decoded:
    """At most ``length`` tokens after a prompt ``[L]``, up to and with ``end`` where that is a token.

    A plain function of tokens becomes a model in :class:`~fewstep.language_models.FunctionLanguageModel`.  ``decoding``
    is applied to both laws before they are compared.  ValueError for an empty prompt, where a model cannot read prompt
    and ``length``, and for vocabularies that differ.
    """
    check_pair(target, draft, prompt, length, gamma)
    run = Run(target, draft, prompt, rng, decoding, lenience, end)
    while run.written < length and not run.ended:
        run.block(min(gamma, length - run.written - 1))
    return run.decoded()


def check_pair(target: LanguageModel, draft: LanguageModel, prompt: Tensor, length: int, gamma: int) -> None:
    """ValueError where the two cannot decode together."""
    if target.vocabulary != draft.vocabulary:
        raise ValueError(
            f"the draft has {draft.vocabulary} tokens, the target {target.vocabulary}: they must be the same"
        )
    if prompt.ndim != 1 or len(prompt) == 0:
        raise ValueError(f"prompt {list(prompt.shape)}: one sequence [L] of at least one token")
    if length < 1 or gamma < 0:
        raise ValueError(f"length={length} and gamma={gamma}: at least one token, and none or more drafted at a time")
    longest = min(target.length, draft.length)
    if len(prompt) + length > longest:
        raise ValueError(f"{len(prompt)} tokens of prompt and length={length}: the two models read at most {longest}")


class Run:
    """One sequence on its way: its tokens, and what each model has read of them."""

    def __init__(
        self, target: LanguageModel, draft: LanguageModel, prompt: Tensor, rng: Choices, decoding: Decoding,
        lenience: Lenience, end: int | None,
    ) -> None:  # fmt: skip
        self.target, self.draft, self.rng = target, draft, rng
        self.decoding, self.lenience, self.end = decoding, lenience, end
        self.device, self.begun = prompt.device, len(prompt)
        self.tokens: list[int] = prompt.tolist()
        self.target_state, self.draft_state = target.begin(), draft.begin()
        self.accepted: list[bool] = []
        self.rejected: dict[int, int] = {}
        self.statistics = Statistics()

    @property
    def written(self) -> int:
        return len(self.tokens) - self.begun

    @property
    def ended(self) -> bool:
        return self.written > 0 and self.tokens[-1] == self.end

    def laws(self, model: LanguageModel, tokens: list[int], state: State, count: int) -> tuple[Tensor, State]:
        """The laws ``[count, V]`` after the last ``count`` of ``tokens``, and a state that has read them all."""
        fresh = torch.tensor([tokens[state.length :]], device=self.device)
        logits, state = model.extend(fresh, state)
        return self.decoding.law(logits[0, -count:]), state

    def block(self, gamma: int) -> None:
        """Draft at most ``gamma`` tokens, call the target once, and keep what it agrees with."""
        drafted, laws = self.drafted(gamma)
        wanted, state = self.laws(self.target, self.tokens + drafted, self.target_state, len(drafted) + 1)
        kept, own = self.compared(drafted, laws, wanted)
        before = self.written
        self.tokens += drafted[:kept]
        self.accepted += [True] * kept
        if kept < len(drafted):
            self.rejected[self.written] = drafted[kept]
        if kept < len(drafted) or not self.ended:
            self.tokens.append(int(self.rng.choice(1, own)))
            self.accepted.append(False)
        self.statistics += Statistics.of_block(len(drafted), kept, self.written - before)
        read = len(self.tokens) - 1  # neither has read the last one
        self.target_state = state.cut(min(state.length, read))
        self.draft_state = self.draft_state.cut(min(self.draft_state.length, read))

    def drafted(self, gamma: int) -> tuple[list[int], list[Tensor]]:
        """At most ``gamma`` drafted tokens, none after the end, and the law ``[V]`` that each was drawn from."""
        tokens: list[int] = []
        laws: list[Tensor] = []
        while len(tokens) < gamma and not (tokens and tokens[-1] == self.end):
            law, self.draft_state = self.laws(self.draft, self.tokens + tokens, self.draft_state, 1)
            laws.append(law[0])
            tokens.append(int(self.rng.choice(1, law[0])))
        return tokens, laws

    def compared(self, drafted: list[int], laws: list[Tensor], wanted: Tensor) -> tuple[int, Tensor]:
        """How many drafted tokens are kept, and the law ``[V]`` of the token that follows them."""
        for i, (token, q) in enumerate(zip(drafted, laws, strict=True)):
            p = wanted[i]
            chance = float(accepted_with(p, q, self.lenience)[token])
            if not int(self.rng.choice(1, torch.tensor([1 - chance, chance], dtype=torch.float64))):
                return i, residual(p, q)
        return len(drafted), wanted[-1]

    def decoded(self) -> Decoded:
        places = torch.tensor(self.tokens[self.begun :], device=self.device)
        return Decoded(places, torch.tensor(self.accepted), self.rejected, self.statistics)
