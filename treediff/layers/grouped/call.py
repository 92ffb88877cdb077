"""Many copies of one small network, each applied to its own rows, in one call.

A tree has a router, a head and a decoder *per node*. Looping over nodes costs a few hundred tiny operations
per node; running every node on every image computes results that are never read. Here the rows of a batch are
sorted by node and each layer is computed for all nodes at once. The cost grows with the number of rows, not of
nodes.

`grouped_call` runs an ordinary `nn.Module` (the *template*) with a different set of weights for each group of
rows. Linear layers, 2d convolutions, layer and group norms are computed for all groups together, see
`treediff.layers.grouped._steps`. A layer without parameters runs on all rows. Any other module runs in a loop over
groups, which is correct and slow. The loop also runs convolutions with `groups` other than 1, or with padding that is
a string or not zeros. It also runs transposed convolutions with an output padding as large as the stride.

Letters: `T` rows in all, `G` groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from treediff.core.groups import Groups, check_rows
from treediff.layers.grouped._steps import STEPS, Step, linear

__all__ = ["grouped_call", "grouped_linear"]


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, groups: Groups) -> Tensor:
    """Apply a linear layer per group: `y[t] = weight[g] x[t] + bias[g]` where `g` is the group of row `t`.

    Args:
        x: `(T, ..., in_features)`, sorted by group; a row may hold several vectors.
        weight: `(G, out_features, in_features)`.
        bias: `(G, out_features)` or None.
        groups: the groups of the rows.

    Returns:
        `(T, ..., out_features)`.

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
    return linear(None, [weight] if bias is None else [weight, bias], x, groups)


def _each_group(module: nn.Module, weights: Mapping[str, Tensor], x: Tensor, groups: Groups) -> Tensor:
    """Run a plain loop with one call of the module per group: slow, obvious, and correct for any module."""

    def call(g: int, rows: Tensor) -> Tensor:
        own = {key: value[g] for key, value in weights.items()}
        result: Tensor = torch.func.functional_call(module, own, (rows,))
        return result

    parts = [call(g, rows) for g, rows in enumerate(x.split(groups.sizes)) if len(rows)]
    return torch.cat(parts) if parts else call(0, x)


def step_of(module: nn.Module) -> Step | None:
    """Return the step that computes all groups of a module together, or None if there is none."""
    if is_parametrized(module):
        return None
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        plain = module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
        # `fold` does not reach pixels past the last patch.
        within = all(e < s for e, s in zip(module.output_padding, module.stride, strict=True))
        if not (plain and within):
            return None
    if isinstance(module, nn.LayerNorm | nn.GroupNorm) and module.weight is None:
        return None  # without weights it runs on all rows
    # The key is `forward`, so that a subclass with another `forward` never gets the step of its parent.
    return STEPS.get(type(module).forward)


class Layer(NamedTuple):
    """Layer of a template.

    Attributes:
        module: the layer.
        step: computes all groups together; None if there is no such function.
        names: pairs of the layer's name and the template's name of each weight.
    """

    module: nn.Module
    step: Step | None
    names: list[tuple[str, str]]


def layers_of(module: nn.Module, prefix: str = "") -> list[Layer]:
    """Split a network into the layers that run one after the other; nested `Sequential` modules are flattened."""
    if type(module).forward is not nn.Sequential.forward or is_parametrized(module):
        names = [(name, prefix + name) for name, _ in module.named_parameters(remove_duplicate=False)]
        return [Layer(module, step_of(module), names)]
    # Not `named_children`, which leaves out the second occurrence of a layer.
    children = [(child, f"{prefix}{name}.") for name, child in module._modules.items() if child is not None]
    return [layer for child, name in children for layer in layers_of(child, name)]


def apply_layers(layers: Sequence[Layer], weights: Mapping[str, Tensor], x: Tensor, groups: Groups) -> Tensor:
    """Run `grouped_call` for a network that is already split into layers."""
    for module, step, names in layers:
        if step is not None:
            x = step(module, [weights[full] for _, full in names], x, groups)
        elif names:
            x = _each_group(module, {name: weights[full] for name, full in names}, x, groups)
        else:
            x = module(x)
    return x


def grouped_call(module: nn.Module, weights: Mapping[str, Tensor], x: Tensor, groups: Groups) -> Tensor:
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
    missing = [layer.module for layer in layers if not weights.keys() >= {full for _, full in layer.names}]
    if missing:
        raise ValueError(f"there are no weights for {missing[0]}; a layer must not occur in a network twice")
    for weight in weights.values():
        check_rows(x, len(weight), groups)
    return apply_layers(layers, weights, x, groups)
