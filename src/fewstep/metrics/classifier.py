"""The small classifier whose penultimate activations are the features of grey pictures."""

from __future__ import annotations

from torch import Tensor, nn


class Classifier(nn.Module):
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

    def features(self, x: Tensor) -> Tensor:
        """The penultimate activations ``[B, features]``, 0 or more."""
        return self.penultimate(self.convolutions(x).flatten(1)).relu()

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, classes]``."""
        return self.head(self.features(x))
