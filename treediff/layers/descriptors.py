"""Descriptors of images that need no learning: upright shapes, and histograms of gradients.

Letters: `B` batch, `C H W` image, `h w` cells, `O` orientations.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from treediff.core.checks import check_positive

__all__ = ["Deskew", "GradientHistograms"]


class Deskew(nn.Module):
    """Shear and shift of each image that makes its shape upright and puts it in the middle.

    The intensities are the masses `m` of pixels at `(x, y)`, with their means, variance and covariance:

        image'(x, y) = image(x + mean_x + s y, y + mean_y),  s = cov(x, y) / var(y)

    where `x` and `y` count from the middle. Afterwards the covariance of the shape is 0, but for what bilinear
    interpolation and the border of the image change. Slanted handwriting becomes upright; of a photograph, which fills
    its image, hardly anything changes.

    Args:
        most: greatest shear `|s|`.

    Shapes:
        `(B, C, H, W)` to `(B, C, H, W)`; channels are added up for the masses, where less than 0 counts as 0, and are
        moved together.

    Raises:
        ValueError: if `most` is not above 0.

    Examples:
        >>> slanted = torch.eye(9)[None, None]
        >>> Deskew()(slanted)[0, 0].sum(0).argmax().item()
        4
    """

    def __init__(self, most: float = 1.0) -> None:
        super().__init__()
        if not most > 0:
            raise ValueError(f"most must be above 0, found {most}")
        self.most = most

    def forward(self, x: Tensor) -> Tensor:
        """Move images `(B, C, H, W)`."""
        height, width = x.shape[2:]
        down = torch.arange(height, device=x.device, dtype=x.dtype)[:, None] - (height - 1) / 2
        right = torch.arange(width, device=x.device, dtype=x.dtype) - (width - 1) / 2
        mass = x.clamp_min(0).sum(1)
        mass = mass / mass.sum((1, 2), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        means = [(mass * place).sum((1, 2)) for place in (right, down)]
        away = [place - mean[:, None, None] for place, mean in zip((right, down), means, strict=True)]
        variance = (mass * away[1].square()).sum((1, 2))
        shear = (mass * away[0] * away[1]).sum((1, 2)) / variance.clamp_min(torch.finfo(x.dtype).eps)
        shear = shear.clamp(-self.most, self.most)
        from_x = right + (means[0] + shear * down).T[:, :, None]
        from_y = (down + means[1][:, None, None]).expand_as(mass)
        # `grid_sample` counts places from -1 to 1 between the middles of the outermost pixels.
        half = [max(1, side - 1) / 2 for side in (width, height)]
        return F.grid_sample(x, torch.stack([from_x / half[0], from_y / half[1]], 3), align_corners=True)

    def extra_repr(self) -> str:
        """Return the setting, for `print(layer)`."""
        return f"most={self.most}"


class GradientHistograms(nn.Module):
    """Histograms of the orientations of gradients in cells of an image: shapes and textures, whatever the brightness.

    A pixel votes with the length of its gradient `(right - left, below - above)` for the two orientations nearest to
    its own, in proportion. Light to dark and dark to light are one orientation. Channels vote one by one. Cells overlap
    by a quarter on each side. The result is the root of the shares of all votes, which has the length 1: distances of
    images are Hellinger distances of histograms.

    Args:
        cell: side of a cell in pixels.
        orientations: `O`, over half a turn.

    Shapes:
        `(B, C, H, W)` to `(B, O h w)`, where `h = H // cell` and `w = W // cell`.

    Raises:
        TypeError: if a number is not whole.
        ValueError: if a number is below 1, or images are smaller than a cell.

    Source: Dalal and Triggs, "Histograms of oriented gradients for human detection" (2005), without blocks; roots as
    in Arandjelovic and Zisserman, "Three things everyone should know to improve object retrieval" (2012).

    Examples:
        >>> GradientHistograms(cell=4)(torch.rand(2, 1, 28, 28)).shape
        torch.Size([2, 392])
    """

    def __init__(self, cell: int = 4, orientations: int = 8) -> None:
        super().__init__()
        check_positive(cell=cell, orientations=orientations)
        self.cell, self.orientations = cell, orientations

    def forward(self, x: Tensor) -> Tensor:
        """Map images `(B, C, H, W)` to histograms."""
        if min(x.shape[2:]) < self.cell:
            raise ValueError(f"images must have at least {self.cell} pixels a side, found {tuple(x.shape[2:])}")
        padded = F.pad(x, (1, 1, 1, 1))
        across = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
        down = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
        length = torch.hypot(across, down)
        turn = torch.atan2(down, across).remainder(math.pi) / math.pi * self.orientations
        first = turn.floor()
        places = torch.stack([first, first + 1], 1).long().remainder(self.orientations).flatten(1, 2)
        votes = torch.stack([length * (1 - turn + first), length * (turn - first)], 1).flatten(1, 2)
        whole = x.new_zeros(len(x), self.orientations, *x.shape[2:]).scatter_add_(1, places, votes)
        margin = self.cell // 4
        cells = F.avg_pool2d(F.pad(whole, (margin,) * 4), self.cell + 2 * margin, self.cell).flatten(1)
        total = cells.sum(1, keepdim=True)
        return (cells / total.masked_fill(total == 0, 1)).sqrt()

    def extra_repr(self) -> str:
        """Return the settings, for `print(layer)`."""
        return f"cell={self.cell}, orientations={self.orientations}"
