"""What one-step score matching shares, in every method of it: the generator, the critic, freezing, and no data."""

from __future__ import annotations

import pytest
import torch

from fewstep.data import Dataset
from fewstep.denoisers import NetworkDenoiser
from fewstep.discrete_vp import DiscreteVP
from fewstep.guidance import Guided
from fewstep.methods.matching.diff_instruct import DiffInstruct
from fewstep.methods.matching.sid import SiD
from fewstep.methods.matching.sim import SIM
from fewstep.methods.method import Batch, Networks, Optimizer, Progress
from fewstep.methods.parts.one_step import OneStep, two_scores
from fewstep.methods.parts.times import Own
from fewstep.methods.start import Start
from fewstep.networks import MLP, UNet
from fewstep.predictions import TrigPrediction
from fewstep.randomness import Rng
from fewstep.runs.course import run_recipe
from fewstep.schedules import EDM, FlowMatching, Schedule, TrigFlow
from fewstep.training.budget import Budget
from fewstep.training.trainer import Settings

METHODS = [SIM(), SIM(distance="l2"), SiD(), DiffInstruct()]
NAMES = ["sim", "sim-l2", "sid", "diff-instruct"]
SHAPE = (1, 8, 8)


def teacher_network(kind: str = "mlp", schedule: Schedule | None = None, dropout: float = 0.0) -> NetworkDenoiser:
    torch.manual_seed(0)
    net = MLP(SHAPE, 16, 1, 3) if kind == "mlp" else UNet(SHAPE, (16, 16), 1, 32, 3, dropout=dropout)
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return NetworkDenoiser(net, schedule or TrigFlow(sigma_data=0.7), TrigPrediction(sigma_data=0.7), SHAPE, 3)


def batch_of(n: int = 6, seed: int = 0) -> Batch:
    return Batch(torch.zeros(n, *SHAPE), torch.arange(n) % 3, Rng(seed))


def moved(module: torch.nn.Module) -> float:
    """The largest gradient that a backward pass has left in a module."""
    return max((float(p.grad.abs().max()) for p in module.parameters() if p.grad is not None), default=0.0)


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
@pytest.mark.parametrize("kind", ["mlp", "unet"])
def test_each_update_reaches_its_own_network_only(method: OneStep, kind: str) -> None:
    """The critic moves first, on samples without a graph, then the student; the weights of the two scores are held,
    and free again afterwards."""
    nets = method.networks(Start(teacher_network(kind)))
    updates = method.updates(nets, batch_of(), Progress())
    first = next(updates)
    assert first.group == "critic"
    first.loss.backward()
    assert moved(nets.critic) > 0 and moved(nets.student) == moved(nets.teacher) == 0
    for p in nets.critic.parameters():  # away from the teacher: at equality nothing pulls the student
        p.grad, p.data = None, p.data + 0.05
    second = next(updates)
    assert second.group == "student"
    second.loss.backward()
    assert moved(nets.student) > 0 and moved(nets.critic) == moved(nets.teacher) == 0
    assert next(updates, None) is None
    assert all(p.requires_grad for p in nets.critic.parameters())


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_where_the_critic_is_the_teacher_nothing_moves(method: OneStep) -> None:
    """At the start both scores are one network: the gap is exactly 0, and the student's gradient but for rounding."""
    nets = method.networks(Start(teacher_network()))
    sizes = []
    for shift in (0.0, 0.05):
        for p in nets.critic.parameters():
            p.data += shift
        _, update = method.updates(nets, batch_of(), Progress())
        nets.zero_grad(set_to_none=True)
        update.loss.backward()
        assert (float(update.logs["score_gap"]) == 0) == (shift == 0)
        sizes.append(moved(nets.student))
    assert sizes[0] < 1e-5 * sizes[1]


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_data_give_labels_and_numbers_only(method: OneStep) -> None:
    """The same weights come out of a short run, bit for bit, whatever the pictures are."""
    labels = torch.arange(12) % 3
    made = []
    for x in (torch.zeros(12, *SHAPE), torch.randn(12, *SHAPE, generator=torch.Generator().manual_seed(1))):
        settings = Settings(Budget(4), batch=4, precision="fp32")
        student = run_recipe(method, teacher_network(), Dataset("any", x, labels), settings, show=False).model
        made.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
    assert torch.equal(*made)
    assert not torch.equal(made[0], torch.cat([p.detach().flatten() for p in teacher_network().parameters()]))


@pytest.mark.parametrize("schedule", [TrigFlow(sigma_data=0.7), FlowMatching(t_max=0.9999), EDM(), DiscreteVP.linear()])
def test_the_student_is_the_denoiser_at_one_noise_level(schedule: Schedule) -> None:
    """``x = D(init_sigma z)`` at the noise level ``init_sigma``, on every schedule the same, in training and in
    sampling.  A schedule that ends above pure data leaves as much noise as is at its end."""
    method = SiD()
    nets = method.networks(Start(teacher_network(schedule=schedule)))
    batch, again = batch_of(seed=3), batch_of(seed=3)
    x = method.draw(nets, batch)
    noise = again.rng.normal_like(again.x)
    plain = teacher_network(schedule=EDM())
    last = float(schedule.ratio(torch.tensor(schedule.t_min, dtype=torch.float64)))
    torch.testing.assert_close(x, plain(2.5 * noise, 2.5, again.cond), atol=1e-5 + 4 * last, rtol=0)
    assert torch.equal(x, method.student(nets)(noise, again.cond))
    level = schedule.ratio(torch.tensor(method.plan(schedule).times[0], dtype=torch.float64))
    assert float(level) == pytest.approx(2.5, rel=1e-6)


def test_samples_for_the_critic_are_those_of_inference() -> None:
    """Dropout is off in the student when it samples for the critic, on when it is trained itself, and off in both
    scores."""
    method = SiD()
    nets = method.networks(Start(teacher_network("unet", dropout=0.5)))
    seen: list[tuple[str, bool]] = []
    for name in ("student", "critic", "teacher"):
        net = nets.get_submodule(name)
        inner = net.denoiser.net if name == "student" else net.net
        inner.register_forward_hook(lambda module, *_, name=name: seen.append((name, module.training)))
    list(method.updates(nets, batch_of(), Progress()))
    assert seen == [("student", False), ("critic", True), ("student", True), ("teacher", False), ("critic", False)]
    assert nets.student.training and nets.critic.training and not nets.teacher.training


def test_two_scores_are_open_to_the_state_only() -> None:
    """The state gets a gradient through both networks while their weights are held, and they get none."""
    one, other = teacher_network(), teacher_network("unet")
    nets = Networks({"one": one, "other": other}, {"both": Optimizer(("one", "other"), 1e-3)})
    x, t = torch.randn(4, *SHAPE, requires_grad=True), torch.full((4,), 0.8, dtype=torch.float64)
    for chosen in (0, 1):
        x.grad = None
        with nets.held("both"):
            two_scores(one, other, x, t, torch.zeros(4).long())[chosen].sum().backward()
        assert x.grad is not None and float(x.grad.abs().max()) > 0
    assert moved(one) == moved(other) == 0


def test_guidance_is_the_teachers_alone() -> None:
    """The target is the guided teacher; the critic has none."""
    nets = SIM(guidance=3.0).networks(Start(teacher_network()))
    target = SIM(guidance=3.0).target(nets)
    assert isinstance(target, Guided) and target.scale == 3.0 and SIM().target(nets) is nets.teacher


@pytest.mark.parametrize("schedule", [EDM(), DiscreteVP.scaled_linear(), FlowMatching(0.01, 0.99)])
def test_levels_stay_within_the_schedule(schedule: Schedule) -> None:
    """Uniform on the lower 80 % of the family's own index: no share of the draws is heaped at an end."""
    t = Own(0.0, 0.8).draw(schedule, 20_000, Rng(0))
    index = t ** (1 / 7) if schedule == EDM() else t
    low, high = (end ** (1 / 7) if schedule == EDM() else end for end in (schedule.t_min, schedule.t_max))
    u = (index - low) / (high - low)
    assert float(u.min()) > -1e-9 and float(u.max()) < 0.8 + 1e-9
    for share in (0.2, 0.4, 0.6):
        assert float((u < share).double().mean()) == pytest.approx(share / 0.8, abs=0.015)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SiD(init_sigma=500.0).networks(Start(teacher_network())),
            "init_sigma=500 must lie above .* not above 112",
        ),
        (lambda: SiD(level_max=0.0), "level_max=0 must lie in \\[0.01, 1\\]"),
        (lambda: SIM(level_max=1.5), "level_max=1.5 must lie in"),
        (lambda: SIM(c=0.0), "c=0 must be positive"),
        (lambda: DiffInstruct(init_sigma=-1.0), "init_sigma=-1 must be positive"),
    ],
)
def test_impossible_values_are_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_level_at_the_end_of_the_schedule_is_allowed() -> None:
    """In spite of rounding in the logarithm of noise levels, and the plan does not start above the last time."""
    for k in range(1, 60):
        end = 0.37 * k
        assert SiD(init_sigma=end).plan(EDM(t_max=end)).times[0] == pytest.approx(end, rel=1e-12)
        assert SiD(init_sigma=end).plan(EDM(t_max=end)).times[0] <= end
