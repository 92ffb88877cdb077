"""Initial weights from a generator that the caller owns."""

from __future__ import annotations

import math

import torch
from torch import nn

__all__ = ["initialize"]


def initialize(module: nn.Module, *, generator: torch.Generator | None = None) -> None:
    """Give every layer inside `module` fresh weights, in place.

    Linear and convolutional weights and biases are uniform on `+-1/sqrt(fan_in)`, which is PyTorch's default; norms
    start as the identity. A layer of your own takes part by having `reset_parameters(generator=...)`.

    Args:
        module: the network.
        generator: where the randomness comes from; None is PyTorch's default generator.

    Raises:
        TypeError: if a layer owns parameters and is neither known nor has `reset_parameters(generator=...)`.

    Examples:
        >>> layer = nn.Linear(4, 1)
        >>> initialize(layer, generator=torch.Generator().manual_seed(0))
        >>> bool(layer.weight.abs().max() <= 0.5)
        True
    """
    for layer in module.modules():
        own = dict(layer.named_parameters(recurse=False))
        if not own:
            continue
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d):
            # A transposed convolution keeps its input channels first.
            axes = (0, 2, 3) if isinstance(layer, nn.ConvTranspose2d) else tuple(range(1, layer.weight.ndim))
            bound = 1 / math.sqrt(math.prod(layer.weight.shape[axis] for axis in axes))
            for parameter in own.values():
                nn.init.uniform_(parameter, -bound, bound, generator=generator)
        elif isinstance(layer, nn.LayerNorm | nn.GroupNorm | nn.BatchNorm1d | nn.BatchNorm2d):
            layer.reset_parameters()
        elif "generator" in getattr(getattr(layer, "reset_parameters", None), "__annotations__", {}):
            layer.reset_parameters(generator=generator)  # type: ignore[operator]
        else:
            raise TypeError(
                f"{type(layer).__name__} owns the parameters {sorted(own)} but has no "
                "reset_parameters(generator=...); add that method so that its weights can be drawn"
            )
