"""SlimFlow: annealed noise, the second teacher, flips only where they are right, and a student of another network."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep import api
from fewstep.data import Dataset
from fewstep.denoisers import Denoiser, NetworkDenoiser
from fewstep.exact import Gaussian, GaussianMixture
from fewstep.flow_maps import Jump
from fewstep.methods.flow_maps.rectified_flow import STRAIGHT, straight_pair
from fewstep.methods.flow_maps.slim_flow import (
    AnnealingReflow,
    FlowGuidedDistillation,
    SlimFlow,
    anneal_noise,
    check_flips,
    flip_pairs,
)
from fewstep.methods.method import Batch, Method, Networks, Progress
from fewstep.methods.parts.distances import Plain, l2
from fewstep.methods.parts.ramp import Ramp
from fewstep.methods.parts.stores import solve_heun
from fewstep.methods.start import Start
from fewstep.networks import MLP
from fewstep.predictions import TrigPrediction
from fewstep.randomness import Rng
from fewstep.schedules import EDM, FlowMatching, TrigFlow

#: yuanzhi-zhu/SlimFlow: configs/*.py (reflow 800k iterations, 300k of them annealed; distillation), appendix.
PUBLISHED: dict[str, Any] = {
    "beta": Ramp(1.0, 0.0, 300_000 / 800_000), "first_half": "student", "two_steps": 1.0, "flip": True,
    "pairs": 50_000, "ode_steps": ..., "guidance": 1.0, "distance": "lpips", "lr": 2e-4,
    "optimizer": {
        "kind": "adam", "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "clip": 1.0, "warmup": 5000,
        "decay": "constant",
    },
}  # fmt: skip

C = 0.5


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Straight(Denoiser):
    """The flow of the coupling ``x = c n``, whose paths are straight."""

    def __init__(self, shape: tuple[int, ...] = (2,)) -> None:
        super().__init__(STRAIGHT, shape)

    def forward(self, x: Tensor, t: Any, cond: Any = None) -> Tensor:
        time = torch.as_tensor(t, dtype=torch.float64).expand(len(x))[:, None]
        return C * x / (time + (1 - time) * C)


def curved() -> Gaussian:
    """The first flow of N(0, c^2), whose paths are curved."""
    return Gaussian(STRAIGHT, torch.zeros(2, dtype=torch.float64), C**2)


# --- annealing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("b", [0.0, 0.5, 1.0])
def test_annealed_noise_is_normal_and_correlated(b: float) -> None:
    z, fresh = normal(40_000), normal(40_000, seed=1)
    mixed = anneal_noise(z, fresh, b)
    assert float(mixed.std()) == pytest.approx(1, abs=0.01)
    assert float((mixed * z).mean()) == pytest.approx(math.sqrt(1 - b**2), abs=0.02)


@pytest.mark.parametrize("b", [1.0, 0.5, 0.0])
def test_the_optimum_on_gaussian_pairs(b: float) -> None:
    """On pairs ``x = c z`` the best velocity is linear, with the slope of the closed form: the method's loss is least
    there."""
    z = normal(200_000, 1)
    x, rho = C * z, math.sqrt(1 - b**2)

    class Linear(Denoiser):
        """``v = k(t) x``, with a slope that is off by ``off``."""

        def __init__(self, off: float) -> None:
            super().__init__(STRAIGHT, (1,))
            self.off = off

        def forward(self, x: Tensor, t: Any, cond: Any = None) -> Tensor:
            raise AssertionError

        def velocity(self, x: Tensor, t: Tensor, cond: Any = None, **_: Tensor) -> Tensor:
            top = t - (1 - t) * C**2 + (1 - 2 * t) * C * rho
            slope = top / ((1 - t) ** 2 * C**2 + t**2 + 2 * t * (1 - t) * C * rho)
            return (slope + self.off)[:, None] * x

    def loss(off: float) -> float:
        batch = Batch(x, None, Rng(4), {"noise": z})
        (update,) = AnnealingReflow(beta=Ramp(b)).updates(Networks({"model": Linear(off)}, {}), batch, Progress())
        return float(update.loss)

    less, best, more = loss(-0.05), loss(0.0), loss(0.05)
    assert best < min(less, more)
    # the vertex of the parabola through the three
    assert abs(0.05 * (less - more) / (2 * (less + more - 2 * best))) < 4e-3
    assert best < 1e-20 if b == 0 else best > 0.1


def test_beta_falls_over_the_budget() -> None:
    """``1 - min(1, k / K)``, ``(1 + cos(pi k / K)) / 2`` and ``exp(-k / K)`` with K at ``until``; logged as it is."""
    k = 0.5
    for course, values in (
        ("linear", [1 - u for u in (0, 0.2, 0.5, 1)] + [0.0]),
        ("cosine", [(1 + math.cos(math.pi * u)) / 2 for u in (0, 0.2, 0.5, 1)] + [0.0]),
        ("exponential", [math.exp(-u) for u in (0, 0.2, 0.5, 1, 2)]),
    ):
        ramp = Ramp(1.0, 0.0, k, course)  # type: ignore[arg-type]
        assert [ramp.at(u * k) for u in (0, 0.2, 0.5, 1, 2)] == pytest.approx(values, abs=1e-15)
        assert Ramp.parse(str(ramp)) == ramp
    batch = Batch(normal(4, 2), None, Rng(0), {"noise": normal(4, 2, seed=1)})
    method = AnnealingReflow(beta="cosine:1->0@0.5")  # type: ignore[arg-type]
    (update,) = method.updates(Networks({"model": Straight()}, {}), batch, Progress(fraction=0.25))
    assert update.logs["beta"] == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"beta=1\.5 must lie in \[0, 1\]"):
        AnnealingReflow(beta=Ramp(1.5, 0))


# --- the second teacher ----------------------------------------------------------------------------------------------


def two_steps(student: Denoiser, flow: Denoiser, **settings: Any) -> float:
    nets = Networks({"student": Jump(student), "flow": flow, "distance": Plain(l2)}, {})
    return float(FlowGuidedDistillation(**settings).two_step_loss(nets, normal(300, 2), Rng(2)))


def test_a_straight_teacher_has_no_two_step_loss() -> None:
    """One step and two are the same there, for every t; not of a curved flow, and not for another student."""
    for half in ("student", "teacher"):
        assert two_steps(Straight(), Straight(), first_half=half) < 1e-28
        assert two_steps(curved(), curved(), first_half=half) > 1e-3
        assert two_steps(curved(), Straight(), first_half=half) > 1e-3


def test_two_steps_of_a_curved_teacher_end_nearer_than_one() -> None:
    z, flow = normal(200, 2), curved()
    ones = torch.ones(200, dtype=torch.float64)
    end = flow.flow(z, 1.0, 0.0)
    one = z - flow.velocity(z, ones)
    for t in (0.2, 0.5, 0.8):
        x_t = z - (1 - t) * flow.velocity(z, ones)
        two = x_t - t * flow.velocity(x_t, t * ones)
        assert float((two - end).norm()) < 0.9 * float((one - end).norm())


def test_the_first_half_is_the_students_or_the_teachers() -> None:
    """The target is made without a gradient, with the student's own step on the way or the frozen flow's."""
    student, flow = network(1), network(2)
    z = normal(6, 2)
    ones, t = torch.ones(6, dtype=torch.float64), Rng(2).uniform(6, low=0.2, high=0.8)
    nets = Networks({"student": Jump(student), "flow": flow, "distance": Plain(l2)}, {})
    for half, first in (("student", student), ("teacher", flow)):
        with torch.no_grad():
            x_t = z - (1 - t)[:, None] * first.velocity(z, ones)
            target = x_t - t[:, None] * flow.velocity(x_t, t)
        v = student.velocity(z, ones).detach().requires_grad_()
        expected = torch.autograd.grad(l2(z - v, target).mean(), v)[0]
        held: list[Tensor] = []
        student.requires_grad_(True)
        real = student.velocity

        def spy(*given: Any, real: Any = real, held: Any = held) -> Tensor:
            held.append(real(*given))
            held[-1].retain_grad()
            return held[-1]

        student.velocity = spy  # type: ignore[method-assign]
        loss = FlowGuidedDistillation(first_half=half).two_step_loss(nets, z, Rng(2))  # type: ignore[arg-type]
        loss.backward()
        del student.velocity
        torch.testing.assert_close(loss, l2(z - v, target).mean())
        torch.testing.assert_close(held[0].grad, expected)


def test_both_terms_are_in_the_loss() -> None:
    """The pair's, of the one step and the data, with weight 1, and the two-step one with its own."""
    z = normal(9, 2)
    seen: list[tuple[Tensor, Tensor]] = []

    def distance(a: Tensor, b: Tensor) -> Tensor:
        seen.append((a, b))
        return torch.full((9,), 10.0 ** len(seen), dtype=torch.float64)

    nets = Networks({"student": Jump(Straight()), "flow": Straight(), "distance": Plain(distance)}, {})
    batch = Batch(7 * z, None, Rng(1), {"noise": z})
    (update,) = FlowGuidedDistillation(two_steps=0.5).updates(nets, batch, Progress())
    assert float(update.loss) == pytest.approx(10 + 0.5 * 100)
    assert (float(update.logs["pairs"]), float(update.logs["two_steps"])) == pytest.approx((10, 100))
    torch.testing.assert_close(seen[0], (C * z, 7 * z))
    assert not torch.allclose(seen[1][0], seen[0][0])  # on noise of its own


# --- flips -----------------------------------------------------------------------------------------------------------


def mixture(*means: list[float]) -> GaussianMixture:
    """Pictures of one row of two."""
    centers = torch.tensor(means, dtype=torch.float64).reshape(-1, 1, 1, 2)
    spread = 0.04 * torch.eye(2, dtype=torch.float64).expand(len(means), 2, 2)
    return GaussianMixture(TrigFlow(sigma_data=1.0), torch.ones(len(means)), centers, spread)


def test_flips_of_a_symmetric_teacher_only() -> None:
    symmetric, asymmetric = mixture([1.0, -1.0], [-1.0, 1.0]), mixture([1.0, -1.0], [1.0, 1.0])
    check_flips(symmetric, None)
    with pytest.raises(ValueError, match="flip: of flipped states the teacher makes other data"):
        check_flips(asymmetric, None)
    z = normal(64, 1, 1, 2)
    for teacher, right in ((symmetric, True), (asymmetric, False)):
        gap = solve_heun(teacher, z.flip(-1), 24) - solve_heun(teacher, z, 24).flip(-1)
        assert (float(gap.abs().max()) < 1e-9) == right
    with pytest.raises(ValueError, match=r"flip: samples \[2\] are no pictures"):
        check_flips(curved(), None)
    data = Dataset("x", torch.zeros(8, 1, 8, 8), torch.arange(8))
    for method in (AnnealingReflow(flip=True), FlowGuidedDistillation(flip=True)):
        with pytest.raises(ValueError, match="flip: of flipped states"):
            method.sources(Start(api.load("digits"), data))  # type: ignore[arg-type]


def test_flipped_pairs_are_flipped_together() -> None:
    """One coin a pair; in both stages what is trained on is flipped, and nothing where flips are off."""
    x = normal(400, 1, 2, 2)
    z = 2 * x
    a, b = flip_pairs(x, z, Rng(0))
    assert torch.equal(b, 2 * a)
    flipped = (a != x).flatten(1).any(1)
    assert torch.equal(a[flipped], x[flipped].flip(-1)) and 150 < int(flipped.sum()) < 250
    for flip in (False, True):
        seen: list[Tensor] = []

        class Spy(Straight):
            def velocity(self, x: Tensor, t: Any, cond: Any = None, seen: Any = seen, **_: Tensor) -> Tensor:
                seen.append(x)
                return x

        nets = Networks({"student": Jump(Spy((1, 2, 2))), "flow": Spy((1, 2, 2)), "distance": Plain(l2)}, {})
        next(FlowGuidedDistillation(flip=flip).updates(nets, Batch(x, None, Rng(0), {"noise": z}), Progress()))
        assert torch.equal(seen[0], z) != flip
        seen.clear()
        model = Networks({"model": Spy((1, 2, 2))}, {})
        batch = Batch(x, None, Rng(0), {"noise": z})
        next(AnnealingReflow(beta=Ramp(0.0), flip=flip).updates(model, batch, Progress()))
        t = Rng(0).uniform(400, low=1e-3, high=1.0)
        assert torch.allclose(seen[0], straight_pair(x, z, t)) != flip


# --- a smaller network -----------------------------------------------------------------------------------------------


def network(seed: int, width: int = 8, blocks: int = 1) -> NetworkDenoiser:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        net = MLP((2,), width, blocks).double()
        for p in net.parameters():
            p.data += 0.1 * torch.randn_like(p)
    return NetworkDenoiser(net, FlowMatching(), TrigPrediction(0.7), (2,))


def test_pairs_are_the_big_teachers_and_the_second_teacher_the_small_flow() -> None:
    """Both stages train the given network, on the pairs of the user's teacher; what the second is guided by is what the
    first made, frozen."""
    big, small = network(0, 16, 2).float(), network(1).float()
    first, second = (stage.method for stage in SlimFlow(pairs=8, ode_steps=2).stages())
    assert [stage.share for stage in SlimFlow().stages()] == [2.0, 1.0]
    start = Start(big, Dataset("x", torch.zeros(8, 2)), given={"student": small})
    nets = first.networks(start)
    assert size(nets.model) == size(small) < size(big)
    with torch.no_grad():
        next(iter(nets.model.parameters())).add_(1.0)
    later = Start(big, start.data, given=start.given, made=first.hands_on(nets))
    pairs = [method.sources(s)["data"] for method, s in ((first, start), (second, later))]
    assert torch.equal(pairs[0].x, pairs[1].x)  # type: ignore[union-attr]
    noise = pairs[0].columns["noise"]  # type: ignore[union-attr]
    torch.testing.assert_close(pairs[0].x, solve_heun(big, noise, 2))  # type: ignore[union-attr]
    after = second.networks(later)
    for mine in (after.student, after.flow):
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), nets.model.parameters(), strict=True))
    assert all(p.requires_grad for p in after.student.parameters())
    assert not any(p.requires_grad for p in after.flow.parameters())


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def trained(method: Method, start: Start, x: Tensor, z: Tensor, steps: int) -> Networks:
    """A plain Adam loop on pairs, its rate falling to 0."""
    nets = method.networks(start)
    (group,) = nets.groups
    optimizer = torch.optim.Adam(nets.group_parameters(group), 4e-3)
    for step in range(steps):
        for other in optimizer.param_groups:
            other["lr"] = 4e-3 * (1 - step / steps)
        rng = Rng(step, "slim")
        index = rng.integers(128, 0, len(x))
        batch = Batch(x[index], None, rng, {"noise": z[index]})
        (update,) = method.updates(nets, batch, Progress(fraction=step / steps))  # type: ignore[misc]
        optimizer.zero_grad()
        update.loss.backward()
        optimizer.step()
    return nets


def test_annealing_helps_a_small_network() -> None:
    """From fresh weights, on pairs of a mixture of two: the annealed flow ends about as near to the pairs of fresh
    noise as one that was never annealed, and distillation ends nearer than a step of either."""
    means = torch.tensor([[-1.0, 0.0], [1.0, 0.5]], dtype=torch.float64)
    spread = 0.04 * torch.eye(2, dtype=torch.float64).expand(2, 2, 2)
    teacher = GaussianMixture(EDM(), torch.ones(2), means, spread)
    z, fresh = normal(2048, 2), normal(1000, 2, seed=9)
    x, wanted = solve_heun(teacher, z, 12).float(), solve_heun(teacher, fresh, 12).float()
    z, fresh = z.float(), fresh.float()
    small = network(3, 24).float()

    def error(model: Denoiser) -> float:
        with torch.no_grad():
            return float((fresh - model.velocity(fresh, torch.ones(len(fresh))) - wanted).square().mean().sqrt())

    given = Start(teacher, given={"student": small})
    flows = {b: trained(AnnealingReflow(beta=b), given, x, z, 250).model for b in (Ramp(1.0, 0.0, 0.375), Ramp(0.0))}
    annealed, plain = (error(flow) for flow in flows.values())
    flow = next(iter(flows.values())).requires_grad_(False)
    last = trained(FlowGuidedDistillation(), Start(teacher, made={"student": flow}), x, z, 150)
    distilled = error(last.student.denoiser)
    assert annealed < 1.1 * plain
    assert distilled < 0.9 * min(annealed, plain)
    assert distilled < 0.35
