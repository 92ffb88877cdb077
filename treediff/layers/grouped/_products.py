"""Matrices, scales and shifts per group of rows.

`grouped_mm` multiplies all groups in one call. Other weights of a layer, a bias or a norm's weights, are gathered row
by row.

Letters: `T` rows in all, sorted by group, `G` groups.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from treediff.core.groups import Groups, sizes_of

__all__ = ["affine", "rows_of", "to_matrix"]

_FAST = (torch.float32, torch.bfloat16, torch.float16)  # dtypes that `grouped_mm` accepts


# Operators of PyTorch's, as compilers do not read `grouped_mm` in float32, and its own gradient refuses gradients whose
# strides are 0, such as those of a sum.
@torch.library.custom_op("treediff::multiply", mutates_args=())
def multiply(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply each group's rows `(T, a)` by the group's own matrix `(G, b, a)`, transposed: `(T, b)`."""
    if x.dtype in _FAST:
        return F.grouped_mm(x.contiguous(), weight.transpose(1, 2), offs=ends)
    parts = zip(x.split(sizes_of(ends)), weight, strict=True)
    return torch.cat([rows @ matrix.T for rows, matrix in parts])


@torch.library.custom_op("treediff::outer", mutates_args=())
def outer(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    """Compute each group's `x^T y`: `(T, a)` and `(T, b)` to `(G, a, b)`."""
    if x.dtype in _FAST:
        return F.grouped_mm(x.contiguous().T, y.contiguous(), offs=ends)
    parts = zip(x.split(sizes_of(ends)), y.split(sizes_of(ends)), strict=True)
    return torch.stack([a.T @ b for a, b in parts])


@multiply.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@outer.register_fake
def _(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], x.shape[1], y.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:  # noqa: ANN401
    ctx.save_for_backward(*inputs)


def _multiply_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # noqa: ANN401
    x, weight, ends = ctx.saved_tensors
    of_x = multiply(grad, weight.transpose(1, 2), ends) if ctx.needs_input_grad[0] else None
    return of_x, outer(grad, x, ends) if ctx.needs_input_grad[1] else None, None


def _outer_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # noqa: ANN401
    x, y, ends = ctx.saved_tensors
    of_x = multiply(y, grad, ends) if ctx.needs_input_grad[0] else None
    return of_x, multiply(x, grad.transpose(1, 2), ends) if ctx.needs_input_grad[1] else None, None


multiply.register_autograd(_multiply_backward, setup_context=_save)
outer.register_autograd(_outer_backward, setup_context=_save)


def _padded(x: Tensor, *axes: int) -> Tensor:
    """Pad the last axes with zeros to rows of whole 16-byte pieces, which grouped matmuls require."""
    size = x.element_size()
    if not any(x.shape[axis] * size % 16 for axis in axes) or x.dtype not in _FAST:
        return x
    return F.pad(x, [n for axis in axes for n in (0, -x.shape[axis] % (16 // size))])


def affine(x: Tensor, weight: Tensor, bias: Tensor | None, groups: Groups) -> Tensor:
    """Compute `y[t] = weight[g] x[t] + bias[g]` for the group `g` of row `t`.

    Args:
        x: `(T, a)`, or `(T, n, a)` with several vectors per row.
        weight: `(G, b, a)`, of the dtype of `x`.
        bias: `(G, b)` or None.
        groups: the groups of the rows.

    Returns:
        `(T, b)` or `(T, n, b)`.
    """
    out = weight.shape[1]
    if out == 1 and x.ndim == 2:
        y = (x * weight.squeeze(1).index_select(0, groups.index)).sum(1, keepdim=True)
    else:
        ends = groups.ends if x.ndim == 2 else groups.ends * x.shape[1]
        y = multiply(_padded(x.flatten(0, -2), -1), _padded(weight, -1, -2), ends)
        y = y if y.shape[1] == out else y[:, :out]
        y = y if x.ndim == 2 else y.view(len(x), x.shape[1], out)
    if bias is None:
        return y
    offset = bias.index_select(0, groups.index).to(y.dtype)
    return y + (offset if y.ndim == 2 else offset.unsqueeze(1))


def rows_of(values: Tensor, groups: Groups, shape: tuple[int, ...]) -> Tensor:
    """Return the values `(G, ...)` of each row's group as `shape`, `(T, ...)` with ones for axes to broadcast."""
    return values.index_select(0, groups.index).view(shape)


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
