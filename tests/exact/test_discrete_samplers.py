"""Samplers of discrete chains: their laws, carried exactly through every step, against the data's."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from fewstep.discrete.chains import Chain, Masked, Ordinal, Uniform, gumbels
from fewstep.discrete.denoisers import DiscreteDenoiser, NetworkDiscreteDenoiser
from fewstep.discrete.exact import (
    FactorizedLaw,
    JointLaw,
    countdown,
    countdown_errors,
    index_of,
    sampler_law,
    sequences,
    total_variation,
)
from fewstep.discrete.learned import LearnedSampler
from fewstep.discrete.noise import Cosine, Geometric
from fewstep.discrete.samplers import (
    Euler,
    Plan,
    Stepper,
    Tempered,
    Tweedie,
    gillespie,
    poisson,
    row,
    sample,
)
from fewstep.networks.transformer import Transformer
from fewstep.randomness import Rng

F64 = torch.float64


def correlated(chain: Chain, length: int = 3) -> JointLaw:
    """Mostly equal tokens."""
    shape = (chain.tokens,) * length
    table = 0.05 * torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=F64)
    for i in range(chain.tokens):
        table[(i,) * length] += 1
    return JointLaw(chain, table)


def pair(chain: Chain) -> JointLaw:
    """Two binary tokens that are always equal."""
    return JointLaw(chain, torch.eye(2))


def error(law: JointLaw | FactorizedLaw, plan: Plan, stepper: Stepper) -> float:
    """The total variation between what a sampler makes and the data, over sequences of states."""
    chain, length = law.chain, law.shape[0]
    target = torch.zeros(chain.states**length, dtype=F64)
    every = sequences(chain.tokens, length)
    target[index_of(every, chain.states)] = law.log_probability(every).exp()
    return total_variation(sampler_law(law, plan, stepper), target)


@pytest.mark.parametrize("t", [0.9, 0.5, 0.05])
def test_euler_is_tweedie_for_log_linear_masking(t: float) -> None:
    """With log-linear noise and an exact score Euler's probability of showing a token is ``dt / t``, the true one, for
    any step; the two steppers agree to rounding."""
    law = correlated(Masked(3))
    every, time, s = sequences(4, 3), torch.tensor(t, dtype=F64), torch.tensor(t / 3, dtype=F64)
    posterior = law(every, t)
    euler, tweedie = (stepper.jumps(law.chain, posterior, every, time, s) for stepper in (Euler(), Tweedie()))
    assert torch.allclose(euler, tweedie, atol=1e-15)
    hidden = ~law.chain.visible(every)
    assert torch.allclose(euler.sum(-1)[hidden], torch.tensor(2 / 3, dtype=F64), atol=1e-14)


@pytest.mark.parametrize("chain", [Masked(3, Cosine()), Masked(3, Geometric()), Uniform(3)], ids=repr)
def test_elsewhere_they_differ_at_second_order(chain: Chain) -> None:
    """With any other noise, and on the uniform chain, the difference of a step is ``O(dt^2)``: halving quarters it."""
    law = correlated(chain)
    every, t = sequences(chain.states, 3), torch.tensor(0.6, dtype=F64)
    posterior = law(every, float(t))

    def difference(dt: float) -> float:
        euler, tweedie = (stepper.jumps(chain, posterior, every, t, t - dt) for stepper in (Euler(), Tweedie()))
        return float((euler - tweedie).abs().max())

    assert difference(0.01) > 1e-5
    assert 3.8 < difference(1e-3) / difference(5e-4) < 4.2


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_wrong_pairs_are_half_the_chance_of_one_step_for_both(steps: int) -> None:
    """Two equal tokens that are shown in the same step are drawn independently, so half of these pairs are wrong:
    ``1 / 2 sum_k P(step k)^2``, one half at one step and about ``1 / (2 M)`` at M."""
    chain = Masked(2)
    plan = Plan.uniform(chain, steps)
    made = sampler_law(pair(chain), plan, Euler()).reshape(3, 3)
    shown = [t - s for t, s in pairwise((*plan.times[:-1], 0.0))]  # the last step shows all that is left
    assert float(made[0, 1] + made[1, 0]) == pytest.approx(sum(p * p for p in shown) / 2, abs=1e-12)
    assert float(made[2].sum() + made[:, 2].sum()) == 0
    assert float(made[0, 1] + made[1, 0]) == pytest.approx(0.5 / steps, rel=2e-3)


@pytest.mark.parametrize("phi", [0.0, 0.3, 1.0, 7.0])
def test_no_coefficient_repairs_one_step(phi: float) -> None:
    """With one step half of the pairs are wrong for every coefficient, however the score is scaled."""
    chain = Masked(2)
    plan = Plan((chain.t_max, chain.t_min), (phi,))
    for stepper in (Euler(), Tweedie(), Tempered(Euler(), 1.5)):
        made = sampler_law(pair(chain), plan, stepper).reshape(3, 3)
        assert float(made[0, 1] + made[1, 0]) == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize("noise", [None, Cosine(), Geometric()], ids=repr)
@pytest.mark.parametrize("steps", [1, 3])
def test_independent_tokens_are_exact_in_any_steps(noise, steps: int) -> None:
    """Masked chain, exact denoiser, independent tokens: Tweedie's law is the data's in one step as in three."""
    chain = Masked(3) if noise is None else Masked(3, noise)
    law = FactorizedLaw(chain, torch.rand(2, 3, generator=torch.Generator().manual_seed(0), dtype=F64))
    assert error(law, Plan.uniform(chain, steps), Tweedie()) < 1e-14


@pytest.mark.parametrize("chain", [Masked(3), Masked(3, Cosine()), Uniform(3), Ordinal(3)], ids=repr)
@pytest.mark.parametrize("stepper", [Euler(), Tweedie()], ids=repr)
def test_errors_fall_with_the_steps_at_first_order(chain: Chain, stepper: Stepper) -> None:
    """Correlated tokens: the error of the law halves when the steps double, down to the noise left at ``t_min``."""
    law = correlated(chain)
    coarse, fine = (error(law, Plan.uniform(chain, steps), stepper) for steps in (32, 64))
    assert 1.7 < coarse / fine < 2.3


@pytest.mark.parametrize("chain", [Masked(2, Cosine()), Uniform(2), Ordinal(2)], ids=repr)
def test_samples_have_the_law_of_the_sampler(chain: Chain) -> None:
    """Frequencies of 20000 samples by a plan with its own times and coefficients are those of the exact law."""
    law, n = correlated(chain, 2), 20000
    plan = Plan((1.0, 0.7, 0.2, chain.t_min), (0.6, 1.2, 0.9))
    expected = sampler_law(law, plan, Euler())
    found = torch.bincount(index_of(sample(law, n, plan, Euler()), chain.states), minlength=len(expected)).double() / n
    assert float(((found - expected).abs() - 5 * (expected * (1 - expected) / n).sqrt()).max()) <= 1e-15


def test_rows_are_laws_whatever_the_coefficient() -> None:
    """Negative jumps are cut, what is left stays; more than everything is shared out and nothing stays."""
    x = torch.tensor([[0, 0, 0]])
    jumps = torch.tensor([[[0, 0.2, 0.3], [0, -0.1, 0.4], [0, 1.5, 0.5]]], dtype=F64)
    found = row(jumps, x)[0]
    assert torch.allclose(found[0], torch.tensor([0.5, 0.2, 0.3], dtype=F64))
    assert torch.allclose(found[1], torch.tensor([0.6, 0, 0.4], dtype=F64))
    assert torch.allclose(found[2], torch.tensor([0, 0.75, 0.25], dtype=F64))
    assert torch.allclose(row(jumps, x, 10.0).sum(-1), torch.ones(1, 3, dtype=F64))
    assert row(jumps, x, 0.0)[0, 0].tolist() == [1, 0, 0]


@pytest.mark.parametrize("phi", [0.0, 1.0, 4.0])
def test_no_mask_is_left(phi: float) -> None:
    """The last step draws what is still hidden, from the posterior, even when its coefficient shows nothing."""
    law = correlated(Masked(3))
    x = sample(law, 500, Plan((1.0, 0.5, law.chain.t_min), (phi, phi)), Euler())
    assert int(x.max()) < 3


def test_a_coefficient_above_one_sharpens_only_when_it_is_a_power() -> None:
    """Scaling the score shows tokens sooner and keeps their law; raising it to a power makes likely tokens likelier."""
    chain = Masked(3)
    law = FactorizedLaw(chain, torch.tensor([[0.5, 0.3, 0.2]]))
    scaled = sampler_law(law, Plan((1.0, 0.5, chain.t_min), (1.5, 1.0)), Euler())
    assert torch.allclose(scaled[:3], law.law[0], atol=1e-14)
    powered = sampler_law(law, Plan.uniform(chain, 2), Tempered(Euler(), 1.5))
    assert float(powered[0]) > 0.55 and float(powered[:3].sum()) == pytest.approx(1)


def test_noise_is_float64() -> None:
    """Uniforms above one half are finer than float32 has them (multiples of 2^-24), so that the Gumbel noise reaches
    its tail."""
    g = gumbels(Rng(0), (64, 8))
    u = torch.exp(-torch.exp(-g))
    fine = u[u > 0.5] * 2**24
    assert g.dtype == F64 and float((fine - fine.round()).abs().max()) > 0.4


def test_poisson_leaping_approaches_the_data() -> None:
    """Ordinal levels with a bump: many small leaps come near to the law, two do not."""
    chain = Ordinal(5)
    law = FactorizedLaw(chain, torch.tensor([[0.05, 0.1, 0.6, 0.2, 0.05]]))
    n = 4000

    def distance(steps: int) -> float:
        x = poisson(law, n, steps)
        return total_variation(torch.bincount(x.flatten(), minlength=5).double() / n, law.law[0])

    assert distance(2) > 0.4 and distance(64) < 0.04  # 0.49 and 0.02 here, half of it noise
    with pytest.raises(ValueError, match="MASK is not a level"):
        poisson(pair(Masked(2)), 4, 2)


def test_one_token_at_a_time_is_exact() -> None:
    """Gillespie with k = 1 on an exact denoiser draws from the data's law; with k = L it is one step."""
    law, n = correlated(Masked(2)), 20000
    expected = law.law
    found = torch.bincount(index_of(gillespie(law, n), 2), minlength=8).double() / n
    assert float(((found - expected).abs() - 5 * (expected * (1 - expected) / n).sqrt()).max()) <= 0
    wrong = gillespie(pair(Masked(2)), n, k=2)
    assert float((wrong[:, 0] != wrong[:, 1]).double().mean()) == pytest.approx(0.5, abs=0.02)
    with pytest.raises(ValueError, match="for masked chains, not for Uniform"):
        gillespie(pair(Uniform(2)), 4)


class Counted(DiscreteDenoiser):
    """Counts its calls."""

    def __init__(self, law: DiscreteDenoiser) -> None:
        super().__init__(law.chain, law.shape[0])
        self.law, self.calls = law, 0

    def posterior_of(self, x, t, cond):
        self.calls += 1
        return self.law(x, t, cond)


def test_what_samplers_cost() -> None:
    """One call per step; Gillespie ``ceil(L / k)``; Poisson leaping one more."""
    chain = Uniform(3)
    counted = Counted(correlated(chain))
    sample(counted, 2, 5)
    assert counted.calls == 5
    poisson(counted, 2, 5)
    assert counted.calls == 11
    masked = Counted(correlated(Masked(3)))
    gillespie(masked, 2, k=2)
    assert masked.calls == 2


def test_countdown_rule() -> None:
    """Draws of the exact law never break the rule without slips; samples do it less often the more steps they have."""
    law = countdown(Masked(8), 32, slip=0.0)
    x = law.draw(200, Rng(0))
    assert countdown_errors(x) == 0
    fast, slow = (countdown_errors(sample(countdown(Masked(8), 32), 200, k)) for k in (2, 32))
    assert fast > 0.25 and slow < 0.03  # 0.33 and 0.016 here


def network(chain: Chain, classes: int | None = None) -> NetworkDiscreteDenoiser:
    torch.manual_seed(0)
    net = Transformer(6, chain.tokens, chain.states, width=16, blocks=1, heads=2, classes=classes)
    for p in net.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return NetworkDiscreteDenoiser(net, chain, 6, classes)


@pytest.mark.parametrize("chain", [Masked(5), Uniform(5), Ordinal(5)], ids=repr)
def test_networks_are_denoisers(chain: Chain) -> None:
    """A transformer's posterior is normalised, depends on order, time and label, and seeds repeat its samples."""
    denoiser = network(chain, classes=2)
    x = chain.prior(3, 6, Rng(1))
    x[:, 0] = torch.tensor([0, 1, 2])
    found = denoiser(x, 0.5, torch.tensor([0, 0, 1]))
    assert torch.allclose(found.sum(-1), torch.ones(3, 6), atol=1e-6)
    assert not torch.allclose(denoiser(x.flip(1), 0.5).flip(1), denoiser(x, 0.5))
    assert not torch.allclose(denoiser(x, 0.9), denoiser(x, 0.1))
    assert not torch.allclose(denoiser(x, 0.5, torch.tensor([0, 0, 0])), found)
    labels = torch.arange(4) % 2
    one, again, other = (sample(denoiser, 4, 3, cond=labels, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_learned_samplers_carry_their_plans() -> None:
    """A learned sampler samples by its plan, cycles labels, and refuses steps that it has no plan for."""
    denoiser = network(Masked(5), classes=2)
    plan = Plan((1.0, 0.4, denoiser.chain.t_min), (0.7, 1.0))
    made = LearnedSampler(denoiser, {2: plan}, "tweedie")
    expected = sample(denoiser, 4, plan, Tweedie(), cond=torch.arange(4) % 2, seed=3)
    assert torch.equal(made.sample(4, seed=3), expected)
    with pytest.raises(ValueError, match=r"steps=4: this sampler has plans for \[2\]"):
        made.sample(4, steps=4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Plan((1.0, 0.5), (1.0, 1.0)), "a plan of 1 steps needs as many coefficients, got 2"),
        (lambda: Plan((0.5, 1.0)), "strictly decreasing"),
        (lambda: Plan((1.0, 0.5), (-0.1,)), "finite and not negative"),
        (lambda: Plan.uniform(Masked(2), 0), "steps=0"),
        (lambda: gillespie(pair(Masked(2)), 4, k=0), "k=0"),
        (lambda: LearnedSampler(pair(Masked(2)), {3: Plan((1.0, 0.5))}), "the plan for 3 steps has 1"),
        (lambda: LearnedSampler(pair(Masked(2)), {1: Plan((1.0, 0.5))}, "heun"), "stepper 'heun' is unknown"),
        (lambda: Transformer(4, 2, 3, width=10, heads=4), "width=10 must be divisible by heads=4"),
    ],
)
def test_what_cannot_be_is_refused(make, message: str) -> None:
    """One line that names the field and the value."""
    with pytest.raises(ValueError, match=message):
        make()
