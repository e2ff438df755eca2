"""A small U-Net that works on patches of two a side (space-to-depth), for pictures and voxels on a laptop."""

from __future__ import annotations

from itertools import islice
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from fewstep.networks.inputs import Configured
from fewstep.networks.parts import Beside, Conditioning, Dropout, GroupNorm, Modulation, zeroed
from fewstep.ranges import Count, Multiple, Share
from fewstep.values import check_arguments

Convolution = type[nn.Conv2d] | type[nn.Conv3d]

#: Positions up to which attention is written out.
WRITTEN_OUT = 128


class UNet(nn.Module, Configured):
    """``F(x, t, cond, **extras)`` for pictures ``[B, C, H, W]``; H and W must be divisible by ``2 ** levels``
    (:class:`UNet3d` is the same for voxels).

    The picture is first folded into 2x2 patches, which quarters the cost of every layer; then come
    ``len(channels)`` resolutions of ``blocks`` residual blocks each way, and self-attention at the lowest one.
    ``features`` gives the activations at the bottleneck ``[B, channels[-1], h, w]``, for discriminators.
    ``dropout`` acts inside the residual blocks; ``double_norm`` is sCM's conditioning (see :class:`Modulation`);
    ``beside`` is how many channels a second picture has that is given with the state (see :class:`Beside`).
    """

    sides: ClassVar[int] = 2
    called: ClassVar[tuple[str, str]] = ("a picture", "pictures [C, H, W]")
    convolution: ClassVar[Convolution] = nn.Conv2d
    layout: ClassVar[torch.memory_format] = torch.channels_last

    def __init__(
        self,
        shape: tuple[int, ...],
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
        name = type(self).__name__
        if len(shape) != 1 + self.sides:
            raise ValueError(f"{name}: samples of shape {list(shape)} are not {self.called[1]}; use an MLP")
        check_arguments(UNet, locals())
        image, *grid = shape
        fold = 2 ** len(channels)
        if any(side % fold for side in grid):
            size = "x".join(map(str, grid))
            raise ValueError(f"{name}: {self.called[0]} of {size} does not divide into {len(channels)} levels ({fold})")
        self.shape = tuple(shape)
        self.classes = classes
        self.config = {
            "shape": list(shape), "channels": list(channels), "blocks": blocks, "width": width, "classes": classes,
            "extras": list(extras), "dropout": dropout, "double_norm": double_norm,
            "beside": beside,
        }  # fmt: skip
        self.conditioning = Conditioning(width, classes, tuple(extras))

        conv, patch = self.convolution, 2**self.sides
        kind = (width, dropout, double_norm, conv)
        self.enter = conv(patch * image, channels[0], 3, padding=1)
        side_layer = conv(patch * beside, channels[0], 3, padding=1, bias=False) if beside > 0 else None
        self.beside = Beside(beside, side_layer)
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        skips = [channels[0]]
        here = channels[0]
        for level, c in enumerate(channels):
            if level:
                self.down.append(DOWNSAMPLE[conv](here, here, 3, stride=2, padding=1))
                skips.append(here)
            for _ in range(blocks):
                self.down.append(ResBlock(here, c, *kind))
                here = c
                skips.append(here)
        self.middle = nn.ModuleList([ResBlock(here, here, *kind), Attention(here, conv), ResBlock(here, here, *kind)])
        self.feature_shape = (here, *(side // fold for side in grid))
        for level, c in reversed(list(enumerate(channels))):
            for _ in range(blocks + 1):
                self.up.append(JoiningBlock(here + skips.pop(), c, *kind))
                here = c
            if level:
                self.up.append(Upsample(here, conv))
        self.leave_norm = GroupNorm(8, here)
        self.leave = zeroed(conv(here, patch * image, 3, padding=1))
        self.to(memory_format=self.layout)  # type: ignore[call-overload]

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
        return unfolded(out)


class UNet3d(UNet):
    """The U-Net for voxels ``[B, C, D, H, W]``, on patches of 2x2x2; each side must be divisible by ``2 ** levels``."""

    sides = 3
    called = ("a grid", "voxels [C, D, H, W]")
    convolution = nn.Conv3d
    layout = torch.channels_last_3d


def folded(x: Tensor) -> Tensor:
    """Patches of two a side as channels."""
    if x.ndim == 4:
        return nn.functional.pixel_unshuffle(x, 2).contiguous(memory_format=torch.channels_last)
    b, c, d, h, w = x.shape
    patches = x.reshape(b, c, d // 2, 2, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 7, 2, 4, 6)
    return patches.flatten(1, 4).contiguous(memory_format=torch.channels_last_3d)


def unfolded(x: Tensor) -> Tensor:
    """Channels as patches of two a side."""
    if x.ndim == 4:
        return nn.functional.pixel_shuffle(x, 2).contiguous()
    b, c, d, h, w = x.shape
    return (
        x.reshape(b, c // 8, 2, 2, 2, d, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, c // 8, 2 * d, 2 * h, 2 * w)
    )


class ResBlock(nn.Module):
    """Norm, convolution, modulated norm, convolution, add."""

    def __init__(self, i: int, o: int, width: int, dropout: float, double_norm: bool, conv: Convolution) -> None:
        super().__init__()
        self.norm_1 = GroupNorm(8, i)
        self.conv_1 = conv(i, o, 3, padding=1)
        self.norm_2 = GroupNorm(8, o, affine=False)
        self.modulation = Modulation(width, o, double_norm)
        self.dropout = Dropout(dropout)
        self.conv_2 = zeroed(conv(o, o, 3, padding=1))
        self.skip = conv(i, o, 1) if i != o else nn.Identity()

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
    """Single-head self-attention over positions.

    Over few positions it is written out, which is faster and has a derivative of every kind; over more it is PyTorch's
    own, to which a tangent's pass gives a forward-mode rule with memory linear in the positions.
    """

    def __init__(self, channels: int, conv: Convolution) -> None:
        super().__init__()
        self.norm = GroupNorm(8, channels)
        self.qkv = conv(channels, 3 * channels, 1)
        self.out = zeroed(conv(channels, channels, 1))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).chunk(3, dim=1)
        if q.shape[2] > WRITTEN_OUT:
            parts = (part.transpose(1, 2)[:, None] for part in (q, k, v))
            seen = nn.functional.scaled_dot_product_attention(*parts)[:, 0].transpose(1, 2)
        else:
            weights = torch.softmax(q.transpose(1, 2) @ k * q.shape[1] ** -0.5, dim=-1)
            seen = v @ weights.transpose(1, 2)
        return x + self.out(seen.reshape(x.shape))


class Downsample(nn.Conv2d):
    """A convolution with stride."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class Downsample3d(nn.Conv3d):
    """The same for voxels."""

    joins = False

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)


DOWNSAMPLE: dict[Convolution, type[nn.Module]] = {nn.Conv2d: Downsample, nn.Conv3d: Downsample3d}


class Upsample(nn.Module):
    """Nearest-neighbour doubling and a convolution."""

    joins = False

    def __init__(self, channels: int, conv: Convolution) -> None:
        super().__init__()
        self.conv = conv(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor, skip: None = None) -> Tensor:
        return self.conv(nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))
