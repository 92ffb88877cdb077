"""Pictures, presets and comparisons for the tests of augmentations."""

import torch
from torch import Tensor

from treediff.augment import (
    Augment,
    ColorJitter,
    RandomAffine,
    RandomFlip,
    RandomGray,
    RandomResizedCrop,
    celeba_augment,
    cifar_augment,
    omniglot_augment,
)

PRESETS = {"cifar": cifar_augment, "celeba": celeba_augment, "omniglot": omniglot_augment}
EVERYTHING = Augment(
    RandomFlip(),
    RandomAffine(degrees=30, translate=0.2, scale=(0.7, 1.4), shear=10),
    ColorJitter(brightness=0.5, contrast=0.5, saturation=0.5, hue=0.5, p=0.7),
    RandomResizedCrop(scale=(0.3, 1.0)),
    RandomGray(p=0.3),
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
