"""iCT: the law of its times, its grid, and what its weights and distance do to the fixed point and to gradients."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fewstep import grids
from fewstep.denoisers import NetworkDenoiser
from fewstep.flow_maps import EDMConsistency, FlowMap
from fewstep.methods.consistency import ict
from fewstep.methods.consistency.ict import ImprovedConsistencyTraining, interval_probabilities
from fewstep.methods.method import Batch, Networks, Optimizer, Progress
from fewstep.methods.parts.distances import Compare, l2, pseudo_huber
from fewstep.methods.start import Start
from fewstep.networks import MLP, UNet
from fewstep.predictions import EDMPrediction
from fewstep.randomness import Rng
from fewstep.sampling.rollout import Plan
from fewstep.schedules import EDM, FlowMatching, TrigFlow

F64 = torch.float64
C = 0.5


class Scripted(Rng):
    """Draws that a test has chosen: uniform numbers, then noise."""

    def __init__(self, u: torch.Tensor, z: torch.Tensor) -> None:
        super().__init__(0)
        self.u, self.z = u, z

    def uniform(self, n: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        return self.u

    def normal_like(self, x: torch.Tensor) -> torch.Tensor:
        return self.z


def perturbed_network(shape: tuple[int, ...] = (2,), seed: int = 0) -> NetworkDenoiser:
    torch.manual_seed(seed)
    net = MLP(shape, 16, 1).double()
    for p in net.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return NetworkDenoiser(net, EDM(), EDMPrediction(), shape)


def test_probabilities_of_the_intervals() -> None:
    """p(i) of eleven levels from 0.002 to 80, from the cleanest interval to the noisiest, to four digits."""
    p = interval_probabilities(grids.karras(EDM(), 10), -1.1, 2.0).flip(0)
    known = [0.0626, 0.1817, 0.2455, 0.2135, 0.1424, 0.0806, 0.0411, 0.0196, 0.0089, 0.0040]
    assert p.tolist() == pytest.approx(known, abs=5.1e-5)
    assert float(p.sum()) == pytest.approx(1, abs=1e-14)


def test_intervals_are_drawn_with_their_probabilities() -> None:
    """The times of a batch of evenly spread uniform numbers fall into every interval as often as p says, to one."""
    n = 20_000
    u = (torch.arange(n, dtype=F64) + 0.5) / n
    seen: list[torch.Tensor] = []

    class Watch(FlowMap):
        def forward(self, x, t, s, cond=None):
            seen.append(t)
            return x

    nets = Networks({"student": Watch(EDM(), (1,), None)}, {})
    batch = Batch(torch.zeros(n, 1, dtype=F64), None, Scripted(u, torch.ones(n, 1, dtype=F64)))
    next(ImprovedConsistencyTraining().updates(nets, batch, Progress()))
    grid = grids.karras(EDM(), 10)
    p = interval_probabilities(grid, -1.1, 2.0)
    s, t = seen  # the target is called first
    for k in range(10):
        chosen = t == grid[k]
        assert int(chosen.sum()) == pytest.approx(float(p[k]) * n, abs=1)
        assert bool((s[chosen] == grid[k + 1]).all())


def test_grid_doubles_in_equal_phases() -> None:
    """N takes the values 11, 21, 41, .., 1281, each for an eighth of the budget; other ends stop at s1 + 1."""
    method = ImprovedConsistencyTraining()
    steps = 4000
    sizes = [method.scales(Progress(fraction=k / steps)) for k in range(steps)]
    phases = [(size, len(list(group))) for size, group in itertools.groupby(sizes)]
    assert phases == [(10 * 2**k + 1, 500) for k in range(8)]
    assert method.scales(Progress(fraction=1.0)) == 1281
    odd = ImprovedConsistencyTraining(s0=10, s1=50)
    assert sorted({odd.scales(Progress(fraction=k / 100)) for k in range(101)}) == [11, 21, 41, 51]


def test_the_distance_is_of_the_whole_sample_and_its_gradient_below_one() -> None:
    """One sample of n numbers has one gradient of norm ``r / sqrt(r^2 + c^2) < 1``; taken number by number it would
    grow to sqrt(n)."""
    n = 64
    c = 0.00054 * n**0.5
    for size in (1e-6, 1e-3, 1.0, 1e3):
        difference = torch.full((1, n), size, dtype=F64, requires_grad=True)
        pseudo_huber(difference, torch.zeros(1, n, dtype=F64)).sum().backward()
        r = size * n**0.5
        assert difference.grad is not None
        assert float(difference.grad.norm()) == pytest.approx(r / math.sqrt(r**2 + c**2), rel=1e-9)
        assert float(difference.grad.norm()) < 1


class Linear(FlowMap):
    """``f(x, t_n) = a_n x`` on the times of a grid."""

    def __init__(self, grid: torch.Tensor, a: torch.Tensor) -> None:
        super().__init__(EDM(), (1,), None)
        self.grid, self.a = grid, torch.nn.Parameter(a)

    def forward(self, x, t, s, cond=None):
        return self.a[torch.searchsorted(-self.grid, -t)][:, None] * x


def test_gaussian_fixed_point_is_that_of_consistency_training() -> None:
    """On N(0, 0.5^2) with 1280 times the gradient vanishes at the Euler product, whose end error is -0.222 %, in every
    coefficient: neither the weight nor pseudo-Huber moves the least-squares optimum, because the residual there is
    symmetric whatever the state is.  One thousandth off, it does not vanish."""
    n = 1280
    grid = grids.karras(EDM(), n - 1)
    t, s = grid[:-1], grid[1:]
    factors = (C**2 + t * s) / (C**2 + t**2)
    a = torch.cat([factors.flip(0).cumprod(0).flip(0), torch.ones(1, dtype=F64)])
    exact = math.sqrt((C**2 + 0.002**2) / (C**2 + 80.0**2))
    assert 100 * (float(a[0]) / exact - 1) == pytest.approx(-0.2219, rel=2e-3)

    # state p and residual q are independent: for every interval and state, one residual of each sign
    p, q = torch.tensor([0.4, 0.4, -1.3, -1.3], dtype=F64), torch.tensor([0.7, -0.7, 0.7, -0.7], dtype=F64)
    x_t = (C**2 + t**2).sqrt()[:, None] * p
    spread = C * (t - s) / (C**2 + t**2).sqrt()
    z = (x_t - (factors[:, None] * x_t + spread[:, None] * q)) / (t - s)[:, None]
    x = (x_t - t[:, None] * z).reshape(-1, 1)
    share = interval_probabilities(grid, -1.1, 2.0).cumsum(0)
    u = (torch.cat([torch.zeros(1, dtype=F64), share[:-1]]) + share) / 2  # inside each interval's share

    def gradient(a: torch.Tensor) -> torch.Tensor:
        model = Linear(grid, a)
        batch = Batch(x, None, Scripted(u.repeat_interleave(4), z.reshape(-1, 1)))
        (update,) = ImprovedConsistencyTraining(s0=n - 1, s1=n - 1).updates(
            Networks({"student": model}, {"student": Optimizer(("student",), 1e-4)}), batch, Progress()
        )  # fmt: skip
        return torch.autograd.grad(update.loss, model.a)[0][:-1]

    there = gradient(a)
    off = torch.stack([gradient(torch.where(torch.arange(n) % 2 == k, 1.001, 1.0) * a) for k in (0, 1)]).abs().amax(0)
    assert bool((there.abs() < 1e-6 * off).all())


@pytest.mark.parametrize(("distance", "few", "many"), [(l2, 20, 320), (pseudo_huber, 6_000, 96_000)])
def test_an_average_as_target_blows_up_the_gradient(
    distance: Compare, few: int, many: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the distance is quadratic, a target that lags behind by nine tenths of an update, as an average with
    mu = 0.9 does, adds a gradient that grows in proportion to N, by the weight 1 / (t - s), until nothing else is left;
    with the network itself as target it stays, because the difference shrinks as the weight grows."""
    model, lagging = EDMConsistency(perturbed_network()), EDMConsistency(perturbed_network())
    with torch.no_grad():
        for p in lagging.parameters():
            p.add_(0.9 * 1e-2 * torch.randn_like(p))
    x = C * Rng(1).normal(4096, 2, dtype=F64)
    nets = Networks({"student": model}, {"student": Optimizer(("student",), 1e-4)})
    loss = ict.consistency_loss

    def gradient(n: int, target: FlowMap) -> torch.Tensor:
        def other(student, _, *rest):
            return loss(student, target, *rest[:-1], distance)

        monkeypatch.setattr(ict, "consistency_loss", other)
        method = ImprovedConsistencyTraining(s0=n - 1, s1=n - 1)
        (update,) = method.updates(nets, Batch(x, None, Rng(2)), Progress())
        found = torch.autograd.grad(update.loss, list(model.parameters()), allow_unused=True)
        return torch.cat([g.flatten() for g in found if g is not None])

    own = {n: gradient(n, model) for n in (few, many)}
    added = {n: float((gradient(n, lagging) - own[n]).norm()) for n in own}
    assert added[many] / added[few] == pytest.approx(16, rel=0.15)
    assert 0.5 < float(own[many].norm() / own[few].norm()) < 1.5


def test_loss_is_the_weighted_distance() -> None:
    """``d / (t - s)``, the weight after the distance, with one noise for both states; float64, by hand."""
    method = ImprovedConsistencyTraining()
    nets = method.networks(Start(perturbed_network()))
    assert [name for name, _ in nets.named_children()] == ["student"]
    x = Rng(3).normal(16, 2, dtype=F64)
    (update,) = method.updates(nets, Batch(x, None, Rng(4)), Progress(fraction=0.3))
    rng, grid = Rng(4), grids.karras(EDM(), 40)
    share = interval_probabilities(grid, -1.1, 2.0).cumsum(0)
    n = (rng.uniform(16)[:, None] >= share).sum(1)
    z = rng.normal_like(x)
    total = 0.0
    for k in range(16):
        t, s = grid[n[k]], grid[n[k] + 1]
        noisier, cleaner = (nets.student.to_data((x[k] + r * z[k])[None], r[None]) for r in (t, s))
        f = noisier - cleaner
        c = 0.00054 * 2**0.5
        total += float((f.square().sum() + c**2).sqrt() - c) / float(t - s) / 16
    assert float(update.loss) == pytest.approx(total, rel=1e-12)
    assert update.logs["scales"] == 41 and update.then is None


def test_both_calls_see_the_same_dropout_mask() -> None:
    """With 30 % dropout the distance of neighbours on a fine grid is small only when their masks agree."""
    torch.manual_seed(0)
    net = UNet((1, 8, 8), (16,), 1, 32, None, dropout=0.3)
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    method = ImprovedConsistencyTraining(s0=20_000, s1=20_000)
    nets = method.networks(Start(NetworkDenoiser(net, EDM(), EDMPrediction(), (1, 8, 8))))
    x = torch.zeros(64, 1, 8, 8)
    batch = Batch(x, None, Scripted(torch.full((64,), 0.3, dtype=F64), torch.ones_like(x)))
    (update,) = method.updates(nets, batch, Progress())
    t = float(interval_at(0.3))
    step = 7 * t ** (6 / 7) * (80 ** (1 / 7) - 0.002 ** (1 / 7)) / 20_000
    state = torch.full((64, 1, 8, 8), t)
    once, again = (nets.student.to_data(state, t).detach() for _ in range(2))
    assert float(update.loss.detach()) * step < 0.01 * float(pseudo_huber(once, again).mean())


def interval_at(u: float) -> torch.Tensor:
    """The noise level at which the share of noisier ones is ``u``."""
    grid = grids.karras(EDM(), 20_000)
    return grid[torch.searchsorted(interval_probabilities(grid, -1.1, 2.0).cumsum(0), u)]


@pytest.mark.parametrize("schedule", [EDM(), FlowMatching(0.002, 0.999), TrigFlow(sigma_data=0.7)])
def test_one_call_and_two(schedule) -> None:
    """The student samples in one call and in two, the second at noise level 0.821; the loss moves the only network."""
    net = perturbed_network()
    teacher = NetworkDenoiser(net.net, schedule, EDMPrediction(), (2,))
    method = ImprovedConsistencyTraining()
    nets = method.networks(Start(teacher))
    top = nets.student.schedule.t_max
    student = method.student(nets)
    assert student.plans == {1: Plan((top,)), 2: Plan((top, 0.821))}
    (update,) = method.updates(nets, Batch(Rng(5).normal(8, 2, dtype=F64), None, Rng(6)), Progress())
    update.loss.backward()
    assert any(p.grad is not None and float(p.grad.abs().max()) > 0 for p in nets.student.parameters())
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"s0": 20, "s1": 10}, "s1=10 must be at least s0=20"),
        ({"beta2": 1.0}, "beta2=1 must lie in"),
        ({"noise_std": 0.0}, "noise_std=0 must be positive"),
        ({"second_level": 200.0}, "second_level=200 must lie between 0.002 and 80"),
    ],
)
def test_impossible_values_are_named(values, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImprovedConsistencyTraining(**values).networks(Start(perturbed_network()))
