"""Convolutions with a kernel per group of rows, each as one grouped product.

Letters: `T` rows in all, `G` groups.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from treediff.layers.groups import Groups, Weights, grouped_linear
from treediff.layers.products import to_matrix

__all__ = ["conv2d", "conv_transpose2d"]


def _check_map(module: nn.Conv2d | nn.ConvTranspose2d, x: Tensor, out: tuple[int, ...]) -> None:
    if x.ndim != 4 or x.shape[1] != module.in_channels or min(out) < 1:
        raise ValueError(
            f"expected rows of shape ({module.in_channels}, height, width), no smaller than the kernel, for "
            f"{module}; found {tuple(x.shape[1:])}"
        )


def conv2d(module: nn.Conv2d, weights: Weights, x: Tensor, groups: Groups) -> Tensor:
    """A convolution as one product: over unfolded patches, or over the whole of a small map."""
    kernel, padding, stride, dilation = geometry = _geometry(module)
    weight, bias, size = weights["weight"], weights.get("bias"), tuple(x.shape[2:])
    out = tuple(
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, p, s, d in zip(size, kernel, padding, stride, dilation, strict=False)
    )
    _check_map(module, x, out)
    if math.prod(size) <= 2 * math.prod(kernel):
        table = _touches if torch.compiler.is_compiling() else _kept_touches
        touches = table(size, out, *geometry).to(weight)
        # On a map of a few pixels a kernel covers most of it, and the matrix costs less than unfolding patches.
        matrix = to_matrix(weight.flatten(3), touches)
        offsets = None if bias is None else bias.repeat_interleave(math.prod(out), 1)
        return grouped_linear(x.flatten(1), matrix, offsets, groups).view(len(x), module.out_channels, *out)
    patches = F.unfold(x, kernel, dilation, padding, stride)
    y = grouped_linear(patches.transpose(1, 2), weight.flatten(2), bias, groups)
    return y.transpose(1, 2).view(len(x), module.out_channels, *out)


def conv_transpose2d(module: nn.ConvTranspose2d, weights: Weights, x: Tensor, groups: Groups) -> Tensor:
    """A transposed convolution as one product, whose patches are added up where they overlap."""
    kernel, padding, stride, dilation = _geometry(module)
    weight, bias, size = weights["weight"], weights.get("bias"), tuple(x.shape[2:])
    extra: tuple[int, ...] = module.output_padding
    out = tuple(
        (n - 1) * s - 2 * p + d * (k - 1) + e + 1
        for n, k, p, s, d, e in zip(size, kernel, padding, stride, dilation, extra, strict=False)
    )
    _check_map(module, x, out)
    patches = grouped_linear(x.flatten(2).transpose(1, 2), weight.flatten(2).transpose(1, 2), None, groups)
    if kernel == stride and padding == extra == (0, 0) and dilation == (1, 1):
        # Patches side by side need no adding up.
        y: Tensor = rearrange(
            patches, "t (h w) (c a b) -> t c (h a) (w b)", h=size[0], w=size[1], a=kernel[0], b=kernel[1]
        )
    else:
        y = F.fold(patches.transpose(1, 2), out, kernel, dilation, padding, stride)
    return _add_channels(y, bias, groups)


def _geometry(module: nn.Conv2d | nn.ConvTranspose2d) -> tuple[tuple[int, ...], ...]:
    """Kernel, padding, stride and dilation."""
    padding: Any = module.padding  # never a word here, see `_rule`
    return module.kernel_size, padding, module.stride, module.dilation


def _touches(
    size: tuple[int, ...],
    out: tuple[int, ...],
    kernel: tuple[int, ...],
    padding: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Tensor:
    """0/1 `(out positions, in positions, kernel elements)`: which weight joins which two pixels."""
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
    """`_touches`, kept for the next call."""
    # A tensor made in inference mode could never be trained with afterwards.
    with torch.inference_mode(False):
        return _touches(*geometry)


def _add_channels(y: Tensor, bias: Tensor | None, groups: Groups) -> Tensor:
    return y if bias is None else y + bias.index_select(0, groups.index)[:, :, None, None].to(y.dtype)
