"""Schedules: coefficients, derivatives, inverses, kernels and the alignment of times."""

import math

import numpy as np
import pytest
import torch

from fewstep.discrete_vp import DiscreteVP
from fewstep.schedules import EDM, FlowMatching, TrigFlow, VPCosine, VPLinear, align, as_time


def inner_times(schedule, gen, n=200):
    """Random times away from the two ends and (for tables) from the knots, where the slope jumps."""
    u = 0.001 + 0.998 * torch.rand(n, generator=gen, dtype=torch.float64)
    t = schedule.t_min + u * (schedule.t_max - schedule.t_min)
    return t.floor() + 0.1 + 0.8 * (t % 1) if isinstance(schedule, DiscreteVP) else t


def test_derivatives_equal_automatic_and_finite_differences(schedule, gen):
    """d_alpha and d_sigma are the derivatives of alpha and sigma, in backward mode, forward mode and by differences."""
    t = inner_times(schedule, gen)
    h = 1e-6 * t  # central differences: error about h^2 f'''/6 + 1e-16 f / h, below 1e-6 relative here
    for value, slope in ((schedule.alpha, schedule.d_alpha), (schedule.sigma, schedule.d_sigma)):
        leaf = t.clone().requires_grad_()
        backward = torch.autograd.grad((value(leaf) + 0 * leaf).sum(), leaf)[0]  # alpha may not depend on t
        forward = torch.func.jvp(value, (t,), (torch.ones_like(t),))[1]
        torch.testing.assert_close(slope(t), backward, rtol=1e-9, atol=1e-13)
        torch.testing.assert_close(slope(t), forward, rtol=1e-9, atol=1e-13)
        torch.testing.assert_close(slope(t), (value(t + h) - value(t - h)) / (2 * h), rtol=1e-5, atol=1e-6)


def test_log_snr_is_half_and_decreasing(schedule, gen):
    """lambda = log(alpha / sigma), strictly decreasing in time, and ratio = exp(-lambda) = sigma / alpha."""
    t = inner_times(schedule, gen).sort().values
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    torch.testing.assert_close(schedule.log_snr(t), torch.log(alpha / sigma), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(schedule.ratio(t), sigma / alpha, rtol=1e-11, atol=0)
    assert bool((schedule.log_snr(t).diff() < 0).all())


def test_time_at_inverts_log_snr(schedule, gen):
    """Both round trips, t -> lambda -> t and lambda -> t -> lambda; beyond the range the ends are returned."""
    t = inner_times(schedule, gen)
    # The inverse loses digits where lambda is flat in t or sigma^2 = -expm1(2 log alpha) is near 0 or 1.
    torch.testing.assert_close(schedule.time_at(schedule.log_snr(t)), t, rtol=1e-8, atol=1e-10 * schedule.t_max)
    lam = schedule.log_snr(t)
    torch.testing.assert_close(schedule.log_snr(schedule.time_at(lam)), lam, rtol=1e-9, atol=1e-9)
    far = torch.tensor([-30.0, 30.0], dtype=torch.float64)
    expected = torch.tensor([schedule.t_max, schedule.t_min], dtype=torch.float64)
    torch.testing.assert_close(schedule.time_at(far), expected, rtol=0, atol=1e-8 * schedule.t_max)


def test_own_time_is_the_familys_index():
    """Karras et al. 2022, eq. 5, from 0.002 to 80 with rho = 7, for EDM whatever its own ends, and in the angle of the
    same level for TrigFlow; shares of the time itself for the others."""
    u = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    levels = torch.tensor([0.002, 0.1698, 2.5152, 17.5278, 80.0], dtype=torch.float64)  # of 5 steps
    torch.testing.assert_close(EDM().own_time(u), levels, rtol=0, atol=5e-5)
    torch.testing.assert_close(EDM(t_max=20.0).own_time(u), levels.clamp(max=20.0), rtol=0, atol=5e-5)
    torch.testing.assert_close(0.5 * torch.tan(TrigFlow().own_time(u)), levels, rtol=0, atol=5e-5)
    for schedule in (VPLinear(), FlowMatching(0.01, 0.99), DiscreteVP.linear()):
        expected = schedule.t_min + (schedule.t_max - schedule.t_min) * u
        torch.testing.assert_close(schedule.own_time(u), expected, rtol=1e-15, atol=0)


def test_ends_of_the_families():
    """TrigFlow from the angle where noise is EDM's 0.002 to that of its 80, at EDM's spread of data."""
    assert float(TrigFlow().ratio(torch.tensor(TrigFlow().t_max, dtype=torch.float64))) == pytest.approx(80, rel=1e-12)
    assert (EDM().t_min, EDM().t_max) == (0.002, 80)


def test_pure_noise_and_pure_data_have_finite_log_snr():
    """The clamp at +-20 holds where alpha or sigma is exactly 0."""
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert FlowMatching().log_snr(ends).tolist() == [20.0, -20.0]
    assert EDM().log_snr(torch.zeros(1, dtype=torch.float64)).tolist() == [20.0]


def test_transition_carries_the_marginal_and_composes(schedule, gen):
    """x_t = a x_s + sd n has the coefficients of time t, and two kernels in a row are the kernel of both."""
    r, s, t = torch.stack([inner_times(schedule, gen, 50) for _ in range(3)]).sort(0).values
    a_rs, sd_rs = schedule.transition(r, s)
    a_st, sd_st = schedule.transition(s, t)
    a_rt, sd_rt = schedule.transition(r, t)
    torch.testing.assert_close(a_st * schedule.alpha(s), schedule.alpha(t), rtol=1e-12, atol=0)
    variance = (a_st * schedule.sigma(s)) ** 2 + sd_st**2
    torch.testing.assert_close(variance, schedule.sigma(t) ** 2, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(a_st * a_rs, a_rt, rtol=1e-12, atol=0)
    torch.testing.assert_close((a_st * sd_rs) ** 2 + sd_st**2, sd_rt**2, rtol=1e-9, atol=1e-12)
    assert float(schedule.transition(t, t)[1].max()) < 1e-6 * float(schedule.sigma(t).max())


def test_noise_velocity_and_prior_agree(schedule, gen):
    """velocity is the time derivative of add_noise, and prior is its value for no data at t_max."""
    x0, eps = torch.randn(2, 20, 3, generator=gen, dtype=torch.float64)
    t = inner_times(schedule, gen, 20)
    noised, moved = torch.func.jvp(lambda u: schedule.add_noise(x0, eps, u), (t,), (torch.ones_like(t),))
    torch.testing.assert_close(schedule.velocity(x0, eps, t), moved, rtol=1e-9, atol=1e-12)
    expected = schedule.alpha(t)[:, None] * x0 + schedule.sigma(t)[:, None] * eps
    torch.testing.assert_close(noised, expected, rtol=1e-14, atol=1e-14)
    last = torch.tensor(schedule.t_max, dtype=torch.float64)
    torch.testing.assert_close(schedule.prior(eps), schedule.add_noise(0 * x0, eps, last), rtol=1e-14, atol=0)


def test_families_lie_on_their_curves(gen):
    """VP on the unit circle, TrigFlow on the circle of noise N(0, sigma_data^2), straight lines, constant signal."""
    for vp in (VPLinear(), VPCosine(), DiscreteVP.linear()):
        t = inner_times(vp, gen)
        torch.testing.assert_close(vp.alpha(t) ** 2 + vp.sigma(t) ** 2, torch.ones_like(t), rtol=0, atol=1e-14)
    t = torch.rand(50, generator=gen, dtype=torch.float64)
    trig = TrigFlow(sigma_data=0.7)
    torch.testing.assert_close(trig.ratio(t), 0.7 * torch.tan(t), rtol=1e-12, atol=0)
    assert torch.equal(FlowMatching().alpha(t) + FlowMatching().sigma(t), torch.ones_like(t))
    assert torch.equal(EDM().alpha(t), torch.ones_like(t)) and torch.equal(EDM().sigma(t), t)
    ends = VPCosine().log_snr(torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([10.0, -10.0], dtype=torch.float64), rtol=0, atol=1e-8)
    # Song et al. 2021: alpha(t) = exp(-1/2 int beta), beta from 0.1 to 20; at t = 1 the integral is 10.05.
    assert float(VPLinear().alpha(torch.tensor(1.0, dtype=torch.float64))) == pytest.approx(math.exp(-5.025), rel=1e-14)


@pytest.mark.parametrize(
    ("make", "betas"),
    [
        (DiscreteVP.linear, np.linspace(1e-4, 2e-2, 1000)),
        (DiscreteVP.scaled_linear, np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2),
    ],
)
def test_discrete_table_at_integers(make, betas):
    """At integer times alpha^2 is the cumulative product of 1 - beta, exactly, and time_at finds the integer."""
    table, schedule = np.cumprod(1 - betas), make()
    t = torch.arange(1000, dtype=torch.float64)
    torch.testing.assert_close(schedule.alpha(t) ** 2, torch.from_numpy(table), rtol=1e-12, atol=0)
    torch.testing.assert_close(schedule.sigma(t) ** 2, torch.from_numpy(1 - table), rtol=1e-10, atol=0)
    torch.testing.assert_close(schedule.time_at(schedule.log_snr(t)), t, rtol=0, atol=1e-7)
    assert (schedule.t_min, schedule.t_max) == (0.0, 999.0)
    middle = schedule.alpha(torch.tensor(10.5, dtype=torch.float64)).log() * 2  # log alpha is linear between
    assert float(middle) == pytest.approx((math.log(table[10]) + math.log(table[11])) / 2, rel=1e-12)


@pytest.mark.parametrize(("name", "rtol"), [("linear", 2e-6), ("scaled_linear", 2e-6), ("squaredcos_cap_v2", 2e-5)])
def test_discrete_table_equals_diffusers(name, rtol):
    """The same tables as diffusers' DDPMScheduler (float32 there; measured 4e-7, 1e-6 and 1.3e-5 relative)."""
    from diffusers import DDPMScheduler

    beta_range = {"beta_start": 0.00085, "beta_end": 0.012} if name == "scaled_linear" else {}
    theirs = DDPMScheduler(beta_schedule=name, **beta_range).alphas_cumprod.double()
    make = {"linear": DiscreteVP.linear, "scaled_linear": DiscreteVP.scaled_linear}.get(name, DiscreteVP.cosine)
    ours = make().alpha(torch.arange(1000, dtype=torch.float64)) ** 2
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=0)


def test_align_views_times_along_leading_dimensions():
    """[], [B], [B, F] and broadcast ones multiply x along its leading dimensions, in its type."""
    x = torch.ones(2, 3, 4, 5, dtype=torch.float32)
    for shape in ((), (2,), (1,), (2, 3), (2, 1)):
        c = torch.rand(shape, dtype=torch.float64)
        view = align(c, x)
        assert view.dtype == torch.float32 and view.shape == shape + (1,) * (4 - len(shape))
        expected = c.float().reshape(shape + (1,) * (4 - len(shape))).expand_as(x)
        assert torch.equal(view * x, expected)


@pytest.mark.parametrize("shape", [(3,), (2, 4), (2, 3, 5), (2, 3, 4, 5, 1)])
def test_align_refuses_what_does_not_fit(shape):
    """A trailing match, a wrong batch or more dimensions than the state are errors that name both shapes."""
    with pytest.raises(ValueError, match=r"times of shape .* do not align .* \[2, 3, 4, 5\]"):
        align(torch.ones(shape), torch.ones(2, 3, 4, 5))


def test_as_time_is_float64_per_sample():
    """A number, a 0-dim tensor or [B] becomes float64 [B]; [B, F] stays."""
    x = torch.zeros(4, 2)
    for t in (0.3, torch.tensor(0.3, dtype=torch.float64)):
        assert torch.equal(as_time(t, x), torch.full((4,), 0.3, dtype=torch.float64))
    assert as_time(torch.rand(4, 2), x).shape == (4, 2) and as_time(torch.rand(4), x).dtype == torch.float64


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EDM(t_min=1.0, t_max=1.0), "0 <= t_min < t_max"),
        (lambda: FlowMatching(t_min=-0.1), "t_min=-0.1"),
        (lambda: EDM(t_max=math.inf), "finite"),
        (lambda: VPLinear(beta_min=3.0, beta_max=2.0), "beta_min < beta_max"),
        (lambda: TrigFlow(sigma_data=0.0), "sigma_data=0 must be positive"),
        (lambda: TrigFlow(t_max=1.6), "pi/2"),
        (lambda: DiscreteVP((0.9,)), "at least two"),
        (lambda: DiscreteVP((0.9, 0.9)), "strictly decreasing"),
        (lambda: DiscreteVP.from_betas([0.1, 1.0]), r"in \(0, 1\)"),
    ],
)
def test_bad_schedules_are_refused(make, message):
    """One clear line that names the field."""
    with pytest.raises(ValueError, match=message):
        make()
