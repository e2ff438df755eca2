"""SCott: its stochastic steps, the fixed point that they give a consistency function, and what the game is for."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from test_lcm import batch, network
from torch import Tensor

from fewstep import grids
from fewstep.denoisers import CountCalls, NetworkDenoiser
from fewstep.discrete_vp import DiscreteVP
from fewstep.exact import Gaussian, Mixture1D
from fewstep.methods.consistency.scott import StochasticConsistencyDistillation
from fewstep.methods.method import Batch, Progress
from fewstep.methods.parts.teacher_steps import (
    ERSDE,
    PHI,
    DDIMNoise,
    StepNoise,
    stochastic_step,
    stochastic_steps,
    times_between,
)
from fewstep.methods.start import Start
from fewstep.networks import MLP
from fewstep.predictions import TrigPrediction
from fewstep.randomness import Rng
from fewstep.sampling.coefficients import Levels
from fewstep.sampling.solvers.stochastic import DDIM
from fewstep.schedules import EDM, FlowMatching, Schedule, TrigFlow
from fewstep.values import check

F64 = torch.float64
#: Two summaries of the paper; of the range of the weight, the noise of the final model, the average and the optimizer
#: nothing is certain.
PUBLISHED = {
    "lr": 8e-6, "distance": "l2", "skip": 24, "mu": ..., "guidance_min": ..., "guidance_max": ..., "sigma_data": 0.5,
    "time_scale": 10.0, "steps": (1, 2, 4), "noise": ..., "substeps": 3, "gan_weight": 0.4, "layers": ...,
    "discriminator_rank": 64,
    "critic_lr": 2e-5,
    "optimizer": dict.fromkeys(("kind", "betas", "eps", "weight_decay", "clip", "warmup", "decay"), ...),
}  # fmt: skip


def pair(schedule: Schedule, t: float, s: float, n: int) -> tuple[Tensor, Tensor]:
    return torch.full((n,), t, dtype=F64), torch.full((n,), s, dtype=F64)


@pytest.mark.parametrize("schedule", [EDM(), FlowMatching(), TrigFlow(sigma_data=0.7), DiscreteVP.scaled_linear()])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_a_step_is_the_samplers_own(schedule: Schedule, eta: float) -> None:
    """Mean and noise of a step are those of the sampler DDIM(eta), which at eta = 1 are DDPM's posterior; ER-SDE with
    phi = r^2 is the same as eta = 1, and with phi = r as eta = 0."""
    t, s = (float(v) for v in (0.8 * schedule.t_max, 0.5 * schedule.t_max))
    world = Gaussian(schedule, torch.full((2,), 0.3, dtype=F64), 0.25)
    x = torch.randn(4, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    z = Rng(1).normal_like(x)
    row = DDIM(eta=eta).row(Levels.of(schedule, torch.tensor([t, s], dtype=F64)), 0, 1)
    times = pair(schedule, t, s, 4)
    expected = row.a * x + row.c[0] * world(x, t) + row.n * z
    made = stochastic_step(world, x, *times, DDIMNoise(eta), Rng(1))
    torch.testing.assert_close(made, expected, rtol=1e-12, atol=1e-12)
    if eta in (0.0, 1.0):
        phi = ERSDE("r" if eta == 0 else "r^2")
        torch.testing.assert_close(stochastic_step(world, x, *times, phi, Rng(1)), made, rtol=1e-12, atol=1e-12)
    if eta == 1.0:  # q(x_s | x_t, x_0 = D) by Bayes' rule
        alpha, sigma = (
            [float(f(torch.tensor(v, dtype=F64))) for v in (t, s)] for f in (schedule.alpha, schedule.sigma)
        )
        a = alpha[0] / alpha[1]
        added = sigma[0] ** 2 - (a * sigma[1]) ** 2
        variance = added * sigma[1] ** 2 / sigma[0] ** 2
        mean = variance * (a * x / added + alpha[1] * world(x, t) / sigma[1] ** 2)
        torch.testing.assert_close(made, mean + math.sqrt(variance) * z, rtol=1e-9, atol=1e-9)


def test_er_sde_is_its_papers_step_and_ddims_to_first_order() -> None:
    """In y = x / alpha: c y + (1 - c) D + sqrt(r_s^2 - c^2 r_t^2) z; with phi = r^(1 + eta^2) the variance of a small
    step is DDIM's, with a gap that halves with the step; the default's shares are the derived ones."""
    schedule = EDM()
    world = Gaussian(schedule, torch.zeros(1, dtype=F64), 0.25)
    x, z = torch.tensor([[3.0]], dtype=F64), Rng(2).normal(1, 1, dtype=F64)
    for name, phi in PHI.items():
        c = float(phi(torch.tensor(1.5, dtype=F64)) / phi(torch.tensor(2.0, dtype=F64)))
        expected = c * x + (1 - c) * world(x, 2.0) + math.sqrt(max(1.5**2 - c**2 * 4.0, 0.0)) * z
        made = stochastic_step(world, x, *pair(schedule, 2.0, 1.5, 1), ERSDE(name), Rng(2))
        torch.testing.assert_close(made, expected, rtol=1e-9, atol=1e-7)
    r, eta = torch.tensor(2.0, dtype=F64), 0.3
    scaled = ERSDE(lambda r: r ** (1 + eta**2))
    gaps = []
    for h in (0.1, 0.05):
        fresh = [1 - noise.kept(r, r * (1 - h)) ** 2 for noise in (scaled, DDIMNoise(eta))]
        gaps.append(float((fresh[0] / fresh[1] - 1).abs()))
    assert gaps[0] < 0.11 and 1.8 < gaps[0] / gaps[1] < 2.2
    for level, effective in ((0.03, 0.11), (0.1, 0.15), (1.0, 0.25), (3.0, 0.35), (10.0, 0.50), (14.6, 0.57)):
        at, h = torch.tensor(level, dtype=F64), 1e-5
        slope = (1 - ERSDE("5").kept(at, at * (1 - h)) ** 2) / (2 * h)
        assert abs(float(slope.sqrt()) - effective) < 0.006


def test_a_phi_of_negative_variance_is_refused() -> None:
    """When the networks are made, in one line, with the levels; the named ones will do at the levels of a table, and
    the logarithm up to a level of about 1000."""
    table = Start(network(DiscreteVP.scaled_linear()))
    for name in PHI:
        StochasticConsistencyDistillation(noise=ERSDE(name), gan_weight=0.0).networks(table)

    def root(r: Tensor) -> Tensor:
        return r.sqrt()

    for noise, start in ((ERSDE(root), table), (ERSDE("log"), Start(network(FlowMatching())))):
        with pytest.raises(ValueError, match=r"noise=er-sde:(root|log): from the level .* must not fall") as found:
            StochasticConsistencyDistillation(noise=noise, gan_weight=0.0).networks(start)
        assert "\n" not in str(found.value)
    ERSDE("log").check_levels(torch.logspace(3, -3, 400, dtype=F64))
    with pytest.raises(ValueError, match="variance"):
        ERSDE("log").check_levels(torch.tensor([1e5, 1e4], dtype=F64))


def test_noise_is_written_in_a_word() -> None:
    for word, noise in (("0.3", DDIMNoise(0.3)), ("0", DDIMNoise(0.0)), ("er-sde:r^1.5", ERSDE("r^1.5"))):
        assert StepNoise.parse(word) == noise == check(StepNoise, noise.plain()) and str(noise) == word
    assert StochasticConsistencyDistillation(noise=0.1).noise == DDIMNoise(0.1)
    refused: list[tuple[Any, str]] = [
        ("1.5", "eta=1.5 must lie in"), ("er-sde:r^3", "phi='r\\^3' is not one of r, r\\^1.5"), ("x", "'x' is not a"),
    ]  # fmt: skip
    for word, reason in refused:
        with pytest.raises(ValueError, match=reason):
            StepNoise.parse(word)
    with pytest.raises(ValueError, match="a function, which no file can record"):
        ERSDE(lambda r: r).plain()


def test_the_teacher_walks_in_equal_steps_with_fresh_noise() -> None:
    """Equal steps of the own index with the ends as they are, a call each; the noises of two sub-steps are not one: on
    pure noise to be forgotten (eta 1, D = 0) the variance is the schedule's."""
    table = DiscreteVP.scaled_linear()
    t, s = torch.tensor([999.0, 23.0], dtype=F64), torch.tensor([975.0, 0.0], dtype=F64)
    assert times_between(table, t, s, 3).T.tolist() == [[999, 991, 983, 975], pytest.approx([23, 46 / 3, 23 / 3, 0])]
    schedule, n = FlowMatching(), 40_000
    world = Gaussian(schedule, torch.zeros(1, dtype=F64), 1e-12)
    counted = CountCalls(world)
    times = times_between(schedule, *pair(schedule, 0.9, 0.6, n), 3)
    x = 0.9 * Rng(0).normal(n, 1, dtype=F64)
    made = stochastic_steps(counted, x, times, DDIMNoise(1.0), Rng(1))
    assert counted.calls == 3 and abs(float(made.std()) / 0.6 - 1) < 0.02
    # at eta = 1 the share of the noise that stays is the ratio of the levels, 9 and 1.5
    kept = float((made * x).mean() / (x * x).mean()) / (0.6 / 0.9)
    assert abs(kept - 1.5 / 9) < 0.02


def test_variance_of_the_target_goes_with_the_square_of_eta() -> None:
    world = Gaussian(EDM(), torch.zeros(1, dtype=F64), 0.25)
    x = torch.full((20_000, 1), 2.0, dtype=F64)
    times = times_between(world.schedule, *pair(world.schedule, 2.0, 1.2, len(x)), 3)
    spread = [float(stochastic_steps(world, x, times, DDIMNoise(eta), Rng(3)).var()) for eta in (0.1, 0.2, 0.4)]
    assert spread[1] / spread[0] == pytest.approx(4, rel=0.03) and spread[2] / spread[1] == pytest.approx(4, rel=0.05)
    assert float(stochastic_steps(world, x, times, DDIMNoise(0.0), Rng(3)).var()) < 1e-25


def fitted(eta: float, steps: int, c: float = 0.5, top: float = 10.0, n: int = 20_000) -> tuple[float, float, float]:
    """The slope at the level ``top`` of the consistency function that is fitted, level by level, by least squares to
    what the stochastic teacher gives, a table of numbers; what it is without an error of the draws, and that error
    (relative, one standard deviation)."""
    world = Gaussian(EDM(1e-4, top), torch.zeros(1, dtype=F64), c**2)
    grid, rng = grids.karras(world.schedule, steps).flip(0), Rng(0, "fit")
    slope, mean, error = 1.0, 1.0, 0.0
    for s, t in pairwise(grid):
        y = torch.sqrt(c**2 + t**2) * rng.normal(n, 1, dtype=F64)
        aim = slope * stochastic_steps(world, y, torch.stack([t.expand(n), s.expand(n)]), DDIMNoise(eta), rng)
        slope = float((aim * y).sum() / (y * y).sum())
        kept = DDIMNoise(eta).kept(t, s)
        carry = kept * s / t
        factor = float(carry + (1 - carry) * c**2 / (c**2 + t**2))
        mean *= factor
        error += float(s**2 * (1 - kept**2) / (c**2 + t**2)) / (n * factor**2)
    return slope, mean, math.sqrt(error)


@pytest.mark.parametrize(("eta", "expected"), [(0.0, 0.04994), (0.3, 0.03813), (1.0, 0.002494)])
def test_the_tabular_fixed_point(eta: float, expected: float) -> None:
    """``(c^2 / (c^2 + r^2))^((1 + eta^2) / 2)`` at c = 0.5, r = 10: the fit is there up to the solver's first order,
    which extrapolation takes away, and to the error of its draws."""
    assert (0.25 / 100.25) ** ((1 + eta**2) / 2) == pytest.approx(expected, rel=2e-4)
    (slope, mean, error), (other, double, _) = fitted(eta, 60), fitted(eta, 120)
    assert abs(slope / mean - 1) < 4 * error + 1e-12 and error < 0.03
    assert 2 * double - mean == pytest.approx(expected, rel=3e-3)
    assert other == pytest.approx(expected, rel=0.05)


def test_sub_steps_lower_the_error_of_the_deterministic_part() -> None:
    """In the first order of their number."""
    world = Gaussian(EDM(), torch.zeros(1, dtype=F64), 0.25)
    x = torch.ones(1, 1, dtype=F64)
    t, s = pair(world.schedule, 4.0, 0.5, 1)
    exact = world.flow(x, t, s)
    errors = [
        float((stochastic_steps(world, x, times_between(world.schedule, t, s, h), DDIMNoise(), Rng(0)) - exact).abs())
        for h in (4, 8, 16)
    ]
    assert 1.6 < errors[0] / errors[1] < 2.4 and 1.8 < errors[1] / errors[2] < 2.2


def two_modes() -> Any:
    both = torch.tensor([-1.0, 1.0], dtype=F64)
    return Mixture1D(FlowMatching(t_max=0.99), torch.ones(2, dtype=F64), both, torch.full((2,), 0.2, dtype=F64))


def line_network(seed: int) -> NetworkDenoiser:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return NetworkDenoiser(MLP((1,), 32, 2), FlowMatching(t_max=0.99), TrigPrediction(sigma_data=1.0), (1,))


def one_call(eta: float, gan_weight: float, iterations: int = 120, seed: int = 0) -> Tensor:
    """Samples of one call of a student on the line; the discriminator sees the features of a network at random."""
    world = two_modes().float()
    method = StochasticConsistencyDistillation(
        guidance_max=1.0, skip=100, steps=(1,), mu=0.9, noise=eta, gan_weight=gan_weight
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)  # the heads' first weights
        nets = method.networks(Start(world, given={"student": line_network(0), "guide": line_network(1)}))
    rates = {"student": 5e-3, "discriminator": 1e-2}
    optimizers = {name: torch.optim.Adam(nets.group_parameters(name)) for name in nets.groups}
    for k in range(iterations):
        given = Batch(world.sample(128, Rng(0, k)).float(), None, Rng(1, k))
        for update in method.updates(nets, given, Progress()):
            optimizer = optimizers[str(update.group)]
            optimizer.param_groups[0]["lr"] = rates[str(update.group)] * (1 - k / iterations)
            optimizer.zero_grad()
            update.loss.backward()
            optimizer.step()
            if update.then is not None:
                update.then()
    with torch.no_grad():
        return method.student(nets)(Rng(2).normal(4000, 1), None, 1)


def test_strong_noise_merges_modes_and_the_game_puts_the_variance_back() -> None:
    """On two modes at 1 and -1 (deviation 1.02, two in a hundred between -0.5 and 0.5): weak noise keeps them, strong
    noise draws samples to the mean, and with the game at the same noise they are apart again."""

    def spread(x: Tensor) -> tuple[float, float]:
        return float(x.std()), float((x.abs() < 0.5).double().mean())

    weak, strong, game = (spread(one_call(*case)) for case in ((0.1, 0.0), (0.5, 0.0), (0.5, 1.0)))
    assert weak[0] > 0.9 and weak[1] < 0.3
    assert strong[0] < 0.6 and strong[1] > 0.5
    # of four draws of the heads the deviation is 0.55 to 0.65, the share 0.38 to 0.52
    assert game[0] > strong[0] + 0.04 and game[1] < 0.85 * strong[1]


def single() -> Batch:
    """Heads are made in float32, as the networks of a training are."""
    given = batch()
    return Batch(given.x.float(), given.cond, given.rng)


def test_each_update_reaches_its_own_networks_only() -> None:
    """The student's reaches the student, through the discriminator, which has no gradient then; the discriminator's
    reaches its heads and no body: features are frozen."""
    method = StochasticConsistencyDistillation(gan_weight=1.0)
    nets = method.networks(Start(network().float()))
    updates = method.updates(nets, single(), Progress())
    first = next(updates)
    assert first.groups == ("student",) and first.then is not None
    first.loss.backward()
    assert all(
        p.grad is None for name in ("discriminator", "body", "target") for p in nets.get_submodule(name).parameters()
    )
    with_game = [p.grad.clone() for p in nets.student.parameters() if p.grad is not None]
    nets.zero_grad(set_to_none=True)
    second = next(updates)
    assert second.groups == ("discriminator",) and nets.group_parameters("discriminator") == [
        *nets.discriminator.parameters()
    ]
    second.loss.backward()
    assert all(p.grad is None for name in ("student", "body") for p in nets.get_submodule(name).parameters())
    assert any(float(p.grad.abs().max()) > 0 for p in nets.discriminator.parameters())
    longer = StochasticConsistencyDistillation(gan_weight=1.0, substeps=7)
    nets = longer.networks(Start(network().float()))
    judged = [update.loss for update in longer.updates(nets, single(), Progress())][1]
    assert torch.equal(judged, second.loss)  # the teacher's walk has draws of its own
    bare = StochasticConsistencyDistillation(gan_weight=0.0)
    nets = bare.networks(Start(network().float()))
    assert not {"discriminator", "body"} & set(dict(nets.named_children()))
    (update,) = bare.updates(nets, single(), Progress())
    update.loss.backward()
    alone = [p.grad for p in nets.student.parameters() if p.grad is not None]
    assert any(not torch.equal(a, b) for a, b in zip(with_game, alone, strict=True))


def test_the_discriminator_sees_the_layers_that_are_named_of_the_guide() -> None:
    """Its own features are the teacher's bottleneck; a guide brings others, and must make the same samples."""
    own = StochasticConsistencyDistillation().networks(Start(network()))
    assert own.body.net is own.teacher.net
    guide = network()
    nets = StochasticConsistencyDistillation(layers=("blocks.0", "leave")).networks(
        Start(network(), given={"guide": guide})
    )
    assert nets.body.net is guide.net and len(nets.discriminator.heads.heads) == 2
    with pytest.raises(ValueError, match=r"the guide makes samples \[1\], the teacher \[3\]"):
        StochasticConsistencyDistillation().networks(Start(network(), given={"guide": line_network(0)}))
