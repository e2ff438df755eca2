"""Small networks that classify pictures: an MLP, a plain and a residual convolutional network, a vision transformer.

All take pictures ``[B, C, H, W]`` in [-1, 1], give logits ``[B, classes]`` through a linear ``head`` that reads
``features`` ``[B, d]``, and show their ``maps`` at every level, the last one before pooling last.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from fewstep.networks.blocks import TokenBlock
from fewstep.networks.classifier import Classifier
from fewstep.networks.feature_nets import FeatureNet
from fewstep.ranges import Count
from fewstep.values import check_arguments

Norm = Literal["instance", "batch", "none"]


def norm_of(kind: Norm, channels: int) -> nn.Module:
    """A normalisation of pictures ``[B, channels, H, W]``."""
    if kind == "none":
        return nn.Identity()
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.GroupNorm(channels, channels)


class ClassifyingNet(FeatureNet):
    """A network of this file: features, a linear head, and the arguments that make it again."""

    head: nn.Linear
    shape: tuple[int, ...]
    config: dict[str, Any]

    @abstractmethod
    def pooled(self, last: Tensor) -> Tensor:
        """What the head reads ``[B, d]``, of the last map."""

    def features(self, x: Tensor) -> Tensor:
        """What the head reads, ``[B, d]``."""
        return self.pooled(self.maps(x)[-1])

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, classes]``."""
        return self.head(self.features(x))


class MLPClassifier(ClassifyingNet):
    """``depth`` hidden layers of ``width`` units on the flattened sample, which may have any shape."""

    def __init__(
        self,
        shape: tuple[int, ...],
        classes: int,
        width: Annotated[Count, "units of each hidden layer"] = 128,
        depth: Annotated[Count, "hidden layers"] = 1,
        activation: Annotated[Literal["relu", "tanh"], "what follows each of them"] = "relu",
    ) -> None:
        super().__init__()
        check_arguments(MLPClassifier, locals())
        self.shape = tuple(shape)
        self.config = {
            "shape": list(shape), "classes": classes, "width": width, "depth": depth, "activation": activation,
        }  # fmt: skip
        sizes = [int(torch.Size(shape).numel()), *([width] * depth)]
        made: Callable[[], nn.Module] = nn.ReLU if activation == "relu" else nn.Tanh
        self.hidden = nn.ModuleList(nn.Sequential(nn.Linear(i, o), made()) for i, o in pairwise(sizes))
        self.head = nn.Linear(width, classes)

    def maps(self, pictures: Tensor) -> list[Tensor]:
        x, found = pictures.flatten(1), []
        for layer in self.hidden:
            x = layer(x)
            found.append(x)
        return found

    def pooled(self, last: Tensor) -> Tensor:
        return last


class ConvNet(ClassifyingNet):
    """``depth`` times convolution, normalisation, ReLU and average pooling by two, as data distillation trains it."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        width: Annotated[Count, "channels"] = 32,
        depth: Annotated[Count, "blocks, each halving the picture"] = 2,
        norm: Annotated[Norm, "normalisation after each convolution"] = "instance",
    ) -> None:
        super().__init__()
        check_arguments(ConvNet, locals())
        channels, height, side = shape
        if min(height, side) < 2**depth:
            raise ValueError(f"ConvNet: depth={depth} halves pictures of {height}x{side} away: at most {fits(shape)}")
        self.shape = tuple(shape)
        self.config = {"shape": list(shape), "classes": classes, "width": width, "depth": depth, "norm": norm}
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, width, 3, padding=1), norm_of(norm, width), nn.ReLU())
            for i in (channels, *[width] * (depth - 1))
        )
        self.pool = nn.AvgPool2d(2)
        self.head = nn.Linear(width * (height // 2**depth) * (side // 2**depth), classes)

    def maps(self, pictures: Tensor) -> list[Tensor]:
        x, found = pictures, []
        for block in self.blocks:
            found.append(block(x))
            x = self.pool(found[-1])
        return found

    def pooled(self, last: Tensor) -> Tensor:
        return self.pool(last).flatten(1)


def fits(shape: tuple[int, ...]) -> int:
    """How often a picture can be halved."""
    return min(shape[1:]).bit_length() - 1


class Residual(nn.Module):
    """Two convolutions beside the identity, or beside a projection where the size changes."""

    def __init__(self, before: int, channels: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, channels, 3, stride, 1, bias=False), norm_of(norm, channels), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False), norm_of(norm, channels),
        )  # fmt: skip
        same = before == channels and stride == 1
        self.beside = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(before, channels, 1, stride, bias=False), norm_of(norm, channels))
        )

    def forward(self, x: Tensor) -> Tensor:
        return (self.body(x) + self.beside(x)).relu()


class ResNet(ClassifyingNet):
    """Three stages of residual blocks, ``depths`` of them, with 1, 2 and 4 times ``width`` channels; the last two
    stages halve the picture, and the head reads the mean over places."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        width: Annotated[Count, "channels of the first stage"] = 16,
        depths: Annotated[tuple[Count, ...], "blocks of the three stages"] = (1, 1, 1),
        norm: Annotated[Norm, "normalisation after each convolution"] = "batch",
    ) -> None:
        super().__init__()
        check_arguments(ResNet, locals())
        if len(depths) != 3:
            raise ValueError(f"ResNet: depths={','.join(map(str, depths))} must be the blocks of three stages")
        self.shape = tuple(shape)
        self.config = {
            "shape": list(shape), "classes": classes, "width": width, "depths": list(depths), "norm": norm,
        }  # fmt: skip
        self.stem = nn.Sequential(nn.Conv2d(shape[0], width, 3, 1, 1, bias=False), norm_of(norm, width), nn.ReLU())
        widths = (width, width, 2 * width, 4 * width)
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(
                    Residual(widths[s] if b == 0 else widths[s + 1], widths[s + 1], 2 if b == 0 and s else 1, norm)
                    for b in range(depth)
                )
            )
            for s, depth in enumerate(depths)
        )
        self.head = nn.Linear(4 * width, classes)

    def maps(self, pictures: Tensor) -> list[Tensor]:
        x, found = self.stem(pictures), []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return found

    def pooled(self, last: Tensor) -> Tensor:
        return last.mean((-2, -1))


class ViT(ClassifyingNet):
    """A vision transformer: patches as tokens with learned positions, pre-norm blocks, the mean token to the head."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        patch: Annotated[Count, "side of a patch, which must divide the picture"] = 4,
        width: Annotated[Count, "size of a token"] = 64,
        depth: Annotated[Count, "blocks"] = 3,
        heads: Annotated[Count, "heads of attention"] = 4,
    ) -> None:
        super().__init__()
        check_arguments(ViT, locals())
        channels, height, side = shape
        if height % patch or side % patch:
            raise ValueError(f"ViT: patch={patch} must divide pictures of {height}x{side}")
        self.shape = tuple(shape)
        self.config = {
            "shape": list(shape), "classes": classes, "patch": patch, "width": width, "depth": depth, "heads": heads,
        }  # fmt: skip
        self.embed = nn.Conv2d(channels, width, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (height // patch) * (side // patch), width))
        self.blocks = nn.ModuleList(TokenBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def maps(self, pictures: Tensor) -> list[Tensor]:
        grid = self.embed(pictures)
        x, found = grid.flatten(2).mT + self.positions, []
        for block in self.blocks:
            x = block(x)
            found.append(x.mT.reshape(grid.shape))
        return found

    def pooled(self, last: Tensor) -> Tensor:
        return self.norm(last.flatten(2).mT).mean(1)


CLASSIFIERS: dict[str, type[nn.Module]] = {
    "convnet": ConvNet, "mlp-classifier": MLPClassifier, "resnet": ResNet, "vit": ViT, "classifier": Classifier,
}  # fmt: skip
