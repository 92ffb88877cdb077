"""A matrix, a scale and a shift per group of rows, with both passes written out.

`grouped_mm` multiplies all groups in one call. What a layer adds to it, a bias or a norm's weights, is gathered row by
row; in one function of autograd each, because on small groups the bookkeeping of single operations costs more than the
operations.

Letters: `T` rows in all, sorted by group, `G` groups.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

__all__ = ["affine", "scale_and_shift", "sizes_of", "to_matrix"]


def sizes_of(ends: Tensor) -> list[int]:
    """Rows per group, on the host, from one past the last row of each group."""
    return [b - a for a, b in pairwise([0, *ends.tolist()])]


_FAST = (torch.float32, torch.bfloat16, torch.float16)  # what `grouped_mm` takes


def _multiply(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Each group's rows `(T, a)` times its own matrix `(G, b, a)`, transposed: `(T, b)`."""
    if x.dtype in _FAST:
        return F.grouped_mm(x.contiguous(), weight.transpose(1, 2), offs=ends)
    parts = zip(x.split(sizes_of(ends)), weight, strict=True)
    return torch.cat([rows @ matrix.T for rows, matrix in parts])


def _outer(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    """Each group's `x^T y`: `(T, a)` and `(T, b)` to `(G, a, b)`."""
    if x.dtype in _FAST:
        return F.grouped_mm(x.contiguous().T, y.contiguous(), offs=ends)
    parts = zip(x.split(sizes_of(ends)), y.split(sizes_of(ends)), strict=True)
    return torch.stack([a.T @ b for a, b in parts])


def _padded(x: Tensor, *axes: int) -> Tensor:
    """Zeros at the end of the last axes, for rows of whole 16-byte pieces, which grouped products want."""
    if x.dtype not in _FAST:
        return x
    multiple = 16 // x.element_size()
    pad = [n for axis in axes for n in (0, -x.shape[axis] % multiple)]
    return F.pad(x, pad) if any(pad) else x


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    ends: Tensor,
    multiply: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    out = weight.shape[1]
    if out == 1 and x.ndim == 2:
        y = (x * weight.squeeze(1).index_select(0, index)).sum(1, keepdim=True)
    else:
        y = multiply(_padded(x.flatten(0, -2), -1), _padded(weight, -1, -2), _flat_ends(x, ends))
        y = y if y.shape[1] == out else y[:, :out].contiguous()
        y = y if x.ndim == 2 else y.view(len(x), x.shape[1], out)
    return y if bias is None else y.add_(_per_row(bias.index_select(0, index), y))


def _flat_ends(x: Tensor, ends: Tensor) -> Tensor:
    """`ends` when each of a row's vectors is a row of its own."""
    return ends if x.ndim == 2 else ends * x.shape[1]


def _per_row(values: Tensor, like: Tensor) -> Tensor:
    """`(T, b)` as what can be added to `(T, b)` or `(T, n, b)`."""
    return values if like.ndim == 2 else values.unsqueeze(1)


class _Affine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        index: Tensor,
        ends: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, index, ends)
        ctx.bias = None if bias is None else bias.dtype
        return _forward(x, weight, bias, index, ends, _multiply)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        x, weight, index, ends = ctx.saved_tensors
        (count, out, inside), need = weight.shape, ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        if need[2]:
            rows = grad if grad.ndim == 2 else grad.sum(1)
            grad_bias = grad.new_zeros(count, out, dtype=ctx.bias).index_add_(0, index, rows.to(ctx.bias))
        if out == 1 and x.ndim == 2:
            if need[0]:
                grad_x = grad * weight.squeeze(1).index_select(0, index)
            if need[1]:
                grad_weight = torch.zeros_like(weight.squeeze(1)).index_add_(0, index, grad * x).unsqueeze(1)
            return grad_x, grad_weight, grad_bias, None, None
        padded, ends = _padded(grad.flatten(0, -2), -1), _flat_ends(x, ends)
        if need[0]:
            grad_x = _multiply(padded, _padded(weight, -1, -2).transpose(1, 2), ends)[:, :inside].view_as(x)
        if need[1]:
            grad_weight = _outer(padded, _padded(x.flatten(0, -2), -1), ends)[:, :out, :inside]
        return grad_x, grad_weight, grad_bias, None, None


# The same for `torch.compile`, whose tracer (torch 2.13) knows `grouped_mm` for bfloat16 only. In eager mode
# the function above costs less.


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
    """`y[t] = weight[g] x[t] + bias[g]` for the group `g = index[t]`; a gradient for each but not for gradients.

    Args:
        x: `(T, a)`, or `(T, n, a)` with several vectors per row.
        weight: `(G, b, a)`, of the dtype of `x`.
        bias: `(G, b)` or None.
        index: `(T,)` int64, ascending.
        ends: `(G,)` int32, one past the last row of each group.

    Returns:
        `(T, b)` or `(T, n, b)`.
    """
    if torch.compiler.is_compiling():
        return _forward(x, weight, bias, index, ends, _traced_multiply)
    result: Tensor = _Affine.apply(x, weight, bias, index, ends)  # type: ignore[no-untyped-call]
    return result


def _scaled(x: Tensor, scale: Tensor, shift: Tensor | None, index: Tensor, shape: tuple[int, ...]) -> Tensor:
    y = x * scale.index_select(0, index).view(shape)
    return y if shift is None else y.add_(shift.index_select(0, index).view(shape))


class _ScaleAndShift(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        scale: Tensor,
        shift: Tensor | None,
        index: Tensor,
        shape: tuple[int, ...],
    ) -> Tensor:
        ctx.save_for_backward(x, scale, index)
        ctx.shape = shape
        return _scaled(x, scale, shift, index, shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        x, scale, index = ctx.saved_tensors
        grad_x = grad_scale = grad_shift = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad * scale.index_select(0, index).view(ctx.shape)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_scale = _sum_of_groups(grad * x, ctx.shape, scale, index)
        if ctx.needs_input_grad[2]:
            grad_shift = _sum_of_groups(grad, ctx.shape, scale, index)
        return grad_x, grad_scale, grad_shift, None, None


def _sum_of_groups(values: Tensor, shape: tuple[int, ...], like: Tensor, index: Tensor) -> Tensor:
    rows = values.sum_to_size(shape).reshape(-1, *like.shape[1:]).to(like.dtype)
    return torch.zeros_like(like).index_add_(0, index, rows)


def scale_and_shift(x: Tensor, scale: Tensor, shift: Tensor | None, index: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`y[t] = scale[g] x[t] + shift[g]` for the group `g = index[t]`; a gradient for each but not for gradients.

    Args:
        x: `(T, ...)`.
        scale: `(G, ...)`.
        shift: as `scale`, or None.
        index: `(T,)` int64, ascending.
        shape: of the scales of all rows, `(T, ...)` with ones where they are alike.
    """
    if torch.compiler.is_compiling():
        return _scaled(x, scale, shift, index, shape)
    result: Tensor = _ScaleAndShift.apply(x, scale, shift, index, shape)  # type: ignore[no-untyped-call]
    return result


def _to_matrix(weight: Tensor, touches: Tensor) -> Tensor:
    groups, out, inside, _ = weight.shape
    positions = touches.shape[:2]
    full = (weight.reshape(-1, touches.shape[2]) @ touches.flatten(0, 1).T).view(groups, out, inside, *positions)
    return full.transpose(2, 3).reshape(groups, out * positions[0], inside * positions[1])


class _ToMatrix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, touches: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(touches)
        ctx.shape, ctx.dtype = weight.shape, weight.dtype
        return _to_matrix(weight, touches)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        (touches,) = ctx.saved_tensors
        groups, out, inside, _ = ctx.shape
        to, of, elements = touches.shape
        full = grad.view(groups, out, to, inside, of).transpose(2, 3).reshape(-1, to * of)
        return (full @ touches.view(-1, elements).to(full.dtype)).view(ctx.shape).to(ctx.dtype), None


def to_matrix(weight: Tensor, touches: Tensor) -> Tensor:
    """A convolution as the matrix from every input position to every output position.

    Args:
        weight: `(G, out_channels, in_channels, kernel elements)`.
        touches: 0/1 `(out positions, in positions, kernel elements)`, which weight joins which two positions.

    Returns:
        `(G, out_channels * out positions, in_channels * in positions)`.
    """
    if torch.compiler.is_compiling():
        return _to_matrix(weight, touches)
    result: Tensor = _ToMatrix.apply(weight, touches)  # type: ignore[no-untyped-call]
    return result
