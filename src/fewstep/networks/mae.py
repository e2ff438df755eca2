"""A small masked autoencoder (He et al. 2022, arXiv 2111.06377): patches of a picture from its other patches.

A transformer encodes the patches that are seen and only those; a smaller one, told where the others belong, predicts
them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewstep.networks.blocks import TokenBlock
from fewstep.randomness import Rng


class MaskedAutoencoder(nn.Module):
    """Predicts the dropped patches of pictures ``[B, C, H, W]`` in [-1, 1].

    Patches are ``patch`` pixels wide and high, numbered row by row, ``L`` of them.  The encoder has ``depth`` blocks of
    ``width`` features, the decoder half the width and one block.  ValueError for pictures that patches do not tile.
    """

    def __init__(
        self, shape: tuple[int, int, int], patch: int = 4, width: int = 64, depth: int = 3, heads: int = 4
    ) -> None:
        super().__init__()
        channels, height, across = shape
        if patch < 1 or height % patch or across % patch:
            raise ValueError(f"patch={patch} must divide the sides of pictures of {height}x{across}")
        if width % (2 * heads) or depth < 1:
            raise ValueError(f"width={width} must be a multiple of 2 x heads={heads}, and depth={depth} at least 1")
        self.config = {"shape": list(shape), "patch": patch, "width": width, "depth": depth, "heads": heads}
        self.patch, self.grid = patch, (height // patch, across // patch)
        self.length = self.grid[0] * self.grid[1]
        size, small = channels * patch * patch, width // 2
        self.enter = nn.Linear(size, width)
        self.place = nn.Parameter(0.02 * torch.randn(self.length, width))
        self.encoder = nn.Sequential(*(TokenBlock(width, heads) for _ in range(depth)), nn.LayerNorm(width))
        self.between = nn.Linear(width, small)
        self.unseen = nn.Parameter(0.02 * torch.randn(small))
        self.decoder_place = nn.Parameter(0.02 * torch.randn(self.length, small))
        self.decoder = nn.Sequential(TokenBlock(small, heads), nn.LayerNorm(small))
        self.leave = nn.Linear(small, size)

    def patches(self, pictures: Tensor) -> Tensor:
        """Pictures ``[B, C, H, W]`` as patches ``[B, L, C patch^2]``."""
        (rows, columns), p = self.grid, self.patch
        cut = pictures.unflatten(3, (columns, p)).unflatten(2, (rows, p))  # [B, C, rows, p, columns, p]
        return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def pictures(self, patches: Tensor) -> Tensor:
        """The pictures that :meth:`patches` cut."""
        (rows, columns), p = self.grid, self.patch
        cut = patches.unflatten(2, (-1, p, p)).unflatten(1, (rows, columns))  # [B, rows, columns, C, p, p]
        return cut.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)

    def forward(self, pictures: Tensor, dropped: Tensor) -> Tensor:
        """All patches ``[B, L, C patch^2]`` as predicted from those that are not ``dropped`` ``[B, L]``, as many in
        every picture."""
        seen = (~dropped).nonzero()[:, 1].view(len(pictures), -1)  # [B, L seen]
        tokens = self.enter(taken(self.patches(pictures), seen)) + self.place[seen]
        known = self.between(self.encoder(tokens))
        everywhere = self.unseen.to(known).expand(len(pictures), self.length, -1)
        hidden = everywhere.scatter(1, seen[..., None].expand_as(known), known)
        return self.leave(self.decoder(hidden + self.decoder_place))

    def loss(self, pictures: Tensor, dropped: Tensor) -> Tensor:
        """The mean squared error over the dropped patches."""
        error = (self(pictures, dropped) - self.patches(pictures)).square().mean(2)
        return error[dropped].mean()

    @torch.no_grad()
    def filled(self, pictures: Tensor, dropped: Tensor) -> Tensor:
        """The pictures with their dropped patches as predicted, in [-1, 1]; every other pixel is exactly as it was."""
        told = self.patches(pictures)
        if bool(dropped.any()):
            predicted = self(pictures.to(self.place.dtype), dropped).clamp(-1, 1).to(told)
            told = torch.where(dropped[..., None], predicted, told)
        return self.pictures(told)


def taken(tokens: Tensor, places: Tensor) -> Tensor:
    """The tokens ``[B, m, d]`` at ``places`` ``[B, m]`` of ``[B, L, d]``."""
    return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[2]))


def number_dropped(length: int, share: float) -> int:
    """How many of ``length`` patches are dropped, all but ``int(length (1 - share))``; ValueError where that is all."""
    dropped = length - int(length * (1 - share))
    if dropped >= length:
        raise ValueError(f"a share of {share:g} of {length} patches leaves none to see")
    return dropped


def random_drops(n: int, length: int, count: int, rng: Rng) -> Tensor:
    """``count`` of ``length`` patches of each of ``n`` pictures, at random: bool ``[n, length]``."""
    drawn = rng.uniform(n, length).argsort(1)[:, :count]
    return torch.zeros(n, length, dtype=torch.bool, device=drawn.device).scatter(1, drawn, True)


def least_important(importance: Tensor, count: int, rng: Rng) -> Tensor:
    """Where the ``count`` least numbers of every row of ``[n, L]`` are, of equal ones at random: bool ``[n, L]``."""
    order = rng.uniform(*importance.shape).argsort(1)
    ranked = order.gather(1, importance.gather(1, order).argsort(dim=1, stable=True))
    return torch.zeros_like(importance, dtype=torch.bool).scatter(1, ranked[:, :count], True)
