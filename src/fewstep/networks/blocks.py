"""The block of a plain transformer, for tokens that all see each other."""

from __future__ import annotations

from torch import Tensor, nn

from fewstep.networks.attention import attend


class TokenBlock(nn.Module):
    """Attention, then two linear layers with a GELU between, each on normalised tokens ``[B, L, width]`` and added.

    ValueError for a width that the heads do not divide.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width} must be a multiple of heads={heads}")
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm(x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        x = x + self.mix(attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(x)
