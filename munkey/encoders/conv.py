"""Encoder of images by a small convolutional network.

Letters: `B` batch, `C H W` image, `D` width of a key.
"""

from __future__ import annotations

from torch import Tensor, nn

from munkey.encoders.base import KeyEncoder
from treediff.core.checks import check_positive

__all__ = ["ConvEncoder"]

_GROUPS = 8


class ConvEncoder(KeyEncoder):
    """A convolutional encoder: stages of two convolutions, each with half the size and twice the channels; then a mean.

    GroupNorm, so that a key does not depend on the other images of a batch.

    Args:
        channels: 1 for grey, 3 for colour.
        width: `D`.
        fitted_on: data that the encoder is trained on, one of `FITTED_ON`.
        hidden: channels of the first stage, a multiple of 8.
        stages: number of stages.

    Shapes:
        `(B, C, H, W)` in [0, 1] to `(B, D)`, for any height and width from `2 ** (stages - 1)` on.

    Raises:
        TypeError: if a number is not whole.
        ValueError: if a number is below 1, `hidden` is no multiple of 8, or `fitted_on` is another word.

    Examples:
        >>> import torch
        >>> ConvEncoder(channels=1, width=16, fitted_on="nothing", hidden=8)(torch.rand(2, 1, 28, 20)).shape
        torch.Size([2, 16])
    """

    row_wise = True

    def __init__(self, channels: int, width: int, fitted_on: str, hidden: int = 32, stages: int = 3) -> None:
        super().__init__(width, fitted_on)
        check_positive(channels=channels, hidden=hidden, stages=stages)
        if hidden % _GROUPS:
            raise ValueError(f"hidden must be a multiple of {_GROUPS}, found {hidden}")
        self.config |= {"channels": channels, "hidden": hidden, "stages": stages}
        layers: list[nn.Module] = []
        for stage in range(stages):
            wide = hidden * 2**stage
            for stride in (1, 1) if stage == 0 else (2, 1):
                layers += [nn.Conv2d(channels, wide, 3, stride, 1), nn.GroupNorm(_GROUPS, wide), nn.SiLU()]
                channels = wide
        self.body, self.head = nn.Sequential(*layers), nn.Linear(channels, width)

    def check(self, x: Tensor) -> None:
        """Raise ValueError unless `x` is a batch of images with the encoder's channels."""
        if x.ndim != 4 or x.shape[1] != self.config["channels"]:
            raise ValueError(f"expected images (B, {self.config['channels']}, H, W), found {tuple(x.shape)}")

    def encode(self, x: Tensor) -> Tensor:
        """Return the keys `(B, D)` of a batch, with gradients, to train the encoder."""
        keys: Tensor = self.head(self.body(2 * x - 1).mean((2, 3)))
        return keys
