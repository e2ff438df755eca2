"""Denoisers: predictions, change of schedule, guidance, thresholding and gradient modes."""

import math

import pytest
import torch
from torch import nn

from fewstep.denoisers import Clipped, CountCalls, Denoiser, DynamicThreshold, NetworkDenoiser, OnSchedule, gradients
from fewstep.exact import Gaussian, GaussianMixture, ring, three_modes
from fewstep.guidance import Autoguided, Guided
from fewstep.networks import MLP
from fewstep.predictions import PREDICTIONS, EDMPrediction, TrigPrediction, V, Velocity
from fewstep.schedules import EDM, FlowMatching, TrigFlow, VPLinear, align

ATOL = {"rtol": 0, "atol": 1e-10}


class Fixed(nn.Module):
    """A network that returns what it was given, and keeps what it saw."""

    def __init__(self, out):
        super().__init__()
        self.out = out

    def forward(self, x, t, cond=None, **extras):
        self.seen = x, t, cond
        return self.out


def times(schedule, gen, n):
    return schedule.t_min + (0.02 + 0.96 * torch.rand(n, generator=gen, dtype=torch.float64)) * (
        schedule.t_max - schedule.t_min
    )


@pytest.mark.parametrize("name", PREDICTIONS)
def test_every_prediction_round_trips(name, schedule, gen):
    """A network that returns the training target makes a denoiser that returns the data exactly."""
    t = times(schedule, gen, 64)
    x0, eps = torch.randn(2, 64, 3, generator=gen, dtype=torch.float64)
    x = schedule.add_noise(x0, eps, t)
    prediction = PREDICTIONS[name]()
    net = Fixed(prediction.target(x, x0, schedule, t))
    torch.testing.assert_close(NetworkDenoiser(net, schedule, prediction, (3,))(x, t), x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(net.seen[0], align(prediction.coefficients(schedule, t)[2], x) * x)
    torch.testing.assert_close(net.seen[1], prediction.time(schedule, t))


@pytest.mark.parametrize("name", ["x0", "eps", "v", "velocity"])
def test_targets_are_what_the_names_say(name, schedule, gen):
    """The four classical targets in terms of data and noise; v only is tied to a circle, here by its own formula."""
    t = times(schedule, gen, 32)
    x0, eps = torch.randn(2, 32, 3, generator=gen, dtype=torch.float64)
    x = schedule.add_noise(x0, eps, t)
    alpha, sigma = align(schedule.alpha(t), x), align(schedule.sigma(t), x)
    expected = {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0, "velocity": schedule.velocity(x0, eps, t)}[name]
    torch.testing.assert_close(PREDICTIONS[name]().target(x, x0, schedule, t), expected, rtol=1e-9, atol=1e-8)


def test_edm_and_trig_are_one_preconditioning_up_to_sign(schedule, gen):
    """Same skip and input scale, opposite output scale; the EDM table of the paper on its own schedule."""
    t = times(schedule, gen, 64)
    edm = EDMPrediction(sigma_data=0.7).coefficients(schedule, t)
    trig = TrigPrediction(sigma_data=0.7).coefficients(schedule, t)
    torch.testing.assert_close(trig[0], edm[0], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(trig[1], -edm[1], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(trig[2], edm[2], rtol=1e-12, atol=1e-15)
    angle = TrigPrediction(sigma_data=0.7).time(schedule, t)
    torch.testing.assert_close(0.7 * torch.tan(angle), schedule.ratio(t), rtol=1e-9, atol=0)
    torch.testing.assert_close(EDMPrediction().time(schedule, t), schedule.ratio(t).log() / 4, rtol=1e-12, atol=1e-14)


def test_edm_table_of_the_paper():
    """Karras et al. 2022, table 1, at sigma = 2 with sigma_data = 0.5; the target has unit variance."""
    two = torch.tensor([2.0], dtype=torch.float64)
    skip, out, c_in = EDMPrediction().coefficients(EDM(), two)
    assert float(skip) == pytest.approx(0.25 / 4.25) and float(out) == pytest.approx(1 / math.sqrt(4.25))
    assert float(c_in) == pytest.approx(1 / math.sqrt(4.25))
    # target = a x0 + b eps with x0 of variance 1/4: (1 - skip)^2 / 4 + (skip sigma)^2 = out^2
    assert float((1 - skip) ** 2 / 4 + (2 * skip) ** 2) == pytest.approx(float(out) ** 2)


def test_time_scale_and_types(gen):
    """The network's time input is scaled, stays float32 for half-precision states and float64 for float64 ones."""
    for dtype, expected in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ):
        net = Fixed(torch.zeros(2, 3, dtype=dtype))
        model = NetworkDenoiser(net, FlowMatching(), Velocity(time_scale=1000.0), (3,))
        out = model(torch.ones(2, 3, dtype=dtype), 0.25)
        assert out.dtype == dtype and net.seen[0].dtype == dtype and net.seen[1].dtype == expected
        assert net.seen[1].tolist() == [250.0, 250.0]


def worlds(schedule):
    covariance = torch.tensor([[1.0, 0.4], [0.4, 0.5]])
    return (
        Gaussian(schedule, torch.tensor([0.3, -1.0]), covariance),
        GaussianMixture(
            schedule,
            torch.tensor([1.0, 2.0]),
            torch.tensor([[1.0, 0.0], [-1.0, 0.5]]),
            torch.stack([covariance, covariance / 4]),
        ),
    )


def test_on_another_schedule_is_exact_between_all_pairs(schedule, other, gen):
    """Matching the signal-to-noise ratio: the denoiser seen on another schedule is the one rebuilt there (1e-10)."""
    ends = torch.tensor([schedule.t_min, schedule.t_max, other.t_min, other.t_max], dtype=torch.float64)
    lam = torch.cat([schedule.log_snr(ends[:2]), other.log_snr(ends[2:])]).clamp(-6, 6)
    low, high = max(lam[1], lam[3]), min(lam[0], lam[2])  # the noise levels that both reach
    t = other.time_at(low + (high - low) * (0.01 + 0.98 * torch.rand(64, generator=gen, dtype=torch.float64)))
    for world in worlds(schedule):
        x0, eps = torch.randn(2, 64, 2, generator=gen, dtype=torch.float64)
        x = other.add_noise(x0, eps, t)
        seen, rebuilt = OnSchedule(world, other), world.on(other)
        assert rebuilt.schedule == other and (rebuilt is world) == (schedule == other)
        torch.testing.assert_close(seen(x, t), rebuilt(x, t), **ATOL)
        torch.testing.assert_close(seen.eps(x, t), rebuilt.eps(x, t), rtol=0, atol=1e-8)  # D's error over sigma / alpha
        assert seen.on(schedule) is world


@pytest.mark.parametrize("prediction", [EDMPrediction(), TrigPrediction(), Velocity(), V()])
def test_a_network_on_another_schedule(prediction, gen):
    """A network made on one schedule is the same denoiser of x_0 and noise level on the other, and there and back is
    the network itself."""
    net = MLP((3,), width=16, blocks=1).double()
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(0, 0.3, generator=gen)
    there = NetworkDenoiser(net, FlowMatching(), prediction, (3,))
    on_edm = there.on(EDM(t_min=0.01))
    y = torch.randn(8, 3, generator=gen, dtype=torch.float64)
    rho = torch.logspace(-1.5, 1, 8, dtype=torch.float64)
    t = rho / (1 + rho)
    torch.testing.assert_close(on_edm(y, rho), there(y / (1 + rho)[:, None], t), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(on_edm.on(FlowMatching())(y, t), there(y, t), rtol=1e-9, atol=1e-9)
    assert there.on(FlowMatching()) is there or prediction.portable


def test_noise_score_and_velocity_follow_from_the_denoiser(schedule, gen):
    """x = alpha D + sigma eps, score = -eps / sigma, velocity = alpha' D + sigma' eps where only D is given."""
    t, x = times(schedule, gen, 16), torch.randn(16, 3, generator=gen, dtype=torch.float64)
    x0 = torch.randn(16, 3, generator=gen, dtype=torch.float64)
    model = NetworkDenoiser(Fixed(x0), schedule, PREDICTIONS["x0"](), (3,))
    eps = model.eps(x, t)
    torch.testing.assert_close(schedule.add_noise(x0, eps, t), x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.score(x, t), -eps / schedule.sigma(t)[:, None], rtol=1e-12, atol=0)
    torch.testing.assert_close(model.velocity(x, t), schedule.velocity(x0, eps, t), rtol=1e-12, atol=0)


@pytest.fixture
def classes():
    return ring(VPLinear(), labels=[0, 1, 2, 0, 1, 2, 0, 1])


def test_guidance_is_linear_with_a_weight_per_sample(classes, gen):
    """w = 1 is the conditional model, w = 0 the unconditional one, and a vector of weights acts per sample."""
    x, t = torch.randn(6, 2, generator=gen, dtype=torch.float64), 0.4
    cond = torch.tensor([0, 1, 2, 0, 1, 2])
    yes, no = classes(x, t, cond), classes(x, t)
    assert (yes - no).abs().amin(1).max() > 1e-3  # the two branches differ, so the next lines can fail
    torch.testing.assert_close(Guided(classes, 1.0)(x, t, cond), yes, **ATOL)
    assert torch.equal(Guided(classes, 0.0)(x, t, cond), no)
    assert torch.equal(Guided(classes, 3.0)(x, t), no)
    w = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 7.5], dtype=torch.float64)
    torch.testing.assert_close(Guided(classes, w)(x, t, cond), no + w[:, None] * (yes - no), **ATOL)
    negative = torch.full((6,), 1)
    away = classes(x, t, negative)
    torch.testing.assert_close(Guided(classes, 4.0, negative)(x, t, cond), away + 4 * (yes - away), **ATOL)


def test_guidance_acts_alike_on_data_noise_and_velocity(classes, gen):
    """Guidance is linear, so the guided noise, score and velocity are the guided combinations of the branches'."""
    x, t, cond = torch.randn(5, 2, generator=gen, dtype=torch.float64), 0.6, torch.tensor([0, 1, 2, 1, 0])
    guided = Guided(classes, 3.0)
    for name in ("eps", "score", "velocity"):
        yes, no = getattr(classes, name)(x, t, cond), getattr(classes, name)(x, t)
        torch.testing.assert_close(getattr(guided, name)(x, t, cond), no + 3 * (yes - no), rtol=1e-9, atol=1e-9)


def test_guided_mixture_against_its_components(gen):
    """Two classes of a 1-D mixture: the guided denoiser from the textbook posterior of each component."""
    world = three_modes(VPLinear(), labels=[0, 1, 0])
    x, t, w = torch.randn(40, 1, generator=gen, dtype=torch.float64), 0.3, 2.5
    time = torch.tensor(t, dtype=torch.float64)
    a, s = world.schedule.alpha(time), world.schedule.sigma(time)
    weight = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
    mean = torch.tensor([-1.2, 0.3, 1.5], dtype=torch.float64)
    sd = torch.tensor([0.3, 0.35, 0.3], dtype=torch.float64)
    v = a**2 * sd**2 + s**2
    likelihood = weight * torch.exp(-((x - a * mean) ** 2) / (2 * v)) / v.sqrt()
    per_component = mean + a * sd**2 * (x - a * mean) / v

    def average(keep):
        p = likelihood * torch.tensor(keep)
        return (p * per_component).sum(1, keepdim=True) / p.sum(1, keepdim=True)

    both, first = average([1.0, 1.0, 1.0]), average([1.0, 0.0, 1.0])
    guided = Guided(world, w)(x, t, torch.zeros(40, dtype=torch.long))
    torch.testing.assert_close(guided, both + w * (first - both), rtol=1e-12, atol=1e-12)
    mixed = torch.arange(40) % 2 - 1  # -1 is the null label
    torch.testing.assert_close(world(x, t, mixed), torch.where((mixed < 0)[:, None], both, first), **ATOL)


def test_autoguidance_puts_the_bad_model_on_the_good_ones_schedule(gen):
    """D_bad + w (D_good - D_bad) with the bad model given on another schedule."""
    good, bad = Gaussian(FlowMatching(), torch.zeros(2), 0.25), Gaussian(EDM(), torch.zeros(2), 1.0)
    x, t = torch.randn(5, 2, generator=gen, dtype=torch.float64), 0.3
    here = Gaussian(FlowMatching(), torch.zeros(2), 1.0)(x, t)
    torch.testing.assert_close(Autoguided(good, bad, 2.0)(x, t), here + 2 * (good(x, t) - here), **ATOL)


def predicting(x0):
    return NetworkDenoiser(Fixed(x0), TrigFlow(), PREDICTIONS["x0"](), tuple(x0.shape[1:]))


def test_dynamic_threshold(gen):
    """Identity where |D| <= 1, within [-1, 1] always, the quantile rule of the paper, and one sample does not see the
    others of its batch."""
    small = torch.rand(4, 3, 8, 8, generator=gen, dtype=torch.float64) * 2 - 1
    assert torch.equal(DynamicThreshold(predicting(small))(small, 0.5), small)
    large = torch.randn(6, 3, 8, 8, generator=gen, dtype=torch.float64) * torch.logspace(-1, 1, 6).reshape(-1, 1, 1, 1)
    out = DynamicThreshold(predicting(large))(large, 0.5)
    assert float(out.abs().max()) <= 1
    for i in range(6):
        alone = DynamicThreshold(predicting(large[i : i + 1]))(large[i : i + 1], 0.5)
        assert torch.equal(alone[0], out[i])
        q = max(1.0, float(torch.quantile(large[i].abs().flatten(), 0.995)))
        torch.testing.assert_close(out[i], large[i].clamp(-q, q) / q, **ATOL)


def test_static_threshold(gen):
    """Clamped to the given range, identity inside it."""
    x0 = torch.randn(6, 5, generator=gen, dtype=torch.float64) * 2
    assert torch.equal(Clipped(predicting(x0), -0.5, 2.0)(x0, 0.5), x0.clamp(-0.5, 2.0))
    assert float(Clipped(predicting(x0))(x0, 0.5).abs().max()) == 1.0


def test_calls_are_counted(classes):
    """Guidance costs two calls of the model inside."""
    counted = CountCalls(classes)
    Guided(counted, 2.0)(torch.zeros(1, 2), 0.5, torch.tensor([1]))
    counted(torch.zeros(1, 2), 0.5)
    assert counted.calls == 3


def network():
    net = MLP((2,), width=8, blocks=1)
    nn.init.normal_(net.leave.weight)
    return NetworkDenoiser(net, FlowMatching(), Velocity(), (2,))


def call(model: Denoiser, mode):
    x = torch.ones(3, 2, requires_grad=True)
    with gradients(model, mode):
        out = model(x, 0.5)
    if out.requires_grad:
        out.sum().backward()
    return x, out


def test_mode_none_makes_no_graph():
    """No gradient reaches anything."""
    model = network()
    x, out = call(model, "none")
    assert not out.requires_grad and x.grad is None and all(p.grad is None for p in model.parameters())


def test_mode_input_holds_the_parameters_and_restores_them():
    """The state has a gradient, the parameters have none, frozen ones stay frozen, also when the call raises."""
    model = network()
    frozen = model.net.enter.bias
    frozen.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    x, _ = call(model, "input")
    assert x.grad is not None and float(x.grad.abs().sum()) > 0
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == before and not frozen.requires_grad
    with pytest.raises(RuntimeError, match="on purpose"), gradients(model, "input"):
        raise RuntimeError("on purpose")
    assert [p.requires_grad for p in model.parameters()] == before


def test_mode_all_differentiates_both_as_a_plain_call_does():
    """Input and parameter gradients are those of the bare call."""
    model, bare = network(), network()
    bare.load_state_dict(model.state_dict())
    x, _ = call(model, "all")
    y = torch.ones(3, 2, requires_grad=True)
    bare(y, 0.5).sum().backward()
    assert torch.equal(x.grad, y.grad)
    for p, q in zip(model.parameters(), bare.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) and (p.grad is None or torch.equal(p.grad, q.grad))
