"""Hyper-SD: what every stage starts from, its parts by hand, and feedback that leaves what is good enough alone."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch
from test_lcm import batch, network
from torch import Tensor, nn

import fewstep as fs
from fewstep.data import Dataset
from fewstep.denoisers import NetworkDenoiser
from fewstep.methods.consistency.hyper_sd import HyperSD, OneStepMatching, RewardTuning
from fewstep.methods.consistency.tscd import SegmentedConsistency, tcd_plan
from fewstep.methods.method import Batch, Progress, alone
from fewstep.methods.parts.distribution_matching import matching_loss
from fewstep.methods.parts.feedback import Feedback
from fewstep.methods.start import Start
from fewstep.networks import MLP
from fewstep.networks.lora import factors
from fewstep.predictions import TrigPrediction
from fewstep.randomness import Rng
from fewstep.runs.course import run_recipe
from fewstep.sampling.rollout import rollout
from fewstep.schedules import FlowMatching, TrigFlow
from fewstep.training.budget import Budget
from fewstep.training.settings import Rank, Settings

#: The paper (the stages, batches of 512, the rate) and the model cards (the steps).
PUBLISHED = {
    "segments": (8, 4, 2, 1), "lr": 1e-6, "steps": (1, 2, 4, 8), "target_time": False, "distance": "l2",
    **dict.fromkeys(
        ("distance_weights", "adversarial_weights", "skip", "mu", "guidance_min", "guidance_max", "discriminator_rank",
         "discriminator_lr",
         "feedback", "margins", "feedback_lr", "feedback_weight", "regression_weight", "pairs", "ode_steps",
         "consistency_weight", "critic_lr", "tscd_share", "feedback_share", "one_step_share", "eta"), ...),
    "optimizer": dict.fromkeys(
        ("kind", "betas", "eps", "weight_decay", "clip", "warmup", "decay"), ...
    ),
}  # fmt: skip


class Mean(nn.Module):
    """Rates samples by their mean."""

    def forward(self, x: Tensor, cond: Any) -> Tensor:
        return x.flatten(1).mean(1)


SMALL = HyperSD(
    pairs=8, ode_steps=2, adversarial_weights=(0.0, 0.0, 0.1, 0.1), feedback=Feedback("given"), margins=(9.0,)
)


def test_every_stage_goes_on_from_the_last_student_with_the_same_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    """8, 4, 2 and 1 segments, feedback, one call: the student of each is that of the one before, the teacher is the
    user's in all of them, and of the last the critic starts from it."""
    seen: list[tuple[Any, Any, dict[str, Tensor]]] = []
    stages = SMALL.stages()
    assert [type(stage.method) for stage in stages] == [SegmentedConsistency] * 4 + [
        RewardTuning,
        OneStepMatching,
    ]
    for cls in {type(stage.method) for stage in stages}:
        real = cls.networks

        def networks(self: Any, start: Start, real: Any = real) -> Any:
            nets = real(self, start)
            weights = {name: next(part.parameters(), torch.zeros(1)).clone() for name, part in nets.named_children()}
            seen.append((self, start.made.get("student"), weights))
            return nets

        monkeypatch.setattr(cls, "networks", networks)
    teacher = network().float()
    first = next(teacher.parameters()).clone()
    data = Dataset("points", batch().x.float(), batch().cond)
    settings = Settings(Budget(12), batch=8, precision="fp32")
    student = run_recipe(SMALL, teacher, data, settings, given={"reward": Mean()}, show=False).model
    assert [method for method, _, _ in seen] == [stage.method for stage in stages]
    assert [method.segments for method, _, _ in seen[:4]] == [8, 4, 2, 1]
    assert seen[0][1] is None and torch.equal(seen[0][2]["student"], first)
    for (_, _, before), (_, made, weights) in pairwise(seen):
        assert torch.equal(weights["student"], next(made.parameters()))
        assert not torch.equal(weights["student"], before["student"])
    assert all(torch.equal(weights["teacher"], first) for _, _, weights in seen if "teacher" in weights)
    assert torch.equal(seen[-1][2]["critic"], first)
    assert list(student.plans) == [1, 2, 4, 8] and student.sample(4).shape == (4, *teacher.shape)


def test_weights_are_those_of_their_stage_and_shares_leave_stages_out() -> None:
    recipe = HyperSD(distance_weights=(4.0, 3.0, 2.0, 1.0), adversarial_weights=(0.0, 0.1, 0.2, 0.3), tscd_share=2.0)
    ladder = [stage for stage in recipe.stages() if stage.method.name == "tscd"]
    told = [(s.method.segments, s.method.distance_weight, s.method.adversarial_weight, s.share) for s in ladder]
    assert told == [(8, 4.0, 0.0, 0.5), (4, 3.0, 0.1, 0.5), (2, 2.0, 0.2, 0.5), (1, 1.0, 0.3, 0.5)]
    assert [(stage.method.name, stage.share) for stage in recipe.stages()[4:]] == [("hyper-sd-one-step", 2.0)]
    only = HyperSD(tscd_share=0.0, one_step_share=0.0, feedback=Feedback("classifier:digits"))
    assert [stage.method.name for stage in only.stages() if stage.share] == ["hyper-sd-feedback"]
    refused = [
        (lambda: HyperSD(segments=(8, 4)), r"segments=\(8, 4\) must end with 1"),
        (lambda: HyperSD(segments=(2, 1)), r"distance_weights=.* must be as many as segments=\(2, 1\)"),
        (lambda: HyperSD(eta=(0.1, 0.2)), "eta=.* one for each of steps"),
        (lambda: HyperSD(feedback=Feedback("given")).check_given({}), "feedback=given asks a reward, and none was"),
        (lambda: HyperSD().check_given({"reward": Mean()}), "feedback=none: a reward was brought"),
        (lambda: RewardTuning().networks(Start(network())), "feedback=none: nothing rates samples; choose from given"),
        (lambda: HyperSD().check_given({"guide": Mean()}), "hyper-sd has no use for a guide"),
    ]
    for make, reason in refused:
        with pytest.raises(ValueError, match=reason) as found:
            make()
        assert "\n" not in str(found.value)


def test_the_last_stage_adds_up_its_parts() -> None:
    """Score distillation, regression on pairs, consistency and feedback, each by its weight, of the draws in order."""
    method = OneStepMatching(
        regression_weight=0.5, consistency_weight=2.0, feedback=Feedback("given"), feedback_weight=3.0, margins=(1.0,)
    )
    start = Start(network(FlowMatching()), given={"reward": Mean()})
    nets = method.networks(start)
    with torch.no_grad():
        for p in nets.group_parameters("student"):
            p += 0.05
    pairs = Batch(torch.randn(64, 3).double(), batch().cond, Rng(8), {"noise": torch.randn(64, 3).double()})
    given = dataclasses.replace(batch(), of={"pairs": pairs})
    (first, _) = alone(method.updates(nets, given, Progress()))
    rng, cond, plan = Rng(3), given.cond, tcd_plan(FlowMatching(), 1, 0.0)
    rng.shared_integer(0, 1)
    x = rollout(nets.student, rng.normal(64, 3, dtype=torch.float64), plan, cond)
    matching, _ = matching_loss(x, nets.teacher, nets.critic, cond, rng)
    regression = (rollout(nets.student, pairs.column("noise"), plan, cond) - pairs.x).square().mean()
    landed, aim, _, _ = method.consistency.land(nets, dataclasses.replace(given, rng=rng))
    content = torch.relu(1.0 - x.mean(1)).mean()
    wanted = matching + 0.5 * regression + 2.0 * (landed - aim).square().mean() + 3.0 * content
    assert float(first.loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-12)
    assert abs(float((wanted - 3.0 * content - first.loss).detach())) > 0.01
    assert set(first.logs) == {"matching_norm", "sample_std", "regression", "distance", "reward"}


@pytest.mark.parametrize(("margin", "moves"), [(100.0, True), (-100.0, False)])
def test_samples_above_the_margin_are_left_alone(margin: float, moves: bool) -> None:
    """Below it feedback raises the reward of samples in every number of calls; above it there is no gradient at all."""
    method = RewardTuning(feedback=Feedback("given"), margins=(margin,))
    nets = method.networks(Start(network(FlowMatching()), given={"reward": Mean()}))
    (update,) = alone(method.updates(nets, batch(), Progress()))
    update.loss.backward()
    slopes = [p.grad for p in nets.group_parameters("student") if p.grad is not None]
    assert any(bool(slope.any()) for slope in slopes) is moves
    if moves:
        student = method.student(nets)
        before = {k: float(student(batch().x, batch().cond, k, Rng(0)).mean()) for k in student.plans}
        with torch.no_grad():
            for p in nets.group_parameters("student"):
                if p.grad is not None:
                    p -= 0.01 * p.grad
        assert all(float(student(batch().x, batch().cond, k, Rng(0)).mean()) > before[k] for k in student.plans)


def test_the_prediction_of_a_random_call_is_rated() -> None:
    """Of all plans, at all of their calls, with a gradient through that call alone."""
    calls: list[int] = []
    method = RewardTuning(feedback=Feedback("given"))
    nets = method.networks(Start(network(FlowMatching()), given={"reward": Mean()}))
    real = nets.student.denoiser.forward
    times: list[float] = []

    def forward(x: Tensor, t: Any, cond: Any = None) -> Tensor:
        if torch.is_grad_enabled():
            times.append(float(torch.as_tensor(t).max()))
        calls.append(1)
        return real(x, t, cond)

    nets.student.denoiser.forward = forward
    for seed in range(40):
        assert len(list(alone(method.updates(nets, batch(2, seed), Progress())))) == 1
    assert len(times) == 40 < len(calls) and len(set(times)) == 8  # the times of the plan of 8, others' among them


def test_a_user_brings_a_reward(tmp_path: Any) -> None:
    """Through ``fs.distill``, recorded and resumed; the module is not changed; more samples are content after it."""
    torch.manual_seed(0)
    teacher = NetworkDenoiser(MLP((3,), 16, 1), TrigFlow(sigma_data=1.0), TrigPrediction(sigma_data=1.0), (3,))
    recipe = HyperSD(tscd_share=0.0, one_step_share=0.0, feedback=Feedback("given"), margins=(0.3,), feedback_lr=3e-3)
    data = Dataset("points", torch.randn(64, 3))
    reward = Mean()
    run: dict[str, Any] = {"budget": "60steps", "reward": reward, "show": False, "precision": "fp32"}
    student = fs.distill(teacher, recipe, data, folder=tmp_path / "run", **run)
    again = fs.distill(teacher, recipe, data, folder=tmp_path / "run", **run)
    assert torch.equal(next(student.parameters()), next(again.parameters()))
    start = RewardTuning(feedback=Feedback("given")).networks(Start(teacher, given={"reward": reward})).student
    untuned = fs.Student(start, student.plans)
    for k in student.plans:
        rated, before = (reward(model.sample(200, steps=k), None) for model in (student, untuned))
        assert float(rated.mean()) > float(before.mean()) + 0.1
        assert float((rated > 0.3).float().mean()) > float((before > 0.3).float().mean())
    with pytest.raises(ValueError, match="hyper-sd has no use for a guide"):
        fs.distill(teacher, recipe, data, guide=teacher, **run)


def test_low_rank_weights_go_through_all_stages() -> None:
    """One adapter, that every stage goes on with; the weights below are the teacher's, bit for bit."""
    teacher = network().float()
    data = Dataset("points", batch().x.float(), batch().cond)
    settings = Settings(Budget(12), batch=8, precision="fp32", lora_rank=Rank.parse("2"))
    student = run_recipe(SMALL, teacher, data, settings, given={"reward": Mean()}, show=False).model
    net, own = student.flow_map.denoiser.net, dict(teacher.net.named_parameters())
    kept = {name: weight for name, weight in net.state_dict().items() if "low_rank" not in name}
    assert own.keys() <= kept.keys() and all(torch.equal(kept[name], weight) for name, weight in own.items())
    assert any(bool(weight.any()) for name, weight in factors(net).items() if "lora_B" in name)
