"""Residual block of the U-Net, and its parts.

Letters: `B` batch, `C h w` feature map, `E` embedding width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from treediff.core.checks import check_positive, check_times
from treediff.layers.attention import Attention, check_dropout

__all__ = [
    "AdaGroupNorm",
    "CrossAttention2d",
    "Downsample2d",
    "SelfAttention2d",
    "TimestepEmbedding",
    "UNetBlock",
    "Upsample2d",
    "ZeroConv2d",
    "ZeroLinear",
]


def groups_of(channels: int) -> int:
    """Return the number of groups of a norm: 16 channels in each group where 16 divides `channels`, else more.

    Fewer channels in a group do not fill the vector registers of a CPU. With two channels in a group, as in 32 groups
    of 64 channels, PyTorch's GroupNorm takes many times as long on channels_last maps, above all in bfloat16.
    """
    return math.gcd(channels, max(1, channels // 16))


class ZeroLinear(nn.Linear):
    """Linear layer that starts at zero, so that a residual branch with this last layer adds nothing at first."""

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set weight and bias to zero; nothing is drawn from the generator."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


class ZeroConv2d(nn.Conv2d):
    """Convolution that starts at zero, like `ZeroLinear`."""

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set weight and bias to zero; nothing is drawn from the generator."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


class TimestepEmbedding(nn.Module):
    r"""Embedding of a time as a vector: sinusoids, then Linear, SiLU, Linear.

        s_i = cos(1000 t f_i), s_{F+i} = sin(1000 t f_i), f_i = 10000^(-i/F), i = 0 ... F-1

    Args:
        embedding: width `E` of the vector.
        frequencies: number `F` of frequencies.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shapes:
        `(B,)` times from 0 to 1, to `(B, E)`.

    Raises:
        ValueError: if a number is below 1.
        TypeError: if a number is not whole.

    Source: DDPM (arXiv 2006.11239), appendix B, with time from 0 to 1 in place of 0 to 1000.

    Examples:
        >>> TimestepEmbedding(16)(torch.tensor([0.0, 0.5, 1.0])).shape
        torch.Size([3, 16])
    """

    def __init__(
        self,
        embedding: int,
        frequencies: int = 32,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: Any = {"device": device, "dtype": dtype}
        check_positive(embedding=embedding, frequencies=frequencies)
        self.frequencies = frequencies
        self.hidden = nn.Linear(2 * frequencies, embedding, **factory)
        self.out = nn.Linear(embedding, embedding, **factory)

    def forward(self, t: Tensor) -> Tensor:
        """Map times `(B,)` to vectors `(B, E)`.

        Raises:
            TypeError: if the times are not floating point.
            ValueError: if the times are not `(B,)`, or (read on a CPU only) not from 0 to 1.
        """
        if t.ndim != 1:
            raise ValueError(f"expected times of shape (B,), one for each image, found {tuple(t.shape)}")
        check_times(t)
        # In half precision 1000 t would be off by several radians.
        t = t if t.dtype == torch.float64 else t.float()
        steps = torch.arange(self.frequencies, dtype=t.dtype, device=t.device) / self.frequencies
        angles = 1000 * t[:, None] * torch.exp(-math.log(10000) * steps)
        waves = torch.cat((angles.cos(), angles.sin()), dim=1)
        embedding: Tensor = self.out(F.silu(self.hidden(waves.to(self.hidden.weight.dtype))))
        return embedding

    def extra_repr(self) -> str:
        """Return the number of frequencies as text."""
        return f"frequencies={self.frequencies}"


class AdaGroupNorm(nn.Module):
    """GroupNorm with scale and shift from an embedding, which starts as a plain norm.

        [scale, shift] = W e + b        y = norm(x) (1 + scale) + shift

    Args:
        channels: channels of the map.
        embedding: width `E` of the embedding.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shapes:
        `(B, C, h, w)` and `(B, E)` to `(B, C, h, w)`.

    Raises:
        ValueError: if a number is below 1.
        TypeError: if a number is not whole.

    Source: Dhariwal and Nichol (arXiv 2105.05233), section 3.

    Examples:
        >>> AdaGroupNorm(32, 16)(torch.zeros(2, 32, 5, 4), torch.zeros(2, 16)).shape
        torch.Size([2, 32, 5, 4])
    """

    def __init__(
        self,
        channels: int,
        embedding: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(channels=channels, embedding=embedding)
        self.norm = nn.GroupNorm(groups_of(channels), channels, affine=False)
        self.project = ZeroLinear(embedding, 2 * channels, device=device, dtype=dtype)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Normalise `(B, C, h, w)`, then scale and shift by the embedding `(B, E)`."""
        scale, shift = self.project(embedding)[:, :, None, None].chunk(2, dim=1)
        return torch.addcmul(shift, self.norm(x), 1 + scale)


class UNetBlock(nn.Module):
    """Residual block: norm, SiLU, convolution, adaptive norm, SiLU, dropout, convolution, added to the input.

    The block starts as its skip: the identity, or a 1x1 convolution where the number of channels changes.

    Args:
        inputs: channels in.
        outputs: channels out.
        embedding: width `E` of the embedding, which already includes SiLU: apply SiLU once, for all blocks.
        dropout: share of the activations that is dropped in training.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shapes:
        `(B, inputs, h, w)` and `(B, E)` to `(B, outputs, h, w)`.

    Raises:
        ValueError: if a number is below 1, or `dropout` is not in [0, 1).
        TypeError: if a number is not whole.

    Source: Dhariwal and Nichol (arXiv 2105.05233), section 3.

    Examples:
        >>> UNetBlock(16, 32, embedding=8)(torch.zeros(2, 16, 5, 4), torch.zeros(2, 8)).shape
        torch.Size([2, 32, 5, 4])
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        embedding: int,
        dropout: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: Any = {"device": device, "dtype": dtype}
        check_positive(inputs=inputs, outputs=outputs)
        self.norm1 = nn.GroupNorm(groups_of(inputs), inputs, **factory)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, **factory)
        self.norm2 = AdaGroupNorm(outputs, embedding, **factory)
        self.dropout = nn.Dropout(check_dropout(dropout))
        self.conv2 = ZeroConv2d(outputs, outputs, 3, padding=1, **factory)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, **factory)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Map `(B, inputs, h, w)` and `(B, E)` to `(B, outputs, h, w)`."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h, embedding))))
        y: Tensor = self.skip(x) + h
        return y


class SelfAttention2d(nn.Module):
    """Self-attention between all positions of a map: norm, attention, added to the input.

    The output projection starts at zero, so the block starts as the identity.

    Args:
        channels: channels of the map.
        heads: number of heads of the attention; must divide the channels.
        device: device of the parameters.
        dtype: dtype of the parameters.

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
        """Map `(B, C, h, w)` to `(B, C, h, w)`."""
        return x + _to_map(self.attention(_to_tokens(self.norm(x))), x)


class CrossAttention2d(nn.Module):
    """Cross-attention of all positions of a map to given tokens: norm, attention, added to the input.

    The output projection starts at zero, so the block starts as the identity.

    Args:
        channels: channels of the map.
        context: width of the tokens.
        heads: number of heads of the attention; must divide the channels.
        device: device of the parameters.
        dtype: dtype of the parameters.

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
        """Map `(B, C, h, w)`, `(B, S, context)` and `(B, S)`, True = may be attended to, to `(B, C, h, w)`."""
        return x + _to_map(self.attention(_to_tokens(self.norm(x)), tokens, mask), x)


def _attention(channels: int, context: int | None, heads: int, **factory: Any) -> Attention:  # noqa: ANN401
    attention = Attention(channels, context, heads, **factory)
    attention.out = ZeroLinear(channels, channels, **factory)
    return attention


def _to_tokens(x: Tensor) -> Tensor:
    """Reshape `(B, C, h, w)` to `(B, h * w, C)`: a view of a channels_last map."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _to_map(tokens: Tensor, like: Tensor) -> Tensor:
    """Reshape `(B, h * w, C)` to `(B, C, h, w)`, channels_last."""
    rows: Tensor = tokens.unflatten(1, like.shape[2:])
    return rows.permute(0, 3, 1, 2)


class Downsample2d(nn.Module):
    """Strided 3x3 convolution that halves a map, rounded up.

    Args:
        channels: channels of the map.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shapes:
        `(B, C, h, w)` to `(B, C, ceil(h / 2), ceil(w / 2))`.

    Raises:
        ValueError: if `channels` is below 1.
        TypeError: if `channels` is not a whole number.

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
        """Map `(B, C, h, w)` to `(B, C, ceil(h / 2), ceil(w / 2))`."""
        y: Tensor = self.conv(x)
        return y


class Upsample2d(nn.Module):
    """Nearest-neighbour doubling of a map, a 3x3 convolution, and a cut to the given size.

    Args:
        channels: channels of the map.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shapes:
        `(B, C, h, w)` to `(B, C, H, W)`, where `H` is `2h` or `2h - 1`, and `W` likewise.

    Raises:
        ValueError: if `channels` is below 1.
        TypeError: if `channels` is not a whole number.

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
        """Map `(B, C, h, w)` to `(B, C, *size)`.

        Raises:
            ValueError: if the size is not twice the size of `x`, or one less.
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
        """Return doubling and convolution in one: weights `(C, C, 4, 4)` of a transposed convolution of stride 2.

        On the doubled map neighbouring weights multiply the same pixel. With their sum the pixel is multiplied once: 16
        multiplications for a pixel of `x` and its four copies, in place of 36.
        """
        eye = torch.eye(3, device=self.conv.weight.device, dtype=self.conv.weight.dtype)
        pairs = F.pad(eye, (0, 0, 0, 1)) + F.pad(eye, (0, 0, 1, 0))  # rows of weights w0, w0 + w1, w1 + w2, w2
        kernel: Tensor = torch.einsum("pi,qj,oxij->xopq", pairs.flip(0), pairs.flip(0), self.conv.weight)
        return kernel
