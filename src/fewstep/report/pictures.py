"""Sheets of pictures as PNG bytes, written here: a page of pictures needs no imaging library.

Pictures are ``[B, C, H, W]`` in [-1, 1] with C = 1 or 3.  A sheet is scaled up by whole pixels (nearest neighbour), so
that a browser, whatever width it gives the sheet, only ever scales down and no pixel comes out wider than its
neighbour.
"""

from __future__ import annotations

import base64
import struct
import zlib

import torch
from torch import Tensor


def is_picture(shape: tuple[int, ...]) -> bool:
    """Whether samples of this shape can be shown: grey or RGB pictures."""
    return len(shape) == 3 and shape[0] in (1, 3)


def sheet(x: Tensor, columns: int, side: int = 112, gap: float = 0.06) -> bytes:
    """Pictures ``[B, C, H, W]`` row by row in ``columns`` columns, as a PNG with transparent gaps.

    ``side`` is about the width of one picture in pixels after scaling up, ``gap`` the space between two as a share of
    it.  Raises ValueError for samples that are not pictures.
    """
    if x.ndim != 4 or not is_picture(tuple(x.shape[1:])):
        raise ValueError(f"pictures of shape {list(x.shape)}: a sheet shows [B, 1 or 3, H, W]")
    n, channels, height, width = x.shape
    scale = max(1, round(side / width))
    space = max(1, round(gap * scale * width))
    rows = -(-n // columns)
    canvas = torch.zeros(
        rows * (scale * height + space) - space, columns * (scale * width + space) - space, channels + 1,
        dtype=torch.uint8,
    )  # fmt: skip
    levels = ((x.detach().cpu().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    large = levels.repeat_interleave(scale, 2).repeat_interleave(scale, 3).permute(0, 2, 3, 1)
    for i, picture in enumerate(large):
        top, left = (i // columns) * (scale * height + space), (i % columns) * (scale * width + space)
        place = canvas[top : top + scale * height, left : left + scale * width]
        place[..., :channels] = picture
        place[..., channels] = 255
    return png(canvas)


def png(pixels: Tensor) -> bytes:
    """``[H, W, channels]`` uint8 with 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGB, alpha) channels as a PNG file."""
    height, width, channels = pixels.shape
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    flat = pixels.reshape(height, width * channels)
    # filter "up" (byte 2, difference to the row above) makes the repeated rows of an enlarged picture rows of zeros
    above = torch.cat([torch.zeros_like(flat[:1]), flat[:-1]])
    filtered = torch.cat([torch.full((height, 1), 2, dtype=torch.uint8), flat - above], dim=1)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    body = zlib.compress(filtered.contiguous().numpy().tobytes(), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def data_uri(file: bytes) -> str:
    """A PNG file as the address of an inline picture."""
    return "data:image/png;base64," + base64.b64encode(file).decode()
