"""Geometry of convolutions: sizes of maps, and the weights that join pixels of input and output."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["check_map", "geometry", "map_size", "touches_of", "transposed_map_size"]


def geometry(module: nn.Conv2d | nn.ConvTranspose2d) -> dict[str, Any]:
    """Return kernel, padding, stride and dilation as arguments of `F.unfold` and `F.fold`."""
    return {
        "kernel_size": module.kernel_size,
        "padding": module.padding,
        "stride": module.stride,
        "dilation": module.dilation,
    }


def check_map(module: nn.Conv2d | nn.ConvTranspose2d, shape: torch.Size, out: tuple[int, ...]) -> None:
    """Raise ValueError unless the layer accepts maps of `shape`; `out` is the size of its result."""
    if len(shape) != 4 or shape[1] != module.in_channels or min(out) < 1:
        raise ValueError(
            f"expected rows of shape ({module.in_channels}, height, width), no smaller than the kernel, for "
            f"{module}; found {tuple(shape[1:])}"
        )


def map_size(module: nn.Conv2d, shape: torch.Size) -> tuple[int, ...]:
    """Return height and width of a convolution's output.

    Raises:
        ValueError: if the convolution does not accept maps of this shape.
    """
    padding: Any = module.padding  # never a string here, see `step_of`
    axes = zip(shape[2:], module.kernel_size, padding, module.stride, module.dilation, strict=False)
    out = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, p, s, d in axes)
    check_map(module, shape, out)
    return out


def transposed_map_size(module: nn.ConvTranspose2d, shape: torch.Size) -> tuple[int, ...]:
    """Return height and width of a transposed convolution's output.

    Raises:
        ValueError: if the convolution does not accept maps of this shape.
    """
    padding: Any = module.padding
    extra: Any = module.output_padding
    axes = zip(shape[2:], module.kernel_size, padding, module.stride, module.dilation, extra, strict=False)
    out = tuple((n - 1) * s - 2 * p + d * (k - 1) + e + 1 for n, k, p, s, d, e in axes)
    check_map(module, shape, out)
    return out


def touches_of(module: nn.Conv2d, size: tuple[int, ...], out: tuple[int, ...]) -> Tensor | None:
    """Return 0/1 `(out positions, in positions, kernel elements)`, 1 where a weight joins the two pixels.

    The result is None for a map on which unfolding patches costs less than a matmul with every pixel.
    """
    if math.prod(size) > 2 * math.prod(module.kernel_size):
        return None
    padding: Any = module.padding
    table = _touches if torch.compiler.is_compiling() else _kept_touches
    return table(tuple(size), tuple(out), module.kernel_size, padding, module.stride, module.dilation)


def _touches(
    size: tuple[int, ...],
    out: tuple[int, ...],
    kernel: tuple[int, ...],
    padding: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Tensor:
    """Return 0/1 `(out positions, in positions, kernel elements)`, 1 where a weight joins the two pixels."""
    axes = []
    for n, m, k, p, s, d in zip(size, out, kernel, padding, stride, dilation, strict=True):
        target, inside, element = (torch.arange(length, device="cpu") for length in (m, n, k))
        source = target[:, None] * s - p + element * d
        axes.append((source[:, None, :] == inside[:, None]).float())
    rows, columns = axes
    joined = torch.einsum("aik,bjl->abijkl", rows, columns)
    return joined.reshape(math.prod(out), math.prod(size), math.prod(kernel))


@lru_cache(maxsize=64)
def _kept_touches(*geometry: tuple[int, ...]) -> Tensor:
    """Return `_touches`, kept for the next call."""
    # A tensor made in inference mode can never be used in training afterwards.
    with torch.inference_mode(False):
        return _touches(*geometry)
