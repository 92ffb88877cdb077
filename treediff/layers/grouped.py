"""Many copies of one small network, each applied to its own rows, in one call.

A tree has a router, a head and a decoder *per node*. Looping over nodes costs a few hundred tiny operations per
node; running every node on every image computes results that nobody reads. Here the rows of a batch are sorted
by node and each layer is computed for all nodes at once: the cost follows the rows that exist, not the nodes.

`grouped_call` runs an ordinary `nn.Module` (the *template*) with a different set of weights for each group of
rows. Linear layers, convolutions and norms have a rule that computes all groups together; a layer without
parameters simply runs on all rows; any other module falls back to a loop over groups, which is correct and slow.

Letters: `T` rows in all, `G` groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

__all__ = ["Groups", "grouped_call", "grouped_linear"]

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Groups:
    """Which group each row belongs to; rows are sorted by group.

    Args:
        index: `(T,)` int64, ascending: the group of each row.
        count: number of groups `G`; some may have no row.
    """

    index: Tensor
    count: int

    @cached_property
    def ends(self) -> Tensor:
        """`(G,)` int32: one past the last row of each group."""
        steps = torch.arange(1, self.count + 1, device=self.index.device)
        return torch.searchsorted(self.index, steps).to(torch.int32)

    @cached_property
    def sizes(self) -> list[int]:
        """Rows per group, on the host."""
        ends = [0, *self.ends.tolist()]
        return [b - a for a, b in zip(ends, ends[1:], strict=False)]

    def repeat(self, times: int) -> Groups:
        """The groups when each row is replaced by `times` consecutive ones."""
        known = self._repeated
        if times not in known:
            known[times] = Groups(self.index.repeat_interleave(times), self.count)
        return known[times]

    @cached_property
    def _repeated(self) -> dict[int, Groups]:
        """Kept, because the layers of one network ask for the same few again and again."""
        return {}


def _multiply(x: Tensor, matrices: Tensor, groups: Groups) -> Tensor:
    """Each group's rows `(T, a)` times its own matrix `(G, a, b)`: `(T, b)`."""
    if x.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return F.grouped_mm(x, matrices, offs=groups.ends)
    parts = zip(x.split(groups.sizes), matrices, strict=True)
    return torch.cat([rows @ matrix for rows, matrix in parts])


def _outer(x: Tensor, y: Tensor, groups: Groups) -> Tensor:
    """Each group's `x^T y`: `(T, a)` and `(T, b)` to `(G, a, b)`."""
    if x.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return F.grouped_mm(x.T, y, offs=groups.ends)
    parts = zip(x.split(groups.sizes), y.split(groups.sizes), strict=True)
    return torch.stack([a.T @ b for a, b in parts])


class _GroupedProduct(torch.autograd.Function):
    """`y[t] = W[group of t] x[t]`, with contiguous operands in both passes, as grouped products require."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, groups: Groups) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.groups = groups  # type: ignore[attr-defined]
        return _multiply(x, weight.transpose(1, 2), groups)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # noqa: ANN401
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        need_x, need_weight, _ = ctx.needs_input_grad
        return (
            _multiply(grad, weight, ctx.groups) if need_x else None,
            _outer(grad, x, ctx.groups) if need_weight else None,
            None,
        )


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, groups: Groups) -> Tensor:
    """A linear layer per group: `y[t] = weight[g] x[t] + bias[g]` where `g` is the group of row `t`.

    Args:
        x: `(T, in_features)`, sorted by group.
        weight: `(G, out_features, in_features)`.
        bias: `(G, out_features)` or None.
        groups: the groups of the rows.

    Returns:
        `(T, out_features)`.

    Examples:
        >>> groups = Groups(torch.tensor([0, 1, 1]), count=2)
        >>> grouped_linear(torch.ones(3, 4), torch.ones(2, 1, 4), torch.tensor([[0.0], [1.0]]), groups)
        tensor([[4.],
                [5.],
                [5.]])
    """
    out_features, in_features = weight.shape[1:]
    # Grouped products want rows of whole 16-byte pieces; zero columns fill the last one.
    multiple = 16 // weight.element_size()
    pad_out, pad_in = -out_features % multiple, -in_features % multiple
    if pad_out or pad_in:
        weight = F.pad(weight, (0, pad_in, 0, pad_out))
        x = F.pad(x, (0, pad_in))
    y = _GroupedProduct.apply(x.contiguous(), weight, groups)  # type: ignore[no-untyped-call]
    if pad_out:
        y = y[:, :out_features]
    return y if bias is None else y + bias.index_select(0, groups.index)


def _linear(module: nn.Linear, weights: Weights, x: Tensor, groups: Groups) -> Tensor:
    return grouped_linear(x, weights["weight"], weights.get("bias"), groups)


def _affine(y: Tensor, weights: Weights, groups: Groups) -> Tensor:
    """Each group's own scale and shift, on the last axis of `y`."""
    if "weight" in weights:
        y = y * weights["weight"].index_select(0, groups.index)
    return y + weights["bias"].index_select(0, groups.index) if "bias" in weights else y


def _layer_norm(module: nn.LayerNorm, weights: Weights, x: Tensor, groups: Groups) -> Tensor:
    return _affine(F.layer_norm(x, module.normalized_shape, eps=module.eps), weights, groups)


def _group_norm(module: nn.GroupNorm, weights: Weights, x: Tensor, groups: Groups) -> Tensor:
    y = F.group_norm(x, module.num_groups, eps=module.eps)
    scale, shift = weights["weight"], weights["bias"]
    shape = (len(x), -1, *[1] * (x.ndim - 2))
    return torch.addcmul(
        shift.index_select(0, groups.index).view(shape), y, scale.index_select(0, groups.index).view(shape)
    )


def _conv2d(module: nn.Conv2d, weights: Weights, x: Tensor, groups: Groups) -> Tensor:
    """A convolution as one product: over unfolded patches, or over the whole of a small map."""
    geometry = module.kernel_size, _pair(module.padding), module.stride, module.dilation
    weight, bias, size = weights["weight"], weights.get("bias"), tuple(x.shape[2:])
    kernel, padding, stride, dilation = geometry
    out = tuple(
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, p, s, d in zip(size, kernel, padding, stride, dilation, strict=True)
    )
    if math.prod(size) <= 2 * math.prod(kernel):
        touches = _touches(size, out, *geometry).to(weight)
        y = _every_position_to_every(x, weight, touches, groups).unflatten(1, (-1, *out))
        return _add_channels(y, bias, groups)
    patches = F.unfold(x, kernel, dilation, padding, stride)
    rows = patches.transpose(1, 2).flatten(0, 1)
    y = grouped_linear(rows, weight.flatten(2), bias, groups.repeat(math.prod(out)))
    return y.unflatten(0, (-1, math.prod(out))).transpose(1, 2).unflatten(2, out)


def _conv_transpose2d(module: nn.ConvTranspose2d, weights: Weights, x: Tensor, groups: Groups) -> Tensor:
    """A transposed convolution as one product, whose patches are added up where they overlap."""
    geometry = module.kernel_size, _pair(module.padding), module.stride, module.dilation
    weight, bias, size = weights["weight"], weights.get("bias"), tuple(x.shape[2:])
    kernel, padding, stride, dilation = geometry
    extra = _pair(module.output_padding)
    out = tuple(
        (n - 1) * s - 2 * p + d * (k - 1) + e + 1
        for n, k, p, s, d, e in zip(size, kernel, padding, stride, dilation, extra, strict=True)
    )
    rows = x.flatten(2).transpose(1, 2).flatten(0, 1)
    patches = grouped_linear(
        rows, weight.flatten(2).transpose(1, 2), None, groups.repeat(math.prod(size))
    ).unflatten(0, (-1, math.prod(size)))
    if kernel == stride and padding == extra == (0, 0) and dilation == (1, 1):
        # Patches side by side need no adding up.
        y = rearrange(
            patches, "t (h w) (c a b) -> t c (h a) (w b)", h=size[0], w=size[1], a=kernel[0], b=kernel[1]
        )
    else:
        y = F.fold(patches.transpose(1, 2), out, kernel, dilation, padding, stride)
    return _add_channels(y, bias, groups)


def _every_position_to_every(x: Tensor, weight: Tensor, touches: Tensor, groups: Groups) -> Tensor:
    """The convolution as a full matrix `(out_channels * out_positions, in_channels * in_positions)` per group.

    On a map of a few pixels a kernel covers most of it, and the matrix costs less than unfolding patches.
    """
    out, inside, _ = touches.shape
    full = torch.einsum("goik,pqk->gopiq", weight.flatten(3), touches)
    matrix = full.reshape(weight.shape[0], weight.shape[1] * out, weight.shape[2] * inside)
    return grouped_linear(x.flatten(1), matrix, None, groups)


@lru_cache(maxsize=64)
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
        source = torch.arange(m)[:, None] * s - p + torch.arange(k)[None, :] * d
        axes.append((source[:, None, :] == torch.arange(n)[None, :, None]).float())
    rows, columns = axes
    joined = torch.einsum("aik,bjl->abijkl", rows, columns)
    return joined.reshape(math.prod(out), math.prod(size), math.prod(kernel))


def _add_channels(y: Tensor, bias: Tensor | None, groups: Groups) -> Tensor:
    return y if bias is None else y + bias.index_select(0, groups.index)[:, :, None, None]


def _pair(padding: str | tuple[int, ...]) -> tuple[int, ...]:
    if isinstance(padding, str):
        raise ValueError(f"padding as a word is not supported per node; give numbers instead of {padding!r}")
    return padding


def _sequential(module: nn.Sequential, weights: Weights, x: Tensor, groups: Groups) -> Tensor:
    for name, child in module.named_children():
        x = grouped_call(child, _below(weights, name), x, groups)
    return x


def _below(weights: Weights, name: str) -> Weights:
    prefix = f"{name}."
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def _each_group(module: nn.Module, weights: Weights, x: Tensor, groups: Groups) -> Tensor:
    """The plain loop: one call of the module per group. Slow, obvious, right for any module."""
    parts = [
        torch.func.functional_call(module, {key: value[g] for key, value in weights.items()}, (rows,))
        for g, rows in enumerate(x.split(groups.sizes))
    ]
    return torch.cat(parts)


_RULES: dict[Any, Callable[..., Tensor]] = {
    nn.Linear.forward: _linear,
    nn.LayerNorm.forward: _layer_norm,
    nn.GroupNorm.forward: _group_norm,
    nn.Conv2d.forward: _conv2d,
    nn.ConvTranspose2d.forward: _conv_transpose2d,
    nn.Sequential.forward: _sequential,
}


def grouped_call(module: nn.Module, weights: Weights, x: Tensor, groups: Groups) -> Tensor:
    """Apply `module` to every row of `x`, with the weights of the row's group.

    Equal, to rounding, to `torch.cat([functional_call(module, weights of g, rows of g) for g in groups])`.

    Args:
        module: the template. Its own weights are not used, only its structure. It must treat rows
            independently (no batch norm).
        weights: by the template's parameter names, each with a leading axis `G`.
        x: `(T, ...)`, sorted by group.
        groups: the groups of the rows.

    Returns:
        `(T, ...)`, the module's output for each row.

    Examples:
        >>> template = nn.Sequential(nn.Linear(2, 1), nn.Tanh())
        >>> weights = {"0.weight": torch.zeros(2, 1, 2), "0.bias": torch.tensor([[0.0], [9.0]])}
        >>> grouped_call(template, weights, torch.ones(2, 2), Groups(torch.tensor([0, 1]), count=2))
        tensor([[0.],
                [1.]])
    """
    if not weights:
        return module(x)  # type: ignore[no-any-return]
    # Looked up by what runs, so that a subclass which changes `forward` is never mistaken for its parent.
    rule = _RULES.get(type(module).forward, _each_group)
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module.groups != 1:
        rule = _each_group
    return rule(module, weights, x, groups)
