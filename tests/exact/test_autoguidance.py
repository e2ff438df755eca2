"""Guidance as a combinator: its limits, its closed form, where it acts, what it costs; and the search over post-hoc
averages."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fewstep.denoisers import Cond, CountCalls, Denoiser, NetworkDenoiser
from fewstep.exact import Gaussian, GaussianMixture, GuidedGaussian, ring
from fewstep.exact.fractal import Fractal, density_level
from fewstep.flow_maps import Jump
from fewstep.grids import karras
from fewstep.guidance import Autoguided, Guidance, GuidanceInterval, Guided
from fewstep.hub import native
from fewstep.networks import MLP
from fewstep.predictions import TrigPrediction
from fewstep.randomness import Rng
from fewstep.sampling import Plan, Student, sample
from fewstep.schedules import EDM, FlowMatching, Schedule, TrigFlow, VPLinear
from fewstep.training import autoguidance, snapshots
from fewstep.training.ema import Average
from fewstep.training.profiles import Power

EXACT = {"rtol": 1e-12, "atol": 1e-12}


class Says(Denoiser):
    """Gives the same answer whatever it is asked."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__(EDM(), tuple(answer.shape[1:]))
        self.answer = answer

    def forward(self, x: Tensor, t: Tensor | float, cond: Cond = None) -> Tensor:
        return self.answer


def pair(schedule: Schedule, s_main: float = 0.5, s_guide: float = 0.8) -> tuple[Gaussian, Gaussian]:
    """The exact models of two centred Gaussians in the plane."""
    return Gaussian(schedule, torch.zeros(2), s_main**2), Gaussian(schedule, torch.zeros(2), s_guide**2)


def test_limits_hold_to_the_last_bit(gen):
    """w = 1 is the main model, w = 0 the guide, and a model guided by itself is itself at any weight."""
    x = torch.randn(50, 2, generator=gen, dtype=torch.float64)
    for state in (x, x.float()):
        main, guide = (Says(torch.randn(50, 2, generator=gen).to(state)) for _ in range(2))
        assert torch.equal(Autoguided(main, guide, 1.0)(state, 0.7), main(state, 0.7))
        assert torch.equal(Autoguided(main, guide, 0.0)(state, 0.7), guide(state, 0.7))
        assert torch.equal(Autoguided(main, main, 7.3)(state, 0.7), main(state, 0.7))


@pytest.mark.parametrize("w", [1.0, 2.0, 3.0])
def test_guided_gaussian_has_the_closed_form_of_a_power_law(w):
    """Sampled from N(0, sM^2), the output's standard deviation is s_m^w s_g^(1 - w); at w = 2 of 0.5 and 0.8 that is
    0.3125, by a solver and by the exact flow map."""
    top = 1e4
    schedule = EDM(t_min=1e-4, t_max=top)
    noise = torch.tensor([[1.0, -0.3]], dtype=torch.float64)
    # RK4's error on this grid is 2e-7, the start's distance to infinite noise (0.5 / sM)^2
    made = sample(Autoguided(*pair(schedule), w), 1, solver="rk4", grid=karras(schedule, 400), noise=noise)
    expected = 0.5**w * 0.8 ** (1 - w)
    torch.testing.assert_close(made, expected * noise, rtol=1e-6, atol=0)
    flow = GuidedGaussian(schedule, (2,), 0.25, 0.64, w).flow(top * noise, top, 0.0)
    torch.testing.assert_close(flow, expected * noise, rtol=1e-7, atol=0)
    by_hand = (0.25 / (0.25 + top**2)) ** (w / 2) * (0.64 / (0.64 + top**2)) ** ((1 - w) / 2)
    torch.testing.assert_close(flow, by_hand * top * noise, **EXACT)


def test_guided_sampling_is_not_the_product_density():
    """p_m^2 / p_g is a Gaussian of standard deviation 0.394: guided sampling makes 0.3125, although its score at the
    data is that of the product."""
    product = (2 / 0.25 - 1 / 0.64) ** -0.5
    assert product == pytest.approx(0.394, abs=5e-4)
    made = GuidedGaussian(EDM(), (2,), 0.25, 0.64, 2.0).flow(torch.full((1, 2), 1e6, dtype=torch.float64), 1e6, 0.0)
    assert float(made[0, 0]) == pytest.approx(0.3125, rel=1e-9)
    guided = Autoguided(*pair(EDM()), 2.0)
    near = torch.tensor([[0.2, -0.1]], dtype=torch.float64)
    torch.testing.assert_close(guided.score(near, 1e-4), -near / product**2, rtol=1e-6, atol=0)


def blurred(world: GaussianMixture, sd: float) -> GaussianMixture:
    """The same law spread out by ``sd``: what a model that has not learned the fine structure believes in."""
    matrices = torch.einsum("kij,kj,klj->kil", world.basis, world.variances, world.basis)
    labels = (world.log_weights[1] > -torch.inf).long()
    weights = world.log_weights[-1].exp()
    return GaussianMixture(world.schedule, weights, world.means, matrices + sd**2 * torch.eye(2), labels)


def test_autoguidance_cleans_a_class_and_keeps_its_branches():
    """With exact models of a branching class, the main one blurred a little and the guide more, autoguidance puts
    samples back into the class and reaches every branch; classifier-free guidance at w = 4 loses branches."""
    world = Fractal(EDM(t_max=5.0), levels=3)
    main, guide = blurred(world, 0.03), blurred(world, 0.06)
    n = 500
    cond = torch.zeros(n, dtype=torch.long)
    level = density_level(world, torch.zeros(1000, dtype=torch.long), 0.99, Rng(1))
    noise = Rng(0).normal(n, 2, dtype=torch.float64)

    def judged(model: Denoiser) -> tuple[float, float]:
        grid = torch.cat([karras(world.schedule, 11), torch.zeros(1, dtype=torch.float64)])
        x = sample(model, n, solver="heun", grid=grid, noise=noise, cond=cond)
        inside = world.log_density(x, 0.0, cond) >= level
        shares = world.branch_shares(0)
        got = torch.bincount(world.branch_of(x[inside], cond[inside]), minlength=len(shares)) / n
        due = shares > 0
        return 1 - float(inside.double().mean()), float((got[due] > 0.1 * shares[due]).double().mean())

    plain, auto, free = (judged(m) for m in (main, Autoguided(main, guide, 2.0), Guided(main, 4.0)))
    # measured: outside 0.204, 0.040, 0.212; branches 1, 1, 5 of 7
    assert plain[0] > 0.15 and auto[0] < 0.08 and free[0] > 0.15
    assert plain[1] == auto[1] == 1 and free[1] < 0.8


def test_the_combination_is_made_in_float32_and_rounded_once():
    """In bfloat16 the result is the exact combination rounded once; the same formula in bfloat16, where a weight of 2.1
    is 2.094, is off by many roundings."""
    rng = Rng(0)
    plain = rng.normal(2000, 1).bfloat16()
    away = (plain.float() + 0.1 * rng.normal(2000, 1)).bfloat16()
    x = torch.zeros(2000, 1, dtype=torch.bfloat16)
    exact = away.double() + 2.1 * (plain.double() - away.double())
    made = Autoguided(Says(plain), Says(away), 2.1)(x, 1.0)
    each = Autoguided(Says(plain), Says(away), torch.full((2000,), 2.1, dtype=torch.float64))(x, 1.0)
    naive = away + torch.tensor(2.1).bfloat16() * (plain - away)
    half = exact.abs() * 2.0**-8 + 1e-7  # one rounding to 8 bits, and float32's own
    assert made.dtype == each.dtype == torch.bfloat16 and torch.equal(made, each)
    assert bool(((made.double() - exact).abs() <= half).all())
    assert not bool(((naive.double() - exact).abs() <= half).all())


def kinds(schedule: Schedule) -> dict[str, tuple[Guidance, Denoiser, CountCalls, CountCalls]]:
    """Both kinds of guidance on labelled rings, the model that they guide, and counters of main model and guide."""
    labels = [0, 1] * 4
    main, guide = (CountCalls(ring(schedule, sd=sd, labels=labels)) for sd in (0.2, 0.4))
    both = CountCalls(ring(schedule, sd=0.2, labels=labels))
    return {
        "autoguidance": (Autoguided(main, guide, 2.5), main.inner, main, guide),
        "classifier-free": (Guided(both, 2.5), both.inner, both, both),
    }


KINDS = ("autoguidance", "classifier-free")


@pytest.mark.parametrize("kind", KINDS)
def test_an_interval_is_guided_inside_and_plain_outside(kind, schedule, gen):
    """On every schedule the same levels are guided, bounds included; outside the main model answers, with one call."""
    guided, plain, main, guide = kinds(schedule)[kind]
    limited = GuidanceInterval(guided, 0.3, 1.7)
    x, cond = torch.randn(6, 2, generator=gen, dtype=torch.float64), torch.arange(6) % 2
    for level, inside in ((0.1, False), (0.299, False), (0.3, True), (0.8, True), (1.7, True), (1.71, False)):
        t = float(schedule.time_at(torch.tensor(-math.log(level), dtype=torch.float64)))
        expected = guided(x, t, cond) if inside else plain(x, t, cond)
        main.calls = guide.calls = 0
        assert torch.equal(limited(x, t, cond), expected)
        calls = 2 if main is guide else 1
        assert (main.calls, guide.calls) == ((calls, calls) if inside else (1, calls - 1 if main is guide else 0))
        assert not torch.equal(guided(x, t, cond), plain(x, t, cond))


def test_a_bound_that_is_a_level_of_the_grid_counts(schedule):
    """Whatever rounding the schedule puts between a noise level and its time."""
    levels = torch.logspace(-1, 0.5, 40, dtype=torch.float64)
    times = schedule.time_at(-levels.log())
    guided = kinds(schedule)["autoguidance"][0]
    for level, t in zip(levels.tolist(), times, strict=True):
        from_here, up_to_here = GuidanceInterval(guided, level, 100.0), GuidanceInterval(guided, 0.0, level)
        assert bool(from_here.inside(t)) and bool(up_to_here.inside(t))
        assert not bool(GuidanceInterval(guided, level * 1.001, 100.0).inside(t))


@pytest.mark.parametrize("kind", KINDS)
def test_an_interval_looks_at_every_samples_own_level(kind, gen):
    """In a batch of several noise levels each sample is treated as if it were alone."""
    guided, plain, _, _ = kinds(FlowMatching())[kind]
    limited = GuidanceInterval(guided, 0.3, 1.7)
    t = torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=torch.float64)  # sigma / alpha 0.11, 0.67, 1.5, 9
    x, cond = torch.randn(4, 2, generator=gen, dtype=torch.float64), torch.tensor([0, 1, 1, 0])
    made, yes, no = limited(x, t, cond), guided(x, t, cond), plain(x, t, cond)
    assert torch.equal(made, torch.stack([no[0], yes[1], yes[2], no[3]]))


def test_an_open_interval_is_guidance_and_the_view_on_another_schedule_agrees(gen):
    """[0, inf] guides everywhere, pure noise included, and ``.on`` keeps the levels."""
    guided = kinds(VPLinear())["autoguidance"][0]
    x, cond = torch.randn(4, 2, generator=gen, dtype=torch.float64), torch.arange(4) % 2
    everywhere = GuidanceInterval(guided, 0.0, math.inf)
    for t in (0.0, 0.5, 1.0):
        assert torch.equal(everywhere(x, t, cond), guided(x, t, cond))
    here = GuidanceInterval(kinds(EDM())["autoguidance"][0], 0.3, 1.7)
    there = GuidanceInterval(kinds(FlowMatching())["autoguidance"][0], 0.3, 1.7).on(EDM())
    for t in (0.2, 0.5, 1.5, 2.0):
        torch.testing.assert_close(here(x, t, cond), there(x, t, cond), **EXACT)


def test_sampling_pays_for_the_guide_inside_the_interval_only():
    """Main model: the solver's own calls.  Guide: the levels of the grid inside."""
    guided, _, main, guide = kinds(EDM())["autoguidance"]
    grid = karras(EDM(), 30)
    sample(GuidanceInterval(guided, 0.3, 1.7), 4, solver="dpmpp-2m", grid=grid)
    inside = int(((grid[:-1] >= 0.3) & (grid[:-1] <= 1.7)).sum())
    assert main.calls == 30 and guide.calls == inside == 5
    main.calls = guide.calls = 0
    sample(guided, 4, solver="dpmpp-2m", grid=grid)
    assert main.calls == guide.calls == 30


def test_no_condition_no_second_call():
    """Classifier-free guidance has nothing to guide between without a condition, inside an interval too; a negative
    condition alone still steers."""
    guided, plain, main, _ = kinds(EDM())["classifier-free"]
    x = torch.ones(3, 2, dtype=torch.float64)
    for model in (guided, GuidanceInterval(guided, 0.0, math.inf)):
        main.calls = 0
        assert torch.equal(model(x, 0.5), plain(x, 0.5)) and main.calls == 1
    away = torch.zeros(3, dtype=torch.long)
    steered = Guided(plain, 2.0, away)(x, 0.5)
    torch.testing.assert_close(steered, 2 * plain(x, 0.5) - plain(x, 0.5, away), **EXACT)


def test_a_weight_for_every_sample(gen):
    """Each sample is guided by its own weight; a wrong number of weights is named."""
    main, guide = pair(EDM())
    x = torch.randn(3, 2, generator=gen, dtype=torch.float64)
    made = Autoguided(main, guide, torch.tensor([1.0, 2.0, 4.0]))(x, 0.5)
    for i, w in enumerate((1.0, 2.0, 4.0)):
        torch.testing.assert_close(made[i], Autoguided(main, guide, w)(x, 0.5)[i], **EXACT)
    with pytest.raises(ValueError, match=r"guidance scale of shape \[2\] for 3 samples: .* \[3\]"):
        Autoguided(main, guide, torch.ones(2))(x, 0.5)


def test_a_guide_that_does_not_fit_is_refused():
    """Other samples, other classes, and intervals that hold nothing."""
    main, other = ring(EDM(), labels=[0, 1] * 4), Gaussian(EDM(), torch.zeros(3), 1.0)
    with pytest.raises(ValueError, match=r"the guide makes samples \[3\], the model \[2\]"):
        Autoguided(main, other, 2.0)
    with pytest.raises(ValueError, match="the guide knows no classes, the model 2"):
        Autoguided(main, ring(EDM()), 2.0)
    for low, high in ((1.0, 1.0), (2.0, 1.0), (-1.0, 1.0), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="need 0 <= low < high"):
            GuidanceInterval(Guided(main, 2.0), low, high)


def test_gradients_reach_state_and_both_models():
    """A guided teacher can be differentiated: forward mode through the state equals its difference, and both models
    have gradients."""
    torch.manual_seed(0)
    good, bad = network(8), network(4)
    guided = GuidanceInterval(Autoguided(good, bad, 2.0), 0.1, 10.0)
    x, dx = torch.randn(5, 2, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    t = torch.linspace(0.05, 1.5, 5, dtype=torch.float64)
    _, slope = torch.func.jvp(lambda y: guided(y, t), (x,), (dx,))
    difference = (guided(x + 1e-6 * dx, t) - guided(x - 1e-6 * dx, t)) / 2e-6
    torch.testing.assert_close(slope, difference, rtol=1e-7, atol=1e-8)
    guided(x, 0.5).square().sum().backward()
    assert all(float(m.net.leave.weight.grad.norm()) > 0 for m in (good, bad))


def network(width: int) -> NetworkDenoiser:
    net = MLP((2,), width=width, blocks=1)
    nn.init.normal_(net.leave.weight)
    return NetworkDenoiser(net.double(), TrigFlow(), TrigPrediction(), (2,))


def recorded(folder: Path, width: int, seed: int) -> Path:
    """A run folder as training leaves it: a model, and snapshots of two averages along a walk of its weights."""
    torch.manual_seed(seed)
    model = network(width)
    weights = list(model.parameters())
    averages = {sigma_rel: Average(Power(sigma_rel), weights) for sigma_rel in (0.05, 0.1)}
    names = [name for name, _ in model.named_parameters()]
    folder.mkdir()
    for n in range(1, 65):
        with torch.no_grad():
            for w in weights:
                w.add_(0.05 * torch.randn_like(w))
        for average in averages.values():
            average.update(weights)
        if n % 8 == 0:
            held = {sigma: dict(zip(names, a.weights, strict=True)) for sigma, a in averages.items()}
            snapshots.write(folder / "snapshots", n, n, held)
    native.save(model.float(), folder / "model")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return recorded(folder / "main", 8, 1), recorded(folder / "guide", 4, 2)


GRID = {"scales": (1.0, 1.5, 2.0), "main_widths": (0.05, 0.08), "guide_widths": (0.1, 0.06)}


@pytest.mark.parametrize(
    "secret",
    [autoguidance.Choice(1.5, 0.05, 0.06, 64), autoguidance.Choice(2.0, 0.08, 0.1, 16)],
    ids=["late", "early"],
)
def test_search_finds_a_choice_that_was_hidden(runs, secret):
    """The score is the distance to a model made of one combination: that combination wins with 0, every other one is
    away from it, and the callback hears of each trial once."""
    x, t = torch.randn(20, 2, generator=torch.Generator().manual_seed(0)), torch.linspace(0.1, 1.4, 20).double()
    target = autoguidance.autoguided(*runs, secret)(x, t)
    told: list[tuple[int, int, autoguidance.Trial]] = []
    trials = autoguidance.search(
        *runs, lambda model: float((model(x, t) - target).norm()), guide_moments=(16, 64), **GRID,
        progress=lambda done, total, trial: told.append((done, total, trial)),
    )  # fmt: skip
    assert trials[0].choice == secret and trials[0].score == 0 and trials[1].score > 1e-3
    assert [t.score for t in trials] == sorted(t.score for t in trials)
    # 2 widths x (2 moments x 2 widths x 2 weights, and the main model alone once)
    assert len(trials) == 18 and [done for done, _, _ in told] == list(range(1, 19)) and {n for _, n, _ in told} == {18}
    assert {trial for _, _, trial in told} == set(trials)


def test_search_puts_failed_trials_last_and_a_run_can_guide_itself(runs):
    """A score that is not finite ranks last; main model and guide may be one run at two moments."""
    main, _ = runs
    scores = iter((math.nan, 3.0, -math.inf, 1.0, 2.0, math.inf))
    trials = autoguidance.search(
        main, main, lambda model: next(scores), scales=(1.5, 2.0, 3.0), main_widths=(0.06,), guide_widths=(0.1,),
        guide_moments=(8, 64),
    )  # fmt: skip
    assert [t.score for t in trials][:3] == [1.0, 2.0, 3.0] and not any(math.isfinite(t.score) for t in trials[3:])
    assert autoguidance.moments(main) == [8, 16, 24, 32, 40, 48, 56, 64]


def test_search_names_what_cannot_be_searched(runs, tmp_path):
    """An empty list, a moment without a snapshot, a run without snapshots, a width that no average has, a student."""
    main, guide = runs
    for bad, message in (
        ({"scales": ()}, "scales is empty"),
        ({"guide_moments": (7,)}, r"guide_moments=\[7\]: .* snapshots after 8, 16"),
        ({"main_widths": (0.5,)}, "sigma_rel=0.5 must lie in"),
    ):
        with pytest.raises(ValueError, match=message):
            autoguidance.search(main, guide, lambda model: 0.0, **GRID | bad)
    native.save(network(8).float(), tmp_path / "model")
    with pytest.raises(FileNotFoundError, match="no snapshots of averages"):
        autoguidance.search(main, tmp_path, lambda model: 0.0, **GRID)
    student = tmp_path / "student"
    (student / "snapshots").mkdir(parents=True)
    for file in (guide / "snapshots").iterdir():
        (student / "snapshots" / file.name).write_bytes(file.read_bytes())
    native.save(Student(Jump(network(4).float()), {1: Plan((1.5,))}), student / "model")
    with pytest.raises(ValueError, match="student: a student, which samples in its own way; name a run of") as found:
        autoguidance.search(main, student, lambda model: 0.0, **GRID)
    assert "\n" not in str(found.value)


def test_fractal_branches_and_region():
    """Branch shares add up to a class and fall with the level; points on a branch are found on it; the region of 99 %
    holds 99 % of fresh samples; the two classes are mirror images."""
    world = Fractal(EDM(), levels=4)
    shares = world.branch_shares(0)
    assert len(shares) == 30 and float(shares.sum()) == pytest.approx(1, abs=1e-12) and float(shares[15:].sum()) == 0
    assert float(shares[0]) > float(shares[1]) > float(shares[14]) > 0
    first = world.branch < 15
    at = world.branch_of(world.means[first], torch.zeros(int(first.sum()), dtype=torch.long))
    assert float((at == world.branch[first]).double().mean()) > 0.9  # where branches meet the nearest may be another
    n = 2000
    cond = torch.zeros(n, dtype=torch.long)
    level = density_level(world, cond, 0.99, Rng(0))
    inside = world.log_density(world.sample(n, Rng(1), cond), 0.0, cond) >= level
    assert float(inside.double().mean()) == pytest.approx(0.99, abs=4 * (2 * 0.99 * 0.01 / n) ** 0.5)
    x = world.sample(50, Rng(2))
    torch.testing.assert_close(
        world.log_density(x, 0.1, torch.zeros(50, dtype=torch.long)),
        world.log_density(x * torch.tensor([-1.0, 1.0]), 0.1, torch.ones(50, dtype=torch.long)),
        rtol=1e-9, atol=1e-9,
    )  # fmt: skip
    with pytest.raises(ValueError, match="levels=0"):
        Fractal(EDM(), levels=0)
