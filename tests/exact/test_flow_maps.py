"""Flow maps: boundaries that hold for every network, and the forms of the papers."""

import copy
import math

import pytest
import torch

from fewstep.denoisers import NetworkDenoiser
from fewstep.discrete_vp import DiscreteVP
from fewstep.exact import Gaussian, GaussianMixture
from fewstep.flow_maps import EDMConsistency, Jump, ddim_move
from fewstep.networks import MLP
from fewstep.predictions import EDMPrediction, Prediction, TrigPrediction, V, Velocity
from fewstep.schedules import EDM, FlowMatching, Schedule, TrigFlow, VPCosine, VPLinear, align

CASES: list[tuple[Schedule, Prediction]] = [
    (EDM(), EDMPrediction()),
    (TrigFlow(), TrigPrediction()),
    (FlowMatching(), Velocity()),
    (VPCosine(), V()),
    (VPLinear(), EDMPrediction()),
    (DiscreteVP.linear(), V(time_scale=0.001)),
]


def random_network(gen, schedule, prediction, extras=(), dtype=torch.float32):
    """An MLP whose every parameter is random, so that nothing is zero by initialisation."""
    net = MLP((3,), width=16, blocks=2, classes=4, extras=extras).to(dtype)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=gen))
    return NetworkDenoiser(net.requires_grad_(False), schedule, prediction, (3,), 4)


def draw(schedule, gen, n=32, dtype=torch.float32):
    """States, falling pairs of times inside the range, labels."""
    u = 0.02 + 0.98 * torch.rand(2, n, generator=gen, dtype=torch.float64).sort(0, descending=True).values
    t, s = schedule.t_min + u * (schedule.t_max - schedule.t_min)
    x = schedule.add_noise(*torch.randn(2, n, 3, generator=gen, dtype=torch.float64), t).to(dtype)
    return x, t, s, torch.randint(4, (n,), generator=gen)


@pytest.mark.parametrize(("schedule", "prediction"), CASES)
@pytest.mark.parametrize("two_times", [False, True])
def test_a_jump_to_the_same_time_is_the_identity(schedule, prediction, two_times, gen):
    """jump(x, t, t) = x to 1e-6 in float32, whatever the network says, and jumps elsewhere are not."""
    model = Jump(random_network(gen, schedule, prediction, ("s",) if two_times else ()), two_times)
    x, t, s, cond = draw(schedule, gen)
    scale = x.abs().amax(1, keepdim=True).clamp_min(1)
    assert float(((model.jump(x, t, t, cond) - x) / scale).abs().max()) < 1e-6
    assert float((model.jump(x, t, s, cond) - x).abs().max()) > 1e-2
    assert torch.equal(model.to_data(x, t, cond), model.jump(x, t, schedule.t_min, cond))


@pytest.mark.parametrize(("schedule", "prediction"), CASES)
def test_a_student_starts_as_its_teachers_ddim_move(schedule, prediction, gen):
    """Jump(copy of the teacher) is alpha_s D + sigma_s eps with the teacher's data and noise."""
    teacher = random_network(gen, schedule, prediction, dtype=torch.float64)
    x, t, s, cond = draw(schedule, gen, dtype=torch.float64)
    expected = schedule.add_noise(teacher(x, t, cond), teacher.eps(x, t, cond), s)
    student = Jump(copy.deepcopy(teacher))
    torch.testing.assert_close(student.jump(x, t, s, cond), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("schedule", "prediction"), CASES)
def test_a_new_target_time_changes_nothing_at_first(schedule, prediction, gen):
    """A two-times network with the teacher's weights and a zero-initialised input s equals the teacher, to 1e-6, until
    that input is trained."""
    teacher = random_network(gen, schedule, prediction)
    net = MLP((3,), width=16, blocks=2, classes=4, extras=("s",)).requires_grad_(False)
    missing = net.load_state_dict(teacher.net.state_dict(), strict=False)
    assert missing.unexpected_keys == [] and missing.missing_keys == ["conditioning.extras.s.weight"]
    student = Jump(NetworkDenoiser(net, schedule, prediction, (3,), 4), two_times=True)
    x, t, s, cond = draw(schedule, gen)
    expected = Jump(teacher).jump(x, t, s, cond)
    torch.testing.assert_close(student.jump(x, t, s, cond), expected, rtol=1e-6, atol=1e-6)
    torch.nn.init.normal_(net.conditioning.extras["s"].weight, generator=gen)
    assert float((student.jump(x, t, s, cond) - expected).abs().max()) > 1e-2


def test_the_target_time_reaches_the_network_as_it_sees_times(gen):
    """s goes through the prediction's time map: changing t and s so that both labels stay gives the same output F."""
    model = random_network(gen, FlowMatching(), Velocity(time_scale=2.0), ("s",), torch.float64)
    x, t, s, cond = draw(FlowMatching(), gen, dtype=torch.float64)
    direct = model(x, t, cond, s=2 * s)
    assert torch.equal(Jump(model, two_times=True).predict(x, t, s, cond), direct)
    with pytest.raises(TypeError, match="no network that is told a time"):
        Jump(Gaussian(EDM(), torch.zeros(3), 1.0), two_times=True).jump(x, 1.0, 0.5)


def test_edm_consistency_boundary_and_papers_form(gen):
    """f(x, t_min) = x for every network, and f = c_skip x + c_out F with the coefficients of the paper."""
    schedule, sd = EDM(), 0.5
    teacher = random_network(gen, schedule, EDMPrediction(sigma_data=sd), dtype=torch.float64)
    model = EDMConsistency(teacher, sd)
    x, t, _, cond = draw(schedule, gen, dtype=torch.float64)
    torch.testing.assert_close(model.to_data(x, schedule.t_min, cond), x, rtol=1e-12, atol=1e-12)
    eps = schedule.t_min
    skip = sd**2 / ((t - eps) ** 2 + sd**2)
    out = sd * (t - eps) / torch.sqrt(t**2 + sd**2)
    expected = align(skip, x) * x + align(out, x) * teacher.raw(x, t, cond)
    torch.testing.assert_close(model.to_data(x, t, cond), expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(model.jump(x, t, eps, cond), expected, rtol=1e-11, atol=1e-11)
    with pytest.raises(ValueError, match=r"jumps to t_min=0.002 only"):
        model.jump(x, t, 0.1, cond)


def test_edm_consistency_starts_as_the_teacher_far_from_the_boundary(gen):
    """At t >> t_min it is the teacher's denoiser, to order eps / t."""
    world = Gaussian(EDM(), torch.tensor([0.5, -0.5]), 0.25)
    x = 5 * torch.randn(8, 2, generator=gen, dtype=torch.float64)
    torch.testing.assert_close(EDMConsistency(world).to_data(x, 20.0), world(x, 20.0), rtol=0, atol=5e-4)


def test_ctm_form_on_edm(gen):
    """G = (s / t) x + (1 - s / t) g on the variance-exploding schedule."""
    teacher = random_network(gen, EDM(), EDMPrediction(), ("s",), torch.float64)
    model = Jump(teacher, two_times=True)
    x, t, s, cond = draw(EDM(), gen, dtype=torch.float64)
    g, carry = model.predict(x, t, s, cond), (s / t)[:, None]
    torch.testing.assert_close(model.jump(x, t, s, cond), carry * x + (1 - carry) * g, rtol=1e-12, atol=1e-12)


def test_scm_form_on_trigflow(gen):
    """f = cos t x - sin t sigma_data F(x / sigma_data, t), and between two times the rotation by t - s."""
    schedule = TrigFlow()
    teacher = random_network(gen, schedule, TrigPrediction(), dtype=torch.float64)
    x, t, s, cond = draw(schedule, gen, dtype=torch.float64)
    raw = teacher.net(x / 0.5, t, cond)

    def rotation(angle):
        return align(torch.cos(angle), x) * x - align(torch.sin(angle), x) * 0.5 * raw

    torch.testing.assert_close(Jump(teacher).to_data(x, t, cond), rotation(t), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(Jump(teacher).jump(x, t, s, cond), rotation(t - s), rtol=1e-11, atol=1e-11)


def test_flow_matching_form(gen):
    """x + (s - t) u: the Euler step of the velocity."""
    teacher = random_network(gen, FlowMatching(), Velocity(), dtype=torch.float64)
    x, t, s, cond = draw(FlowMatching(), gen, dtype=torch.float64)
    expected = x + (s - t)[:, None] * teacher.net(x, t, cond)
    torch.testing.assert_close(Jump(teacher).jump(x, t, s, cond), expected, rtol=1e-11, atol=1e-11)


def test_a_ddim_move_is_the_same_on_every_schedule(schedule, other, gen):
    """In x / alpha the move depends on the two noise levels only (1e-9), here of an exact two-dimensional mixture."""
    means = torch.tensor([[1.0, 0.0], [-1.0, 0.5]])
    world = GaussianMixture(schedule, torch.tensor([1.0, 2.0]), means, torch.tensor([0.2, 0.5]))
    twin = world.on(other)
    rho = torch.tensor([3.0, 0.3], dtype=torch.float64)
    here, there = schedule.time_at(-rho.log()), other.time_at(-rho.log())
    y = 3 * torch.randn(10, 2, generator=gen, dtype=torch.float64)

    def move(model, times):
        t, s = (time.expand(10) for time in times)
        x = align(model.schedule.alpha(t), y) * y
        return Jump(model).jump(x, t, s) / align(model.schedule.alpha(s), y)

    torch.testing.assert_close(move(world, here), move(twin, there), rtol=1e-8, atol=1e-9)


def test_a_jump_with_one_time_per_frame(gen):
    """ddim_move takes [B, F] times and moves every frame by its own."""
    schedule = FlowMatching()
    x, x0 = torch.randn(2, 2, 3, 4, generator=gen, dtype=torch.float64)
    t, s = 0.5 + torch.rand(2, 3, generator=gen, dtype=torch.float64) / 2, torch.rand(2, 3, generator=gen).double() / 2
    moved = ddim_move(x, x0, t, s, schedule)
    for f in range(3):
        torch.testing.assert_close(moved[:, f], ddim_move(x[:, f], x0[:, f], t[:, f], s[:, f], schedule))
    assert math.isclose(float(ddim_move(x, x0, t, 0 * s, schedule).sub(x0).abs().max()), 0, abs_tol=1e-14)
