"""Steps of the layers of node networks: forward and backward pass for all groups at once.

Letters: `T` rows in all, `G` groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from treediff.core.groups import Groups
from treediff.layers.grouped._chain import Done, Kept, Step
from treediff.layers.grouped._conv import geometry, map_size, touches_of, transposed_map_size
from treediff.layers.grouped._gaussians import LogVariance, log_variance, log_variance_gradient
from treediff.layers.grouped._products import affine, affine_gradients, from_matrix, rows_of, sum_of_groups, to_matrix

__all__ = ["STEPS"]

Weights = Sequence[Tensor]


def _bias(weights: Weights) -> Tensor | None:
    return weights[1] if len(weights) > 1 else None


def _lowered(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows and weight in the dtype of autocast for matmuls."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        low = torch.get_autocast_dtype(device)
        return x.to(low), weight.to(low)
    return x, weight


def _gradients(of_weight: Tensor | None, of_y: Tensor, done: Done) -> list[Tensor]:
    """Return the gradients of the weight and of a bias, if any, that is added to every vector of `y`."""
    if of_weight is None:
        return []
    biases = done.weights[1:]
    return [of_weight, *(sum_of_groups(of_y, done.groups.index, done.groups.count) for _ in biases)]


class LinearStep:
    """Step of `nn.Linear` on rows of one vector or several."""

    def forward(self, _: Any, weights: Weights, x: Tensor, groups: Groups) -> tuple[Tensor, Kept]:  # noqa: ANN401
        """Run the linear layers; arguments and results as for `Step.forward`."""
        if x.ndim < 2 or weights[0].ndim != 3 or x.shape[-1] != weights[0].shape[2]:
            raise ValueError(
                "expected rows (T, ..., in_features) and weights (groups, out_features, in_features), found "
                f"{tuple(x.shape)} and {tuple(weights[0].shape)}"
            )
        rows, weight = _lowered(x if x.ndim < 4 else x.flatten(1, -2), weights[0])
        y = affine(rows, weight, _bias(weights), groups.index, groups.ends)
        return y if rows.ndim == x.ndim else y.view(*x.shape[:-1], y.shape[-1]), (rows,)

    def backward(self, done: Done, grad: Tensor) -> tuple[Tensor | None, Sequence[Tensor]]:
        """Return the gradients of the linear layers; arguments as for `Step.backward`."""
        rows, weights, where = done.kept[0], done.weights, (done.groups.index, done.groups.ends)
        grad = grad.reshape(*rows.shape[:-1], grad.shape[-1])
        of_x, of_weight = affine_gradients(rows, weights[0].to(rows.dtype), *where, grad, done.need)
        return of_x, _gradients(of_weight, grad, done)


class NormStep:
    """Step of `nn.LayerNorm`, and of `nn.GroupNorm` as a layer norm, whose gradient is much faster on a CPU."""

    def forward(
        self, module: nn.LayerNorm | nn.GroupNorm, weights: Weights, x: Tensor, groups: Groups
    ) -> tuple[Tensor, Kept]:
        """Run the norms; arguments and results as for `Step.forward`."""
        seen, inside, scale = self._shapes(module, x.shape)
        rows = x.reshape(seen)
        plain, mean, rstd = torch.native_layer_norm(rows, inside, None, None, module.eps)
        plain, factor, shift = plain.view(x.shape), rows_of(weights[0], groups.index, scale), _bias(weights)
        y = plain * factor
        if shift is not None:
            y += rows_of(shift, groups.index, scale)
        return y, (rows, plain, mean, rstd, factor)

    def backward(self, done: Done, grad: Tensor) -> tuple[Tensor | None, Sequence[Tensor]]:
        """Return the gradients of the norms; arguments as for `Step.backward`."""
        rows, plain, mean, rstd, factor = done.kept
        seen, inside, _ = self._shapes(done.module, done.shape)
        of_plain = (grad * factor).to(rows.dtype)
        of_x = torch.ops.aten.native_layer_norm_backward(
            of_plain.reshape(seen), rows, inside, mean, rstd, None, None, [True, False, False]
        )[0]
        if not done.need.weights:
            return of_x, ()
        weight, index, width = done.weights[0], done.groups.index, done.weights[0][0].numel()
        sums = [values.sum_to_size(factor.shape).reshape(-1, width) for values in (grad * plain, grad)]
        return of_x, [sum_of_groups(rows, index, len(weight)) for rows in sums[: len(done.weights)]]

    @staticmethod
    def _shapes(
        module: nn.LayerNorm | nn.GroupNorm, shape: torch.Size
    ) -> tuple[tuple[int, ...], list[int], tuple[int, ...]]:
        """Return the shape for a layer norm, the last axes, over which it normalises, and the shape of a scale."""
        rows, *rest = shape
        if isinstance(module, nn.LayerNorm):
            inside = list(module.normalized_shape)
            return tuple(shape), inside, (rows, *[1] * (len(rest) - len(inside)), *inside)
        covered = math.prod(rest) // module.num_groups
        return (rows, module.num_groups, covered), [covered], (rows, module.num_channels, *[1] * (len(rest) - 1))


class Conv2dStep:
    """Step of `nn.Conv2d` as one matmul: over unfolded patches, or over the whole of a small map."""

    def forward(self, module: nn.Conv2d, weights: Weights, x: Tensor, groups: Groups) -> tuple[Tensor, Kept]:
        """Run the convolutions; arguments and results as for `Step.forward`."""
        out = map_size(module, x.shape)
        touches = touches_of(module, x.shape[2:], out)
        shape = (len(x), module.out_channels, *out)
        x, weight = _lowered(x, weights[0].flatten(3))
        bias, where = _bias(weights), (groups.index, groups.ends)
        if touches is None:
            rows = F.unfold(x, **geometry(module)).transpose(1, 2)
            return affine(rows, weight.flatten(2), bias, *where).transpose(1, 2).reshape(shape), (rows,)
        rows, matrix = x.flatten(1), to_matrix(weight, touches.to(weight))
        offsets = None if bias is None else bias.repeat_interleave(math.prod(out), 1)
        return affine(rows, matrix, offsets, *where).view(shape), (rows, matrix)

    def backward(self, done: Done, grad: Tensor) -> tuple[Tensor | None, Sequence[Tensor]]:
        """Return the gradients of the convolutions; arguments as for `Step.backward`."""
        rows, weights, where = done.kept[0], done.weights, (done.groups.index, done.groups.ends)
        touches = touches_of(done.module, done.shape[2:], grad.shape[2:])
        of_y = grad.flatten(2).transpose(1, 2)
        if touches is None:
            weight = weights[0].flatten(2).to(rows.dtype)
            of_rows, of_weight = affine_gradients(rows, weight, *where, of_y, done.need)
            of_x = None if of_rows is None else F.fold(of_rows.transpose(1, 2), done.shape[2:], **geometry(done.module))
        else:
            of_x, of_weight = affine_gradients(rows, done.kept[1], *where, grad.flatten(1), done.need)
            if of_weight is not None:
                of_weight = from_matrix(of_weight, touches.to(of_weight), weights[0].flatten(3).shape)
        return of_x, _gradients(of_weight, of_y, done)


class ConvTranspose2dStep:
    """Step of `nn.ConvTranspose2d` as one matmul, whose patches are added up where they overlap."""

    def forward(self, module: nn.ConvTranspose2d, weights: Weights, x: Tensor, groups: Groups) -> tuple[Tensor, Kept]:
        """Run the transposed convolutions; arguments and results as for `Step.forward`."""
        out, bias = transposed_map_size(module, x.shape), _bias(weights)
        rows, weight = _lowered(x.flatten(2).transpose(1, 2), weights[0].flatten(2).transpose(1, 2))
        patches = affine(rows, weight, None, groups.index, groups.ends)
        y = F.fold(patches.transpose(1, 2), out, **geometry(module))
        return y if bias is None else y + bias.index_select(0, groups.index)[:, :, None, None].to(y.dtype), (rows,)

    def backward(self, done: Done, grad: Tensor) -> tuple[Tensor | None, Sequence[Tensor]]:
        """Return the gradients of the transposed convolutions; arguments as for `Step.backward`."""
        rows, where = done.kept[0], (done.groups.index, done.groups.ends)
        weight = done.weights[0].flatten(2).transpose(1, 2).to(rows.dtype)
        of_patches = F.unfold(grad, **geometry(done.module)).transpose(1, 2)
        of_x, of_weight = affine_gradients(rows, weight, *where, of_patches, done.need)
        of_weight = None if of_weight is None else of_weight.transpose(1, 2)
        of_x = None if of_x is None else of_x.transpose(1, 2)
        return of_x, _gradients(of_weight, grad.flatten(2).transpose(1, 2), done)


class SiLUStep:
    """Step of `nn.SiLU`."""

    def forward(self, module: nn.SiLU, _: Weights, x: Tensor, groups: Groups) -> tuple[Tensor, Kept]:
        """Apply SiLU; arguments and results as for `Step.forward`."""
        return F.silu(x), (x,)

    def backward(self, done: Done, grad: Tensor) -> tuple[Tensor | None, Sequence[Tensor]]:
        """Return the gradient of SiLU; arguments as for `Step.backward`."""
        return torch.ops.aten.silu_backward(grad, done.kept[0]), ()


class ReshapeStep:
    """Step of `nn.Flatten` and `nn.Unflatten`, whose gradients the chain reshapes."""

    def forward(self, module: nn.Module, _: Weights, x: Tensor, groups: Groups) -> tuple[Tensor, Kept]:
        """Reshape the rows; arguments and results as for `Step.forward`."""
        return module(x), ()

    def backward(self, done: Done, grad: Tensor) -> tuple[Tensor | None, Sequence[Tensor]]:
        """Return the gradient unchanged; arguments as for `Step.backward`."""
        return grad, ()


class LogVarianceStep:
    """Step of `LogVariance`."""

    def forward(self, module: LogVariance, _: Weights, x: Tensor, groups: Groups) -> tuple[Tensor, Kept]:
        """Compute the log-variance; arguments and results as for `Step.forward`."""
        y = log_variance(x)
        return y, (x, y)

    def backward(self, done: Done, grad: Tensor) -> tuple[Tensor | None, Sequence[Tensor]]:
        """Return the gradient of the log-variance; arguments as for `Step.backward`."""
        return log_variance_gradient(done.kept[0], done.kept[1], grad), ()


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
