"""Guided distillation and Shortcut Models on real data: students of the bundled digits teacher, trained for seconds, in
float32."""

from __future__ import annotations

import pytest
import torch

from fewstep import api
from fewstep.data import load as load_data
from fewstep.methods.flow_maps.guided_distillation import GuidedDistillation
from fewstep.methods.flow_maps.shortcut import Shortcut
from fewstep.metrics import Evaluator, load_features
from fewstep.runs.course import run_recipe
from fewstep.sampling import Student, sample
from fewstep.training.budget import Budget
from fewstep.training.trainer import Settings

LABELS = torch.arange(250) % 10
#: The paper's weights 0, 1 and 3 as scales.
SCALES = (1.0, 2.0, 4.0)


@pytest.fixture(scope="module")
def teacher():
    return api.load("digits")


@pytest.fixture(scope="module")
def judge() -> Evaluator:
    return Evaluator(load_data("digits", "test"), load_data("digits"), load_features("digits"))


def trained(recipe, teacher, steps: int) -> Student:
    settings = Settings(Budget(steps), batch=64, precision="fp32")
    made = run_recipe(recipe, teacher, load_data("digits"), settings, show=False).model
    assert isinstance(made, Student)
    return made


def test_a_guided_student_follows_the_teacher_at_every_weight(teacher, judge) -> None:
    """In four calls at any weight its samples are nearer to the teacher's eight guided steps (sixteen calls) from the
    same noise at that weight than at another, and are recognized more often as the weight grows."""
    student = trained(GuidedDistillation(8, 4), teacher, 300)
    noise = torch.randn(250, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mine = [student(noise, LABELS, w=w) for w in SCALES]
    theirs = [
        sample(teacher, 250, solver="ddim", steps=8, grid="uniform", cond=LABELS, guidance=w, noise=noise)
        for w in SCALES
    ]
    gaps = torch.tensor([[float((x - y).abs().mean()) for y in theirs] for x in mine])
    assert gaps.argmin(1).tolist() == [0, 1, 2], gaps
    accuracy = [judge(x, LABELS).accuracy for x in mine]
    assert accuracy[0] > 0.9 and accuracy == sorted(accuracy), accuracy


def test_a_shortcut_student_beats_the_teacher_in_one_call(teacher, judge) -> None:
    """The teacher's one call is far away; the student's is nearer, and more calls are nearer still."""
    student = trained(Shortcut(), teacher, 300)
    one = judge(sample(teacher, 250, solver="ddim", steps=1, cond=LABELS), LABELS).frechet.value
    found = [judge(student.sample(250, LABELS, steps=k), LABELS).frechet.value for k in (1, 4)]
    assert found[1] < found[0] < 0.8 * one, (found, one)
