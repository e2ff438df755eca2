"""Networks that see a picture at several levels: what perceptual distances compare, and features are made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import singledispatch

from torch import Tensor, nn

from fewstep.networks.taps import once_each, tapping


class FeatureNet(nn.Module, ABC):
    """A network that sees pictures ``[B, C, H, W]`` in [-1, 1] at several levels."""

    @abstractmethod
    def maps(self, pictures: Tensor) -> list[Tensor]:
        """The activations ``[B, c, ...]`` at every level, channels first; differentiable in the pictures."""

    def weights(self) -> Sequence[Tensor] | None:
        """What the channels of every level count in a distance, ``[c]`` each; None where all count 1."""
        return None


class TappedLayers(FeatureNet):
    """Somebody's own network, seen at the layers of these names (``"features.8"``), in their order.

    ``prepare`` brings pictures in [-1, 1] to what the network takes (``metrics.features.imagenet_input``).  Layers give
    what :mod:`fewstep.networks.taps` reads: grids ``[B, C, ...]``, tokens ``[B, L, D]`` or vectors ``[B, D]``.
    ValueError for no layers, for one that the network has not, and in a call for one that it does not come through, or
    more than once.
    """

    def __init__(
        self, net: nn.Module, layers: Sequence[str], prepare: Callable[[Tensor], Tensor] = lambda x: x
    ) -> None:
        super().__init__()
        kind, known = type(net).__name__, dict(net.named_modules())
        if not layers:
            raise ValueError(f"a {kind} has no maps of its own: name the layers to compare at, or make it a FeatureNet")
        for name in layers:
            if name not in known:
                raise ValueError(f"'{name}' is no layer of this {kind}; it has {', '.join(filter(None, known))}")
        self.net, self.layers, self.prepare = net, tuple(layers), prepare

    def maps(self, pictures: Tensor) -> list[Tensor]:
        with tapping(self.net, self.layers) as seen:
            self.net(self.prepare(pictures))
        return [found.mT if found.ndim == 3 else found for found in once_each(seen)]


@singledispatch
def as_feature_net(net: nn.Module, layers: Sequence[str] = ()) -> FeatureNet:
    """Any network at ``layers``, and one with maps of its own as it is where none are named; ValueError as
    :class:`TappedLayers`."""
    return TappedLayers(net, layers)


@as_feature_net.register
def with_maps(net: FeatureNet, layers: Sequence[str] = ()) -> FeatureNet:
    """Of a network with maps."""
    return TappedLayers(net, layers) if layers else net
