"""Hidden layers for vectors and for maps: project, normalise, activate."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import nn

from treediff.core.checks import Shape, check_numbers


def norm(shape: Shape, **factory: Any) -> nn.Module:  # noqa: ANN401
    """A norm of one instance: LayerNorm for vectors, GroupNorm for maps.

    A group of channels has 8 of them where 8 divides their number, else more. A vector of one number has no
    norm: it would always come out as the same.
    """
    if len(shape) == 1:
        return nn.LayerNorm(shape[0], **factory) if shape[0] > 1 else nn.Identity()
    return nn.GroupNorm(math.gcd(shape[0], max(1, shape[0] // 8)), shape[0], **factory)


def project(inputs: Shape, width: int, **factory: Any) -> nn.Module:  # noqa: ANN401
    """A linear layer for vectors, a 3x3 convolution for maps."""
    if len(inputs) == 1:
        return nn.Linear(inputs[0], width, **factory)
    return nn.Conv2d(inputs[0], width, 3, padding=1, **factory)


def stack(inputs: Shape, widths: Sequence[int], **factory: Any) -> OrderedDict[str, nn.Module]:  # noqa: ANN401
    """Hidden layers: project, normalise, activate, for each width."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, width in enumerate(check_numbers("hidden", widths, some=False)):
        layers[f"project{i}"] = project(inputs, width, **factory)
        inputs = (width, *inputs[1:])
        layers[f"norm{i}"] = norm(inputs, **factory)
        layers[f"act{i}"] = nn.SiLU()
    return layers
