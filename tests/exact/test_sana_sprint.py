"""SANA-Sprint: the exact wrapper, what tangents cost of a fast time, and the adversary beside sCM."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.data import Dataset
from fewstep.denoisers import NetworkDenoiser, networks_in
from fewstep.exact import Gaussian
from fewstep.flow_maps import Jump
from fewstep.methods.consistency.sana_sprint import SanaSprint, mismatched_pairs, wrapping
from fewstep.methods.method import Batch, Progress, Rows, alone
from fewstep.methods.parts.identities import eulerian
from fewstep.methods.start import Start
from fewstep.methods.teachers.retime import Retime
from fewstep.networks import MLP
from fewstep.predictions import Prediction, Velocity
from fewstep.randomness import Rng
from fewstep.runs.course import run_recipe
from fewstep.schedules import EDM, FlowMatching, TrigFlow, align
from fewstep.tangents import tangent
from fewstep.training.budget import Budget
from fewstep.training.settings import Settings

F64 = torch.float64
PUBLISHED: dict[str, Any] = {
    # NVlabs/Sana, configs/sana_sprint_config/1024ms/SanaSprint_600M_1024px_allqknorm_bf16_scm_ladd.yaml, with 20000
    # iterations; noise_mean of the paper (0.2 in the file); the optimizer is CAME
    "lr": 2e-6, "discriminator_lr": 2e-6, "sigma_data": 0.5, "c": 0.1, "tangent_warmup": 4000 / 20000,
    "guidances": (4.0, 4.5, 5.0), "noise_mean": 0.0, "noise_std": 1.6, "adversary_weight": 0.5, "max_time": 0.5,
    "heads_mean": -0.6, "heads_std": 1.0, "mismatched": True, "blocks": 4, "layers": None, "clip": 0.1,
    "retime": 5000 / 25000, "steps": (1, 2, 4),
    "optimizer": {
        "kind": ..., "betas": ..., "eps": ..., "weight_decay": ..., "clip": 0.1, "warmup": ..., "decay": "constant",
    },
}  # fmt: skip


def teacher(prediction: Prediction | None = None, classes: int | None = 3) -> NetworkDenoiser:
    """A flow-matching network with weights away from their start."""
    torch.manual_seed(0)
    net = MLP((3,), 16, 2, classes).double()
    for p in net.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return NetworkDenoiser(net, FlowMatching(), prediction or Velocity(), (3,), classes)


def batch(n: int = 6, seed: int = 0) -> Batch:
    rng = Rng(seed)
    return Batch(rng.normal(n, 3, dtype=F64), torch.arange(n) % 3, rng)


# The wrapper


def test_the_wrapper_is_the_conversion() -> None:
    """``F = [(1 - 2t) x + (1 - 2t + 2t^2) u] / sqrt(t^2 + (1 - t)^2)`` with the network's own state and its time
    ``sin / (sin + cos)``, to 1e-12."""
    source = teacher()
    schedule = wrapping(source.schedule, 1.0)
    assert schedule.t_max == math.pi / 2
    angle = torch.tensor([0.001, 0.01, 0.4, 1.0, 1.5, 1.57, math.pi / 2], dtype=F64)
    x, cond = torch.randn(7, 3, dtype=F64), torch.arange(7) % 3
    t = angle.sin() / (angle.sin() + angle.cos())
    root = (t**2 + (1 - t) ** 2).sqrt()
    u = source.raw(align(root, x) * x, t, cond)
    expected = (align(1 - 2 * t, x) * align(root, x) * x + align(1 - 2 * t + 2 * t**2, x) * u) / align(root, x)
    view = source.on(schedule)
    torch.testing.assert_close(view.velocity(x, angle, cond)[:-1], expected[:-1], atol=1e-12, rtol=0)
    # log-SNRs end at 20: the last time is 2e-9 before pure noise
    torch.testing.assert_close(view.velocity(x, angle, cond)[-1], expected[-1], atol=1e-7, rtol=0)


def test_a_rotation_is_eulers_step() -> None:
    """The same move by Euler in flow matching and by DDIM on TrigFlow, with an exact velocity, to rounding."""
    flow, trig = FlowMatching(), TrigFlow(t_max=math.pi / 2, sigma_data=1.0)
    world = Gaussian(flow, torch.full((3,), 0.4, dtype=F64), 0.3)
    x = torch.randn(8, 3, dtype=F64)
    t, s = torch.full((8,), 0.6, dtype=F64), torch.full((8,), 0.35, dtype=F64)
    first, second = (align((v**2 + (1 - v) ** 2).sqrt(), x) for v in (t, s))
    start, end = (trig.time_at(flow.log_snr(v)) for v in (t, s))
    f = world.on(trig).velocity(x / first, start)
    rotated = align((end - start).cos(), x) * x / first + align((end - start).sin(), x) * f
    torch.testing.assert_close(rotated * second, x - 0.25 * world.velocity(x, t), atol=1e-12, rtol=0)


class TimeOnly(nn.Module):
    """``F`` is the time that it is told."""

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return t[:, None].expand_as(x)


def derivative(prediction: Prediction) -> float:
    """How fast a network that repeats its time changes with the angle."""
    view = NetworkDenoiser(TimeOnly(), FlowMatching(), prediction, (3,)).on(TrigFlow(t_max=math.pi / 2, sigma_data=1.0))
    x, t = torch.zeros(1, 3, dtype=F64), torch.tensor([0.7], dtype=F64)
    _, slope = tangent(lambda x_, t_: view.affine(x_, t_)[2], x, t, torch.zeros_like(x), torch.ones_like(t))
    return float(slope[0, 0])


def test_a_tangent_is_a_thousand_times_as_large_where_a_thousand_steps_are_counted() -> None:
    """Which is why the network is retimed first, and one that counts them is refused."""
    slow, fast = derivative(Velocity()), derivative(Velocity(time_scale=1000.0))
    assert slow == pytest.approx(1 / (math.cos(0.7) + math.sin(0.7)) ** 2, rel=1e-9)
    assert fast / slow == pytest.approx(1000, rel=1e-9)
    SanaSprint().networks(Start(teacher()))
    with pytest.raises(ValueError, match=r"told the angle first \(fewstep distill retime\)"):
        SanaSprint().networks(Start(teacher(Velocity(time_scale=1000.0))))


def test_retiming_is_a_first_stage_that_keeps_the_teacher() -> None:
    """A fifth of the budget, when it is asked for; then a teacher that counts a thousand steps is distilled, in one run
    that leaves it as it was."""
    stages = SanaSprint(retime=0.2, sigma_data=0.7).stages()
    assert [(type(stage.method), stage.share) for stage in stages] == [(Retime, 0.2), (SanaSprint, 0.8)]
    assert [type(stage.method) for stage in SanaSprint().stages()] == [SanaSprint]
    source = teacher(Velocity(time_scale=1000.0)).float()
    before = {name: p.clone() for name, p in source.named_parameters()}
    data = Dataset("points", torch.randn(12, 3), torch.arange(12) % 3)
    settings = Settings(Budget(10), batch=4, precision="fp32")
    student = run_recipe(SanaSprint(retime=0.2), source, data, settings, show=False).model
    assert bool(student.sample(2, torch.tensor([0, 1]), seed=0).isfinite().all())
    assert all(torch.equal(before[name], p) for name, p in source.named_parameters())


# The adversary beside sCM


def test_a_tie_costs_the_heads_1_and_the_student_nothing() -> None:
    """Logits of 0 everywhere: the hinge loss is 1, and the student's is sCM's alone."""
    method = SanaSprint()
    nets = method.networks(Start(teacher()))
    nets.discriminator.forward = lambda features, *_: torch.zeros(len(features[0]), 2, dtype=F64) * features[0].sum()
    first, second = alone(method.updates(nets, batch(), Progress(fraction=0.5)))
    assert float(second.loss) == 1.0 and float(first.logs["adversary"]) == 0.0


def test_each_update_reaches_its_own_networks_only() -> None:
    """Student, then heads; the frozen teacher has no gradient and stays."""
    method = SanaSprint()
    nets = method.networks(Start(teacher()))
    before = {name: p.clone() for name, p in nets.teacher.named_parameters()}
    own = {"student": ("student", "weight"), "discriminator": ("discriminator",)}
    groups = []
    for update in alone(method.updates(nets, batch(), Progress(fraction=0.5))):
        update.loss.backward()
        (group,) = update.groups
        groups.append(group)
        for name, module in nets.named_children():
            reached = any(p.grad is not None and bool(p.grad.any()) for p in module.parameters())
            assert reached is (name in own[group]), (group, name)
        nets.zero_grad(set_to_none=True)
        assert update.loss.isfinite()
    assert groups == ["student", "discriminator"]
    assert all(torch.equal(before[name], p) for name, p in nets.teacher.named_parameters())


def test_half_of_the_adversarys_samples_start_from_pure_noise() -> None:
    """``max_time`` of them, within the error of so many draws; there a sample is ``-sigma_data F``, one call."""
    for share in (0.0, 0.5, 1.0):
        method, seen = SanaSprint(max_time=share, guidances=(1.0,)), []
        nets = method.networks(Start(teacher()))
        real = nets.student.to_data
        nets.student.to_data = lambda x, t, cond, real=real, seen=seen: seen.append((x, t, cond)) or real(x, t, cond)
        n = 4000
        with torch.no_grad():
            x = method.draw(nets, batch(n), {})
        ((x_t, t, cond),) = seen
        latest = t == math.pi / 2
        assert float(latest.double().mean()) == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / n) + 1e-9)
        with torch.no_grad():
            f = nets.student.mean_velocity(x_t, t, torch.zeros_like(t), cond)
        torch.testing.assert_close(x[latest], -f[latest], atol=1e-9, rtol=0)


def test_one_call_from_pure_noise_is_minus_the_velocity() -> None:
    """``x_0 = cos t x - sin t v`` at ``pi / 2``, with noise of the deviation ``sigma_data``; the published times."""
    method = SanaSprint()
    nets = method.networks(Start(teacher()))
    student = method.student(nets)
    z, cond = torch.randn(5, 3, dtype=F64), torch.arange(5) % 3
    end = torch.full((5,), math.pi / 2, dtype=F64)
    with torch.no_grad():
        w = torch.full((5,), 1.5, dtype=F64)
        f = nets.student.mean_velocity(0.5 * z, end, 0 * end, cond, w=w)
        torch.testing.assert_close(student(z, cond, steps=1), -f, atol=1e-9, rtol=0)
    times = {k: plan.times for k, plan in student.plans.items()}
    assert times == {1: (math.pi / 2,), 2: (math.pi / 2, 1.3), 4: (math.pi / 2, 1.3, 1.1, 0.6)}
    assert wrapping(EDM(), 0.5).t_max == pytest.approx(math.atan(160))


def test_several_guidances_are_an_input_and_one_is_not() -> None:
    student = SanaSprint(guidances=(4.0, 5.0, 4.5)).networks(Start(teacher())).student
    assert (student.extras["w"].default, student.extras["w"].low, student.extras["w"].high) == (4.5, 4.0, 5.0)
    assert SanaSprint(guidances=(4.5,)).networks(Start(teacher())).student.extras == {}


# Mismatched pairs


def answered(questions: Any, parts: list[Batch]) -> list[Tensor]:
    """What several parts of one batch get when they ask together."""
    answers: list[Any] = [None] * len(parts)
    ends: dict[int, Any] = {}
    while len(ends) < len(parts):
        asked = []
        for i, question in enumerate(questions):
            try:
                asked.append(question.send(answers[i]))
            except StopIteration as stop:
                ends[i] = stop.value
        if asked:
            assert all(isinstance(found, Rows) for found in asked)
            answers = [torch.cat([found.value for found in reversed(asked)])] * len(parts)
    return [ends[i] for i in range(len(parts))]


def test_mismatched_pairs_are_those_of_the_whole_batch() -> None:
    """Every condition with its successor's sample, whatever the parts and the order in which they are put together; the
    student's own sample where the conditions are one."""
    x, own = torch.arange(6.0)[:, None], -torch.ones(6, 1)
    labels = torch.tensor([0, 1, 1, 2, 0, 0])
    parts = [Batch(x[i : i + 2], labels[i : i + 2], Rng(0, part=i // 2, parts=3)) for i in (0, 2, 4)]
    found = torch.cat(answered([mismatched_pairs(p, own[:2]) for p in parts], parts))
    assert found.flatten().tolist() == [1, -1, 3, 4, -1, -1]
    (whole,) = answered([mismatched_pairs(b, own) for b in (Batch(x, labels, Rng(0)),)], [parts[0]])
    assert torch.equal(whole, found)
    for prompts in (torch.nn.functional.one_hot(labels), torch.randn(3, 2, 4)[labels]):
        (told,) = answered([mismatched_pairs(Batch(x, {"prompt_embeds": prompts}, Rng(0)), own)], [parts[0]])
        assert torch.equal(told, found)
    assert answered([mismatched_pairs(Batch(x, None, Rng(0)), own)], [parts[0]]) == [None]


def test_mismatched_pairs_count_as_generated() -> None:
    """Three passes of the heads, in one: data, samples, and data under another condition, at times of their own."""
    for mismatched, n in ((True, 18), (False, 12)):
        method, seen = SanaSprint(mismatched=mismatched), []
        nets = method.networks(Start(teacher()))
        real = nets.discriminator.forward
        nets.discriminator.forward = lambda found, *told, real=real, seen=seen: (
            seen.append(len(found[0])) or real(found, *told)
        )
        for _ in alone(method.updates(nets, batch(), Progress(fraction=0.5))):
            pass
        assert seen == [6, n]


# A control picture


class Controlled(nn.Module):
    """A network of a prompt ``[B, 4]`` and a control picture ``[B, 1, 2, 2]``, which keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.prompt, self.control = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(4, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.SiLU(), nn.Linear(8, 8)) for _ in range(2))
        self.leave = nn.Linear(8, 4)
        self.seen: list[Mapping[str, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        self.seen.append(cond)
        hidden = self.enter(x.flatten(1)) + t[:, None] + self.prompt(cond["prompt"])
        hidden = hidden + self.control(cond["control"].flatten(1))
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.leave(hidden).reshape(x.shape)


def test_a_control_picture_reaches_teacher_student_tangent_and_heads() -> None:
    """It is a leaf of the condition: every call has the picture of its own samples, that without the prompt too; the
    tangent holds it fixed, as differences do that keep it."""
    torch.manual_seed(0)
    net = Controlled().double()
    null = {"prompt": torch.zeros(1, 4, dtype=F64)}
    source = NetworkDenoiser(net, FlowMatching(), Velocity(), (1, 2, 2), None, null)
    cond = {"prompt": torch.randn(4, 4, dtype=F64), "control": torch.randn(4, 1, 2, 2, dtype=F64)}
    method = SanaSprint(guidances=(2.0,), layers=("blocks.0", "blocks.1"))
    rng = Rng(0)
    given = Batch(rng.normal(4, 1, 2, 2, dtype=F64), cond, rng)
    nets = method.networks(Start(source, Dataset("drawn", given.x, cond)))
    net.seen.clear()
    own = next(part.net for part in networks_in(nets.student.denoiser))
    own.seen.clear()
    for update in alone(method.updates(nets, given, Progress(fraction=0.9))):
        update.loss.backward()
    # the teacher with and without the prompt and its features twice; the student's tangent, its loss and two samples
    assert len(net.seen) == 4 and len(own.seen) == 4
    for seen in [*net.seen, *own.seen]:
        assert torch.equal(seen["control"], cond["control"].repeat(len(seen["control"]) // 4, 1, 1, 1))
    assert sum(not bool(seen["prompt"].any()) for seen in net.seen) == 1

    x, t = torch.randn(4, 1, 2, 2, dtype=F64), torch.full((4,), 0.8, dtype=F64)
    v, s, h = torch.randn_like(x), torch.zeros(4, dtype=F64), 1e-6
    student = Jump(source.on(TrigFlow(t_max=math.pi / 2, sigma_data=1.0)))

    def f(x_: Tensor, t_: Tensor) -> Tensor:
        return student.mean_velocity(x_, t_, s, cond)

    with torch.no_grad():
        slope = (f(x + h * v, t + h) - f(x - h * v, t - h)) / (2 * h)
    _, go = student.schedule.coefficients_of_move(t, s)
    found = eulerian(student, x, t, s, v, cond)
    still = eulerian(student, x, t, s, v, cond, r=0.0)
    d_keep = -t.sin()
    moved = -(align(d_keep, x) * x + align(go, x) * slope)
    torch.testing.assert_close(found.g - still.g, moved, atol=1e-8, rtol=0)
    other = eulerian(student, x, t, s, v, {**cond, "control": 0 * cond["control"]})
    assert float((other.g - found.g).abs().max()) > 1e-3


def test_what_cannot_be_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"guidances=\(\) must name at least one"):
        SanaSprint(guidances=())
    with pytest.raises(ValueError, match="retime=1 leaves nothing"):
        SanaSprint(retime=1.0)
    with pytest.raises(ValueError, match=r"guidances=\(1, 1\.5, 2\): this teacher is uncondit.*; its only scale is 1"):
        SanaSprint().networks(Start(teacher(classes=None)))
    SanaSprint(guidances=(1.0,), adversary_weight=0.0).networks(Start(teacher(classes=None)))
