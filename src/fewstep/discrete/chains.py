"""Continuous-time Markov chains that turn tokens into noise, one position at a time and independently.

The rate of going from state ``y`` to state ``x`` is ``sigma(t) Q[y, x]``.  With ``E = exp((sbar(t) - sbar(s)) Q)``
the forward law from ``s`` to ``t >= s`` is ``p(x_t = x | x_s = y) = E[y, x]``.  Masked and uniform chains have ``E`` in
closed form and never build a matrix over the vocabulary; :class:`Ordinal` takes any symmetric ``Q``.

Two views of what a network knows, both ``[B, L, states]`` or ``[B, L, tokens]``:

* the posterior ``q[y] = p(x_0 = y | x_t)`` at every position (the discrete denoiser), and
* the concrete score ``s[y] = p_t(x with y in this place) / p_t(x)`` (Lou et al. 2023), 1 at ``y = x``.

``score = sum_z q[z] p(y | z) / p(x | z)`` goes one way, :meth:`Chain.posterior` the other.  The score gives the rates
of the chain that runs backwards, ``Qbar(x, y) = sigma(t) Q[y, x] s[y]``, and nothing else is needed to sample.

Tokens are int64 ``[B, L]`` in ``0 .. tokens - 1``; the masked chain has one more state, ``mask = tokens``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.discrete.noise import LogLinear, TotalNoise
from fewstep.randomness import Rng


def as_column(value: Tensor, like: Tensor) -> Tensor:
    """A coefficient ``[]`` or ``[B]`` viewed so that it multiplies ``like`` along its first dimension, in its type."""
    if value.ndim > 1 or (value.ndim == 1 and len(value) not in (1, len(like))):
        raise ValueError(f"times of shape {list(value.shape)}: a chain takes one time, or one per sample [{len(like)}]")
    return value.to(like).reshape(value.shape + (1,) * (like.ndim - value.ndim))


def uniforms(rng: Rng, shape: tuple[int, ...]) -> Tensor:
    """Float64 numbers in [0, 1) of any shape, the first dimension being samples."""
    return rng.uniform(math.prod(shape)).reshape(shape)


def gumbels(rng: Rng, shape: tuple[int, ...]) -> Tensor:
    """Standard Gumbel noise in float64: in float32 its largest values are cut off, which acts like a lower
    temperature (Zheng et al. 2024, "Masked diffusion models are secretly time-agnostic")."""
    return -torch.log(-torch.log(uniforms(rng, shape).clamp_min(torch.finfo(torch.float64).tiny)))


def choose(probabilities: Tensor, gumbel: Tensor) -> Tensor:
    """One index per row ``[..., S]`` by the Gumbel-max rule, in float64."""
    return (probabilities.double().log() + gumbel).argmax(-1)


@dataclass(frozen=True)
class Chain(ABC):
    """A forward chain; frozen and stateless.

    ``tokens`` is the size of the alphabet.  ``t_min`` is where samplers stop and ``t_max`` where they start; teacher
    and student share them.
    """

    #: Whether a token that was touched stays hidden, under a state of its own.
    absorbing: ClassVar[bool] = False

    tokens: int
    noise: TotalNoise = field(default_factory=LogLinear)
    t_min: float = 1e-4
    t_max: float = 1.0

    def __post_init__(self) -> None:
        if self.tokens < 2:
            raise ValueError(f"{type(self).__name__}: tokens={self.tokens} must be at least 2")
        if not 0 < self.t_min < self.t_max <= 1:
            raise ValueError(
                f"{type(self).__name__}: t_min={self.t_min:g} and t_max={self.t_max:g} need 0 < t_min < t_max <= 1"
            )

    @property
    def states(self) -> int:
        """The number of states of one position."""
        return self.tokens

    @property
    @abstractmethod
    def q(self) -> Tensor:
        """The rate matrix ``Q`` ``[states, states]``, float64, rows summing to 0."""

    def between(self, s: Tensor, t: Tensor) -> Tensor:
        """``exp(-(sbar(t) - sbar(s)))``: the share of tokens that nothing touches from ``s`` to ``t``."""
        return torch.exp(self.noise.total(s) - self.noise.total(t))

    @abstractmethod
    def transition(self, s: Tensor, t: Tensor) -> Tensor:
        """``E`` from ``s`` to ``t``, ``[..., states, states]`` for times ``[...]``; 0 is a time too."""

    @abstractmethod
    def prior(self, n: int, length: int, rng: Rng) -> Tensor:
        """``[n, length]`` tokens of pure noise, what ``x_t`` tends to."""

    @abstractmethod
    def likelihood(self, x: Tensor, t: Tensor) -> Tensor:
        """``p(x_t = x | x_0 = z)`` for every token ``z``: ``[B, L, tokens]``."""

    @abstractmethod
    def score(self, posterior: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The concrete score ``[B, L, states]`` of a posterior ``[B, L, tokens]``."""

    @abstractmethod
    def posterior(self, score: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The inverse of :meth:`score`."""

    @abstractmethod
    def rates(self, score: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The rates of the reverse chain ``[B, L, states]`` for leaving ``x``; 0 at ``x`` itself."""

    @abstractmethod
    def bridge(self, posterior: Tensor, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """``p(x_s = y | x_t)`` ``[B, L, states]`` when every position moves on its own::

            sum_z q[z] p(x_s = y | z) E[y, x] / p(x_t = x | z)

        With the score of the posterior it is Lou et al.'s (2023) "Tweedie tau-leaping", ``(s E^-1)[y] E[y, x]``; this
        form needs no inverse, which is hopeless at high noise.  Rows sum to 1 when those of the posterior do.
        """

    def corrupt(self, x0: Tensor, t: Tensor, rng: Rng) -> Tensor:
        """``x_t`` from data: tokens are untouched with probability ``keep(t)``, else drawn afresh."""
        touched = uniforms(rng, tuple(x0.shape)) >= self.noise.keep(t).reshape(-1, 1)
        return torch.where(touched, self.prior(len(x0), x0.shape[1], rng), x0)

    def visible(self, x: Tensor) -> Tensor:
        """``[B, L]``: positions that the reverse chain will not touch any more."""
        return torch.zeros_like(x, dtype=torch.bool)

    def last(self, probabilities: Tensor) -> Tensor:
        """What the last step of a sampler draws from, so that it ends in tokens."""
        return probabilities


@dataclass(frozen=True)
class Masked(Chain):
    """The absorbing chain: a touched token becomes MASK and stays so (``D3PM absorbing``, SEDD, MDLM).

    A token that is visible is the data's own: its posterior is certain and the reverse chain never leaves it.  There
    the score that this class gives is that of the chain (towards MASK), with 0 for other tokens.
    """

    absorbing: ClassVar[bool] = True

    @property
    def mask(self) -> int:
        """The state of a hidden token."""
        return self.tokens

    @property
    def states(self) -> int:
        return self.tokens + 1

    @property
    def q(self) -> Tensor:
        q = -torch.eye(self.states, dtype=torch.float64)
        q[:, self.mask] = 1
        q[self.mask, self.mask] = 0
        return q

    def transition(self, s: Tensor, t: Tensor) -> Tensor:
        kept = self.between(s, t)[..., None, None]
        hidden = torch.zeros_like(self.q)
        hidden[:, self.mask] = 1
        return kept * torch.eye(self.states, dtype=torch.float64) + (1 - kept) * hidden

    def prior(self, n: int, length: int, rng: Rng) -> Tensor:
        return torch.full((n, length), self.mask, dtype=torch.long, device=rng.device)

    def likelihood(self, x: Tensor, t: Tensor) -> Tensor:
        keep = self.noise.keep(t).reshape(-1, 1, 1)
        same = x[..., None] == torch.arange(self.tokens, device=x.device)
        return torch.where((x == self.mask)[..., None], 1 - keep, keep * same)

    def score(self, posterior: Tensor, x: Tensor, t: Tensor) -> Tensor:
        keep = self.noise.keep(t)
        hidden = (x == self.mask)[..., None]
        odds = as_column(keep / (1 - keep), posterior)
        towards = torch.where(hidden, posterior * odds, posterior)
        return torch.cat([towards, torch.where(hidden, torch.ones_like(odds), 1 / odds)], dim=-1)

    def posterior(self, score: Tensor, x: Tensor, t: Tensor) -> Tensor:
        keep = self.noise.keep(t)
        hidden = (x == self.mask)[..., None]
        return score[..., : self.tokens] * torch.where(hidden, as_column((1 - keep) / keep, score), 1.0)

    def rates(self, score: Tensor, x: Tensor, t: Tensor) -> Tensor:
        jump = score * as_column(self.noise.rate(t), score) * (x == self.mask)[..., None]
        return torch.cat([jump[..., : self.tokens], torch.zeros_like(jump[..., :1])], dim=-1)

    def bridge(self, posterior: Tensor, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        early, late = self.noise.keep(s), self.noise.keep(t)
        shown = posterior * as_column((early - late) / (1 - late), posterior)
        row = torch.cat([shown, as_column((1 - early) / (1 - late), posterior).expand_as(shown[..., :1])], dim=-1)
        stay = torch.nn.functional.one_hot(x, self.states).to(row)
        return torch.where((x == self.mask)[..., None], row, stay)

    def visible(self, x: Tensor) -> Tensor:
        return x != self.mask

    def last(self, probabilities: Tensor) -> Tensor:
        return torch.cat([probabilities[..., : self.tokens], torch.zeros_like(probabilities[..., -1:])], dim=-1)


@dataclass(frozen=True)
class Uniform(Chain):
    """A touched token becomes any token, itself included, with equal probability (``Q = 1/K - I``)."""

    @property
    def q(self) -> Tensor:
        return 1 / self.tokens - torch.eye(self.tokens, dtype=torch.float64)

    def transition(self, s: Tensor, t: Tensor) -> Tensor:
        kept = self.between(s, t)[..., None, None]
        return kept * torch.eye(self.tokens, dtype=torch.float64) + (1 - kept) / self.tokens

    def prior(self, n: int, length: int, rng: Rng) -> Tensor:
        return (uniforms(rng, (n, length)) * self.tokens).long()

    def _same(self, x: Tensor) -> Tensor:
        return x[..., None] == torch.arange(self.tokens, device=x.device)

    def likelihood(self, x: Tensor, t: Tensor) -> Tensor:
        keep = self.noise.keep(t).reshape(-1, 1, 1)
        return keep * self._same(x) + (1 - keep) / self.tokens

    def score(self, posterior: Tensor, x: Tensor, t: Tensor) -> Tensor:
        weights = posterior / self.likelihood(x, t).to(posterior)
        keep = as_column(self.noise.keep(t), posterior)
        return keep * weights + (1 - keep) / self.tokens * weights.sum(-1, keepdim=True)

    def posterior(self, score: Tensor, x: Tensor, t: Tensor) -> Tensor:
        keep = as_column(self.noise.keep(t), score)
        weights = (score - (1 - keep) / self.tokens * score.sum(-1, keepdim=True)) / keep
        return weights * self.likelihood(x, t).to(score)

    def rates(self, score: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return score * as_column(self.noise.rate(t), score) / self.tokens * ~self._same(x)

    def bridge(self, posterior: Tensor, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        weights = posterior / self.likelihood(x, t).to(posterior)
        early, kept = as_column(self.noise.keep(s), posterior), as_column(self.between(s, t), posterior)
        before = early * weights + (1 - early) / self.tokens * weights.sum(-1, keepdim=True)
        return before * (kept * self._same(x) + (1 - kept) / self.tokens)


@dataclass(frozen=True)
class Ordinal(Chain):
    """Grey levels and other tokens with an order: a touched token moves to a near one, with rates that fall like a
    Gaussian of the distance, ``width`` levels wide (the "Gaussian" rates of Campbell et al. 2022, here symmetric, so
    that pure noise is uniform).

    ``Q`` is scaled so that its slowest mode decays like ``exp(-sbar)``: ``keep(t)`` bounds what is left of the data.
    ``E`` comes from its eigenvectors; a vocabulary must be small.
    """

    width: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width <= 0:
            raise ValueError(f"Ordinal: width={self.width:g} must be positive")

    @cached_property
    def _modes(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues, the slowest non-zero one being -1, and eigenvectors."""
        level = torch.arange(self.tokens, dtype=torch.float64)
        q = torch.exp(-((level[:, None] - level) ** 2) / (2 * self.width**2)).fill_diagonal_(0)
        q -= torch.diag(q.sum(1))
        values, vectors = torch.linalg.eigh(q)
        return values / values[-2].abs(), vectors

    @cached_property
    def q(self) -> Tensor:
        values, vectors = self._modes
        return (vectors * values) @ vectors.T

    def _exp(self, amount: Tensor) -> Tensor:
        values, vectors = self._modes
        return (vectors * torch.exp(amount[..., None, None] * values)) @ vectors.T

    def transition(self, s: Tensor, t: Tensor) -> Tensor:
        return self._exp(self.noise.total(t) - self.noise.total(s)).clamp_min(0)

    def prior(self, n: int, length: int, rng: Rng) -> Tensor:
        return (uniforms(rng, (n, length)) * self.tokens).long()

    def corrupt(self, x0: Tensor, t: Tensor, rng: Rng) -> Tensor:
        return choose(self._rows(torch.zeros_like(t), t, x0), gumbels(rng, (*x0.shape, self.tokens)))

    def _rows(self, s: Tensor, t: Tensor, x: Tensor) -> Tensor:
        """``E[x, :]``, which is also ``E[:, x]``, ``[B, L, tokens]``."""
        table = self.transition(s, t).to(x.device)
        return table[x] if table.ndim == 2 else table[torch.arange(len(x), device=x.device)[:, None], x]

    def likelihood(self, x: Tensor, t: Tensor) -> Tensor:
        return self._rows(torch.zeros_like(t), t, x)

    def score(self, posterior: Tensor, x: Tensor, t: Tensor) -> Tensor:
        weights = posterior / self.likelihood(x, t).to(posterior)
        return weights @ self.transition(torch.zeros_like(t), t).to(posterior)

    def posterior(self, score: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """As in :class:`Chain`; ill-conditioned at high noise, where the fast modes of ``E`` are lost."""
        weights = score.double() @ self._exp(-self.noise.total(t)).to(score.device)
        return weights.to(score) * self.likelihood(x, t).to(score)

    def rates(self, score: Tensor, x: Tensor, t: Tensor) -> Tensor:
        leave = self.q.to(score).clone().fill_diagonal_(0)[x]
        return score * as_column(self.noise.rate(t), score) * leave

    def bridge(self, posterior: Tensor, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        weights = posterior / self.likelihood(x, t).to(posterior)
        before = weights @ self.transition(torch.zeros_like(s), s).to(posterior)
        return before * self._rows(s, t, x).to(posterior)


CHAINS: dict[str, type[Chain]] = {cls.__name__: cls for cls in (Masked, Uniform, Ordinal)}
