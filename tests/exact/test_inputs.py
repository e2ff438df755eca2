"""New inputs in trained networks: they start as they were, and the new weights can be trained."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.denoisers import NetworkDenoiser
from fewstep.flow_maps import Jump
from fewstep.methods.start import Start
from fewstep.networks import MLP, CascadeUNet, UNet
from fewstep.networks.inputs import with_inputs
from fewstep.predictions import TrigPrediction
from fewstep.sampling.rollout import Plan, Student
from fewstep.schedules import TrigFlow

SHAPE = (1, 4, 4)


class Own(nn.Module):
    """Somebody's network, which embeds the time in ``clock``."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, 8))
        self.enter, self.leave = nn.Linear(16, 8), nn.Linear(8, 16)

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        hidden = torch.tanh(self.enter(x.flatten(1)) + self.clock(t[:, None].to(x)))
        return self.leave(hidden).reshape(x.shape)


def away(net: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.3 * torch.randn_like(p)
    return net


def denoiser(net: nn.Module) -> NetworkDenoiser:
    return NetworkDenoiser(net, TrigFlow(), TrigPrediction(), SHAPE)


CASES = {
    "mlp": (lambda: MLP(SHAPE, 16, 1), None), "unet": (lambda: UNet(SHAPE, (8,), 1, 16), None),
    "cascade": (lambda: CascadeUNet(SHAPE, (4,), (8,), 1, 16), None), "own": (Own, "clock"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_network_with_new_inputs_starts_as_it_was(name: str) -> None:
    """Bit for bit, whatever is put in, a second time too; a gradient reaches the new weights, and after one step the
    input counts."""
    make, site = CASES[name]
    net = away(make())
    x, t = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1)), torch.tensor([0.1, 0.7, 1.5])
    before = copy.deepcopy(net.state_dict())
    wider = with_inputs(net, ("s", "w"), site=site)
    wider = with_inputs(wider, ("w", "k"), site=site)
    given = {"s": t / 2, "w": torch.full_like(t, 3.0), "k": t}
    assert torch.equal(wider(x, t, None, **given), net(x, t))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    with pytest.raises(TypeError, match="extra inputs"):
        wider(x, t, None, s=t)
    loss = wider(x, t, None, **given).square().sum()
    new = [p for key, p in wider.named_parameters() if key.endswith(tuple(f".{name}.weight" for name in given))]
    assert len(new) == 3
    slopes = torch.autograd.grad(loss, new)
    assert all(float(slope.abs().max()) > 0 for slope in slopes)
    with torch.no_grad():
        for p, slope in zip(new, slopes, strict=True):
            p -= 1e-2 * slope
    for key in given:
        other = wider(x, t, None, **{**given, key: given[key] + 1})
        assert not torch.equal(other, wider(x, t, None, **given)), key


def test_times_count_in_units_of_their_size() -> None:
    """An input of a span of 1000 is embedded as one of a span of 1 at a thousandth of it."""
    net = away(Own())
    made = [with_inputs(net, {"s": span}, site="clock") for span in (1.0, 1000.0)]
    x, t = torch.randn(2, *SHAPE), torch.tensor([0.3, 0.6])
    for wider in made:
        nn.init.constant_(wider.further.projections["s"].weight, 0.01)
    assert torch.equal(made[0](x, t, s=t), made[1](x, t, s=1000 * t))
    assert not torch.equal(made[0](x, t, s=t), made[0](x, t, s=2 * t))


def test_what_cannot_be_widened_says_so() -> None:
    with pytest.raises(ValueError, match="a Own takes no further inputs: wrap it first"):
        with_inputs(Own(), ("s",))
    with pytest.raises(ValueError, match="site='nowhere': no linear layer"):
        with_inputs(Own(), ("s",), site="nowhere")
    with pytest.raises(ValueError, match="the student: a Own takes no further inputs"):
        Start(denoiser(Own())).network(extras=("s",))
    with pytest.raises(ValueError, match="takes no second sample"):
        with_inputs(with_inputs(Own(), ("s",), site="clock"), beside=1)


def test_a_student_of_two_times_goes_on_only_where_its_inputs_are_passed_on() -> None:
    """A student whose network takes the target time starts a training that gives it one, with its own weights."""
    made = Jump(Start(denoiser(away(MLP(SHAPE, 16, 1)))).network(extras=("s",)), two_times=True)
    student = Student(made, {1: Plan((TrigFlow().t_max,))})
    start = Start(denoiser(MLP(SHAPE, 16, 1)), given={"student": student})
    again = start.network("student", extras=("s",))
    assert again is not made.denoiser and again.net.extra_inputs == ("s",)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), made.parameters(), strict=True))
    with pytest.raises(ValueError, match="the student: a student of two times"):
        start.network("student")
