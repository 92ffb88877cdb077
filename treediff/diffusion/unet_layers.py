"""The layers of the U-Net, and the order they stand in on the way down and on the way up.

Letters: `B` batch, `h w` feature map, `E` embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from treediff.diffusion.blocks import UNetBlock
from treediff.diffusion.map_attention import CrossAttention2d, SelfAttention2d
from treediff.diffusion.resampling import Downsample2d, Upsample2d

__all__ = ["UNetLayer", "way_down", "way_up"]

LayerFactory = Callable[[int, int, bool], "UNetLayer"]  # from channels in, channels out, and whether it attends


class UNetLayer(nn.Module):
    """One step of the U-Net at one resolution: a residual block, then attention where there is any.

    Args:
        block: the residual block.
        attention: of the map to itself, or None.
        cross_attention: of the map to the tokens, or None.

    Shapes:
        `(B, inputs, h, w)` and `(B, E)` to `(B, outputs, h, w)`.

    Examples:
        >>> import torch
        >>> layer = UNetLayer(block=UNetBlock(16, 32, embedding=8), attention=SelfAttention2d(32))
        >>> layer(torch.zeros(2, 16, 5, 4), torch.zeros(2, 8)).shape
        torch.Size([2, 32, 5, 4])
    """

    def __init__(
        self,
        *,
        block: UNetBlock,
        attention: SelfAttention2d | None = None,
        cross_attention: CrossAttention2d | None = None,
    ) -> None:
        super().__init__()
        self.block, self.attention, self.cross_attention = block, attention, cross_attention

    def forward(self, x: Tensor, embedding: Tensor, tokens: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """`(B, inputs, h, w)` and `(B, E)` to `(B, outputs, h, w)`; tokens and mask as for `UNet`."""
        x = self.block(x, embedding)
        if self.attention is not None:
            x = self.attention(x)
        if self.cross_attention is not None:
            x = self.cross_attention(x, tokens, mask)
        return x

    def flops(self, positions: int, tokens: int = 0) -> int:
        """Multiplications and additions for one map of so many positions and its tokens."""
        total = self.block.flops(positions)
        if self.attention is not None:
            total += self.attention.flops(positions)
        if self.cross_attention is not None:
            total += self.cross_attention.flops(positions, tokens)
        return total


def way_down(
    layer: LayerFactory,
    channels: Sequence[int],
    attends: Sequence[bool],
    blocks: int,
    skips: list[int],
    **factory: Any,  # noqa: ANN401
) -> nn.ModuleList:
    """The layers from the first level to the last; the channels of each result are added to `skips`."""
    layers = nn.ModuleList()
    for level, outputs in enumerate(channels):
        if level > 0:
            layers.append(Downsample2d(skips[-1], **factory))
            skips.append(skips[-1])
        for _ in range(blocks):
            layers.append(layer(skips[-1], outputs, attends[level]))
            skips.append(outputs)
    return layers


def way_up(
    layer: LayerFactory,
    channels: Sequence[int],
    attends: Sequence[bool],
    blocks: int,
    skips: list[int],
    **factory: Any,  # noqa: ANN401
) -> nn.ModuleList:
    """The layers from the last level to the first; each takes the last of `skips` besides what comes from below."""
    layers, inputs = nn.ModuleList(), channels[-1]
    for level, outputs in reversed(list(enumerate(channels))):
        for _ in range(blocks + 1):
            layers.append(layer(inputs + skips.pop(), outputs, attends[level]))
            inputs = outputs
        if level > 0:
            layers.append(Upsample2d(outputs, **factory))
    return layers
