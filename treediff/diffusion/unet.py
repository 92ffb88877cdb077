"""U-Net from a noisy image and a time to an image of the same size.

The network does not depend on noise schedules or on trees. Conditions besides the time are a vector, which is added to
the embedding of the time, and tokens, which cross-attention reads.

Letters: `B` batch, `C H W` image, `h w` feature map, `E` embedding width, `S` tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute

from treediff.core.checks import check_numbers, check_positive, check_size
from treediff.diffusion.unet_blocks import (
    CrossAttention2d,
    Downsample2d,
    SelfAttention2d,
    TimestepEmbedding,
    UNetBlock,
    Upsample2d,
    ZeroConv2d,
    groups_of,
)

__all__ = ["UNet", "UNetLayer", "way_down", "way_up"]

LayerFactory = Callable[[int, int, bool], "UNetLayer"]  # of channels in, channels out, and attention or not


class UNet(nn.Module):
    r"""U-Net from an image to an image of the same size, through coarser and coarser maps and back.

    The levels have the sizes `size`, `ceil(size / 2)`, `ceil(size / 4)` and so on. On the way down each level has
    `blocks` layers, on the way up `blocks + 1` layers, each of which also reads one map of the way down. Any height
    and width is allowed: nothing is padded, and maps on the way up are cut to the sizes on the way down. At first the
    output is zero. With `patch` the first level has one position for each patch of `patch x patch` pixels, whose
    channels lie side by side (space to depth), and the output is put together again: a quarter of the time at 2, with
    as many channels.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        size: height and width of the images, or one number for both.
        width: channels of the stem.
        multipliers: channels of each level, in units of `width`.
        blocks: layers per level.
        attention: resolutions with attention, each the larger side of a level's maps. The middle always has attention.
        embedding: width `E` of the embedding; `4 * width` by default.
        context: width of the tokens; None for a network without tokens. With tokens, a cross-attention follows each
            self-attention.
        heads: number of heads of every attention; must divide the channels of the levels with attention.
        dropout: share of the activations that is dropped inside the residual blocks, in training.
        patch: side of the patches that the first level reads; must divide height and width.
        checkpoint: keep only the maps between the layers for the backward pass and compute the other maps again: less
            memory, more time, the same values and gradients.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Attributes:
        in_channels: channels of the input.
        out_channels: channels of the output.
        size: `(H, W)` of the images.
        patch: side of a patch.
        sizes: `(h, w)` of each level.
        embedding: width `E` of the embedding.
        context: width of the tokens, or None.

    Raises:
        ValueError: if a number is below 1, no level has a resolution of `attention`, `heads` does not divide the
            channels, `patch` does not divide the size, or `dropout` is not in [0, 1).
        TypeError: if a number is not whole.

    Source: DDPM (arXiv 2006.11239), appendix B; adaptive norms from Dhariwal and Nichol (arXiv 2105.05233), section 3;
    patches as in simple diffusion (Hoogeboom et al., arXiv 2301.11093), section 3.2.

    Examples:
        >>> unet = UNet(1, 1, size=(28, 20), width=16, multipliers=(1, 2), blocks=1, attention=(14,), context=6)
        >>> unet.sizes
        [(28, 20), (14, 10)]
        >>> unet(torch.zeros(2, 1, 28, 20), torch.tensor([0.1, 0.9]), tokens=torch.zeros(2, 3, 6)).shape
        torch.Size([2, 1, 28, 20])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        size: int | tuple[int, int],
        width: int = 64,
        multipliers: Sequence[int] = (1, 2, 2),
        blocks: int = 2,
        attention: Sequence[int] = (),
        embedding: int | None = None,
        context: int | None = None,
        heads: int = 4,
        dropout: float = 0.0,
        patch: int = 1,
        checkpoint: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: Any = {"device": device, "dtype": dtype}
        check_positive(in_channels=in_channels, out_channels=out_channels, width=width, blocks=blocks, patch=patch)
        channels = [width * multiplier for multiplier in check_numbers("multipliers", multipliers)]
        self.in_channels, self.out_channels = in_channels, out_channels
        self.size, self.patch = check_size("size", size), patch
        if any(side % patch for side in self.size):
            raise ValueError(f"patch must divide height and width, found patch={patch} and size={self.size}")
        sides = [side // patch for side in self.size]
        self.sizes = [(-(-sides[0] // 2**i), -(-sides[1] // 2**i)) for i in range(len(channels))]
        self.embedding = 4 * width if embedding is None else embedding
        self.context, self.checkpoint = context, checkpoint
        attends = _levels_with_attention(attention, self.sizes)

        def layer(inputs: int, outputs: int, attends: bool) -> UNetLayer:
            tokens = context if attends else None
            return UNetLayer(
                block=UNetBlock(inputs, outputs, self.embedding, dropout, **factory),
                attention=SelfAttention2d(outputs, heads, **factory) if attends else None,
                cross_attention=None if tokens is None else CrossAttention2d(outputs, tokens, heads, **factory),
            )

        skips = [width]
        self.time = TimestepEmbedding(self.embedding, max(1, width // 2), **factory)
        self.stem = nn.Conv2d(in_channels * patch**2, width, 3, padding=1, **factory)
        self.down = way_down(layer, channels, attends, blocks, skips, **factory)
        self.middle = nn.ModuleList([layer(channels[-1], channels[-1], True), layer(channels[-1], channels[-1], False)])
        self.up = way_up(layer, channels, attends, blocks, skips, **factory)
        self.norm = nn.GroupNorm(groups_of(channels[0]), channels[0], **factory)
        self.out = ZeroConv2d(channels[0], out_channels * patch**2, 3, padding=1, **factory)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        vector: Tensor | None = None,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Run the network.

        Args:
            x: `(B, in_channels, H, W)` images.
            t: `(B,)` times from 0 to 1.
            vector: `(B, E)`, added to the embedding of the time; None adds nothing.
            tokens: `(B, S, context)`, required if the network was built with `context`, and not allowed otherwise.
            mask: True = may be attended to. `(B, S)` booleans; with None all tokens may be attended to.

        Returns:
            `(B, out_channels, H, W)`.

        Raises:
            ValueError: if a shape does not fit, tokens are missing or not allowed, or a time is NaN or outside of
                [0, 1] (read on a CPU only).
            TypeError: if the mask is not boolean, or the times are not floating point.
        """
        self._check(x, t, vector, tokens, mask)
        embedding = self.time(t)
        embedding = F.silu(embedding if vector is None else embedding + vector)
        told = (embedding, tokens, mask)
        x = self.stem(F.pixel_unshuffle(x, self.patch) if self.patch > 1 else x)
        skips = [x]
        for layer in self.down:
            x = layer(x) if isinstance(layer, Downsample2d) else self._run(layer, x, *told)
            skips.append(x)
        for layer in self.middle:
            x = self._run(layer, x, *told)
        for layer in self.up:
            if isinstance(layer, Upsample2d):
                x = layer(x, skips[-1].shape[2:])
            else:
                x = self._run(layer, torch.cat((x, skips.pop()), dim=1), *told)
        y: Tensor = self.out(F.silu(self.norm(x)))
        return F.pixel_shuffle(y, self.patch) if self.patch > 1 else y

    def _run(self, layer: nn.Module, *inputs: Tensor | None) -> Tensor:
        recomputes = self.checkpoint and torch.is_grad_enabled()
        y: Tensor = recompute(layer, *inputs, use_reentrant=False) if recomputes else layer(*inputs)
        return y

    def _check(self, x: Tensor, t: Tensor, vector: Tensor | None, tokens: Tensor | None, mask: Tensor | None) -> None:
        """Raise on inputs that a layer inside would accept, or would refuse without a clear message."""
        if x.ndim != 4 or x.shape[1:] != (self.in_channels, *self.size):
            raise ValueError(
                f"expected images of shape (B, {self.in_channels}, {self.size[0]}, {self.size[1]}), found "
                f"{tuple(x.shape)}; for another size build a UNet with that size, the same weights fit it"
            )
        if t.shape != x.shape[:1]:
            raise ValueError(
                f"expected one time for each image, shape ({len(x)},), found {tuple(t.shape)}; repeat a single time "
                f"with t.expand({len(x)})"
            )
        if vector is not None and vector.shape != (len(x), self.embedding):
            raise ValueError(f"expected a vector of shape {(len(x), self.embedding)}, found {tuple(vector.shape)}")
        if tokens is None and self.context is not None:
            raise ValueError(
                f"this network reads tokens of shape ({len(x)}, S, {self.context}), found none; for no condition, "
                "pass tokens with S = 0"
            )
        if self.context is None and (tokens is not None or mask is not None):
            raise ValueError("this network reads no tokens, found tokens or a mask; build the network with context=")

    def extra_repr(self) -> str:
        """Return the settings that the layers do not show."""
        shown = {name: getattr(self, name) for name in ("size", "patch", "embedding", "context", "checkpoint")}
        return ", ".join(f"{name}={value}" for name, value in shown.items())


def _levels_with_attention(resolutions: Sequence[int], sizes: Sequence[tuple[int, int]]) -> list[bool]:
    """Return for each level whether it has attention."""
    present = [max(size) for size in sizes]
    missing = sorted(set(check_numbers("attention", resolutions, some=False)) - set(present))
    if missing:
        raise ValueError(
            "attention names resolutions, the larger side of a level's maps: expected some of "
            f"{sorted(set(present), reverse=True)}, found {missing}"
        )
    return [resolution in resolutions for resolution in present]


class UNetLayer(nn.Module):
    """Layer of the U-Net at one resolution: a residual block, then attention if there is any.

    Args:
        block: the residual block.
        attention: self-attention of the map, or None.
        cross_attention: cross-attention of the map to the tokens, or None.

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
        """Map `(B, inputs, h, w)` and `(B, E)` to `(B, outputs, h, w)`; tokens and mask as for `UNet`."""
        x = self.block(x, embedding)
        if self.attention is not None:
            x = self.attention(x)
        if self.cross_attention is not None:
            x = self.cross_attention(x, tokens, mask)
        return x


def way_down(
    layer: LayerFactory,
    channels: Sequence[int],
    attends: Sequence[bool],
    blocks: int,
    skips: list[int],
    **factory: Any,  # noqa: ANN401
) -> nn.ModuleList:
    """Build the layers from the first level to the last; the channels of each result are added to `skips`."""
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
    """Build the layers from the last level to the first; each takes the last of `skips` besides the map from below."""
    layers, inputs = nn.ModuleList(), channels[-1]
    for level, outputs in reversed(list(enumerate(channels))):
        for _ in range(blocks + 1):
            layers.append(layer(inputs + skips.pop(), outputs, attends[level]))
            inputs = outputs
        if level > 0:
            layers.append(Upsample2d(outputs, **factory))
    return layers
