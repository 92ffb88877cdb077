"""Conversions of images: to 8 bits, to a size that fits, and to PNG bytes without any library.

Letters: `n` images, `C H W` image.
"""

from __future__ import annotations

import struct
import zlib
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["Pixels", "fit", "pixels", "png_bytes", "tile_size"]

Pixels: TypeAlias = npt.NDArray[np.uint8]


def pixels(images: npt.NDArray[np.float32]) -> Pixels:
    """Convert images `(n, C, H, W)` in [0, 1] to 8 bits, `(n, H, W, C)`; values outside are clipped."""
    eight_bits: Pixels = (images.clip(0, 1) * 255).round().astype(np.uint8).transpose(0, 2, 3, 1)
    return eight_bits


def tile_size(height: int, width: int, target: int) -> tuple[int, int]:
    """Return height and width after `fit`.

    Examples:
        >>> tile_size(28, 28, 60), tile_size(96, 64, 60)
        ((56, 56), (48, 32))
    """
    longest = max(height, width)
    if longest <= target:
        return height * (target // longest), width * (target // longest)
    block = -(-longest // target)
    return -(-height // block), -(-width // block)


def fit(images: Pixels, target: int) -> Pixels:
    """Scale images `(n, H, W, C)` close to, and not above, `target` pixels on the longer side.

    The factor is a whole number, so that all pixels of an image are equally large. Pixels of small images are
    repeated; pixels of large images are averaged over blocks.
    """
    height, width = images.shape[1:3]
    longest = max(height, width)
    if longest <= target:
        factor = target // longest
        return images.repeat(factor, 1).repeat(factor, 2)
    block = -(-longest // target)
    down, across = -height % block, -width % block
    padded = np.pad(images, ((0, 0), (0, down), (0, across), (0, 0)), mode="edge").astype(np.float64)
    n, tall, wide, channels = padded.shape
    blocks = padded.reshape(n, tall // block, block, wide // block, block, channels)
    averaged: Pixels = blocks.mean((2, 4)).round().astype(np.uint8)
    return averaged


def png_bytes(image: Pixels) -> bytes:
    """Encode one image `(H, W, C)` as a PNG file, `C` 1 (grey) or 3 (colour); the same image gives the same bytes.

    Source: PNG (Third Edition), W3C Recommendation 2025, sections 5 and 11.
    """
    height, width, channels = image.shape
    header = struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2}[channels], 0, 0, 0)
    lines = np.zeros((height, 1 + width * channels), np.uint8)  # each line begins with its filter, 0: none
    lines[:, 1:] = image.reshape(height, -1)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b"")]
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
