"""How the layers of node networks run for all groups at once, and how they are undone.

Letters: `T` rows in all, `G` groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from treediff.layers.chain import Kept, Need, Step
from treediff.layers.convolutions import geometry, map_size, touches_of, transposed_map_size
from treediff.layers.gaussians import LogVariance, log_variance, log_variance_gradient
from treediff.layers.groups import Groups
from treediff.layers.products import (
    affine,
    affine_gradients,
    from_matrix,
    rows_of,
    scale_and_shift_gradients,
    sum_of_groups,
    to_matrix,
)

__all__ = ["STEPS"]

Weights = Sequence[Tensor]


def _bias(weights: Weights) -> Tensor | None:
    return weights[1] if len(weights) > 1 else None


def _lowered(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and weight in the dtype that autocast wants of products."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        low = torch.get_autocast_dtype(device)
        return x.to(low), weight.to(low)
    return x, weight


class LinearStep:
    """`nn.Linear` on rows of one vector or several."""

    def forward(self, _: Any, weights: Weights, x: Tensor, groups: Groups) -> tuple[Tensor, Kept]:  # noqa: ANN401
        """See `Step`."""
        if x.ndim < 2 or weights[0].ndim != 3 or x.shape[-1] != weights[0].shape[2]:
            raise ValueError(
                "expected rows (T, ..., in_features) and weights (groups, out_features, in_features), found "
                f"{tuple(x.shape)} and {tuple(weights[0].shape)}"
            )
        rows, weight = _lowered(x if x.ndim < 4 else x.flatten(1, -2), weights[0])
        y = affine(rows, weight, _bias(weights), groups.index, groups.ends)
        return y if rows.ndim == x.ndim else y.view(*x.shape[:-1], y.shape[-1]), (rows,)

    def backward(
        self,
        _: Any,  # noqa: ANN401
        weights: Weights,
        kept: Kept,
        shape: torch.Size,
        grad: Tensor,
        groups: Groups,
        need: Need,
    ) -> tuple[Tensor | None, Kept]:
        """See `Step`."""
        rows = kept[0]
        grad = grad.reshape(*rows.shape[:-1], grad.shape[-1])
        of_x, found = affine_gradients(rows, weights[0].to(rows.dtype), groups.index, groups.ends, grad, need)
        return of_x, tuple(found[: len(weights)])


class NormStep:
    """`nn.LayerNorm` and `nn.GroupNorm`; the latter as a layer norm, whose gradient takes a CPU much less time."""

    def forward(
        self, module: nn.LayerNorm | nn.GroupNorm, weights: Weights, x: Tensor, groups: Groups
    ) -> tuple[Tensor, Kept]:
        """See `Step`."""
        seen, inside, scale = self._shapes(module, x.shape)
        rows = x.reshape(seen)
        plain, mean, rstd = torch.native_layer_norm(rows, inside, None, None, module.eps)
        plain, factor, shift = plain.view(x.shape), rows_of(weights[0], groups.index, scale), _bias(weights)
        y = plain * factor
        if shift is not None:
            y += rows_of(shift, groups.index, scale)
        return y, (rows, plain, mean, rstd, factor)

    def backward(
        self,
        module: nn.LayerNorm | nn.GroupNorm,
        weights: Weights,
        kept: Kept,
        shape: torch.Size,
        grad: Tensor,
        groups: Groups,
        need: Need,
    ) -> tuple[Tensor | None, Kept]:
        """See `Step`."""
        rows, plain, mean, rstd, factor = kept
        seen, inside, _ = self._shapes(module, shape)
        of_plain = (grad * factor).to(rows.dtype)
        found = scale_and_shift_gradients(plain, factor, weights[0], groups.index, grad) if need.weights else []
        of_x = torch.ops.aten.native_layer_norm_backward(
            of_plain.reshape(seen), rows, inside, mean, rstd, None, None, [True, False, False]
        )[0]
        return of_x, tuple(found[: len(weights)])

    @staticmethod
    def _shapes(
        module: nn.LayerNorm | nn.GroupNorm, shape: torch.Size
    ) -> tuple[tuple[int, ...], list[int], tuple[int, ...]]:
        """The shape that a layer norm works on, the last axes, which it covers, and the shape of a scale."""
        rows, *rest = shape
        if isinstance(module, nn.LayerNorm):
            inside = list(module.normalized_shape)
            return tuple(shape), inside, (rows, *[1] * (len(rest) - len(inside)), *inside)
        covered = math.prod(rest) // module.num_groups
        return (rows, module.num_groups, covered), [covered], (rows, module.num_channels, *[1] * (len(rest) - 1))


class Conv2dStep:
    """`nn.Conv2d` as one product: over unfolded patches, or over the whole of a small map."""

    def forward(self, module: nn.Conv2d, weights: Weights, x: Tensor, groups: Groups) -> tuple[Tensor, Kept]:
        """See `Step`."""
        out, touches = map_size(module, x.shape), touches_of(module, x.shape)
        shape = (len(x), module.out_channels, *out)
        x, weight = _lowered(x, weights[0].flatten(3))
        bias, where = _bias(weights), (groups.index, groups.ends)
        if touches is None:
            rows = F.unfold(x, **geometry(module)).transpose(1, 2)
            return affine(rows, weight.flatten(2), bias, *where).transpose(1, 2).reshape(shape), (rows,)
        rows, matrix = x.flatten(1), to_matrix(weight, touches.to(weight))
        offsets = None if bias is None else bias.repeat_interleave(math.prod(out), 1)
        return affine(rows, matrix, offsets, *where).view(shape), (rows, matrix)

    def backward(
        self,
        module: nn.Conv2d,
        weights: Weights,
        kept: Kept,
        shape: torch.Size,
        grad: Tensor,
        groups: Groups,
        need: Need,
    ) -> tuple[Tensor | None, Kept]:
        """See `Step`."""
        rows, touches, where = kept[0], touches_of(module, shape), (groups.index, groups.ends)
        count, out = weights[0].shape[:2]
        if touches is None:
            weight, of_y = weights[0].flatten(2).to(rows.dtype), grad.flatten(2).transpose(1, 2)
            of_rows, found = affine_gradients(rows, weight, *where, of_y, need)
            of_x = None if of_rows is None else F.fold(of_rows.transpose(1, 2), shape[2:], **geometry(module))
        else:
            of_x, found = affine_gradients(rows, kept[1], *where, grad.flatten(1), need)
            if need.weights:
                of_matrix, offsets = found
                of_weight = from_matrix(of_matrix, touches.to(of_matrix), weights[0].flatten(3).shape)
                found = [of_weight, offsets.view(count, out, -1).sum(2)]
        return of_x, tuple(g.reshape(w.shape) for g, w in zip(found, weights, strict=False))


class ConvTranspose2dStep:
    """`nn.ConvTranspose2d` as one product, whose patches are added up where they overlap."""

    def forward(self, module: nn.ConvTranspose2d, weights: Weights, x: Tensor, groups: Groups) -> tuple[Tensor, Kept]:
        """See `Step`."""
        out, bias = transposed_map_size(module, x.shape), _bias(weights)
        rows, weight = _lowered(x.flatten(2).transpose(1, 2), weights[0].flatten(2).transpose(1, 2))
        patches = affine(rows, weight, None, groups.index, groups.ends)
        y = F.fold(patches.transpose(1, 2), out, **geometry(module))
        return y if bias is None else y + bias.index_select(0, groups.index)[:, :, None, None].to(y.dtype), (rows,)

    def backward(
        self,
        module: nn.ConvTranspose2d,
        weights: Weights,
        kept: Kept,
        shape: torch.Size,
        grad: Tensor,
        groups: Groups,
        need: Need,
    ) -> tuple[Tensor | None, Kept]:
        """See `Step`."""
        rows = kept[0]
        weight = weights[0].flatten(2).transpose(1, 2).to(rows.dtype)
        of_patches = F.unfold(grad, **geometry(module)).transpose(1, 2)
        of_x, found = affine_gradients(rows, weight, groups.index, groups.ends, of_patches, need)
        of_x = None if of_x is None else of_x.transpose(1, 2)
        if not need.weights:
            return of_x, ()
        of_weight = found[0].transpose(1, 2).reshape(weights[0].shape)
        of_bias = sum_of_groups(grad.sum((2, 3)), groups.index, len(weight))
        return of_x, (of_weight, of_bias)[: len(weights)]


class SiLUStep:
    """`nn.SiLU`."""

    def forward(self, module: nn.SiLU, _: Weights, x: Tensor, groups: Groups) -> tuple[Tensor, Kept]:
        """See `Step`."""
        return F.silu(x), (x,)

    def backward(
        self, module: nn.SiLU, _: Weights, kept: Kept, shape: torch.Size, grad: Tensor, groups: Groups, need: Need
    ) -> tuple[Tensor | None, Kept]:
        """See `Step`."""
        return torch.ops.aten.silu_backward(grad, kept[0]), ()


class ReshapeStep:
    """`nn.Flatten` and `nn.Unflatten`, which a chain undoes by itself."""

    def forward(self, module: nn.Module, _: Weights, x: Tensor, groups: Groups) -> tuple[Tensor, Kept]:
        """See `Step`."""
        return module(x), ()

    def backward(
        self, module: nn.Module, _: Weights, kept: Kept, shape: torch.Size, grad: Tensor, groups: Groups, need: Need
    ) -> tuple[Tensor | None, Kept]:
        """See `Step`."""
        return grad, ()


class LogVarianceStep:
    """`LogVariance`."""

    def forward(self, module: LogVariance, _: Weights, x: Tensor, groups: Groups) -> tuple[Tensor, Kept]:
        """See `Step`."""
        y = log_variance(x)
        return y, (x, y)

    def backward(
        self, module: LogVariance, _: Weights, kept: Kept, shape: torch.Size, grad: Tensor, groups: Groups, need: Need
    ) -> tuple[Tensor | None, Kept]:
        """See `Step`."""
        return log_variance_gradient(kept[0], kept[1], grad), ()


STEPS: dict[Any, Step] = {
    nn.Linear.forward: LinearStep(),
    nn.LayerNorm.forward: NormStep(),
    nn.GroupNorm.forward: NormStep(),
    nn.Conv2d.forward: Conv2dStep(),
    nn.ConvTranspose2d.forward: ConvTranspose2dStep(),
    nn.SiLU.forward: SiLUStep(),
    nn.Flatten.forward: ReshapeStep(),
    nn.Unflatten.forward: ReshapeStep(),
    LogVariance.forward: LogVarianceStep(),
}
