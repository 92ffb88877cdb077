"""From a leaf's latent to the raw output that a likelihood reads. One decoder per leaf.

Each takes a latent of shape `(D,)` or `(D, h, w)` and returns one observation. They are built from layers that
compute all leaves at once (see `treediff.layers.grouped`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from treediff.layers.blocks import Shape, check_shape, norm, stack
from treediff.layers.encoders import ResidualBlock

__all__ = ["ConvDecoder", "MLPDecoder", "ResidualDecoder"]


class MLPDecoder(nn.Sequential):
    """Hidden layers, then one product to every output: the cheapest decoder of small images, and of vectors.

    Args:
        latent: shape of the latent.
        outputs: shape of one observation.
        hidden: widths of the hidden layers.

    Shapes:
        `(B, *latent)` to `(B, *outputs)`.

    Examples:
        >>> MLPDecoder((8,), (1, 28, 28))(torch.zeros(2, 8)).shape
        torch.Size([2, 1, 28, 28])
    """

    def __init__(self, latent: Shape, outputs: Shape, hidden: Sequence[int] = (48,)) -> None:
        flat = (math.prod(check_shape("latent", latent)),)
        layers = stack(flat, hidden)
        final = nn.Linear([*flat, *hidden][-1], math.prod(outputs))
        super().__init__(nn.Flatten(1), *layers.values(), final, nn.Unflatten(1, outputs))


class ConvDecoder(nn.Sequential):
    """A product to a small map, then transposed convolutions, each doubling it, cropped to the image.

    Args:
        latent: shape of the latent.
        channels: channels of the image.
        size: height and width of the image; any size, also odd or not square.
        width: channels before the last layer; doubled towards the latent.
        smallest: the first map is the image halved until no side exceeds this.

    Shapes:
        `(B, *latent)` to `(B, channels, *size)`.

    Examples:
        >>> ConvDecoder((8,), 1, (28, 28))(torch.zeros(2, 8)).shape
        torch.Size([2, 1, 28, 28])
    """

    def __init__(
        self, latent: Shape, channels: int, size: tuple[int, int], width: int = 16, smallest: int = 7
    ) -> None:
        layers, wide, doublings, start = _start(latent, size, width, smallest)
        for i in range(doublings):
            last = i == doublings - 1
            outputs = channels if last else wide // 2
            layers.append(nn.ConvTranspose2d(wide, outputs, 4, stride=2, padding=1))
            if not last:
                layers += [norm((outputs, 1, 1)), nn.SiLU()]
            wide = outputs
        if not doublings:
            layers.append(nn.Conv2d(wide, channels, 3, padding=1))
        super().__init__(*layers, *_crop(start, doublings, size))


class ResidualDecoder(nn.Sequential):
    """A product to a small map, then residual blocks, each doubling it: the decoder for colour images.

    Args:
        latent: shape of the latent.
        channels: channels of the image.
        size: height and width of the image.
        width: channels of the last block; doubled towards the latent.
        smallest: the first map is the image halved until no side exceeds this.

    Shapes:
        `(B, *latent)` to `(B, channels, *size)`.

    Examples:
        >>> ResidualDecoder((64, 4, 4), 3, (32, 32))(torch.zeros(1, 64, 4, 4)).shape
        torch.Size([1, 3, 32, 32])
    """

    def __init__(
        self, latent: Shape, channels: int, size: tuple[int, int], width: int = 16, smallest: int = 4
    ) -> None:
        layers, wide, doublings, start = _start(latent, size, width, smallest)
        for _ in range(doublings):
            outputs = max(wide // 2, width)
            layers.append(ResidualBlock(wide, outputs, resample="up"))
            wide = outputs
        layers += [norm((wide, 1, 1)), nn.SiLU(), nn.Conv2d(wide, channels, 3, padding=1)]
        super().__init__(*layers, *_crop(start, doublings, size))


def _start(
    latent: Shape, size: tuple[int, int], width: int, smallest: int
) -> tuple[list[nn.Module], int, int, tuple[int, int]]:
    """Layers from the latent to the first map, its channels, how often it is doubled, and its size."""
    latent = check_shape("latent", latent)
    doublings = max(0, math.ceil(math.log2(max(size) / smallest)))
    start = (math.ceil(size[0] / 2**doublings), math.ceil(size[1] / 2**doublings))
    wide = width << max(0, doublings - 1)
    if latent[1:] == start:
        layers: list[nn.Module] = [nn.Conv2d(latent[0], wide, 3, padding=1)]
    else:
        layers = [
            nn.Flatten(1),
            nn.Linear(math.prod(latent), wide * math.prod(start)),
            nn.Unflatten(1, (wide, *start)),
        ]
    return [*layers, norm((wide, 1, 1)), nn.SiLU()], wide, doublings, start


def _crop(start: tuple[int, int], doublings: int, size: tuple[int, int]) -> list[nn.Module]:
    """Cut what the doublings made too large, as evenly from both sides as can be."""
    surplus = [s * 2**doublings - n for s, n in zip(start, size, strict=True)]
    if not any(surplus):
        return []
    top, left = surplus[0] // 2, surplus[1] // 2
    return [nn.ZeroPad2d((-left, left - surplus[1], -top, top - surplus[0]))]
