"""CTM: its parameterisation in closed form, the law of its times, and what its two losses move."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fewstep import grids
from fewstep.denoisers import NetworkDenoiser
from fewstep.exact import Gaussian
from fewstep.exact.world import ExactFlowMap
from fewstep.flow_maps import Jump
from fewstep.methods.consistency.ctm import ConsistencyTrajectory, SelfConsistencyTrajectory
from fewstep.methods.method import Batch, Networks, Progress, alone
from fewstep.methods.parts.teacher_steps import heun_step
from fewstep.methods.start import Start
from fewstep.networks import MLP
from fewstep.predictions import EDMPrediction
from fewstep.randomness import Rng
from fewstep.sampling.rollout import Plan, rollout
from fewstep.schedules import EDM

SCHEDULE = EDM()

# sony/ctm and Kim-Dongjun/ctm-cifar10, the commands of CIFAR-10 for consistency and denoising
FIELDS = {
    "lr": 4e-4, "grid_times": 18, "most_steps": 17, "mu": 0.999, "denoising_weight": 1.0, "distance": "lpips",
    "sigma_data": 0.5, "steps": ...,
    # a GAN of 30k iterations and more after 10k to 50k without; its discriminator's rate
    "gan_share": 0.5, "gan_lr": 2e-3,
    "optimizer": {
        "kind": "radam", "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "clip": None, "warmup": ...,
        "decay": "constant",
    },
}  # fmt: skip
PUBLISHED = {"ctm": {**FIELDS, "guidance": 1.0}, "ctm-training": FIELDS}


def teacher() -> NetworkDenoiser:
    torch.manual_seed(0)
    net = MLP((3,), 16, 2, 2).double()
    with torch.no_grad():
        for p in net.parameters():
            p += 0.2 * torch.randn_like(p)
    return NetworkDenoiser(net, SCHEDULE, EDMPrediction(), (3,), 2)


def batch(n: int = 64, seed: int = 0) -> Batch:
    x = torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return Batch(x, torch.arange(n) % 2, Rng(seed, "ctm"))


def networks(method: ConsistencyTrajectory | SelfConsistencyTrajectory) -> Networks:
    nets = method.networks(Start(teacher()))
    gen = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in nets.group_parameters("student"):
            p += 0.05 * torch.randn(p.shape, generator=gen, dtype=torch.float64)
    return nets


def test_g_of_a_gaussian_is_the_closed_form_and_tends_to_the_denoiser() -> None:
    """``g*(x, t, s) = (sqrt((c^2 + s^2) / (c^2 + t^2)) - s / t) / (1 - s / t) x``: .079620 at (1.7, 1.6999) for c = .5,
    beside the denoiser's c^2 / (c^2 + t^2) = .079618."""
    c, t, s = 0.5, 1.7, 1.6999
    exact = ExactFlowMap(Gaussian(SCHEDULE, torch.zeros(1, dtype=torch.float64), c**2))
    x = torch.ones(1, 1, dtype=torch.float64)
    g = float((exact(x, t, s) - s / t * x) / (1 - s / t))
    assert abs(g - ((c**2 + s**2) ** 0.5 / (c**2 + t**2) ** 0.5 - s / t) / (1 - s / t)) < 1e-11
    assert (round(g, 6), round(c**2 / (c**2 + t**2), 6)) == (0.079620, 0.079618)


def test_a_student_starts_as_the_teachers_ddim_and_stays_where_it_is_at_s_equal_t() -> None:
    """``G(x, t, s)`` of the untrained student is ``(s / t) x + (1 - s / t) D``; ``G(x, t, t) = x`` for any weights, and
    ``g(x, t, t)`` is the denoiser that the student hands on."""
    method = ConsistencyTrajectory()
    fresh, x = method.networks(Start(teacher())).student, batch().x
    t, s = torch.full((64,), 1.7, dtype=torch.float64), torch.full((64,), 0.4, dtype=torch.float64)
    d = teacher()(x, t, batch().cond)
    torch.testing.assert_close(fresh(x, t, s, batch().cond), s[0] / t[0] * x + (1 - s[0] / t[0]) * d)
    moved = networks(method).student
    assert torch.equal(moved(x, t, t, batch().cond), x)
    assert not torch.allclose(moved(x, t, s, batch().cond), fresh(x, t, s, batch().cond))
    instant = moved.instant()
    torch.testing.assert_close(instant(x, t, batch().cond), moved.predict(x, t, t, batch().cond))


def test_the_exact_map_composes_and_keeps_the_law_under_every_gamma() -> None:
    """``G(G(x, t, u), u, s) = G(x, t, s)``, and gamma-sampling is linear on a Gaussian: the gain that the jumps leave
    and the variance that the noise adds make the data's variance, for every gamma."""
    c = 0.5
    exact = ExactFlowMap(Gaussian(SCHEDULE, torch.zeros(1, dtype=torch.float64), c**2))
    x = torch.ones(1, 1, dtype=torch.float64)
    torch.testing.assert_close(exact(exact(x, 9.0, 2.0), 2.0, 0.3), exact(x, 9.0, 0.3))
    start = (80.0**2 + c**2) ** 0.5 / 80.0  # what the law at t_max is wide in units of the prior

    class Unit:
        """Noise that is 0 but for one draw, which is 1: the rollout's gain from that draw."""

        def __init__(self, at: int) -> None:
            self.at = at

        def normal_like(self, x: Tensor) -> Tensor:
            self.at -= 1
            return torch.full_like(x, float(self.at == -1))

        def increment(self, x: Tensor, start: float, end: float) -> Tensor:
            return self.normal_like(x)

    for gamma in (0.0, 0.4, 1.0):
        plan = Plan((80.0, 5.0, 0.7), gamma=gamma)
        gains = [float(rollout(exact, start * x, plan, rng=Unit(9)))]
        gains += [float(rollout(exact, 0 * x, plan, rng=Unit(k))) for k in range(2)]
        at_the_end = exact.world.flow(x * (c**2 + 0.002**2) ** 0.5, 0.002, 0.002)  # data and the noise at t_min
        # gamma = 1 noises from t_min, where the law is c^2 + t_min^2 already
        assert abs(sum(gain**2 for gain in gains) ** 0.5 - float(at_the_end)) < 1e-5, gamma
        assert (gains[1] > 1e-3) == (gamma > 0)


def test_the_law_of_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """``h`` is one number a batch, as probable as it is large; ``s <= u < t`` on the grid, all of it used."""
    method = ConsistencyTrajectory(grid_times=6, most_steps=3, denoising_weight=0.0)
    nets = networks(method)
    grid = grids.karras(nets.student.schedule, 5)
    seen: dict[int, int] = {}
    targets: list[tuple[Tensor, Tensor, Tensor]] = []

    def ahead(self, nets, x, times, cond):
        seen[len(times) - 1] = seen.get(len(times) - 1, 0) + 1
        targets.append((times[0], times[-1], torch.empty(0)))
        return x

    monkeypatch.setattr(ConsistencyTrajectory, "ahead", ahead)
    jump = Jump.forward

    def forward(self, x, t, s, cond=None, **extras):
        if self is nets.student:
            targets[-1] = (*targets[-1][:2], s)
        return jump(self, x, t, s, cond, **extras)

    monkeypatch.setattr(Jump, "forward", forward)
    for k in range(300):
        list(alone(method.updates(nets, batch(8, k), Progress())))
    t, u, s = (torch.cat(column) for column in zip(*targets, strict=True))
    assert bool((s <= u).all()) and bool((u < t).all())
    assert set(t.tolist()) == set(grid[:-1].tolist()) and set(s.tolist()) == set(grid[1:].tolist())
    shares = [seen[h] / 300 for h in (1, 2, 3)]
    assert all(abs(share - h / 6) < 0.09 for h, share in zip((1, 2, 3), shares, strict=True))  # three sd of 300


def test_the_teacher_goes_heun_steps_along_the_grid() -> None:
    method = ConsistencyTrajectory()
    nets, x, cond = networks(method), 3 * batch().x, batch().cond
    times = grids.karras(SCHEDULE, 17)[4:7, None].expand(3, 64)
    there = heun_step(teacher(), heun_step(teacher(), x, times[0], times[1], cond), times[1], times[2], cond)
    torch.testing.assert_close(method.ahead(nets, x, times, cond), there)
    alone_ = SelfConsistencyTrajectory()
    own = networks(alone_)
    torch.testing.assert_close(alone_.ahead(own, x, times, cond), own.target(x, times[0], times[2], cond))


def test_gradients_of_the_two_losses_have_one_size_at_the_output() -> None:
    """With the denoising loss the update is that of consistency plus its weight times denoising's; half the weight
    asks for half of its gradient."""
    method = ConsistencyTrajectory()
    updates = list(alone(method.updates(networks(method), batch(), Progress())))
    assert [update.group for update in updates] == ["student"]
    logs = updates[0].logs
    value = logs["consistency"] + logs["denoising_weight"] * logs["denoising"]
    torch.testing.assert_close(updates[0].loss.detach(), value)
    half = replace(method, denoising_weight=0.5)
    again = next(alone(half.updates(networks(half), batch(), Progress()))).logs
    torch.testing.assert_close(again["denoising_weight"], logs["denoising_weight"] / 2)


def test_the_target_follows_and_impossible_settings_are_refused() -> None:
    method = ConsistencyTrajectory(mu=0.75)
    nets = networks(method)
    before = [p.clone() for p in nets.target.parameters()]
    (update,) = alone(method.updates(nets, batch(), Progress()))
    assert update.then is not None
    update.then()
    for old, now, student in zip(before, nets.target.parameters(), nets.student.parameters(), strict=True):
        torch.testing.assert_close(now, 0.75 * old + 0.25 * student)
    with pytest.raises(ValueError, match="most_steps=18 must be below grid_times=18"):
        ConsistencyTrajectory(most_steps=18)
