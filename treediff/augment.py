"""Augmentations of whole batches of images, by kornia, with draws from a generator.

kornia's transformations draw separate parameters for each image from PyTorch's default generator. `Augment` seeds this
generator for the draws and restores its state afterwards.

Letters: `B` images, `C` channels, `H W` height and width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from treediff.core.checks import float_advice
from treediff.core.noise import drawing_from, seed_from

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["Augment", "celeba_augment", "cifar_augment", "contrastive_views", "omniglot_augment"]


class Augment:
    """Sequence of kornia's transformations, as a function of images and a generator.

    Args:
        *steps: modules from `(B, C, H, W)` to `(B, C, H, W)`, such as those of `kornia.augmentation`.

    Raises:
        TypeError: if a step is not a module.

    Examples:
        >>> import kornia.augmentation as K
        >>> augment = Augment(K.RandomResizedCrop((8, 8)), K.RandomHorizontalFlip())
        >>> images, seed = torch.rand(4, 3, 8, 8), torch.Generator().manual_seed
        >>> torch.equal(augment(images, generator=seed(0)), augment(images, generator=seed(0)))
        True
    """

    def __init__(self, *steps: nn.Module) -> None:
        for step in steps:
            if not isinstance(step, nn.Module):
                raise TypeError(
                    f"expected modules such as kornia.augmentation.RandomHorizontalFlip(), found {step!r} of type "
                    f"{type(step).__name__}"
                )
        self.steps = steps

    def __repr__(self) -> str:
        return f"Augment({', '.join(map(repr, self.steps))})"

    @torch.no_grad()
    def __call__(self, images: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return changed images in [0, 1], `(B, C, H, W)`, of the same dtype; half precision is computed in float32.

        Args:
            images: `(B, C, H, W)` in [0, 1], floating point.
            generator: gives the seed of all draws; PyTorch's default generator if not given.

        Raises:
            TypeError: if the images are not floating point.
            ValueError: if the images do not have four dimensions.
        """
        if images.ndim != 4:
            raise ValueError(
                f"expected images of shape (batch, channels, height, width), found {tuple(images.shape)}; give a "
                "single image a batch axis with image[None]"
            )
        if not images.is_floating_point():
            raise TypeError(
                f"expected float images in [0, 1], found {images.dtype}; convert them with {float_advice(images.dtype)}"
            )
        if not len(images):
            return images
        changed = images.float() if images.dtype in (torch.float16, torch.bfloat16) else images
        seed = torch.Generator().manual_seed(seed_from(generator))
        # Autocast would round the matrices of transformations, and so every pixel's position, to bfloat16.
        with drawing_from(seed), torch.autocast(images.device.type, enabled=False):
            for step in self.steps:
                changed = step(changed)
        return changed.clamp(0, 1).to(images.dtype)


def _kornia() -> ModuleType:
    try:
        import kornia.augmentation
    except ImportError as error:
        raise ImportError(f"{error}; augmentations are kornia's: pip install 'treediff[augment]'") from None
    return kornia.augmentation


def cifar_augment(size: int | tuple[int, int] = 32) -> Augment:
    """Return the contrastive augmentation of TreeVAE for CIFAR and CUBICC: SimCLR's without blur.

    Crop of 0.2 to 1 of the area, mirror, jitter (0.4, 0.4, 0.4, 0.1) with probability 0.8, grey with 0.2.

    Args:
        size: height and width of the images, or one number for both.

    Raises:
        ImportError: if kornia is missing.

    Source: TreeVAE (arXiv 2306.08984), reference implementation, after SimCLR (arXiv 2002.05709), appendix A.
    """
    kornia = _kornia()
    return Augment(
        kornia.RandomResizedCrop(_pair(size), scale=(0.2, 1.0)),
        kornia.RandomHorizontalFlip(),
        kornia.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        kornia.RandomGrayscale(p=0.2),
    )


def celeba_augment(size: int | tuple[int, int] = 64) -> Augment:
    """Return the milder augmentation of TreeVAE for faces: most of the image stays, hue and colour are kept.

    Crop of 3/4 to 1 of the area at ratios 4/5 to 5/4, mirror, jitter (0.2, 0.2, 0.2) with probability 0.8. The fixed
    crop to the face (148 x 148 pixels, then 64 x 64) is part of loading the data.

    Args:
        size: height and width of the images, or one number for both.

    Raises:
        ImportError: if kornia is missing.

    Source: TreeVAE (arXiv 2306.08984), reference implementation.
    """
    kornia = _kornia()
    return Augment(
        kornia.RandomResizedCrop(_pair(size), scale=(3 / 4, 1.0), ratio=(4 / 5, 5 / 4)),
        kornia.RandomHorizontalFlip(),
        kornia.ColorJitter(0.2, 0.2, 0.2, p=0.8),
    )


def omniglot_augment() -> Augment:
    """Return the simple augmentation of TreeVAE for Omniglot: light strokes on black, moved a little, not mirrored.

    Up to 10 degrees, 1/28 of a side, 0.9 to 1.1 in size, and 0.01 degrees of shear, which is negligible.

    Raises:
        ImportError: if kornia is missing.

    Source: TreeVAE (arXiv 2306.08984), reference implementation.
    """
    moved = _kornia().RandomAffine(10.0, (1 / 28, 1 / 28), scale=(0.9, 1.1), shear=0.01, p=1.0)
    return Augment(moved)


def contrastive_views(
    images: Tensor, augment: Augment, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Return two independent views of every image, for `treediff.layers.contrastive`.

    Args:
        images: `(B, C, H, W)` in [0, 1].
        augment: function that makes a view.
        generator: source of the draws.

    Raises:
        TypeError: as `Augment`.
        ValueError: as `Augment`.

    Examples:
        >>> first, second = contrastive_views(torch.rand(2, 3, 8, 8), cifar_augment(8))
        >>> first.shape == second.shape == (2, 3, 8, 8)
        True
    """
    return augment(images, generator=generator), augment(images, generator=generator)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size
