"""The augmentations of TreeVAE's experiments, and two views of an image for contrastive learning."""

from __future__ import annotations

import torch
from torch import Tensor

from treediff.augment.color_steps import ColorJitter, RandomGray
from treediff.augment.geometric_steps import RandomAffine, RandomFlip, RandomResizedCrop
from treediff.augment.pipeline import Augment

__all__ = ["celeba_augment", "cifar_augment", "contrastive_views", "omniglot_augment"]


def cifar_augment() -> Augment:
    """The contrastive augmentation of TreeVAE for CIFAR and CUBICC, that of SimCLR without its blur.

    Crop of 0.2 to 1 of the area, mirror, jitter (0.4, 0.4, 0.4, 0.1) with probability 0.8, grey with 0.2.

    Source: TreeVAE (arXiv 2306.08984), reference implementation, after SimCLR (arXiv 2002.05709), appendix A.
    """
    return Augment(
        RandomResizedCrop(scale=(0.2, 1.0)),
        RandomFlip(),
        ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8),
        RandomGray(p=0.2),
    )


def celeba_augment() -> Augment:
    """The milder augmentation of TreeVAE for faces: most of the picture stays, hue and colour are kept.

    Crop of 3/4 to 1 of the area at ratios 4/5 to 5/4, mirror, jitter (0.2, 0.2, 0.2) with probability 0.8.
    The fixed cut to the face (148 x 148 pixels, then 64 x 64) is a matter of reading the data, not of chance.

    Source: TreeVAE (arXiv 2306.08984), reference implementation.
    """
    return Augment(
        RandomResizedCrop(scale=(3 / 4, 1.0), ratio=(4 / 5, 5 / 4)),
        RandomFlip(),
        ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, p=0.8),
    )


def omniglot_augment() -> Augment:
    """The simple augmentation of TreeVAE for Omniglot: light strokes on black, moved a little, not mirrored.

    Up to 10 degrees, 1/28 of a side, 0.9 to 1.1 in size, and 0.01 degrees of shear, which is next to nothing.

    Source: TreeVAE (arXiv 2306.08984), reference implementation.
    """
    return Augment(RandomAffine(degrees=10.0, translate=1 / 28, scale=(0.9, 1.1), shear=0.01))


def contrastive_views(
    images: Tensor, augment: Augment | None = None, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Two independent views of every image, for `treediff.layers.contrastive`.

    Args:
        images: `(B, C, H, W)` in [0, 1].
        augment: how a view is made; None for `cifar_augment()`.
        generator: where the numbers come from; None for torch's default generator.

    Returns:
        First and second views, each like `images`. TreeVAE trains on `torch.cat` of the two.

    Raises:
        ValueError: as `Augment`.
        TypeError: as `Augment`.

    Examples:
        >>> first, second = contrastive_views(torch.rand(2, 3, 8, 8))
        >>> first.shape == second.shape == (2, 3, 8, 8)
        True
    """
    augment = cifar_augment() if augment is None else augment
    return augment(images, generator=generator), augment(images, generator=generator)
