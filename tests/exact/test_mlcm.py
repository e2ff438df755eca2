"""MLCM: states of the teacher's own trajectories, segments, and what each of its stages asks."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from test_lcm import Steps, batch, network
from torch import Tensor, nn

from fewstep import grids
from fewstep.data.dataset import Prior
from fewstep.denoisers import CountCalls
from fewstep.discrete_vp import DiscreteVP
from fewstep.exact import ExactFlowMap, Gaussian, GuidedGaussian
from fewstep.flow_maps import FlowMap
from fewstep.methods.consistency.mlcm import (
    MLCM,
    MultistepConsistency,
    Preference,
    SegmentJoining,
    SelfMatching,
    even_plan,
    trajectory_states,
)
from fewstep.methods.method import Batch, Method, Networks, Progress, alone
from fewstep.methods.parts.adversary import Discriminator
from fewstep.methods.parts.distances import Plain, l2
from fewstep.methods.parts.distribution_matching import critic_loss
from fewstep.methods.parts.teacher_steps import ddim_steps, times_between
from fewstep.methods.start import Start
from fewstep.randomness import Rng
from fewstep.runs.course import run_recipe
from fewstep.runs.stages import stages_of
from fewstep.sampling.rollout import Call, rollout
from fewstep.schedules import EDM, FlowMatching, Schedule, TrigFlow
from fewstep.training.budget import Budget
from fewstep.training.settings import Settings

F64 = torch.float64
#: TLCM's text; the weights of the games, the margin of the reward that it stands for here, and how MLCM merges, are not
#: in it.
PUBLISHED = {
    "lr": 1e-4, "later_lr": 1e-5, "critic_lr": 1e-4, "guidance": 8.0, "segments": 8, "skip": 20,
    "joining": "merging", "merges": ..., "student_steps": 4, "teacher_steps": 3, "margin": ...,
    "shares": (12.0, 2.0, 0.5, 1.0), "steps": ..., "gamma": 1.0, "distance": "latent lpips",
    "optimizer": {
        "kind": "adamw", **dict.fromkeys(("betas", "eps", "weight_decay", "clip", "warmup", "decay"), ...),
    },
}  # fmt: skip


def dataless(n: int = 8, seed: int = 3) -> Batch:
    return Batch(None, torch.arange(n) % 2, Rng(seed), shape=(n, 3))


def nets_of(method: Method, student: FlowMap, teacher: Any) -> Networks:
    return Networks({"student": student, "teacher": teacher, "distance": Plain(l2)}, {})


def loss_of(method: Method, nets: Networks, given: Batch) -> float:
    (update,) = method.updates(nets, given, Progress())
    return float(update.loss.detach())


@pytest.mark.parametrize("schedule", [EDM(), FlowMatching(), TrigFlow(sigma_data=0.7), DiscreteVP.scaled_linear()])
def test_states_are_the_teachers_steps_row_by_row(schedule: Schedule) -> None:
    """A row is what as many DDIM steps of equal length make of it alone; one that is told no steps stays; the teacher
    is called as often as the longest way may be, with the rows that still move."""
    teacher = CountCalls(network(schedule))
    index = torch.tensor([1000.0, 700, 420, 999, 40, 310], dtype=F64).clamp_max(grids.last_index(schedule))
    t, steps = grids.at_index(schedule, index), torch.tensor([0, 1, 5, 2, 3, 4])
    noise, cond = schedule.prior(torch.randn(6, 3, dtype=F64)), torch.arange(6) % 2
    made = trajectory_states(teacher, noise, t, steps, 6, cond)
    assert teacher.calls == 6 and torch.equal(made[0], noise[0])
    top = torch.full((1,), schedule.t_max, dtype=F64)
    for i in range(1, 6):
        way = times_between(schedule, top, t[i : i + 1], int(steps[i]))
        with torch.no_grad():
            single = ddim_steps(teacher, noise[i : i + 1], way, cond[i : i + 1])
        torch.testing.assert_close(made[i : i + 1], single, rtol=1e-9, atol=1e-9)


def test_states_have_the_forward_law_up_to_the_error_of_the_steps_and_not_under_guidance() -> None:
    """For an exact teacher on a Gaussian the deviation at t is that of noised data up to an error of the first order;
    under guidance between two Gaussians it goes to that of the guided flow, narrower than the narrow law's."""
    schedule, n = FlowMatching(), 2
    unit = torch.tensor([[1.0], [-1.0]], dtype=F64)  # the teacher is linear: one state tells the deviation
    t = torch.full((n,), 0.3, dtype=F64)

    def deviation(teacher: Any, steps: int) -> float:
        made = trajectory_states(teacher, schedule.prior(unit), t, torch.full((n,), steps), steps)
        return float(made[0])

    forward = float((0.49 * 0.25 + 0.09) ** 0.5)
    world = Gaussian(schedule, torch.zeros(1, dtype=F64), 0.25)
    errors = [abs(deviation(world, steps) - forward) for steps in (8, 16, 32)]
    assert errors[0] < 0.04 and all(1.7 < a / b < 2.3 for a, b in pairwise(errors))
    led = GuidedGaussian(schedule, (1,), 0.25, 1.0, 3.0)
    exact = float(led.flow(schedule.prior(unit), schedule.t_max, 0.3)[0])
    assert deviation(led, 400) == pytest.approx(exact, rel=0.01)
    assert exact < 0.75 * forward


def test_a_segment_further_down_takes_more_steps() -> None:
    """``M - s`` of them in segment s, none at the start itself, so that no row is made in one rough step."""
    asked: list[Tensor] = []

    class Seen(CountCalls):
        def forward(self, x: Tensor, t: Any, cond: Any = None, **extras: Tensor) -> Tensor:
            asked.append(torch.as_tensor(t))
            return super().forward(x, t, cond, **extras)

    method = MultistepConsistency(segments=4, skip=50, steps=(2, 4))
    nets = method.networks(Start(network(FlowMatching())))
    nets.teacher = Seen(nets.teacher)
    loss_of(method, nets, batch(400))
    grid = method.times(nets.student.schedule)
    moving = [len(t) for t in asked[:4]]
    share = torch.tensor(moving) / 400
    # 19 of the 20 times but the first are below the start, 15, 10 and 5 of the 20 in lower segments
    torch.testing.assert_close(share, torch.tensor([19, 15, 10, 5]) / 20, rtol=0, atol=0.08)
    assert len(grid) == 21 and len(asked) == 5 and len(asked[4]) == 400


@pytest.mark.parametrize("schedule", [TrigFlow(sigma_data=0.7), FlowMatching()])
def test_merging_segments_leaves_the_composed_map(schedule: Schedule) -> None:
    """The composition of the teacher's own steps has no loss in 8, 4 and 2 segments of one grid, and none where whole
    jumps are joined in as many steps; its deterministic plans of 8, 4 and 2 calls make one sample; one that is off
    by a share of its time has a loss, and the jump from a time to itself is the state."""
    source = network(schedule)
    grid = grids.skipping(schedule, 25)
    exact = Steps(source, grid)

    class Over(Steps):
        def forward(self, x: Tensor, t: Any, s: Any, cond: Any = None, **extras: Tensor) -> Tensor:
            return super().forward(x, t, s, cond) + 0.01 * torch.as_tensor(t).reshape(-1, 1)

    samples = []
    for segments in (8, 4, 2):
        method = MultistepConsistency(segments=segments, skip=25)
        assert loss_of(method, nets_of(method, exact, source), batch()) < 1e-24
        assert loss_of(method, nets_of(method, Over(source, grid), source), batch()) > 1e-8
        samples.append(rollout(exact, batch(4).x, even_plan(schedule, segments, 0.0), torch.arange(4) % 2))
    torch.testing.assert_close(samples[0], samples[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(samples[0], samples[2], rtol=1e-12, atol=1e-12)
    joining = SegmentJoining(segments=8, teacher_steps=5, student_steps=2)
    assert loss_of(joining, nets_of(joining, exact, source), batch()) < 1e-24
    rough = dataclasses.replace(joining, teacher_steps=4)
    assert loss_of(rough, nets_of(rough, exact, source), batch()) > 1e-9
    nets = MultistepConsistency().networks(Start(source))
    x, t = batch(4).x, torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=F64) * schedule.t_max
    torch.testing.assert_close(nets.student(x, t, t), x, rtol=1e-12, atol=1e-12)


def test_skipping_costs_the_first_order_in_deterministic_sampling() -> None:
    """On a Gaussian, in as many calls as segments."""
    world = Gaussian(FlowMatching(), torch.zeros(3, dtype=F64), 0.25)
    x = batch(8).x
    exact = ExactFlowMap(world).to_data(x, 1.0)
    errors = []
    for skip in (50, 25, 12.5):
        student = Steps(world, grids.skipping(world.schedule, skip))  # type: ignore[arg-type]
        made = rollout(student, x, even_plan(world.schedule, 4, 0.0))
        errors.append(float((made - exact).norm() / exact.norm()))
    assert errors[0] < 0.1 and 1.7 < errors[0] / errors[1] < 2.3 and 1.7 < errors[1] / errors[2] < 2.3


def test_joining_looks_at_the_students_own_samples_at_edges() -> None:
    """Noised to the edges of the segments and to no other time; at the exact flow the loss is the teacher's error over
    a segment, whose square falls four times where its steps are doubled."""
    world = Gaussian(FlowMatching(), torch.full((3,), 0.4, dtype=F64), 0.25)
    seen: list[Tensor] = []

    class Exact(ExactFlowMap):
        def to_data(self, x: Tensor, t: Any, cond: Any = None, **extras: Tensor) -> Tensor:
            seen.append(torch.as_tensor(t, dtype=F64))
            return super().to_data(x, t, cond, **extras)

    losses = []
    for steps in (4, 8):
        method = SegmentJoining(segments=4, teacher_steps=steps, student_steps=2)
        seen.clear()
        given = dataclasses.replace(dataless(64), cond=None)
        losses.append(loss_of(method, nets_of(method, Exact(world), world), given))
    assert 3 < losses[0] / losses[1] < 5
    edges = {0.0, 0.25, 0.5, 0.75, 1.0}
    assert {round(v, 9) for times in seen for v in times.flatten().tolist()} == edges


def trained(method: Method, nets: Networks, iterations: int, lr: float = 1e-2) -> list[dict[str, float]]:
    """The logs of some iterations of Adam."""
    optimizers = {name: torch.optim.Adam(nets.group_parameters(name), lr) for name in nets.groups}
    lines = []
    for k in range(iterations):
        line: dict[str, float] = {}
        given = dataclasses.replace(dataless(32), rng=Rng(0, k))
        for update in method.updates(nets, given, Progress(k)):
            optimizers[str(update.group)].zero_grad()
            update.loss.backward()
            optimizers[str(update.group)].step()
            line |= {name: float(value) for name, value in update.logs.items()}
        lines.append(line)
    return lines


class Near(nn.Module):
    """A reward for samples near a point of their class; what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, pictures: Tensor, cond: Any) -> Tensor:
        return 1 - (pictures - self.weight * (1 - 2 * cond[:, None])).square().mean(1)


def test_a_reward_moves_the_samples_as_far_as_its_margin() -> None:
    """Through the samples and no weights of its own, up to the margin, where the gradient ends."""
    method = Preference(margin=0.5, student_steps=2)
    nets = method.networks(Start(network().float(), given={"reward": Near()}))
    rewards = [line["reward"] for line in trained(method, nets, 60)]
    assert rewards[0] < 0 and max(rewards) > 0.4
    assert nets.reward.net.weight.grad is None and torch.equal(nets.reward.net.weight, torch.ones(3))
    low = dataclasses.replace(method, margin=-1e6)
    (update,) = alone(low.updates(nets, dataless(), Progress()))
    assert float(update.loss.detach()) == 0.0
    with pytest.raises(ValueError, match="feedback=given asks a reward"):
        method.networks(Start(network()))


def test_matching_is_a_game_of_one_call_against_several() -> None:
    """From one noise; the student moves in every fifth iteration, the critic before; the student's update reaches the
    student only, the critic's critic and discriminator; no more calls than the rollout's and the two with a
    gradient."""
    method = SelfMatching(student_steps=4, gan_weight=1.0, discriminator_weight=1.0)
    nets = method.networks(Start(network().float()))
    nets.student.denoiser = CountCalls(nets.student.denoiser)
    (update,) = method.updates(nets, dataless(), Progress(3))
    assert update.groups == ("critic",) and nets.student.denoiser.calls == 4
    nets.student.denoiser.calls = 0
    updates = method.updates(nets, dataless(), Progress(4))
    first = next(updates)
    assert first.groups == ("student",) and nets.student.denoiser.calls in (5, 6)
    first.loss.backward()
    assert all(
        p.grad is None for name in ("critic", "discriminator", "teacher") for p in nets.get_submodule(name).parameters()
    )
    assert any(float(p.grad.abs().max()) > 0 for p in nets.student.parameters() if p.grad is not None)
    nets.zero_grad(set_to_none=True)
    second = next(updates)
    second.loss.backward()
    assert second.groups == ("critic",)
    assert all(p.grad is None for name in ("student", "teacher") for p in nets.get_submodule(name).parameters())
    assert all(
        any(p.grad is not None for p in nets.get_submodule(name).parameters()) for name in ("critic", "discriminator")
    )


def test_the_real_ones_are_samples_of_several_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The discriminator is shown the student's samples by its whole plan as real and what one call makes of the same
    noise as generated; the critic learns the predictions of a random call."""
    shown: list[tuple[Tensor, Tensor]] = []
    learned: list[Tensor] = []
    kept = Discriminator.loss

    def seen(self: Any, body: Any, real: Tensor, fake: Tensor, *rest: Any) -> Any:
        shown.append((real, fake))
        return kept(self, body, real, fake, *rest)

    def critic(model: Any, x: Tensor, *rest: Any) -> Tensor:
        learned.append(x)
        return critic_loss(model, x, *rest)

    monkeypatch.setattr(Discriminator, "loss", seen)
    monkeypatch.setattr("fewstep.methods.consistency.mlcm.critic_loss", critic)
    method = SelfMatching(student_steps=3)
    nets = method.networks(Start(network().float()))
    for k in range(8):
        list(method.updates(nets, dataless(seed=k), Progress()))
        given = dataless(seed=k)
        calls: list[Call] = []
        with torch.no_grad():
            real = rollout(nets.student, given.normal(), method.plan(nets), given.cond, given.rng, calls=calls)
        assert torch.equal(shown[-1][0], real) and torch.equal(shown[-1][1], calls[0].out)
        assert any(torch.equal(learned[-1], call.out) for call in calls)
        assert not torch.equal(real, calls[0].out)
    assert len(shown) == 8


def test_plans_are_even_and_re_noise_or_jump_on() -> None:
    table = DiscreteVP.scaled_linear()
    found = {k: even_plan(table, k).times for k in (2, 4, 8)}
    assert found[4] == (999, 749, 499, 249) and found[2] == (999, 499) and len(found[8]) == 8
    for gamma in (1.0, 0.0):
        method = MultistepConsistency(gamma=gamma)
        student = method.student(method.networks(Start(network(table))))
        assert list(student.plans) == [2, 4, 8] and {plan.gamma for plan in student.plans.values()} == {gamma}
        assert student.only_to_data is (gamma == 1.0)
    assert float(student.flow_map.schedule.sigma(torch.tensor(0.0, dtype=F64))) < 1e-7


def test_stages_and_their_shares() -> None:
    """12 : 2 : 0.5 : 1; the reward's is left out where none is given; joining is by edges, by merging or by both."""

    def told(recipe: MLCM, *given: str) -> list[tuple[str, float]]:
        return [(stage.method.name.removeprefix("mlcm-"), stage.share) for stage in stages_of(recipe, given)]

    at_edges = MLCM(joining="milestones")
    assert told(at_edges) == [("segments", 12), ("joining", 2), ("matching", 1)]
    assert told(at_edges, "reward")[2] == ("preference", 0.5)
    assert told(MLCM())[1:3] == [("segments", 1), ("segments", 1)]
    both: Any = [stage.method for stage in MLCM(joining="both", guidance=3.0, lr=1.0, later_lr=0.5).stages()]
    assert [method.segments for method in both] == [8, 4, 2, 8, 8, 8]
    assert [method.lr for method in both] == [1.0, 0.5, 0.5, 0.5, 0.5, 0.5]
    assert {method.guidance for method in both} == {3.0}
    for merges in ((8, 4), (2, 4)):
        with pytest.raises(ValueError, match=r"mlcm: merges=\d,\d must fall from below segments=8"):
            MLCM(merges=merges)
    with pytest.raises(ValueError, match="no stage has a share"):
        stages_of(MLCM(shares=(0.0, 0.0, 1.0, 0.0)))


def test_a_run_needs_no_data_and_takes_a_reward(tmp_path: Path) -> None:
    """All four stages, each in a folder, from conditions alone; without the reward three."""
    recipe = MLCM(segments=2, joining="milestones", student_steps=2, steps=(1, 2), skip=100, guidance=1.5)
    settings = Settings(Budget(8), batch=4, precision="fp32", save_seconds=0.0, log_steps=1)
    conditions = Prior((3,), torch.arange(8) % 2)
    teacher = network().float()
    with_reward = run_recipe(
        recipe, teacher, conditions, settings, tmp_path / "a", given={"reward": Near()}, show=False
    )
    names = [p.name for p in sorted((tmp_path / "a").glob("stage-*"))]
    assert names == [
        "stage-0-mlcm-segments",
        "stage-1-mlcm-joining",
        "stage-2-mlcm-preference",
        "stage-3-mlcm-matching",
    ]
    plain = run_recipe(recipe, teacher, conditions, settings, tmp_path / "b", show=False)
    assert len(list((tmp_path / "b").glob("stage-*"))) == 3
    noise, cond = torch.randn(4, 3), torch.arange(4) % 2
    assert not torch.equal(with_reward.model(noise, cond, 1), plain.model(noise, cond, 1))
    method = MultistepConsistency(states="data")
    with pytest.raises(ValueError, match="reads samples"):
        next(method.updates(method.networks(Start(teacher)), dataless(), Progress()))
