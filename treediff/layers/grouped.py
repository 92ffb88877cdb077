"""Many copies of one small network, each applied to its own rows, in one call.

A tree has a router, a head and a decoder *per node*. Looping over nodes costs a few hundred tiny operations
per node; running every node on every image computes results that nobody reads. Here the rows of a batch are
sorted by node and each layer is computed for all nodes at once: the cost follows the rows that exist, not the
nodes.

`grouped_call` runs an ordinary `nn.Module` (the *template*) with a different set of weights for each group of
rows. Linear layers, 2d convolutions, layer and group norms have a rule that computes all groups together; a
layer without parameters simply runs on all rows; any other module runs in a loop over groups, which is right
and slow. So do convolutions with `groups` other than 1, with padding that is a word or not zeros, and
transposed ones with an output padding as large as the stride.

Letters: `T` rows in all, `G` groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from treediff.layers.products import affine, scale_and_shift, sizes_of

__all__ = ["Groups", "grouped_call", "grouped_linear"]

Weights = Mapping[str, Tensor]

_FEW = 64  # numbers that a norm covers


@dataclass(frozen=True, eq=False)
class Groups:
    """Which group each row belongs to; rows are sorted by group.

    Args:
        index: `(T,)` int64, ascending: the group of each row. Not checked, because looking would stop an
            accelerator's stream.
        count: number of groups `G`; some may have no row.

    Examples:
        >>> Groups(torch.tensor([0, 0, 2]), count=3).sizes
        [2, 0, 1]
    """

    index: Tensor
    count: int
    # What was derived so far. A plain dictionary, because `torch.compile` cannot enter a `cached_property`.
    _derived: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def ends(self) -> Tensor:
        """`(G,)` int32: one past the last row of each group."""
        if "ends" not in self._derived:
            steps = torch.arange(1, self.count + 1, device=self.index.device)
            self._derived["ends"] = torch.searchsorted(self.index, steps).to(torch.int32)
        ends: Tensor = self._derived["ends"]
        return ends

    @property
    def sizes(self) -> list[int]:
        """Rows per group, on the host."""
        if "sizes" not in self._derived:
            self._derived["sizes"] = sizes_of(self.ends)
        sizes: list[int] = self._derived["sizes"]
        return sizes

    def repeat(self, times: int) -> Groups:
        """The groups when each row is replaced by `times` consecutive ones."""
        # Kept, because the layers of one network ask for the same few again and again.
        if times not in self._derived:
            self._derived[times] = Groups(self.index.repeat_interleave(times), self.count)
        repeated: Groups = self._derived[times]
        return repeated


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, groups: Groups) -> Tensor:
    """A linear layer per group: `y[t] = weight[g] x[t] + bias[g]` where `g` is the group of row `t`.

    Args:
        x: `(T, in_features)`, sorted by group.
        weight: `(G, out_features, in_features)`.
        bias: `(G, out_features)` or None.
        groups: the groups of the rows.

    Returns:
        `(T, out_features)`.

    Raises:
        ValueError: if rows, weights and groups do not belong together.

    Examples:
        >>> groups = Groups(torch.tensor([0, 1, 1]), count=2)
        >>> grouped_linear(torch.ones(3, 4), torch.ones(2, 1, 4), torch.tensor([[0.0], [1.0]]), groups)
        tensor([[4.],
                [5.],
                [5.]])
    """
    check_rows(x, len(weight), groups)
    if x.ndim != 2 or weight.ndim != 3 or x.shape[1] != weight.shape[2]:
        raise ValueError(
            "expected rows (T, in_features) and weights (groups, out_features, in_features), found "
            f"{tuple(x.shape)} and {tuple(weight.shape)}"
        )
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        low = torch.get_autocast_dtype(device)
        x, weight = x.to(low), weight.to(low)
    return affine(x, weight, bias, groups.index, groups.ends)


def check_rows(x: Tensor, sets: int, groups: Groups) -> None:
    """Raise ValueError unless rows, groups and sets of weights belong together."""
    if len(x) != len(groups.index) or sets != groups.count:
        raise ValueError(
            f"expected a group for each row and weights for each group, found {len(x)} rows with "
            f"{len(groups.index)} entries in groups.index, and {sets} sets of weights for {groups.count} groups"
        )


def _check_map(module: nn.Conv2d | nn.ConvTranspose2d, x: Tensor, out: tuple[int, ...]) -> None:
    if x.ndim != 4 or x.shape[1] != module.in_channels or min(out) < 1:
        raise ValueError(
            f"expected rows of shape ({module.in_channels}, height, width), no smaller than the kernel, for "
            f"{module}; found {tuple(x.shape[1:])}"
        )


def _linear(module: nn.Linear, weights: Weights, x: Tensor, groups: Groups) -> Tensor:
    weight, bias, inside = weights["weight"], weights.get("bias"), x.shape[1:-1]
    if not inside:
        return grouped_linear(x, weight, bias, groups)
    y = grouped_linear(x.flatten(0, -2), weight, bias, groups.repeat(math.prod(inside)))
    return y.view(*x.shape[:-1], y.shape[1])


def _layer_norm(module: nn.LayerNorm, weights: Weights, x: Tensor, groups: Groups) -> Tensor:
    y = F.layer_norm(x, module.normalized_shape, eps=module.eps)
    shape = (len(x), *[1] * (x.ndim - 1 - len(module.normalized_shape)), *module.normalized_shape)
    return scale_and_shift(y, weights["weight"], weights.get("bias"), groups.index, shape)


def _group_norm(module: nn.GroupNorm, weights: Weights, x: Tensor, groups: Groups) -> Tensor:
    inside = x[:1].numel() // module.num_groups if len(x) else 1
    if inside <= _FEW and not x.shape[1] % module.num_groups:
        # The same numbers; on a CPU the gradient of a group norm takes several times that of a layer norm.
        y = F.layer_norm(x.reshape(len(x), module.num_groups, inside), (inside,), eps=module.eps).view_as(x)
    else:
        y = F.group_norm(x, module.num_groups, eps=module.eps)
    shape = (len(x), module.num_channels, *[1] * (x.ndim - 2))
    return scale_and_shift(y, weights["weight"], weights["bias"], groups.index, shape)


def _conv2d(module: nn.Conv2d, weights: Weights, x: Tensor, groups: Groups) -> Tensor:
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
        y = _every_position_to_every(x, weight, touches, groups)
        return _add_channels(y.view(len(x), module.out_channels, *out), bias, groups)
    patches = F.unfold(x, kernel, dilation, padding, stride)
    rows = patches.transpose(1, 2).flatten(0, 1)
    y = grouped_linear(rows, weight.flatten(2), bias, groups.repeat(math.prod(out)))
    return y.view(len(x), *out, module.out_channels).permute(0, 3, 1, 2)


def _conv_transpose2d(module: nn.ConvTranspose2d, weights: Weights, x: Tensor, groups: Groups) -> Tensor:
    """A transposed convolution as one product, whose patches are added up where they overlap."""
    kernel, padding, stride, dilation = _geometry(module)
    weight, bias, size = weights["weight"], weights.get("bias"), tuple(x.shape[2:])
    extra: tuple[int, ...] = module.output_padding
    out = tuple(
        (n - 1) * s - 2 * p + d * (k - 1) + e + 1
        for n, k, p, s, d, e in zip(size, kernel, padding, stride, dilation, extra, strict=False)
    )
    _check_map(module, x, out)
    rows = x.flatten(2).transpose(1, 2).flatten(0, 1)
    patches = grouped_linear(rows, weight.flatten(2).transpose(1, 2), None, groups.repeat(math.prod(size))).unflatten(
        0, (-1, math.prod(size))
    )
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


def _every_position_to_every(x: Tensor, weight: Tensor, touches: Tensor, groups: Groups) -> Tensor:
    """The convolution as a matrix `(out_channels * out_positions, in_channels * in_positions)` per group.

    On a map of a few pixels a kernel covers most of it, and the matrix costs less than unfolding patches.
    """
    out, inside, _ = touches.shape
    full = torch.einsum("goik,pqk->gopiq", weight.flatten(3), touches)
    matrix = full.reshape(weight.shape[0], weight.shape[1] * out, weight.shape[2] * inside)
    return grouped_linear(x.flatten(1), matrix, None, groups)


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


def _each_group(module: nn.Module, weights: Weights, x: Tensor, groups: Groups) -> Tensor:
    """The plain loop: one call of the module per group. Slow, obvious, right for any module."""

    def call(g: int, rows: Tensor) -> Tensor:
        own = {key: value[g] for key, value in weights.items()}
        result: Tensor = torch.func.functional_call(module, own, (rows,))
        return result

    parts = [call(g, rows) for g, rows in enumerate(x.split(groups.sizes)) if len(rows)]
    return torch.cat(parts) if parts else call(0, x)


_RULES: dict[Any, Callable[..., Tensor]] = {
    nn.Linear.forward: _linear,
    nn.LayerNorm.forward: _layer_norm,
    nn.GroupNorm.forward: _group_norm,
    nn.Conv2d.forward: _conv2d,
    nn.ConvTranspose2d.forward: _conv_transpose2d,
}


def _rule(module: nn.Module) -> Callable[..., Tensor]:
    """How to compute all groups of a module together, if anyone knows."""
    # Looked up by what runs, so that a subclass which changes `forward` is never mistaken for its parent.
    rule = _RULES.get(type(module).forward, _each_group)
    if is_parametrized(module):
        return _each_group
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        plain = module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
        # What lies past the last patch is out of reach of `fold`.
        within = all(e < s for e, s in zip(module.output_padding, module.stride, strict=True))
        if not (plain and within):
            return _each_group
    return rule


class Layer(NamedTuple):
    """One layer of a template: its module, how to compute all groups of it, and what the template calls its weights."""

    module: nn.Module
    rule: Callable[..., Tensor]
    names: dict[str, str]


def layers_of(module: nn.Module, prefix: str = "") -> list[Layer]:
    """A network as the layers that run one after the other; a `Sequential` is looked into, however deep."""
    if type(module).forward is nn.Sequential.forward and not is_parametrized(module):
        # Not `named_children`, which leaves out a layer that stands in the network a second time.
        inside = [layers_of(child, f"{prefix}{name}.") for name, child in module._modules.items() if child is not None]
        return [layer for layers in inside for layer in layers]
    names = {name: prefix + name for name, _ in module.named_parameters(remove_duplicate=False)}
    return [Layer(module, _rule(module), names)]


def apply_layers(layers: Sequence[Layer], weights: Weights, x: Tensor, groups: Groups) -> Tensor:
    """`grouped_call` of a network whose layers are known."""
    for module, rule, names in layers:
        x = rule(module, {name: weights[full] for name, full in names.items()}, x, groups) if names else module(x)
    return x


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

    Raises:
        ValueError: if rows, weights and groups do not belong together, or the template has weights that are
            not given.

    Examples:
        >>> template = nn.Sequential(nn.Linear(2, 1), nn.ReLU())
        >>> weights = {"0.weight": torch.zeros(2, 1, 2), "0.bias": torch.tensor([[-3.0], [9.0]])}
        >>> grouped_call(template, weights, torch.ones(2, 2), Groups(torch.tensor([0, 1]), count=2))
        tensor([[0.],
                [9.]])
    """
    layers = layers_of(module)
    missing = [layer.module for layer in layers if not weights.keys() >= set(layer.names.values())]
    if missing:
        raise ValueError(f"there are no weights for {missing[0]}; a layer must not stand in a network twice")
    for weight in weights.values():
        check_rows(x, len(weight), groups)
    return apply_layers(layers, weights, x, groups)
