"""Layers of node networks, each computed for all groups at once.

Each function takes the layer, its weights, each `(G, ...)`, rows `(T, ...)` sorted by group, and their groups.

Letters: `T` rows in all, `G` groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from treediff.core.groups import Groups
from treediff.layers.grouped._conv import geometry, map_size, touches_of, transposed_map_size
from treediff.layers.grouped._products import affine, rows_of, to_matrix

__all__ = ["STEPS", "Step", "linear"]

Weights = Sequence[Tensor]
Step = Callable[[Any, Weights, Tensor, Groups], Tensor]


def _bias(weights: Weights) -> Tensor | None:
    return weights[1] if len(weights) > 1 else None


def _lowered(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows and weight in the dtype of autocast for matmuls."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        low = torch.get_autocast_dtype(device)
        return x.to(low), weight.to(low)
    return x, weight


def linear(_: Any, weights: Weights, x: Tensor, groups: Groups) -> Tensor:  # noqa: ANN401
    """Run `nn.Linear` on rows of one vector or several."""
    if x.ndim < 2 or weights[0].ndim != 3 or x.shape[-1] != weights[0].shape[2]:
        raise ValueError(
            "expected rows (T, ..., in_features) and weights (groups, out_features, in_features), found "
            f"{tuple(x.shape)} and {tuple(weights[0].shape)}"
        )
    rows, weight = _lowered(x if x.ndim < 4 else x.flatten(1, -2), weights[0])
    y = affine(rows, weight, _bias(weights), groups)
    return y if rows.ndim == x.ndim else y.view(*x.shape[:-1], y.shape[-1])


def norm(module: nn.LayerNorm | nn.GroupNorm, weights: Weights, x: Tensor, groups: Groups) -> Tensor:
    """Run `nn.LayerNorm`, or `nn.GroupNorm` as a layer norm, whose gradient is much faster on a CPU."""
    count, *rest = x.shape
    if isinstance(module, nn.LayerNorm):
        seen, inside = tuple(x.shape), list(module.normalized_shape)
        scale = (count, *[1] * (len(rest) - len(inside)), *inside)
    else:
        inside = [math.prod(rest) // module.num_groups]
        seen, scale = (count, module.num_groups, *inside), (count, module.num_channels, *[1] * (len(rest) - 1))
    plain, shift = F.layer_norm(x.reshape(seen), inside, eps=module.eps).view(x.shape), _bias(weights)
    y = plain * rows_of(weights[0], groups, scale)
    return y if shift is None else y + rows_of(shift, groups, scale)


def conv2d(module: nn.Conv2d, weights: Weights, x: Tensor, groups: Groups) -> Tensor:
    """Run `nn.Conv2d` as one matmul: over unfolded patches, or over the whole of a small map."""
    out = map_size(module, x.shape)
    touches = touches_of(module, x.shape[2:], out)
    shape = (len(x), module.out_channels, *out)
    x, weight = _lowered(x, weights[0].flatten(3))
    bias = _bias(weights)
    if touches is None:
        rows = F.unfold(x, **geometry(module)).transpose(1, 2)
        return affine(rows, weight.flatten(2), bias, groups).transpose(1, 2).reshape(shape)
    offsets = None if bias is None else bias.repeat_interleave(math.prod(out), 1)
    return affine(x.flatten(1), to_matrix(weight, touches.to(weight)), offsets, groups).reshape(shape)


def conv_transpose2d(module: nn.ConvTranspose2d, weights: Weights, x: Tensor, groups: Groups) -> Tensor:
    """Run `nn.ConvTranspose2d` as one matmul, whose patches are added up where they overlap."""
    out, bias = transposed_map_size(module, x.shape), _bias(weights)
    rows, weight = _lowered(x.flatten(2).transpose(1, 2), weights[0].flatten(2).transpose(1, 2))
    y = F.fold(affine(rows, weight, None, groups).transpose(1, 2), out, **geometry(module))
    return y if bias is None else y + rows_of(bias, groups, (len(x), module.out_channels, 1, 1)).to(y.dtype)


STEPS: dict[Any, Step] = {
    nn.Linear.forward: linear,
    nn.LayerNorm.forward: norm,
    nn.GroupNorm.forward: norm,
    nn.Conv2d.forward: conv2d,
    nn.ConvTranspose2d.forward: conv_transpose2d,
}
