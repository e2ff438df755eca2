"""One U-Net for a picture at several resolutions, each conditioned on the picture one resolution below.

The published description (LowDiff, arXiv 2509.15342) says that the scales of one U-Net are shared and told apart by a
resolution embedding; how a stage enters, leaves and sees its condition is our reconstruction.
"""

from __future__ import annotations

import math
from itertools import islice, pairwise
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from fewstep.networks.lora import merged
from fewstep.networks.parts import Beside, GroupNorm, zeroed
from fewstep.networks.unet import UNet, folded
from fewstep.ranges import Count, Multiple, Share

#: The inputs that tell the stages apart and how noisy their condition is, embedded like any extra scalar.
RESOLUTION, AUGMENTATION = "resolution", "augmentation"


class CascadeUNet(UNet):
    """A :class:`UNet` that also works at lower resolutions; the height of the state says which stage is meant.

    ``resolutions`` are the heights of the stages, lowest first, ending with the picture's own, each a halving or more
    apart; by default half of the picture and the picture.  A stage enters the U-Net through a layer of its own at
    the level that has its size, uses only that level and those below, and leaves through a head of its own, so the
    highest stage *is* the plain U-Net.  How often the picture was halved is embedded beside the time.

    ``beside`` is the picture one resolution below, enlarged to the size of the state, for all stages but the lowest;
    ``augmentation`` ``[B]`` says how much noise lies on it (standard deviation; infinity is "no condition", and what
    ``beside`` then holds is not looked at).  Without ``beside`` there is no condition; with it, ``augmentation`` is 0
    unless given.  The layers of condition and embeddings start at zero.

    ValueError for resolutions that do not fit the levels, and for states of any other size.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        resolutions: Annotated[tuple[Count, ...], "heights to work at, lowest first (default: half and whole)"] = (),
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
    ) -> None:
        image, height = shape[0], shape[1] if len(shape) > 1 else 0
        resolutions = tuple(resolutions) or (height // 2, height)
        told = (RESOLUTION, AUGMENTATION, *extras)
        super().__init__(
            shape, channels, blocks, width, classes, told, dropout, double_norm, image if len(resolutions) > 1 else 0
        )
        check_resolutions(resolutions, height, len(channels))
        self.config = {
            "shape": list(shape), "resolutions": list(resolutions), "channels": list(channels), "blocks": blocks,
            "width": width, "classes": classes, "extras": list(extras), "dropout": dropout,
            "double_norm": double_norm,
        }  # fmt: skip
        self.resolutions, self.blocks, self.depth = resolutions, blocks, len(channels)
        self.levels = {r: round(math.log2(height / r)) for r in resolutions}
        self.stems, self.besides, self.heads = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        for k, r in enumerate(resolutions[:-1]):
            level = self.levels[r]
            first = channels[level - 1]  # what the level gets from above in a plain U-Net
            self.stems[str(r)] = nn.Conv2d(4 * image, first, 3, padding=1)
            if k:
                side = nn.Conv2d(4 * image, first, 3, padding=1, bias=False)
                self.besides[str(r)] = Beside(image, side)
            self.heads[str(r)] = nn.Sequential(
                GroupNorm(8, channels[level]), nn.SiLU(), zeroed(nn.Conv2d(channels[level], 4 * image, 3, padding=1))
            )
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @classmethod
    def from_unet(cls, net: UNet, resolutions: tuple[int, ...] = ()) -> CascadeUNet:
        """The cascade whose highest stage, without a condition, is ``net``, with its weights.

        ValueError for a U-Net that takes a second sample already.
        """
        config: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in net.config.items()}
        if config.pop("beside"):
            raise ValueError("from_unet: this U-Net takes a second sample already; a cascade needs that place itself")
        cascade = cls(resolutions=resolutions, **config)
        cascade.load_state_dict(merged(net).state_dict(), strict=False)
        return cascade.to(next(net.parameters()))

    def features(
        self, x: Tensor, t: Tensor, cond: Tensor | None = None, beside: Tensor | None = None, **extras: Tensor
    ) -> Tensor:
        return self.encode(x, *self.inputs(x, t, cond, beside, extras))[0]

    def forward(
        self, x: Tensor, t: Tensor, cond: Tensor | None = None, beside: Tensor | None = None, **extras: Tensor
    ) -> Tensor:
        emb, beside = self.inputs(x, t, cond, beside, extras)
        hidden, skips = self.encode(x, emb, beside)
        below = self.depth - 1 - self.level(x)  # levels: each has one block more than on the way down, and upsampling
        for layer in islice(self.up, below * (self.blocks + 2) + self.blocks + 1):
            hidden = layer(hidden, emb, skips.pop() if layer.joins else None)
        return nn.functional.pixel_shuffle(self.leave_stage(hidden, x), 2).contiguous()

    def encode(self, x: Tensor, emb: Tensor, beside: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        return self.descend(self.enter_stage(x, beside), emb, self.level(x) * (self.blocks + 1))

    def level(self, x: Tensor) -> int:
        """The level of the U-Net at which this state's stage begins."""
        height, side = x.shape[-2:]
        if height not in self.levels or side * self.shape[1] != height * self.shape[2]:
            raise ValueError(
                f"a state of {height}x{side} is none of this cascade's resolutions {list(self.resolutions)} (heights)"
            )
        return self.levels[height]

    def enter_stage(self, x: Tensor, beside: Tensor | None) -> Tensor:
        """The first hidden layer of the state's stage."""
        name = str(x.shape[-2])
        enter, side = (self.stems[name], self.besides) if self.level(x) else (self.enter, {name: self.beside})
        hidden = enter(folded(x))
        if beside is None:
            return hidden
        if name not in side:
            raise ValueError(f"the lowest stage, {name} pixels high, takes no picture beside the state")
        return side[name](hidden, folded(beside))

    def leave_stage(self, hidden: Tensor, x: Tensor) -> Tensor:
        """The output of the state's stage, in 2x2 patches."""
        if self.level(x):
            return self.heads[str(x.shape[-2])](hidden)
        return self.leave(nn.functional.silu(self.leave_norm(hidden)))

    def inputs(
        self, x: Tensor, t: Tensor, cond: Tensor | None, beside: Tensor | None, extras: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """The embedding of everything but the pictures, and the condition with zeros where there is none."""
        absent = math.inf if beside is None else 0.0
        noise = extras.pop(AUGMENTATION, torch.full(t.shape, absent, device=t.device))
        told = {
            **extras,
            RESOLUTION: torch.full(t.shape, float(self.level(x)), device=t.device),
            AUGMENTATION: 1 - 1 / (1 + noise),  # 0 for a clean condition, 1 for none
        }
        emb = self.conditioning(t, cond, told, x.dtype)
        if beside is None:
            return emb, None
        present = torch.isfinite(noise).reshape(-1, *(1,) * (x.ndim - 1))
        return emb, torch.where(present, beside, torch.zeros_like(beside))


def check_resolutions(resolutions: tuple[int, ...], height: int, levels: int) -> None:
    """ValueError unless these heights are stages of a U-Net of ``levels`` on pictures of ``height``."""
    halvings = [math.log2(height / r) if r > 0 else math.inf for r in resolutions]
    rising = all(a < b for a, b in pairwise(resolutions))
    if resolutions[-1] != height or not rising or any(h % 1 or h >= levels for h in halvings):
        fit = [height // 2**level for level in reversed(range(levels)) if height % 2**level == 0]
        raise ValueError(
            f"resolutions={list(resolutions)}: a U-Net of {levels} levels on pictures {height} high works at "
            f"{', '.join(map(str, fit))}; they rise and end with {height}"
        )
