"""LCM: its times, its boundary, and its loss where the function that it learns is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep import grids
from fewstep.denoisers import NetworkDenoiser
from fewstep.discrete_vp import DiscreteVP
from fewstep.exact import Gaussian, GuidedFlowMap, GuidedGaussian, three_modes
from fewstep.flow_maps import FlowMap, LatentConsistency
from fewstep.guidance import Guided
from fewstep.methods.consistency.cm import consistency_loss
from fewstep.methods.consistency.lcm import LatentConsistencyDistillation
from fewstep.methods.method import Batch, Networks, Progress
from fewstep.methods.parts.distances import Plain, l2
from fewstep.methods.parts.teacher_steps import ddim_step
from fewstep.methods.start import Start
from fewstep.networks import MLP, UNet
from fewstep.predictions import Eps, TrigPrediction
from fewstep.randomness import Rng
from fewstep.sampling.student_samplers import ending_clean, skipping_times
from fewstep.schedules import EDM, FlowMatching, Schedule, TrigFlow

#: The authors' script and README (loss, rate of the target, weight decay of 0), the paper's rate and scales, which it
#: counts without the 1 (2 to 14).
PUBLISHED = {
    "lr": 8e-6, "distance": "pseudo-huber", "skip": 20, "mu": 0.999943, "guidance_min": 3.0, "guidance_max": 15.0,
    "sigma_data": 0.5, "time_scale": 10.0, "steps": (1, 2, 4, 8),
    "optimizer": {
        "kind": "adamw", "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "clip": 1.0, "warmup": 0,
        "decay": "constant",
    },
}  # fmt: skip

SHAPE, CLASSES = (3,), 2


def network(schedule: Schedule | None = None, classes: int | None = CLASSES) -> NetworkDenoiser:
    """A small network with weights away from their start."""
    torch.manual_seed(0)
    net = MLP(SHAPE, 16, 1, classes).double()
    with torch.no_grad():
        for p in net.parameters():
            p += 0.2 * torch.randn_like(p)
    return NetworkDenoiser(net, schedule or TrigFlow(sigma_data=0.7), TrigPrediction(sigma_data=0.7), SHAPE, classes)


def batch(n: int = 64, seed: int = 3) -> Batch:
    x = torch.randn(n, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return Batch(x, torch.arange(n) % CLASSES, Rng(seed))


class Steps(FlowMap):
    """The teacher's guided DDIM steps from ``t`` down a grid to the data, at the weight that it is told."""

    def __init__(self, teacher: Any, grid: Tensor, told_more: float = 0.0, ends: Tensor | None = None) -> None:
        super().__init__(teacher.schedule, teacher.shape, teacher.classes)
        self.teacher_of_steps, self.grid, self.told_more = teacher, grid, told_more
        self.ends = grid[-1:] if ends is None else ends

    def forward(self, x: Tensor, t: Any, s: Any, cond: Any = None, **extras: Tensor) -> Tensor:
        time = torch.as_tensor(t, dtype=torch.float64).expand(len(x))
        end = torch.as_tensor(s, dtype=torch.float64).expand(len(x))
        led = Guided(self.teacher_of_steps, extras["w"] + self.told_more) if extras else self.teacher_of_steps
        for high, low in zip(self.grid[:-1], self.grid[1:], strict=True):
            moved = ddim_step(led, x, high.expand(len(x)), low.expand(len(x)), cond)
            x = torch.where(((time >= high) & (end <= low))[:, None], moved, x)
        return x


@pytest.mark.parametrize("schedule", [TrigFlow(sigma_data=0.7), FlowMatching(), DiscreteVP.scaled_linear()])
def test_the_loss_is_zero_at_the_teachers_own_steps_and_at_no_other_weight(schedule: Schedule) -> None:
    """For a teacher that is a network, at a weight of its own for every sample: the composition of its guided DDIM
    steps has no loss; told a weight that is 0.1 off, it has."""
    method = LatentConsistencyDistillation(skip=100, steps=(1,))
    nets = method.networks(Start(network(schedule)))
    weight = nets.student.extras
    for off, zero in ((0.0, True), (0.1, False)):
        exact = Steps(nets.teacher, method.times(nets.student.schedule))
        wrong = Steps(nets.teacher, exact.grid, off)
        exact.extras = wrong.extras = weight
        roles = {"student": wrong, "target": exact, "teacher": nets.teacher, "distance": Plain(l2)}
        (update,) = method.updates(Networks(roles, {}), batch(), Progress())
        assert (float(update.loss) < 1e-24) is zero, off


def test_skipping_costs_the_first_order() -> None:
    """The composition of guided DDIM steps, which is what the loss is zero at, is off the exact guided map by an error
    that halves with the steps skipped."""
    world = GuidedGaussian(FlowMatching(t_max=0.99), SHAPE, 0.2, 1.5, 2.0)
    x = torch.randn(8, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = GuidedFlowMap(world).to_data(x, world.schedule.t_max, w=torch.full((8,), 2.0, dtype=torch.float64))
    errors = []
    for skip in (40, 20, 10):
        made = Steps(world, grids.skipping(world.schedule, skip)).to_data(x, world.schedule.t_max)
        errors.append(float((made - exact).norm() / exact.norm()))
    assert 1.7 < errors[0] / errors[1] < 2.3 and 1.7 < errors[1] / errors[2] < 2.3
    assert errors[1] < 0.1


def test_times_are_those_of_the_teachers_own_index() -> None:
    """Of a table 999, 979, .., 19, 0, and plans at LCM's times; else thousandths of the own index, on EDM Karras' ramp,
    over the range of levels that there is."""
    table, method = DiscreteVP.scaled_linear(), LatentConsistencyDistillation()
    assert method.times(table).tolist() == [*range(999, 0, -20), 0]
    for steps in (1, 2, 4, 8, 50):
        assert method.plan_times(table, steps) == skipping_times(table, steps, 50)
    flow = method.times(FlowMatching())
    torch.testing.assert_close(flow, torch.linspace(1, 0, 51, dtype=torch.float64), rtol=0, atol=1e-15)
    assert method.plan_times(FlowMatching(), 4) == pytest.approx((1.0, 0.76, 0.5, 0.26))
    torch.testing.assert_close(method.times(EDM()), grids.karras(EDM(), 50), rtol=1e-12, atol=0)
    narrow = method.times(EDM(0.1, 5.0))
    torch.testing.assert_close(narrow, grids.karras(EDM(0.1, 5.0), 50), rtol=1e-12, atol=0)
    trig = method.times(TrigFlow())
    assert (float(trig[0]), float(trig[-1])) == (TrigFlow().t_max, 0.0)


def test_index_and_time_are_each_others_inverse(schedule: Schedule) -> None:
    """On every schedule; the index rises with the time, and the ends are the schedule's."""
    last = grids.last_index(schedule)
    n = torch.linspace(1, last - 1, 40, dtype=torch.float64)
    torch.testing.assert_close(grids.own_index(schedule, grids.at_index(schedule, n)), n, rtol=1e-9, atol=1e-9)
    ends = grids.at_index(schedule, torch.tensor([0.0, last], dtype=torch.float64))
    assert ends.tolist() == [schedule.t_min, schedule.t_max]


def test_boundary() -> None:
    """``f(x, t_min) = x`` exactly, on every kind of schedule; at step n of a table the coefficients are those of
    diffusers' LCMScheduler, ``sd^2 / ((10 n)^2 + sd^2)`` and ``10 n / sqrt(..)``."""
    x = torch.randn(4, *SHAPE, dtype=torch.float64)
    for schedule in (ending_clean(DiscreteVP.scaled_linear()), TrigFlow(sigma_data=0.7), EDM(), FlowMatching()):
        f = LatentConsistency(network(TrigFlow(sigma_data=0.7)).on(schedule))
        assert torch.equal(f.to_data(x, schedule.t_min), x)
        assert not torch.allclose(f.to_data(x, schedule.t_max / 2), x, atol=1e-2)
    table = ending_clean(DiscreteVP.scaled_linear())
    f = LatentConsistency(network().on(table), time_scale=0.01)  # so that both coefficients count
    for n in (19.0, 259.0):
        skip, out = 0.25 / ((0.01 * n) ** 2 + 0.25), 0.01 * n / ((0.01 * n) ** 2 + 0.25) ** 0.5
        torch.testing.assert_close(f.to_data(x, n), skip * x + out * f.denoiser(x, n), rtol=1e-13, atol=0)
    with pytest.raises(ValueError, match="jumps to t_min=0"):
        f(x, 19.0, 5.0)


def test_the_weight_is_drawn_anew_for_every_sample_and_told_as_the_network_counts() -> None:
    """Uniform in the range; a network whose weight is 0 where there is no guidance is told the scale less 1, and the
    student declares its input so; a baked-in weight is no input."""
    method = LatentConsistencyDistillation(guidance_min=2.0, guidance_max=5.0)
    nets = method.networks(Start(network()))
    declared = nets.student.extras["w"]
    assert (declared.low, declared.default, declared.high, declared.unguided) == (2.0, 3.5, 5.0, 1.0)
    led, told = method.led(nets, batch(20_000))
    scale = led.scale
    assert torch.equal(scale, told["w"]) and float(scale.min()) >= 2 and float(scale.max()) < 5
    assert abs(float(scale.mean()) - 3.5) < 0.02 and abs(float(scale.var()) - 9 / 12) < 0.02
    other = network()
    other.net.unguided = 0.0
    nets = method.networks(Start(other))
    nets.student.denoiser.net.unguided = 0.0
    assert method.weight_of(other)["w"].at_scale(2.0) == 1.0
    baked = LatentConsistencyDistillation(guidance_min=3.0, guidance_max=3.0)
    nets = baked.networks(Start(network()))
    assert not nets.student.extras and nets.teacher.guidance == 3.0
    assert baked.led(nets, batch()) == (nets.teacher, {})


def test_a_student_of_the_users_learns_the_guided_steps() -> None:
    """A network of its own, trained from fresh weights on the labelled modes of a mixture: in one call it makes what
    the teacher's guided steps make at the weight that it is told, and not at another."""
    world = three_modes(FlowMatching(t_max=0.99), [0, 1, 1]).float()
    torch.manual_seed(0)
    own = NetworkDenoiser(MLP((1,), 32, 2, 2), world.schedule, TrigPrediction(sigma_data=1.0), (1,), 2)
    method = LatentConsistencyDistillation(skip=100, steps=(1,), guidance_max=3.0)
    nets = method.networks(Start(world, given={"student": own}))
    optimizer = torch.optim.Adam(nets.group_parameters("student"), 5e-3)
    rng, count = Rng(0), 300
    for k in range(count):
        label = rng.integers(256, 0, 2)
        given = Batch(world.sample(256, rng, label).float(), label, rng)
        (update,) = method.updates(nets, given, Progress())
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - k / count)
        optimizer.zero_grad()
        update.loss.backward()
        optimizer.step()
        update.then()
    student, steps = method.student(nets), Steps(world, method.times(world.schedule))
    label, noise = torch.zeros(2000, dtype=torch.long), Rng(1).normal(2000, 1)
    made = {w: student(noise, label, 1, w=w) for w in (1.0, 3.0)}
    aims = {w: steps.to_data(0.99 * noise, 0.99, label, w=torch.full((2000,), w)) for w in made}
    for w in made:
        gaps = {other: float((made[w] - aim).square().mean()) for other, aim in aims.items()}
        assert gaps[w] < 0.06 and gaps[w] < 0.3 * max(gaps.values()), (w, gaps)


def test_both_calls_see_the_same_dropout_mask_and_weight() -> None:
    """With equal states, weights and dropout the loss is exactly zero, and not between calls."""
    torch.manual_seed(0)
    net = UNet((1, 8, 8), (16,), 1, 32, 2, dropout=0.5)
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    teacher = NetworkDenoiser(net, TrigFlow(), TrigPrediction(), (1, 8, 8), 2)
    nets = LatentConsistencyDistillation().networks(Start(teacher))
    x, t, cond = torch.randn(4, 1, 8, 8), torch.full((4,), 0.9, dtype=torch.float64), torch.arange(4) % 2
    given = Batch(x, cond, Rng(0))
    loss = consistency_loss(nets.student, nets.target, given, x, x, t, t, l2, w=torch.full((4,), 2.0))
    assert float(loss.detach().abs().max()) == 0.0
    assert not torch.equal(nets.target.to_data(x, t, cond, w=t), nets.target.to_data(x, t, cond, w=t))
    assert torch.equal(nets.teacher(x, t, cond), nets.teacher(x, t, cond))


def test_the_target_follows_once_with_mu_and_is_the_student_at_zero() -> None:
    nets = LatentConsistencyDistillation(mu=0.9).networks(Start(network()))
    first = [p.clone() for p in nets.target.parameters()]
    for p in nets.student.parameters():
        p.data += 1.0
    (update,) = LatentConsistencyDistillation(mu=0.9).updates(nets, batch(), Progress())
    update.loss.backward()
    assert all(p.grad is None for p in [*nets.target.parameters(), *nets.teacher.parameters()])
    update.then()
    for p, q in zip(first, nets.target.parameters(), strict=True):
        torch.testing.assert_close(q, p + 0.1)
    method = LatentConsistencyDistillation(mu=0.0)
    nets = method.networks(Start(network()))
    assert "target" not in dict(nets.named_children())
    (update,) = method.updates(nets, batch(), Progress())
    assert update.then is None and float(update.loss.detach()) > 0


def test_a_student_goes_on_with_its_weight_and_not_without() -> None:
    """A student that takes the guidance weight can be trained on where it is told it."""
    method = LatentConsistencyDistillation()
    student = method.student(method.networks(Start(network())))
    again = method.networks(Start(network(), given={"student": student}))
    assert all(torch.equal(a, b) for a, b in zip(again.student.parameters(), student.parameters(), strict=True))
    with pytest.raises(ValueError, match="the student: a student with the further input w"):
        LatentConsistencyDistillation(guidance_max=1.0).networks(Start(network(), given={"student": student}))


def test_what_cannot_be_is_refused_in_one_line() -> None:
    bare = Start(network(classes=None))
    eps = network()
    eps.prediction, eps.schedule = Eps(), FlowMatching()
    refused = [
        (lambda: LatentConsistencyDistillation().networks(bare), "guidance_min=1, guidance_max=4: .*set both to 1"),
        (lambda: LatentConsistencyDistillation(guidance_min=5.0), "guidance_max=4 must be at least guidance_min=5"),
        (lambda: LatentConsistencyDistillation(skip=1001).networks(Start(network())), "skip=1001 must be at most 1000"),
        (lambda: LatentConsistencyDistillation(skip=200).networks(Start(network())), "steps=8: .* has 5 times"),
        (lambda: LatentConsistencyDistillation().networks(Start(eps)), "does not tell the data at t = 1"),
    ]
    for make, reason in refused:
        with pytest.raises(ValueError, match=reason) as found:
            make()
        assert "\n" not in str(found.value)
    unguided = LatentConsistencyDistillation(guidance_max=1.0)
    assert unguided.networks(bare).student.extras == {}
    world = Gaussian(FlowMatching(), torch.zeros(2, dtype=torch.float64), 0.25)
    assert world.null is None
