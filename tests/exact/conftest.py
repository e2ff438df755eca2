"""What the tests of the ideas share: every schedule, and worlds to stand on them."""

import math

import pytest
import torch

from fewstep.discrete_vp import DiscreteVP
from fewstep.schedules import EDM, FlowMatching, Schedule, ShiftedFlow, TrigFlow, VPCosine, VPLinear

SCHEDULES: dict[str, Schedule] = {
    "vp-linear": VPLinear(),
    "vp-cosine": VPCosine(),
    "edm": EDM(),
    "flow": FlowMatching(),
    "shifted-flow": ShiftedFlow(),
    "trig": TrigFlow(),
    "trig-full": TrigFlow(t_max=math.pi / 2, sigma_data=1.0),
    "ddpm": DiscreteVP.linear(),
    "stable-diffusion": DiscreteVP.scaled_linear(),
    "ddpm-cosine": DiscreteVP.cosine(200),
}


@pytest.fixture(params=SCHEDULES)
def schedule(request: pytest.FixtureRequest) -> Schedule:
    return SCHEDULES[request.param]


@pytest.fixture(params=SCHEDULES)
def other(request: pytest.FixtureRequest) -> Schedule:
    """A second schedule, for properties of pairs."""
    return SCHEDULES[request.param]


@pytest.fixture
def gen() -> torch.Generator:
    return torch.Generator().manual_seed(0)
