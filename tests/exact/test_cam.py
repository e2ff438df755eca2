"""Grad-CAM++: its weights in closed form, what a network that looks at one place shows, and every classifier's map."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.networks.cam import class_map, grad_cam_pp, last_map, on_grid
from fewstep.networks.classifier import Classifier
from fewstep.networks.classifiers import ConvNet, MLPClassifier, ResNet, ViT

SHAPE = (1, 8, 8)
NETS = {
    "convnet": lambda: ConvNet(SHAPE, 3, width=6, depth=2),
    "resnet": lambda: ResNet(SHAPE, 3, width=4),
    "vit": lambda: ViT(SHAPE, 3, patch=2, width=8, depth=1, heads=2),
    "classifier": lambda: Classifier(SHAPE, 3, (4, 4, 4), 8),
}


def pictures(n: int = 5) -> Tensor:
    return 2 * torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(0)) - 1


def made(name: str) -> Any:
    torch.manual_seed(0)
    return NETS[name]().eval()


def by_definition(maps: Tensor, slopes: Tensor) -> Tensor:
    """The paper's equations, written out for one picture ``[c, h, w]``."""
    found = torch.zeros(maps.shape[1:])
    for a, g in zip(maps, slopes, strict=True):
        alpha = g**2 / (2 * g**2 + g**3 * a.sum())
        found += (torch.where(g > 0, alpha, 0.0) * g.relu()).sum() * a
    return found.relu()


def test_it_is_the_papers_for_activations_of_a_relu() -> None:
    gen = torch.Generator().manual_seed(1)
    maps, slopes = torch.rand(4, 3, 5, 5, generator=gen), torch.randn(4, 3, 5, 5, generator=gen)
    found = grad_cam_pp(maps, slopes)
    for i in range(4):
        assert torch.allclose(found[i], by_definition(maps[i], slopes[i]), atol=1e-6)


def test_of_mean_pooling_a_channel_counts_in_closed_form() -> None:
    """A head on mean pooling has the slope ``w / hw`` everywhere: a channel counts ``w / (2 + w mean A)``, a channel
    that speaks against the class nothing."""
    maps = torch.rand(2, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    w = torch.tensor([3.0, -1.0])
    found = grad_cam_pp(maps, (w[:, None, None] / 16).expand_as(maps))
    expected = (3 / (2 + 3 * maps[:, 0].mean((1, 2))))[:, None, None] * maps[:, 0]
    assert torch.allclose(found, expected, atol=1e-6)


def test_where_nothing_speaks_for_the_class_the_map_is_0_and_no_nan() -> None:
    """Slopes of 0 everywhere; and a slope for which the paper's denominator is 0 but whose sign leaves it out."""
    assert bool((grad_cam_pp(torch.rand(1, 2, 3, 3), torch.zeros(1, 2, 3, 3)) == 0).all())
    assert bool((grad_cam_pp(torch.ones(1, 1, 2, 2), torch.full((1, 1, 2, 2), -0.5)) == 0).all())


def test_negative_activations_neither_break_nor_show() -> None:
    """They sum to -4 here, for which the paper's denominator would be 0."""
    maps = -torch.ones(1, 1, 2, 3)
    maps[0, 0, 0, 0] = 1
    found = grad_cam_pp(maps, torch.full_like(maps, 0.5))
    assert bool(found.isfinite().all()) and found.nonzero().tolist() == [[0, 0, 0]]


def test_the_map_is_where_the_channels_of_the_class_are_active() -> None:
    maps = torch.zeros(1, 2, 4, 4)
    maps[0, 0, 0, 0], maps[0, 1, 3, 2] = 5.0, 1.0
    slopes = torch.tensor([-1.0, 0.1])[:, None, None].expand(1, 2, 4, 4)
    assert grad_cam_pp(maps, slopes).nonzero().tolist() == [[0, 3, 2]]


@pytest.mark.parametrize("name", NETS)
def test_the_map_leads_to_the_networks_own_logits_and_is_one_a_picture(name: str) -> None:
    net, x = made(name), pictures()
    last, logits = last_map(net, x)
    assert torch.allclose(logits, net(x), atol=1e-6)
    assert torch.allclose(net.features(x), net.pooled(last), atol=1e-6)
    whole = class_map(net, x)
    assert whole.shape == (5, *last.shape[2:]) and float(whole.max()) > 0 and not whole.requires_grad
    with torch.no_grad():  # where nothing else wants a gradient, too
        alone = torch.cat([class_map(net.requires_grad_(False), one) for one in x.split(1)])
    assert torch.allclose(whole, alone, atol=1e-6)


def test_the_score_is_that_of_the_class_that_is_told() -> None:
    """Of different classes for different pictures."""
    net, x = made("convnet"), pictures(20)
    told = net(x).argmax(1)
    assert len(told.unique()) > 1
    last, logits = last_map(net, x)
    (slopes,) = torch.autograd.grad(logits[torch.arange(20), told].sum(), last)
    assert torch.allclose(class_map(net, x), grad_cam_pp(last, slopes), atol=1e-6)


def test_no_pixel_of_a_map_is_lost_on_a_coarser_grid() -> None:
    assert bool((on_grid(torch.eye(64).view(64, 8, 8), (4, 4)).sum((1, 2)) > 0).all())


def test_maps_on_a_grid_keep_their_mean_and_their_places() -> None:
    found = torch.zeros(1, 8, 8)
    found[0, 2:4, 6:8] = 1
    assert on_grid(found, (4, 4)).flatten().argmax() == 7
    assert torch.allclose(on_grid(torch.full((1, 3, 3), 2.0), (7, 5)), torch.full((1, 7, 5), 2.0))


def test_a_network_without_places_is_refused() -> None:
    for net in (MLPClassifier(SHAPE, 3), nn.Linear(3, 3)):
        with pytest.raises(ValueError, match="shows no map of places"):
            class_map(net, pictures())
