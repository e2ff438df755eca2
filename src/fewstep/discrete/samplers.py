"""Samplers of discrete chains: how the reverse chain is followed in a few network calls.

All positions move at once and independently: a step from ``t`` down to ``s`` needs, for every position, the
probabilities of the states that it may jump to.  A :class:`Stepper` gives these jumps; :func:`row` makes them the law
of a step, scaled by the coefficient ``Phi`` of that step::

    p = onehot(x) + Phi jumps - (what leaves x)

A :class:`Plan` holds the times and the coefficients, 1 unless somebody learned them
(:mod:`fewstep.methods.samplers.lsd`), so that a learned sampler is the same code.  :func:`poisson` and
:func:`gillespie` sample in their own ways.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.denoisers import Cond
from fewstep.discrete.chains import Chain, as_column, choose, gumbels, uniforms
from fewstep.discrete.denoisers import DiscreteDenoiser
from fewstep.grids import check_grid
from fewstep.randomness import Rng


class Stepper(ABC):
    """One step; frozen dataclasses."""

    @abstractmethod
    def jumps(self, chain: Chain, posterior: Tensor, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The probabilities ``[B, L, states]`` of being in another state at ``s``, 0 at ``x`` itself.

        ``posterior`` ``[B, L, tokens]`` is what the denoiser says at ``(x, t)``; times are float64, ``[]`` or ``[B]``,
        and the result is differentiable in them.  Jumps may sum to more than 1 where a step is too long.
        """


@dataclass(frozen=True)
class Euler(Stepper):
    """``(t - s)`` times the reverse rates: the Euler step, or tau-leaping with at most one jump (Lou et al. 2023)."""

    def jumps(self, chain: Chain, posterior: Tensor, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        rates = chain.rates(chain.score(posterior, x, t), x, t)
        return rates * as_column(t - s, rates)


@dataclass(frozen=True)
class Tweedie(Stepper):
    """The law of ``x_s`` given ``x_t`` at every position by itself: exact where only one position changes."""

    def jumps(self, chain: Chain, posterior: Tensor, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        law = chain.bridge(posterior, x, t, s)
        return law * (x[..., None] != torch.arange(chain.states, device=x.device))


@dataclass(frozen=True)
class Tempered(Stepper):
    """Another stepper on the score ``s^power``: what multiplying the output of a log-score network by ``power`` does.

    Above 1 it prefers likely tokens and makes them jump sooner or later than the chain would: perplexity falls because
    diversity does.  There to be measured against, not as a sampler of the data.
    """

    inner: Stepper
    power: float

    def jumps(self, chain: Chain, posterior: Tensor, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        tempered = chain.posterior(chain.score(posterior, x, t) ** self.power, x, t)
        return self.inner.jumps(chain, tempered, x, t, s)


STEPPERS: dict[str, Stepper] = {"euler": Euler(), "tweedie": Tweedie()}


def row(jumps: Tensor, x: Tensor, phi: Tensor | float = 1.0) -> Tensor:
    """The law of a step: ``phi`` times the jumps, negative ones cut to 0, what is left stays at ``x``; where more than
    everything would leave, nothing stays and the jumps share 1."""
    leave = (phi * jumps).clamp_min(0)
    total = leave.sum(-1, keepdim=True)
    leave = leave / total.clamp_min(1)
    return leave.scatter(-1, x[..., None], (1 - total).clamp_min(0))


@dataclass(frozen=True)
class Plan:
    """The times of a sampler, noisiest first, and the coefficient of each step: one fewer than times (none: all 1)."""

    times: tuple[float, ...]
    phi: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_grid(torch.tensor(self.times, dtype=torch.float64))
        if not self.phi:
            object.__setattr__(self, "phi", (1.0,) * self.steps)
        if len(self.phi) != self.steps:
            raise ValueError(f"a plan of {self.steps} steps needs as many coefficients, got {len(self.phi)}")
        if not all(0 <= phi < float("inf") for phi in self.phi):
            raise ValueError(f"coefficients must be finite and not negative, got {self.phi}")

    @property
    def steps(self) -> int:
        """The number of network calls."""
        return len(self.times) - 1

    @classmethod
    def uniform(cls, chain: Chain, steps: int) -> Plan:
        """Equally spaced from ``t_max`` to ``t_min``, coefficients 1."""
        if steps < 1:
            raise ValueError(f"steps={steps}: a plan needs at least one step")
        times = torch.linspace(chain.t_max, chain.t_min, steps + 1, dtype=torch.float64)
        return cls(tuple(times.tolist()))


def step_laws(chain: Chain, stepper: Stepper, posterior: Tensor, x: Tensor, plan: Plan, i: int) -> Tensor:
    """The law ``[B, L, states]`` of step ``i`` of a plan, that of the last one ending in tokens."""
    t, s = (torch.tensor(time, dtype=torch.float64, device=x.device) for time in plan.times[i : i + 2])
    jumps = stepper.jumps(chain, posterior, x, t, s)
    if i + 1 < plan.steps:
        return row(jumps, x, plan.phi[i])
    return finished(chain, row(jumps, x, plan.phi[i]), posterior, x)


def finished(chain: Chain, law: Tensor, posterior: Tensor, x: Tensor) -> Tensor:
    """The law of a last step: MASK is left out, and what is still masked is drawn from the posterior."""
    tokens = chain.last(law)
    total = tokens.sum(-1, keepdim=True)
    hidden = total <= 0  # only where a coefficient is 0
    spare = torch.nn.functional.pad(posterior, (0, chain.states - chain.tokens))
    return torch.where(hidden, spare, tokens / torch.where(hidden, 1.0, total))


@torch.no_grad()
def sample(
    denoiser: DiscreteDenoiser,
    n: int,
    plan: Plan | int,
    stepper: Stepper = Tweedie(),
    *,
    cond: Cond = None,
    seed: int = 0,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """``n`` samples ``[n, L]`` by a plan, or in so many equal steps.

    ``on_step(i, x)`` sees the state that every call gets.  On chains without a mask the samples hold the noise of
    ``t_min``.
    """
    chain = denoiser.chain
    plan = Plan.uniform(chain, plan) if isinstance(plan, int) else plan
    check_grid(torch.tensor(plan.times, dtype=torch.float64))
    rng = Rng(seed, "discrete sample", device=device_of(denoiser))
    x = chain.prior(n, denoiser.shape[0], rng)
    for i in range(plan.steps):
        if on_step is not None:
            on_step(i, x)
        law = step_laws(chain, stepper, denoiser(x, plan.times[i], cond), x, plan, i)
        x = choose(law, gumbels(rng, tuple(law.shape)))
    return x


@torch.no_grad()
def poisson(denoiser: DiscreteDenoiser, n: int, plan: Plan | int, *, cond: Cond = None, seed: int = 0) -> Tensor:
    """Poisson tau-leaping for tokens with an order (Campbell et al. 2022, section 4.2): during a step a position makes
    ``Poisson(Phi (t - s) rate)`` jumps towards every other level, their distances add up and the sum is clamped to the
    levels; one more call at the end takes the most likely token.

    ValueError on a masked chain, whose states have no order.
    """
    chain = denoiser.chain
    if chain.absorbing:
        raise ValueError("Poisson tau-leaping adds up jumps, and MASK is not a level: use Euler or Tweedie")
    plan = Plan.uniform(chain, plan) if isinstance(plan, int) else plan
    rng = Rng(seed, "discrete sample", device=device_of(denoiser))
    x = chain.prior(n, denoiser.shape[0], rng)
    level = torch.arange(chain.tokens, device=x.device)
    for i, phi in enumerate(plan.phi):
        rates = denoiser.rates(x, plan.times[i], cond).double()
        mean = phi * (plan.times[i] - plan.times[i + 1]) * rates
        count = torch.poisson(mean.cpu(), rng.generator).to(x.device)
        x = (x + (count * (level - x[..., None])).sum(-1).long()).clamp(0, chain.tokens - 1)
    return denoiser(x, plan.times[-1], cond).argmax(-1)


@torch.no_grad()
def gillespie(denoiser: DiscreteDenoiser, n: int, k: int = 1, *, cond: Cond = None, seed: int = 0) -> Tensor:
    """Show the ``k`` tokens whose turn comes first, again and again: ``ceil(L / k)`` network calls on a masked chain.

    A hidden token's waiting time is drawn from the chain: hidden at ``t``, it is still so at ``s`` with probability
    ``(1 - keep(s)) / (1 - keep(t))``.  With ``k = 1`` no two tokens share a call, so an exact denoiser gives exact
    samples (Gillespie's algorithm; the first-hitting sampler of Zheng et al. 2024).  ValueError on other chains.
    """
    chain = denoiser.chain
    if not chain.absorbing:
        raise ValueError(f"Gillespie's algorithm here is for masked chains, not for {type(chain).__name__}")
    if k < 1:
        raise ValueError(f"k={k}: at least one token is shown per call")
    length = denoiser.shape[0]
    rng = Rng(seed, "discrete sample", device=device_of(denoiser))
    x = chain.prior(n, length, rng)
    t = torch.full((n,), chain.t_max, dtype=torch.float64, device=x.device)
    for _ in range(-(-length // k)):
        posterior = denoiser(x, t, cond)
        drawn = choose(posterior, gumbels(rng, tuple(posterior.shape)))
        still = uniforms(rng, (n, length)) * (1 - chain.noise.keep(t))[:, None]
        turn = torch.where(chain.visible(x), -torch.inf, chain.noise.time_at(1 - still))
        first = turn.topk(min(k, length))
        shown = torch.zeros_like(x, dtype=torch.bool).scatter(1, first.indices, True) & ~chain.visible(x)
        x = torch.where(shown, drawn, x)
        t = first.values[:, -1].clamp(chain.t_min, chain.t_max)
    return x


def device_of(denoiser: DiscreteDenoiser) -> torch.device:
    """The device of the weights, the CPU without any."""
    tensor = next(iter([*denoiser.parameters(), *denoiser.buffers()]), None)
    return torch.device("cpu") if tensor is None else tensor.device
