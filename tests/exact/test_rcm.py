"""rCM: the warmed tangent, the student's own rollouts, the two scores on them, and who moves when."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.data import Dataset, Prior
from fewstep.denoisers import Denoiser, NetworkDenoiser
from fewstep.exact import ExactFlowMap, Gaussian
from fewstep.flow_maps import FlowMap
from fewstep.methods.consistency.rcm import RCM, frames, last_call, student_direction, trig_reach
from fewstep.methods.method import Batch, Networks, Optimizer, Progress
from fewstep.methods.parts.identities import eulerian
from fewstep.methods.parts.score_matching import matching_vector, velocity_loss
from fewstep.methods.parts.times import LogNormal, ShiftedUniform
from fewstep.methods.start import Start
from fewstep.networks import MLP, UNet3d, unet
from fewstep.predictions import TrigPrediction, Velocity
from fewstep.randomness import Rng
from fewstep.runs.course import run_recipe
from fewstep.schedules import EDM, FlowMatching, Schedule, TrigFlow, align
from fewstep.tangents import finite_difference, semi_continuous, tangent
from fewstep.training.budget import Budget
from fewstep.training.settings import Settings

F64 = torch.float64
SD = 0.5
SCHEDULE = TrigFlow(sigma_data=SD)
PUBLISHED: dict[str, Any] = {
    # paper, table of hyper-parameters (Cosmos for pictures, Wan 1.3B for video), and NVlabs/rcm, rcm/configs/
    # experiments/rcm/wan2pt1_t2v.py and rcm/models/t2v_model_distill_rcm.py, whose guidance of 5 is added to 1
    "lr": 2e-6, "critic_lr": 4e-7, "sigma_data": 1.0, "c": 0.1, "guidance": 6.0, "consistency_weight": 1.0,
    "matching_weight": 0.01, "tangent_warmup": 0.1, "student_every": 5, "rollout_steps": 4, "noise_mean": -0.8,
    "noise_std": 1.6, "matching_mean": 0.0, "matching_std": 1.6, "matching_shift": None, "frame_noise": True,
    "difference": 0.0, "sigma_max": 80.0, "steps": (1, 2, 3, 4),
    "optimizer": {
        "kind": "adamw", "betas": (0.0, 0.999), "eps": 1e-8, "weight_decay": 0.01, "clip": None, "warmup": ...,
        "decay": ...,
    },
}  # fmt: skip


def moved(module: nn.Module, by: float = 0.2, seed: int = 0) -> None:
    """Weights away from where they are, always in the same way."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data += by * torch.randn(p.shape, generator=generator, dtype=p.dtype)


def teacher(schedule: Schedule = SCHEDULE, classes: int | None = 2, kind: torch.dtype = F64) -> NetworkDenoiser:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = MLP((3,), 16, 2, classes)
    moved(net)
    return NetworkDenoiser(net, schedule, TrigPrediction(sigma_data=SD), (3,), classes).to(kind)


def batch_of(n: int = 8, seed: int = 0) -> Batch:
    x = SD * torch.randn(n, 3, dtype=F64, generator=torch.Generator().manual_seed(1))
    return Batch(x, torch.arange(n) % 2, Rng(seed))


def networks(method: RCM, source: Denoiser | None = None) -> Networks:
    """Its networks, all away from the teacher."""
    nets = method.networks(Start(source or teacher()))
    moved(nets.student, 0.05, 1)
    if method.matching_weight:
        moved(nets.critic, 0.05, 2)
    return nets


def slopes(module: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None] or [torch.zeros(1)])


# --- the tangent -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [0.0, 0.3, 1.0])
def test_the_direction_is_the_published_one(r: float) -> None:
    """``cos sqrt(1 - r^2 sin^2) (F - v) + r (cos sin x + J)`` by a jvp written out; at r = 0 velocity matching with the
    weight cos t, where sCM's is cos^2 t; at r = 1 sCM's, bit for bit."""
    student = networks(RCM()).student
    x, t = batch_of().x, torch.linspace(0.05, 1.5, 8, dtype=F64)
    v = torch.randn(8, 3, dtype=F64, generator=torch.Generator().manual_seed(2))
    own = student_direction(student, x, t, v, None, r=r)
    cos, sin = t.cos()[:, None], t.sin()[:, None]
    f, j = torch.func.jvp(student.denoiser.velocity, (x, t), (cos * sin * v, t.cos() * t.sin()))
    expected = cos * (1 - r**2 * sin**2).sqrt() * (f - v) + r * (cos * sin * x + j)
    torch.testing.assert_close(own.F, f, atol=1e-13, rtol=0)
    torch.testing.assert_close(own.g, expected, atol=1e-12, rtol=0)
    scm = eulerian(student, x, t, torch.zeros_like(t), v, r=r, scale=t.cos()).g
    assert torch.equal(own.g, scm) == (r == 1)


@pytest.mark.parametrize("c", [SD, 0.2, 1.3])
def test_the_direction_is_zero_at_the_exact_solution(c: float) -> None:
    """Of a Gaussian, ``F* = -tan(t / 2) x`` where it is white; beside it, and with another warm-up, it is not."""
    world = Gaussian(SCHEDULE, torch.zeros(3, dtype=F64), c**2)
    x, t = batch_of(32).x, torch.linspace(0.05, 1.5, 32, dtype=F64)
    v = world.velocity(x, t)
    student = ExactFlowMap(world)
    own = student_direction(student, x, t, v, None, r=1.0)
    assert float(own.g.abs().max()) < 1e-12
    if c == SD:
        torch.testing.assert_close(own.F, -torch.tan(t / 2)[:, None] * x, atol=1e-12, rtol=0)
    assert float(student_direction(student, x, t, v + 0.05 * x, None, r=1.0).g.abs().max()) > 1e-3
    assert float(student_direction(student, x, t, v, None, r=0.5).g.abs().max()) > 1e-3


def test_the_semi_continuous_tangent_nears_the_exact_one() -> None:
    """Exact in the state, first order in the step of time: a tenth of the step, a tenth of the error.  Both are minus
    the slope of ``f`` along the trajectory, by central differences."""
    student = networks(RCM()).student
    x, t = batch_of().x, torch.linspace(0.05, 1.5, 8, dtype=F64)
    v = teacher().velocity(x, t)
    exact = student_direction(student, x, t, v, None, r=1.0).g
    errors = [
        float((student_direction(student, x, t, v, None, r=1.0, difference=h).g - exact).abs().max())
        for h in (1e-3, 1e-4)
    ]
    assert 0 < errors[1] < 1e-4 and errors[0] / errors[1] == pytest.approx(10, rel=0.01)
    _, slope = finite_difference(student.denoiser.forward, x, t, v, torch.ones_like(t), step=1e-5)
    torch.testing.assert_close(exact, -t.cos()[:, None] * slope, atol=2e-8, rtol=1e-6)
    still = torch.zeros_like(t)
    held = semi_continuous(student.denoiser.velocity, x, t, v, still)[1]
    torch.testing.assert_close(held, tangent(student.denoiser.velocity, x, t, v, still)[1], atol=1e-14, rtol=0)


# --- the two terms and their balance -----------------------------------------------------------------------------


def test_both_norms_are_sums_over_a_sample() -> None:
    """``L = (n / (n + c))^2 + 0.01 ||q||^2`` with n the norm of g and q the matching vector, as they are drawn."""
    method = RCM(tangent_warmup=0.0)
    nets, given = networks(method), batch_of()
    (update,) = method.updates(nets, given, Progress(0))
    rng, schedule, cond = Rng(0), nets.student.schedule, given.cond
    t = LogNormal(-0.8, 1.6).draw(schedule, 8, rng)
    x_t = schedule.add_noise(given.x, rng.normal_like(given.x), t)
    own = student_direction(nets.student, x_t, t, nets.teacher.velocity(x_t, t, cond), cond, r=1.0)
    n = own.g.norm(dim=1)
    law, calls = LogNormal(0.0, 1.6), 1 + rng.shared_integer(0, 4)
    state, time = last_call(nets.student, rng.normal(8, 3, dtype=F64), calls, law, rng, cond)
    with torch.no_grad():
        x = nets.student.to_data(state, time, cond)
    tau = law.draw(schedule, 8, rng)
    x_tau = schedule.add_noise(x, rng.normal_like(x), tau)
    fake, real = nets.critic(x_tau, tau, cond), nets.teacher(x_tau, tau, cond)
    q = (fake - real) / (x - real).abs().mean(1, keepdim=True)
    expected = ((n / (n + 0.1)) ** 2).mean(), q.square().sum(1).mean()
    torch.testing.assert_close(update.logs["consistency"], expected[0])
    torch.testing.assert_close(update.loss.detach(), expected[0] + 0.01 * expected[1].detach())
    assert float(expected[1]) > 1e-6


def test_the_gradients_are_along_g_and_q() -> None:
    """In the output of a student that is its own samples: 2 weight q of the matching, nothing through the scores."""

    class Itself(FlowMap):
        """``x = p`` whatever the noise."""

        def __init__(self) -> None:
            super().__init__(nets.student.schedule, (3,), 2)
            self.p = nn.Parameter(torch.full((8, 3), 0.3, dtype=F64))

        def forward(self, x, t, s, cond=None):
            return self.p

    method = RCM(consistency_weight=0.0, matching_weight=0.7, rollout_steps=1)
    nets = networks(method)
    nets.student = Itself()
    (update,) = method.updates(nets, batch_of(), Progress(0))
    update.loss.backward()
    rng, schedule = Rng(0), nets.student.schedule
    rng.shared_integer(0, 1)
    rng.normal(8, 3, dtype=F64)
    x, tau = nets.student.p.detach(), LogNormal(0.0, 1.6).draw(schedule, 8, rng)
    x_tau = schedule.add_noise(x, rng.normal_like(x), tau)
    q = matching_vector(x, x_tau, tau, nets.teacher, nets.critic, batch_of().cond)
    torch.testing.assert_close(nets.student.p.grad, 2 * 0.7 * q / 8, atol=1e-12, rtol=1e-10)


class Scaled(FlowMap):
    """A student whose samples are N(0, a^2) after any number of calls: ``f = a x / sqrt(a^2 cos^2 t + sin^2 t)``."""

    def __init__(self, a: float) -> None:
        super().__init__(TrigFlow(t_max=math.pi / 2, sigma_data=1.0), (1,), None)
        self.a = nn.Parameter(torch.tensor(a, dtype=F64))

    def forward(self, x, t, s, cond=None):
        spread = ((self.a.detach() * t.cos()).square() + t.sin().square()).sqrt()
        return self.a * x / align(spread, x)


def gaussian_nets(student: Scaled, c: float) -> Networks:
    """With the critic of the student's own law, and a teacher of deviation c."""
    worlds = {
        name: Gaussian(student.schedule, torch.zeros(1, dtype=F64), spread**2)
        for name, spread in (("critic", float(student.a)), ("teacher", c))
    }
    return Networks({"student": student, **worlds}, {"student": Optimizer(("student",), 1e-2)})


def test_the_score_of_the_students_law_is_the_closed_form_and_the_gap_has_its_sign() -> None:
    """``D_critic = cos a^2 / (a^2 cos^2 + sin^2) x``; q is 0 at every state if and only if a = c, and along x where the
    student is too wide."""
    t, x = torch.linspace(0.1, 1.5, 8, dtype=F64), torch.linspace(-2, 2, 8, dtype=F64)[:, None]
    for a in (0.5, 0.9, 1.6):
        nets = gaussian_nets(Scaled(a), 0.9)
        fake = nets.critic(x, t)
        closed = (t.cos() * a**2 / ((a * t.cos()) ** 2 + t.sin() ** 2))[:, None] * x
        torch.testing.assert_close(fake, closed, atol=1e-14, rtol=1e-14)
        q = matching_vector(x, x, t, nets.teacher, nets.critic)
        assert bool((q.sign() == math.copysign(1.0, a - 0.9) * x.sign()).all()) if a != 0.9 else not bool(q.any())


@pytest.mark.parametrize("a", [0.4, 2.0])
def test_matching_alone_finds_the_spread_of_the_data(a: float) -> None:
    """From too narrow and too wide, over rollouts of one to four calls, with the exact critic of the student's law."""
    student = Scaled(a)
    method = RCM(consistency_weight=0.0, sigma_data=1.0)
    optimiser = torch.optim.Adam(student.parameters(), lr=0.05)
    for step in range(150):
        optimiser.param_groups[0]["lr"] = 0.05 * (1 - step / 150)
        given = Batch(torch.zeros(32, 1, dtype=F64), None, Rng(step))
        loss, _ = method.matching(gaussian_nets(student, 0.9), given)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert float(student.a) == pytest.approx(0.9, abs=0.01)


@pytest.mark.parametrize("kind", ["trig", "flow"])
def test_the_critics_loss_is_that_of_the_data_over_sin_squared(kind: str) -> None:
    """``|| F - (cos eps - sin x) ||^2 = || x - D ||^2 / sin^2 t`` exactly, for a network of another schedule too."""
    critic = networks(RCM()).critic
    if kind == "flow":
        critic = NetworkDenoiser(critic.net, FlowMatching(), Velocity(), (3,), 2).on(SCHEDULE)
    x, t, cond = batch_of().x, torch.linspace(1e-3, 1.5, 8, dtype=F64), batch_of().cond
    found = velocity_loss(critic, x, t, cond, Rng(3))
    x_t = SCHEDULE.add_noise(x, Rng(3).normal_like(x), t)
    expected = ((x - critic(x_t, t, cond)) / t.sin()[:, None]).square().mean()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


# --- rollouts ----------------------------------------------------------------------------------------------------


def test_rollouts_go_down_from_noise_at_times_of_the_law() -> None:
    """Each time is the lesser of a draw and the time before; one of its own for every sample."""
    law, n = LogNormal(0.0, 1.6), 2000
    world = ExactFlowMap(Gaussian(SCHEDULE, torch.zeros(3, dtype=F64), 0.3**2))
    noise = torch.randn(n, 3, dtype=F64, generator=torch.Generator().manual_seed(4))
    x, t = last_call(world, noise, 1, law, Rng(0))
    assert torch.equal(x, SCHEDULE.prior(noise)) and bool((t == SCHEDULE.t_max).all())
    rng, least = Rng(0), torch.full((n,), SCHEDULE.t_max, dtype=F64)
    for calls in (2, 3, 4):
        x, t = last_call(world, noise, calls, law, Rng(0))
        least = torch.minimum(least, law.draw(SCHEDULE, n, rng))
        rng.normal_like(x)
        assert torch.equal(t, least) and len(t.unique()) > 0.9 * n
        spread = ((0.3 * t.cos()) ** 2 + (SD * t.sin()) ** 2).sqrt()
        assert float((x / spread[:, None]).std()) == pytest.approx(1, abs=0.03)


def test_only_the_last_call_of_a_rollout_has_a_gradient() -> None:
    """And the rollouts have 1 to 4 calls, equally often, the same for all parts of a batch."""
    method = RCM(consistency_weight=0.0)
    nets, counts = networks(method), []
    for seed in range(60):
        calls: list[bool] = []
        hook = nets.student.denoiser.net.register_forward_hook(lambda *given, c=calls: c.append(given[2].requires_grad))
        method.rollout(nets, batch_of(2, seed))
        hook.remove()
        assert calls == [False] * (len(calls) - 1) + [True]
        counts.append(len(calls))
        again = Rng(seed, part=1, parts=2).shared_integer(0, 4)
        assert again + 1 == len(calls)
    assert {k: counts.count(k) > 5 for k in (1, 2, 3, 4)} == dict.fromkeys((1, 2, 3, 4), True)


# --- laws and plans ----------------------------------------------------------------------------------------------


def test_frames_raise_the_noise_and_change_the_law_of_matching() -> None:
    """atan(sqrt(F) e^n), n ~ N(-0.8, 1.6): a mean of 0.7 at 21 latent frames, as in the code's later configuration;
    matching at flow-matching times of shift 5, log-normal for pictures."""
    method, picture, video = RCM(), (4, 8, 8), (4, 21, 8, 8)
    assert (frames(picture), frames(video)) == (1, 21)
    assert method.consistency_law(picture) == LogNormal(-0.8, 1.6)
    raised = method.consistency_law(video)
    assert isinstance(raised, LogNormal) and raised.mean == pytest.approx(0.7, abs=0.05) and raised.std == 1.6
    one = TrigFlow(t_max=math.pi / 2, sigma_data=1.0)
    z = torch.exp(-0.8 + 1.6 * Rng(0).normal(50, dtype=F64))
    torch.testing.assert_close(raised.draw(one, 50, Rng(0)), torch.atan(math.sqrt(21) * z))
    assert RCM(frame_noise=False).consistency_law(video) == LogNormal(-0.8, 1.6)
    assert method.matching_law(picture) == LogNormal(0.0, 1.6)
    assert method.matching_law(video) == ShiftedUniform(5.0) == RCM(matching_shift=5.0).matching_law(picture)
    assert RCM(matching_shift=0.0).matching_law(video) == LogNormal(math.log(21) / 2, 1.6)
    u = Rng(0).uniform(50)
    u = 5 * u / (1 + 4 * u)
    torch.testing.assert_close(ShiftedUniform(5.0).draw(one, 50, Rng(0)), torch.atan(u / (1 - u)))


def test_plans_have_the_published_times_as_far_as_the_teacher_reaches() -> None:
    """atan(sigma_max), 1.3, 1.0, 0.6, the first k of them; training goes up to the teacher's last level."""
    method = RCM(sigma_data=1.0)
    schedule = trig_reach(FlowMatching(), 1.0)
    assert schedule.t_max == pytest.approx(math.pi / 2, abs=1e-8)
    assert method.plan(schedule, 4).times == pytest.approx((math.atan(80), 1.3, 1.0, 0.6))
    assert method.plan(schedule, 2).times == pytest.approx((math.atan(80), 1.3))
    assert RCM(sigma_max=1600.0).plan(schedule, 1).times == pytest.approx((math.atan(1600),))
    edm = trig_reach(EDM(), 1.0)
    assert RCM(sigma_max=1600.0).plan(edm, 1).times == (edm.t_max,) == pytest.approx((math.atan(80),))
    low = trig_reach(EDM(t_max=2.0), 1.0)  # an angle of 1.107, below the second published one
    times = method.plan(low, 4).times
    assert times[0] == low.t_max and times[1:] == pytest.approx([1.107149 / (math.pi / 2) * t for t in (1.3, 1.0, 0.6)])
    student = method.student(networks(method, teacher(FlowMatching())))
    assert [*student.plans] == [1, 2, 3, 4] and all(plan.gamma == 1 for plan in student.plans.values())


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="leave nothing to train on"):
        RCM(consistency_weight=0.0, matching_weight=0.0)
    with pytest.raises(ValueError, match="at most 4"):
        RCM(steps=(1, 5))
    with pytest.raises(ValueError, match="guidance=2: this teacher is unconditional"):
        RCM(guidance=2.0).networks(Start(teacher(classes=None)))


# --- who moves, on what ------------------------------------------------------------------------------------------


def test_the_student_moves_alone_and_then_in_one_iteration_of_five() -> None:
    """Each update reaches its own network; until the warm-up ends the second term is not looked at."""
    method = RCM(tangent_warmup=0.5)
    nets = networks(method)
    for step, fraction in ((3, 0.0), (7, 0.49), (10, 0.5), (11, 0.6), (14, 0.7), (15, 0.8)):
        nets.zero_grad(set_to_none=True)
        (update,) = method.updates(nets, batch_of(), Progress(step, 0, fraction))
        update.loss.backward()
        student = fraction < 0.5 or step % 5 == 0
        assert update.group == ("student" if student else "critic")
        assert ("matching_norm" in update.logs) == (student and fraction >= 0.5)
        assert bool(slopes(nets.student).any()) == student and bool(slopes(nets.critic).any()) != student
        assert not bool(slopes(nets.teacher).any())
        assert not student or update.logs["warmup"] == min(1.0, 2 * fraction)


def test_without_matching_there_is_no_critic_and_every_iteration_is_the_students() -> None:
    method = RCM(matching_weight=0.0)
    nets = networks(method)
    assert {name for name, _ in nets.named_children()} == {"student", "teacher"}
    assert {next(method.updates(nets, batch_of(), Progress(k, 0, 0.9))).group for k in range(5)} == {"student"}


def test_guidance_is_the_teachers_in_both_terms() -> None:
    """The losses change with it, the critic's does not."""

    def losses(guidance: float) -> dict[str, float]:
        method = RCM(tangent_warmup=0.0, guidance=guidance)
        nets = networks(method)
        made = [next(method.updates(nets, batch_of(), Progress(step))) for step in (0, 1)]
        student, critic = (float(update.loss.detach()) for update in made)
        norms = {key: float(made[0].logs[key]) for key in ("tangent_norm", "matching_norm")}
        return {"student": student, "critic": critic, **norms}

    plain, guided = losses(1.0), losses(3.0)
    assert plain["critic"] == guided["critic"]
    assert all(abs(plain[key] / guided[key] - 1) > 1e-3 for key in ("tangent_norm", "matching_norm"))


def test_matching_alone_needs_no_data_and_consistency_does() -> None:
    empty = Batch(None, torch.arange(4) % 2, Rng(0), shape=(4, 3))
    single = teacher(kind=torch.float32)
    method = RCM(consistency_weight=0.0)
    (update,) = method.updates(networks(method, single), empty, Progress(0))
    assert float(update.loss.detach()) > 0
    with pytest.raises(ValueError, match="this method reads samples"):
        next(RCM().updates(networks(RCM(), single), empty, Progress(0)))
    made = [
        run_recipe(method, single, data, Settings(Budget(6), batch=4, precision="fp32"), show=False).model
        for data in (Prior((3,), torch.arange(6) % 2, "any"), Dataset("any", torch.randn(6, 3), torch.arange(6) % 2))
    ]
    one, other = (torch.cat([p.detach().flatten() for p in model.parameters()]) for model in made)
    assert torch.equal(one, other)


def test_a_batch_in_parts_is_the_same_batch_when_both_networks_move() -> None:
    data = Dataset("any", batch_of(16).x, torch.arange(16) % 2)
    method = RCM(tangent_warmup=0.2, student_every=2, matching_weight=0.5)

    def run(accumulate: int) -> Tensor:
        settings = Settings(Budget(6), batch=8, precision="fp32", accumulate=accumulate)
        model = run_recipe(method, teacher(), data, settings, show=False).model
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    torch.testing.assert_close(run(2), run(1), atol=1e-8, rtol=0)
    assert not torch.allclose(run(1), torch.cat([p.flatten() for p in teacher().parameters()]), atol=1e-4)


# --- video -------------------------------------------------------------------------------------------------------


class FrameAttention(nn.Module):
    """``F(x, t)`` on ``[C, F, H, W]``: attention over all places of all frames, by PyTorch's fused call."""

    config: dict[str, Any]

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.qkv, self.leave = nn.Linear(3, 16), nn.Linear(16, 48), nn.Linear(16, 2)

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        told = t.to(x)[:, None, None].expand(-1, tokens.shape[1], 1)
        hidden = torch.tanh(self.enter(torch.cat([tokens, told], -1)))
        q, k, v = (part[:, None] for part in self.qkv(hidden).chunk(3, -1))
        seen = nn.functional.scaled_dot_product_attention(q, k, v)[:, 0]
        return self.leave(hidden + seen).transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize("kind", ["fused", "unet3d"])
def test_video_trains_through_attention(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples ``[C, F, H, W]``: the tangent of a network with attention over frames and places is its derivative, both
    networks move, and the student makes samples."""
    monkeypatch.setattr(unet, "WRITTEN_OUT", 0)
    shape = (2, 4, 4, 4)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = FrameAttention() if kind == "fused" else UNet3d(shape, (8, 8), 1, 16, None)
    moved(net, 0.1)
    source = NetworkDenoiser(net, FlowMatching(), TrigPrediction(sigma_data=1.0), shape).double()
    method = RCM(sigma_data=1.0, tangent_warmup=0.0, student_every=2)
    nets = networks(method, source)
    x = torch.randn(2, *shape, dtype=F64, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0.4, 1.1], dtype=F64)
    v = nets.teacher.velocity(x, t).detach()
    g = student_direction(nets.student, x, t, v, None, r=1.0).g
    _, slope = finite_difference(nets.student.denoiser.forward, x, t, v, torch.ones_like(t), step=1e-5)
    torch.testing.assert_close(g, -align(t.cos(), x) * slope, atol=1e-7, rtol=1e-5)
    for step, name in enumerate(("student", "critic")):
        (update,) = method.updates(nets, Batch(x, None, Rng(step)), Progress(step))
        update.loss.backward()
        assert update.group == name and bool(slopes(nets.get_submodule(name)).isfinite().all())
    assert method.student(nets).sample(2, steps=3).shape == (2, *shape)


def test_a_students_dropout_is_off_while_it_makes_samples_for_the_critic() -> None:
    """And on again afterwards; the critic's is off while the student is matched."""
    method = RCM(tangent_warmup=0.0)
    nets = networks(method)
    seen: list[tuple[str, bool]] = []
    for name in ("student", "critic"):
        denoiser = nets.student.denoiser if name == "student" else nets.critic
        denoiser.net.register_forward_pre_hook(lambda module, _, name=name: seen.append((name, module.training)))
    next(method.updates(nets, batch_of(), Progress(1)))
    assert {mode for name, mode in seen if name == "student"} == {False} and seen[-1] == ("critic", True)
    seen.clear()
    next(method.updates(nets, batch_of(), Progress(0)))
    assert {mode for name, mode in seen if name == "student"} == {True} and seen[-1] == ("critic", False)
    assert nets.student.training and nets.critic.training
