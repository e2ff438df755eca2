"""Networks of somebody's own: drawn again, and in run folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fewstep as fs
from fewstep.classifiers import NetworkClassifier
from fewstep.cli import main
from fewstep.condense.pca import PCA
from fewstep.condense.supervised import Supervised
from fewstep.data.dataset import Dataset
from fewstep.models.networks import redrawn_network


def own() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5))


def test_every_layer_is_drawn_again_from_the_seed_alone() -> None:
    net, same = own(), own()
    net[1].running_mean.fill_(3.0)
    before = torch.random.get_rng_state()
    a, b, other = redrawn_network(net, 1, "x"), redrawn_network(same, 1, "x"), redrawn_network(net, 2, "x")
    assert torch.equal(torch.random.get_rng_state(), before)
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name]), name
    for name in ("0.weight", "4.weight"):
        assert not torch.equal(a.state_dict()[name], other.state_dict()[name])
        assert not torch.equal(a.state_dict()[name], net.state_dict()[name])
    assert not a.state_dict()["1.running_mean"].any() and net[1].running_mean.eq(3.0).all()


def test_weights_that_nothing_draws_are_refused() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    net[0].register_module("scale", nn.ParameterList([torch.ones(1)]))
    with pytest.raises(TypeError, match=r"its 0\.scale is a ParameterList"):
        redrawn_network(net, 0)


def test_a_set_is_chosen_by_somebody_s_own_network() -> None:
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(65) % 5
    data = Dataset("mine", torch.randn(65, 3, 16, 16, generator=rng).clamp(-1, 1), labels)
    made = fs.condense_data(PCA(2), data, "20steps", network=own(), batch=8, show=False)
    assert made.labels.bincount().tolist() == [2] * 5
    bare = Dataset("bare", data.x)
    with pytest.raises(ValueError, match="data 'bare' has no labels"):
        fs.condense_data(PCA(2), bare, "20steps", network=own(), show=False)


def test_tied_weights_are_checkpointed(tmp_path: Path) -> None:
    """A layer that comes twice, as in language models whose first and last weights are one: a run with a folder makes
    the weights that one without makes, and a second call finds them in the checkpoint."""
    layer = nn.Linear(8, 8)
    net = nn.Sequential(nn.Flatten(), nn.Linear(768, 8), layer, nn.ReLU(), layer, nn.Linear(8, 5))
    data = Dataset("mine", torch.randn(20, 3, 16, 16), torch.arange(20) % 5)
    model = NetworkClassifier(net, (3, 16, 16), 5)
    runs = [
        fs.distill(model, Supervised(), data, "3steps", batch=4, folder=folder, show=False)
        for folder in (None, tmp_path, tmp_path)
    ]
    for made in runs[1:]:
        assert made.net[2] is made.net[4]
        assert all(torch.equal(value, runs[0].state_dict()[name]) for name, value in made.state_dict().items())


def test_a_run_of_somebody_s_own_network_leaves_its_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where a model would be; the same call goes on with the run, and who asks for the model is told why not."""
    data, run = Dataset("mine", torch.randn(20, 3, 16, 16), torch.arange(20) % 5), tmp_path / "run"
    model = NetworkClassifier(own(), (3, 16, 16), 5)
    for _ in range(2):
        made = fs.distill(model, Supervised(), data, "2steps", batch=4, folder=run)
        kept = load_file(run / "model" / "model.safetensors")
        assert all(torch.equal(value, kept[name]) for name, value in made.state_dict().items())
        assert "weights alone, for load_state_dict" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="weights alone: build the network yourself"):
        fs.load(run)
    for command in (["evaluate", str(run)], ["report", str(run), "--out", str(tmp_path / "page.html")]):
        assert main(command) == 2
        assert "weights alone: build the network yourself" in capsys.readouterr().err
