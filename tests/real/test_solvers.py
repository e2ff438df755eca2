"""The solvers on the bundled digits teacher, against 200 calls from the same starting points."""

import pytest
import torch

import fewstep as fs
from fewstep.metrics import load_features
from fewstep.metrics.classes import accuracy
from fewstep.sampling.search import Setting, noise_for, reference, solver_for, tried
from fewstep.schedules import VPLinear


@pytest.fixture(scope="module")
def teacher():
    return fs.load("digits")


@pytest.fixture(scope="module")
def target(teacher):
    cond = torch.arange(60) % 10
    return reference(teacher, noise_for(teacher, 60, 0), cond)


def error(teacher, target, solver, calls, grid="balanced:centre=1"):
    return tried(teacher, Setting(solver, grid, calls, calls), target).error


def test_deis_gets_better_with_its_degree(teacher, target):
    """Ten calls on the linear VP schedule's quadratic grid: tAB3 < tAB1 < DDIM, by a factor of two each time."""
    seen = teacher.on(VPLinear(t_min=1e-3))
    ends = reference(seen, target.noise, target.cond)
    first, second, third = (error(seen, ends, s, 10, "quadratic") for s in ("ddim", "deis-1", "deis"))
    assert third < second / 2 < first / 4


def test_second_order_solvers_beat_ddim_at_eight_calls(teacher, target):
    """By a factor of two at least, every one of them."""
    base = error(teacher, target, "ddim", 8)
    for solver in ("dpmpp-2m", "dpm-2m", "unipc", "deis-1", "ipndm", "dualfast"):
        assert error(teacher, target, solver, 8) < base / 2


def test_dualfast_helps_ddim_at_five_calls(teacher, target):
    """The mixed prediction on a real network, whose bias nobody chose."""
    assert error(teacher, target, "dualfast", 5) < error(teacher, target, "ddim", 5) / 2


def test_under_guidance_data_prediction_is_as_good_as_ddim(teacher):
    """Class-conditional, scale 4, 15 calls: 2M at most DDIM's error."""
    cond = torch.arange(60) % 10
    guided = reference(teacher, noise_for(teacher, 60, 1), cond, guidance=4.0)
    assert error(teacher, guided, "dpmpp-2m", 15) <= error(teacher, guided, "ddim", 15)


def test_the_default_centred_on_the_model_beats_unipc(teacher, target):
    """At 6, 10 and 15 calls at most .9, .75 and .6 of UniPC's error (measured: .77, .59, .43), and it is what
    solver_for gives for the model."""
    for calls, share in ((6, 0.9), (10, 0.75), (15, 0.6)):
        ours = tried(teacher, Setting("abm", None, calls, calls), target).error
        assert ours < error(teacher, target, "unipc", calls) * share
        assert tried(teacher, solver_for(calls, model=teacher), target).error == pytest.approx(ours, rel=1e-6)


def test_the_sde_solver_makes_digits(teacher):
    """Twenty steps of 2M SDE: the classifier of the metrics recognises nine of ten classes asked for."""
    x = fs.sample(teacher, 100, solver="dpmpp-2m-sde", steps=20, threshold="static")
    features = load_features("digits")
    assert accuracy(features.classify(features(x)), torch.arange(100) % 10) > 0.9
