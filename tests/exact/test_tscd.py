"""TSCD: where its jumps end, its loss where the function that it learns is known, TCD's rule of sampling, and its two
sides."""

from __future__ import annotations

import pytest
import torch
from test_lcm import batch, network
from torch import Tensor

from fewstep import grids
from fewstep.discrete_vp import DiscreteVP
from fewstep.exact import ExactFlowMap, Gaussian, three_modes
from fewstep.methods.consistency.tscd import SegmentedConsistency, draw_ends, solver_times, tcd_plan
from fewstep.methods.method import Batch, Networks, Progress
from fewstep.methods.parts.adversary import FeatureHead
from fewstep.methods.parts.distances import Plain, l2
from fewstep.methods.parts.times import Segments
from fewstep.methods.start import Start
from fewstep.randomness import Rng
from fewstep.sampling.rollout import Plan, renoise, rollout
from fewstep.sampling.student_samplers import student_plan
from fewstep.schedules import EDM, FlowMatching, Schedule, VPLinear

#: The paper and the model cards; the weights of the two terms, the decay of the target and the guidance are not
#: given.
PUBLISHED = {
    "segments": ..., "lr": 1e-6, "skip": ..., "mu": ..., "guidance_min": ..., "guidance_max": ..., "distance": "l2",
    "distance_weight": ..., "adversarial_weight": ..., "discriminator_rank": ...,
    "discriminator_lr": ..., "steps": (1, 2, 4, 8), "eta": ...,
    "target_time": False,
    "optimizer": dict.fromkeys(
        ("kind", "betas", "eps", "weight_decay", "clip", "warmup", "decay"), ...
    ),
}  # fmt: skip


def test_jumps_end_in_their_segment_below_the_next_time(schedule: Schedule) -> None:
    """``t_b <= t_end <= s < t`` at every time of the solver, edges among them, whose segment is the one below: none is
    empty.  One segment goes down to ``t_min``; both bounds are reached, and a table gives whole steps."""
    for k in (1, 2, 4, 8):
        grid = solver_times(schedule, 20, k)
        t, s = (part.repeat(40) for part in (grid[:-1], grid[1:]))
        method = SegmentedConsistency(segments=k)
        low, end = Segments(k).end(schedule, t), method.ends(schedule, t, s, Rng(k))
        assert bool((low <= end).all()) and bool((end <= s).all()) and bool((s < t).all())
        assert len(set(low.tolist())) == k and float(low.min()) == schedule.t_min
        place, first, last = (grids.own_index(schedule, time) for time in (end, low, s))
        wide = last - first > 4
        share = ((place - first) / (last - first).clamp_min(1e-9))[wide]
        assert abs(float(share.mean()) - 0.5) < 0.05 and float(share.min()) < 0.02 and float(share.max()) > 0.98
        if schedule.table_length:
            assert torch.equal(end, end.round())
            assert bool((end == s).any()) and bool((end == low).any())


def test_an_end_without_room_is_its_bound(schedule: Schedule) -> None:
    t = grids.at_index(schedule, torch.linspace(0, grids.last_index(schedule), 9, dtype=torch.float64))
    assert torch.equal(draw_ends(schedule, t, t, Rng(0)), t)


def exact(world: object) -> dict[str, torch.nn.Module]:
    return {
        "student": ExactFlowMap(world), "target": ExactFlowMap(world), "teacher": world, "distance": Plain(l2),
    }  # fmt: skip


@pytest.mark.parametrize("segments", [1, 4])
def test_the_loss_at_the_exact_map_falls_with_the_steps_skipped(segments: int) -> None:
    """What is left is the squared error of one DDIM step, which is of second order: a sixteenth for half the skip."""
    world = three_modes(EDM(0.02, 20.0))
    losses = []
    for skip in (8, 4):
        given = Batch(world.sample(2048, Rng(3)), None, Rng(4))
        method = SegmentedConsistency(segments=segments, skip=skip)
        (update,) = method.updates(Networks(exact(world), {}), given, Progress())
        losses.append(float(update.loss))
    assert 10 < losses[0] / losses[1] < 24


def test_exact_segments_compose_to_the_one_step_map() -> None:
    """On a mixture: the plans of 8, 4, 2 and 1 segments make of every noise what the exact map makes of it."""
    world = three_modes(EDM(0.02, 20.0))
    z = torch.randn(64, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    end = world.flow(20.0 * z, 20.0, 0.02)
    for segments in (8, 4, 2, 1):
        student = SegmentedConsistency(segments=segments).student(Networks({"student": ExactFlowMap(world)}, {}))
        plan = student.plans[segments]
        assert len(plan.times) == segments and plan == tcd_plan(world.schedule, segments, 0.0)
        assert float((rollout(student.flow_map, z, plan) - end).abs().max()) < 1e-6
    wrong = Plan(tcd_plan(world.schedule, 4, 0.0).times, gamma=1.0)
    assert float((rollout(ExactFlowMap(world), z, wrong, rng=Rng(1)) - end).abs().max()) > 0.1


def variance_after(world: Gaussian, r: float, s: float, variance: Tensor, t: float) -> Tensor:
    """The variance after the exact jump from ``t`` to ``r`` and noise up to ``s``, of states of a variance at ``t``."""
    points = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    low, high = ExactFlowMap(world)(points, t, r)[:, 0]
    a, sd = world.schedule.transition(*torch.tensor([r, s], dtype=torch.float64))
    return (a * (high - low) / 2) ** 2 * variance + sd**2


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("schedule", [VPLinear(), FlowMatching(), DiscreteVP.linear()], ids=["vp", "flow", "table"])
def test_every_eta_keeps_the_gaussian_marginals(schedule: Schedule, eta: float) -> None:
    """At every call of the plans of 2, 4 and 8, from the exact marginal at the first: ``alpha^2 c^2 + sigma^2``."""
    world = Gaussian(schedule, torch.zeros(1, dtype=torch.float64), 0.25)
    for steps in (2, 4, 8):
        plan = tcd_plan(schedule, steps, eta)
        times = torch.tensor(plan.times, dtype=torch.float64)
        wanted = schedule.alpha(times) ** 2 * 0.25 + schedule.sigma(times) ** 2
        variance = wanted[0]
        for i in range(steps - 1):
            r = plan.inner_at(schedule, i)
            variance = variance_after(world, r, plan.times[i + 1], variance, plan.times[i])
            assert abs(float(variance - wanted[i + 1])) < 1e-9, (steps, i)
            assert (r < plan.times[i + 1]) is (eta > 0)


def test_the_marginal_of_one_step_is_the_known_number() -> None:
    """c = 0.5, a jump to alpha^2 = 0.85 and noise up to 0.6: 0.6 * 0.25 + 0.4 = 0.55; that of another prior is not."""
    schedule = VPLinear()
    world = Gaussian(schedule, torch.zeros(1, dtype=torch.float64), 0.25)
    kept = torch.tensor([0.85, 0.6], dtype=torch.float64)
    r, s = schedule.time_at(torch.log(kept / (1 - kept)) / 2).tolist()
    first = torch.tensor(schedule.t_max, dtype=torch.float64)
    prior = schedule.alpha(first) ** 2 * 0.25 + schedule.sigma(first) ** 2
    assert abs(float(variance_after(world, r, s, prior, schedule.t_max)) - 0.55) < 1e-9
    assert abs(float(variance_after(world, r, s, 2 * prior, schedule.t_max)) - 0.55) > 0.1


def test_plans_follow_tcds_rule_on_a_table() -> None:
    """Times of trailing segments, jumps to ``floor((1 - eta) s)``; an eta of 0 is deterministic, 1 re-noises from
    the data; an eta for each number of steps."""
    table = DiscreteVP.scaled_linear()
    assert tcd_plan(table, 4, 0.3) == Plan((999, 749, 499, 249), inner=(524.0, 349.0, 174.0))
    assert tcd_plan(table, 4, 0.0) == Plan((999, 749, 499, 249), gamma=0.0)
    assert tcd_plan(table, 2, 1.0).inner == (0.0,) and tcd_plan(table, 1, 0.3) == Plan((999,), gamma=0.0)
    nets = SegmentedConsistency().networks(Start(network(FlowMatching())))
    etas = SegmentedConsistency(steps=(1, 2, 4), eta=(0.0, 0.5, 0.1)).student(nets).plans
    assert etas[2].inner == (0.25,) and etas[4].inner == pytest.approx((0.675, 0.45, 0.225))
    student = SegmentedConsistency().student(SegmentedConsistency().networks(Start(network(table))))
    assert list(student.plans) == [1, 2, 4, 8] and student_plan(student, "tcd", 4, eta=0.3).inner is not None


def test_samples_of_a_plan_draw_noise_as_tcd_does() -> None:
    """A rollout by hand: jump below the next time, noise up to it."""
    nets = SegmentedConsistency(eta=(0.4,)).networks(Start(network(FlowMatching())))
    student = SegmentedConsistency(eta=(0.4,)).student(nets)
    noise, cond = batch(8).x, batch(8).cond
    made = student(noise, cond, 2, Rng(7))
    below = student.flow_map(noise, 1.0, 0.3, cond)
    by_hand = student.flow_map(renoise(below, 0.3, 0.5, FlowMatching(), Rng(7)), 0.5, 0.0, cond)
    torch.testing.assert_close(made, by_hand, rtol=1e-12, atol=1e-12)


def test_both_sides_of_the_adversary_read_the_same_two_landings() -> None:
    """The student's update leaves the discriminator alone and reaches the student through its landing; the
    discriminator's is that of these landings noised on to times between their end and their start.  Weight 0 leaves all
    of it out."""
    method = SegmentedConsistency(segments=2, adversarial_weight=0.5, distance_weight=0.0)
    nets = method.networks(Start(network(FlowMatching()))).double()
    with torch.no_grad():
        for p in nets.group_parameters("student"):
            p += 0.1
    seen: list[tuple[Tensor, Tensor]] = []
    real = nets.teacher.features

    def features(x: Tensor, t: Tensor, cond: object) -> Tensor:
        seen.append((x, t))
        return real(x, t, cond)

    nets.teacher.features = features
    updates = method.updates(nets, batch(), Progress())
    first = next(updates)
    assert first.group == "student"
    first.loss.backward()
    assert all(p.grad is None for p in nets.discriminator.parameters())
    assert sum(float(p.grad.abs().sum()) for p in nets.group_parameters("student")) > 0
    second = next(updates)
    assert second.group == "discriminator" and not second.loss.isnan()
    assert all(p.grad_fn is None for p in nets.student.parameters())
    (fake, times), (both, twice) = seen
    assert torch.equal(twice, torch.cat([times, times])) and torch.equal(both[len(fake) :], fake.detach())
    assert not torch.equal(both[: len(fake)], fake)
    landed, aim, t, end = method.land(nets, batch())
    assert bool((end <= times).all()) and bool((times <= t).all()) and bool((times > end).any())
    a, sd = FlowMatching().transition(end, times)
    noises = [((x - a[:, None] * y) / sd[:, None]) for x, y in ((fake, landed), (both[: len(fake)], aim))]
    assert all(abs(float(noise.square().mean()) - 1) < 0.3 for noise in noises)
    assert next(updates, None) is None
    plain = SegmentedConsistency(segments=2)
    assert "discriminator" not in dict(plain.networks(Start(network())).named_children())
    assert [u.group for u in plain.updates(plain.networks(Start(network())), batch(), Progress())] == ["student"]
    assert isinstance(nets.discriminator.heads.heads[0], FeatureHead)


def test_the_target_follows_after_the_update_only() -> None:
    method = SegmentedConsistency(mu=0.75)
    nets = method.networks(Start(network()))
    (update,) = method.updates(nets, batch(), Progress())
    with torch.no_grad():
        for p in nets.student.parameters():
            p += 1.0
    assert update.then is not None
    before = [p.clone() for p in nets.target.parameters()]
    update.then()
    for was, now, towards in zip(before, nets.target.parameters(), nets.student.parameters(), strict=True):
        torch.testing.assert_close(now, 0.75 * was + 0.25 * towards)


def test_what_cannot_be_is_refused_in_one_line() -> None:
    bare, tiny = Start(network(classes=None)), Start(network(DiscreteVP.linear(30)))
    refused = [
        (
            lambda: SegmentedConsistency(guidance_max=2.0).networks(bare),
            "guidance_max=2: this teacher is unconditional",
        ),
        (lambda: SegmentedConsistency(segments=30).networks(tiny), "skip=20|30 segments: DiscreteVP has no times"),
        (lambda: SegmentedConsistency(skip=30).networks(tiny), "skip=30 must be at most 29"),
        (
            lambda: SegmentedConsistency(eta=(0.1, 0.2)),
            r"eta=\(0.1, 0.2\) must be one number, or one for each of steps",
        ),
        (lambda: SegmentedConsistency(eta=(1.5,)), "eta=1.5 must lie in"),
        (lambda: SegmentedConsistency(guidance_min=2.0), "guidance_max=1 must be at least guidance_min=2"),
    ]
    for make, reason in refused:
        with pytest.raises(ValueError, match=reason) as found:
            make()
        assert "\n" not in str(found.value)
