"""Shortcut Models: the step size as an input, targets from two smaller steps, and the shares of a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.conditions import rows
from fewstep.denoisers import Denoiser, NetworkDenoiser
from fewstep.exact import three_modes
from fewstep.exact.world import ExactFlowMap
from fewstep.flow_maps import FlowMap, Jump
from fewstep.methods.flow_maps.shortcut import Shortcut, bootstrap_target
from fewstep.methods.method import Batch, Networks, Progress, Update
from fewstep.methods.start import Start
from fewstep.networks import MLP
from fewstep.predictions import Eps, TrigPrediction
from fewstep.randomness import Rng
from fewstep.schedules import FlowMatching, TrigFlow

#: kvfrans/shortcut-models, train.py and targets_shortcut.py: AdamW, no warm-up, 128 steps, every 8th row bootstrapped.
PUBLISHED: dict[str, Any] = {
    "finest": 128, "share": 1 / 8, "mu": 0.999, "bound": 4.0, "guidance": 1.0, "label_dropout": 0.1, "lr": 1e-4,
    "weight_decay": 0.1, "steps": ...,
    "optimizer": {
        "kind": "adamw", "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "clip": None, "warmup": 0,
        "decay": "constant",
    },
}  # fmt: skip
SHAPE, N = (3,), 4096


def teacher(classes: int | None = 2) -> NetworkDenoiser:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = MLP(SHAPE, 16, 1, classes).double()
        with torch.no_grad():
            for p in net.parameters():
                p += 0.2 * torch.randn_like(p)
    return NetworkDenoiser(net, TrigFlow(sigma_data=0.7), TrigPrediction(sigma_data=0.7), SHAPE, classes)


def batch(n: int = N, seed: int = 1) -> Batch:
    x = torch.randn(n, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return Batch(x, torch.arange(n) % 2, Rng(seed))


class Told(FlowMap):
    """The exact maps of a world, each of the step that it is told; remembers what it was asked."""

    def __init__(self, denoiser: Any) -> None:
        super().__init__(denoiser.schedule, denoiser.shape, None)
        self.exact, self.asked = ExactFlowMap(denoiser), []

    def forward(self, x: Tensor, t: Any, s: Any, cond: Any = None, **extras: Tensor) -> Tensor:
        return self.exact(x, t, s)

    def mean_velocity(self, x: Tensor, t: Any, s: Any, cond: Any = None, **extras: Tensor) -> Tensor:
        self.asked.append((t, extras["d"]))
        s = t - 2.0 ** -extras["d"]
        return (self.exact(x, t, s) - x) / (s - t)[:, None]


def test_the_target_is_the_mean_of_two_smaller_steps() -> None:
    """(v_1 + v_2) / 2 from steps of half the size, which are told so; with the exact maps of a mixture it is the exact
    mean velocity of the larger step."""
    flow = FlowMatching()
    world = three_modes(flow)
    maps = Told(world)
    level = torch.tensor([0.0, 1.0, 1.0, 3.0, 6.0], dtype=torch.float64)
    t = torch.tensor([1.0, 1.0, 0.5, 0.625, 0.5], dtype=torch.float64)
    x = torch.randn(5, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = bootstrap_target(maps, x, t, level)
    d = 2.0**-level
    wanted = (world.flow(x, t, t - d) - x) / -d[:, None]
    torch.testing.assert_close(target, wanted, atol=1e-11, rtol=1e-11)
    (t_1, d_1), (t_2, d_2) = maps.asked
    assert torch.equal(t_1, t) and torch.equal(t_2, t - d / 2) and torch.equal(d_1, level + 1)
    assert torch.equal(d_2, level + 1)
    v_1 = maps.mean_velocity(x, t, None, d=level + 1)
    v_2 = maps.mean_velocity(x - d[:, None] / 2 * v_1, t - d / 2, None, d=level + 1)
    torch.testing.assert_close(target, (v_1 + v_2) / 2, atol=1e-13, rtol=1e-12)


def test_states_and_targets_are_clipped_where_asked() -> None:
    """The authors' [-4, 4]: between the steps and at the end."""
    seen: list[Tensor] = []

    class Large(Told):
        def mean_velocity(self, x: Tensor, t: Any, s: Any, cond: Any = None, **extras: Tensor) -> Tensor:
            seen.append(x)
            return torch.full_like(x, -9.0)

    maps = Large(three_modes(FlowMatching()))
    x, t, level = torch.full((2, 1), 2.0).double(), torch.ones(2).double(), torch.zeros(2).double()
    assert bootstrap_target(maps, x, t, level, bound=4.0).unique().tolist() == [-4.0]
    assert seen[1].unique().tolist() == [4.0]
    assert bootstrap_target(maps, x, t, level).unique().tolist() == [-9.0] and seen[3].unique().tolist() == [6.5]


def spied(method: Shortcut, given: Batch, source: Denoiser | None = None) -> tuple[dict[str, Tensor], Update, Networks]:
    """What the student was asked in one update: state, time, size, labels."""
    nets = method.networks(Start(teacher() if source is None else source))
    asked: dict[str, Tensor] = {}
    with torch.no_grad():
        for p in nets.target.parameters():  # away from the student
            p += 0.05
    real = nets.student.mean_velocity

    def spy(x: Tensor, t: Tensor, s: Tensor, cond: Any = None, **extras: Tensor) -> Tensor:
        asked.update(x=x, t=t, s=s, cond=cond, d=extras["d"])
        return real(x, t, s, cond, **extras)

    nets.student.mean_velocity = spy
    (update,) = method.updates(nets, given, Progress())
    return asked, update, nets


def test_the_shares_of_a_batch_are_drawn() -> None:
    """7/8 of it is flow matching at the finest size, at times of its grid; the rest has all larger sizes alike, each at
    times of its own grid.  One in ten of flow matching's labels is gone, none of the others'."""
    given = batch()
    asked, _, _ = spied(Shortcut(finest=16, share=1 / 8), given)
    finest = asked["d"] == 4
    assert float(finest.double().mean()) == pytest.approx(7 / 8, abs=0.02)
    counts = asked["d"][~finest].long().bincount()
    assert len(counts) == 4 and int(counts.min()) > 0.75 * int(counts.max())
    index = asked["t"] * 2.0 ** asked["d"]
    assert torch.equal(index, index.round()) and float(index.min()) == 1 and float(asked["t"].max()) == 1
    for k in range(5):
        assert index[asked["d"] == k].unique().tolist() == list(range(1, 2**k + 1))
    assert torch.equal(asked["s"], asked["t"] - 2.0 ** -asked["d"])
    gone = asked["cond"] == -1
    assert float(gone[finest].double().mean()) == pytest.approx(0.1, abs=0.02) and not bool(gone[~finest].any())
    assert torch.equal(asked["cond"][~gone], given.cond[~gone])


def test_the_loss_is_flow_matching_and_the_bootstrap() -> None:
    """Row by row against both targets written out, the second from the average network, which follows the student."""
    method, given = Shortcut(finest=8, share=0.5, mu=0.9, label_dropout=0.0), batch(64)
    asked, update, nets = spied(method, given)
    z = Rng(1).normal_like(given.x)
    t, level = asked["t"], asked["d"].double()
    x_t = (1 - t)[:, None] * given.x + t[:, None] * z
    torch.testing.assert_close(asked["x"], x_t, atol=0, rtol=0)
    larger = level < 3
    boot = bootstrap_target(nets.target, x_t, t, level.clamp_max(2), given.cond)
    target = torch.where(larger[:, None], boot, z - given.x)
    f = Jump.mean_velocity(nets.student, x_t, t, t, given.cond, d=asked["d"])
    torch.testing.assert_close(update.loss, (f - target).square().mean(), atol=1e-14, rtol=1e-12)
    wrong = torch.where(larger[:, None], boot, given.x - z)
    assert float((f - wrong).square().mean() - update.loss) > 0.1
    old = [p.detach().clone() for p in nets.target.parameters()]
    assert update.then is not None
    update.then()
    moves = [new - before for new, before in zip(nets.target.parameters(), old, strict=True)]
    assert all(torch.allclose(move, torch.full_like(move, -0.005)) for move in moves)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_batch_of_one_kind(share: float) -> None:
    """Flow matching alone, and the bootstrap alone."""
    asked, update, _ = spied(Shortcut(finest=8, share=share), batch(16))
    assert bool(update.loss.isfinite())
    assert bool((asked["d"] < 3).all()) if share else bool((asked["d"] == 3).all())


def test_guidance_is_in_the_smallest_bootstrapped_steps() -> None:
    """Their two steps are those of the guided network, larger ones are not; a teacher that knows no empty condition is
    refused."""
    method, given = Shortcut(finest=8, guidance=3.0), batch(8)
    nets = method.networks(Start(teacher()))
    level = torch.tensor([2.0, 2.0, 1.0, 0.0, 2.0, 1.0, 0.0, 2.0], dtype=torch.float64)
    d, t = level + 1, torch.ones(8, dtype=torch.float64)
    made = method.smaller(nets.target, level).mean_velocity(given.x, t, t, given.cond, d=d)
    plain, free = (nets.target.mean_velocity(given.x, t, t, cond, d=d) for cond in (given.cond, None))
    wanted = torch.where((level == 2)[:, None], free + 3 * (plain - free), plain)
    torch.testing.assert_close(made, wanted, atol=1e-13, rtol=1e-12)
    assert float((made - plain).abs().max()) > 1e-2
    assert torch.equal(rows(given.cond, torch.arange(2)), given.cond[:2])
    with pytest.raises(ValueError, match="guidance=3"):
        method.networks(Start(teacher(None)))


def test_plans_tell_the_size() -> None:
    """k steps are told log2(k), and sampling is Euler along the uniform grid."""
    method = Shortcut(steps=(1, 2, 8), finest=8)
    student = method.student(method.networks(Start(teacher())))
    assert [plan.extras for plan in student.plans.values()] == [{"d": 0.0}, {"d": 1.0}, {"d": 3.0}]
    assert student.plans[2].times == (1.0, 0.5)
    with torch.no_grad():
        for p in student.parameters():
            p += 0.1
    noise, cond = torch.randn(4, *SHAPE, dtype=torch.float64), torch.tensor([0, 1, 0, 1])
    x = noise
    for t in (1.0, 0.5):
        x = x - 0.5 * student.flow_map.mean_velocity(x, t, t - 0.5, cond, d=torch.ones(4).double())
    torch.testing.assert_close(student(noise, cond, steps=2), x, atol=1e-13, rtol=1e-12)
    assert not torch.allclose(student(noise, cond, steps=2, d=3.0), x, atol=1e-3)


def test_what_cannot_be_is_refused() -> None:
    for wrong, said in (
        ({"finest": 12}, "finest=12 must be a power of 2"), ({"steps": (1, 3)}, "steps=3 must be a power of 2"),
        ({"finest": 4}, "steps=8 must be a power of 2, at most finest=4"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            Shortcut(**wrong)
    noise = NetworkDenoiser(MLP(SHAPE, 8, 1), FlowMatching(), Eps(), SHAPE)
    with pytest.raises(ValueError, match="does not tell the data at t = 1"):
        Shortcut().networks(Start(noise))
