"""PCM: phases and their edges, and its loss where the function that it learns is known."""

from __future__ import annotations

import pytest
import torch
from test_lcm import Steps, batch, network

from fewstep import grids
from fewstep.discrete_vp import DiscreteVP
from fewstep.exact import ExactFlowMap, three_modes
from fewstep.methods.consistency.pcm import PhasedConsistencyDistillation
from fewstep.methods.method import Batch, Networks, Progress
from fewstep.methods.parts.distances import Plain, l2
from fewstep.methods.parts.times import Segments
from fewstep.methods.start import Start
from fewstep.randomness import Rng
from fewstep.sampling.rollout import Student, rollout
from fewstep.schedules import EDM, FlowMatching, Schedule, TrigFlow

#: The authors' script train_pcm_lora_sd15.sh, whose scales are counted without the 1 (4 to 5).
PUBLISHED = {
    "lr": 5e-6, "distance": "pseudo-huber", "skip": 20, "mu": 0.0, "guidance_min": 5.0, "guidance_max": 6.0,
    "phases": 4, "label_dropout": 0.0, "gan_share": 1.0, "gan_weight": 0.1, "gan_lr": 1e-5,  # ..._adv.sh
    "optimizer": {
        "kind": "adamw", "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-3, "clip": 1.0, "warmup": 0,
        "decay": "constant",
    },
}  # fmt: skip


def test_edges_and_times_of_phases(schedule: Schedule) -> None:
    """On every schedule: the edges rise from ``t_min`` to ``t_max``, all of them are times of the solver (to a rounding
    error), no step of it crosses one, and no jump has nowhere to go."""
    for phases in (1, 3, 4, 10):
        edges = Segments(phases).edges(schedule)
        assert len(edges) == phases + 1 and (float(edges[0]), float(edges[-1])) == (schedule.t_min, schedule.t_max)
        times = PhasedConsistencyDistillation(phases=phases).times(schedule)
        end = Segments(phases).end(schedule, times[:-1])
        places, ends = grids.own_index(schedule, times), grids.own_index(schedule, end)
        assert bool((places[1:] >= ends - 1e-6).all()) and bool((ends < places[:-1] - 0.5).all())
        assert bool((places[1:] < places[:-1] - 0.5).all())
        assert set(end.tolist()) == set(edges[:-1].tolist())
        assert float((times[None] - edges[:, None]).abs().amin(1).max()) < 1e-9


def test_edges_of_a_table_are_trailing_times() -> None:
    table = DiscreteVP.scaled_linear()
    assert Segments(4).edges(table).tolist() == [0, 249, 499, 749, 999]
    for phases in (1, 2, 3, 7, 8, 16, 100):
        assert Segments(phases).edges(table)[1:].flip(0).tolist() == grids.trailing(table, phases)[:-1].tolist()
    times = PhasedConsistencyDistillation().times(table).tolist()
    assert times[:2] == [999, 979] and times[12:15] == [759, 749, 729] and times[-3:] == [29, 9, 0]


@pytest.mark.parametrize("schedule", [TrigFlow(sigma_data=0.7), FlowMatching(), DiscreteVP.scaled_linear()])
def test_the_loss_is_zero_at_the_teachers_steps_within_each_phase(schedule: Schedule) -> None:
    """The composition of the teacher's DDIM steps down to the edge has no loss; that down to the data has."""
    method = PhasedConsistencyDistillation(skip=50, mu=0.5)
    nets = method.networks(Start(network(schedule)))
    exact = Steps(nets.teacher, method.times(schedule))

    class ToData(Steps):
        def forward(self, x, t, s, cond=None, **extras):
            return super().forward(x, t, torch.zeros_like(torch.as_tensor(s)), cond, **extras)

    for model, zero in ((exact, True), (ToData(nets.teacher, exact.grid), False)):
        roles = {"student": model, "target": exact, "teacher": nets.teacher, "distance": Plain(l2)}
        (update,) = method.updates(Networks(roles, {}), batch(), Progress())
        assert (float(update.loss) < 1e-24) is zero


def test_one_step_a_phase_is_the_teachers_own_sampler() -> None:
    """With as many phases as the solver has steps, the untrained student has no loss, and its plan is the teacher's
    deterministic sampler; with more steps a phase it has a loss."""
    teacher = network(FlowMatching())
    method = PhasedConsistencyDistillation(phases=10, skip=100)
    nets = method.networks(Start(teacher))
    (update,) = method.updates(nets, batch(), Progress())
    assert float(update.loss.detach()) < 1e-24
    student = method.student(nets)
    noise, cond = batch(8).x, batch(8).cond
    own = Steps(teacher, method.times(teacher.schedule)).to_data(noise, 1.0, cond)
    torch.testing.assert_close(student(noise, cond, 10), own, rtol=1e-12, atol=1e-12)
    (update,) = PhasedConsistencyDistillation(phases=5, skip=100).updates(nets, batch(), Progress())
    assert float(update.loss.detach()) > 1e-8


@pytest.mark.parametrize("phases", [1, 2, 4, 8])
def test_exact_phases_compose_to_the_exact_map_without_noise(phases: int) -> None:
    """On a mixture whose flow map is known: the plan makes of every noise what the exact map makes of it, with no
    random draw, however many phases there are."""
    world = three_modes(EDM(0.02, 20.0))
    method = PhasedConsistencyDistillation(phases=phases)
    student = method.student(Networks({"student": ExactFlowMap(world)}, {}))
    assert isinstance(student, Student) and list(student.plans) == [phases]
    z = torch.randn(64, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    made = rollout(student.flow_map, z, student.plans[phases])
    torch.testing.assert_close(made, world.flow(20.0 * z, 20.0, 0.02), rtol=0, atol=1e-6)


def test_the_loss_at_the_exact_map_falls_with_the_steps_skipped() -> None:
    """What is left is the squared error of one DDIM step, which is of second order: a quarter of it, squared, for half
    the skip."""
    world = three_modes(EDM(0.02, 20.0))
    roles = {"student": ExactFlowMap(world), "target": ExactFlowMap(world), "teacher": world, "distance": Plain(l2)}
    losses = []
    for skip in (8, 4):
        given = Batch(world.sample(2048, Rng(3)), None, Rng(4))
        method = PhasedConsistencyDistillation(skip=skip, mu=0.5)
        (update,) = method.updates(Networks(roles, {}), given, Progress())
        losses.append(float(update.loss))
    assert 10 < losses[0] / losses[1] < 24


def test_a_share_is_trained_without_its_condition(monkeypatch: pytest.MonkeyPatch) -> None:
    """The conditions that student and teacher see are dropped together, as often as is asked for."""
    method = PhasedConsistencyDistillation(label_dropout=0.25)
    nets = method.networks(Start(network()))
    seen = []
    real = nets.student.denoiser.forward
    monkeypatch.setattr(
        nets.student.denoiser, "forward", lambda x, t, cond=None, **e: seen.append(cond) or real(x, t, cond, **e)
    )
    (_,) = method.updates(nets, batch(4000), Progress())
    assert len(seen) == 2 and torch.equal(seen[0], seen[1])
    assert abs(float((seen[0] < 0).double().mean()) - 0.25) < 0.03
    kept = seen[0] >= 0
    assert torch.equal(seen[0][kept], batch(4000).cond[kept])


def test_what_cannot_be_is_refused_in_one_line() -> None:
    bare, one = Start(network(classes=None)), Start(network())
    tiny = Start(network(DiscreteVP.linear(30)))
    refused = [
        (lambda: PhasedConsistencyDistillation(guidance_max=2.0).networks(bare), "guidance_max=2: .*set both to 1"),
        (lambda: PhasedConsistencyDistillation(phases=30).networks(tiny), "30 segments: DiscreteVP has no times"),
        (lambda: PhasedConsistencyDistillation(skip=30).networks(tiny), "skip=30 must be at most 29"),
        (lambda: PhasedConsistencyDistillation(phases=0).networks(one), "phases=0"),
    ]
    for make, reason in refused:
        with pytest.raises(ValueError, match=reason) as found:
            make()
        assert "\n" not in str(found.value)
    assert PhasedConsistencyDistillation().networks(bare).student.extras == {}
