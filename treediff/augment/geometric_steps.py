"""Steps that move pixels: crop, mirror, and turn, scale, shift or shear."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from treediff.augment._checks import between, check_number, check_probability, check_range
from treediff.augment.steps import GeometricStep

__all__ = ["RandomAffine", "RandomFlip", "RandomResizedCrop"]


@dataclass(frozen=True, kw_only=True)
class RandomResizedCrop(GeometricStep):
    """Cut out a random rectangle and stretch it over the whole image.

    The rectangle's share of the area is uniform in `scale`. Its aspect ratio is log-uniform in the part of
    `ratio` at which a rectangle of that area fits into the image (the fitting ratio next to it, if none
    does), so nothing is drawn in vain and the area is always the one drawn. Its place is uniform, not tied to
    whole pixels.

    Args:
        scale: smallest and largest share of the area, above 0 and at most 1.
        ratio: smallest and largest width / height in pixels, above 0.

    Raises:
        ValueError: if a range is empty or out of bounds.

    Source: Inception-style crops (arXiv 1409.4842), as SimCLR (arXiv 2002.05709), appendix A, uses them.

    Examples:
        >>> quarter = RandomResizedCrop(scale=(0.25, 0.25), ratio=(1.0, 1.0))
        >>> quarter.matrices(torch.ones(1, 4), 8, 8)[0]  # the largest x and y: the lower right corner
        tensor([[0.5000, 0.0000, 0.5000],
                [0.0000, 0.5000, 0.5000],
                [0.0000, 0.0000, 1.0000]])
    """

    draws: ClassVar[int] = 4
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        check_range("scale", self.scale, above=0.0, most=1.0)
        check_range("ratio", self.ratio, above=0.0)

    def matrices(self, uniform: Tensor, height: int, width: int) -> Tensor:
        """The map from the whole image to each image's rectangle, `(B, 3, 3)`."""
        area = between(uniform[:, 0], *self.scale)
        # Sides are shares of the image's own, w and h: w h = area, and w / h = ratio * height / width. Both
        # stay within the image while |log(w / h)| <= -log(area).
        room = -area.log()
        low, high = (math.log(ratio * height / width) for ratio in self.ratio)
        log_low, log_high = (torch.clamp(torch.full_like(room, x), -room, room) for x in (low, high))
        half_log = 0.5 * (log_low + (log_high - log_low) * uniform[:, 1])
        w, h = area.sqrt() * half_log.exp(), area.sqrt() * (-half_log).exp()
        x, y = ((1 - side) * (2 * at - 1) for side, at in ((w, uniform[:, 2]), (h, uniform[:, 3])))
        return _affine_matrices(w, 0.0, x, 0.0, h, y)


@dataclass(frozen=True, kw_only=True)
class RandomFlip(GeometricStep):
    """Mirror left and right with probability `p`.

    Args:
        p: from 0 to 1.

    Raises:
        ValueError: if `p` is not a probability.

    Examples:
        >>> from treediff.augment import Augment
        >>> Augment(RandomFlip(p=1.0))(torch.tensor([[[[0.0, 0.25, 1.0]]]]))
        tensor([[[[1.0000, 0.2500, 0.0000]]]])
    """

    draws: ClassVar[int] = 1
    p: float = 0.5

    def __post_init__(self) -> None:
        check_probability(self.p)

    def matrices(self, uniform: Tensor, height: int, width: int) -> Tensor:
        """-1 or 1 in front of x, `(B, 3, 3)`."""
        sign = 1 - 2 * (uniform[:, 0] < self.p).to(uniform.dtype)
        return _affine_matrices(sign, 0.0, 0.0, 0.0, 1.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class RandomAffine(GeometricStep):
    """Shear, turn, scale and shift the picture, in this order, about its middle; what is uncovered is black.

    A pixel at `p`, counted from the middle with y pointing down, goes to
    `s R(angle) [[1, tan shear], [0, 1]] p + shift`; a positive angle turns clockwise. All parameters are
    uniform. Angles are true on images that are not square, too.

    Args:
        degrees: largest angle of rotation, to either side.
        translate: largest shift to either side, as a share of the width and of the height.
        scale: smallest and largest enlargement; 1 keeps the size.
        shear: largest horizontal shear to either side, **in degrees**, as in torchvision.

    Raises:
        ValueError: if a number is out of bounds or a range is empty.

    Examples:
        >>> RandomAffine(degrees=10, translate=1 / 28).draws
        5
    """

    draws: ClassVar[int] = 5
    degrees: float = 0.0
    translate: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    shear: float = 0.0

    def __post_init__(self) -> None:
        check_number("degrees", self.degrees, most=180.0)
        check_number("translate", self.translate, most=1.0)
        check_range("scale", self.scale, above=0.0)
        check_number("shear", self.shear, most=89.0)

    def matrices(self, uniform: Tensor, height: int, width: int) -> Tensor:
        """The inverse of the map above, in positions from -1 to 1, `(B, 3, 3)`."""
        angle, shift_x, shift_y, size, lean = uniform.unbind(1)
        turn = math.radians(self.degrees) * (2 * angle - 1)
        tangent = (math.radians(self.shear) * (2 * lean - 1)).tan()
        # A share t of the width is 2 t in positions from -1 to 1.
        x, y = (2 * self.translate * (2 * shift - 1) for shift in (shift_x, shift_y))
        zoom = between(size, *self.scale)
        cos, sin = turn.cos() / zoom, turn.sin() / zoom
        # Rotation is a matter of pixels, so x and y trade places at the exchange rate height : width.
        a, b = cos + tangent * sin, (sin - tangent * cos) * (height / width)
        c, d = -sin * (width / height), cos
        return _affine_matrices(a, b, -(a * x + b * y), c, d, -(c * x + d * y))


def _affine_matrices(*entries: Tensor | float) -> Tensor:
    """The first two rows of `(B, 3, 3)` matrices, entry by entry, each `(B,)` or one number for all."""
    like = next(entry for entry in entries if isinstance(entry, Tensor))
    columns = [x if isinstance(x, Tensor) else torch.full_like(like, x) for x in (*entries, 0.0, 0.0, 1.0)]
    return torch.stack(columns, dim=1).view(-1, 3, 3)
