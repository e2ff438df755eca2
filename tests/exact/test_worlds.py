"""Exact worlds: each closed form against an independent way to the same number."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

from fewstep.denoisers import Denoiser
from fewstep.discrete_vp import DiscreteVP
from fewstep.exact import (
    ExactFlowMap,
    FiniteData,
    Gaussian,
    GaussianMixture,
    GuidedGaussian,
    Mixture1D,
    probability_flow,
    ring,
    three_modes,
)
from fewstep.guidance import Autoguided
from fewstep.randomness import Rng
from fewstep.schedules import EDM, FlowMatching, Schedule, TrigFlow, VPCosine, VPLinear

COVARIANCE = torch.tensor([[1.0, 0.4], [0.4, 0.5]], dtype=torch.float64)
MEANS = torch.tensor([[1.0, 0.0], [-1.0, 0.5], [0.0, -1.5]], dtype=torch.float64)
POINTS = torch.tensor([[1.0, 0.0], [-1.0, 0.5], [0.0, -1.5], [0.3, 0.3], [1.5, 1.0]], dtype=torch.float64)


def gaussian(schedule):
    return Gaussian(schedule, torch.tensor([0.3, -1.0], dtype=torch.float64), COVARIANCE)


def mixture(schedule):
    weights = torch.tensor([1.0, 2.0, 1.5])
    covariances = torch.stack([COVARIANCE, COVARIANCE / 4, 0.1 * torch.eye(2)])
    return coarse(GaussianMixture(schedule, weights, MEANS, covariances, labels=[0, 1, 0]), 16)


def line(schedule):
    return three_modes(schedule, labels=[0, 1, 0])


def points(schedule):
    return coarse(FiniteData(schedule, POINTS, 0.2, labels=[0, 1, 0, 1, 1]), 28)


def coarse(world, steps):
    """Fewer steps of integration where 1e-9 is enough: a second counts here."""
    world.steps = steps
    return world


SCHEDULES: dict[str, Schedule] = {
    "vp": VPLinear(), "cosine": VPCosine(), "edm": EDM(), "flow": FlowMatching(), "trig": TrigFlow(),
    "ddpm": DiscreteVP.linear(),
}  # fmt: skip
WORLDS = {"gaussian": gaussian, "mixture": mixture, "line": line, "points": points}


@pytest.fixture(params=WORLDS)
def make(request):
    return WORLDS[request.param]


#: Closed-form flow maps on every schedule; integrated ones, which cost a second, on one.
CASES = [(w, s) for w in ("gaussian", "line") for s in SCHEDULES] + [("mixture", "flow"), ("points", "edm")]


@pytest.fixture(params=CASES, ids="-".join)
def world(request):
    name, schedule = request.param
    return WORLDS[name](SCHEDULES[schedule])


def states(world, t, gen, n=24):
    """Typical states of time ``t``: a draw of the noised law."""
    x0 = world.sample(n, Rng(0, "states"))
    eps = torch.randn(x0.shape, generator=gen, dtype=torch.float64)
    return world.schedule.add_noise(x0, eps, torch.tensor(t, dtype=torch.float64))


def labels(world, n):
    return None if world.classes is None else torch.arange(n) % (world.classes + 1) - 1


def middle(schedule):
    """A time in the middle of the noise levels."""
    return float(schedule.time_at(torch.tensor(0.3, dtype=torch.float64)))


def noisy(schedule):
    return float(schedule.time_at(torch.tensor(-2.0, dtype=torch.float64)))


def test_score_is_the_gradient_of_the_log_density(make, schedule, gen):
    """score = grad log p_t, D from it by Tweedie's formula, and eps and velocity as every denoiser derives them."""
    world, t = make(schedule), middle(schedule)
    x = states(world, t, gen).requires_grad_()
    cond = labels(world, len(x))
    gradient = torch.autograd.grad(world.log_density(x, t, cond).sum(), x)[0]
    x = x.detach()
    torch.testing.assert_close(world.score(x, t, cond), gradient, rtol=1e-9, atol=1e-9)
    time = torch.tensor(t, dtype=torch.float64)
    alpha, sigma = schedule.alpha(time), schedule.sigma(time)
    tweedie = (x + sigma**2 * world.score(x, t, cond)) / alpha
    torch.testing.assert_close(world(x, t, cond), tweedie, rtol=1e-9, atol=1e-9)
    for name in ("eps", "velocity"):
        derived = getattr(Denoiser, name)(world, x, t, cond)
        torch.testing.assert_close(getattr(world, name)(x, t, cond), derived, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("level", [0.05, 0.5, 5.0])
def test_line_against_quadrature(level):
    """The posterior mean and the density of the 1-D mixture by the trapezium rule over x_0 (spectrally exact here)."""
    world = three_modes(EDM())
    x0 = torch.linspace(-6, 6, 20001, dtype=torch.float64)
    weight = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)[:, None]
    mean = torch.tensor([-1.2, 0.3, 1.5], dtype=torch.float64)[:, None]
    sd = torch.tensor([0.3, 0.35, 0.3], dtype=torch.float64)[:, None]
    prior = (weight * torch.exp(-((x0 - mean) ** 2) / (2 * sd**2)) / (sd * math.sqrt(2 * math.pi))).sum(0)
    x = torch.linspace(-3, 3, 41, dtype=torch.float64)[:, None]
    joint = prior * torch.exp(-((x - x0) ** 2) / (2 * level**2)) / (level * math.sqrt(2 * math.pi))
    density = torch.trapezoid(joint, x0)
    expected = torch.trapezoid(joint * x0, x0) / density
    torch.testing.assert_close(world(x, level)[:, 0], expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(world.log_density(x, level), density.log(), rtol=0, atol=1e-11)
    torch.testing.assert_close(world.cdf(torch.full((1, 1), 9.0 * max(1, level)), level)[0, 0].item(), 1.0)


@pytest.mark.parametrize("width", [0.0, 0.2])
def test_finite_data_against_brute_force(width, gen):
    """The denoiser of five points, written out point by point, with and without labels."""
    world = FiniteData(FlowMatching(), POINTS, width, labels=[0, 1, 0, 1, 1])
    t = 0.4
    x = torch.randn(6, 2, generator=gen, dtype=torch.float64)
    variance = t**2 + (0.6 * width) ** 2
    for label, members in ((None, range(5)), (0, (0, 2)), (1, (1, 3, 4))):
        for i in range(6):
            total, mean = 0.0, torch.zeros(2, dtype=torch.float64)
            for j in members:
                gap = x[i] - 0.6 * POINTS[j]
                w = math.exp(-float(gap @ gap) / (2 * variance))
                total, mean = total + w, mean + w * (POINTS[j] + 0.6 * width**2 / variance * gap)
            cond = None if label is None else torch.tensor([label])
            torch.testing.assert_close(world(x[i : i + 1], t, cond)[0], mean / total, rtol=1e-12, atol=1e-12)


def test_one_wide_point_is_a_gaussian(gen):
    """Also where its width is larger than its distance from 0."""
    point, width, x = torch.tensor([0.1, 0.0], dtype=torch.float64), 0.6, torch.randn(5, 2, generator=gen).double()
    world, expected = coarse(FiniteData(TrigFlow(), point[None], width), 8), Gaussian(TrigFlow(), point, width**2)
    torch.testing.assert_close(world.flow(x, 1.5, 0.1), expected.flow(x, 1.5, 0.1), rtol=0, atol=1e-8)


def test_finite_data_without_width_ends_on_its_points(gen):
    """At no noise at all the denoiser is the nearest point; the flow from noise ends on the points, and its error at 24
    steps is below 1e-8 (measured 3e-10; a scale that does not resolve the last noise leaves 1e-4)."""
    world = FiniteData(FlowMatching(t_min=1e-3), POINTS)
    assert torch.equal(world(POINTS + 0.1, 0.0), POINTS)
    x = torch.randn(8, 2, generator=gen, dtype=torch.float64)
    ends, rough = world.flow(x, 1.0, 1e-3), coarse(world, 24).flow(x, 1.0, 1e-3)
    torch.testing.assert_close(rough, ends, rtol=0, atol=1e-8)
    gap = (ends[:, None] - POINTS).norm(dim=2).amin(1)
    assert float(gap.max()) < 5e-3  # a distance of about sigma = 1e-3 is left at t = 1e-3
    assert bool(torch.isfinite(world.flow(ends, 1e-3, 0.0)).all())


def test_finite_data_is_a_mixture_of_its_points(gen):
    """With a width it is the Gaussian mixture with one component per point: denoiser, density and flow map."""
    schedule = FlowMatching()
    data = points(schedule)
    same = GaussianMixture(
        schedule, torch.ones(5), POINTS, torch.full((5,), 0.2**2, dtype=torch.float64), labels=[0, 1, 0, 1, 1]
    )
    t = middle(schedule)
    x = states(data, t, gen, 8)
    cond = labels(data, 8)
    torch.testing.assert_close(data(x, t, cond), same(x, t, cond), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(data.log_density(x, t, cond), same.log_density(x, t, cond), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(same.posterior(x, t).sum(1), torch.ones(8, dtype=torch.float64))
    torch.testing.assert_close(
        data.flow(x, t, schedule.t_min, cond), same.flow(x, t, schedule.t_min, cond), rtol=0, atol=1e-9
    )


def test_gaussian_flow_against_the_integrated_one(schedule, gen):
    """The closed form, full covariance, over the whole range of every schedule (1e-10 of the state's size)."""
    world = gaussian(schedule)
    x = states(world, schedule.t_max, gen)
    ode = probability_flow(world, x, schedule.t_max, schedule.t_min, scales=(0.3, 4.0), steps=20)
    torch.testing.assert_close(world.flow(x, schedule.t_max, schedule.t_min), ode, rtol=0, atol=1e-10)


def test_quantile_map_against_the_integrated_flow(schedule, gen):
    """In one dimension the flow map is the quantile map, for the mixture and for its classes (1e-9; measured 5e-14)."""
    world = line(schedule)
    x = states(world, schedule.t_max, gen, 60)
    for cond in (None, labels(world, 60)):
        ode = probability_flow(world, x, schedule.t_max, schedule.t_min, cond, scales=(0.3, 2.0), steps=20)
        torch.testing.assert_close(world.flow(x, schedule.t_max, schedule.t_min, cond), ode, rtol=0, atol=1e-9)


def test_quantile_map_far_in_the_tails():
    """At twelve standard deviations the distribution function is 1 in float64; the map still has its digits."""
    world = three_modes(FlowMatching())
    x = torch.tensor([[-12.0], [-8.0], [8.0], [12.0]], dtype=torch.float64)
    ode = probability_flow(world, x, 1.0, 0.2, scales=(0.3, 2.0))
    torch.testing.assert_close(world.flow(x, 1.0, 0.2), ode, rtol=0, atol=1e-9)
    assert world.cdf(x, 1.0)[3].item() == 1.0


def test_integrated_flow_against_scipy(gen):
    """The ring's flow map against an adaptive solver that nobody here wrote, on the plain EDM equation (1e-9)."""
    from scipy.integrate import solve_ivp

    world = ring(EDM(t_min=0.01, t_max=10.0))
    x = 10 * torch.randn(4, 2, generator=gen, dtype=torch.float64)

    def velocity(t, y):
        return world.velocity(torch.from_numpy(y).reshape(4, 2), float(t)).flatten().numpy()

    theirs = solve_ivp(velocity, (10.0, 0.01), x.flatten().numpy(), "DOP853", rtol=1e-12, atol=1e-13).y[:, -1]
    torch.testing.assert_close(world.flow(x, 10.0, 0.01).flatten(), torch.from_numpy(theirs), rtol=0, atol=1e-9)


def test_flow_is_a_semigroup_and_can_be_inverted(world, gen):
    """From t to s at once or by way of r, and back again (1e-9 of the state's size)."""
    t, r, s = noisy(world.schedule), middle(world.schedule), world.schedule.t_min
    x = states(world, t, gen, 8)
    cond, scale = labels(world, 8), float(x.abs().max())
    end = world.flow(x, t, s, cond)
    torch.testing.assert_close(world.flow(world.flow(x, t, r, cond), r, s, cond), end, rtol=0, atol=1e-9)
    torch.testing.assert_close(world.flow(end, s, t, cond), x, rtol=0, atol=2e-9 * scale)
    assert torch.allclose(world.flow(x, t, t, cond), x, rtol=0, atol=1e-12 * scale)


TANGENT_CASES = [case for case in CASES if case[0] != "points"]  # forward mode through an integration is slow


@pytest.mark.parametrize("world", TANGENT_CASES, indirect=True, ids="-".join)
def test_consistency_function_is_constant_along_trajectories(world, gen):
    """d/dt f(x_t, t) = 0 with the flow's velocity (1e-9), and not with the state held."""
    t, end = middle(world.schedule), world.schedule.t_min
    x = states(world, t, gen, 8)
    velocity = world.velocity(x, t)
    unit = float(velocity.abs().max())  # times differ by orders of magnitude between schedules
    both = world.tangent(torch.cat([x, x]), t, end, torch.cat([velocity, 0 * velocity]))
    assert float(both[:8].abs().max()) < 1e-9 * unit
    assert float(both[8:].abs().max()) > 1e-2 * unit


@pytest.mark.parametrize("name", ["gaussian", "line"])
def test_tangent_equals_central_differences(name, gen):
    """In a direction that is not the flow's (fourth-order differences of the flow map, 1e-7)."""
    world, t, s, h = WORLDS[name](FlowMatching()), 0.5, 0.1, 1e-3
    x = states(world, t, gen, 8)
    cond, dx = labels(world, 8), torch.randn(x.shape, generator=gen, dtype=torch.float64)

    def at(k):
        return world.flow(x + k * h * dx, t + 0.7 * k * h, s, cond)

    difference = (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * h)
    torch.testing.assert_close(world.tangent(x, t, s, dx, 0.7, cond), difference, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", ["gaussian", "line"])
def test_moving_the_end_follows_the_velocity(name, gen):
    """The Lagrangian identity d/ds f = u(f, s), by forward mode through the target time."""
    world = WORLDS[name](FlowMatching())
    x, s = states(world, 0.8, gen, 8), torch.full((8,), 0.3, dtype=torch.float64)
    end, rate = torch.func.jvp(lambda r: world.flow(x, 0.8, r), (s,), (torch.ones_like(s),))
    torch.testing.assert_close(rate, world.velocity(end, 0.3), rtol=1e-9, atol=1e-9)


def test_quantile_map_conserves_probability(gen):
    """Its derivative in the state is the ratio of the two densities, by backward mode."""
    world = three_modes(FlowMatching())
    x = states(world, 0.7, gen).requires_grad_()
    end = world.flow(x, 0.7, 0.1)
    slope = torch.autograd.grad(end.sum(), x)[0][:, 0]
    expected = torch.exp(world.log_density(x, 0.7) - world.log_density(end, 0.1)).detach()
    torch.testing.assert_close(slope, expected, rtol=1e-10, atol=0)


def test_denoisers_have_forward_derivatives(make, schedule, gen):
    """torch.func.jvp through a world equals central differences, in state and time together."""
    world, t = make(schedule), middle(schedule)
    x = states(world, t, gen, 8)
    time = torch.full((8,), t, dtype=torch.float64)
    dx, h = torch.randn(x.shape, generator=gen, dtype=torch.float64), 1e-5
    tangent = torch.func.jvp(world, (x, time), (dx, time))[1]
    difference = (world(x + h * dx, (1 + h) * time) - world(x - h * dx, (1 - h) * time)) / (2 * h)
    torch.testing.assert_close(tangent, difference, rtol=1e-5, atol=1e-6)


def test_whitened_gaussian_stands_still_on_trigflow(gen):
    """With data of variance sigma_data^2 every marginal is the same: no velocity, the flow map is the identity."""
    world = Gaussian(TrigFlow(), torch.zeros(3), 0.25)
    x = torch.randn(5, 3, generator=gen, dtype=torch.float64)
    assert float(world.velocity(x, 0.7).abs().max()) < 1e-15
    torch.testing.assert_close(world.flow(x, 1.2, 0.1), x, rtol=1e-14, atol=1e-15)


def test_pure_noise_is_an_ordinary_time(make, gen):
    """At alpha = 0 the posterior mean is the mean of the data, and the velocity noise minus data, with no NaN."""
    world = make(FlowMatching())
    x = torch.randn(4, *world.shape, generator=gen, dtype=torch.float64)
    means = {
        "Gaussian": torch.tensor([0.3, -1.0]), "GaussianMixture": torch.tensor([1, 2, 1.5]).double() @ MEANS / 4.5,
        "Mixture1D": torch.tensor([0.09]), "FiniteData": POINTS.mean(0),
    }  # fmt: skip
    mean = means[type(world).__name__].double().expand_as(x)
    torch.testing.assert_close(world(x, 1.0), mean, rtol=0, atol=1e-7)
    torch.testing.assert_close(world.velocity(x, 1.0), x - mean, rtol=0, atol=1e-7)
    clean = world.velocity(x, 0.0)
    assert bool(torch.isfinite(clean).all())
    torch.testing.assert_close(clean, -x, rtol=0, atol=1e-12)


#: The laws written out again: weights, means, covariances of the parts, and which belong to class 1.
EYE, FLAT = torch.eye(2, dtype=torch.float64), torch.eye(1, dtype=torch.float64)
PARTS = {
    "gaussian": ([1.0], [[0.3, -1.0]], [COVARIANCE], [0]),
    "mixture": ([1.0, 2.0, 1.5], MEANS.tolist(), [COVARIANCE, COVARIANCE / 4, 0.1 * EYE], [1]),
    "line": ([0.3, 0.5, 0.2], [[-1.2], [0.3], [1.5]], [0.09 * FLAT, 0.35**2 * FLAT, 0.09 * FLAT], [1]),
    "points": ([1.0] * 5, POINTS.tolist(), [0.04 * EYE] * 5, [1, 3, 4]),
}


@pytest.mark.parametrize("name", PARTS)
def test_samples_follow_the_law(name):
    """Mean and covariance of 40 000 draws within five standard errors: of all, of labels drawn first, of one class."""
    world, n = WORLDS[name](EDM()), 40_000
    weights, means, covariances, first = PARTS[name]
    everything = list(range(len(weights)))
    drawn = [(everything, world.sample(n, Rng(1, "law")))]
    if world.classes is not None:
        member = world.sample_labels(n, Rng(2, "labels"))
        share = sum(weights[k] for k in first) / sum(weights)
        assert abs(float((member == 1).double().mean()) - share) < 5 * 0.5 / n**0.5 and int(member.max()) == 1
        drawn.append((everything, world.sample(n, Rng(3, "given"), member)))
        drawn.append((first, world.sample(n, Rng(4, "one"), torch.ones(n, dtype=torch.long))))
    for parts, x in drawn:
        assert x.dtype == torch.float64 and x.shape == (n, *world.shape)
        w = torch.tensor([weights[k] for k in parts], dtype=torch.float64)
        m = torch.tensor([means[k] for k in parts], dtype=torch.float64)
        second = torch.stack([covariances[k] for k in parts]) + m[:, :, None] * m[:, None]
        products = x[:, :, None] * x[:, None]
        mean, square = w @ m / w.sum(), torch.einsum("k,kij->ij", w, second) / w.sum()
        assert float(((x.mean(0) - mean) / (x.std(0) / n**0.5)).abs().max()) < 5
        assert float(((products.mean(0) - square) / (products.std(0) / n**0.5)).abs().max()) < 5


def test_three_dimensions(gen):
    """Where the eigenvectors are not their own transpose: density, score and covariance of the samples against
    torch.distributions, of the Gaussian and of a mixture of one."""
    root, n = torch.randn(3, 3, generator=gen, dtype=torch.float64), 40_000
    covariance, mean = root @ root.T + 0.1 * torch.eye(3, dtype=torch.float64), root[0]
    law = MultivariateNormal(0.7 * mean, 0.49 * covariance + 0.09 * torch.eye(3, dtype=torch.float64))
    plain = Gaussian(FlowMatching(), mean, covariance)
    for world in (plain, GaussianMixture(FlowMatching(), torch.ones(1), mean[None], covariance[None])):
        x = torch.randn(6, 3, generator=gen, dtype=torch.float64)
        torch.testing.assert_close(world.log_density(x, 0.3), law.log_prob(x), rtol=1e-12, atol=1e-12)
        expected = (0.7 * mean - x) @ law.precision_matrix
        torch.testing.assert_close(world.score(x, 0.3), expected, rtol=1e-9, atol=1e-9)
        gaps = world.sample(n, Rng(6, "three")) - mean
        products = gaps[:, :, None] * gaps[:, None]
        assert float(((products.mean(0) - covariance) / (products.std(0) / n**0.5)).abs().max()) < 5


def test_line_samples_by_kolmogorov_smirnov():
    """20 000 draws against the exact distribution function, 1% critical value."""
    from scipy.stats import kstest

    world, n = line(EDM()), 20_000
    for label in (-1, 0, 1):
        cond = torch.full((n,), label)
        x = world.sample(n, Rng(5, "ks"), cond)[:, 0].numpy()
        found = kstest(x, lambda y, c=cond: world.cdf(torch.from_numpy(y)[:, None], 0.0, c)[:, 0].numpy()).statistic
        assert found < 1.63 / n**0.5


def test_kl_against_torch_distributions():
    """Full covariances, of the data and of the noised laws; zero against itself, and not symmetric."""
    schedule = VPLinear()
    centre, away = torch.tensor([[0.3, -1.0], [0.0, 0.5]], dtype=torch.float64)
    p, q = gaussian(schedule), Gaussian(schedule, away, COVARIANCE.flip(0, 1) * 2)
    t = torch.tensor(0.3, dtype=torch.float64)
    for time in (None, 0.3):
        a, b = (p, q) if time is None else (p.noised(time), q.noised(time))
        alpha, sigma = (1.0, 0.0) if time is None else (schedule.alpha(t), schedule.sigma(t))
        noise = sigma**2 * torch.eye(2, dtype=torch.float64)
        first = MultivariateNormal(alpha * centre, alpha**2 * COVARIANCE + noise)
        second = MultivariateNormal(alpha * away, alpha**2 * 2 * COVARIANCE.flip(0, 1) + noise)
        torch.testing.assert_close(a.kl(b), kl_divergence(first, second), rtol=1e-12, atol=1e-12)
        assert abs(float(a.kl(a))) < 1e-14 and abs(float(a.kl(b) - b.kl(a))) > 1e-2


@pytest.mark.parametrize("w", [0.0, 1.0, 2.5])
def test_guided_gaussian(w, gen):
    """Guidance between two Gaussians: the combination of their denoisers, and the power-law flow map against the
    integrated flow of that combination."""
    schedule = VPLinear()
    narrow, wide = torch.tensor([0.25, 0.1]), torch.tensor([1.0, 0.6])
    world = GuidedGaussian(schedule, (2,), narrow, wide, w)
    parts = [Gaussian(schedule, torch.zeros(2), torch.diag(v)) for v in (narrow, wide)]
    guided = Autoguided(*parts, w)
    x = torch.randn(10, 2, generator=gen, dtype=torch.float64)
    torch.testing.assert_close(world(x, 0.4), guided(x, 0.4), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(world.score(x, 0.4), guided.score(x, 0.4), rtol=1e-12, atol=1e-12)
    ode = probability_flow(guided, x, 1.0, 1e-3, scales=(0.2, 4.0))
    torch.testing.assert_close(world.flow(x, 1.0, 1e-3), ode, rtol=0, atol=1e-9)
    if w in (0.0, 1.0):
        torch.testing.assert_close(world.flow(x, 1.0, 1e-3), parts[0 if w else 1].flow(x, 1.0, 1e-3))


def test_a_sample_does_not_see_its_batch(make, gen):
    """Flow map and denoiser of one state are the same alone and in a batch, with one time per sample."""
    world = make(VPLinear())
    x, t = states(world, 0.5, gen, 6), torch.linspace(0.2, 0.9, 6, dtype=torch.float64)
    cond = labels(world, 6)
    for i in (1, 4):
        one = None if cond is None else cond[i : i + 1]
        torch.testing.assert_close(world(x, t, cond)[i], world(x[i : i + 1], t[i : i + 1], one)[0])
        end = world.flow(x[i : i + 1], float(t[i]), 0.1, one)[0]
        torch.testing.assert_close(world.flow(x, t, 0.1, cond)[i], end, rtol=0, atol=1e-12)


def test_states_keep_their_type_and_shape(gen):
    """float32 in, float32 out, to float32 accuracy; pictures keep their shape."""
    mean = torch.linspace(-1, 1, 12).reshape(3, 2, 2)
    worlds = [
        Gaussian(EDM(), mean, 0.3),
        GaussianMixture(EDM(), torch.ones(2), torch.stack([mean, -mean]), torch.tensor([0.3, 0.5])),
        FiniteData(EDM(), torch.stack([mean, -mean, 0 * mean]), 0.1),
    ]
    for world in worlds:
        world.steps = 8
        x = torch.randn(4, 3, 2, 2, generator=gen, dtype=torch.float64)
        for f in (lambda y, w=world: w(y, 1.0), lambda y, w=world: w.flow(y, 1.0, 0.1)):
            assert f(x.float()).dtype == torch.float32 and f(x).shape == x.shape
            torch.testing.assert_close(f(x.float()).double(), f(x), rtol=1e-4, atol=1e-5)
        assert world.sample(2, Rng(0)).shape == (2, 3, 2, 2)


def test_a_world_is_a_student(gen):
    """ExactFlowMap: jump is the flow map, to_data the consistency function, and .on leaves the first world alone."""
    world = line(VPLinear())
    student = ExactFlowMap(world)
    x = torch.randn(4, 1, generator=gen, dtype=torch.float64)
    cond = torch.tensor([0, 1, -1, 0])
    assert torch.equal(student.jump(x, 0.9, 0.2, cond), world.flow(x, 0.9, 0.2, cond))
    assert torch.equal(student.to_data(x, 0.9, cond), world.flow(x, 0.9, 1e-3, cond))
    assert (student.shape, student.classes, student.schedule) == ((1,), 2, VPLinear())
    moved = world.on(EDM())
    moved.float()
    assert world.schedule == VPLinear() and world.means.dtype == torch.float64


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: Gaussian(EDM(), torch.zeros(2), torch.eye(3)), r"symmetric \[2, 2\]"),
        (lambda: Gaussian(EDM(), torch.zeros(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]])), "symmetric"),
        (lambda: Gaussian(EDM(), torch.zeros(2), 0.0), "positive definite"),
        (lambda: GaussianMixture(EDM(), torch.ones(3), MEANS, torch.ones(2)), "do not fit"),
        (lambda: GaussianMixture(EDM(), torch.tensor([1.0, -1.0, 1.0]), MEANS, torch.ones(3)), "positive numbers"),
        (lambda: GaussianMixture(EDM(), torch.ones(3), MEANS, -torch.ones(3)), "positive definite"),
        (lambda: Mixture1D(EDM(), torch.ones(2), torch.ones(2), torch.ones(2), [0, 2]), "labels must give"),
        (lambda: FiniteData(EDM(), POINTS, -0.1), "width=-0.1"),
        (lambda: FiniteData(EDM(), POINTS[0]), "points must be"),
        (lambda: GuidedGaussian(EDM(), (2,), 0.0, 1.0, 2.0), "narrow=0.0"),
        (lambda: ring(EDM(), modes=0), "modes=0"),
        (lambda: gaussian(EDM())(torch.zeros(2, 2), torch.ones(2, 2)), "one per sample"),
        (lambda: ring(EDM())(torch.zeros(2, 2), 1.0, torch.zeros(2)), "unconditional world"),
        (lambda: ring(EDM()).sample_labels(3, Rng(0)), "no labels to draw"),
        (lambda: probability_flow(ring(EDM()), torch.zeros(1, 2), 1.0, 0.5, scales=(2.0, 1.0)), "scales="),
    ],
)
def test_bad_worlds_are_refused(make_it, message):
    """One clear line that names the field."""
    with pytest.raises(ValueError, match=message):
        make_it()
