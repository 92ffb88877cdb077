"""From an observation to the features at the bottom of the ladder.

Each encoder returns features of the shape it was asked for: a vector `(width,)`, or a map `(channels, h, w)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from treediff.layers.blocks import Shape, check_shape, norm, stack

__all__ = ["ConvEncoder", "MLPEncoder", "ResidualBlock", "ResidualEncoder"]


class MLPEncoder(nn.Sequential):
    """Hidden layers on the flattened observation: vectors, tables, text features, or small images.

    Args:
        inputs: shape of one observation.
        features: shape of the result.
        hidden: widths of the hidden layers before it.

    Shapes:
        `(B, *inputs)` to `(B, *features)`.

    Examples:
        >>> MLPEncoder((20,), (16,))(torch.zeros(2, 20)).shape
        torch.Size([2, 16])
    """

    def __init__(self, inputs: Shape, features: Shape, hidden: Sequence[int] = (512, 256)) -> None:
        features = check_shape("features", features)
        layers = stack((math.prod(inputs),), [*hidden, math.prod(features)])
        super().__init__(nn.Flatten(1), *layers.values(), nn.Unflatten(1, features))


def _halvings(size: tuple[int, int], smallest: int) -> list[tuple[int, int]]:
    """Sizes from the image down to `smallest`, each half the one before, rounded up."""
    sizes = [size]
    while min(sizes[-1]) > smallest:
        sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
    return sizes


class ConvEncoder(nn.Sequential):
    """A patch embedding and strided convolutions, then one product to the features.

    Args:
        channels: channels of the image.
        size: height and width of the image.
        features: shape of the result; a map is reached by pooling, a vector by flattening.
        width: channels of the patches; doubled by each later convolution.
        patch: side of a patch.

    Shapes:
        `(B, channels, *size)` to `(B, *features)`.

    Examples:
        >>> ConvEncoder(1, (28, 28), (128,))(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 128])
    """

    def __init__(
        self, channels: int, size: tuple[int, int], features: Shape, width: int = 32, patch: int | None = None
    ) -> None:
        features = check_shape("features", features)
        smallest = 4 if len(features) == 1 else max(features[1:])
        patch = patch or (4 if min(size) >= 4 * smallest else 2)
        sizes = _halvings((-(-size[0] // patch), -(-size[1] // patch)), smallest)
        surplus = [patch * n - s for n, s in zip(sizes[0], size, strict=True)]
        layers: list[nn.Module] = [nn.ZeroPad2d((0, surplus[1], 0, surplus[0]))] if any(surplus) else []
        layers += [nn.Conv2d(channels, width, patch, stride=patch), nn.SiLU()]
        for i, _ in enumerate(sizes[1:]):
            layers += [nn.Conv2d(width << i, width << (i + 1), 3, stride=2, padding=1), nn.SiLU()]
        super().__init__(*layers, *_to_features((width << (len(sizes) - 1), *sizes[-1]), features))


def _to_features(inputs: Shape, features: Shape) -> list[nn.Module]:
    if len(features) == 1:
        return [nn.Flatten(1), nn.Linear(math.prod(inputs), features[0]), norm(features), nn.SiLU()]
    resize = [] if inputs[1:] == features[1:] else [nn.AdaptiveAvgPool2d(features[1:])]
    return [*resize, nn.Conv2d(inputs[0], features[0], 3, padding=1), norm(features), nn.SiLU()]


class ResidualBlock(nn.Module):
    """Norm, activation and convolution, twice, added to the input (He et al., arXiv 1603.05027).

    The branch starts small, scaled by 0.1 as in TreeVAE's residual encoder, so that a deep stack starts near the
    identity. A 1x1 convolution adapts the input where the number of channels changes.

    Args:
        inputs: channels in.
        outputs: channels out.
        resample: 'down' halves the map, 'up' doubles it, 'keep' leaves it.

    Raises:
        ValueError: if `resample` is none of the three.

    Examples:
        >>> ResidualBlock(8, 16, resample="down")(torch.zeros(1, 8, 6, 6)).shape
        torch.Size([1, 16, 3, 3])
    """

    def __init__(self, inputs: int, outputs: int, *, resample: str = "keep") -> None:
        super().__init__()
        if resample not in ("keep", "down", "up"):
            raise ValueError(f"resample must be 'keep', 'down' or 'up', found {resample!r}")
        self.resample = resample
        self.branch = nn.Sequential(
            norm((inputs, 1, 1)),
            nn.SiLU(),
            nn.Conv2d(inputs, outputs, 3, padding=1),
            norm((outputs, 1, 1)),
            nn.SiLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1),
        )
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def extra_repr(self) -> str:
        """How the map is resized."""
        return f"resample={self.resample!r}"

    def forward(self, x: Tensor) -> Tensor:
        """`(B, inputs, h, w)` to `(B, outputs, h', w')`."""
        if self.resample == "up":
            x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
        y = torch.add(self.skip(x), self.branch(x), alpha=0.1)
        return F.avg_pool2d(y, 2, ceil_mode=True) if self.resample == "down" else y


class ResidualEncoder(nn.Sequential):
    """A stem and residual blocks, each halving the map: the encoder for colour images.

    Args:
        channels: channels of the image.
        size: height and width of the image.
        features: shape of the result.
        width: channels of the stem; doubled by each block up to `max_width`.
        max_width: most channels of a block.

    Shapes:
        `(B, channels, *size)` to `(B, *features)`.

    Examples:
        >>> ResidualEncoder(3, (32, 32), (64, 4, 4))(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 64, 4, 4])
    """

    def __init__(
        self,
        channels: int,
        size: tuple[int, int],
        features: Shape,
        width: int = 32,
        max_width: int = 256,
    ) -> None:
        features = check_shape("features", features)
        smallest = 4 if len(features) == 1 else max(features[1:])
        sizes = _halvings(size, smallest)
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1)]
        for _ in sizes[1:]:
            outputs = min(2 * width, max_width)
            layers.append(ResidualBlock(width, outputs, resample="down"))
            width = outputs
        layers += [norm((width, 1, 1)), nn.SiLU()]
        super().__init__(*layers, *_to_features((width, *sizes[-1]), features))
