"""Tokens of an input: patches of an image, linear maps of a vector, or custom."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor, nn

from treediff.core.checks import check_batch, check_positive

__all__ = ["ImageTokens", "Tokens", "VectorTokens"]


class Tokens(Protocol):
    """Interface of a module from inputs to tokens."""

    @property
    def inputs(self) -> tuple[int, ...]:
        """Shape of one input."""

    @property
    def count(self) -> int:
        """Number of tokens, `S`."""

    @property
    def width(self) -> int:
        """Dimensions of a token, `W`."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the parameters; device and dtype of the first are those of the network."""

    def check(self, x: Tensor) -> None:
        """Raise TypeError or ValueError unless `x` is a batch of inputs."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return the tokens `(B, S, W)` of inputs `(B, ...)`."""


class ImageTokens(nn.Module):
    """Tokens of an image, one per patch, with learned positions (ViT, Dosovitskiy et al., arXiv 2010.11929, eq. 1).

    Args:
        size: height and width, or one number for both.
        channels: 1 for grey, 3 for colour.
        patch: height and width of a patch; must divide the size.
        width: `W`.
        device: of the parameters.
        dtype: of the parameters.

    Shapes:
        `(B, C, H, W)` in [0, 1] to `(B, S, W)`.

    Raises:
        TypeError: if a number is not whole.
        ValueError: if a number is below 1, or patches do not fill the image.

    Examples:
        >>> ImageTokens(size=28, channels=1, patch=7, width=8)(torch.rand(2, 1, 28, 28)).shape
        torch.Size([2, 16, 8])
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        channels: int,
        patch: int,
        width: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        height, breadth = (size, size) if isinstance(size, int) else size
        check_positive(height=height, width=breadth, channels=channels, patch=patch, token_width=width)
        if height % patch or breadth % patch:
            raise ValueError(f"patches must fill the image; {patch} does not divide {height} and {breadth}")
        self.inputs, self.patch, self.width = (channels, height, breadth), patch, width
        self.count = (height // patch) * (breadth // patch)
        self.embed = nn.Linear(channels * patch**2, width, device=device, dtype=dtype)
        self.position = nn.Parameter(0.02 * torch.randn(self.count, width, device=device, dtype=dtype))

    def check(self, x: Tensor) -> None:
        """Raise TypeError or ValueError unless `x` is a batch of images as the class defines."""
        check_batch(x, self.inputs, self.embed.weight.dtype, (0.0, 1.0), "images")

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens `(B, S, W)` of images `(B, C, H, W)`."""
        patches = rearrange(2 * x - 1, "b c (h p) (w q) -> b (h w) (c p q)", p=self.patch, q=self.patch)
        tokens: Tensor = self.embed(patches) + self.position
        return tokens


class VectorTokens(nn.Module):
    """Tokens of a vector, such as a row of a table or features of a text.

    Args:
        features: dimensions of a vector.
        count: number of tokens.
        width: `W`.
        device: of the parameters.
        dtype: of the parameters.

    Shapes:
        `(B, features)` to `(B, S, W)`.

    Raises:
        TypeError: if a number is not whole.
        ValueError: if a number is below 1.

    Examples:
        >>> VectorTokens(features=5, count=3, width=8)(torch.rand(2, 5)).shape
        torch.Size([2, 3, 8])
    """

    def __init__(
        self,
        features: int,
        count: int,
        width: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(features=features, count=count, token_width=width)
        self.inputs, self.count, self.width = (features,), count, width
        self.embed = nn.Linear(features, count * width, device=device, dtype=dtype)

    def check(self, x: Tensor) -> None:
        """Raise TypeError or ValueError unless `x` is a batch of vectors as the class defines."""
        check_batch(x, self.inputs, self.embed.weight.dtype, None, "vectors")

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens `(B, S, W)` of vectors `(B, features)`."""
        tokens: Tensor = rearrange(self.embed(x), "b (s w) -> b s w", s=self.count)
        return tokens
