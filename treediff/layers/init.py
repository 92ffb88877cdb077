"""Initial weights from the caller's generator."""

from __future__ import annotations

import inspect
import math

import torch
from torch import nn

__all__ = ["initialize"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PROJECTIONS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def initialize(module: nn.Module, *, generator: torch.Generator | None = None) -> None:
    """Give every layer inside `module` fresh weights, in place.

    Linear and convolutional weights and biases are uniform on `+-1/sqrt(fan_in)`, as in PyTorch. `fan_in` is the
    input channels times the size of the kernel (PyTorch takes the output channels for a transposed
    convolution). Norms start as the identity. A custom layer takes part by a method
    `reset_parameters(generator=...)`.

    Args:
        module: the network.
        generator: source of the random numbers; None is PyTorch's default generator.

    Raises:
        TypeError: if a layer owns parameters, and is of none of these kinds without `reset_parameters(generator=...)`.

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
        reset = getattr(layer, "reset_parameters", None)
        if reset is not None and "generator" in inspect.signature(reset).parameters:
            reset(generator=generator)
        elif isinstance(layer, _PROJECTIONS):
            # The weight of a transposed convolution has the input channels first.
            inputs = 0 if isinstance(layer, _TRANSPOSED) else 1
            bound = 1 / math.sqrt(layer.weight.shape[inputs] * math.prod(layer.weight.shape[2:]))
            for parameter in own.values():
                nn.init.uniform_(parameter, -bound, bound, generator=generator)
        elif isinstance(layer, _NORMS):
            layer.reset_parameters()
        else:
            raise TypeError(
                f"{type(layer).__name__} owns the parameters {sorted(own)} but has no "
                "reset_parameters(generator=...); add that method so that its weights can be drawn"
            )
