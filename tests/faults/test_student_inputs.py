"""What students and editing are given is checked as for ``fs.sample``: taken where it makes sense, else one line."""

import math
import re

import numpy as np
import pytest
import torch
from test_sample_inputs import WRONG, Wrong, mistake

from fewstep.denoisers import NetworkDenoiser
from fewstep.discrete_vp import DiscreteVP
from fewstep.flow_maps import EDMConsistency, Jump
from fewstep.networks import UNet
from fewstep.predictions import TrigPrediction
from fewstep.randomness import PerSample, Rng
from fewstep.sampling import (
    Colorization,
    Inpainting,
    Plan,
    Student,
    SuperResolution,
    edit,
    measured,
    slerp,
    stroke_to_image,
)
from fewstep.sampling.student_samplers import sample_student
from fewstep.schedules import TrigFlow

PLAN = Plan((1.5, 0.8))
KNOWN = Inpainting(torch.eye(8))
PICTURES = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def student(schedule=None, kind=torch.float32):
    """A conditional one with dropout, away from its neutral start, in training mode."""
    torch.manual_seed(0)
    net = UNet((1, 8, 8), (8, 8), 1, 16, classes=3, dropout=0.5)
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    schedule = TrigFlow() if schedule is None else schedule
    model = NetworkDenoiser(net.to(kind), schedule, TrigPrediction(), (1, 8, 8), 3)
    plan = PLAN if schedule == TrigFlow() else Plan((900.0, 500.0))
    return Student(Jump(model), {2: plan}).train()


def edited(reference=PICTURES, measurement=KNOWN, plan=PLAN, rng=None, kind=torch.float32, **options):
    return edit(student(kind=kind).flow_map, reference, measurement, plan, Rng(1) if rng is None else rng, **options)


def stroked(stroke=PICTURES, plan=PLAN, rng=None, kind=torch.float32, **options):
    return stroke_to_image(student(kind=kind).flow_map, stroke, plan, Rng(1) if rng is None else rng, **options)


def by_name(noise=PICTURES, sampler="lcm", steps=2, rng=None, kind=torch.float32, **options):
    model = student(DiscreteVP.linear(), kind)
    return sample_student(model, noise, sampler, steps, rng=Rng(1) if rng is None else rng, **options)


#: The three functions that are given states, and the name of these.
GIVEN = {"reference": edited, "stroke": stroked, "noise": by_name}


@pytest.mark.parametrize("value", WRONG)
@pytest.mark.parametrize("argument", ["n", "steps", "seeds", "generator", "cond"])
def test_a_student_samples_what_it_is_asked_for(argument, value):
    """Every argument, with values of another kind or out of range."""
    if argument != "cond" or value != "a dict":  # which some networks take
        assert argument in mistake(lambda: student().sample(**{"n": 2, argument: WRONG[value]}))


@pytest.mark.parametrize("name", GIVEN)
@pytest.mark.parametrize(
    ("value", "said"),
    [
        (PICTURES.long(), "of type torch.int64"), (PICTURES.bool(), "of type torch.bool"),
        (PICTURES + 1j, "of type torch.complex64"), (PICTURES / 0, "not finite"), (PICTURES[0], "does not fit"),
        (PICTURES[:, :, :7], "does not fit 3 samples"), (PICTURES[:0], "holds no samples"), (3, "holds no samples"),
        ("x", "of type|must be a tensor"), (None, "must be a tensor"),
    ],
    ids=["int", "bool", "complex", "inf", "one", "side", "none", "number", "word", "None"],
)  # fmt: skip
def test_states(name, value, said):
    answer = mistake(lambda: GIVEN[name](value))
    assert name in answer and re.search(said, answer)


@pytest.mark.parametrize("name", GIVEN)
@pytest.mark.parametrize(
    ("cond", "said"),
    [
        ([0, 1], "2 conditions for 3"), ([0, 1, 7], r"must lie in 0 \.\. 2"), ([0.0, 1.0, 2.0], "labels are whole"),
        (torch.tensor([True, False, True]), "labels are whole"), (2, "must be labels"),
    ],
    ids=["count", "range", "float", "bool", "number"],
)  # fmt: skip
def test_labels(name, cond, said):
    assert re.search(said, mistake(lambda: GIVEN[name](cond=cond)))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: edited(rng=7), r"rng=7 must be a source of noise"),
        (lambda: stroked(rng=7), r"rng=7 must be a source of noise"),
        (lambda: edited(rng=PerSample([Rng(0)])), "1 sources of noise for 3 samples"),
        (lambda: edited(bound=math.nan), "bound=nan"),
        (lambda: edited(bound="1"), "bound='1' must be a number"),
        (lambda: edited(plan=2), "plan=2 must be a Plan"),
        (lambda: stroked(plan=Plan((1.58,))), r"starts at 1\.58: it must be a noisy time"),
        (lambda: stroked(plan=Plan((0.0,))), r"starts at 0\.0: it must be a noisy time"),
        (lambda: edited(measurement=torch.eye(8)), "measurement is a Tensor: give a LinearMeasurement"),
        (lambda: edited(measurement=Inpainting(torch.eye(7))), r"known of shape \[7, 7\] for samples \[3, 1, 8, 8\]"),
        (lambda: edited(measurement=Inpainting(torch.ones(6, 1, 8, 8))), r"known of shape \[6, 1, 8, 8\]"),
        (lambda: Inpainting(torch.eye(8) / 2), "known must be 1 .* or 0"),
        (lambda: Inpainting(torch.full((8, 8), math.nan)), "known must be 1 .* or 0"),
        (lambda: Inpainting("x"), "known must be"),
        (lambda: SuperResolution(2.5), r"factor=2\.5 must be a whole number"),
        (lambda: SuperResolution(2).transform(torch.zeros(4, 4)), "multiples of it"),
        (lambda: Colorization((0, 0, 0)), "not all 0"),
        (lambda: Colorization((1.0, math.nan, 1.0)), "weights=nan"),
        (lambda: edit(student(), PICTURES, KNOWN, PLAN, Rng(0)), r"flow_map is a Student"),
        (lambda: sample_student(PICTURES, PICTURES, "lcm", 2), "student is a Tensor"),
        (lambda: by_name(steps=2.5), r"steps=2\.5 must be a whole number"),
        (lambda: by_name(original_steps=50.5), r"original_steps=50\.5 must be a whole number"),
        (lambda: by_name(sampler="tcd", eta=math.nan), "eta=nan"),
        (lambda: by_name(sampler="tcd", eta="x"), "eta='x' must be a number"),
        (lambda: slerp(PICTURES, PICTURES[:1], 0.5), r"of shape \[3, 1, 8, 8\] and \[1, 1, 8, 8\]"),
        (lambda: slerp(PICTURES, PICTURES, math.nan), r"u=\[nan, nan, nan\] must be finite"),
    ],
)  # fmt: skip
def test_mistakes(call, said):
    assert re.search(said, mistake(call))


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", GIVEN)
def test_samples_have_the_type_of_the_weights(name, kind):
    """Whatever type the states that are given have; and lists and arrays stand for tensors."""
    call = GIVEN[name]
    made = call(PICTURES.to(kind), kind=kind, cond=torch.tensor([2, 1, 0]))
    assert made.dtype == kind and bool(made.isfinite().all())
    other = call(PICTURES.to(kind).double().numpy(), kind=kind, cond=[2, 1, 0])
    assert torch.equal(call(PICTURES.to(kind).double(), kind=kind, cond=np.array([2, 1, 0])), made)
    assert torch.allclose(other, made, atol=1e-2 if kind == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("name", ["student", *GIVEN])
def test_dropout_is_off_and_comes_back(name):
    """Twice the same, though the module is in training mode and stays in it, but for the part that was not."""
    model = student(DiscreteVP.linear() if name == "noise" else None)
    net = model.flow_map.denoiser.net
    (off := next(iter(net.children()))).eval()

    def made():
        if name == "student":
            return model.sample(3, steps=2, seed=4)
        if name == "noise":
            return sample_student(model, PICTURES, "lcm", 2, rng=Rng(1))
        how = (PLAN, Rng(1))
        flow_map = model.flow_map
        return (
            edit(flow_map, PICTURES, KNOWN, *how) if name == "reference" else stroke_to_image(flow_map, PICTURES, *how)
        )

    assert torch.equal(made(), made())
    assert (
        net.training and not off.training and all(m.training for m in net.modules() if isinstance(m, torch.nn.Dropout))
    )


@pytest.mark.parametrize("name", GIVEN)
def test_a_sample_does_not_depend_on_the_others(name):
    """With one source of noise a sample (as ``seeds=`` of ``Student.sample`` makes them)."""
    call = GIVEN[name]
    three = call(rng=PerSample([Rng(k) for k in (3, 5, 7)]), cond=[2, 1, 0])
    alone = call(PICTURES[1:2], rng=PerSample([Rng(5)]), cond=[1])
    assert torch.allclose(three[1:2], alone, atol=1e-5)
    model = student()
    three = model.sample(3, [2, 1, 0], seeds=[3, 5, 7])
    assert torch.allclose(three[1:2], model.sample(1, [1], seeds=[5]), atol=1e-5)


def test_the_hook_keeps_the_type_of_the_state():
    """A reference in another type, and one that does not fit."""
    hook = measured(KNOWN, PICTURES.double()).output
    assert hook(0, PICTURES + 1, PICTURES, torch.ones(3)).dtype == torch.float32
    hook = measured(KNOWN, PICTURES[:2]).output
    assert "reference of shape" in mistake(lambda: hook(0, PICTURES, PICTURES, torch.ones(3)))


@pytest.mark.parametrize("make", [Jump, EDMConsistency])
@pytest.mark.parametrize("what", [lambda x: x[:1], lambda x: x.mean(1, keepdim=True), lambda x: None, lambda x: x + 1j])
def test_a_students_denoiser_that_returns_something_else(make, what):
    """What broadcasts to the state is no prediction of a student either."""
    made = Student(make(Wrong(what)), {1: Plan((80.0,))})
    assert mistake(lambda: made.sample(4)).startswith("the denoiser gave")


def test_a_flow_map_that_returns_something_else():
    class Short(Jump):
        def to_data(self, x, t, cond=None):
            return x[:1]

    made = Student(Short(student().flow_map.denoiser), {1: Plan((1.5,))})
    assert mistake(lambda: made.sample(4)).startswith("the student gave torch.float32 of shape [1, 1, 8, 8]")
