"""Guided distillation: guidance as an input that is learned exactly where it can be, halvings at every weight, and the
three ways of walking the noise levels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep import grids
from fewstep.denoisers import Denoiser, NetworkDenoiser
from fewstep.exact import ExactFlowMap, Gaussian, GuidedFlowMap, GuidedGaussian
from fewstep.flow_maps import Jump
from fewstep.hub import native
from fewstep.methods.flow_maps.guided_distillation import (
    WAYS,
    GuidedDenoiser,
    GuidedDistillation,
    GuidedHalving,
    double_step,
    plans_of,
)
from fewstep.methods.method import Batch, Networks, Progress
from fewstep.methods.parts.identities import semigroup
from fewstep.methods.start import Start
from fewstep.networks import MLP
from fewstep.predictions import TrigPrediction
from fewstep.randomness import Rng
from fewstep.runs.course import run_recipe
from fewstep.sampling import Inpainting, Plan, Student, edit, encode, rollout, stroke_to_image, style_transfer
from fewstep.schedules import EDM, FlowMatching, Schedule, TrigFlow, VPCosine
from fewstep.training.budget import Budget
from fewstep.training.settings import Settings

#: Section 3 and appendix: weights from 0 to 4 in its convention, PD's weighting; what else was run is not known.
PUBLISHED: dict[str, Any] = {
    **dict.fromkeys(("start", "end", "way", "lr", "first_share"), ...), "w_min": 1.0, "w_max": 5.0,
    "weighting": "snr-trunc",
    "optimizer": dict.fromkeys(("kind", "betas", "eps", "weight_decay", "clip", "warmup", "decay"), ...),
}  # fmt: skip
#: The paper's weights 0, 1 and 3 as scales.
SCALES = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
NARROW, WIDE = 0.25, 0.8


def world(schedule: Schedule, scale: float | Tensor = 1.0) -> GuidedGaussian:
    return GuidedGaussian(schedule, (1,), NARROW, WIDE, scale)


class Pair(Denoiser):
    """A conditional teacher whose class 0 has the narrow law; without a label it has the wide one."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__(schedule, (1,), 1)
        self.narrow, self.wide = (Gaussian(schedule, torch.zeros(1, dtype=torch.float64), v) for v in (NARROW, WIDE))

    def forward(self, x: Tensor, t: Any, cond: Any = None) -> Tensor:
        return self.narrow(x, t) if cond is not None and int(cond[0]) >= 0 else self.wide(x, t)


class Linear(nn.Module):
    """What stage 1 can fit exactly: the two predictions that guidance mixes, with weights linear in ``w``."""

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self.pair = [pair]  # which does not train
        self.p = nn.Parameter(torch.zeros(4, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, *, w: Tensor) -> Tensor:
        (pair,), p, w = self.pair, self.p, w[:, None]
        time = t.clamp(pair.schedule.t_min, pair.schedule.t_max)
        narrow, wide = (gaussian.velocity(x, time) for gaussian in (pair.narrow, pair.wide))
        return (p[0] + p[1] * w) * narrow + (p[2] + p[3] * w) * wide


class WithWeight(Denoiser):
    """A network of velocities that is told ``w``."""

    def __init__(self, net: nn.Module, schedule: Schedule) -> None:
        super().__init__(schedule, (1,), 1)
        self.net = net

    def forward(self, x: Tensor, t: Any, cond: Any = None, **extras: Tensor) -> Tensor:
        raise AssertionError("losses are in velocities")

    def velocity(self, x: Tensor, t: Any, cond: Any = None, **extras: Tensor) -> Tensor:
        return self.net(x, t, cond, **extras)


@pytest.mark.parametrize("schedule", [FlowMatching(t_min=0.01, t_max=0.99), VPCosine(log_snr_max=4.0), EDM()])
def test_stage_one_recovers_the_guided_teacher(schedule: Schedule) -> None:
    """One Newton step of the loss, which is quadratic in a linear student, ends at ``w`` times the one velocity and
    ``1 - w`` times the other."""
    pair = Pair(schedule)
    net = Linear(pair)
    method = GuidedDenoiser(w_min=0.0, w_max=5.0)
    student = method.jump(WithWeight(net, schedule), "ddim")
    nets = Networks({"student": student, "teacher": Jump(pair)}, {})
    x = 0.5 * torch.randn(256, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    net.p.requires_grad_(True)

    def loss(p: Tensor) -> Tensor:
        given = {"p": p}
        (update,) = method.updates(
            Networks({"student": Called(net, given, schedule), "teacher": Jump(pair)}, {}),
            Batch(x, torch.zeros(256, dtype=torch.long), Rng(3)), Progress(),
        )  # fmt: skip
        return update.loss

    zero = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    slope = torch.autograd.grad(loss(zero), zero)[0]
    curvature = torch.autograd.functional.hessian(loss, torch.zeros(4, dtype=torch.float64))
    found = -torch.linalg.solve(curvature, slope)
    wanted = torch.tensor([0.0, 1.0, 1.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(found, wanted, atol=1e-8, rtol=0)
    assert nets.student.extras["w"].default == 1.0


class Called(Jump):
    """A student whose network has the parameters that are given."""

    def __init__(self, net: nn.Module, given: dict[str, Tensor], schedule: Schedule) -> None:
        super().__init__(WithWeight(net, schedule))
        self.given = given

    def mean_velocity(self, x: Tensor, t: Any, s: Any, cond: Any = None, **extras: Tensor) -> Tensor:
        return torch.func.functional_call(self.denoiser.net, self.given, (x, t, cond), extras)


class Halved(Denoiser):
    """The student that fits its halving exactly, at every weight: its velocity is the target."""

    def __init__(self, teacher: Jump, steps: int, way: Any) -> None:
        super().__init__(teacher.schedule, teacher.shape)
        self.teacher, self.steps, self.way = teacher, steps, way

    def forward(self, x: Tensor, t: Any, cond: Any = None, **extras: Tensor) -> Tensor:
        schedule, f = self.schedule, self.velocity(x, t, cond, **extras)
        a, b = (c / schedule.wronskian(t) for c in (schedule.d_sigma(t), schedule.sigma(t)))
        return a[:, None] * x - b[:, None] * f

    def velocity(self, x: Tensor, t: Any, cond: Any = None, **extras: Tensor) -> Tensor:
        starts = WAYS[self.way](self.schedule, self.steps, torch.arange(self.steps))[0]
        i = (starts - t[:1]).abs().argmin().expand(len(x))
        step = WAYS[self.way](self.schedule, self.steps, i)
        return semigroup(self.teacher, x, *step, cond, second=self.teacher, clean=True, **extras)


class Told(Denoiser):
    """Guidance in closed form whose weight is an input."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__(schedule, (1,))

    def forward(self, x: Tensor, t: Any, cond: Any = None, *, w: Tensor) -> Tensor:
        return world(self.schedule, w)(x, t)

    def velocity(self, x: Tensor, t: Any, cond: Any = None, *, w: Tensor) -> Tensor:
        return world(self.schedule, w).velocity(x, t)


def jump(denoiser: Denoiser, way: Any = "ddim") -> Jump:
    return GuidedHalving(w_min=0.0, w_max=14.0).jump(denoiser, way)


def ladder(schedule: Schedule, start: int, end: int, way: Any = "ddim") -> Jump:
    """The students of exact halvings."""
    model = jump(Told(schedule), way)
    steps = start // 2
    while steps >= end:
        model = jump(Halved(model, steps, way), way)
        steps //= 2
    return model


@pytest.mark.parametrize("schedule", [FlowMatching(), TrigFlow(), VPCosine()], ids=lambda s: type(s).__name__)
def test_one_step_tends_to_the_power_law_at_every_weight(schedule: Schedule) -> None:
    """After exact halvings one call errs by what the first steps err: half as much for twice as many, at w = 0, 1 and 3
    of the paper (scales 1, 2, 4), where the exact maps are far apart."""
    x = torch.full((3, 1), 0.7, dtype=torch.float64)
    exact = GuidedFlowMap(world(schedule))(x, schedule.t_max, schedule.t_min, w=SCALES)
    assert float((exact[:-1] / exact[1:]).min()) > 1.2
    coarse, fine = (
        (ladder(schedule, n, 1).to_data(x, schedule.t_max, w=SCALES) - exact).abs()[:, 0] for n in (128, 256)
    )
    assert bool((fine < 0.02).all()) and bool((coarse / fine > 1.8).all()) and bool((coarse / fine < 2.2).all())


def test_the_encoder_is_the_way_back() -> None:
    """Exact halvings up and down: data becomes noise and comes back, with an error that halves with twice the first
    steps."""
    schedule, x = FlowMatching(), torch.linspace(-1, 1, 6, dtype=torch.float64)[:, None]
    w = SCALES.repeat(2)
    errors = []
    for start in (128, 256):
        down, up = ladder(schedule, start, 2), ladder(schedule, start, 2, "encode")
        plan = plans_of(schedule, 2, "ddim")[2]
        noise = encode(up, x, plan, w=w)
        exact = GuidedFlowMap(world(schedule))(x, schedule.t_min, schedule.t_max, w=w)
        assert float((noise / exact - 1).abs().max()) < 6 / start
        errors.append(float((rollout(down, noise, plan, extras={"w": w}) - x).abs().max()))
    assert errors[0] < 0.1 and 1.7 < errors[0] / errors[1] < 2.3
    with pytest.raises(ValueError, match="this student is an encoder"):
        rollout(up, noise, plan, extras={"w": w})
    with pytest.raises(ValueError, match="an encoder, whose network is no denoiser"):
        up.teacher()


@pytest.mark.parametrize("schedule", [FlowMatching(), VPCosine(), EDM()], ids=lambda s: type(s).__name__)
def test_steps_of_double_length(schedule: Schedule) -> None:
    """From every time of the grid two steps along it, one from the last; the plan asks for just those, and half as many
    deterministic steps are among them."""
    grid = grids.even(schedule, 6)
    t, mid, s = (times.flip(0) for times in double_step(schedule, 6, torch.arange(6)))
    assert torch.equal(t, grid[:-1]) and torch.equal(s, torch.cat([grid[2:], grid[-1:]]))
    assert torch.equal(mid, torch.cat([grid[1:-1], grid[-2:-1]]))
    plans = plans_of(schedule, 6, "stochastic")
    plan = plans[6]
    asked = [*(plan.inner_at(schedule, i) for i in range(5)), schedule.t_min]
    assert list(zip(plan.times, asked, strict=True)) == list(zip(t.tolist(), s.tolist(), strict=True))
    half = plans[3]
    assert half.times == tuple(grid[:-1:2].tolist())
    jumps = set(zip(half.times, [*half.times[1:], schedule.t_min], strict=True))
    assert jumps <= set(zip(t.tolist(), s.tolist(), strict=True))
    assert list(plans_of(schedule, 3, "stochastic")) == [3]


def test_doubled_steps_of_exact_students() -> None:
    """What the stochastic stage learns is two steps of the deterministic student, and its own single last step."""
    schedule = FlowMatching()
    teacher = ladder(schedule, 16, 4)
    student = jump(Halved(teacher, 4, "stochastic"))
    x, w = torch.full((3, 1), 0.7, dtype=torch.float64), SCALES
    for t, mid, s in ((1.0, 0.75, 0.5), (0.75, 0.5, 0.25), (0.5, 0.25, 0.0)):
        two = teacher.jump(teacher.jump(x, t, mid, w=w), mid, s, w=w)
        torch.testing.assert_close(student.jump(x, t, s, w=w), two, atol=1e-14, rtol=1e-13)
    torch.testing.assert_close(student.to_data(x, 0.25, w=w), teacher.to_data(x, 0.25, w=w), atol=1e-14, rtol=1e-13)


@pytest.mark.parametrize("schedule", [FlowMatching(), EDM()], ids=lambda s: type(s).__name__)
def test_the_stochastic_sampler_keeps_the_law(schedule: Schedule) -> None:
    """With the exact maps of a Gaussian the standard deviation is that of the noised law at every time of the plan."""
    gaussian = Gaussian(schedule, torch.zeros(1, dtype=torch.float64), NARROW)
    plan = plans_of(schedule, 4, "stochastic")[4]
    calls: list[Any] = []
    x = rollout(ExactFlowMap(gaussian), Rng(0).normal(40_000, 1, dtype=torch.float64), plan, rng=Rng(1), calls=calls)
    for call in calls:
        t = torch.tensor(call.t, dtype=torch.float64)
        wanted = float((schedule.alpha(t) ** 2 * NARROW + schedule.sigma(t) ** 2).sqrt())
        assert float(call.x.std()) == pytest.approx(wanted, rel=0.015)
    assert float(x.std()) == pytest.approx(NARROW**0.5, rel=0.015)
    told = calls[1]
    kept = float((told.x * calls[0].x).mean() / (told.x.std() * calls[0].x.std()))
    assert 0.1 < kept < 0.999  # a path of its own noise, not of the first one only


def test_the_loss_vanishes_at_the_exact_student() -> None:
    """At every weight and for every way; a student that ignores the weight has a loss."""

    class Deaf(Halved):
        def velocity(self, x: Tensor, t: Any, cond: Any = None, **extras: Tensor) -> Tensor:
            return super().velocity(x, t, cond, w=torch.full_like(extras["w"], 2.0))

    class Rowwise(Denoiser):
        """Asks a student row by row, whose steps may differ."""

        def __init__(self, inner: Denoiser) -> None:
            super().__init__(inner.schedule, inner.shape)
            self.inner = inner

        def forward(self, x: Tensor, t: Any, cond: Any = None, **extras: Tensor) -> Tensor:
            raise AssertionError

        def velocity(self, x: Tensor, t: Any, cond: Any = None, **extras: Tensor) -> Tensor:
            w = extras["w"]
            return torch.cat([self.inner.velocity(x[k : k + 1], t[k : k + 1], w=w[k : k + 1]) for k in range(len(x))])

    schedule = FlowMatching()
    for way in WAYS:
        teacher = jump(Told(schedule))
        for kind, low, high in ((Halved, 0.0, 1e-24), (Deaf, 1e-3, 10.0)):
            method = GuidedHalving(steps=4, way=way)
            student = jump(Rowwise(kind(teacher, 4, way)))
            nets = Networks({"student": student, "teacher": teacher}, {})
            x = torch.randn(16, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) / 2
            (update,) = method.updates(nets, Batch(x, None, Rng(1)), Progress())
            assert low <= float(update.loss) <= high, way


def test_stages() -> None:
    """Stage 1, the halvings, and the doubling of a stochastic student; what cannot be is refused."""
    names = [(s.method.name, s.method.steps, s.share) for s in GuidedDistillation(8, 2, first_share=2.0).stages()]
    assert names == [("guided-denoiser", 8, 2.0), ("guided-halving", 4, 1.0), ("guided-halving", 2, 1.0)]
    ways = [s.method.way for s in GuidedDistillation(8, 2, "stochastic").stages()[1:]]
    assert ways == ["ddim", "ddim", "stochastic"]
    assert {s.method.way for s in GuidedDistillation(8, 2, "encode").stages()[1:]} == {"encode"}
    for wrong, said in (
        ({"start": 12}, "doubled"), ({"way": "stochastic"}, "two steps or more"),
        ({"w_min": 6.0}, "w_min=6 must be at most w_max=5"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            GuidedDistillation(**wrong)
    teacher = NetworkDenoiser(MLP((2,), 8, 1), TrigFlow(), TrigPrediction(), (2,))
    with pytest.raises(ValueError, match="there is no guidance"):
        GuidedDenoiser().networks(Start(teacher))


def teacher_of(classes: int = 2) -> NetworkDenoiser:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = MLP((2,), 16, 1, classes)
        with torch.no_grad():
            for p in net.parameters():
                p += 0.2 * torch.randn_like(p)
    return NetworkDenoiser(net, TrigFlow(), TrigPrediction(), (2,), classes)


def made(way: Any, **given: Any) -> Student:
    from fewstep.data import Dataset

    data = Dataset("points", torch.randn(32, 2, generator=torch.Generator().manual_seed(2)), torch.arange(32) % 2)
    recipe = GuidedDistillation(4, 2, way, lr=1e-3, **given)
    return run_recipe(recipe, teacher_of(), data, Settings(Budget(8), batch=8, precision="fp32"), show=False).model


def test_what_is_made_takes_the_weight(tmp_path: Any) -> None:
    """Sampled, edited, encoded and saved at any weight of the range; one outside is refused."""
    student, encoder = made("ddim"), made("encode")
    native.save(student, tmp_path / "student")
    native.save(encoder, tmp_path / "encoder")
    student, encoder = native.load(tmp_path / "student"), native.load(tmp_path / "encoder")
    assert str(student.extras["w"]) == "from 1 to 5 (default 1)" and student.extras["w"].unguided == 1
    low, high = student.sample(4, w=1.0), student.sample(4, w=5.0)
    assert not torch.equal(low, high) and torch.equal(student.sample(4), low)
    assert torch.equal(student.sample(4, w=[1.0, 5.0, 1.0, 5.0])[1], high[1])
    with pytest.raises(ValueError, match=r"w=6 must lie in \[1, 5\]"):
        student.sample(4, w=6.0)
    plan, x = student.plans[2], torch.randn(3, 2, generator=torch.Generator().manual_seed(1))
    late = Plan(plan.times[1:], gamma=0.0)
    near = stroke_to_image(student.flow_map, x, late, Rng(0), torch.tensor([0, 1, 0]), extras={"w": 3.0})
    filled = edit(student.flow_map, x, Inpainting(torch.tensor([1.0, 0.0])), plan, Rng(0), extras={"w": 3.0})
    assert near.shape == x.shape and torch.equal(filled[:, 0], x[:, 0])
    zeros, ones = torch.zeros(3).long(), torch.ones(3).long()
    moved = style_transfer(encoder, student, x, zeros, ones, encoding={"w": 2.0}, w=3.0)
    with torch.no_grad():
        noise = encode(encoder.flow_map, x, encoder.plans[2], zeros, w=2.0)
        assert torch.equal(moved, rollout(student.flow_map, noise, plan, ones, extras={"w": 3.0}))
    assert not torch.equal(moved, style_transfer(encoder, student, x, zeros, zeros, encoding={"w": 2.0}, w=3.0))
    assert not torch.equal(moved, style_transfer(encoder, student, x, zeros, ones, w=3.0))
    with pytest.raises(ValueError, match="this student is an encoder"):
        encoder.sample(2)
    stochastic = made("stochastic")
    assert list(stochastic.plans) == [1, 2] and stochastic.sample(3, steps=2, w=2.0).shape == (3, 2)
    with pytest.raises(ValueError, match="all plans of this one re-noise"):
        style_transfer(encoder, Student(stochastic.flow_map, {2: stochastic.plans[2]}), x)
