"""Residual network for images of 32 to 64 pixels, from pixels to a vector of features.

Letters: `B` batch, `C H W` image, `F` features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from treediff.core.checks import check_positive

__all__ = ["ResNetEncoder"]

Norm = Callable[..., nn.Module]


class ResNetEncoder(nn.Module):
    """Small ResNet with a stem of 3 x 3: the encoder that contrastive learning trains before a tree grows.

    A stem, then stages of `blocks` basic blocks; each stage halves the map and all but the first double the channels.
    The mean over the last map is the vector of `F = width 2^(stages - 1)` features. The first stage halves the map,
    too, which takes a third of the time of a network that does not, on images of 32 pixels.

    Args:
        channels: 1 for grey, 3 for colour.
        width: channels of the first stage.
        stages: number of stages.
        blocks: blocks of each stage.
        norm: builds a norm from its channels and `device`, `dtype`. `nn.BatchNorm2d`, the default, couples the
            instances of a batch in training; a trained network is used in evaluation mode, where they are independent.
        device: of the parameters.
        dtype: of the parameters.

    Shapes:
        `(B, C, H, W)` to `(B, F)`.

    Raises:
        TypeError: if a number is not whole.
        ValueError: if a number is below 1.

    Attributes:
        features: `F`.

    Source: He et al., "Deep residual learning" (arXiv 1512.03385); stem of 3 x 3 without pooling for small images as in
    SimCLR (arXiv 2002.05709), appendix B.9.

    Examples:
        >>> ResNetEncoder(3, width=8)(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 64])
    """

    def __init__(
        self,
        channels: int = 3,
        *,
        width: int = 32,
        stages: int = 4,
        blocks: int = 1,
        norm: Norm = nn.BatchNorm2d,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(channels=channels, width=width, stages=stages, blocks=blocks)
        factory: Any = {"device": device, "dtype": dtype}
        self.stem = nn.Conv2d(channels, width, 3, padding=1, bias=False, **factory)
        self.norm = norm(width, **factory)
        layers, inputs = [], width
        for stage in range(stages):
            for block in range(blocks):
                layers.append(_Block(inputs, width * 2**stage, 1 if block else 2, norm, factory))
                inputs = width * 2**stage
        self.blocks, self.features = nn.Sequential(*layers), inputs

    def forward(self, x: Tensor) -> Tensor:
        """Map images to features."""
        features: Tensor = self.blocks(F.relu(self.norm(self.stem(x)))).mean((2, 3))
        return features


class _Block(nn.Module):
    """Two convolutions, added to the input, which is projected where its shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm, factory: dict[str, Any]) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False, **factory)
        self.first_norm = norm(outputs, **factory)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False, **factory)
        self.second_norm = norm(outputs, **factory)
        self.skip: nn.Module = nn.Identity()
        if inputs != outputs or stride > 1:
            skip = nn.Conv2d(inputs, outputs, 1, stride, bias=False, **factory)
            self.skip = nn.Sequential(skip, norm(outputs, **factory))

    def forward(self, x: Tensor) -> Tensor:
        inside = self.second_norm(self.second(F.relu(self.first_norm(self.first(x)))))
        return F.relu(inside + self.skip(x))
