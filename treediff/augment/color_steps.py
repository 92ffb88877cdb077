"""Steps that change colours: jitter and grey."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from treediff.augment._checks import between, check_channels, check_number, check_probability
from treediff.augment.color import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    gray,
)
from treediff.augment.steps import ColorStep

__all__ = ["ColorJitter", "RandomGray"]


@dataclass(frozen=True, kw_only=True)
class ColorJitter(ColorStep):
    """Change brightness, contrast, saturation and hue, in this order, of a share `p` of the images.

    Factors are uniform in `[max(0, 1 - strength), 1 + strength]`, the hue's shift in `[-hue, hue]`; a
    strength of 0 skips its part. Results are clamped to [0, 1] after each.

    Args:
        brightness: strength, at least 0; see `adjust_brightness`.
        contrast: strength, at least 0; see `adjust_contrast`.
        saturation: strength, at least 0; see `adjust_saturation`. Without effect on grey images.
        hue: largest shift in turns, at most 0.5; see `adjust_hue`. Without effect on grey images.
        p: probability that an image is changed at all.

    Raises:
        ValueError: if a number is out of bounds.

    Source: SimCLR (arXiv 2002.05709), appendix A, with the four parts in a fixed order.

    Examples:
        >>> from treediff.augment import Augment
        >>> picture = torch.rand(1, 3, 4, 4)
        >>> torch.equal(Augment(ColorJitter())(picture), picture)  # all strengths are 0
        True
    """

    draws: ClassVar[int] = 5
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    p: float = 1.0

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            check_number(name, getattr(self, name))
        check_number("hue", self.hue, most=0.5)
        check_probability(self.p)

    def recolor(self, images: Tensor, uniform: Tensor) -> Tensor:
        """Jittered copies where the first number falls below `p`, the images themselves elsewhere."""
        check_channels(images)
        chosen, *numbers = uniform.unbind(1)
        jittered = images
        parts = (
            (adjust_brightness, self.brightness),
            (adjust_contrast, self.contrast),
            (adjust_saturation, self.saturation),
        )
        for (adjust, strength), number in zip(parts, numbers[:3], strict=True):
            if strength > 0:
                jittered = adjust(jittered, between(number, max(0.0, 1 - strength), 1 + strength))
        if self.hue > 0:
            jittered = adjust_hue(jittered, between(numbers[3], -self.hue, self.hue))
        return torch.where((chosen < self.p).view(-1, 1, 1, 1), jittered, images)


@dataclass(frozen=True, kw_only=True)
class RandomGray(ColorStep):
    """Take the colour away with probability `p`: all three channels become `gray`. Grey images stay.

    Args:
        p: from 0 to 1.

    Raises:
        ValueError: if `p` is not a probability.

    Examples:
        >>> from treediff.augment import Augment
        >>> Augment(RandomGray(p=1.0))(torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1)).flatten()
        tensor([0.1140, 0.1140, 0.1140])
    """

    draws: ClassVar[int] = 1
    p: float = 0.1

    def __post_init__(self) -> None:
        check_probability(self.p)

    def recolor(self, images: Tensor, uniform: Tensor) -> Tensor:
        """Grey where the number falls below `p`."""
        return torch.where((uniform[:, 0] < self.p).view(-1, 1, 1, 1), gray(images), images)
