"""Features from the same forward pass as the answer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fewstep.denoisers import Clipped, Denoiser, NetworkDenoiser, OnSchedule
from fewstep.guidance import Autoguided, Guided
from fewstep.methods.matching.dmd2 import DMD2
from fewstep.methods.matching.f_distill import FDistill
from fewstep.methods.start import Start
from fewstep.networks import MLP, UNet
from fewstep.networks.taps import feature_shapes, spread_layers, stops_at, tappable_layers, tapped
from fewstep.predictions import TrigPrediction
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

        def forward(self, x: torch.Tensor, t: torch.Tensor, cond: object = None) -> torch.Tensor:
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

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: object = None) -> torch.Tensor:
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
    with pytest.raises(ValueError, match="has no list of layers"):
        tappable_layers(twice)
    with pytest.raises(ValueError, match="made of 2"):
        tapped(Autoguided(teacher(), teacher(), 2.0), ("middle.2",), X, T, COND)


def test_a_network_without_features_is_told_so_in_one_line() -> None:
    """A network of somebody's own that only predicts: discriminators on its bottleneck are refused, those on its layers
    are not."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))

        def forward(self, x: torch.Tensor, t: torch.Tensor, cond: object = None) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    own = NetworkDenoiser(Own(), TrigFlow(), TrigPrediction(), (2,))
    for recipe in (DMD2(), FDistill()):
        with pytest.raises(ValueError, match="a Own says no features") as found:
            recipe.networks(Start(own))
        assert "\n" not in str(found.value)
    heads = FDistill(heads=2).networks(Start(own)).head
    assert heads.layers == spread_layers(own, 2) and not heads.stops
