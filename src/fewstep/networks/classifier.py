"""The small classifier whose penultimate activations are the features of grey pictures."""

from __future__ import annotations

import json
from importlib import resources

from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from fewstep.networks.feature_nets import FeatureNet

BUNDLED = ("digits", "fashion")


class Classifier(FeatureNet):
    """Three times convolution, batch norm, ReLU, max-pooling; a layer of ``features`` ReLU units; ``classes`` logits.

    Takes pictures ``[B, C, H, W]`` in [-1, 1] with H and W at least 8.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        channels: tuple[int, int, int] = (32, 64, 96),
        features: int = 64,
    ) -> None:
        super().__init__()
        image, height, width = shape
        if min(height, width) < 8:
            raise ValueError(f"Classifier: pictures of at least 8x8 are needed, got {height}x{width}")
        self.shape = tuple(shape)
        self.config = {"shape": list(shape), "classes": classes, "channels": list(channels), "features": features}
        self.convolutions = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2))
                for i, o in zip((image, *channels[:-1]), channels, strict=True)
            )
        )
        self.penultimate = nn.Linear(channels[-1] * (height // 8) * (width // 8), features)
        self.head = nn.Linear(features, classes)

    def maps(self, pictures: Tensor) -> list[Tensor]:
        """The activations ``[B, c, h, w]`` after each of the three ReLUs."""
        x, found = pictures, []
        for block in self.convolutions.children():
            convolution, norm, relu, pool = block.children()
            found.append(relu(norm(convolution(x))))
            x = pool(found[-1])
        return found

    def features(self, x: Tensor) -> Tensor:
        """The penultimate activations ``[B, features]``, 0 or more."""
        return self.penultimate(self.convolutions(x).flatten(1)).relu()

    def pooled(self, last: Tensor) -> Tensor:
        """The penultimate activations ``[B, features]`` of the last map."""
        return self.penultimate(nn.functional.max_pool2d(last, 2).flatten(1)).relu()

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, classes]``."""
        return self.head(self.features(x))


def bundled_classifier(name: str) -> Classifier:
    """The frozen classifier of a bundled data set, one of :data:`BUNDLED`."""
    assets = resources.files("fewstep") / "assets"
    card = json.loads((assets / f"classifier-{name}.json").read_text())
    net = Classifier(**card["config"])
    net.load_state_dict(load_safetensors((assets / f"classifier-{name}.safetensors").read_bytes()))
    return net.requires_grad_(False).eval()
