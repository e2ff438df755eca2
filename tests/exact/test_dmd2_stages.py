"""DMD2's further ways: stages that go on from student and critic, a start below the noisiest time, the discriminator on
the teacher, and what the GAN knows that a teacher does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep import grids
from fewstep.data import Dataset
from fewstep.denoisers import NetworkDenoiser
from fewstep.discrete_vp import DiscreteVP
from fewstep.flow_maps import Jump
from fewstep.methods.matching import dmd2
from fewstep.methods.matching.dmd2 import DMD2
from fewstep.methods.matching.dmd2_stages import DMD2Stages, PairPretraining
from fewstep.methods.method import Batch, Networks, Progress, alone
from fewstep.methods.parts.adversary import Adversary, Discriminator
from fewstep.methods.parts.distribution_matching import renoising_plan, two_optimizers
from fewstep.methods.start import Start
from fewstep.networks import MLP
from fewstep.predictions import TrigPrediction
from fewstep.randomness import Rng
from fewstep.runs.course import run_recipe
from fewstep.sampling.rollout import Call, rollout
from fewstep.schedules import EDM, FlowMatching, TrigFlow, align
from fewstep.training.budget import Budget
from fewstep.training.settings import Settings

F64 = torch.float64
# tianweiy/DMD2: experiments/imagenet (410k iterations without GAN, 140k at a quarter of the rate with it) and, for the
# pairs, experiments/sdxl (10k, 2000 iterations)
PUBLISHED: dict[str, Any] = {
    "steps": 1, "first_level": 1.0, "pairs_share": 0.0, "pairs": 10_000, "ode_steps": ..., "distance": "lpips",
    "gan_share": 140_000 / 550_000, "gan_rate": 0.25, "critic_steps": 5, "gan_weight": 3e-3,
    "discriminator_weight": 1e-2, "discriminator": "critic", "r1": 0.0, "guidance": 1.0, "lr": 2e-6, "critic_lr": 2e-6,
    "clip": 10.0, "warmup": 500,
    "optimizer": {
        "kind": "adamw", "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "clip": 10.0, "warmup": 500,
        "decay": "constant",
    },
}  # fmt: skip


def teacher(schedule: Any = None) -> NetworkDenoiser:
    torch.manual_seed(0)
    net = MLP((3,), 16, 1, 2).double()
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return NetworkDenoiser(net, schedule or TrigFlow(sigma_data=0.7), TrigPrediction(sigma_data=0.7), (3,), 2)


def data(n: int = 32) -> Dataset:
    return Dataset("points", torch.randn(n, 3, generator=torch.Generator().manual_seed(1)), torch.arange(n) % 2)


def batch_of(n: int = 6, seed: int = 0) -> Batch:
    rng = Rng(seed)
    return Batch(rng.normal(n, 3, dtype=F64), torch.arange(n) % 2, rng)


def test_a_student_of_one_step_may_start_below_the_noisiest_time() -> None:
    """At 399 of a table of 1000 for 0.4, at the same share of the other families' own index; its noise has the size of
    that time.  Several steps keep their times."""
    table = DiscreteVP.from_betas(torch.linspace(1e-4, 2e-2, 1000, dtype=F64))
    assert renoising_plan(table, 1, 0.4).times == (399.0,)
    for schedule in (EDM(), FlowMatching(), TrigFlow(sigma_data=0.7)):
        (time,) = renoising_plan(schedule, 1, 0.4).times
        assert float(grids.own_index(schedule, torch.tensor(time, dtype=F64))) == pytest.approx(400)
        assert renoising_plan(schedule, 4) == renoising_plan(schedule, 4, 1.0)
    method = DMD2(first_level=0.4, gan_weight=0.0)
    nets = method.networks(Start(teacher()))
    made, rng = method.draw(nets, batch_of(seed=2), trainable=False), batch_of(seed=2).rng
    rng.shared_integer(0, 1)
    t = torch.tensor(method.plan(nets).times[0], dtype=F64)
    noise = rng.normal(6, 3, dtype=F64)
    cond = torch.arange(6) % 2
    assert torch.equal(
        made, nets.student.to_data(align(nets.student.schedule.sigma(t), noise) * noise, t, cond).detach()
    )
    for cls in (DMD2, DMD2Stages):
        with pytest.raises(ValueError, match=r"first_level=0.4 is for a student of one step, and steps=4: set it to 1"):
            cls(steps=4, first_level=0.4)
        with pytest.raises(ValueError, match="first_level=0 must lie above 0"):
            cls(first_level=0.0)


def test_stages_go_on_from_student_and_critic() -> None:
    """What a stage hands on, the next begins with: copies of the student and of the critic as they were left."""
    first = DMD2(gan_weight=0.0)
    nets = first.networks(Start(teacher()))
    for p in [*nets.student.parameters(), *nets.critic.parameters()]:
        p.data += 0.1 * torch.randn_like(p)
    start = Start(teacher(), made=first.hands_on(nets))
    following = DMD2(gan_weight=0.1).networks(start)
    for name in ("student", "critic"):
        weights = following.get_submodule(name).state_dict()
        for key, value in nets.get_submodule(name).state_dict().items():
            assert torch.equal(weights[key], value), (name, key)
    assert following.critic is not nets.critic
    assert not torch.equal(following.critic.net.enter.weight, following.teacher.net.enter.weight)


def test_the_recipe_has_its_stages_and_shares() -> None:
    """Matching, then a quarter of the budget with the GAN at a quarter of the rates; pairs before both where asked
    for.  With a last rate of 0 the product is that of the matching alone."""
    shares = {stage.method.name: stage.share for stage in DMD2Stages().stages()}
    assert shares == {"dmd2-pairs": 0.0, "dmd2": 0.25}  # of the two stages of that name the last one stands
    recipe = DMD2Stages(
        first_level=0.4, pairs_share=0.2, gan_share=0.5, gan_rate=0.0, pairs=16, ode_steps=2, discriminator="teacher",
        r1=1.0, warmup=0,
    )  # fmt: skip
    pairs, matching, game = recipe.stages()
    assert [pairs.share, matching.share, game.share] == pytest.approx([0.2, 0.4, 0.4])
    assert isinstance(matching.method, DMD2) and isinstance(game.method, DMD2)
    assert (matching.method.gan_weight, game.method.gan_weight, game.method.r1) == (0.0, 3e-3, 1.0)
    assert (game.method.lr, matching.method.lr, matching.method.first_level) == (0.0, 3e-4, 0.4)
    settings = Settings(Budget(10), 8, precision="fp32")
    three = run_recipe(recipe, teacher().float(), data(), settings, show=False)
    assert sorted({record["stage"] for record in three.records}) == [0, 1, 2] and three.steps == 10
    short = DMD2Stages(
        first_level=0.4, pairs_share=1 / 3, gan_share=0.0, pairs=16, ode_steps=2, warmup=0
    )  # fmt: skip
    two = run_recipe(short, teacher().float(), data(), Settings(Budget(6), 8, precision="fp32"), show=False)
    for one, other in zip(three.model.parameters(), two.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_the_regression_on_pairs_is_that_of_one_call() -> None:
    """At ``first_level``, from the pair's noise to the pair's sample."""
    method = PairPretraining(first_level=0.4, pairs=16, ode_steps=2)
    nets = method.networks(Start(teacher()))
    pairs = method.sources(Start(teacher().float(), data()))["data"].rows(slice(None))
    noise = pairs.columns["noise"].double()
    batch = Batch(pairs.x.double(), pairs.cond, Rng(0), {"noise": noise})
    (update,) = method.updates(nets, batch, Progress())
    t = torch.tensor(method.plan(nets).times[0], dtype=F64)
    made = nets.student.to_data(align(nets.student.schedule.sigma(t), noise) * noise, t, pairs.cond)
    torch.testing.assert_close(update.loss, (made - batch.x).square().mean())


@pytest.mark.parametrize("step", [0, 1])
def test_the_critic_sees_samples_of_all_calls(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a student of four steps, in iterations with and without an update of the student."""
    seen: list[Tensor] = []
    real = dmd2.critic_loss
    monkeypatch.setattr(dmd2, "critic_loss", lambda critic, x, *rest: (seen.append(x), real(critic, x, *rest))[1])
    method = DMD2(steps=4, gan_weight=0.0)
    nets = method.networks(Start(teacher()))
    found = set()
    for seed in range(16):
        list(alone(method.updates(nets, batch_of(seed=seed), Progress(step))))
        again = batch_of(seed=seed)
        again.rng.shared_integer(0, 4)
        calls: list[Call] = []
        noise = again.rng.normal(6, 3, dtype=F64)
        rollout(nets.student, noise, method.plan(nets), again.cond, again.rng, calls=calls)
        found |= {call.i for call in calls if torch.equal(call.out.detach(), seen[-1])}
    assert found == {0, 1, 2, 3}


def test_a_discriminator_on_the_teacher_leaves_the_critic_alone() -> None:
    """The critic's gradient is that of its denoising loss alone, the heads' that of the game, with R1 where asked for;
    the student's update needs one pass of the teacher."""
    calls: list[int] = []
    slopes = {}
    for name, method in {
        "without": DMD2(gan_weight=0.0),
        "game": DMD2(gan_weight=0.1, discriminator="teacher"),
        "r1": DMD2(gan_weight=0.1, discriminator="teacher", r1=10.0),
    }.items():
        torch.manual_seed(3)
        nets = method.networks(Start(teacher())).double()
        for p in nets.critic.parameters():
            p.data += 0.1
        nets.teacher.net.register_forward_hook(lambda *_: calls.append(1))
        updates = alone(method.updates(nets, batch_of(), Progress()))
        calls.clear()
        next(updates)
        assert len(calls) == 1
        updates.close()
        loss, logs = method.critic_loss(nets, batch_of(seed=4), batch_of(seed=5).x)
        loss.backward()
        slopes[name] = {group: [p.grad for p in nets.get_submodule(group).parameters()] for group in ("critic",)}
        if name != "without":
            slopes[name]["discriminator"] = [p.grad for p in nets.discriminator.parameters()]
        assert ("gradient_penalty" in logs) == (name == "r1")
    for name in ("game", "r1"):
        for one, other in zip(slopes[name]["critic"], slopes["without"]["critic"], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    assert any(
        not torch.equal(a, b)
        for a, b in zip(slopes["game"]["discriminator"], slopes["r1"]["discriminator"], strict=True)
    )
    on_the_critic = DMD2(gan_weight=0.1, r1=10.0)
    nets = on_the_critic.networks(Start(teacher())).double()
    assert "gradient_penalty" in on_the_critic.critic_loss(nets, batch_of(seed=4), batch_of(seed=5).x)[1]


class Score(nn.Module):
    """``F`` of N(mean, 1) on TrigFlow with sigma_data 1, whose features are its input."""

    def __init__(self, mean: float, pure: bool = False) -> None:
        super().__init__()
        self.mean, self.seen, self.pure = nn.Parameter(torch.tensor(mean, dtype=F64)), nn.Identity(), pure

    def features(self, x: Tensor, t: Tensor, cond: object = None) -> Tensor:
        seen: Tensor = self.seen(x)
        return seen

    def forward(self, x: Tensor, t: Tensor, cond: object = None) -> Tensor:
        x = self.features(x, t)
        return -x - self.mean if self.pure else (-self.mean * t.sin())[:, None].expand_as(x)


def final_mean(gan_weight: float) -> float:
    """Of a student that begins at 0 under a teacher that says 1 of data whose mean is 2."""
    schedule, n = TrigFlow(sigma_data=1.0), 8
    student, critic, wrong = (
        NetworkDenoiser(net, schedule, TrigPrediction(sigma_data=1.0), (n,))
        for net in (Score(0.0, pure=True), Score(0.0), Score(1.0))
    )
    game = Discriminator(Adversary(layers=("seen",), head=lambda shape: nn.Linear(*shape, 1)), wrong).double()
    for p in game.parameters():
        nn.init.zeros_(p)
    method = DMD2(gan_weight=gan_weight, discriminator="teacher", discriminator_weight=1.0)
    modules = {"student": Jump(student), "critic": critic, "teacher": wrong, "discriminator": game}
    nets = Networks(modules, two_optimizers(1.0, 1.0, 1.0, 0, ("critic", "discriminator")))
    rates = {"student": 0.1, "critic": 0.05, "discriminator": 0.5}
    course = []
    for step in range(200):
        rng = Rng(0, step)
        batch = Batch(2 + rng.normal(64, n, dtype=F64), None, rng)
        for update in alone(method.updates(nets, batch, Progress(step))):
            update.loss.backward()
            for name in nets.groups[update.groups[0]].modules:
                for p in nets.get_submodule(name).parameters():
                    p.data -= rates[name] * (0 if p.grad is None else p.grad)
            nets.zero_grad(set_to_none=True)
        course.append(float(student.net.mean.detach()))
    return sum(course[100:]) / 100


def test_the_gan_knows_what_the_teacher_does_not() -> None:
    """The score alone brings the student to the teacher; the discriminator, which has seen data, most of the way on."""
    without, with_it = final_mean(0.0), final_mean(40.0)
    assert abs(without - 1) < 0.05
    assert 1.5 < with_it < 2.1
