"""Colour arithmetic on whole batches, with one amount per image."""

from __future__ import annotations

import torch
from torch import Tensor

from treediff.augment._checks import check_channels

__all__ = [
    "adjust_brightness",
    "adjust_contrast",
    "adjust_hue",
    "adjust_saturation",
    "gray",
    "hsv_to_rgb",
    "rgb_to_hsv",
]


def gray(images: Tensor) -> Tensor:
    """Luma `0.299 R + 0.587 G + 0.114 B` (ITU-R BT.601): `(B, 3, H, W)` to `(B, 1, H, W)`; grey images stay.

    Raises:
        ValueError: if there are neither 1 nor 3 channels.

    Examples:
        >>> gray(torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)).item()
        0.29899999499320984
    """
    check_channels(images)
    if images.shape[1] == 1:
        return images
    red, green, blue = images.chunk(3, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """`clamp(factor * images)` to [0, 1], with one factor, at least 0, per image: `(B, C, H, W)` and `(B,)`.

    Examples:
        >>> adjust_brightness(torch.full((1, 1, 1, 2), 0.25), torch.tensor([2.0]))
        tensor([[[[0.5000, 0.5000]]]])
    """
    return (images * factor.view(-1, 1, 1, 1)).clamp(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """`clamp(mean + factor * (images - mean))` to [0, 1], where `mean` is the mean of the grey picture.

    Args:
        images: `(B, C, H, W)` with 1 or 3 channels.
        factor: `(B,)`, at least 0; 0 gives an even grey, 1 the picture itself.

    Examples:
        >>> adjust_contrast(torch.tensor([[[[0.25, 0.75]]]]), torch.tensor([2.0]))
        tensor([[[[0., 1.]]]])
    """
    return _blend(gray(images).mean((1, 2, 3), keepdim=True), images, factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """`clamp(luma + factor * (images - luma))` to [0, 1], pixel by pixel; grey images stay.

    Args:
        images: `(B, C, H, W)` with 1 or 3 channels.
        factor: `(B,)`, at least 0; 0 gives the grey picture, 1 the picture itself.

    Examples:
        >>> adjust_saturation(torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1), torch.zeros(1)).flatten()
        tensor([0.2990, 0.2990, 0.2990])
    """
    return _blend(gray(images), images, factor)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by `shift` of a full circle, in HSV; grey images stay.

    Args:
        images: `(B, C, H, W)` with 1 or 3 channels.
        shift: `(B,)` in turns; 1/3 makes red green, green blue and blue red.

    Examples:
        >>> adjust_hue(torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1), torch.tensor([0.5])).flatten()
        tensor([0., 1., 1.])
    """
    check_channels(images)
    if images.shape[1] == 1:
        return images
    hsv = rgb_to_hsv(images)
    turned = hsv[:, :1] + shift.view(-1, 1, 1, 1)
    return hsv_to_rgb(torch.cat([turned, hsv[:, 1:]], dim=1))


def rgb_to_hsv(images: Tensor) -> Tensor:
    """Red, green, blue to hue (in turns, from 0 up to 1), saturation, value: `(B, 3, H, W)` to the same.

    With `V = max`, `c = V - min`: `S = c / V`, and the hue is `(G - B) / 6c`, `1/3 + (B - R) / 6c` or
    `2/3 + (R - G) / 6c`, after the largest channel. Greys have hue 0, black has saturation 0.

    Examples:
        >>> rgb_to_hsv(torch.tensor([0.0, 0.5, 0.5]).view(1, 3, 1, 1)).flatten()
        tensor([0.5000, 1.0000, 0.5000])
    """
    red, green, blue = images.unbind(1)
    value, chroma = images.amax(1), images.amax(1) - images.amin(1)
    sixth = 6 * torch.where(chroma > 0, chroma, 1)
    hue = torch.where(
        red == value,
        (green - blue) / sixth,
        torch.where(green == value, 1 / 3 + (blue - red) / sixth, 2 / 3 + (red - green) / sixth),
    )
    return torch.stack([hue.remainder(1), chroma / torch.where(value > 0, value, 1), value], dim=1)


def hsv_to_rgb(images: Tensor) -> Tensor:
    """Hue (in turns, any number), saturation, value to red, green, blue: `(B, 3, H, W)` to the same.

    Each channel is `V - V S clamp(min(k, 4 - k))` to [0, 1], with `k = (n + 6 H) mod 6` and `n` = 5, 3, 1.

    Examples:
        >>> hsv_to_rgb(torch.tensor([0.5, 1.0, 0.5]).view(1, 3, 1, 1)).flatten()
        tensor([0.0000, 0.5000, 0.5000])
    """
    hue, saturation, value = images.chunk(3, dim=1)
    offsets = torch.tensor([5.0, 3.0, 1.0], dtype=images.dtype, device=images.device).view(1, 3, 1, 1)
    k = (offsets + 6 * hue).remainder(6)
    return value - value * saturation * torch.minimum(k, 4 - k).clamp(0, 1)


def _blend(base: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """`base` at factor 0, `images` at factor 1, beyond them above 1."""
    return torch.lerp(base, images, factor.view(-1, 1, 1, 1)).clamp(0, 1)
