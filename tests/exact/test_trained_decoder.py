"""A discriminator that trains low-rank weights in the decoder of its body."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fewstep.data.dataset import Dataset
from fewstep.denoisers import NetworkDenoiser
from fewstep.methods.consistency.hyper_sd import HyperSD
from fewstep.methods.consistency.scott import StochasticConsistencyDistillation
from fewstep.methods.consistency.tscd import SegmentedConsistency
from fewstep.methods.method import Batch, Progress, alone
from fewstep.methods.parts.trained_decoder import with_trained_decoder
from fewstep.methods.start import Start
from fewstep.networks import MLP, UNet
from fewstep.networks.lora import factors_in, moving
from fewstep.predictions import TrigPrediction
from fewstep.randomness import Rng
from fewstep.schedules import TrigFlow

SHAPE = (1, 8, 8)


def teacher(kind: str = "unet") -> NetworkDenoiser:
    torch.manual_seed(0)
    net: nn.Module = UNet(SHAPE, (8, 16), 1, 32, 3) if kind == "unet" else MLP(SHAPE, 8, 3, 3)
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return NetworkDenoiser(net, TrigFlow(sigma_data=0.7), TrigPrediction(sigma_data=0.7), SHAPE, 3)


def test_layers_behind_the_bottleneck_train_and_nothing_else() -> None:
    """The copy begins as the teacher, on its memory, and has factors in the decoder only."""
    model = teacher()
    body, last = with_trained_decoder(model, 2, 0)
    assert last == "up.4" and factors_in(body)
    assert all(name.startswith("net.up.") for name in factors_in(body))
    own = dict(model.named_parameters())
    shared = [n for n, p in body.named_parameters() if n in own and p.data_ptr() == own[n].data_ptr()]
    assert len(shared) == len(own)
    assert sum(p.numel() for p in moving(body)) < 0.3 * sum(p.numel() for p in model.parameters())
    x, t = torch.randn(2, *SHAPE), torch.full((2,), 0.5, dtype=torch.float64)
    assert torch.equal(body(x, t), model(x, t))


def test_where_the_bottleneck_is_the_last_layer_the_second_half_trains() -> None:
    body, last = with_trained_decoder(teacher("mlp"), 2, 0)
    assert last == "blocks.2" and {name.split(".")[2] for name in factors_in(body)} == {"1", "2"}
    with pytest.raises(ValueError, match=r"rank=9999: none of the layers blocks.1, blocks.2 is larger"):
        with_trained_decoder(teacher("mlp"), 9999, 0)


@pytest.mark.parametrize(
    "method",
    [
        StochasticConsistencyDistillation(gan_weight=1.0, discriminator_rank=2),
        SegmentedConsistency(adversarial_weight=1.0, discriminator_rank=2),
    ],
    ids=lambda m: m.name,
)
def test_each_side_moves_its_own_weights(method: Any) -> None:
    """The discriminator's update reaches its head and the factors, not the teacher's weights; the student's passes
    through them."""
    x, labels = torch.randn(8, *SHAPE), torch.arange(8) % 3
    nets = method.networks(Start(teacher(), Dataset("points", x, labels)))
    for held in factors_in(nets.body).values():
        nn.init.normal_(held.lora_B.weight)
    batch = Batch(x, labels, Rng(0))
    reached: dict[str, set[str]] = {}
    for update in alone(method.updates(nets, batch, Progress())):
        nets.zero_grad(set_to_none=True)
        update.loss.backward()
        found = {n for n, p in nets.named_parameters() if p.grad is not None and bool(p.grad.any())}
        reached[update.group] = found
    assert {name.split(".")[0] for name in reached["student"]} == {"student"}
    assert {name.split(".")[0] for name in reached["discriminator"]} == {"body", "discriminator"}
    assert all(".lora_" in name for name in reached["discriminator"] if name.startswith("body"))
    assert len([n for n in reached["discriminator"] if n.startswith("body")]) == 2 * len(factors_in(nets.body))


def test_scott_looks_at_one_place() -> None:
    with pytest.raises(ValueError, match=r"discriminator_rank=4 trains .* and layers=\('up.1',\) name others"):
        StochasticConsistencyDistillation(layers=("up.1",), discriminator_rank=4)


def test_the_stages_of_hyper_sd_have_it() -> None:
    ladder = [s.method for s in HyperSD(discriminator_rank=8).stages() if isinstance(s.method, SegmentedConsistency)]
    assert len(ladder) == 4 and all(method.discriminator_rank == 8 for method in ladder)
