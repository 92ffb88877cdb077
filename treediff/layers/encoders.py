"""Encoders from an observation to the features at the bottom of the ladder.

Each encoder returns features of the requested shape: a vector `(width,)`, or a map `(channels, h, w)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from treediff.core.checks import Shape, check_numbers, check_positive, check_shape, check_size
from treediff.layers.hidden import norm, stack

__all__ = ["ConvEncoder", "MLPEncoder", "ResidualBlock", "ResidualEncoder"]


class MLPEncoder(nn.Sequential):
    """Hidden layers on the flattened observation: vectors, tables, text features, or small images.

    Args:
        inputs: shape of one observation.
        features: shape of the result.
        hidden: widths of the hidden layers before the result.
        device: of the parameters.
        dtype: of the parameters.

    Shapes:
        `(B, *inputs)` to `(B, *features)`.

    Raises:
        ValueError: if a shape or a width has numbers below 1, or is no shape at all.
        TypeError: if a shape is given as one number.

    Examples:
        >>> MLPEncoder((20,), (16,))(torch.zeros(2, 20)).shape
        torch.Size([2, 16])
    """

    def __init__(
        self,
        inputs: Shape,
        features: Shape,
        hidden: Sequence[int] = (512, 256),
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        features = check_shape("features", features)
        flat = (math.prod(check_numbers("inputs", inputs)),)
        widths = [*check_numbers("hidden", hidden, some=False), math.prod(features)]
        layers = stack(flat, widths, device=device, dtype=dtype)
        super().__init__(nn.Flatten(1), *layers.values(), nn.Unflatten(1, features))


def _halvings(size: tuple[int, int], smallest: int) -> list[tuple[int, int]]:
    """Return sizes from the image down to `smallest`, each half the size before, rounded up."""
    sizes = [size]
    while min(sizes[-1]) > smallest:
        sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
    return sizes


class ConvEncoder(nn.Sequential):
    """Patch embedding and strided convolutions, then one projection to the features.

    Args:
        channels: channels of the image.
        size: height and width of the image.
        features: shape of the result: maps are pooled to the shape of a map, and flattened for a vector.
        width: channels of the patches; doubled by each later convolution.
        patch: side of a patch; 4 by default, 2 where the image is small.
        device: of the parameters.
        dtype: of the parameters.

    Shapes:
        `(B, channels, *size)` to `(B, *features)`.

    Raises:
        ValueError: if a shape or a width has numbers below 1, or is no shape at all.
        TypeError: if a shape is given as one number.

    Examples:
        >>> ConvEncoder(1, (28, 28), (128,))(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 128])
    """

    def __init__(
        self,
        channels: int,
        size: tuple[int, int],
        features: Shape,
        width: int = 32,
        patch: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: Any = {"device": device, "dtype": dtype}
        size, features = check_size("size", size), check_shape("features", features)
        smallest = 4 if len(features) == 1 else max(features[1:])
        if patch is None:
            patch = 4 if min(size) >= 4 * smallest else 2
        check_positive(channels=channels, width=width, patch=patch)
        sizes = _halvings((-(-size[0] // patch), -(-size[1] // patch)), smallest)
        surplus = [patch * n - s for n, s in zip(sizes[0], size, strict=True)]
        layers: list[nn.Module] = [nn.ZeroPad2d((0, surplus[1], 0, surplus[0]))] if any(surplus) else []
        layers += [nn.Conv2d(channels, width, patch, stride=patch, **factory), nn.SiLU()]
        for i, _ in enumerate(sizes[1:]):
            layers += [nn.Conv2d(width << i, width << (i + 1), 3, stride=2, padding=1, **factory), nn.SiLU()]
        super().__init__(*layers, *_to_features((width << (len(sizes) - 1), *sizes[-1]), features, **factory))


def _to_features(inputs: Shape, features: Shape, **factory: Any) -> list[nn.Module]:  # noqa: ANN401
    if len(features) == 1:
        layers: list[nn.Module] = [nn.Flatten(1), nn.Linear(math.prod(inputs), features[0], **factory)]
    else:
        layers = [] if inputs[1:] == features[1:] else [nn.AdaptiveAvgPool2d(features[1:])]
        layers.append(nn.Conv2d(inputs[0], features[0], 3, padding=1, **factory))
    return [*layers, norm(features, **factory), nn.SiLU()]


class ResidualBlock(nn.Module):
    """Norm, activation and convolution, twice, added to the input (He et al., arXiv 1603.05027).

    The branch starts small, scaled by 0.1 as in TreeVAE's residual encoder, so that a deep stack starts near
    the identity. A 1x1 convolution adapts the input where the number of channels changes.

    Args:
        inputs: channels in.
        outputs: channels out.
        resample: 'down' halves the map (rounded up), 'up' doubles it, 'keep' keeps its size.
        device: of the parameters.
        dtype: of the parameters.

    Shapes:
        `(B, inputs, h, w)` to `(B, outputs, h', w')`.

    Raises:
        ValueError: if `resample` is none of these words, or a number of channels is below 1.

    Examples:
        >>> ResidualBlock(8, 16, resample="down")(torch.zeros(1, 8, 6, 6)).shape
        torch.Size([1, 16, 3, 3])
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        resample: str = "keep",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: Any = {"device": device, "dtype": dtype}
        check_positive(inputs=inputs, outputs=outputs)
        if resample not in ("keep", "down", "up"):
            raise ValueError(f"resample must be 'keep', 'down' or 'up', found {resample!r}")
        self.resample = resample
        self.branch = nn.Sequential(
            norm((inputs, 1, 1), **factory),
            nn.SiLU(),
            nn.Conv2d(inputs, outputs, 3, padding=1, **factory),
            norm((outputs, 1, 1), **factory),
            nn.SiLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, **factory),
        )
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, **factory)

    def extra_repr(self) -> str:
        """Return the kind of resampling, for `print(block)`."""
        return f"resample={self.resample!r}"

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, inputs, h, w)` to `(B, outputs, h', w')`."""
        if self.resample == "up":
            x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
        y = torch.add(self.skip(x), self.branch(x), alpha=0.1)
        return F.avg_pool2d(y, 2, ceil_mode=True) if self.resample == "down" else y


class ResidualEncoder(nn.Sequential):
    """Stem and residual blocks, each of which halves the map: the encoder for colour images.

    Args:
        channels: channels of the image.
        size: height and width of the image.
        features: shape of the result.
        width: channels of the stem; doubled by each block up to `max_width`.
        max_width: greatest number of channels of a block.
        device: of the parameters.
        dtype: of the parameters.

    Shapes:
        `(B, channels, *size)` to `(B, *features)`.

    Raises:
        ValueError: if a shape or a width has numbers below 1, or is no shape at all.
        TypeError: if a shape is given as one number.

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
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: Any = {"device": device, "dtype": dtype}
        size, features = check_size("size", size), check_shape("features", features)
        check_positive(channels=channels, width=width, max_width=max_width)
        smallest = 4 if len(features) == 1 else max(features[1:])
        sizes = _halvings(size, smallest)
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1, **factory)]
        for _ in sizes[1:]:
            outputs = min(2 * width, max_width)
            layers.append(ResidualBlock(width, outputs, resample="down", **factory))
            width = outputs
        layers += [norm((width, 1, 1), **factory), nn.SiLU()]
        super().__init__(*layers, *_to_features((width, *sizes[-1]), features, **factory))
