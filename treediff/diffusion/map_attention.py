"""Attention from the positions of a feature map: to each other, or to given tokens.

Letters: `B` batch, `C h w` feature map, `S` tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from treediff.diffusion.blocks import ZeroLinear, groups_of
from treediff.layers.attention import Attention

__all__ = ["CrossAttention2d", "SelfAttention2d"]


class SelfAttention2d(nn.Module):
    """Every position of a map reads from all positions; norm, attention, added to the input.

    The output projection starts at zero, so the block starts as the identity.

    Args:
        channels: of the map.
        heads: of the attention; must divide the channels.
        device: where the parameters live.
        dtype: of the parameters.

    Shapes:
        `(B, C, h, w)` to `(B, C, h, w)`.

    Raises:
        ValueError: if a number is below 1, or `heads` does not divide `channels`.
        TypeError: if a number is not whole.

    Examples:
        >>> SelfAttention2d(32)(torch.zeros(2, 32, 5, 4)).shape
        torch.Size([2, 32, 5, 4])
    """

    def __init__(
        self,
        channels: int,
        heads: int = 4,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.attention = _attention(channels, None, heads, device=device, dtype=dtype)
        self.norm = nn.GroupNorm(groups_of(channels), channels, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, h, w)` to `(B, C, h, w)`."""
        return x + _to_map(self.attention(_to_tokens(self.norm(x))), x)

    def flops(self, positions: int) -> int:
        """Multiplications and additions for one map of so many positions."""
        return self.attention.flops(positions)


class CrossAttention2d(nn.Module):
    """Every position of a map reads from given tokens; norm, attention, added to the input.

    The output projection starts at zero, so the block starts as the identity.

    Args:
        channels: of the map.
        context: width of the tokens.
        heads: of the attention; must divide the channels.
        device: where the parameters live.
        dtype: of the parameters.

    Shapes:
        `(B, C, h, w)` and `(B, S, context)` to `(B, C, h, w)`.

    Raises:
        ValueError: if a number is below 1, or `heads` does not divide `channels`.
        TypeError: if a number is not whole.

    Examples:
        >>> CrossAttention2d(32, context=6)(torch.zeros(2, 32, 5, 4), torch.zeros(2, 3, 6)).shape
        torch.Size([2, 32, 5, 4])
    """

    def __init__(
        self,
        channels: int,
        context: int,
        heads: int = 4,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.attention = _attention(channels, context, heads, device=device, dtype=dtype)
        self.norm = nn.GroupNorm(groups_of(channels), channels, device=device, dtype=dtype)

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """`(B, C, h, w)`, `(B, S, context)` and `(B, S)`, True = may be attended to, to `(B, C, h, w)`."""
        return x + _to_map(self.attention(_to_tokens(self.norm(x)), tokens, mask), x)

    def flops(self, positions: int, tokens: int) -> int:
        """Multiplications and additions for one map of so many positions that read so many tokens."""
        return self.attention.flops(positions, tokens)


def _attention(channels: int, context: int | None, heads: int, **factory: Any) -> Attention:  # noqa: ANN401
    attention = Attention(channels, context, heads, **factory)
    attention.out = ZeroLinear(channels, channels, **factory)
    return attention


def _to_tokens(x: Tensor) -> Tensor:
    """`(B, C, h, w)` to `(B, h * w, C)`: a view of a channels_last map."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _to_map(tokens: Tensor, like: Tensor) -> Tensor:
    """`(B, h * w, C)` to `(B, C, h, w)`, channels_last."""
    rows: Tensor = tokens.unflatten(1, like.shape[2:])
    return rows.permute(0, 3, 1, 2)
