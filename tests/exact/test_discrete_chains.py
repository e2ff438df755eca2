"""Discrete chains: closed forms against matrix exponentials, and everything else against enumeration."""

from __future__ import annotations

import pytest
import torch

from fewstep.discrete.chains import Chain, Masked, Ordinal, Uniform
from fewstep.discrete.exact import FactorizedLaw, JointLaw, MarkovLaw, index_of, sequences
from fewstep.discrete.noise import Cosine, Geometric, LogLinear, TotalNoise
from fewstep.randomness import Rng

NOISES = [LogLinear(), Cosine(), Geometric()]
CHAINS = [Masked(3), Masked(3, Geometric()), Uniform(3), Uniform(3, Cosine()), Ordinal(4), Ordinal(3, width=0.7)]
F64 = torch.float64
S, T = torch.tensor(0.35, dtype=F64), torch.tensor(0.6, dtype=F64)
chains = pytest.mark.parametrize("chain", CHAINS, ids=lambda c: f"{type(c).__name__}-{type(c.noise).__name__}")


def joint(chain: Chain, length: int = 2) -> JointLaw:
    """A correlated law."""
    shape = (chain.tokens,) * length
    return JointLaw(chain, torch.rand(*shape, generator=torch.Generator().manual_seed(1), dtype=F64) ** 3)


def whole_transition(chain: Chain, s: torch.Tensor, t: torch.Tensor, length: int) -> torch.Tensor:
    """The transition of whole sequences, ``[states ** L, states ** L]``."""
    one = torch.matrix_exp((chain.noise.total(t) - chain.noise.total(s)) * chain.q)
    whole = one
    for _ in range(length - 1):
        whole = torch.kron(whole, one)
    return whole


def start_law(law: JointLaw) -> torch.Tensor:
    """The data's law over sequences of states."""
    chain, length = law.chain, law.shape[0]
    start = torch.zeros(chain.states**length, dtype=F64)
    start[index_of(law.all, chain.states)] = law.law
    return start


@pytest.mark.parametrize("noise", NOISES, ids=lambda n: type(n).__name__)
def test_noise_functions_belong_together(noise: TotalNoise) -> None:
    """The rate is the derivative of the total noise, ``time_at`` inverts ``keep``, and there is no noise at 0."""
    t = torch.linspace(0.01, 0.99, 23, dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(noise.total(t).sum(), t)
    assert torch.allclose(noise.rate(t), slope, rtol=1e-12)
    assert torch.allclose(noise.keep(t), torch.exp(-noise.total(t)), rtol=1e-13)
    assert torch.allclose(noise.time_at(noise.keep(t)), t, rtol=1e-9)  # acos and log1p near 1 lose half the digits
    assert float(noise.keep(torch.tensor(0.0, dtype=F64))) == pytest.approx(1, abs=1e-15)
    assert float(noise.keep(torch.tensor(1.0, dtype=F64))) == pytest.approx(1e-3, rel=0.1)


@chains
def test_transitions_are_exponentials_of_the_rates(chain: Chain) -> None:
    """``E = exp((sbar(t) - sbar(s)) Q)``, a product over consecutive stretches, and rows are laws."""
    e = chain.transition(S, T)
    assert torch.allclose(e, torch.matrix_exp((chain.noise.total(T) - chain.noise.total(S)) * chain.q), atol=1e-14)
    middle = torch.tensor(0.5, dtype=F64)
    assert torch.allclose(chain.transition(S, middle) @ chain.transition(middle, T), e, atol=1e-14)
    assert torch.allclose(e.sum(-1), torch.ones(chain.states, dtype=F64), atol=1e-14) and float(e.min()) >= 0
    assert torch.allclose(chain.q.sum(1), torch.zeros(chain.states, dtype=F64), atol=1e-14)


@chains
def test_corruption_has_the_law_of_the_transition(chain: Chain) -> None:
    """Frequencies of corrupted tokens are those of ``E`` from 0, within five standard errors."""
    n = 20000
    x0 = torch.full((n, 1), 1)
    x = chain.corrupt(x0, T.expand(n), Rng(3))
    expected = chain.transition(torch.zeros_like(T), T)[1]
    found = torch.bincount(x.flatten(), minlength=chain.states).double() / n
    assert float(((found - expected).abs() - 5 * (expected * (1 - expected) / n).sqrt()).max()) <= 0


@chains
def test_likelihood_is_a_column_of_the_transition(chain: Chain) -> None:
    """``p(x_t = x | x_0 = z)``, for one time per sample too."""
    x, t = torch.arange(chain.states)[:, None], torch.linspace(0.2, 0.9, chain.states, dtype=F64)
    for i in range(chain.states):
        e = chain.transition(torch.zeros_like(t[i]), t[i])
        assert torch.allclose(chain.likelihood(x, t)[i, 0], e[: chain.tokens, i], atol=1e-14)


@chains
def test_score_is_the_ratio_of_noised_probabilities(chain: Chain) -> None:
    """``s[y] = p_t(x with y in this place) / p_t(x)`` from the enumerated law, where the chain can go."""
    law = joint(chain)
    every = sequences(chain.states, 2)
    noised = start_law(law) @ whole_transition(chain, torch.zeros_like(T), T, 2)
    score = law.score(every, float(T))
    for place in range(2):
        for y in range(chain.states):
            other = every.clone()
            other[:, place] = y
            ratio = noised[index_of(other, chain.states)] / noised
            hidden = ~chain.visible(every)[:, place]
            assert torch.allclose(score[:, place, y][hidden], ratio[hidden], rtol=1e-12)


@chains
def test_posterior_inverts_score(chain: Chain) -> None:
    """The two views hold the same."""
    law = joint(chain)
    every = sequences(chain.states, 2)
    posterior = law(every, float(T))
    assert torch.allclose(posterior.sum(-1), torch.ones(len(every), 2, dtype=F64), atol=1e-14)
    assert torch.allclose(chain.posterior(chain.score(posterior, every, T), every, T), posterior, atol=1e-13)


@chains
def test_reverse_rates_are_those_of_the_reversed_chain(chain: Chain) -> None:
    """The exact reverse transition over a short stretch is the identity plus the rates, with an error of second order
    in the stretch: halving it quarters the error."""
    law = joint(chain, 1)
    every = sequences(chain.states, 1)
    start = start_law(law)
    rates = law.rates(every, float(T))[:, 0]
    rates = rates - torch.diag(rates.sum(1))

    def error(dt: float) -> float:
        s = T - dt
        early = start @ whole_transition(chain, torch.zeros_like(s), s, 1)
        late = start @ whole_transition(chain, torch.zeros_like(T), T, 1)
        back = (early[:, None] * whole_transition(chain, s, T, 1) / late).T
        return float(
            (back - torch.eye(chain.states, dtype=F64) - dt * rates)[chain.tokens if rows else 0 :].abs().max()
        )

    rows = isinstance(chain, Masked)  # a shown token stays: only the row of MASK moves
    if chain == Masked(3):  # the reverse chain of log-linear masking has no second-order term
        assert error(1e-3) < 1e-14
    else:
        assert 3.8 < error(1e-3) / error(5e-4) < 4.2


@chains
def test_bridge_is_the_exact_law_of_one_position(chain: Chain) -> None:
    """``bridge`` is the marginal of the exact reverse transition of whole sequences, position by position, and equals
    the score carried back by the inverse of ``E`` (the "Tweedie" form) where the score is the noised law's."""
    law = joint(chain)
    every = sequences(chain.states, 2)
    start = start_law(law)
    early = start @ whole_transition(chain, torch.zeros_like(S), S, 2)
    late = start @ whole_transition(chain, torch.zeros_like(T), T, 2)
    reachable = late > 0
    back = (early[:, None] * whole_transition(chain, S, T, 2) / late).T.reshape(-1, chain.states, chain.states)
    found = chain.bridge(law(every, float(T)), every, T, S)
    assert torch.allclose(found[reachable, 0], back.sum(2)[reachable], atol=1e-13)
    assert torch.allclose(found[reachable, 1], back.sum(1)[reachable], atol=1e-13)
    e = chain.transition(S, T)
    carried = (law.score(every, float(T)) @ torch.linalg.inv(e)) * e[:, every].permute(1, 2, 0)
    hidden = ~chain.visible(every)
    assert torch.allclose(found[hidden], carried[hidden], atol=1e-12)


@chains
def test_times_per_sample(chain: Chain) -> None:
    """A batch with its own times is the samples one by one."""
    law = joint(chain)
    every, t = sequences(chain.states, 2), torch.linspace(0.2, 0.9, chain.states**2, dtype=F64)
    posterior = law(every, t)
    s = t / 2
    score, rates, back = law.score(every, t), law.rates(every, t), chain.bridge(posterior, every, t, s)
    for i in range(0, len(every), 3):
        x = every[i : i + 1]
        assert torch.allclose(law(x, float(t[i])), posterior[i : i + 1], atol=1e-14)
        assert torch.allclose(law.score(x, float(t[i])), score[i : i + 1], rtol=1e-12)
        assert torch.allclose(law.rates(x, float(t[i])), rates[i : i + 1], rtol=1e-12)
        assert torch.allclose(chain.bridge(posterior[i : i + 1], x, t[i], s[i]), back[i : i + 1], atol=1e-14)


@chains
def test_markov_posterior_equals_the_sum_over_all_sequences(chain: Chain) -> None:
    """Forward-backward gives what the table of the same law gives, and the same probabilities."""
    generator = torch.Generator().manual_seed(2)
    first = torch.rand(chain.tokens, generator=generator, dtype=F64)
    following = torch.rand(chain.tokens, chain.tokens, generator=generator, dtype=F64)
    markov = MarkovLaw(chain, first, following, 3)
    table = JointLaw(chain, markov.log_probability(sequences(chain.tokens, 3)).exp().reshape((chain.tokens,) * 3))
    every = sequences(chain.states, 3)
    assert torch.allclose(markov(every, 0.7), table(every, 0.7), atol=1e-13)
    assert float(table.law.sum()) == pytest.approx(1, abs=1e-14)


def test_long_markov_sequences_do_not_underflow() -> None:
    """The posterior of 2000 tokens is finite and normalised."""
    chain = Uniform(4)
    law = MarkovLaw(chain, torch.ones(4), torch.rand(4, 4, generator=torch.Generator().manual_seed(0)), 2000)
    found = law(chain.prior(2, 2000, Rng(0)), 0.3)
    assert torch.allclose(found.sum(-1), torch.ones(2, 2000, dtype=F64), atol=1e-12)


@chains
def test_factorised_law_is_a_joint_law(chain: Chain) -> None:
    """Independent positions: the posterior of the product table is the product of posteriors."""
    marginals = torch.rand(2, chain.tokens, generator=torch.Generator().manual_seed(4), dtype=F64)
    apart = FactorizedLaw(chain, marginals)
    together = JointLaw(chain, apart.law[0][:, None] * apart.law[1])
    every = sequences(chain.states, 2)
    assert torch.allclose(apart(every, 0.4), together(every, 0.4), atol=1e-14)
    x = sequences(chain.tokens, 2)
    assert torch.allclose(apart.log_probability(x), together.log_probability(x), atol=1e-13)


def test_laws_draw_what_they_say() -> None:
    """Frequencies of 20000 draws of every kind of law, within five standard errors."""
    chain, n = Masked(2), 20000
    markov = MarkovLaw(chain, torch.tensor([0.3, 0.7]), torch.tensor([[0.9, 0.1], [0.4, 0.6]]), 2)
    for law in (joint(chain), FactorizedLaw(chain, torch.tensor([[0.2, 0.8], [0.6, 0.4]])), markov):
        expected = law.log_probability(sequences(2, 2)).exp()
        found = torch.bincount(index_of(law.draw(n, Rng(7)), 2), minlength=4).double() / n
        assert float(((found - expected).abs() - 5 * (expected * (1 - expected) / n).sqrt()).max()) <= 0


def test_shown_tokens_are_certain() -> None:
    """On a masked chain the posterior of a shown token is that token, whatever the model says."""
    law = FactorizedLaw(Masked(3), torch.rand(2, 3, dtype=F64, generator=torch.Generator().manual_seed(0)))
    found = law(torch.tensor([[2, 3]]), 0.5)
    assert found[0, 0].tolist() == [0, 0, 1] and torch.allclose(found[0, 1], law.law[1])
    assert float(law.rates(torch.tensor([[2, 3]]), 0.5)[0, 0].abs().sum()) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Masked(1), "tokens=1 must be at least 2"),
        (lambda: Uniform(3, t_min=0.0), "t_min=0 and t_max=1 need"),
        (lambda: Uniform(3, t_max=1.5), "t_max=1.5 need 0 < t_min < t_max <= 1"),
        (lambda: Ordinal(3, width=0.0), "width=0 must be positive"),
        (lambda: LogLinear(1.5), "rest=1.5 must lie in"),
        (lambda: Geometric(2.0, 1.0), "need 0 < low < high"),
        (lambda: JointLaw(Masked(3), torch.ones(3, 2)), r"shape \[3, 2\]"),
        (lambda: JointLaw(Masked(2), torch.tensor([[1.0, -1], [0, 1]])), "must not be negative"),
        (lambda: MarkovLaw(Masked(3), torch.ones(3), torch.ones(2, 3), 4), r"following \[2, 3\]"),
        (lambda: joint(Masked(3)).score(torch.zeros(4, 2, dtype=torch.long), torch.ones(3)), "one per sample"),
    ],
)
def test_what_cannot_be_is_refused(make, message: str) -> None:
    """One line that names the field and the value."""
    with pytest.raises(ValueError, match=message):
        make()
