"""TDM: what the critic's weights make of it, the intervals of a trajectory, and the number of steps that is told."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.data import Prior
from fewstep.denoisers import NetworkDenoiser
from fewstep.exact import ExactFlowMap, Gaussian, GaussianMixture
from fewstep.flow_maps import ddim_move
from fewstep.methods.matching.tdm import TDM, Interval, importance, trajectory_matching_loss
from fewstep.methods.method import Batch, Networks, Progress
from fewstep.methods.parts.score_matching import TwoScores, known_at, noised_from
from fewstep.methods.start import Start
from fewstep.networks import MLP
from fewstep.predictions import TrigPrediction
from fewstep.randomness import Rng
from fewstep.runs.course import run_recipe
from fewstep.sampling.rollout import Call, rollout
from fewstep.schedules import EDM, FlowMatching, Schedule, TrigFlow, VPLinear
from fewstep.training.budget import Budget
from fewstep.training.settings import Settings

F64 = torch.float64
SCHEDULES = [FlowMatching(), VPLinear(), EDM(), TrigFlow(sigma_data=0.7)]

PUBLISHED: dict[str, Any] = {
    # Luo-Yihong/TDM, train_tdm_demo.py (PixArt, 512 pixels): four steps, separate times, CFG 4.5, AdamW with betas of 0
    # and 0.95, 50 steps of warm-up, a cosine with restarts, the student's rate a fifth of the critic's
    "steps": (4,), "times": "separate", "distance": "pseudo-huber", "c": 1e-3, "snr_bound": 5.0,
    "random_middle": False, "guidance": 4.5, "lr": 4e-6, "critic_lr": 2e-5, "clip": 1.0, "warmup": 50,
    "optimizer": {
        "kind": "adamw", "betas": (0.0, 0.95), "eps": 1e-8, "weight_decay": 0.01, "clip": 1.0, "warmup": 50,
        "decay": "cosine with restarts",
    },
}  # fmt: skip


def time(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64)


def bent(z: Tensor) -> Tensor:
    """Some student's data prediction at noise ``z``."""
    return 0.8 * torch.tanh(2 * z) + 0.3 * z.square()


def test_weighted_regression_is_direct_regression() -> None:
    """Of the data prediction on states noised from the end of a step, with the importance weights, it has the mean of
    that on data predictions noised directly, whatever the student; without weights another one.  By quadrature over
    the noise that the student starts from."""
    schedule, lo, tau = FlowMatching(), time(0.5), time(0.7)
    z = torch.linspace(-8, 8, 4001, dtype=F64)
    x0 = bent(z)
    x_lo = ddim_move(z, x0, time(1.0), lo, schedule)
    _, _, a, sd = known_at(schedule, lo, tau)
    for x_tau in (-0.6, 0.2, 1.1):
        m, n = (x_tau - schedule.alpha(tau) * x0) / schedule.sigma(tau), (x_tau - a * x_lo) / sd
        prior, rho = (-z.square() / 2).exp(), importance(m[:, None], n[:, None])
        direct, through = prior * (-m.square() / 2).exp(), prior * (-n.square() / 2).exp()
        means = [float((w * x0).sum() / w.sum()) for w in (direct, through * rho, through)]
        assert means[1] == pytest.approx(means[0], abs=1e-13)
        assert abs(means[2] - means[0]) > 0.02, means


def test_importance_is_tempered_by_the_dimension() -> None:
    """The mean over a sample's numbers, and not their sum."""
    m, n = Rng(0).normal(3, 2, 4, dtype=F64), Rng(1).normal(3, 2, 4, dtype=F64)
    wanted = [math.exp(float((n[k] ** 2 - m[k] ** 2).sum()) / 16) for k in range(3)]
    torch.testing.assert_close(importance(m, n), torch.tensor(wanted, dtype=F64), atol=0, rtol=1e-13)


def test_the_published_distance() -> None:
    """By every element: ``(sqrt((D_critic - D_teacher)^2 + c^2) - c) / mean|x0 - D_teacher|``, and its gradient in the
    data prediction, which none of the rest has; or the square over the same."""
    x0, real, fake = (Rng(k).normal(4, 3, dtype=F64) for k in range(3))
    x0.requires_grad_()
    found = TwoScores(x0.detach(), real, torch.zeros(4, dtype=F64), real, fake, FlowMatching())
    n, gap = (x0.detach() - real).abs().mean(1, keepdim=True), fake - real
    for kind, value, slope in (
        ("pseudo-huber", (gap**2 + 0.09).sqrt() - 0.3, gap / (gap**2 + 0.09).sqrt()),
        ("l2", gap**2, 2 * gap),
    ):
        loss = trajectory_matching_loss(x0, found, kind, 0.3)  # type: ignore[arg-type]
        torch.testing.assert_close(loss.detach(), (value / n).mean(), atol=1e-14, rtol=1e-12)
        torch.testing.assert_close(torch.autograd.grad(loss, x0)[0], slope / n / 12, atol=1e-15, rtol=1e-11)


def teacher(
    schedule: Schedule | None = None, kind: torch.dtype = F64, classes: int | None = 3, seed: int = 0
) -> NetworkDenoiser:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        net = MLP((3,), 16, 1, classes)
        for p in net.parameters():
            p.data += 0.1 * torch.randn_like(p)
    prediction = TrigPrediction(sigma_data=0.7)
    return NetworkDenoiser(net, schedule or TrigFlow(sigma_data=0.7), prediction, (3,), classes).to(kind)


def batch(n: int = 6, seed: int = 3) -> Batch:
    return Batch(None, torch.arange(n) % 3, Rng(seed, "tdm"), shape=(n, 3))


def made(method: TDM, schedule: Schedule | None = None) -> Networks:
    """Networks that are not the teacher any more."""
    nets = method.networks(Start(teacher(schedule)))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for group in nets.groups:
            for p in nets.group_parameters(group):
                p += 0.1 * torch.randn(p.shape, generator=generator, dtype=F64)
    return nets


def steps_of(method: TDM, nets: Networks, k: int, n: int = 6) -> tuple[list[Call], Interval]:
    calls: list[Call] = []
    noise = Rng(0).normal(n, 3, dtype=F64)
    with torch.no_grad():
        rollout(nets.student, noise, method.plan(nets.student.schedule, k), torch.arange(n) % 3, calls=calls)
    return calls, method.interval(nets, calls, Rng(1))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_intervals_are_those_of_the_trajectory(schedule: Schedule) -> None:
    """Every sample has a step of its own: state, times and data prediction of that call, from which the DDIM step ends
    in the next call's state; all steps are equally probable."""
    method = TDM()
    nets = made(method, schedule)
    calls, step = steps_of(method, nets, 4, 400)
    assert int(step.i.bincount().min()) > 70 and step.i.unique().tolist() == [0, 1, 2, 3]
    ends = ddim_move(step.x, step.x0, step.hi, step.lo, schedule)
    for k in range(400):
        call = calls[int(step.i[k])]
        assert torch.equal(step.x[k], call.x[k]) and float(step.hi[k]) == call.t and float(step.lo[k]) == call.r
        torch.testing.assert_close(ends[k], call.out[k], atol=1e-12, rtol=1e-11)
    predicted = nets.student.predict(step.x, step.hi, step.lo, torch.arange(400) % 3)
    torch.testing.assert_close(step.x0, predicted, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_where_a_step_is_looked_at(schedule: Schedule) -> None:
    """Separate: between its two times, 2 % of the index above the data and 1 % below its start; shared: up to 1 % below
    the noisiest time.  The state is the end of the step noised on from there."""
    for times in ("separate", "shared"):
        method = TDM(times=times)
        nets = made(method, schedule)
        _, step = steps_of(method, nets, 4, 2000)
        x_tau, tau, n = method.looked_at(schedule, step, step.x0, Rng(2))
        share, low = schedule.own_share(tau), schedule.own_share(step.lo).clamp_min(0.02)
        high = (schedule.own_share(step.hi) if times == "separate" else torch.ones_like(low)) - 0.01
        place = (share - low) / (high - low)
        assert -1e-9 < float(place.min()) < 0.01 and 0.99 < float(place.max()) < 1 + 1e-9
        assert abs(float(place.mean()) - 0.5) < 0.03
        ends = ddim_move(step.x, step.x0, step.hi, step.lo, schedule)
        torch.testing.assert_close(x_tau, noised_from(schedule, ends, step.lo, tau, n), atol=1e-13, rtol=1e-13)


def test_a_random_middle() -> None:
    """Steps that end anywhere between their lower end and 2 % below their start."""
    method = TDM(random_middle=True)
    nets = made(method)
    _, step = steps_of(method, nets, 4, 2000)
    calls, _ = steps_of(method, nets, 4, 1)
    times, schedule = time(0.0).new_tensor([*(c.t for c in calls), calls[-1].r]), nets.student.schedule
    low, high = (schedule.own_share(times[step.i + k]) for k in (1, 0))
    place = (schedule.own_share(step.lo) - low) / (high - 0.02 - low)
    assert float(place.min()) < 0.01 and float(place.min()) >= 0 and 0.99 < float(place.max()) < 1
    for update in method.updates(nets, batch(), Progress()):
        assert torch.isfinite(update.loss)


def test_an_update_by_hand() -> None:
    """The critic first, on one random step a sample, then the student on another, with the critic as it is then."""
    method = TDM(distance="pseudo-huber")
    nets, rng, cond = made(method, FlowMatching()), batch().rng, batch().cond
    updates = method.updates(nets, batch(), Progress())
    critic = next(updates)
    rng.shared_integer(0, 1)
    noise, calls = rng.normal(6, 3, dtype=F64), list[Call]()
    with torch.no_grad():
        last = rollout(nets.student, noise, method.plan(nets.student.schedule, 4), cond, calls=calls)

    def looked_at() -> tuple[Tensor, ...]:
        i = rng.integers(6, 0, 4)
        hi, lo = 1 - i / 4, (3 - i.double()) / 4
        x = torch.stack([calls[int(i[k])].x[k] for k in range(6)])
        x0 = nets.student.predict(x, hi.double(), lo, cond)
        low = lo.clamp_min(0.02)
        tau = (low + rng.uniform(6) * (hi - 0.01 - low))[:, None]
        n, hi, lo = rng.normal(6, 3, dtype=F64), hi[:, None], lo[:, None]
        x_lo = (1 - lo) * x0.detach() + lo / hi * (x - (1 - hi) * x0.detach())
        a = (1 - tau) / (1 - lo)
        return x0, tau, a * x_lo + (tau**2 - (a * lo) ** 2).sqrt() * n, n

    x0, tau, x_tau, n = looked_at()
    m = (x_tau - (1 - tau) * x0) / tau
    rho = ((n**2 - m**2).mean(1) / 2).exp()
    error = (nets.critic(x_tau, tau[:, 0], cond) - x0).square().mean(1)
    wanted = (((1 - tau) / tau)[:, 0].square().clamp_max(5) * rho * error).mean()
    torch.testing.assert_close(critic.loss, wanted, atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(critic.logs["importance"], rho.mean().detach(), atol=1e-7, rtol=1e-7)
    assert critic.group == "critic" and not torch.isclose(rho, torch.ones_like(rho), rtol=1e-2).all()
    with torch.no_grad():
        for p in nets.critic.parameters():
            p += 0.1
    student = next(updates)
    x0, tau, x_tau, _ = looked_at()
    real, fake = (net(x_tau, tau[:, 0], cond) for net in (nets.teacher, nets.critic))
    gap = ((real - fake).square() + 1e-6).sqrt() - 1e-3
    wanted = (gap / (x0 - real).abs().mean(1, keepdim=True)).mean()
    torch.testing.assert_close(student.loss, wanted, atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(student.logs["sample_std"], last.std(0, correction=0).mean())
    assert student.group == "student" and next(updates, None) is None
    student.loss.backward()
    assert all(p.grad is None for name in ("critic", "teacher") for p in nets.get_submodule(name).parameters())


class Exact(ExactFlowMap):
    """The exact flow map, and the data prediction whose DDIM step it is."""

    off = 0.0

    def predict(self, x: Tensor, t: Tensor, s: Tensor, cond: Any = None) -> Tensor:
        keep = (self.schedule.sigma(s) / self.schedule.sigma(t))[:, None]
        scale = self.schedule.alpha(s)[:, None] - keep * self.schedule.alpha(t)[:, None]
        return (self.world.flow(x, t, s) - keep * x) / scale + self.off


@pytest.mark.parametrize("distance", ["pseudo-huber", "l2"])
def test_the_exact_trajectory_is_a_fixed_point(distance: Any) -> None:
    """With the exact scores of what its steps are noised to, which are the teacher's, no sample has a gradient."""
    schedule = FlowMatching()
    world = Gaussian(schedule, torch.full((3,), 0.6, dtype=F64), 0.16)
    method, student = TDM(distance=distance), Exact(world)
    nets = Networks({"student": student, "critic": world, "teacher": world}, {})
    calls: list[Call] = []
    rollout(student, Rng(0).normal(4000, 3, dtype=F64), method.plan(schedule, 4), calls=calls)
    step = method.interval(nets, calls, Rng(1))
    x_tau, tau, _ = method.looked_at(schedule, step, student.predict(step.x, step.hi, step.lo), Rng(2))
    spread = (x_tau - (1 - tau)[:, None] * 0.6) / ((0.16 * (1 - tau) ** 2 + tau**2).sqrt()[:, None])
    assert abs(float(spread.mean())) < 0.03 and abs(float(spread.std()) - 1) < 0.02  # the teacher's law, then
    given = Batch(None, None, Rng(2), shape=(4000, 3))
    assert abs(float(method.student_loss(nets, given, step, 4))) < 1e-14
    nets.critic = Gaussian(schedule, torch.full((3,), 0.62, dtype=F64), 0.16)
    assert float(method.student_loss(nets, given, step, 4)) > 1e-4


def test_what_the_critic_learns_is_noised_data_predictions() -> None:
    """Not the denoiser of the states that it sees: with the exact trajectory of a Gaussian its best answer is far from
    the teacher's, because data predictions at noise have too little spread.  (Phased DMD's target has no such gap.)"""
    schedule, spread = FlowMatching(), 1.0
    world = Gaussian(schedule, torch.zeros(1, dtype=F64), spread**2)
    x, hi, lo, tau = torch.ones(1, 1, dtype=F64), time(1.0)[None], time(0.5)[None], time(0.7)
    scale = float(Exact(world).predict(x, hi, lo))  # the data prediction of noise z is scale z
    at = torch.tensor([[0.9]], dtype=F64)
    learned = (1 - tau) * scale**2 / ((1 - tau) ** 2 * scale**2 + tau**2) * at
    true = world(at, tau[None])
    assert scale == pytest.approx(math.sqrt(2) - 1) and float(learned) == pytest.approx(0.0917, abs=5e-5)
    assert float(true) == pytest.approx(0.9 * 0.3 / 0.58)


def test_one_critic_for_all_steps_is_biased_where_they_share_times() -> None:
    """On a mixture, by quadrature: at a time that two steps share, the best single answer lies between two of their own
    and is neither; intervals that do not overlap ask about one step only."""
    schedule = FlowMatching()
    world = GaussianMixture(schedule, torch.ones(2), torch.tensor([[-1.0], [1.0]]), torch.full((2,), 0.04))
    z = torch.linspace(-6, 6, 2001, dtype=F64)[:, None]
    states, at, tau = {1.0: z, 0.5: ddim_move(z, world(z, 1.0), time(1.0), time(0.5), schedule)}, 1.1, 0.7
    mass, moment = [], []
    for t, x in states.items():
        x0 = world(x, t)
        w = (-z.square() / 2 - ((at - (1 - tau) * x0) / tau).square() / 2).exp()
        mass.append(float(w.sum()))
        moment.append(float((w * x0).sum()))
    own = [m / w for m, w in zip(moment, mass, strict=True)]
    shared = sum(moment) / sum(mass)
    assert abs(shared - own[0]) > 0.05 and abs(shared - own[1]) > 0.05, (own, shared)


def spied(method: TDM, monkeypatch: pytest.MonkeyPatch, seeds: range) -> list[tuple[str, Tensor, dict[str, Tensor]]]:
    """Which network was told what, call by call."""
    asked: list[tuple[str, Tensor, dict[str, Tensor]]] = []
    nets = made(method)
    for name, net in (("student", nets.student.denoiser.net), ("critic", nets.critic.net)):
        real = net.forward

        def spy(x: Tensor, t: Tensor, cond: Any = None, real: Any = real, name: str = name, **extras: Tensor) -> Tensor:
            asked.append((name, t, extras))
            return real(x, t, cond, **extras)

        monkeypatch.setattr(net, "forward", spy)
    for seed in seeds:
        for update in method.updates(nets, batch(seed=seed), Progress()):
            assert torch.isfinite(update.loss)
    return asked


def test_the_number_of_steps_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the numbers an iteration, the same for student and critic and for all samples; K calls of the trajectory,
    one of the student's with a gradient, two of the critic's.  Nothing is told where there is one number."""
    seen = set()
    for seed in range(8):
        asked = spied(TDM(steps=(1, 2, 4)), monkeypatch, range(seed, seed + 1))
        told = torch.cat([extras["k"] for _, _, extras in asked]).unique()
        assert len(told) == 1 and told.dtype == F64
        k = int(told)
        names = [name for name, _, _ in asked]
        assert names == [*["student"] * k, "critic", "student", "critic"]
        seen.add(k)
    assert seen == {1, 2, 4}
    assert all(extras == {} for _, _, extras in spied(TDM(steps=(2,)), monkeypatch, range(1)))


def test_a_shared_critic_is_told_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [extras for name, _, extras in spied(TDM(times="shared"), monkeypatch, range(6)) if name == "critic"]
    assert all(list(extras) == ["i"] for extras in asked)
    assert torch.cat([extras["i"] for extras in asked]).unique().tolist() == [0.0, 1.0, 2.0, 3.0]


def test_one_network_serves_all_numbers_of_steps() -> None:
    """Trained from conditions alone; every plan tells its own number, and a student of one number takes none."""
    source, settings = teacher(kind=torch.float32), Settings(Budget(4), batch=8, precision="fp32")
    model: Any = run_recipe(
        TDM(steps=(2, 1), lr=1e-2), source, Prior((3,), torch.arange(3)), settings, show=False
    ).model
    assert {k: plan.extras for k, plan in model.plans.items()} == {1: {"k": 1.0}, 2: {"k": 2.0}}
    assert all(plan.gamma == 0 for plan in model.plans.values()) and model.extras["k"].low == 1
    assert not torch.equal(model.sample(4, steps=1), model.sample(4, steps=1, k=2.0))
    assert model.sample(4, steps=2).shape == (4, 3)
    alone = TDM(steps=(2,))
    assert alone.student(alone.networks(Start(source))).extras == {}


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"steps=\(2, 2\) must be different numbers"):
        TDM(steps=(2, 2))
    with pytest.raises(ValueError, match=r"steps=\(\) must be"):
        TDM(steps=())
    with pytest.raises(ValueError, match=r"steps=128: the shortest of so many steps"):
        TDM(steps=(128,)).networks(Start(teacher()))
