"""Analog Bits: encodings, the exact world of independent bits, self-conditioning and asymmetric time intervals."""

import copy
import math

import pytest
import torch
from torch import nn

from fewstep.data import Dataset
from fewstep.denoisers import Clipped, Denoiser, NetworkDenoiser
from fewstep.discrete.bits import COSINE, ENCODINGS, INVALID, Gray, OneHot, Permuted, Unsigned
from fewstep.discrete.captions import SENTENCES, WORDS, Captioner, Captions, Lookup, facts, sentence, slant, tokens
from fewstep.discrete.heads import SigmoidHead, SoftmaxHead
from fewstep.discrete.levels import histogram_distance, invalid_fraction, to_levels, to_pictures
from fewstep.exact import BernoulliBits, FiniteData, Gaussian, probability_flow
from fewstep.grids import to_data, uniform
from fewstep.guidance import Guided
from fewstep.methods.method import Batch, Progress
from fewstep.methods.parts.score_matching import denoising_loss
from fewstep.methods.parts.times import Uniform
from fewstep.methods.start import Start
from fewstep.methods.teachers.analog_bits import (
    AnalogBits,
    SigmoidAnalogBits,
    SoftmaxAnalogBits,
    sigmoid_loss,
    softmax_loss,
    squared_loss,
)
from fewstep.networks import MLP, UNet
from fewstep.predictions import X0
from fewstep.randomness import Rng
from fewstep.sampling import DDIM, SOLVERS, DDPMLarge, Hooks, Levels, run, solve
from fewstep.sampling.self_conditioning import Asymmetric, SelfConditioning, SelfGuided, told_later
from fewstep.schedules import EDM, FlowMatching, TrigFlow, VPCosine, VPLinear

P = torch.tensor([0.3, 0.5, 0.9], dtype=torch.float64)
SCHEDULES = {"vp": VPLinear(), "cosine": VPCosine(), "edm": EDM(), "flow": FlowMatching(), "bits": COSINE}


# Encodings


@pytest.mark.parametrize("name", ENCODINGS)
def test_every_symbol_comes_back(name):
    """Integers -> bits -> integers for every K from 2 to 40 and around the powers of two, at any scale and shape."""
    for values in (*range(2, 41), 63, 64, 65, 255, 256, 257):
        encoding = ENCODINGS[name](values, 0.5)
        symbols = torch.arange(values).repeat(2).reshape(2, values, 1)
        x = encoding.encode(symbols)
        assert x.shape == (2, encoding.channels, values, 1) and x.dtype == torch.float32
        assert set(x.unique().tolist()) == {-0.5, 0.5}
        assert torch.equal(encoding.decode(x), symbols)
        assert torch.equal(encoding.decode(x * 0.01), symbols)  # only the signs (the largest) count
        assert encoding.channels == (values if name == "one-hot" else math.ceil(math.log2(values)))


def test_bits_are_little_endian():
    """6 = 2 + 4: the second and the third channel."""
    assert Unsigned(256).encode(torch.tensor([6]))[0].tolist() == [-1, 1, 1, -1, -1, -1, -1, -1]


@pytest.mark.parametrize("values", [2, 17, 32, 100, 256])
def test_gray_neighbours_differ_in_one_bit(values):
    """Also where K is no power of two; in plain binary they differ in up to all bits."""
    bits = Gray(values).bits
    assert (bits[1:] != bits[:-1]).sum(1).tolist() == [1] * (values - 1)
    plain = Unsigned(values).bits
    assert int((plain[1:] != plain[:-1]).sum(1).max()) == Unsigned(values).channels


def test_the_permutation_is_the_papers():
    """With 256 values the paper says that 0 gets the bits of 228; no order is left (rank correlation of the distance of
    two symbols and of their codes within 0.01, against 0.43 and 0.35 for the other two)."""
    assert int(Permuted(256).codes()[0]) == 228
    assert sorted(Permuted(256).codes().tolist()) == list(range(256))
    symbol = torch.arange(256)
    apart = (symbol[:, None] - symbol).abs().double().flatten()
    found = {}
    for name in ("uint", "gray", "rand"):
        bits = ENCODINGS[name](256).bits
        hamming = (bits[:, None] != bits).sum(2).double().flatten()
        found[name] = float(torch.corrcoef(torch.stack([apart, hamming]))[0, 1])
    assert found["uint"] > 0.3 and found["gray"] > 0.3 and abs(found["rand"]) < 0.02, found
    assert Permuted(17).codes().max() > 17  # any of the 32 codes may be in use


@pytest.mark.parametrize("name", ["uint", "gray", "rand"])
def test_invalid_codes_are_counted_and_repaired(name):
    """Of the 32 codes of 17 symbols 15 belong to none; the nearest symbol is the one of least squared distance."""
    encoding = ENCODINGS[name](17)
    codes = (2.0 * ((torch.arange(32)[:, None] >> torch.arange(5)) & 1) - 1) * torch.linspace(0.2, 1.8, 5)
    decoded = encoding.decode(codes)
    assert int((decoded == INVALID).sum()) == 15 and invalid_fraction(decoded) == 15 / 32
    assert sorted(decoded[decoded != INVALID].tolist()) == list(range(17))
    repaired = encoding.nearest(codes)
    distance = (codes[:, None] - encoding.codebook).square().sum(2)
    valid = decoded != INVALID
    assert torch.equal(repaired[valid], decoded[valid])
    chosen = distance.gather(1, repaired[:, None])[:, 0]
    torch.testing.assert_close(chosen[~valid], distance.min(1).values[~valid])
    batch = codes.T[None].repeat(2, 1, 1)  # [2, 5, 32]: the same at every place of a picture
    assert torch.equal(encoding.nearest(batch), repaired.repeat(2, 1))


def test_expected_codes():
    """The mean code under probabilities; a certain symbol has its own."""
    encoding = Gray(5, 0.7)
    certain = torch.nn.functional.one_hot(torch.arange(5), 5).double()[..., None]
    torch.testing.assert_close(encoding.expected(certain)[..., 0], encoding.codebook.double())
    weights = torch.tensor([[0.1, 0.2, 0.3, 0.15, 0.25]], dtype=torch.float64)
    torch.testing.assert_close(encoding.expected(weights), weights @ encoding.codebook.double())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Unsigned(1), "values=1 must be at least 2"),
        (lambda: Gray(4, 0.0), "scale=0.0 must be positive"),
        (lambda: Unsigned(17).encode(torch.tensor([3, 17])), r"0 .. 16, got 3 .. 17"),
        (lambda: Unsigned(17).encode(torch.tensor([0.5])), "symbols are integers"),
        (lambda: Unsigned(17).decode(torch.zeros(2, 4)), r"\[B, 5, ...\], got shape \[2, 4\]"),
        (lambda: to_levels(torch.zeros(2, 1, 8, 8)), "uint8 pictures"),
        (lambda: to_pictures(torch.tensor([[[INVALID]]])), "1 pixels have no level"),
        (lambda: histogram_distance(torch.zeros(2, 3).long(), torch.zeros(2, 4).long()), "need equal shapes"),
        (lambda: BernoulliBits(EDM(), torch.tensor([0.0, 0.5])), r"must lie in \(0, 1\)"),
        (lambda: BernoulliBits(EDM(), P, scale=-1.0), "scale=-1.0"),
        (lambda: SelfConditioning(bound=0.0), "bound=0.0 must be positive"),
        (lambda: SelfConditioning(momentum=1.0), r"momentum=1.0 must lie in \[0, 1\)"),
        (lambda: SelfGuided(model_of(MLP((3,), beside=3)), bound=-1.0), "bound=-1.0"),
        (lambda: Asymmetric(td=-1.0), "td=-1.0"),
        (lambda: told_later(COSINE, -0.1), "shift=-0.1"),
        (lambda: AnalogBits(self_conditioning=1.5), "self_conditioning=1.5"),
        (lambda: AnalogBits(bound=0.0), "bound=0 must be positive"),
        (lambda: AnalogBits().networks(Start(BernoulliBits(EDM(), P))), "trains a network, got a BernoulliBits"),
        (
            lambda: AnalogBits().networks(Start(model_of(MLP((3,), beside=2)))),
            "sample of 2 channels.* needs 3",
        ),
        (lambda: tokens("the red four"), "'red' is not in the vocabulary"),
        (lambda: tokens("is " * 9), "has 9 words, 8 fit"),
        (lambda: Captioner((5, 7)), "pixels=64 must be a multiple of the 7 tokens"),
    ],
)
def test_errors_name_what_is_wrong(call, message):
    """One line with the field, the value and what would be right."""
    with pytest.raises(ValueError, match=message):
        call()


def test_the_cosine_schedule_is_the_authors():
    """alpha^2 = cos^2(pi/2 (t + 0.0002) / 1.00025) at equally spaced times, to rounding."""
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    gamma = torch.cos(math.pi / 2 * (t + 0.0002) / 1.00025) ** 2
    times = COSINE.t_min + t * (COSINE.t_max - COSINE.t_min)
    torch.testing.assert_close(COSINE.alpha(times) ** 2, gamma, rtol=0, atol=1e-15)
    torch.testing.assert_close(COSINE.sigma(times) ** 2, 1 - gamma, rtol=0, atol=1e-15)


# The exact world


def world_states(world, t, n=40):
    x0 = world.sample(n, Rng(0, "bits"))
    noise = Rng(1, "noise").normal(n, *world.shape, dtype=torch.float64)
    return world.schedule.add_noise(x0, noise, torch.tensor(t, dtype=torch.float64))


def time_of(schedule, log_snr):
    return float(schedule.time_at(torch.tensor(log_snr, dtype=torch.float64)))


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("level", [-2.0, 0.3, 1.5])
def test_the_denoiser_is_the_posterior_mean(schedule, level):
    """Against Bayes' rule written out, and the score against the derivative of the log-density."""
    world, t = BernoulliBits(schedule, P, 0.7), time_of(schedule, level)
    x = world_states(world, t).requires_grad_()
    time = torch.tensor(t, dtype=torch.float64)
    alpha, sigma = schedule.alpha(time), schedule.sigma(time)
    up, down = (p * torch.exp(-((x - s * alpha * 0.7) ** 2) / (2 * sigma**2)) for p, s in ((P, 1), (1 - P, -1)))
    density = (up + down) / (sigma * math.sqrt(2 * math.pi))
    torch.testing.assert_close(world(x, t), 0.7 * (up - down) / (up + down), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(world.log_density(x, t), density.log().sum(1), rtol=1e-12, atol=1e-12)
    slope = torch.autograd.grad(world.log_density(x, t).sum(), x)[0]
    torch.testing.assert_close(world.score(x, t), slope, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(world.eps(x, t), Denoiser.eps(world, x, t), rtol=1e-9, atol=1e-9)


def test_the_papers_formula():
    """D = tanh(alpha x / sigma^2 + log(p / (1 - p)) / 2) for bits of size 1."""
    world, x = BernoulliBits(COSINE, P), torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None].expand(9, 3)
    t = torch.tensor(0.8, dtype=torch.float64)
    formula = torch.tanh(t.cos() * x / t.sin() ** 2 + torch.log(P / (1 - P)) / 2)
    torch.testing.assert_close(world(x, 0.8), formula, rtol=0, atol=1e-14)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_the_flow_is_the_probability_flow(schedule):
    """Against the integrated ODE (1e-12), there and back, and with a tangent that is zero along the velocity."""
    world, t = BernoulliBits(schedule, P, 0.7), time_of(schedule, -2.0)
    x, s = world_states(world, t), time_of(schedule, 0.7)
    moved = world.flow(x, t, s)
    torch.testing.assert_close(moved, probability_flow(world, x, t, s, scales=(0.1, 2.0), steps=30), rtol=0, atol=1e-12)
    torch.testing.assert_close(world.flow(moved, s, t), x, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(world.flow(x, t, t), x, rtol=1e-13, atol=1e-13)
    times = torch.full((len(x),), t, dtype=torch.float64)
    along = world.tangent(x, times, s, world.velocity(x, times))
    assert float(along.abs().max()) < 1e-12
    ahead = (world.flow(x + 1e-5, t, s) - world.flow(x - 1e-5, t, s)) / 2e-5
    across = world.tangent(x, times, s, torch.ones_like(x), dt=0.0)
    torch.testing.assert_close(across, ahead, rtol=1e-5, atol=1e-8)


def test_the_flow_keeps_its_digits_where_they_are_rare():
    """At 12 standard deviations, and a hair beside the threshold, where the density at the end underflows."""
    world = BernoulliBits(COSINE, torch.tensor([0.3], dtype=torch.float64))
    t, s = COSINE.t_max, 0.05
    far = torch.tensor([[-12.0], [12.0]], dtype=torch.float64)
    # far out one mode is left: a Gaussian around it, whose log tail mass log p + log Phi is kept
    there = world.flow(far, t, s)
    for x, y, p, side in ((far[0], there[0], 0.7, -1), (far[1], there[1], 0.3, 1)):
        start = torch.special.log_ndtr(-x * side).item()  # alpha is 8e-5 at the start
        end = math.log(p) + torch.special.log_ndtr(-(y * side - math.cos(s)) / math.sin(s)).item()
        assert end == pytest.approx(start, abs=2e-3)
    beside = world.threshold(t) + torch.tensor([[-1e-9], [0.0], [1e-9]], dtype=torch.float64)
    between = world.flow(beside, t, s)
    assert -math.cos(s) < float(between[0, 0]) < float(between[1, 0]) < float(between[2, 0]) < math.cos(s)
    torch.testing.assert_close(world.flow(between, s, t), beside, rtol=0, atol=1e-15)


def test_samples_have_the_right_shares():
    """The share of ones of every coordinate, to four standard errors; the coordinates are uncorrelated."""
    x = BernoulliBits(EDM(), P, 0.5).sample(20_000, Rng(0))
    assert set(x.unique().tolist()) == {-0.5, 0.5}
    shares = (x > 0).double().mean(0)
    assert bool(((shares - P).abs() < 4 * (P * (1 - P) / 20_000).sqrt()).all())
    assert float((torch.corrcoef(x.T) - torch.eye(3)).abs().max()) < 4 / math.sqrt(20_000)


@pytest.mark.parametrize(("schedule", "expected"), [(VPLinear(), 0.5218), (COSINE, 0.5244), (FlowMatching(), 0.5244)])
def test_a_bit_is_one_above_the_quantile(schedule, expected):
    """p = 0.3: a solver's decoded bit is 1 iff the start lies above Phi^-1(0.7) = 0.5244; linear VP, which starts with
    alpha = 0.0066, has its threshold 0.4 alpha lower."""
    world = BernoulliBits(schedule, torch.tensor([0.3], dtype=torch.float64))
    # d threshold = -(1 - 2p) alpha b: from p Phi(x - a) = (1 - p) Phi(-x - a)
    alpha = float(schedule.alpha(torch.tensor(schedule.t_max, dtype=torch.float64)))
    quantile = float(torch.special.ndtri(torch.tensor(0.7, dtype=torch.float64)))
    assert float(world.threshold(schedule.t_max)) == pytest.approx(quantile - 0.4 * alpha, abs=3e-5)
    assert float(world.threshold(schedule.t_max)) == pytest.approx(expected, abs=5e-5)
    x = torch.linspace(0.4, 0.65, 251, dtype=torch.float64)[:, None]
    bits = solve(world, x, uniform(schedule, 400), SOLVERS["dpmpp-2m"]()) > 0
    assert bool((bits[1:] >= bits[:-1]).all())
    assert float(x[bits].min()) == pytest.approx(expected, abs=1.1e-3)  # the spacing, and the solver's error
    assert torch.equal(world.flow(x, schedule.t_max, schedule.t_min) > 0, x > world.threshold(schedule.t_max))


def test_any_discrete_law_comes_out_of_its_bits():
    """Five symbols in three bits with the exact denoiser of their codes: none of 4000 samples is invalid and the shares
    are right to four standard errors."""
    encoding, shares = Unsigned(5), torch.tensor([0.1, 0.3, 0.2, 0.15, 0.25], dtype=torch.float64)
    world = FiniteData(COSINE, encoding.codebook.double().repeat_interleave((shares * 20).long(), 0))
    noise = Rng(0).normal(4000, 3, dtype=torch.float64)
    symbols = encoding.decode(solve(world, noise, to_data(uniform(COSINE, 40), COSINE), SOLVERS["dpmpp-2m"]()))
    assert invalid_fraction(symbols) == 0
    found = torch.bincount(symbols, minlength=5) / 4000
    assert bool(((found - shares).abs() < 4 * (shares * (1 - shares) / 4000).sqrt()).all()), found


# Self-conditioning


def model_of(net, shape=None, classes=None):
    return NetworkDenoiser(net, COSINE, X0(), shape or net.shape, classes)


def random_model(classes=None):
    """A network whose every weight is random, in float64, with predictions on both sides of the bound of 1."""
    torch.manual_seed(0)
    net = MLP((3,), width=16, blocks=1, classes=classes, beside=3).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.28)
    return model_of(net, classes=classes)


def start_of(n=6, seed=5):
    return Rng(seed).normal(n, 3, dtype=torch.float64)


class Spy(Denoiser):
    """What a model was called with."""

    def __init__(self, inner):
        super().__init__(inner.schedule, inner.shape, inner.classes)
        self.inner, self.seen = inner, []

    def forward(self, x, t, cond=None, **extras):
        self.seen.append((x, t, cond, extras.get("beside")))
        return self.inner(x, t, cond, **extras)


def literal_sampler(model, x, steps, td, momentum, kind, rng, bound):
    """The authors' sampling loop, step by step, with gamma in place of alpha^2: what comes out is the last estimate."""
    span = COSINE.t_max - COSINE.t_min

    def gamma(t):
        return math.cos(COSINE.t_min + span * t) ** 2

    estimate = torch.zeros_like(x)
    data = estimate
    for i in range(steps):
        now, after = 1 - i / steps, max(1 - (i + 1 + td) / steps, 0.0)
        if i:
            estimate = momentum * estimate + (1 - momentum) * data
        told = torch.full((len(x),), COSINE.t_min + span * now, dtype=torch.float64)
        data = model(x, told, None, beside=estimate).clamp(-bound, bound)
        g, g_next = gamma(now), gamma(after)
        eps = (x - math.sqrt(g) * data) / math.sqrt(1 - g)
        if kind == "ddim":
            x = math.sqrt(g_next) * data + math.sqrt(1 - g_next) * eps
            continue
        ratio = g / g_next
        mean = (x - (1 - ratio) / math.sqrt(1 - g) * eps) / math.sqrt(ratio)
        variance = (1 - ratio) * ((1 - g_next) / (1 - g) if kind == "small" else 1)
        x = mean + math.sqrt(variance) * rng.normal_like(x)
    return data, x


STEPPERS = {"ddim": DDIM(), "small": DDIM(eta=1.0), "large": DDPMLarge()}


@pytest.mark.parametrize("kind", STEPPERS)
@pytest.mark.parametrize(("td", "momentum"), [(0.0, 0.0), (0.0, 0.6), (1.0, 0.0), (2.5, 0.3), (30.0, 0.0)])
def test_sampling_is_the_authors_loop(kind, td, momentum):
    """Clip, noise derived from the clipped estimate, feedback with momentum, asymmetric steps: equal to their loop in
    float64, for DDIM and both variances of DDPM."""
    model, x = random_model(), start_of()
    solver, how = Asymmetric(STEPPERS[kind], td), SelfConditioning(0.5, momentum)
    data, state = literal_sampler(model, x, 8, td, momentum, kind, Rng(9), 0.5)
    made = how.solve(model, x, uniform(COSINE, 8), solver, rng=Rng(9))
    torch.testing.assert_close(made, state, rtol=1e-10, atol=1e-10)
    if kind == "ddim" and td == 0:  # on a grid that ends at pure data the state is the estimate, which they return
        torch.testing.assert_close(
            how.solve(model, x, to_data(uniform(COSINE, 8), COSINE), solver), data, rtol=1e-3, atol=1e-3
        )
    unclipped, _ = literal_sampler(model, x, 8, td, momentum, kind, Rng(9), 100.0)
    assert float((unclipped.clamp(-0.5, 0.5) - data).abs().max()) > 1e-3  # the clips along the way matter


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpmpp-2m", "unipc", "heun"])
def test_every_solver_feeds_back_its_last_prediction(name):
    """Call by call the network sees zeros first and then what it said before, clipped; two runs are equal."""
    spy, x = Spy(random_model()), start_of()
    times = uniform(COSINE, 5)

    def run():
        return SelfConditioning(bound=0.8).solve(spy, x, times, SOLVERS[name](), rng=Rng(0))

    first, calls = run(), len(spy.seen)
    assert spy.seen[0][3] is None
    for (state, t, cond, beside), following in zip(spy.seen[:-1], spy.seen[1:], strict=True):
        extras = {} if beside is None else {"beside": beside}
        assert torch.equal(following[3], spy.inner(state, t, cond, **extras).clamp(-0.8, 0.8))
    assert torch.equal(run(), first)
    assert spy.seen[calls][3] is None
    plain = solve(Clipped(spy.inner, -0.8, 0.8), x, times, SOLVERS[name](), rng=Rng(0))
    assert not torch.allclose(plain, first)


def test_a_pair_of_model_and_hooks_can_be_run_again():
    """The memory is emptied at the start of a run, also of one that was left in the middle."""
    model, times = random_model(), uniform(COSINE, 5)
    denoiser, hooks = SelfConditioning(momentum=0.5).attached(model)

    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    first = solve(denoiser, start_of(), times, DDIM(), hooks=hooks)
    with pytest.raises(KeyboardInterrupt):
        solve(denoiser, start_of(4, 6), times, DDIM(), hooks=hooks, progress=stop)
    assert torch.equal(solve(denoiser, start_of(), times, DDIM(), hooks=hooks), first)
    assert torch.equal(SelfConditioning(momentum=0.5).solve(model, start_of(), times, DDIM()), first)


def test_guidance_shows_both_branches_the_same_estimate():
    """Guided around the self-conditioned model: the guided, clipped prediction is what both branches see next."""
    spy = Spy(random_model(classes=2))
    denoiser, hooks = SelfConditioning().attached(spy)
    cond = torch.tensor([0, 1, 0, 1, 0, 1])
    solve(Guided(denoiser, 3.0), start_of(), uniform(COSINE, 3), DDIM(), cond, hooks=hooks)
    assert len(spy.seen) == 6
    for (x, t, _, beside), (_, _, _, again), (_, _, _, fed) in zip(
        spy.seen[0:4:2], spy.seen[1:4:2], spy.seen[2:6:2], strict=True
    ):
        assert again is beside
        extras = {} if beside is None else {"beside": beside}
        branches = [spy.inner(x, t, labels, **extras) for labels in (None, cond)]
        torch.testing.assert_close(fed, torch.lerp(*branches, 3.0).clamp(-1, 1), rtol=1e-12, atol=1e-12)


def test_an_edited_prediction_is_fed_back_as_edited():
    """Hooks of the caller act before the clip and the memory; the others go through."""
    spy, notes = Spy(random_model()), []
    known = torch.tensor([True, False, False])

    def put_back(k, x0, x, t):
        return torch.where(known, 0.25, x0)

    hooks = Hooks(output=put_back, after=lambda i, x: notes.append(i) or x, start=lambda x: 2 * x)
    SelfConditioning().solve(spy, start_of(), uniform(COSINE, 3), DDIM(), hooks=hooks)
    assert notes == [0, 1, 2] and torch.equal(spy.seen[0][0], 2 * start_of())
    for call in spy.seen[1:]:
        assert bool((call[3][:, 0] == 0.25).all()) and not bool((call[3][:, 1] == 0.25).any())


def test_self_guidance_is_two_passes():
    """w = 1 is the second pass, w = 0 the first; 3 extrapolates; all are clipped."""
    model, x, t = random_model(), start_of(), 1.0
    unc = model(x, t).clamp(-1, 1)
    con = model(x, t, beside=unc)
    assert float((con - unc).abs().max()) > 0.1
    for scale in (0.0, 1.0, 3.0):
        expected = (unc + scale * (con - unc)).clamp(-1, 1)
        torch.testing.assert_close(SelfGuided(model, scale)(x, t), expected, rtol=1e-12, atol=1e-12)
    made = solve(SelfGuided(model, 3.0), x, uniform(COSINE, 4), DDIM())
    assert torch.equal(solve(SelfGuided(model, 3.0), x, uniform(COSINE, 4), DDIM()), made)


@pytest.mark.parametrize("net", [MLP((3,), 16, 1), UNet((3, 4, 4), (8,), 1, 16, 2)], ids=["mlp", "unet"])
def test_a_model_that_is_given_a_second_input_starts_as_it_was(net):
    """Same weights, new ones at zero: predictions and self-conditioned sampling are the plain ones, bit for bit."""
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    teacher = model_of(net)
    made = Start(teacher).network(beside=3)
    x, t = torch.randn(5, *net.shape, generator=torch.Generator().manual_seed(1)), torch.full((5,), 0.9)
    assert made.net.config == net.config | {"beside": 3} and net.config["beside"] == 0
    assert torch.equal(made(x, t, beside=x), teacher(x, t))
    plain = solve(Clipped(teacher), x, uniform(COSINE, 4), DDIM())
    assert torch.equal(SelfConditioning().solve(made, x, uniform(COSINE, 4), DDIM()), plain)
    assert all(p.requires_grad for p in made.parameters())
    again = Start(made).network(beside=3)
    assert again.net is not made.net and again.net.config == made.net.config


# Asymmetric time intervals


@pytest.mark.parametrize("inner", STEPPERS.values(), ids=STEPPERS)
def test_td_zero_is_the_plain_sampler(inner):
    """Bit for bit, as a solver and as a hook."""
    world, x, times = BernoulliBits(COSINE, P), start_of(), to_data(uniform(COSINE, 6), COSINE)
    plain = solve(world, x, times, inner, rng=Rng(0))
    assert torch.equal(solve(world, x, times, Asymmetric(inner), rng=Rng(0)), plain)
    assert torch.equal(solve(world, x, times, inner, rng=Rng(0), hooks=told_later(COSINE, 0.0)), plain)


def test_the_hook_moves_only_what_the_network_is_told():
    """The network is told t + xi, at most t_max; state, noise and steps are those of t: written out for DDIM."""
    spy, x, times = Spy(BernoulliBits(COSINE, P)), start_of(), uniform(COSINE, 5)
    shift = 1.5 * float(times[0] - times[1])
    made = solve(spy, x, times, DDIM(), hooks=told_later(COSINE, shift))
    told = torch.stack([call[1][0] for call in spy.seen])
    torch.testing.assert_close(told, (times[:-1] + shift).clamp_max(COSINE.t_max))
    for i in range(5):
        x0 = spy.inner(x, float(told[i]))
        eps = (x - times[i].cos() * x0) / times[i].sin()
        x = times[i + 1].cos() * x0 + times[i + 1].sin() * eps
    torch.testing.assert_close(made, x, rtol=1e-12, atol=1e-12)
    shown = Hooks(input=lambda k, x, t: (2 * x, t))
    solve(spy, start_of(), times, DDIM(), hooks=told_later(COSINE, shift, shown))
    assert torch.equal(spy.seen[5][0], 2 * start_of())


def test_the_asymmetric_sampler_runs_along_a_faster_flow():
    """With many steps a td of 0.5 follows dx/dt = 1.5 v: for a Gaussian its spread falls as the power 1.5 of the exact
    one.  The error halves with the step."""
    schedule = TrigFlow(t_min=0.2, t_max=1.2, sigma_data=1.0)
    world = Gaussian(schedule, torch.zeros(1, dtype=torch.float64), 0.25)
    x = torch.ones(1, 1, dtype=torch.float64)
    ends = torch.tensor([1.2, 0.2], dtype=torch.float64)
    spread = (0.25 * ends.cos() ** 2 + ends.sin() ** 2).sqrt()
    expected = float((spread[1] / spread[0]) ** 1.5)

    def error(steps):
        return float(solve(world, x, uniform(schedule, steps), Asymmetric(td=0.5))) - expected

    coarse, fine, finest = (error(n) for n in (200, 400, 800))
    assert abs(finest) < 2e-3 and 1.8 < coarse / fine < 2.2 and 1.8 < fine / finest < 2.2, (coarse, fine, finest)


def test_asymmetric_steps_make_rare_bits_rarer():
    """A bit of p = 0.3 is 1 in 14 % of the samples with the exact denoiser, 10 steps and td = 1.  With 200 steps the
    hook is back at 30 %; the authors' sampler, on its faster flow, is not: 18 %."""
    world = BernoulliBits(COSINE, torch.tensor([0.3], dtype=torch.float64))
    x = torch.linspace(0, 2, 2001, dtype=torch.float64)[:, None]

    def share(steps, solver, shift):
        times = to_data(uniform(COSINE, steps), COSINE)
        ones = solve(world, x, times, solver, hooks=told_later(COSINE, shift * COSINE.t_max / steps)) > 0
        return float(torch.special.ndtr(-x[ones].min()))

    assert share(10, Asymmetric(td=1.0), 0.0) == pytest.approx(0.137, abs=1e-3)
    assert share(200, Asymmetric(td=1.0), 0.0) == pytest.approx(0.184, abs=2e-3)
    assert share(10, DDIM(), 1.0) == pytest.approx(0.226, abs=1e-3)
    assert share(200, DDIM(), 1.0) == pytest.approx(0.3, abs=5e-3)
    assert share(200, DDIM(), 0.0) == pytest.approx(0.3, abs=2e-3)


def test_asymmetric_steps_end_on_the_grid():
    """Between two grid times linearly, at the last one from there on."""
    schedule, times = FlowMatching(), torch.tensor([1.0, 0.6, 0.5, 0.1, 0.0], dtype=torch.float64)
    levels = Levels.of(schedule, times)

    def ends(td, levels):
        return [Asymmetric(td=td).alone(levels, i).times[1] for i in range(levels.steps)]

    assert ends(1.25, levels) == pytest.approx([0.4, 0.075, 0.0, 0.0])
    assert ends(1.0, levels) == [0.5, 0.1, 0.0, 0.0]
    # a last call that only denoises: its time stands for pure data, and no time lies on the way to it
    longer = Levels.of(COSINE, uniform(COSINE, 2)).denoised()
    assert longer.times[-1] == -1 and ends(1.0, longer) == [COSINE.t_min, -1, -1] and ends(0.5, longer)[1:] == [-1, -1]
    x, world = start_of(), BernoulliBits(COSINE, P)
    made = run(world, x, Asymmetric(td=1.0).table(longer))
    assert float((made.abs() - 1).abs().max()) < 1e-3  # the denoiser's own word, and it is sure at t_min


# Training


def batch_of(n=12, dtype=torch.float64, cond=None):
    return Batch(BernoulliBits(COSINE, P).sample(n, Rng(1)).to(dtype), cond, Rng(2))


def one(method, model, batch):
    """The update of a method, and the gradients of its loss by name."""
    nets = method.networks(Start(model))
    (update,) = method.updates(nets, batch, Progress())
    update.loss.backward()
    return update, {name: p.grad for name, p in nets.model.named_parameters()}


def test_without_self_conditioning_the_loss_is_plain_denoising():
    """Rate 0 is the x_0-prediction loss of the library on the same draws, and asks for no second input."""
    torch.manual_seed(0)
    net = MLP((3,), 16, 1).double()
    nn.init.normal_(net.leave.weight)
    update, _ = one(AnalogBits(self_conditioning=0.0), model_of(net), batch_of())
    batch = batch_of()
    t = Uniform().draw(COSINE, len(batch.x), batch.rng)
    plain = denoising_loss(model_of(net), batch.x, t, None, batch.rng)
    assert float(update.loss) == pytest.approx(float(plain), rel=1e-14)
    # with fresh (zero) extra weights any rate starts there, and moves them
    update, gradients = one(AnalogBits(), model_of(net), batch_of())
    assert float(update.loss) == pytest.approx(float(plain), rel=1e-14)
    assert float(gradients["net.beside.layer.weight"].abs().max()) > 0


def test_no_gradient_flows_through_the_first_pass():
    """The gradients are those with the estimate as a constant, and not those through both passes."""
    model, method = random_model(), AnalogBits(self_conditioning=0.75)
    _, gradients = one(method, model, batch_of())

    def written_out(hold):
        copied, batch = copy.deepcopy(model), batch_of()
        t = Uniform().draw(COSINE, 12, batch.rng)
        x_t = COSINE.add_noise(batch.x, batch.rng.normal_like(batch.x), t)
        first = copied(x_t, t).clamp(-1, 1) * method.chosen(12, Rng(0))[:, None]
        estimate = first.detach() if hold else first
        (copied(x_t, t, beside=estimate) - batch.x).square().mean().backward()
        return {name: p.grad for name, p in copied.named_parameters()}

    held, through = written_out(True), written_out(False)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, held[name], rtol=1e-10, atol=1e-12)
    assert any(not torch.allclose(gradients[n], through[n], rtol=1e-3, atol=1e-6) for n in gradients)


def test_a_share_of_a_batch_gets_its_estimate():
    """Every second sample its own clipped prediction with its own label and time, the rest zeros; parts of a batch
    choose what the whole chooses."""
    model = random_model(classes=2)
    x, t, cond = start_of(5), torch.linspace(0.1, 1.4, 5, dtype=torch.float64), torch.tensor([0, 1, -1, 0, 1])
    method, predicted = AnalogBits(bound=0.8), model(x, t, cond)
    chosen = method.chosen(5, Rng(0))
    assert chosen.tolist() == [False, True, False, True, False]
    assert bool((predicted[chosen].abs() > 0.8).any()) and bool((predicted[chosen].abs() < 0.8).any())
    estimate = method.estimate(model, x, t, cond, chosen)
    torch.testing.assert_close(estimate[chosen], predicted[chosen].clamp(-0.8, 0.8), rtol=1e-12, atol=1e-12)
    assert bool((estimate[~chosen] == 0).all()) and not estimate.requires_grad
    assert bool((method.estimate(model, x, t, cond, torch.zeros(5, dtype=torch.bool)) == 0).all())
    for share in (0.0, 0.3, 0.5, 1.0):
        method = AnalogBits(self_conditioning=share)
        parts = torch.cat([method.chosen(3, Rng(0, part=k, parts=4)) for k in range(4)])
        assert torch.equal(parts, method.chosen(12, Rng(0))) and int(parts.sum()) == int(12 * share + 1e-9)


class Exact(nn.Module):
    """``scale`` times the exact logit of independent bits, plus ``w`` times what is given beside the state; both
    parameters have a known optimum: 1, and 0 whatever is given."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale, self.w = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (scale, 0.0))

    def forward(self, x, t, cond=None, beside=None):
        logit = 2 * t.cos()[:, None] * x / t.sin()[:, None] ** 2 + torch.log(P / (1 - P))
        return self.scale * logit + (0 if beside is None else self.w * beside)


def expected_gradients(loss, model, posterior, codes):
    """The gradient of the expected loss in the parameters: summed over x_t on a grid and x_0 under its posterior, so
    exact up to rounding.  The estimate beside is a function of x_t, as the first pass makes it."""
    total = 0
    for log_snr in (-1.0, 0.5, 1.2):
        t = torch.full((1,), time_of(COSINE, log_snr), dtype=torch.float64)
        for x_t in start_of(12, 3).split(1):
            x_t = x_t[:, : codes.shape[1]]
            beside = model(x_t, t).detach().clamp(-1, 1)
            for share, code in zip(posterior(x_t, t), codes, strict=True):
                total = total + share * loss(model, x_t, code[None], t, None, beside=beside)
    return {n: p.grad for n, p in model.named_parameters() if total.backward(retain_graph=True) is None}


@pytest.mark.parametrize("loss", [squared_loss, sigmoid_loss])
def test_at_the_exact_denoiser_no_loss_pulls(loss):
    """Fixed point: at the exact bits the expected gradient is zero in the logits' scale *and* in the weight of the
    estimate, which has nothing to add; 5 % off it is not."""
    codes = torch.tensor([[1.0 if k >> j & 1 else -1 for j in range(3)] for k in range(8)], dtype=torch.float64)

    def posterior(x, t):
        up = torch.sigmoid(Exact()(x, t))[0]
        return torch.where(codes > 0, up, 1 - up).prod(1).detach()

    exact = expected_gradients(loss, model_of(SigmoidHead(Exact()), (3,)), posterior, codes)
    assert max(float(g.abs()) for g in exact.values()) < 1e-13, exact
    off = expected_gradients(loss, model_of(SigmoidHead(Exact(1.05)), (3,)), posterior, codes)
    assert min(float(g.abs()) for g in off.values()) > 1e-4, off


class ExactSymbols(nn.Module):
    """The exact logits of symbols, ``log share + alpha x . code / sigma^2``, likewise."""

    def __init__(self, encoding, shares, scale=1.0):
        super().__init__()
        self.codes, self.shares = encoding.codebook.double(), shares
        self.scale, self.w = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (scale, 0.0))

    def forward(self, x, t, cond=None, beside=None):
        assert x.shape[1] == len(self.codes)  # the head fills the missing channels
        x = x[:, : self.codes.shape[1]]
        logits = t.cos()[:, None] * x @ self.codes.T / t.sin()[:, None] ** 2 + self.shares.log()
        return self.scale * logits + (0 if beside is None else self.w * (beside @ self.codes.T))


@pytest.mark.parametrize("loss", [squared_loss, softmax_loss])
@pytest.mark.parametrize("encoding", [Unsigned(3), Permuted(5), Unsigned(4)], ids=str)
def test_the_softmax_factorisation_is_exact_for_symbols(loss, encoding):
    """With the exact logits its expected code is the posterior mean of the finite data set, and neither the squared
    error nor the cross-entropy pulls; 5 % off both do."""
    counts = torch.tensor([3, 5, 2, 4, 1])[: encoding.values]
    shares, codes = counts / counts.sum().double(), encoding.codebook.double()
    world = FiniteData(COSINE, codes.repeat_interleave(counts, 0))
    model = model_of(SoftmaxHead(ExactSymbols(encoding, shares), encoding), (encoding.channels,))
    x = Rng(3).normal(7, encoding.channels, dtype=torch.float64)
    torch.testing.assert_close(model(x, 0.8), world(x, 0.8), rtol=1e-12, atol=1e-12)

    def posterior(x, t):
        filled = torch.cat([x, x.new_zeros(1, encoding.values - encoding.channels)], 1)
        return torch.softmax(ExactSymbols(encoding, shares)(filled, t), 1)[0].detach()

    exact = expected_gradients(loss, model, posterior, codes)
    assert max(float(g.abs()) for g in exact.values()) < 1e-13, exact
    moved = model_of(SoftmaxHead(ExactSymbols(encoding, shares, 1.05), encoding), (encoding.channels,))
    off = expected_gradients(loss, moved, posterior, codes)
    assert min(float(g.abs()) for g in off.values()) > 1e-5, off


@pytest.mark.parametrize("places", [(), (4,), (2, 3)], ids=str)
def test_a_softmax_head_fills_the_missing_channels_with_zeros(places):
    """At every place; the network sees as many channels as there are symbols."""
    seen = []

    class Echo(nn.Module):
        def forward(self, x, t, cond=None):
            seen.append(x)
            return x

    encoding = Unsigned(5)
    x = torch.randn(2, encoding.channels, *places)
    logits = SoftmaxHead(Echo(), encoding).logits(x, torch.zeros(2))
    assert logits is seen[0] and logits.shape == (2, 5, *places)
    assert torch.equal(logits[:, :3], x) and not bool(logits[:, 3:].any())


def test_the_sigmoid_loss_is_the_binary_cross_entropy():
    """-log sigmoid(x_0 f / b), and a denoiser b (2 sigmoid(f) - 1), for bits of size 0.5."""
    torch.manual_seed(0)
    net = MLP((3,), 16, 1, beside=3).double()
    nn.init.normal_(net.leave.weight)
    model, x, t = model_of(SigmoidHead(net, 0.5), (3,)), start_of(), torch.linspace(0.2, 1.4, 6, dtype=torch.float64)
    bits = (start_of(seed=8) > 0).double()
    logits = net(x, t)
    torch.testing.assert_close(model(x, t), 0.5 * (2 * torch.sigmoid(logits) - 1))
    loss = sigmoid_loss(model, x, (2 * bits - 1) * 0.5, t, None)
    torch.testing.assert_close(loss, nn.functional.binary_cross_entropy_with_logits(logits, bits))
    with pytest.raises(ValueError, match="needs a network under a SigmoidHead in x0-prediction, got MLP"):
        sigmoid_loss(model_of(net), x, bits, t, None)


@pytest.mark.parametrize(
    ("method", "net"),
    [
        (AnalogBits(lr=3e-3), lambda: MLP((5,), 32, 1, beside=5)),
        (SigmoidAnalogBits(lr=3e-3), lambda: SigmoidHead(MLP((5,), 32, 1, beside=5))),
        (SoftmaxAnalogBits(lr=3e-3), lambda: SoftmaxHead(MLP((17,), 32, 1, beside=5), Unsigned(17))),
    ],
    ids=["l2", "sigmoid", "softmax"],
)
def test_every_loss_trains(method, net):
    """40 steps on one symbol of 17 (5 bits) take the loss down by a third at least, with one trained group."""
    torch.manual_seed(0)
    nets = method.networks(Start(model_of(net(), (5,))))
    optimiser = torch.optim.Adam(nets.group_parameters("model"), lr=3e-3)
    data = Unsigned(17).encode(torch.full((64,), 11))
    losses = []
    for step in range(40):
        (update,) = method.updates(nets, Batch(data, None, Rng(step)), Progress())
        optimiser.zero_grad()
        update.loss.backward()
        optimiser.step()
        losses.append(float(update.loss))
    assert losses[-1] < 0.66 * losses[0], losses
    product = method.student(nets)
    assert product.denoiser is nets.model and product.feedback == SelfConditioning(method.bound)
    assert "estimate_loss" in update.logs


# Digits and captions


def test_levels_and_their_distance():
    """uint8 values x 255/16 are the 17 levels; equal histograms have distance 0, disjoint ones 1; invalid
    symbols count."""
    values = (torch.arange(17) * 255 / 16).to(torch.uint8)
    levels = to_levels(values.reshape(17, 1, 1, 1))
    assert levels.flatten().tolist() == list(range(17))
    torch.testing.assert_close(to_pictures(levels).flatten(), torch.linspace(-1, 1, 17))
    real = torch.tensor([[0, 5], [0, 5], [3, 5], [3, 5]])
    assert histogram_distance(real, real) == 0
    assert histogram_distance(real + 1, real) == 1
    assert histogram_distance(torch.tensor([[0, 5], [INVALID, 5]]), real) == pytest.approx(0.25)


def test_what_a_caption_says_is_measured():
    """A bar that moves a pixel a row leans as it should, upright and mirrored bars too; ink decides thin or bold."""
    rows = torch.arange(8)
    bars = torch.zeros(3, 8, 8, dtype=torch.long)
    bars[0, rows, rows] = bars[1, rows, 3] = bars[2, rows, 7 - rows] = 16
    torch.testing.assert_close(slant(bars), torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64))
    said = facts(bars, torch.tensor([1, 7, 4]))
    assert [f["slant"] for f in said] == ["left-leaning", "upright", "right-leaning"]
    assert [f["digit"] for f in said] == ["one", "seven", "four"] and {f["weight"] for f in said} == {"thin"}
    assert facts(torch.full((1, 8, 8), 5), torch.tensor([0]))[0]["weight"] == "bold"
    for text in SENTENCES:
        words = text.format(**said[0])
        assert sentence(torch.tensor(tokens(words))) == words


def test_captions_of_pictures_and_their_scores():
    """Four right captions a picture; one of another picture is sensible, a mixed one is neither."""
    x = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    x[0, 0, :, 3] = x[1, 0, :, 2:6] = 255
    captions = Captions.of(Dataset("two", x, torch.tensor([1, 8])))
    assert captions.tokens.shape == (2, 4, 8)
    assert sentence(captions.tokens[1, 0]) == "the bold upright eight"
    for k in range(4):
        assert captions.right(captions.tokens[:, k]).tolist() == [True, True]
    swapped = captions.tokens.flip(0)[:, 2]
    assert captions.right(swapped).tolist() == [False, False] and captions.sensible(swapped).tolist() == [True, True]
    mixed = swapped.clone()
    mixed[:, 1] = INVALID
    assert captions.sensible(mixed).tolist() == [False, False] and "<?>" in sentence(mixed[0])
    encoding = Unsigned(len(WORDS))
    data = captions.bits(encoding)
    assert data.x.shape == (8, 5, 8) and data.labels.tolist() == [0] * 4 + [1] * 4
    assert torch.equal(encoding.decode(data.x), captions.tokens.flatten(0, 1))
    with pytest.raises(ValueError, match="has no labels"):
        Captions.of(Dataset("two", x))


def test_the_captioner_sees_picture_and_estimate():
    """Both are given beside the state, and a network that is told numbers looks its pictures up."""
    torch.manual_seed(0)
    net = Captioner((5, 8), width=16, blocks=1)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    pictures = torch.randn(3, 1, 8, 8)
    x, t, index = torch.randn(2, 5, 8), torch.full((2,), 0.5), torch.tensor([2, 0])
    made = net(x, t, pictures[index])
    assert torch.equal(Lookup(net, pictures)(x, t, index), made)
    assert not torch.allclose(net(x, t, pictures[index.flip(0)]), made)
    assert not torch.allclose(net(x, t, pictures[index], beside=x), made)
    assert torch.equal(net(x, t, pictures[index], beside=torch.zeros_like(x)), made)


def test_one_hot_needs_no_repair():
    """The largest channel decodes whatever the values."""
    x = torch.tensor([[-3.0, -1.0, -2.0], [0.2, 0.1, 0.3]])
    assert OneHot(3).decode(x).tolist() == OneHot(3).nearest(x).tolist() == [1, 2]


def test_levels_are_the_nearest_ones() -> None:
    """``round(16 x / 255)`` of every grey value, and any other number of levels; back, the ends are -1 and 1."""
    grey = torch.arange(256, dtype=torch.uint8).reshape(256, 1, 1, 1)
    for values, levels in ((17, to_levels(grey)), (2, to_levels(grey, 2)), (256, to_levels(grey, 256))):
        expected = (grey.double() * (values - 1) / 255).round().long()  # 255 is odd: there are no ties
        assert torch.equal(levels, expected[:, 0])
    assert to_pictures(torch.tensor([[[0, 8, 16]]])).tolist() == [[[[-1.0, 0.0, 1.0]]]]
