"""A small U-Net that works on 2x2 patches (space-to-depth), for pictures on a laptop."""

from __future__ import annotations

from itertools import islice
from typing import Annotated

import torch
from torch import Tensor, nn

from fewstep.networks.attention import attend
from fewstep.networks.inputs import Configured
from fewstep.networks.parts import Beside, Conditioning, Dropout, GroupNorm, Modulation, zeroed
from fewstep.ranges import Count, Multiple, Share
from fewstep.values import check_arguments


class UNet(nn.Module, Configured):
    """``F(x, t, cond, **extras)`` for pictures ``[B, C, H, W]``; H and W must be divisible by ``2 ** levels``.

    The picture is first folded into 2x2 patches, which quarters the cost of every layer; then come
    ``len(channels)`` resolutions of ``blocks`` residual blocks each way, and self-attention at the lowest one.
    ``features`` gives the activations at the bottleneck ``[B, channels[-1], h, w]``, for discriminators.
    ``dropout`` acts inside the residual blocks; ``double_norm`` is sCM's conditioning (see :class:`Modulation`);
    ``beside`` is how many channels a second picture has that is given with the state (see :class:`Beside`).
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        channels: Annotated[tuple[Annotated[int, Multiple(8)], ...], "channels at each resolution"] = (
            48,
            96,
        ),
        blocks: Annotated[Count, "residual blocks at each resolution, each way"] = 2,
        width: Annotated[int, Multiple(2), "size of the conditioning"] = 128,
        classes: int | None = None,
        extras: tuple[str, ...] = (),
        dropout: Annotated[Share, "dropout inside the residual blocks"] = 0.0,
        double_norm: Annotated[bool, "normalize the conditioning's scale and shift too, as sCM does"] = False,
        beside: int = 0,
    ) -> None:
        super().__init__()
        if len(shape) != 3:
            raise ValueError(f"UNet: samples of shape {list(shape)} are not pictures [C, H, W]; use an MLP")
        check_arguments(UNet, locals())
        image, height, side = shape
        fold = 2 ** len(channels)
        if height % fold or side % fold:
            raise ValueError(f"UNet: a picture of {height}x{side} does not divide into {len(channels)} levels ({fold})")
        self.shape = tuple(shape)
        self.classes = classes
        self.config = {
            "shape": list(shape), "channels": list(channels), "blocks": blocks, "width": width, "classes": classes,
            "extras": list(extras), "dropout": dropout, "double_norm": double_norm,
            "beside": beside,
        }  # fmt: skip
        self.conditioning = Conditioning(width, classes, tuple(extras))

        kind = (width, dropout, double_norm)
        self.enter = nn.Conv2d(4 * image, channels[0], 3, padding=1)
        side_layer = nn.Conv2d(4 * beside, channels[0], 3, padding=1, bias=False) if beside > 0 else None
        self.beside = Beside(beside, side_layer)
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        skips = [channels[0]]
        here = channels[0]
        for level, c in enumerate(channels):
            if level:
                self.down.append(Downsample(here, here, 3, stride=2, padding=1))
                skips.append(here)
            for _ in range(blocks):
                self.down.append(ResBlock(here, c, *kind))
                here = c
                skips.append(here)
        self.middle = nn.ModuleList([ResBlock(here, here, *kind), Attention(here), ResBlock(here, here, *kind)])
        self.feature_shape = (here, height // fold, side // fold)
        for level, c in reversed(list(enumerate(channels))):
            for _ in range(blocks + 1):
                self.up.append(JoiningBlock(here + skips.pop(), c, *kind))
                here = c
            if level:
                self.up.append(Upsample(here))
        self.leave_norm = GroupNorm(8, here)
        self.leave = zeroed(nn.Conv2d(here, 4 * image, 3, padding=1))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def encode(self, x: Tensor, emb: Tensor, beside: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        hidden = self.beside(self.enter(folded(x)), None if beside is None else folded(beside))
        return self.descend(hidden, emb)

    def descend(self, hidden: Tensor, emb: Tensor, start: int = 0) -> tuple[Tensor, list[Tensor]]:
        """The bottleneck, and the states on the way there, from layer ``start`` of the way down on."""
        skips = [hidden]
        for layer in islice(self.down, start, None):
            hidden = layer(hidden, emb)
            skips.append(hidden)
        for layer in self.middle:
            hidden = layer(hidden, emb)
        return hidden, skips

    def features(
        self, x: Tensor, t: Tensor, cond: Tensor | None = None, beside: Tensor | None = None, **extras: Tensor
    ) -> Tensor:
        return self.encode(x, self.conditioning(t, cond, extras, x.dtype), beside)[0]

    def forward(
        self, x: Tensor, t: Tensor, cond: Tensor | None = None, beside: Tensor | None = None, **extras: Tensor
    ) -> Tensor:
        emb = self.conditioning(t, cond, extras, x.dtype)
        hidden, skips = self.encode(x, emb, beside)
        for layer in self.up:
            hidden = layer(hidden, emb, skips.pop() if layer.joins else None)
        out = self.leave(nn.functional.silu(self.leave_norm(hidden)))
        return nn.functional.pixel_shuffle(out, 2).contiguous()


def folded(x: Tensor) -> Tensor:
    """2x2 patches as channels."""
    return nn.functional.pixel_unshuffle(x, 2).contiguous(memory_format=torch.channels_last)


class ResBlock(nn.Module):
    """Norm, convolution, modulated norm, convolution, add."""

    def __init__(self, i: int, o: int, width: int, dropout: float, double_norm: bool) -> None:
        super().__init__()
        self.norm_1 = GroupNorm(8, i)
        self.conv_1 = nn.Conv2d(i, o, 3, padding=1)
        self.norm_2 = GroupNorm(8, o, affine=False)
        self.modulation = Modulation(width, o, double_norm)
        self.dropout = Dropout(dropout)
        self.conv_2 = zeroed(nn.Conv2d(o, o, 3, padding=1))
        self.skip = nn.Conv2d(i, o, 1) if i != o else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        hidden = self.conv_1(nn.functional.silu(self.norm_1(x)))
        hidden = nn.functional.silu(self.modulation(self.norm_2(hidden), emb))
        return self.skip(x) + self.conv_2(self.dropout(hidden))


class JoiningBlock(ResBlock):
    """A block of the way up, which takes the latest state of the way down with its own.

    It is handed that state and not the list of all: a sharded layer is called with a copy of every list it is given.
    """

    joins = True

    def forward(self, x: Tensor, emb: Tensor, skip: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(torch.cat([x, skip], dim=1), emb)


class Attention(nn.Module):
    """Single-head self-attention over positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = GroupNorm(8, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).chunk(3, dim=1)
        seen = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return x + self.out(seen.transpose(1, 2).reshape(x.shape))


class Downsample(nn.Conv2d):
    """A convolution with stride."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class Upsample(nn.Module):
    """Nearest-neighbour doubling and a convolution."""

    joins = False

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor, skip: None = None) -> Tensor:
        return self.conv(nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))
