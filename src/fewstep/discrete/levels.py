"""Pictures of a few grey levels as symbols, and how far generated ones are from real ones.

The bundled digits have 17 levels, so five bits and 32 codes, of which 15 belong to no level: how many of them a model
makes is a sharp measure of how well it models bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.discrete.bits import INVALID


def to_levels(pictures: Tensor, values: int = 17) -> Tensor:
    """uint8 pictures ``[N, 1, H, W]`` as int64 levels ``[N, H, W]`` in ``0 .. values - 1``, the nearest ones.

    ValueError for pictures that are not uint8 with one channel.
    """
    if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1] != 1:
        raise ValueError(f"levels are those of grey uint8 pictures [N, 1, H, W], got {_kind(pictures)}")
    if not 2 <= values <= 256:
        raise ValueError(f"values={values} must lie in 2 .. 256")
    return (pictures[:, 0].long() * (values - 1) + 127) // 255


def to_pictures(levels: Tensor, values: int = 17) -> Tensor:
    """Levels ``[N, H, W]`` as float32 pictures ``[N, 1, H, W]`` in [-1, 1]; ValueError for invalid ones, which
    :meth:`~fewstep.discrete.bits.Encoding.nearest` repairs."""
    if bool((levels == INVALID).any()):
        raise ValueError(f"{int((levels == INVALID).sum())} pixels have no level: decode them with nearest()")
    return (2 * levels.float() / (values - 1) - 1)[:, None]


def invalid_fraction(symbols: Tensor) -> float:
    """The share of symbols that belong to no value."""
    return float((symbols == INVALID).double().mean())


def histogram_distance(made: Tensor, real: Tensor, values: int = 17) -> float:
    """The total variation distance between the laws of a symbol in made and in real samples ``[N, ...]``, averaged over
    the places: 0 for equal histograms, 1 for disjoint ones.  Invalid symbols are a value of their own."""
    if made.shape[1:] != real.shape[1:]:
        raise ValueError(f"samples {list(made.shape[1:])} against real ones {list(real.shape[1:])}: need equal shapes")
    ours, theirs = (histograms(symbols, values) for symbols in (made, real))
    return float((ours - theirs).abs().sum(1).mean() / 2)


def histograms(symbols: Tensor, values: int = 17) -> Tensor:
    """The share of every value at every place, ``[places, values + 1]``, invalid symbols last."""
    flat = torch.where(symbols == INVALID, values, symbols).flatten(1)
    return torch.nn.functional.one_hot(flat, values + 1).double().mean(0)


def _kind(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
