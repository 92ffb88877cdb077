"""Moving pixels: an affine map and bilinear interpolation."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

__all__ = ["warp"]


def warp(images: Tensor, matrices: Tensor) -> Tensor:
    """Resample every image through an affine map, bilinearly.

    `output(p) = input(M p)`, with positions `p = (x, y, 1)` running from -1 to 1 between the image's outer
    edges. Positions outside of the image are black; within half a pixel of its edge the edge pixels are
    continued. Nothing is blurred beforehand, so shrinking by much aliases.

    Args:
        images: `(B, C, H, W)` in [0, 1].
        matrices: `(B, 3, 3)` with last row `(0, 0, 1)`.

    Returns:
        `(B, C, H, W)` in [0, 1].

    Examples:
        >>> import torch
        >>> mirror = torch.diag(torch.tensor([-1.0, 1.0, 1.0]))[None]
        >>> warp(torch.tensor([[[[0.0, 0.25, 1.0]]]]), mirror)
        tensor([[[[1.0000, 0.2500, 0.0000]]]])
    """
    if images.numel() == 0:
        return images  # affine_grid refuses empty batches
    grid = F.affine_grid(matrices[:, :2], list(images.shape), align_corners=False)
    pixels = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    # Padding with zeros inside of grid_sample would also darken the rim of a crop that touches the edge.
    inside = (grid.abs() <= 1).all(-1).unsqueeze(1)
    return (pixels * inside).clamp(0, 1)  # the four bilinear weights may add up to a rounding above 1
