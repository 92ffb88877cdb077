"""What images and settings must be like, and uniform numbers stretched to a range."""

from __future__ import annotations

import math

from torch import Tensor

from treediff.core.checks import float_advice


def check_images(images: Tensor) -> None:
    if images.ndim != 4:
        raise ValueError(
            f"expected images of shape (batch, channels, height, width); found {tuple(images.shape)}; "
            "give a single image a batch axis with image[None]"
        )
    if not images.is_floating_point():
        raise TypeError(
            f"expected float images in [0, 1]; found {images.dtype}; convert them with {float_advice(images.dtype)}"
        )


def check_channels(images: Tensor) -> None:
    if images.shape[1] not in (1, 3):
        raise ValueError(
            f"colour steps need 3 channels (red, green, blue) or 1 (grey); found {images.shape[1]} in images "
            f"of shape {tuple(images.shape)}; leave colour steps out for other data"
        )


def check_probability(p: float) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"p is a probability from 0 to 1; found {p}")


def check_number(name: str, value: float, most: float = math.inf) -> None:
    if not (0 <= value <= most and math.isfinite(value)):
        raise ValueError(f"{name} must be from 0 to {most}, found {value}")


def check_range(name: str, values: tuple[float, float], *, above: float, most: float = math.inf) -> None:
    low, high = values
    if not (above < low <= high <= most and math.isfinite(high)):
        raise ValueError(f"{name} is a pair (smallest, largest), above {above:g} and at most {most:g}; found {values}")


def between(uniform: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * uniform
