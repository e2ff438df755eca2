"""A residual MLP for points, flat vectors and small pictures."""

from __future__ import annotations

import math
from typing import Annotated

from torch import Tensor, nn

from fewstep.networks.inputs import Configured
from fewstep.networks.parts import Beside, Conditioning, Modulation, zeroed
from fewstep.ranges import Least, Multiple
from fewstep.values import check_arguments


class MLP(nn.Module, Configured):
    """``F(x, t, cond, **extras)`` on flattened samples.

    ``shape`` is the shape of one sample; ``blocks`` residual blocks of ``width`` features, modulated by time and
    label.  ``beside`` is how many channels a second sample has that is given with the state, ``[B, beside,
    *shape[1:]]``, or None for zeros (see :class:`Beside`).  ``features`` gives the hidden state after the last block
    ``[B, width]``, for discriminators.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        width: Annotated[int, Multiple(2), "size of the layers and of the conditioning"] = 256,
        blocks: Annotated[int, Least(0), "residual blocks"] = 3,
        classes: int | None = None,
        extras: tuple[str, ...] = (),
        beside: int = 0,
    ) -> None:
        super().__init__()
        check_arguments(MLP, locals())
        self.shape = tuple(shape)
        self.classes = classes
        self.config = {
            "shape": list(shape), "width": width, "blocks": blocks, "classes": classes, "extras": list(extras),
            "beside": beside,
        }  # fmt: skip
        size = math.prod(self.shape)
        self.conditioning = Conditioning(width, classes, tuple(extras))
        self.enter = nn.Linear(size, width)
        side = nn.Linear(beside * math.prod(self.shape[1:]), width, bias=False) if beside > 0 else None
        self.beside = Beside(beside, side)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.leave = zeroed(nn.Linear(width, size))
        self.feature_shape = (width,)

    def features(
        self, x: Tensor, t: Tensor, cond: Tensor | None = None, beside: Tensor | None = None, **extras: Tensor
    ) -> Tensor:
        emb = self.conditioning(t, cond, extras, x.dtype)
        hidden = self.beside(self.enter(x.flatten(1)), None if beside is None else beside.flatten(1))
        for block in self.blocks:
            hidden = block(hidden, emb)
        return hidden

    def forward(
        self, x: Tensor, t: Tensor, cond: Tensor | None = None, beside: Tensor | None = None, **extras: Tensor
    ) -> Tensor:
        return self.leave(nn.functional.silu(self.features(x, t, cond, beside, **extras))).reshape(x.shape)


class Block(nn.Module):
    """Normalise, modulate, two linear layers, add."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = Modulation(width, width)
        self.first = nn.Linear(width, width)
        self.second = zeroed(nn.Linear(width, width))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        hidden = self.first(self.modulation(self.norm(x), emb))
        return x + self.second(nn.functional.silu(hidden))
