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

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from treediff.layers.convolutions import conv2d, conv_transpose2d
from treediff.layers.groups import Groups, Weights, check_rows, grouped_linear
from treediff.layers.products import scale_and_shift

__all__ = ["Groups", "grouped_call", "grouped_linear"]

_FEW = 64  # numbers that a norm covers


def _linear(module: nn.Linear, weights: Weights, x: Tensor, groups: Groups) -> Tensor:
    return grouped_linear(x, weights["weight"], weights.get("bias"), groups)


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
    nn.Conv2d.forward: conv2d,
    nn.ConvTranspose2d.forward: conv_transpose2d,
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
