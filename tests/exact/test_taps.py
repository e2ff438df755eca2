"""Features from the same forward pass as the answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.data.dataset import Dataset
from fewstep.denoisers import Clipped, Denoiser, NetworkDenoiser, OnSchedule
from fewstep.guidance import Autoguided, Guided
from fewstep.methods.consistency.ctm import ConsistencyTrajectory
from fewstep.methods.consistency.mlcm import SelfMatching
from fewstep.methods.consistency.pcm import PhasedConsistencyDistillation
from fewstep.methods.consistency.sana_sprint import SanaSprint
from fewstep.methods.consistency.scott import StochasticConsistencyDistillation
from fewstep.methods.consistency.tscd import SegmentedConsistency
from fewstep.methods.flow_maps.align_your_flow import AlignYourFlow
from fewstep.methods.matching.dmd2 import DMD2
from fewstep.methods.matching.f_distill import FDistill
from fewstep.methods.matching.ladd import LADD
from fewstep.methods.method import Batch, Progress, alone
from fewstep.methods.start import Start
from fewstep.networks import MLP, UNet
from fewstep.networks.inputs import with_inputs
from fewstep.networks.taps import bottleneck, feature_shapes, spread_layers, stops_at, tappable_layers, tapped
from fewstep.predictions import TrigPrediction
from fewstep.randomness import Rng
from fewstep.schedules import EDM, TrigFlow

SHAPE = (1, 8, 8)


def teacher(kind: str = "unet") -> NetworkDenoiser:
    torch.manual_seed(0)
    net = MLP(SHAPE, 16, 3, 3, extras=("s",)) if kind == "mlp" else UNet(SHAPE, (8, 16), 1, 32, 3)
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return NetworkDenoiser(net, TrigFlow(sigma_data=0.7), TrigPrediction(sigma_data=0.7), SHAPE, 3)


X, T, COND = torch.randn(4, *SHAPE), torch.full((4,), 0.8, dtype=torch.float64), torch.tensor([0, 1, 2, -1])


def test_the_answer_is_the_same_and_the_features_are_those_of_the_layer() -> None:
    """One call; the bottleneck is what the pass that stops there gives; a clipped view on another schedule too."""
    made = teacher()
    calls: list[int] = []
    made.net.register_forward_hook(lambda *_: calls.append(1))
    x0, (inside, last) = tapped(made, ("middle.2", "up.3"), X, T, COND)
    assert calls == [1]
    assert torch.equal(x0, made(X, T, COND)) and torch.equal(inside, made.features(X, T, COND))
    assert last.shape[0] == 4 and not made.net.middle[2]._forward_hooks
    view = OnSchedule(made, EDM())
    time = view.schedule.time_at(made.schedule.log_snr(T))
    clipped, (same,) = tapped(Clipped(view), ("middle.2",), X, time, COND)
    assert torch.equal(clipped, view(X, time, COND).clamp(-1, 1)) and torch.equal(same, view.features(X, time, COND))


def test_gradients_pass_through_features_to_the_state() -> None:
    x = X.clone().requires_grad_()
    made = teacher().requires_grad_(False)
    tapped(made, ("down.1",), x, T, COND)[1][0].square().sum().backward()
    assert x.grad is not None and float(x.grad.abs().max()) > 0


@pytest.mark.parametrize("kind", ["unet", "mlp"])
def test_layers_are_found_in_the_order_in_which_they_run(kind: str) -> None:
    """Those that hold the state, not those that embed the time or a condition."""
    made = teacher(kind)
    layers = tappable_layers(made)
    expected = ["blocks.0", "blocks.1", "blocks.2"]
    if kind == "unet":
        expected = [
            f"{name}.{i}" for name in ("down", "middle", "up") for i in range(len(made.net.get_submodule(name)))
        ]
    assert list(layers) == expected
    extras = {"s": torch.zeros(4)} if kind == "mlp" else {}
    _, features = tapped(made, list(layers), X, T, COND, **extras)
    assert [tuple(f.shape[1:]) for f in features] == list(layers.values()) == feature_shapes(made, list(layers))


def test_layers_are_spread_over_the_depth() -> None:
    """Of 20 layers about those that were published, 2, 8, 14 and 19; all of few."""

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(20))

        def forward(self, x: Tensor, t: Tensor, cond: object = None) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    deep = NetworkDenoiser(Deep(), TrigFlow(), TrigPrediction(), (2,))
    assert spread_layers(deep, 4) == tuple(f"blocks.{i}" for i in (2, 8, 13, 19))
    assert spread_layers(deep, 1) == ("blocks.19",) and len(spread_layers(deep, 50)) == 20


def test_a_pass_can_stop_at_the_bottleneck_of_a_network_with_features() -> None:
    """Not where it is one layer of several, not in what is made of several calls, not in networks without features or
    with further inputs."""
    made = teacher()
    assert stops_at(made, ("middle.2",)) and not stops_at(made, ("up.1",)) and not stops_at(made, ("middle.2", "up.1"))
    assert not any(stops_at(led, ("middle.2",)) for led in (Guided(made, 2.0), Autoguided(made, teacher(), 2.0)))
    assert not stops_at(teacher("mlp"), ("blocks.2",))
    assert not stops_at(NetworkDenoiser(Twice(), TrigFlow(), TrigPrediction(), (2,)), ("block",))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor, t: Tensor, cond: object = None) -> Tensor:
        return self.block(self.block(x))


def test_what_cannot_be_tapped_is_said() -> None:
    twice: Denoiser = NetworkDenoiser(Twice(), TrigFlow(), TrigPrediction(), (2,))
    x, t = torch.zeros(1, 2), torch.tensor([0.5], dtype=torch.float64)
    for layer, said in {
        "block": "gave features 2 times",
        "unused": "gave features 0 times",
        "up.9": "'up.9' is no layer of this Twice",
    }.items():
        with pytest.raises(ValueError, match=said):
            tapped(twice, (layer,), x, t)
    with pytest.raises(ValueError, match="no layer of this Twice gives features"):
        tappable_layers(twice)
    with pytest.raises(ValueError, match="made of 2"):
        tapped(Autoguided(teacher(), teacher(), 2.0), ("middle.2",), X, T, COND)


class Blocks(nn.Module):
    """A network of somebody's own, a list of layers, that only predicts."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))

    def forward(self, x: Tensor, t: Tensor, cond: object = None) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Squared(Blocks):
    """One that says features which none of its layers gives."""

    feature_shape = (2,)

    def features(self, x: Tensor, t: Tensor, cond: object = None) -> Tensor:
        found: Tensor = self.blocks[0](x).square()
        return found


class Hourglass(nn.Module):
    """Another one, without lists; its places are fewest in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.enter = nn.Linear(1, 4), nn.Conv2d(1, 4, 3, padding=1)
        self.shrink, self.grow = nn.Conv2d(4, 8, 2, 2), nn.ConvTranspose2d(8, 4, 2, 2)
        self.leave = nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor, t: Tensor, cond: object = None) -> Tensor:
        hidden = self.enter(x) + self.time(t[:, None].float())[:, :, None, None]
        return self.leave(self.grow(self.shrink(hidden).relu()))


def test_the_bottleneck_of_a_network_without_features_is_a_layer_of_the_fewest_places() -> None:
    blocks = NetworkDenoiser(Blocks(), TrigFlow(), TrigPrediction(), (2,))
    hourglass = NetworkDenoiser(Hourglass(), TrigFlow(), TrigPrediction(), SHAPE)
    assert tappable_layers(hourglass) == {
        "enter": (4, 8, 8), "shrink": (8, 4, 4), "grow": (4, 8, 8), "leave": (1, 8, 8)
    }  # fmt: skip
    assert (bottleneck(blocks), bottleneck(hourglass)) == ("blocks.1", "shrink")
    assert not stops_at(blocks, ("blocks.1",)) and not stops_at(hourglass, ("shrink",))
    view = Squared()
    with pytest.raises(ValueError, match="no layer's own, and cannot be had beside"):
        FDistill().networks(Start(NetworkDenoiser(view, TrigFlow(), TrigPrediction(), (2,))))
    game = DMD2().networks(Start(NetworkDenoiser(view, TrigFlow(), TrigPrediction(), (2,)))).discriminator
    assert game.layers == () and game.stops
    with pytest.raises(ValueError, match="a Blocks says no features: an energy distance needs"):
        blocks.features(torch.zeros(1, 2), 0.5)


@pytest.mark.parametrize(
    "method",
    [
        DMD2(), DMD2(discriminator="teacher"), FDistill(), FDistill(heads=2), LADD(pairs=0),
        SanaSprint(), StochasticConsistencyDistillation(), SelfMatching(),
        SegmentedConsistency(adversarial_weight=1.0), PhasedConsistencyDistillation(gan_share=1.0),
        ConsistencyTrajectory(gan_share=1.0), AlignYourFlow(gan_share=1.0),
    ],
    ids=lambda m: m.name,
)  # fmt: skip
def test_every_discriminator_works_on_a_network_without_features(method: Any) -> None:
    """Its gradient reaches its heads, and the student's comes through it."""
    torch.manual_seed(0)
    teacher, student = (NetworkDenoiser(Hourglass(), TrigFlow(), TrigPrediction(), SHAPE, 3) for _ in range(2))
    further = {"scott": ("w",), "sana-sprint": ("w",), "ctm": ("s",), "ayf": ("s", "w")}.get(method.name, ())
    student.net = with_inputs(student.net, further, site="time")
    nets = method.networks(Start(teacher, Dataset("points", X, COND.clamp_min(0)), given={"student": student}))
    reached = set()
    for step in range(6):
        batch = Batch(X, COND.clamp_min(0), Rng(0, step))
        for update in alone(method.updates(nets, batch, Progress(step, fraction=0.5))):
            update.loss.backward()
            reached |= {
                n.split(".")[0] for n, p in nets.named_parameters() if p.grad is not None and bool(p.grad.any())
            }
    assert {"student", "discriminator"} <= reached
