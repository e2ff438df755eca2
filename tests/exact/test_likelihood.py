"""Likelihoods: the density of exact worlds, and of any network a density that sums to one."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.denoisers import NetworkDenoiser
from fewstep.exact import Gaussian, GaussianMixture, World
from fewstep.flow_maps import Jump
from fewstep.networks import MLP
from fewstep.predictions import Velocity
from fewstep.randomness import Rng
from fewstep.sampling import log_likelihood
from fewstep.schedules import EDM, FlowMatching, Schedule, TrigFlow

F64 = torch.float64
SCHEDULES = {
    "flow": FlowMatching(t_min=0.01),
    "clean": FlowMatching(),
    "trig": TrigFlow(t_max=math.pi / 2),
    "edm": EDM(t_max=200.0),
}


def gaussian(schedule: Schedule) -> Gaussian:
    return Gaussian(schedule, torch.zeros(2), torch.tensor([[0.5, 0.2], [0.2, 0.3]]))


def mixture(schedule: Schedule) -> GaussianMixture:
    """Three modes in the plane, their mean at 0, with two classes."""
    means = torch.tensor([[1.0, 0.0], [-1.0, 0.5], [0.0, -0.5]])
    covariances = torch.tensor([[[0.1, 0.05], [0.05, 0.2]], [[0.2, 0.0], [0.0, 0.1]], [[0.1, 0.0], [0.0, 0.1]]])
    return GaussianMixture(schedule, torch.ones(3), means, covariances, labels=[0, 0, 1])


@pytest.mark.parametrize("world", [gaussian, mixture])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_likelihood_is_the_density_of_the_world(name: str, world: Any) -> None:
    """To 1e-3 nats; the bits are those of the nats, less those that the width of the bins leaves out."""
    law: World = world(SCHEDULES[name])
    x = torch.cat([law.sample(12, Rng(0)), torch.tensor([[2.0, -2.0], [0.0, 0.0]], dtype=F64)])
    found = log_likelihood(law, x)
    expected = law.log_density(x, law.schedule.t_min)
    torch.testing.assert_close(found.nats, expected, rtol=0, atol=1e-3)
    assert found.dims == 2 and 50 < found.calls < 1000
    bits = found.bits_per_dim(1 / 128)
    torch.testing.assert_close(bits, -expected / (2 * math.log(2)) + 7, rtol=0, atol=1e-3)
    rough = log_likelihood(law, x, rtol=1e-2, atol=1e-2)
    assert rough.calls < found.calls


def test_conditions_are_told() -> None:
    """Of a class, of none, and of a label a sample."""
    law = mixture(FlowMatching())
    x, labels = law.sample(6, Rng(1)), torch.tensor([0, 1, 0, 1, -1, 0])
    found = log_likelihood(law, x, labels).nats
    torch.testing.assert_close(found, law.log_density(x, 0.0, labels), rtol=0, atol=1e-3)
    assert float((found - log_likelihood(law, x).nats).abs().max()) > 0.1


def test_random_signs_estimate_the_trace_without_bias() -> None:
    """Exact where the Jacobian is diagonal; elsewhere the mean of 400 estimates is within three standard errors, and
    the spread of several probes is smaller."""
    flat = Gaussian(FlowMatching(), torch.zeros(3), 0.25)
    x = flat.sample(4, Rng(2))
    one = log_likelihood(flat, x, probes=1, rng=Rng(0)).nats
    torch.testing.assert_close(one, flat.log_density(x, 0.0), rtol=0, atol=1e-3)
    law, point = gaussian(FlowMatching()), torch.tensor([[0.4, -0.3]], dtype=F64)
    many = point.expand(400, 2)
    estimates = log_likelihood(law, many, probes=1, rng=Rng(3)).nats
    gap, spread = float(estimates.mean() - law.log_density(point, 0.0)), float(estimates.std())
    assert spread > 0.1 and abs(gap) < 3 * spread / 20
    assert float(log_likelihood(law, many, probes=4, rng=Rng(3)).nats.std()) < 0.7 * spread
    again = log_likelihood(law, many, probes=1, rng=Rng(3)).nats
    assert torch.equal(again, estimates)


class Line(MLP):
    """A network on the line, with weights in float64, that is not smoothed out, and dropout."""

    def __init__(self) -> None:
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            super().__init__((1,), width=16, blocks=1)
            nn.init.normal_(self.leave.weight, std=0.4)
        self.leave: Any = nn.Sequential(nn.Dropout(0.5), self.leave)
        self.double()


@pytest.mark.parametrize("schedule", [FlowMatching(), EDM(t_max=20.0)], ids=["flow", "edm"])
def test_the_density_of_any_network_sums_to_one(schedule: Schedule) -> None:
    """Whatever a network says, its flow moves the prior's mass: on the line the densities of a fine grid sum to 1.  The
    same through a student of it; the network is as before."""
    denoiser = NetworkDenoiser(Line(), FlowMatching(), Velocity(), (1,)).on(schedule).train()
    x = torch.linspace(-8, 8, 1601, dtype=F64)[:, None]
    found = log_likelihood(denoiser, x, rtol=1e-4, atol=1e-4)
    assert float(found.nats.exp().sum() * 0.01) == pytest.approx(1, abs=1e-3)
    assert denoiser.training and all(p.requires_grad and p.grad is None for p in denoiser.parameters())
    few = x[700:900:20]
    student = log_likelihood(Jump(denoiser).instant(), few).nats
    torch.testing.assert_close(student, found.nats[700:900:20], rtol=0, atol=5e-3)


def test_single_precision_keeps_its_digits() -> None:
    """Weights in float32 are called in float32; the way is walked in float64."""
    line = Line()
    double = log_likelihood(NetworkDenoiser(line, FlowMatching(), Velocity(), (1,)), torch.zeros(3, 1, dtype=F64)).nats
    single = NetworkDenoiser(line.float(), FlowMatching(), Velocity(), (1,))
    found = log_likelihood(single, [[0.0], [0.0], [0.0]]).nats
    assert found.dtype == F64
    torch.testing.assert_close(found, double, rtol=0, atol=1e-3)


class Broken(Gaussian):
    def velocity(self, x: Tensor, t: Any, cond: Any = None, **extras: Tensor) -> Tensor:
        return super().velocity(x, t, cond) / 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"probes": 1}, "probes=1 are drawn: pass rng"),
        ({"probes": 0, "rng": Rng(0)}, "probes=0 must be at least 1"),
        ({"rtol": 0.0}, "rtol=0.0 must lie in"),
        ({"scales": (2.0, 1.0)}, "need 0 < smallest < largest"),
        ({"x": torch.zeros(1, 3)}, "x of shape"),
        ({"denoiser": Broken(FlowMatching(), torch.zeros(2), 1.0)}, "the likelihood is not finite"),
        ({"denoiser": Gaussian(FlowMatching(), torch.zeros(1025), 1.0), "x": torch.zeros(1, 1025)}, "give probes=1"),
    ],
)
def test_what_does_not_fit_is_refused(given: dict[str, Any], message: str) -> None:
    """In one line."""
    denoiser = given.pop("denoiser", gaussian(FlowMatching()))
    with pytest.raises(ValueError, match=message):
        log_likelihood(denoiser, given.pop("x", torch.zeros(1, 2, dtype=F64)), **given)
    with pytest.raises(ValueError, match="width=0 must lie in"):
        log_likelihood(gaussian(FlowMatching()), torch.zeros(1, 2, dtype=F64)).bits_per_dim(0)
