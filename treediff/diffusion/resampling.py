"""Feature maps at half and at twice their size.

Letters: `B` batch, `C h w` feature map.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from treediff.diffusion.blocks import layer_flops
from treediff.layers.blocks import check_positive

__all__ = ["Downsample2d", "Upsample2d"]


class Downsample2d(nn.Module):
    """A strided 3x3 convolution that halves a map, rounded up.

    Args:
        channels: of the map.
        device: where the parameters live.
        dtype: of the parameters.

    Shapes:
        `(B, C, h, w)` to `(B, C, ceil(h / 2), ceil(w / 2))`.

    Raises:
        ValueError: if `channels` is below 1.
        TypeError: if `channels` is no whole number.

    Examples:
        >>> Downsample2d(8)(torch.zeros(2, 8, 7, 4)).shape
        torch.Size([2, 8, 4, 2])
    """

    def __init__(
        self, channels: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        check_positive(channels=channels)
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, h, w)` to `(B, C, ceil(h / 2), ceil(w / 2))`."""
        y: Tensor = self.conv(x)
        return y

    def flops(self, positions: int) -> int:
        """Multiplications and additions for one map of so many positions after it."""
        return layer_flops(self.conv, positions)


class Upsample2d(nn.Module):
    """Nearest-neighbour doubling of a map, a 3x3 convolution, and a cut to the size that is wanted.

    Args:
        channels: of the map.
        device: where the parameters live.
        dtype: of the parameters.

    Shapes:
        `(B, C, h, w)` to `(B, C, H, W)`, where `H` is `2h` or `2h - 1`, and `W` likewise.

    Raises:
        ValueError: if `channels` is below 1.
        TypeError: if `channels` is no whole number.

    Examples:
        >>> Upsample2d(8)(torch.zeros(2, 8, 4, 2), size=(7, 4)).shape
        torch.Size([2, 8, 7, 4])
    """

    def __init__(
        self, channels: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        check_positive(channels=channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, device=device, dtype=dtype)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """`(B, C, h, w)` to `(B, C, *size)`.

        Raises:
            ValueError: if the size is not twice that of `x`, or one less.
        """
        height, width = size
        if -(-height // 2) != x.shape[2] or -(-width // 2) != x.shape[3]:
            raise ValueError(
                f"a map of {x.shape[2]}x{x.shape[3]} is doubled to {2 * x.shape[2]}x{2 * x.shape[3]} and may lose one "
                f"row and one column; found the size {height}x{width}"
            )
        y = F.conv_transpose2d(x, self._kernel(), self.conv.bias, stride=2, padding=1)
        return y[:, :, :height, :width]

    def _kernel(self) -> Tensor:
        """Doubling and convolution in one: weights `(C, C, 4, 4)` of a transposed convolution of stride 2.

        On the doubled map neighbouring weights meet the same pixel. Added up first, they are multiplied once: 16
        products for a pixel of `x` and its four copies, in place of 36.
        """
        eye = torch.eye(3, device=self.conv.weight.device, dtype=self.conv.weight.dtype)
        pairs = F.pad(eye, (0, 0, 0, 1)) + F.pad(eye, (0, 0, 1, 0))  # rows of weights w0, w0 + w1, w1 + w2, w2
        kernel: Tensor = torch.einsum("pi,qj,oxij->xopq", pairs.flip(0), pairs.flip(0), self.conv.weight)
        return kernel

    def flops(self, positions: int) -> int:
        """Multiplications and additions for one map of so many positions before it."""
        return 2 * 16 * self.conv.in_channels * self.conv.out_channels * positions
