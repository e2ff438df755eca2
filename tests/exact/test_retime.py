"""Retiming: what a network is told, and that it learns to say the same."""

from __future__ import annotations

import pytest
import torch

from fewstep.data import Dataset
from fewstep.denoisers import Denoiser, NetworkDenoiser
from fewstep.discrete_vp import DiscreteVP
from fewstep.methods.consistency.scm import ContinuousConsistencyDistillation
from fewstep.methods.consistency.tbcm import TBCM
from fewstep.methods.flow_maps.align_your_flow import AlignYourFlow
from fewstep.methods.flow_maps.mdt_dist import MDTDist
from fewstep.methods.flow_maps.mean_flow import MeanFlowDistillation
from fewstep.methods.method import Method
from fewstep.methods.start import Start
from fewstep.methods.teachers.retime import Retime, check_time_input, time_slope
from fewstep.models.networks import build_named, describe_prediction
from fewstep.networks import MLP
from fewstep.predictions import ALL_PREDICTIONS, EDMPrediction, Eps, Prediction, Retimed, TrigPrediction, V, Velocity
from fewstep.predictions import retimed as told_the_angle
from fewstep.runs.course import run_recipe
from fewstep.schedules import EDM, FlowMatching, Schedule, TrigFlow, VPLinear
from fewstep.training.budget import Budget
from fewstep.training.settings import Settings

PUBLISHED = {
    "lr": ..., "sigma_data": 0.5, "noise_mean": ..., "noise_std": ..., "optimizer": dict.fromkeys(
        ("kind", "betas", "eps", "weight_decay", "clip", "warmup", "decay"), ...
    ),
}  # fmt: skip


def of(schedule: Schedule, prediction: Prediction) -> NetworkDenoiser:
    torch.manual_seed(0)
    net = MLP((3,), 32, 2)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.3 * torch.randn_like(p)
    return NetworkDenoiser(net, schedule, prediction, (3,))


@pytest.mark.parametrize(
    ("schedule", "prediction"),
    [(EDM(), EDMPrediction()), (DiscreteVP.scaled_linear(), Eps()), (FlowMatching(), Velocity(time_scale=1000.0))],
    ids=["edm", "a thousand steps", "1000 t"],
)  # fmt: skip
def test_a_fast_time_input_is_refused_and_the_angle_is_not(schedule: Schedule, prediction: Prediction) -> None:
    """The slope of what the network is told falls to that of the angle; the coefficients stay bit for bit."""
    fast = of(schedule, prediction)
    slow = NetworkDenoiser(fast.net, schedule, told_the_angle(prediction), (3,))
    assert time_slope(fast) > 35 and time_slope(slow) < 2.5
    with pytest.raises(ValueError, match="fewstep distill retime"):
        check_time_input(fast)
    check_time_input(slow)
    t = schedule.time_at(torch.linspace(-3, 3, 5, dtype=torch.float64))
    for own, other in zip(prediction.coefficients(schedule, t), slow.prediction.coefficients(schedule, t), strict=True):
        assert torch.equal(own, other)
    saved = describe_prediction(slow.prediction)
    assert build_named(ALL_PREDICTIONS, saved) == slow.prediction and saved["name"] == "retimed"


@pytest.mark.parametrize("schedule", [TrigFlow(), FlowMatching(), VPLinear()], ids=lambda s: type(s).__name__)
def test_smooth_time_inputs_pass(schedule: Schedule) -> None:
    check_time_input(of(schedule, TrigPrediction()))
    check_time_input(of(schedule, V()))
    assert told_the_angle(TrigPrediction()) == TrigPrediction()


def test_it_learns_what_the_teacher_says() -> None:
    """The error that the new time brings falls to a quarter in two seconds; the model is on the teacher's schedule."""
    teacher = of(EDM(), EDMPrediction())
    x = 0.5 * torch.randn(256, 3, generator=torch.Generator().manual_seed(1))
    data = Dataset("points", x)
    settings = Settings(Budget(400), batch=64, precision="fp32")
    made = run_recipe(Retime(lr=3e-3), teacher, data, settings, show=False).model
    assert isinstance(made.prediction, Retimed) and made.schedule == teacher.schedule
    t = EDM().time_at(torch.linspace(-2, 3, 256, dtype=torch.float64))
    x_t = EDM().add_noise(x, torch.randn(256, 3, generator=torch.Generator().manual_seed(2)), t)

    def gap(model: Denoiser) -> float:
        return float((model.raw(x_t, t) - teacher.raw(x_t, t)).norm() / teacher.raw(x_t, t).norm())

    fresh = NetworkDenoiser(teacher.net, EDM(), told_the_angle(EDMPrediction()), (3,))
    assert gap(fresh) > 0.1 and gap(made) < 0.25 * gap(fresh), (gap(fresh), gap(made))


PLAIN = {"guidance": 1.0, "guidance_low": 1.0, "guidance_high": 1.0}


@pytest.mark.parametrize(
    "method",
    [
        ContinuousConsistencyDistillation(),
        MeanFlowDistillation(),
        AlignYourFlow(**PLAIN),
        TBCM(guidances=(1.0,)),
        MDTDist(gap=0.0),
    ],
    ids=lambda method: method.name,
)
def test_methods_that_differentiate_time_say_what_they_need(method: Method) -> None:
    """A teacher that sees a logarithm is refused, naming the remedy; its retimed copy as the student is taken."""
    teacher = of(EDM(), EDMPrediction())
    with pytest.raises(ValueError, match="fewstep distill retime"):
        method.networks(Start(teacher))
    slow = NetworkDenoiser(teacher.net, EDM(), told_the_angle(EDMPrediction()), (3,))
    nets = method.networks(Start(teacher, given={"student": slow}))
    assert time_slope(nets.student.denoiser) < 2.5 and time_slope(nets.teacher) > 35


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"retime: the network \(TrigPrediction\) is told the angle already"):
        Retime().networks(Start(of(EDM(), TrigPrediction())))
    with pytest.raises(ValueError, match="of='score' is unknown"):
        Retimed(of="score")
