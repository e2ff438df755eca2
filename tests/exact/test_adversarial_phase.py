"""The adversarial term of CTM, PCM, Align Your Flow and Constant Acceleration Flow."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fewstep.denoisers import NetworkDenoiser
from fewstep.methods.consistency.ctm import ConsistencyTrajectory
from fewstep.methods.consistency.pcm import PhasedConsistencyDistillation
from fewstep.methods.flow_maps.align_your_flow import AlignYourFlow
from fewstep.methods.flow_maps.constant_acceleration import AdversarialAcceleration, ConstantAccelerationFlow
from fewstep.methods.method import Batch, Networks, Progress, alone
from fewstep.methods.parts.adversarial_phase import AdversarialPhase
from fewstep.methods.parts.times import Segments
from fewstep.methods.start import Start
from fewstep.networks import MLP
from fewstep.networks.inputs import with_inputs
from fewstep.predictions import TrigPrediction
from fewstep.randomness import Rng
from fewstep.schedules import EDM, FlowMatching, Schedule, TrigFlow

SHAPE, F64 = (1, 4, 4), torch.float64
METHODS: dict[str, Any] = {
    "ctm": ConsistencyTrajectory(gan_share=0.5), "pcm": PhasedConsistencyDistillation(gan_share=0.5),
    "ayf": AlignYourFlow(gan_share=0.5), "caf": AdversarialAcceleration(),
}  # fmt: skip


def teacher() -> NetworkDenoiser:
    torch.manual_seed(0)
    net = MLP(SHAPE, 16, 1, 3)
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return NetworkDenoiser(net.double(), TrigFlow(sigma_data=0.7), TrigPrediction(sigma_data=0.7), SHAPE, 3)


def networks(name: str) -> Networks:
    model = teacher()
    made = {}
    if name == "caf":
        accelerated = teacher()
        accelerated.net = with_inputs(accelerated.net, {}, 1)
        made = {"velocity": teacher(), "acceleration": accelerated}
    return METHODS[name].networks(Start(model, made=made))


def batch(seed: int = 0) -> Batch:
    rng = Rng(seed)
    x, cond = rng.normal(6, *SHAPE, dtype=F64), torch.arange(6) % 3
    real = Batch(rng.normal(6, *SHAPE, dtype=F64), torch.tensor([2, 2, 1, 1, 0, 0]), rng)
    return Batch(x, cond, rng, {"noise": rng.normal(6, *SHAPE, dtype=F64)}, {"real": real})


def test_the_phase_is_the_last_share_of_the_budget_and_sides_take_turns() -> None:
    phase = AdversarialPhase(0.25, 1e-3)
    places = [Progress(step, 0, step / 16) for step in range(16)]
    assert [phase.joins(p) for p in places] == [False] * 12 + [True] * 4
    assert [phase.discriminates(p) for p in places] == [False] * 12 + [False, True] * 2
    assert not any(AdversarialPhase(0.0, 1e-3).joins(p) for p in places)
    assert AdversarialPhase(0.0, 1e-3).modules(teacher()) == {} == AdversarialPhase(0.0, 1e-3).optimizers()


@pytest.mark.parametrize("name", METHODS)
def test_each_sides_iteration_moves_its_own_networks(name: str) -> None:
    """The student's gradient passes through the frozen body and the held heads; the discriminator's stays in the
    heads."""
    method, nets = METHODS[name], networks(name)
    trained = "acceleration" if name == "caf" else "student"
    for step, group in ((20, trained), (21, "discriminator")):
        nets.zero_grad(set_to_none=True)
        (update,) = (u for u in grads(method, nets, Progress(step, 0, 0.9)))
        assert update.groups == (group,)
        moved = {n.split(".")[0] for n, p in nets.named_parameters() if p.grad is not None and bool(p.grad.any())}
        assert moved == {group}
    assert all(p.requires_grad for p in nets.discriminator.parameters())
    if name != "caf":  # before the phase there is no such term
        (update,) = grads(method, nets, Progress(20, 0, 0.3))
        assert update.groups == (trained,) and "gan" not in update.logs


def grads(method: Any, nets: Networks, progress: Progress) -> list[Any]:
    """The updates of an iteration in one part, each with its backward pass done while it waits."""
    found = []
    for update in alone(method.updates(nets, batch(), progress)):
        update.loss.backward()
        found.append(update)
    return found


@pytest.mark.parametrize(("name", "steep"), [("ctm", 10.0), ("ayf", 30.0), ("caf", 100.0)])
def test_the_terms_gradients_at_the_output_are_of_one_size(name: str, steep: float) -> None:
    """The adversarial term's weight is a ratio of gradients: with logits twice as steep it is half, and it is at most
    10 where they are nearly flat."""
    method, nets = METHODS[name], networks(name)
    last, weights = nets.discriminator.heads.heads[0].layers[-1], []
    start = last.weight.detach().clone()
    for factor in (steep, 2 * steep, 1e-6):
        with torch.no_grad():
            last.weight.copy_(factor * start)
            last.bias.zero_()
        (update,) = alone(method.updates(nets, batch(), Progress(20, 0, 0.9)))
        weights.append(float(update.logs["gan_weight"]))
    assert 0.01 < weights[0] < 10 and weights[2] == 10
    assert weights[0] / weights[1] == pytest.approx(2.0, rel=0.01 if name != "ayf" else 0.15)  # a hinge is straight


def test_without_a_share_there_is_no_discriminator() -> None:
    for method in (ConsistencyTrajectory(), PhasedConsistencyDistillation(), AlignYourFlow()):
        nets = method.networks(Start(teacher()))
        assert "discriminator" not in nets.groups and "body" not in dict(nets.named_children())
    stages = ConstantAccelerationFlow().stages()
    assert [stage.share for stage in stages] == [1.0, 1.0, 0.0]
    assert [type(stage.method) for stage in replace(ConstantAccelerationFlow(), gan_share=0.5).stages()][2] is (
        AdversarialAcceleration
    )


@pytest.mark.parametrize("schedule", [TrigFlow(), FlowMatching(), EDM()], ids=lambda s: type(s).__name__)
def test_a_phases_end_is_noised_on_within_the_phase(schedule: Schedule) -> None:
    """Times lie above the lower edge and not above the upper one; a Gaussian at the edge has the law of that time."""
    phases = Segments(4)
    edges = phases.edges(schedule)
    t = edges[1:].repeat(50000)
    share = 1 - Rng(0).uniform(len(t))
    time = phases.within(schedule, t, share)
    part = phases.of(schedule, t)
    assert bool((time >= edges[part]).all()) and bool((time <= edges[part + 1] * (1 + 1e-12)).all())
    torch.testing.assert_close(phases.within(schedule, t, torch.ones_like(t)), edges[part + 1])
    torch.testing.assert_close(phases.within(schedule, t, torch.zeros_like(t)), edges[part])
    method = PhasedConsistencyDistillation(gan_share=1.0)
    student = type("Model", (), {"schedule": schedule})()
    nets: Any = type("Nets", (), {"student": student})()
    end, rng = phases.end(schedule, t), Rng(1)
    at_edge = (schedule.alpha(end) * 0.5)[:, None] + schedule.sigma(end)[:, None] * rng.normal(len(t), 1, dtype=F64)
    states, times = method.noised_within(nets, at_edge, at_edge, t, rng)
    whitened = (states[:, 0] - 0.5 * schedule.alpha(times)) / schedule.sigma(times)
    assert abs(float(whitened.mean())) < 0.01 and float(whitened.std()) == pytest.approx(1.0, abs=0.01)
    assert not torch.equal(*states.chunk(2))
