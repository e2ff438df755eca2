"""Exact small worlds: laws of sequences whose posterior is known, as denoisers on any chain.

Everything here is float64.  :func:`sampler_law` gives the law of a sampler itself, so that the errors of samplers are
numbers without sampling noise.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from fewstep.denoisers import Cond
from fewstep.discrete.chains import Chain, choose, gumbels
from fewstep.discrete.denoisers import DiscreteDenoiser
from fewstep.discrete.samplers import Plan, Stepper, step_laws
from fewstep.randomness import Rng


def sequences(symbols: int, length: int) -> Tensor:
    """All sequences, ``[symbols ** length, length]``, the first position changing slowest."""
    index = torch.arange(symbols**length)
    return torch.stack([index // symbols**i % symbols for i in reversed(range(length))], dim=1)


def index_of(x: Tensor, symbols: int) -> Tensor:
    """The row of :func:`sequences` that a sequence is."""
    place = symbols ** torch.arange(x.shape[-1] - 1, -1, -1, device=x.device)
    return (x * place).sum(-1)


def _law(name: str, table: Tensor) -> Tensor:
    table = torch.as_tensor(table, dtype=torch.float64)
    if not bool((table >= 0).all()) or not bool((table.sum(-1) > 0).all()):
        raise ValueError(f"{name}: probabilities must not be negative, and some must be positive in every row")
    return table / table.sum(-1, keepdim=True)


class DataLaw(DiscreteDenoiser):
    """A law of sequences with its posterior, which is uniform in a state that the law holds for impossible: samplers
    that move positions independently get into such states."""

    @abstractmethod
    def log_probability(self, x0: Tensor) -> Tensor:
        """The log-probability ``[B]`` of clean sequences."""

    @abstractmethod
    def draw(self, n: int, rng: Rng) -> Tensor:
        """``n`` exact samples ``[n, L]``."""


class JointLaw(DataLaw):
    """Any law of short sequences, as a table of probabilities ``[tokens] * L`` (their sum does not matter).

    The posterior sums over all ``tokens ** L`` sequences.
    """

    def __init__(self, chain: Chain, table: Tensor) -> None:
        if table.ndim < 1 or set(table.shape) != {chain.tokens}:
            raise ValueError(f"JointLaw: a table of shape {list(table.shape)} is not [{chain.tokens}] * length")
        super().__init__(chain, table.ndim)
        self.register_buffer("law", _law("JointLaw", table.flatten()))
        self.register_buffer("all", sequences(chain.tokens, table.ndim))

    law: Tensor
    all: Tensor

    def posterior_of(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        places = torch.arange(self.shape[0], device=x.device)
        weights = self.law * self.chain.likelihood(x, t).double()[:, places, self.all].prod(-1)
        indicator = torch.nn.functional.one_hot(self.all, self.chain.tokens).double()
        return _posterior(torch.einsum("bn,nlk->blk", weights, indicator))

    def log_probability(self, x0: Tensor) -> Tensor:
        return self.law[index_of(x0, self.chain.tokens)].log()

    def draw(self, n: int, rng: Rng) -> Tensor:
        return self.all[choose(self.law.expand(n, -1), gumbels(rng, (n, len(self.law))))]


class FactorizedLaw(DataLaw):
    """Independent positions with their own laws ``[L, tokens]``: what samplers that move positions independently can
    do perfectly."""

    def __init__(self, chain: Chain, marginals: Tensor) -> None:
        if marginals.ndim != 2 or marginals.shape[1] != chain.tokens:
            raise ValueError(f"FactorizedLaw: marginals of shape {list(marginals.shape)} are not [L, {chain.tokens}]")
        super().__init__(chain, len(marginals))
        self.register_buffer("law", _law("FactorizedLaw", marginals))

    law: Tensor

    def posterior_of(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return _posterior(self.law * self.chain.likelihood(x, t).double())

    def log_probability(self, x0: Tensor) -> Tensor:
        return self.law[torch.arange(self.shape[0]), x0].log().sum(-1)

    def draw(self, n: int, rng: Rng) -> Tensor:
        return choose(self.law.expand(n, -1, -1), gumbels(rng, (n, *self.law.shape)))


class MarkovLaw(DataLaw):
    """A Markov chain along the sequence: first token from ``first`` ``[tokens]``, then ``next`` ``[tokens, tokens]``.

    The posterior comes from the forward-backward recursion, so that sequences may be long.
    """

    def __init__(self, chain: Chain, first: Tensor, following: Tensor, length: int) -> None:
        if first.shape != (chain.tokens,) or following.shape != (chain.tokens, chain.tokens):
            raise ValueError(
                f"MarkovLaw: first {list(first.shape)} and following {list(following.shape)} must be [{chain.tokens}] "
                f"and [{chain.tokens}, {chain.tokens}]"
            )
        super().__init__(chain, length)
        self.register_buffer("first", _law("MarkovLaw", first))
        self.register_buffer("following", _law("MarkovLaw", following))

    first: Tensor
    following: Tensor

    def posterior_of(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        seen = self.chain.likelihood(x, t).double().unbind(1)
        ahead = [self.first * seen[0]]
        for here in seen[1:]:
            ahead.append(_scaled(ahead[-1]) @ self.following * here)
        back = [torch.ones_like(seen[0])]
        for here in reversed(seen[1:]):
            back.append(_scaled(here * back[-1]) @ self.following.T)
        return _posterior(torch.stack(ahead, 1) * torch.stack(back[::-1], 1))

    def log_probability(self, x0: Tensor) -> Tensor:
        steps = self.following[x0[:, :-1], x0[:, 1:]].log().sum(-1)
        return self.first[x0[:, 0]].log() + steps

    def draw(self, n: int, rng: Rng) -> Tensor:
        x = [choose(self.first.expand(n, -1), gumbels(rng, (n, self.chain.tokens)))]
        while len(x) < self.shape[0]:
            x.append(choose(self.following[x[-1]], gumbels(rng, (n, self.chain.tokens))))
        return torch.stack(x, 1)


def _scaled(row: Tensor) -> Tensor:
    """Rows divided by their sums, so that long products do not underflow."""
    return row / row.sum(-1, keepdim=True).clamp_min(torch.finfo(row.dtype).tiny)


def _posterior(joint: Tensor) -> Tensor:
    """Rows divided by their sums, uniform where the state is impossible."""
    total = joint.sum(-1, keepdim=True)
    return torch.where(total > 0, joint / torch.where(total > 0, total, 1.0), 1 / joint.shape[-1])


def countdown(chain: Chain, length: int, slip: float = 1e-3) -> MarkovLaw:
    """Sequences that count down by one to 0 and then start again from a random number above it: every pair of
    neighbours is either right or wrong (after the toy task of Zhao et al. 2024).

    With the probability ``slip`` a token is any other one, so that no state is impossible and a sampler can go on
    after a mistake.
    """
    tokens = chain.tokens
    start = torch.ones(tokens, dtype=torch.float64)
    start[0] = 0
    following = torch.diag(torch.ones(tokens - 1, dtype=torch.float64), -1)
    following[0] = start / start.sum()
    return MarkovLaw(chain, torch.ones(tokens), (1 - slip) * following + slip / tokens, length)


def countdown_errors(x: Tensor) -> float:
    """The share of neighbours that break the rule of :func:`countdown`."""
    now, then = x[:, :-1], x[:, 1:]
    wrong = torch.where(now > 0, then != now - 1, then == 0)
    return float(wrong.double().mean())


@torch.no_grad()
def sampler_law(denoiser: DiscreteDenoiser, plan: Plan, stepper: Stepper) -> Tensor:
    """The law ``[states ** L]`` of what a sampler makes, over :func:`sequences`, by carrying the law of its state
    through every step; for small worlds, ``states ** (2 L)`` products a step."""
    chain, length = denoiser.chain, denoiser.shape[0]
    every = sequences(chain.states, length)
    # what the chain tends to: its stationary law, the last row of a transition over infinite noise
    prior = torch.linalg.matrix_exp(200 * chain.q)[0]
    law = prior[every].prod(-1)
    for i in range(plan.steps):
        rows = step_laws(chain, stepper, denoiser(every, plan.times[i]), every, plan, i).double()
        kernel = rows[:, 0]
        for j in range(1, length):
            kernel = (kernel[:, :, None] * rows[:, j, None, :]).flatten(1)
        law = law @ kernel
    return law


def total_variation(p: Tensor, q: Tensor) -> float:
    """Half the L1 distance of two laws."""
    return float((p - q).abs().sum()) / 2
