"""Matrices, scales and shifts per group of rows: matmuls and their gradients, written out.

`grouped_mm` multiplies all groups in one call. Other weights of a layer, a bias or a norm's weights, are gathered row
by row. Autograd does not record these functions; `treediff.layers.grouped._chain` combines both passes.

Letters: `T` rows in all, sorted by group, `G` groups.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from treediff.core.groups import sizes_of

__all__ = ["Need", "affine", "affine_gradients", "from_matrix", "rows_of", "sum_of_groups", "to_matrix"]

_FAST = (torch.float32, torch.bfloat16, torch.float16)  # dtypes that `grouped_mm` accepts


def _multiply(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply each group's rows `(T, a)` by the group's own matrix `(G, b, a)`, transposed: `(T, b)`."""
    if x.dtype in _FAST:
        return F.grouped_mm(x.contiguous(), weight.transpose(1, 2), offs=ends)
    parts = zip(x.split(sizes_of(ends)), weight, strict=True)
    return torch.cat([rows @ matrix.T for rows, matrix in parts])


def _outer(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    """Compute each group's `x^T y`: `(T, a)` and `(T, b)` to `(G, a, b)`."""
    if x.dtype in _FAST:
        return F.grouped_mm(x.contiguous().T, y.contiguous(), offs=ends)
    parts = zip(x.split(sizes_of(ends)), y.split(sizes_of(ends)), strict=True)
    return torch.stack([a.T @ b for a, b in parts])


def _padded(x: Tensor, *axes: int) -> Tensor:
    """Pad the last axes with zeros to rows of whole 16-byte pieces, which grouped matmuls require."""
    size = x.element_size()
    if not any(x.shape[axis] * size % 16 for axis in axes) or x.dtype not in _FAST:
        return x
    return F.pad(x, [n for axis in axes for n in (0, -x.shape[axis] % (16 // size))])


@torch.library.custom_op("treediff::multiply", mutates_args=())
def _traced_multiply(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return _multiply(x, weight, ends)


@torch.library.custom_op("treediff::outer", mutates_args=())
def _traced_outer(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    return _outer(x, y, ends)


@_traced_multiply.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@_traced_outer.register_fake
def _(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], x.shape[1], y.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:  # noqa: ANN401
    ctx.save_for_backward(*inputs)


def _traced_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # noqa: ANN401
    x, weight, ends = ctx.saved_tensors
    return _traced_multiply(grad, weight.transpose(1, 2), ends), _traced_outer(grad, x, ends), None


_traced_multiply.register_autograd(_traced_backward, setup_context=_save)


def affine(x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, ends: Tensor) -> Tensor:
    """Compute `y[t] = weight[g] x[t] + bias[g]` for the group `g = index[t]`.

    Args:
        x: `(T, a)`, or `(T, n, a)` with several vectors per row.
        weight: `(G, b, a)`, of the dtype of `x`.
        bias: `(G, b)` or None.
        index: `(T,)` int64, ascending.
        ends: `(G,)` int32, one past the last row of each group.

    Returns:
        `(T, b)` or `(T, n, b)`.
    """
    out = weight.shape[1]
    if out == 1 and x.ndim == 2:
        y = (x * weight.squeeze(1).index_select(0, index)).sum(1, keepdim=True)
    else:
        multiply = _traced_multiply if torch.compiler.is_compiling() else _multiply
        y = multiply(_padded(x.flatten(0, -2), -1), _padded(weight, -1, -2), _flat_ends(x, ends))
        y = y if y.shape[1] == out else y[:, :out].contiguous()
        y = y if x.ndim == 2 else y.view(len(x), x.shape[1], out)
    if bias is None:
        return y
    offset = bias.index_select(0, index)
    return y.add_(offset if y.ndim == 2 else offset.unsqueeze(1))


class Need(NamedTuple):
    """Gradients to compute: True for each that is needed."""

    input: bool
    weights: bool


def affine_gradients(
    x: Tensor, weight: Tensor, index: Tensor, ends: Tensor, grad: Tensor, need: Need
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of `x` and of the weight, as needed, from the gradient of `affine`'s result."""
    count, out, inside = weight.shape
    grad_x = grad_weight = None
    if out == 1 and x.ndim == 2:
        if need.input:
            grad_x = grad * weight.squeeze(1).index_select(0, index)
        if need.weights:
            grad_weight = sum_of_groups(grad * x, index, count).unsqueeze(1)
        return grad_x, grad_weight
    padded, ends = _padded(grad.flatten(0, -2), -1), _flat_ends(x, ends)
    if need.input:
        grad_x = _multiply(padded, _padded(weight, -1, -2).transpose(1, 2), ends)[:, :inside].view_as(x)
    if need.weights:
        grad_weight = _outer(padded, _padded(x.flatten(0, -2), -1), ends)[:, :out, :inside]
    return grad_x, grad_weight


def _flat_ends(x: Tensor, ends: Tensor) -> Tensor:
    """Return `ends` for rows that are split into their vectors."""
    return ends if x.ndim == 2 else ends * x.shape[1]


def rows_of(values: Tensor, index: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the values `(G, ...)` of each row's group as `shape`, `(T, ...)` with ones for axes to broadcast."""
    return values.index_select(0, index).view(shape)


def sum_of_groups(rows: Tensor, index: Tensor, count: int) -> Tensor:
    """Sum each group's rows `(T, a)` or `(T, n, a)`: `(G, a)`, in float32 at least; the gradient of a bias."""
    rows = rows if rows.ndim == 2 else rows.sum(1)
    if rows.dtype not in (torch.float32, torch.float64):
        rows = rows.float()
    return rows.new_zeros(count, rows.shape[1]).index_add_(0, index, rows)


def to_matrix(weight: Tensor, touches: Tensor) -> Tensor:
    """Return a convolution as the matrix from every input position to every output position.

    Args:
        weight: `(G, out_channels, in_channels, kernel elements)`.
        touches: 0/1 `(out positions, in positions, kernel elements)`, 1 where a weight joins the two positions.

    Returns:
        `(G, out_channels * out positions, in_channels * in positions)`.
    """
    groups, out, inside, elements = weight.shape
    to, of, _ = touches.shape
    full = (weight.reshape(-1, elements) @ touches.view(-1, elements).T).view(groups, out, inside, to, of)
    return full.transpose(2, 3).reshape(groups, out * to, inside * of)


def from_matrix(grad: Tensor, touches: Tensor, shape: torch.Size) -> Tensor:
    """Return the gradient of a weight of a `shape` from the gradient of `to_matrix`'s result."""
    groups, out, inside, elements = shape
    to, of, _ = touches.shape
    full = grad.reshape(groups, out, to, inside, of).transpose(2, 3).reshape(-1, to * of)
    return (full @ touches.view(-1, elements)).view(shape)
