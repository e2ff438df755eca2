"""Constant acceleration: paths and steps that are exact for any initial velocity, crossings, inversion, stages."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.constant_acceleration import ConstantAcceleration, acceleration, path_state, tau_of, time_of
from fewstep.denoisers import Denoiser, NetworkDenoiser, networks_in
from fewstep.flow_maps import Jump
from fewstep.hub import native
from fewstep.methods.flow_maps.constant_acceleration import (
    Acceleration,
    ConstantAccelerationFlow,
    InitialVelocity,
    huber,
)
from fewstep.methods.flow_maps.rectified_flow import STRAIGHT
from fewstep.methods.method import Batch, Method, Networks, Progress
from fewstep.methods.parts.distances import Distance, Plain, l2
from fewstep.methods.start import Start
from fewstep.metrics import coupling_preservation, path_straightness, psnr, straightness
from fewstep.models import model_of
from fewstep.networks import MLP
from fewstep.predictions import Velocity
from fewstep.randomness import Rng
from fewstep.sampling import Inpainting, Plan, Student, encode, inpaint_by_inversion, reconstruct, rollout
from fewstep.sampling.rollout import Call
from fewstep.schedules import FlowMatching

#: mlvlab/CAF: flow/script_util.py, scripts/*.sh and the paper's appendix (CIFAR-10).
PUBLISHED: dict[str, Any] = {
    "h": 1.5, "pairs": 1_000_000, "ode_steps": 18, "guidance": 1.0, "distance": "lpips", "lr": 1e-4, "steps": ...,
    "gan_share": 0.8, "gan_lr": 1e-3,  # 800k iterations after a million for each network
    "optimizer": {
        "kind": "adamw", "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-5, "clip": None, "warmup": 0,
        "decay": "constant",
    },
}  # fmt: skip

H = (0.5, 1.0, 1.5)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Says(Denoiser):
    """A denoiser whose velocity is what it is given."""

    def __init__(self, velocity: Tensor) -> None:
        super().__init__(STRAIGHT, tuple(velocity.shape[1:]))
        self.said = velocity
        self.told: list[Tensor] = []

    def forward(self, x: Tensor, t: Any, cond: Any = None) -> Tensor:
        raise AssertionError("only its velocity is asked for")

    def velocity(self, x: Tensor, t: Any, cond: Any = None, **extras: Tensor) -> Tensor:
        self.told += extras.values()
        return self.said


def exact(h: float) -> tuple[Tensor, Tensor, Tensor, ConstantAcceleration]:
    """Pairs, initial velocities that have nothing to do with them, and the exact map of both."""
    x, n, v = (normal(7, 3, seed=k) for k in range(3))
    return x, n, v, ConstantAcceleration(Says(v / h), Says(n - x), h)


def plan(steps: int, h: float) -> Plan:
    return Acceleration(h=h).plan(steps)


# --- the path ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("h", H)
def test_the_path_with_the_true_velocity_is_the_straight_line_at_its_level(h: float) -> None:
    """``x_tau = (1 - t) x + t n`` at ``t = (1 - tau)(1 + tau - h tau)``, and ``tau_of`` inverts ``time_of``."""
    x, n = normal(9, 2), normal(9, 2, seed=1)
    tau = torch.linspace(0, 1, 9, dtype=torch.float64)
    t = time_of(tau, h)
    torch.testing.assert_close(
        path_state(x, n, h * (n - x), tau), FlowMatching().add_noise(x, n, t), atol=1e-14, rtol=0
    )
    torch.testing.assert_close(tau_of(t, h), tau, atol=1e-14, rtol=0)
    assert t[0] == 1 and t[-1] == 0 and bool((t.diff() < 0).all())


@pytest.mark.parametrize("h", H)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_any_velocity_is_exact_in_any_number_of_steps_both_ways(h: float, steps: int) -> None:
    """With the acceleration that belongs to it, whatever the initial velocity: samples, states between, inversion."""
    x, n, v, made = exact(h)
    calls: list[Call] = []
    out = rollout(made, n, plan(steps, h), calls=calls)
    torch.testing.assert_close(out, x, atol=1e-14, rtol=0)
    for call in calls:
        tau = tau_of(torch.full((7,), call.t, dtype=torch.float64), h)
        torch.testing.assert_close(call.x, path_state(x, n, v, tau), atol=1e-14, rtol=0)
    torch.testing.assert_close(encode(made, x, plan(steps, h)), n, atol=2e-14, rtol=0)
    torch.testing.assert_close(reconstruct(made, x, plan(steps, h)), x, atol=2e-14, rtol=0)


def test_jumps_between_any_times_and_the_velocity_between_them() -> None:
    """From every time to every other; without a move the mean velocity is the derivative of the path."""
    x, n, v, made = exact(1.5)
    tau = torch.linspace(0, 1, 7, dtype=torch.float64)
    for other in (tau.flip(0), tau.roll(2), tau):
        moved = made(path_state(x, n, v, tau), time_of(tau, 1.5), time_of(other, 1.5), v=v)
        torch.testing.assert_close(moved, path_state(x, n, v, other), atol=2e-14, rtol=0)
    t, step = torch.full((7,), 0.4, dtype=torch.float64), 1e-6
    ends = [path_state(x, n, v, tau_of(t + s, 1.5)) for s in (-step, step)]
    slope = made.mean_velocity(ends[0], t, t, v=v)
    torch.testing.assert_close(slope, (ends[1] - ends[0]) / (2 * step), atol=1e-8, rtol=0)


def test_the_velocity_is_found_once_and_told_to_every_call() -> None:
    """``N`` steps take ``N + 1`` calls, which reports are told too; the second network is given ``v`` itself."""
    _, n, v, made = exact(1.5)
    asked: list[float] = []
    real = made.velocity.velocity
    made.velocity.velocity = lambda x, t, cond=None: asked.append(float(t[0])) or real(x, t, cond)  # type: ignore
    student = Student(made, {4: plan(4, 1.5)})
    student(n)
    told = made.accelerated.told  # type: ignore[union-attr]
    assert asked == [1.0] and len(told) == 4
    assert all(torch.allclose(one, v, atol=1e-14, rtol=0) for one in told)
    assert model_of(student).calls(4) == 5
    assert model_of(Student(Jump(network()), {4: plan(4, 1.5)})).calls(4) == 4


def test_slopes_with_which_paths_turn_are_refused() -> None:
    for h in (0.0, 2.0, math.nan):
        with pytest.raises(ValueError, match=r"h=.* must lie in \(0, 2\)"):
            ConstantAcceleration(Says(normal(1, 2)), Says(normal(1, 2)), h)
    with pytest.raises(ValueError, match="h=2 must lie in"):
        ConstantAccelerationFlow(h=2)


# --- losses ----------------------------------------------------------------------------------------------------------


def test_huber_is_the_official_codes() -> None:
    """``(sqrt(sum (p - q)^2 + k^2) - k) / d`` with ``k = 0.00054 d``."""
    a, b = normal(4, 3, 5), normal(4, 3, 5, seed=1)
    k = 0.00054 * 15
    expected = torch.stack([(((p - q) ** 2).sum() + k**2).sqrt() - k for p, q in zip(a, b, strict=True)]) / 15
    torch.testing.assert_close(huber(a, b), expected, atol=1e-15, rtol=1e-12)


def losses(method: Method, modules: dict[str, Denoiser], x: Tensor, n: Tensor) -> float:
    name = "acceleration" if "acceleration" in modules else "velocity"
    nets = Networks({**modules, "distance": Plain(l2)}, {})
    nets.groups = {name: None}  # type: ignore[dict-item]
    (update,) = method.updates(nets, Batch(x, None, Rng(1), {"noise": n}), Progress())  # type: ignore[misc]
    return float(update.loss)


@pytest.mark.parametrize("h", H)
def test_losses_vanish_at_the_exact_networks_and_their_implied_ends_are_the_data(h: float) -> None:
    """The first stage at the true displacement; the second for any velocity; neither beside them.  The end that a
    velocity implies is the data at every tau and h, which ``x_tau + (1 - tau) v / h`` is at h = 1 only."""
    x, n = normal(50, 3), normal(50, 3, seed=1)
    anything = Says(normal(50, 3, seed=2))
    first, second = InitialVelocity(h=h), Acceleration(h=h)
    assert losses(first, {"velocity": Says(n - x)}, x, n) < 1e-15
    assert losses(first, {"velocity": Says(1.1 * (n - x))}, x, n) > 1e-3
    both = {"velocity": anything, "acceleration": Says(n - x)}
    assert losses(second, both, x, n) < 1e-15
    assert losses(second, {**both, "acceleration": anything}, x, n) > 1e-3
    tau = torch.linspace(0, 1, 50, dtype=torch.float64)
    for method, modules in ((first, {"velocity": Says(n - x)}), (second, both)):
        nets = Networks(modules, {})
        _, _, end = method.prediction(nets, x, n, tau, Batch(x, None, Rng(0), {"noise": n}))
        torch.testing.assert_close(end, x, atol=1e-13, rtol=0)


def test_the_second_stage_is_told_the_first_ones_own_velocity_at_the_noise() -> None:
    """States are built with it, no gradient goes into it, and the trained network is told it."""
    x, n = normal(20, 3), normal(20, 3, seed=1)
    start = Start(network())
    nets = Acceleration().networks(start)
    seen: list[tuple[Tensor, Tensor]] = []
    inner = networks_in(nets.acceleration)[0].net
    inner.register_forward_pre_hook(lambda _, given, kw: seen.append((given[0], kw["beside"])), with_kwargs=True)
    (update,) = Acceleration().updates(nets, Batch(x, None, Rng(0), {"noise": n}), Progress())
    update.loss.backward()
    v = 1.5 * nets.velocity.velocity(n, torch.ones(20, dtype=torch.float64))
    (state, told), tau = seen[0], Rng(0).integers(20, 0, 1001).double() / 1000
    torch.testing.assert_close(told, v)
    torch.testing.assert_close(state, path_state(x, n, v, tau))
    assert all(p.grad is None for p in nets.velocity.parameters())
    assert not any(p.requires_grad for p in nets.velocity.parameters())
    assert inner.beside.layer.weight.grad.abs().max() > 0


def network(seed: int = 0, size: int = 3, width: int = 16) -> NetworkDenoiser:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        net = MLP((size,), width, 1).double()
        for p in net.parameters():
            p.data += 0.1 * torch.randn_like(p)
    return NetworkDenoiser(net, FlowMatching(), Velocity(), (size,))


def test_stages_hand_on_the_velocity_and_start_as_the_teacher() -> None:
    """The second network starts from the first; untrained, one step is the teacher's Euler step, for every h."""
    first, second, _ = (stage.method for stage in ConstantAccelerationFlow(h=0.5, lr=1.0).stages())
    assert (first.name, second.name, first.h, second.lr) == ("caf-velocity", "caf-acceleration", 0.5, 1.0)  # type: ignore
    teacher = network()
    nets = first.networks(Start(teacher))
    made = first.hands_on(nets)
    assert list(made) == ["velocity"]
    student = second.student(second.networks(Start(network(1), made=made)))
    n = normal(5, 3)
    ones = torch.ones(5, dtype=torch.float64)
    torch.testing.assert_close(student(n, steps=1), n - teacher.velocity(n, ones))


# --- trained in two dimensions ---------------------------------------------------------------------------------------


def trained(method: Method, start: Start, x: Tensor, n: Tensor, steps: int, lr: float = 3e-3) -> Networks:
    """A plain Adam loop on pairs."""
    nets = method.networks(start)
    (group,) = nets.groups
    optimizer = torch.optim.Adam(nets.group_parameters(group), lr)
    for step in range(steps):
        for other in optimizer.param_groups:
            other["lr"] = lr * (1 - step / steps)
        rng = Rng(step, "crossing")
        rows = rng.integers(128, 0, len(x))
        (update,) = method.updates(nets, Batch(x[rows], None, rng, {"noise": n[rows]}), Progress())  # type: ignore
        optimizer.zero_grad()
        update.loss.backward()
        optimizer.step()
    return nets


def crossing(count: int = 512) -> tuple[Tensor, Tensor]:
    """Pairs from (-1, -1) to (1, 1) and from (-1, 1) to (1, -1), each spread by 0.1."""
    side = torch.arange(count) % 2 * 2.0 - 1
    spread = torch.randn(count, 2, generator=torch.Generator().manual_seed(0))
    n = torch.stack([-torch.ones(count), side], 1) + 0.1 * spread
    return torch.stack([torch.ones(count), -side], 1) + 0.1 * spread, n


def kept(out: Tensor, x: Tensor) -> float:
    """The share of samples that end on the side of their pair's data."""
    return float(((out[:, 1] > 0) == (x[:, 1] > 0)).double().mean())


def test_crossing_pairs_stay_pairs_where_a_rectified_flow_rewires_them() -> None:
    """Where two straight lines cross a velocity can only be the mean of both; an acceleration that is told the velocity
    of the beginning knows on which it is."""
    x, n = crossing()
    teacher = network(0, 2, 32).float()
    velocity = trained(InitialVelocity(), Start(teacher), x, n, 500).velocity.requires_grad_(False)
    start = Start(teacher, made={"velocity": velocity})
    student = Acceleration(steps=(1, 2, 8)).student(trained(Acceleration(), start, x, n, 500))
    with torch.no_grad():
        for steps in (1, 2, 8):
            made = rollout(student.flow_map, n, plan(steps, 1.5))
            assert kept(made, x) == 1.0, steps
            assert float((made - x).square().mean().sqrt()) < 0.2, steps
        euler = rollout(Jump(velocity), n, Plan(tuple((1 - torch.arange(64) / 64).tolist()), gamma=0.0))
        assert kept(euler, x) < 0.6  # it turns back at the crossing
    # without the velocity beside, the second network is as blind
    networks_in(student.flow_map.accelerated)[0].net.beside.layer.weight.data.zero_()
    with torch.no_grad():
        blind = rollout(student.flow_map, n, plan(8, 1.5))
    assert float((blind - x).square().mean()) > 4 * float((made - x).square().mean())


def test_a_gaussian_coupling_is_learned_and_inverted() -> None:
    """On pairs ``x = m + c n`` one step has mean m and deviation c, and inversion comes back to about the training
    error."""
    m, c = 0.4, 0.5
    n = normal(4096, 1).float()
    x = m + c * n
    teacher = network(0, 1, 32).float()
    velocity = trained(InitialVelocity(), Start(teacher), x, n, 250).velocity.requires_grad_(False)
    nets = trained(Acceleration(), Start(teacher, made={"velocity": velocity}), x, n, 250)
    student = Acceleration().student(nets)
    fresh = normal(2000, 1, seed=5).float()
    with torch.no_grad():
        out = student(fresh, steps=1)
        error = float((out - m - c * fresh).square().mean().sqrt())
        assert error < 0.03
        assert float(out.mean()) == pytest.approx(m + c * float(fresh.mean()), abs=0.02)
        assert float(out.std()) == pytest.approx(c * float(fresh.std()), rel=0.05)
        back = encode(student.flow_map, out, plan(1, 1.5))
        assert float((back - fresh).square().mean().sqrt()) < 5 * error / c
        again = reconstruct(student.flow_map, out, plan(2, 1.5))
        assert float((again - out).square().mean().sqrt()) < 3 * error


# --- what it is good for ---------------------------------------------------------------------------------------------


def test_a_hole_is_filled_and_the_rest_stays() -> None:
    """Known numbers are those of the data bit for bit, the others are made: for the exact map of ``x = m + c n`` they
    have its mean and deviation, in one step and in several."""
    m, c = 0.4, 0.5
    known = torch.tensor([1.0, 0.0])

    class Coupling(Says):
        """The straight velocity of ``x = m + c n`` from any point of its line."""

        def velocity(self, x: Tensor, t: Any, cond: Any = None, **extras: Tensor) -> Tensor:
            time = t[:, None]
            n = (x - (1 - time) * m) / (time + (1 - time) * c)
            return n - m - c * n

    made = ConstantAcceleration(Coupling(normal(1, 2)), Coupling(normal(1, 2)), 1.5)
    x = m + c * normal(4000, 2)
    for steps in (1, 3):
        out = inpaint_by_inversion(made, x, Inpainting(known), plan(steps, 1.5), Rng(0))
        assert torch.equal(out[:, 0], x[:, 0])
        assert not torch.allclose(out[:, 1], x[:, 1])
        assert float(out[:, 1].mean()) == pytest.approx(m, abs=0.03)
        assert float(out[:, 1].std()) == pytest.approx(c, rel=0.04)
        assert abs(float(torch.corrcoef(out.T)[0, 1])) < 0.06
        whole = inpaint_by_inversion(made, x, Inpainting(torch.ones(2)), plan(steps, 1.5), Rng(0))
        torch.testing.assert_close(whole, x, atol=1e-12, rtol=0)


def test_coupling_preservation() -> None:
    """20 dB for an error of a tenth of the span; both sides are clamped; a distance where one is given."""
    x = torch.zeros(3, 1, 2, 2)
    torch.testing.assert_close(psnr(x + 0.2, x), torch.full((3,), 20.0, dtype=torch.float64))
    assert psnr(x + 0.2, x, span=1.0)[0] == pytest.approx(20 - 20 * math.log10(2))
    found = coupling_preservation(x + 0.2, x, l2)
    assert found.psnr == pytest.approx(20) and found.distance == pytest.approx(0.04)
    assert coupling_preservation(x + 5, x).psnr == pytest.approx(20 - 20 * math.log10(5))
    assert coupling_preservation(x + 5, x).distance is None


def test_straightness() -> None:
    """0 along the way, 2 across it, 4 against it; 0 for paths of the true velocity, more for any other."""
    way = torch.tensor([[1.0, 0.0]])
    for velocity, expected in (([3.0, 0.0], 0), ([0.0, 2.0], 2), ([-1.0, 0.0], 4)):
        assert float(straightness(way, torch.tensor([velocity]))) == pytest.approx(expected)
    x, n, _, curved = exact(1.5)
    straight = ConstantAcceleration(Says(n - x), Says(n - x), 1.5)
    assert path_straightness(straight, n, plan(4, 1.5)) < 1e-25
    assert path_straightness(curved, n, plan(4, 1.5)) > 0.1


def test_it_is_saved_and_opened(tmp_path: Any) -> None:
    """With both networks, the slope and its plans; it samples alike; a teacher in it is its velocity."""
    first = network()
    accelerated = Start(first).network("velocity", beside=3, on=STRAIGHT)
    student = Student(ConstantAcceleration(first, accelerated, 0.7).float(), {1: plan(1, 0.7), 3: plan(3, 0.7)})
    opened = native.load(native.save(student, tmp_path / "model"))
    assert opened.flow_map.h == 0.7 and list(opened.plans) == [1, 3]
    assert torch.equal(opened.sample(4, steps=3, seed=1), student.sample(4, steps=3, seed=1))
    assert student.flow_map.teacher() is first


def test_it_is_not_exported() -> None:
    from fewstep.hub.tables import plan_table

    student = Acceleration().student(Acceleration().networks(Start(network())))
    with pytest.raises(ValueError, match="2 networks cannot be exported"):
        plan_table(student.flow_map, student.plans[1])


def test_the_distance_of_ends_is_the_users_and_adds_to_the_other() -> None:
    """A distance by name reaches both stages; it is given the implied ends and the data, and added with weight 1."""
    x, n = normal(9, 3), normal(9, 3, seed=1)
    for stage in ConstantAccelerationFlow(distance=Distance("l1")).stages():
        assert stage.method.distance == Distance("l1")  # type: ignore[attr-defined]
    seen: list[tuple[Tensor, Tensor]] = []

    def seven(a: Tensor, b: Tensor) -> Tensor:
        seen.append((a, b))
        return torch.full((9,), 7.0, dtype=torch.float64)

    nets = Networks({"velocity": Says(n - x), "distance": Plain(seven)}, {})
    nets.groups = {"velocity": None}  # type: ignore[dict-item]
    (update,) = InitialVelocity().updates(nets, Batch(x, None, Rng(1), {"noise": n}), Progress())
    torch.testing.assert_close(update.loss, torch.tensor(7.0, dtype=torch.float64))
    torch.testing.assert_close(seen[0], (x, x), atol=1e-13, rtol=0)
    assert float(update.logs["huber"]) < 1e-12


def test_acceleration_of_the_true_velocity_is_zero_on_a_straight_path() -> None:
    x, n = normal(3, 2), normal(3, 2, seed=1)
    assert not bool(acceleration(n - x, 1.0 * (n - x)).any())
    torch.testing.assert_close(acceleration(n - x, 1.5 * (n - x)), n - x)
