"""Further inputs of students: exact flow maps with a guidance weight, networks, a researcher's own module, folders."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fewstep.denoisers import Clipped, NetworkDenoiser
from fewstep.discrete_vp import DiscreteVP
from fewstep.exact import Gaussian, GuidedFlowMap, GuidedGaussian, probability_flow
from fewstep.extras import Input, guidance_weight
from fewstep.flow_maps import EDMConsistency, Jump
from fewstep.hub import native
from fewstep.models import model_of
from fewstep.networks import MLP, UNet
from fewstep.predictions import EDMPrediction, TrigPrediction, Velocity
from fewstep.randomness import Rng
from fewstep.sampling import Inpainting, Plan, Student, edit, sample_student, stroke_to_image
from fewstep.schedules import EDM, FlowMatching, Schedule, TrigFlow

F64 = torch.float64
NARROW, WIDE = torch.tensor([0.25, 0.5]), torch.tensor([0.64, 1.5])
WEIGHT = Input(1.0, 0.0, 14.0, unguided=1.0)
STEPS = Input(4.0, 1.0, 8.0)


def guided(schedule: Schedule) -> Student:
    """Exact, with the guidance weight as an input, in one call and in three."""
    flow_map = GuidedFlowMap(GuidedGaussian(schedule, (2,), NARROW, WIDE, 1.0))
    times = tuple(schedule.t_max * share for share in (1.0, 0.5, 0.1))
    return Student(flow_map, {1: Plan(times[:1]), 3: Plan(times, gamma=0.0)})


def moved(net: nn.Module) -> nn.Module:
    """Away from its start, where inputs have no effect."""
    gen = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.2 * torch.randn(p.shape, generator=gen)
    return net.requires_grad_(False)


def student(plan_extras: dict[str, float] | None = None) -> Student:
    """A two-time network that is told a weight and a number of steps, which each plan sets."""
    net = moved(MLP((2,), 32, 2, classes=3, extras=("s", "w", "k")))
    jump = Jump(
        NetworkDenoiser(net, FlowMatching(), Velocity(), (2,), 3), two_times=True, extras={"w": WEIGHT, "k": STEPS}
    )
    told = {"k": 2.0} if plan_extras is None else plan_extras
    return Student(jump, {1: Plan((1.0,), extras={"k": 1.0}), 2: Plan((1.0, 0.5), 0.5, extras=told)})


# --- exact --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [FlowMatching(), TrigFlow(), EDM()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("steps", [1, 3])
def test_an_exact_student_takes_the_guidance_weight(schedule: Schedule, steps: int) -> None:
    """At w = 0 and 1 it is the map of the two laws, at w = 3 the power law of both, to 1e-10."""
    exact = guided(schedule)
    noise = torch.randn(6, 2, dtype=F64, generator=torch.Generator().manual_seed(1))
    start = schedule.prior(noise)
    law = {w: Gaussian(schedule, torch.zeros(2), v.diag()) for w, v in ((0.0, WIDE), (1.0, NARROW))}
    ends = {w: made.flow(start, schedule.t_max, schedule.t_min) for w, made in law.items()}
    made = {w: exact(noise, None, steps, Rng(0), w=w) for w in (0.0, 1.0, 3.0)}
    for w, end in ends.items():
        assert float((made[w] - end).abs().max()) < 1e-10
    power = start * (ends[1.0] / start) ** 3 * (ends[0.0] / start) ** -2
    assert float((made[3.0] - power).abs().max()) < 1e-10
    assert float((made[3.0] - exact(noise, None, steps, Rng(0))).abs().max()) > 1e-2  # whose default is 1


def test_the_power_law_is_the_guided_ode() -> None:
    """At w = 3, the flow map of the guided denoiser by numerical integration, far from both laws."""
    schedule = TrigFlow()
    x = schedule.prior(torch.randn(4, 2, dtype=F64, generator=torch.Generator().manual_seed(2)))
    ode = probability_flow(GuidedGaussian(schedule, (2,), NARROW, WIDE, 3.0), x, schedule.t_max, 0.0)
    flow_map = GuidedFlowMap(GuidedGaussian(schedule, (2,), NARROW, WIDE, 1.0))
    made = flow_map(x, schedule.t_max, 0.0, w=torch.full((4,), 3.0))
    assert float((made - ode).abs().max()) < 1e-8


def test_a_weight_a_sample() -> None:
    """``[n]`` weights, as a tensor, an array or a list: every sample is the one that its weight alone makes."""
    exact = guided(FlowMatching())
    weights = torch.tensor([0.3, 1.0, 3.0, 14.0], dtype=F64)
    each = [exact.sample(4, seed=5, w=float(w))[i] for i, w in enumerate(weights)]
    for given in (weights, weights.numpy(), weights.tolist()):
        torch.testing.assert_close(exact.sample(4, seed=5, w=given), torch.stack(each), rtol=0, atol=1e-12)
    seeds = [3, 5, 7]
    three = exact.sample(3, seeds=seeds, w=weights[:3])
    torch.testing.assert_close(exact.sample(1, seeds=[5], w=1.0), three[1:2], rtol=0, atol=1e-12)


# --- networks -----------------------------------------------------------------------------------------------------


def test_a_network_is_told_defaults_then_the_plans_then_the_callers() -> None:
    """The number of steps comes with the plan, the target time with the call, the weight from the caller."""
    made = student()
    jump, plan = made.flow_map, made.plans[2]
    noise, labels = torch.randn(3, 2, generator=torch.Generator().manual_seed(3)), torch.tensor([0, 1, 2])

    def told(w: Tensor, k: float) -> Tensor:
        given = {"w": w, "k": torch.full((3,), k)}
        rng = Rng(4)
        r = plan.inner_at(jump.schedule, 0)
        a, sd = jump.schedule.transition(torch.tensor([r], dtype=F64), torch.tensor([0.5], dtype=F64))
        half = jump.jump(noise, 1.0, r, labels, **given)
        lifted = float(a) * half + float(sd) * rng.normal_like(half)
        return jump.to_data(lifted, 0.5, labels, **given)

    weights = torch.tensor([0.0, 1.0, 7.0])
    for given, expected in (
        ({}, told(torch.ones(3), 2.0)),
        ({"w": 3.0}, told(torch.full((3,), 3.0), 2.0)),
        ({"w": weights}, told(weights, 2.0)),
        ({"k": 7}, told(torch.ones(3), 7.0)),
    ):
        torch.testing.assert_close(made(noise, labels, 2, Rng(4), **given), expected, rtol=0, atol=1e-6)
    assert float((told(torch.ones(3), 2.0) - told(torch.ones(3), 4.0)).abs().max()) > 1e-3


def test_a_new_input_changes_nothing_until_it_is_trained() -> None:
    """A zero-initialised weight: the same samples at every value; away from its start, others."""
    torch.manual_seed(0)
    net = UNet((1, 8, 8), (8, 8), 1, 16, extras=("w",))
    for name, p in net.named_parameters():
        if "conditioning.extras" not in name:
            p.data += 0.1 * torch.randn_like(p)
    jump = Jump(
        NetworkDenoiser(net.requires_grad_(False), TrigFlow(), TrigPrediction(), (1, 8, 8)), extras={"w": WEIGHT}
    )
    made = Student(jump, {1: Plan((1.5,))})
    assert torch.equal(made.sample(2, seed=1), made.sample(2, seed=1, w=9.0))
    nn.init.normal_(net.conditioning.extras["w"].weight)
    assert float((made.sample(2, seed=1) - made.sample(2, seed=1, w=9.0)).abs().max()) > 1e-3


class Own(nn.Module):
    """A researcher's own, which is fewstep's in nothing but its call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None, w: Tensor | None = None) -> Tensor:
        assert w is not None
        self.seen.append(w)
        made: Tensor = self.layer(torch.cat([x, t[:, None].to(x), w[:, None].to(x)], dim=1))
        return made


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
def test_a_module_of_ones_own_with_a_weight(kind: torch.dtype) -> None:
    """``forward(x, t, cond, w=...)`` is all that a network needs; weights keep their digits in half precision."""
    torch.manual_seed(0)
    net = Own().to(kind).requires_grad_(False)
    made = Student(Jump(NetworkDenoiser(net, EDM(), EDMPrediction(), (2,)), extras={"w": WEIGHT}), {1: Plan((80.0,))})
    weights = torch.tensor([1.001, 3.003], dtype=F64)
    samples = made.sample(2, seed=1, w=weights)
    assert samples.dtype == kind and not torch.equal(samples, made.sample(2, seed=1, w=weights + 2))
    assert net.seen[0].dtype == (F64 if kind == F64 else torch.float32)
    torch.testing.assert_close(net.seen[0].double(), weights, rtol=0, atol=1e-6)
    clipped = Jump(Clipped(made.flow_map.denoiser), extras={"w": WEIGHT})
    assert float(clipped.to_data(10 * samples, 80.0, w=weights).abs().max()) <= 1.1


def test_samplers_by_name_and_editing_take_inputs() -> None:
    """And a number of steps that belongs to the student's own plans is that of its plan, or has to be given."""
    net = moved(MLP((1, 4, 4), 16, 1, extras=("w", "k")))
    jump = Jump(NetworkDenoiser(net, DiscreteVP.linear(), Velocity(), (1, 4, 4)), extras={"w": WEIGHT, "k": STEPS})
    plan = Plan((999.0, 499.0), extras={"k": 2.0})
    made = Student(jump, {2: plan})
    noise = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))

    def named(steps: int, **extras: float) -> Tensor:
        return sample_student(made, noise, "lcm", steps, rng=Rng(1), extras=extras)

    assert torch.equal(named(2, w=5.0), named(2, w=5.0, k=2.0)) and not torch.equal(named(2, w=5.0), named(2, w=1.0))
    assert not torch.equal(named(2), named(2, k=4.0))
    with pytest.raises(ValueError, match=r"steps=3: the input k belongs to the student's own plans, for \[2\] steps"):
        named(3)
    assert not torch.equal(named(3, k=3.0), named(3, k=4.0))
    known = Inpainting(torch.eye(4))
    for call in (
        lambda **e: edit(jump, noise, known, plan, Rng(1), extras=e),
        lambda **e: stroke_to_image(jump, noise, plan, Rng(1), extras=e),
    ):
        assert torch.equal(call(), call(w=1.0)) and not torch.equal(call(), call(w=5.0))
        with pytest.raises(ValueError, match="w=20 must lie in"):
            call(w=20.0)


# --- what cannot be -----------------------------------------------------------------------------------------------

TAKES = r"this student takes w from 0 to 14 \(default 1\), k from 1 to 8 \(default 4\)"
NONE = "this student takes no further inputs"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"v": 3}, f"v=3: {TAKES}"), ({"step": 2}, f"step=2: {TAKES}"),
        ({"w": 20}, rf"w=20 must lie in \[0, 14\]: {TAKES}"), ({"w": -0.5}, rf"w=-0.5 must lie in \[0, 14\]: {TAKES}"),
        ({"k": 9.0}, rf"k=9 must lie in \[1, 8\]: {TAKES}"), ({"w": float("nan")}, "w=nan must lie in"),
        ({"w": [1.0, 2.0, 99.0]}, "w=99 must lie in"), ({"w": [1.0, -3.0, float("nan")]}, "w=nan must lie in"),
        ({"w": [1.0, 2.0]}, rf"w of shape \[2\] must be a number, or one a sample \[3\]: {TAKES}"),
        ({"w": torch.ones(3, 1)}, r"w of shape \[3, 1\] must be"), ({"w": []}, "w=nan must lie|w of shape"),
        ({"w": "3"}, f"w='3' must be a number, or one a sample: {TAKES}"), ({"w": None}, "w=None must be a number"),
        ({"w": True}, "w=True must be a number"), ({"w": torch.ones(3) > 0}, "w of type torch.bool"),
        ({"w": np.ones(3) * 1j}, "w of type torch.complex128"),
    ],
)  # fmt: skip
def test_values_that_cannot_be(given: dict[str, Any], said: str) -> None:
    """One line with the input, its range and default, and what there is."""
    with pytest.raises((ValueError, TypeError)) as found:
        student().sample(3, **given)
    assert re.search(said, str(found.value)) and "\n" not in str(found.value)


def test_a_student_without_inputs_takes_none() -> None:
    made = Student(Jump(Gaussian(FlowMatching(), torch.zeros(2), 1.0)), {1: Plan((1.0,))})
    assert made.extras == {} and model_of(made).inputs == {}
    with pytest.raises(ValueError, match=f"w=3: {NONE}"):
        made.sample(2, w=3.0)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Input(20.0, 0.0, 14.0), r"default 20 must lie in \[0, 14\]"),
        (lambda: Input(float("nan"), 0.0, 14.0), "default nan must lie"),
        (lambda: Input(1.0, 0.0, float("inf")), "high=inf must be finite"),
        (lambda: Input(1.0, 0.0, 2.0, float("nan")), "unguided=nan must be finite"),
        (lambda: Jump(student().flow_map.denoiser, extras={"s": WEIGHT}), "'s' cannot be the name"),
        (lambda: Jump(student().flow_map.denoiser, extras={"seed": WEIGHT}), "'seed' cannot be the name"),
        (lambda: Jump(student().flow_map.denoiser, extras={"lambda": WEIGHT}), "'lambda' cannot be the name"),
        (lambda: Jump(student().flow_map.denoiser, extras={"w 2": WEIGHT}), "'w 2' cannot be the name"),
        (lambda: Jump(student().flow_map.denoiser, extras={"a": WEIGHT, "b": WEIGHT}), "a and b are both declared"),
        (lambda: student({"k": 9.0}), r"the plan for 2 steps: k=9 must lie in \[1, 8\]"),
        (lambda: student({"v": 1.0}), f"the plan for 2 steps: v=1: {TAKES}"),
        (lambda: Plan((1.0,), extras={"k": "x"}), "extras: k='x' must be a number"),  # type: ignore[dict-item]
        (lambda: Plan((1.0,), extras={"k": float("nan")}), "extras: k=nan"),
    ],
)  # fmt: skip
def test_declarations_that_cannot_be(make: Callable[[], Any], said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=said):
        make()


def test_the_guidance_weight_is_the_declared_one() -> None:
    """Whatever its name and unit: a guidance scale of 1 is no guidance."""
    assert guidance_weight({"k": STEPS, "w": WEIGHT}) == "w" and guidance_weight({"k": STEPS}) is None
    assert WEIGHT.at_scale(4.0) == 4.0 and Input(6.5, 0.0, 14.0, unguided=0.0).at_scale(4.0) == 3.0


# --- folders ------------------------------------------------------------------------------------------------------


def consistency() -> Student:
    net = moved(MLP((2,), 16, 1, extras=("w",)))
    made = EDMConsistency(NetworkDenoiser(net, EDM(), EDMPrediction(), (2,)), extras={"w": WEIGHT})
    return Student(made, {1: Plan((80.0,))})


@pytest.mark.parametrize("make", [student, consistency])
def test_folders_keep_inputs(make: Callable[[], Student], tmp_path: Path) -> None:
    """Names, ranges, defaults, the guidance weight, and what each plan sets; a student without inputs says nothing."""
    made = make()
    native.save(made, tmp_path / "model")
    again = native.load(tmp_path / "model")
    assert again.extras == made.extras and again.plans == made.plans and again.extras["w"].unguided == 1.0
    steps = max(made.plans)
    for given in ({}, {"w": 3.0}):
        assert torch.equal(again.sample(3, seed=1, steps=steps, **given), made.sample(3, seed=1, steps=steps, **given))
    assert not torch.equal(again.sample(3, seed=1, w=3.0), again.sample(3, seed=1))
    plain = Jump(NetworkDenoiser(moved(MLP((2,), 16, 1)), EDM(), EDMPrediction(), (2,)))
    assert "extras" not in native.describe(plain)


GOOD = {"default": 1.0, "low": 0.0, "high": 2.0}
DAMAGE: list[tuple[list[str], Any, str]] = [
    (["flow_map", "extras", "w", "low"], "x", r'model\.flow_map\.extras\.w\.low = "x" must be a finite number'),
    (["flow_map", "extras", "w", "default"], 99.0, r"extras\.w: an input's default 99 must lie in \[0, 14\]"),
    (["flow_map", "extras", "w", "top"], 1.0, r"extras\.w\.top' is not among default, low, high"),
    (["flow_map", "extras", "w"], [], r"model\.flow_map\.extras\.w = \[\] must be an object"),
    (["flow_map", "extras", "W W"], GOOD, '"W W" must be the name of an input'),
    (["flow_map", "extras", "seed"], GOOD, r"extras\.seed: the network takes s, w, k"),
    (["flow_map", "extras", "v"], GOOD, r"extras\.v: the network takes s, w, k"),
    (["flow_map", "extras", "k", "unguided"], 1.0, "w and k are both declared"),
    (["plans", "2", "extras", "k"], 99.0, r"the plan for 2 steps: k=99 must lie in \[1, 8\]"),
    (["plans", "2", "extras", "k"], "x", r'model\.plans\.2\.extras\.k = "x" must be a finite number'),
    (["plans", "2", "extras", "q"], 1.0, "the plan for 2 steps: q=1: this student takes"),
]  # fmt: skip


@pytest.mark.parametrize(("place", "value", "said"), DAMAGE)
def test_damaged_inputs_are_refused_by_name(place: list[str], value: Any, said: str, tmp_path: Path) -> None:
    """One line that names the file, the input and what would be right."""
    native.save(student(), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    at = config["model"]
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=said) as found:
        native.load(tmp_path / "model")
    assert str(found.value).startswith(str(path)) and "\n" not in str(found.value)


def test_the_page_shows_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    """The example of docs/ideas/flow-maps.md runs, and prints the standard deviations that its comments name."""
    page = (Path(__file__).parents[2] / "docs" / "ideas" / "flow-maps.md").read_text()
    (example,) = re.findall(r"## Further inputs\n.*?```python\n(.*?)```", page, re.DOTALL)
    exec(example, {})
    said = re.findall(r"#.* (\S+)$", example, re.MULTILINE)
    declared, narrow, wide, *_ = capsys.readouterr().out.splitlines()
    assert declared == "from 0 to 14 (default 1)"
    for line, value in zip((narrow, wide), said[1:], strict=True):
        assert float(line) == pytest.approx(float(value), rel=0.05)
