"""Data set that every reader returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from treediff.core.rows import Rows

__all__ = ["ImageDataset"]


@dataclass(frozen=True, eq=False, repr=False)
class ImageDataset:
    """Data set with a training and a test split.

    Images are `Rows`: indexed, `train_images[:64]`, they are float32 in [0, 1], `(B, C, H, W)`, and `train_images[:]`
    is all of them. Until then pixels stay as they were stored. Features of a table are float32 `(n, F)`, as stored.
    Labels are int64 `(n,)` counting from 0, or None where the source has none; `class_names[label]` names a class.
    """

    name: str
    train_images: Rows
    train_labels: torch.Tensor | None
    test_images: Rows
    test_labels: torch.Tensor | None
    class_names: tuple[str, ...] | None

    def __repr__(self) -> str:
        """Return shapes instead of pixels."""
        train, test = tuple(self.train_images.shape), tuple(self.test_images.shape)
        return f"ImageDataset({self.name!r}, train={train}, test={test}, class_names={self.class_names})"
