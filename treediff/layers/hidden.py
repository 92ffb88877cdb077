"""Hidden layers for vectors and for maps: project, normalise, activate."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import nn

from treediff.core.checks import Shape, check_numbers


def norm(shape: Shape, **factory: Any) -> nn.Module:  # noqa: ANN401
    """Build a norm over one instance: LayerNorm for vectors, GroupNorm for maps.

    A group has 8 channels where 8 divides their number, otherwise more. A vector of one number has no norm,
    because a norm would always return the same number.
    """
    if len(shape) == 1:
        return nn.LayerNorm(shape[0], **factory) if shape[0] > 1 else nn.Identity()
    return nn.GroupNorm(math.gcd(shape[0], max(1, shape[0] // 8)), shape[0], **factory)


def project(inputs: Shape, width: int, **factory: Any) -> nn.Module:  # noqa: ANN401
    """Build a linear layer for vectors, a 3x3 convolution for maps."""
    if len(inputs) == 1:
        return nn.Linear(inputs[0], width, **factory)
    return nn.Conv2d(inputs[0], width, 3, padding=1, **factory)


def stack(inputs: Shape, widths: Sequence[int], **factory: Any) -> OrderedDict[str, nn.Module]:  # noqa: ANN401
    """Build hidden layers: project, normalise, activate, for each width."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, width in enumerate(check_numbers("hidden", widths, some=False)):
        layers[f"project{i}"] = project(inputs, width, **factory)
        inputs = (width, *inputs[1:])
        layers[f"norm{i}"] = norm(inputs, **factory)
        layers[f"act{i}"] = nn.SiLU()
    return layers
