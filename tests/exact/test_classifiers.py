"""Classifiers, the statistics of their normalisation, and the small data sets that they learn from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from fewstep.classifiers import NetworkClassifier
from fewstep.data import Dataset
from fewstep.data.condensed import Condensed, to_pictures
from fewstep.hub import native
from fewstep.models import model_of
from fewstep.networks.classifiers import CLASSIFIERS, ConvNet, ResNet, ViT
from fewstep.networks.norms import batch_norm, batch_norms
from fewstep.randomness import Rng
from fewstep.runs.conditions import samples_of

SHAPE, CLASSES = (1, 8, 8), 4
X = Rng(0, "pictures").normal(6, *SHAPE)
ARGUMENTS = {"vit": {"patch": 2, "width": 8, "heads": 2}, "resnet": {"width": 4}}


def network(name: str) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return CLASSIFIERS[name](SHAPE, CLASSES, **ARGUMENTS.get(name, {})).eval()


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_features_are_what_the_head_reads(name: str) -> None:
    """Of any network: by its own function, and by what its last linear layer is given."""
    model = NetworkClassifier(network(name), SHAPE, CLASSES)
    features, logits = model.read(X)
    assert torch.equal(features, model.net.features(X))  # type: ignore[operator]
    assert torch.equal(model.head(features), logits)
    assert logits.shape == (6, CLASSES)
    assert torch.equal(model.features(X), features)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_is_saved_and_opened(name: str, tmp_path: Path) -> None:
    model = NetworkClassifier(network(name), SHAPE, CLASSES)
    native.save(model, tmp_path)
    assert torch.equal(native.load(tmp_path)(X), model(X))
    assert model_of(model).task == "classification"
    with pytest.raises(ValueError, match="makes no samples"):
        model_of(model).sample(2)


def test_the_networks_are_the_ones_described() -> None:
    """ConvNet halves by pooling, ResNet by strides at its last two stages, ViT reads patches."""
    assert [tuple(m.shape[1:]) for m in ConvNet(SHAPE, CLASSES, 5, 2).maps(X)] == [(5, 8, 8), (5, 4, 4)]
    assert [tuple(m.shape[1:]) for m in ResNet(SHAPE, CLASSES, 4, (1, 2, 1)).maps(X)] == [
        (4, 8, 8), (8, 4, 4), (16, 2, 2),
    ]  # fmt: skip
    assert [tuple(m.shape[1:]) for m in ViT(SHAPE, CLASSES, 2, 8, 2, 2).maps(X)] == [(8, 4, 4), (8, 4, 4)]
    with pytest.raises(ValueError, match="at most 3"):
        ConvNet(SHAPE, CLASSES, depth=4)
    with pytest.raises(ValueError, match="patch=3"):
        ViT(SHAPE, CLASSES, patch=3)
    with pytest.raises(ValueError, match="three stages"):
        ResNet(SHAPE, CLASSES, depths=(1, 1))


def test_statistics_by_name() -> None:
    """ "batch" is what train mode computes, without moving the running statistics or waking dropout; "halves" are two
    batches; "running" is evaluation whatever the mode."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).eval()
    layer = batch_norms(net)[0]
    with torch.no_grad():
        layer.running_mean.fill_(0.3)  # type: ignore[union-attr]
        layer.weight.fill_(1.7)
    plain, before = net(X), {k: v.clone() for k, v in net.state_dict().items()}
    with batch_norm(net, "batch"):
        batch = net(X)
    with batch_norm(net, "halves"):
        halves = net(X)
        with pytest.raises(ValueError, match="no two halves"):
            net(X[:3])
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert torch.equal(net(X), plain)
    hidden = net[1](X.flatten(1))
    normal = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + layer.eps).sqrt()
    assert torch.allclose(batch, net[4](1.7 * normal), atol=1e-5)
    with batch_norm(net, "batch"):
        assert torch.equal(halves, torch.cat([net(X[:3]), net(X[3:])]))
    net[2].train()
    with batch_norm(net, "running"):
        assert torch.equal(net(X), plain)
    assert not torch.equal(batch, plain)


def small() -> Condensed:
    pictures = to_pictures(X)
    soft = Rng(0, "soft").normal(6, CLASSES).half()
    return Condensed(pictures, torch.arange(6) % CLASSES, tuple("abcd"), views="cells:2", notes={"logits": soft})


def test_a_condensed_set_knows_its_bytes_and_comes_back(tmp_path: Path) -> None:
    """A byte a pixel, one a label, two a soft label of half precision; saved, opened, and trained on by its path."""
    made = small()
    assert made.bytes() == 6 * 64 + 6 + 6 * CLASSES * 2
    native.save(made, tmp_path / "model")
    opened = native.load(tmp_path / "model")
    assert all(torch.equal(value, made.state_dict()[key]) for key, value in opened.state_dict().items())
    assert (str(opened.views), opened.class_names, opened.classes) == ("cells:2", tuple("abcd"), CLASSES)
    data = samples_of(tmp_path)
    assert data.shape == SHAPE
    assert torch.equal(data.rows(slice(None)).columns["logits"], made.notes["logits"])
    assert Condensed(made.x, made.labels, stored=123).bytes() == 123
    assert native.kind(tmp_path / "model") == "condensed"


def test_a_damaged_description_takes_no_memory(tmp_path: Path) -> None:
    """A file that claims pictures which it has not is refused before they are made room for."""
    native.save(small(), tmp_path)
    config = tmp_path / "config.json"
    told = json.loads(config.read_text())
    told["model"]["tensors"]["x"]["shape"] = [6, 1, 1 << 20, 1 << 20]
    config.write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"tensor 'x' is of shape"):
        native.load(tmp_path)


def test_wrong_condensed_sets() -> None:
    with pytest.raises(ValueError, match="whole labels"):
        Condensed(X, torch.zeros(6))
    with pytest.raises(ValueError, match="one word"):
        Condensed(X, torch.zeros(6).long(), notes={"a b": X})


def test_what_a_classifier_accepts() -> None:
    kind = model_of(NetworkClassifier(network("convnet"), SHAPE, CLASSES))
    labels = torch.arange(6) % CLASSES
    assert kind.accepts(Dataset("fits", X, labels)).name == "fits"
    for data, said in (
        (Dataset("other", X[:, :, :4], labels), "reads"),
        (Dataset("bare", X), "no labels"),
        (Dataset("many", X, labels + 1), "5 classes"),
    ):
        with pytest.raises(ValueError, match=said):
            kind.accepts(data)


def test_levels_of_pictures() -> None:
    """Rounded, clipped, and what is uint8 stays: the round trip through floats is exact."""
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    back = Dataset("levels", levels).read(slice(None))
    assert torch.equal(to_pictures(back), levels)
    assert to_pictures(torch.tensor([[-2.0, 2.0]])).tolist() == [[0, 255]]
    assert to_pictures(levels) is levels
