"""Decoders from a leaf's latent to the raw output that a likelihood reads. One decoder per leaf.

Each decoder takes a latent of shape `(D,)` or `(D, h, w)` and returns one observation. Decoders are built from layers
that compute all leaves at once (see `treediff.layers.grouped.call`), except `ResidualBlock`, which computes leaf by
leaf.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from einops.layers.torch import Rearrange
from torch import nn

from treediff.core.checks import Shape, check_numbers, check_positive, check_shape, check_size
from treediff.layers.encoders import ResidualBlock
from treediff.layers.hidden import norm, stack

__all__ = ["ConvDecoder", "MLPDecoder", "PatchDecoder", "ResidualDecoder"]


class MLPDecoder(nn.Sequential):
    """Hidden layers, then one matmul to all outputs: the cheapest decoder of small images, and of vectors.

    Args:
        latent: shape of the latent.
        outputs: shape of one observation.
        hidden: widths of the hidden layers.
        device: of the parameters.
        dtype: of the parameters.

    Shapes:
        `(B, *latent)` to `(B, *outputs)`.

    Raises:
        ValueError: if a shape or a width has numbers below 1, or is no shape at all.
        TypeError: if a shape is given as one number.

    Examples:
        >>> MLPDecoder((8,), (1, 28, 28))(torch.zeros(2, 8)).shape
        torch.Size([2, 1, 28, 28])
    """

    def __init__(
        self,
        latent: Shape,
        outputs: Shape,
        hidden: Sequence[int] = (48,),
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: Any = {"device": device, "dtype": dtype}
        outputs = check_numbers("outputs", outputs)
        flat = (math.prod(check_shape("latent", latent)),)
        layers = stack(flat, hidden, **factory)
        final = nn.Linear([*flat, *hidden][-1], math.prod(outputs), **factory)
        super().__init__(nn.Flatten(1), *layers.values(), final, nn.Unflatten(1, outputs))


class PatchDecoder(nn.Sequential):
    """Decoder by patches: a few numbers for each patch, and one small network that turns these into the patch.

    The patches do not overlap, so all layers are matmuls, as cheap as an `MLPDecoder`. But the map from numbers to a
    patch is learned once for all places, and is not linear.

    Args:
        latent: shape of the latent.
        channels: channels of the image.
        size: height and width of the image; any size, also odd or not square.
        hidden: width of the layer between the latent and the patches.
        width: numbers per patch.
        patch_hidden: width of the hidden layer of the network that generates a patch.
        patch: side of a patch; 4 by default, 2 where the image is small.
        device: of the parameters.
        dtype: of the parameters.

    Shapes:
        `(B, *latent)` to `(B, channels, *size)`.

    Raises:
        ValueError: if a shape or a width has numbers below 1, or is no shape at all.
        TypeError: if a shape is given as one number.

    Examples:
        >>> PatchDecoder((8,), 1, (28, 28))(torch.zeros(2, 8)).shape
        torch.Size([2, 1, 28, 28])
    """

    def __init__(
        self,
        latent: Shape,
        channels: int,
        size: tuple[int, int],
        hidden: int = 48,
        width: int = 12,
        patch_hidden: int = 48,
        patch: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: Any = {"device": device, "dtype": dtype}
        flat, size = (math.prod(check_shape("latent", latent)),), check_size("size", size)
        if patch is None:
            patch = 4 if min(size) >= 16 else 2
        check_positive(channels=channels, hidden=hidden, width=width, patch_hidden=patch_hidden, patch=patch)
        rows, columns = (-(-side // patch) for side in size)
        super().__init__(
            nn.Flatten(1),
            *stack(flat, (hidden,), **factory).values(),
            nn.Linear(hidden, rows * columns * width, **factory),
            nn.Unflatten(1, (rows * columns, width)),
            nn.SiLU(),
            nn.Linear(width, patch_hidden, **factory),
            nn.SiLU(),
            nn.Linear(patch_hidden, channels * patch**2, **factory),
            Rearrange("b (h w) (c p q) -> b c (h p) (w q)", h=rows, c=channels, p=patch),
            *_crop((rows * patch, columns * patch), 0, size),
        )


class ConvDecoder(nn.Sequential):
    """Projection to a small map, then transposed convolutions that each double it, cropped to the image.

    Args:
        latent: shape of the latent.
        channels: channels of the image.
        size: height and width of the image; any size, also odd or not square.
        width: channels before the last layer; doubled towards the latent.
        smallest: greatest side of the first map, whose size is the image's size halved until it fits.
        device: of the parameters.
        dtype: of the parameters.

    Shapes:
        `(B, *latent)` to `(B, channels, *size)`.

    Raises:
        ValueError: if a shape or a width has numbers below 1, or is no shape at all.
        TypeError: if a shape is given as one number.

    Examples:
        >>> ConvDecoder((8,), 1, (28, 28))(torch.zeros(2, 8)).shape
        torch.Size([2, 1, 28, 28])
    """

    def __init__(
        self,
        latent: Shape,
        channels: int,
        size: tuple[int, int],
        width: int = 16,
        smallest: int = 7,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: Any = {"device": device, "dtype": dtype}
        check_positive(channels=channels, width=width, smallest=smallest)
        layers, wide, doublings, start = _start(latent, size, width, smallest, **factory)
        for i in range(doublings):
            last = i == doublings - 1
            outputs = channels if last else wide // 2
            layers.append(nn.ConvTranspose2d(wide, outputs, 4, stride=2, padding=1, **factory))
            if not last:
                layers += [norm((outputs, 1, 1), **factory), nn.SiLU()]
            wide = outputs
        if not doublings:
            layers.append(nn.Conv2d(wide, channels, 3, padding=1, **factory))
        super().__init__(*layers, *_crop(start, doublings, size))


class ResidualDecoder(nn.Sequential):
    """Projection to a small map, then residual blocks that each double it: the decoder for colour images.

    Args:
        latent: shape of the latent.
        channels: channels of the image.
        size: height and width of the image.
        width: channels of the last block; doubled towards the latent.
        smallest: greatest side of the first map, whose size is the image's size halved until it fits.
        device: of the parameters.
        dtype: of the parameters.

    Shapes:
        `(B, *latent)` to `(B, channels, *size)`.

    Raises:
        ValueError: if a shape or a width has numbers below 1, or is no shape at all.
        TypeError: if a shape is given as one number.

    Examples:
        >>> ResidualDecoder((64, 4, 4), 3, (32, 32))(torch.zeros(1, 64, 4, 4)).shape
        torch.Size([1, 3, 32, 32])
    """

    def __init__(
        self,
        latent: Shape,
        channels: int,
        size: tuple[int, int],
        width: int = 16,
        smallest: int = 4,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: Any = {"device": device, "dtype": dtype}
        check_positive(channels=channels, width=width, smallest=smallest)
        layers, wide, doublings, start = _start(latent, size, width, smallest, **factory)
        for _ in range(doublings):
            outputs = max(wide // 2, width)
            layers.append(ResidualBlock(wide, outputs, resample="up", **factory))
            wide = outputs
        final = nn.Conv2d(wide, channels, 3, padding=1, **factory)
        layers += [norm((wide, 1, 1), **factory), nn.SiLU(), final]
        super().__init__(*layers, *_crop(start, doublings, size))


def _start(
    latent: Shape,
    size: tuple[int, int],
    width: int,
    smallest: int,
    **factory: Any,  # noqa: ANN401
) -> tuple[list[nn.Module], int, int, tuple[int, int]]:
    """Return layers from the latent to the first map, its channels, the number of doublings, and its size."""
    latent, size = check_shape("latent", latent), check_size("size", size)
    doublings = max(0, math.ceil(math.log2(max(size) / smallest)))
    start = (math.ceil(size[0] / 2**doublings), math.ceil(size[1] / 2**doublings))
    wide = width << max(0, doublings - 1)
    if latent[1:] == start:
        layers: list[nn.Module] = [nn.Conv2d(latent[0], wide, 3, padding=1, **factory)]
    else:
        layers = [
            nn.Flatten(1),
            nn.Linear(math.prod(latent), wide * math.prod(start), **factory),
            nn.Unflatten(1, (wide, *start)),
        ]
    return [*layers, norm((wide, 1, 1), **factory), nn.SiLU()], wide, doublings, start


def _crop(start: tuple[int, int], doublings: int, size: tuple[int, int]) -> list[nn.Module]:
    """Return the layers that crop the surplus of the doublings, as evenly on both sides as possible."""
    surplus = [s * 2**doublings - n for s, n in zip(start, size, strict=True)]
    if not any(surplus):
        return []
    top, left = surplus[0] // 2, surplus[1] // 2
    return [nn.ZeroPad2d((-left, left - surplus[1], -top, top - surplus[0]))]
