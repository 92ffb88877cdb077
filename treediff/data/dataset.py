"""Data set that every reader returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["ImageDataset"]


@dataclass(frozen=True, eq=False, repr=False)
class ImageDataset:
    """Data set with a training and a test split.

    Images are float32 in [0, 1], `(n, C, H, W)`; a table of features is float32 `(n, F)`, as stored. Labels
    are int64 `(n,)` counting from 0, or None where the source has none; `class_names[label]` names a class.
    """

    name: str
    train_images: torch.Tensor
    train_labels: torch.Tensor | None
    test_images: torch.Tensor
    test_labels: torch.Tensor | None
    class_names: tuple[str, ...] | None

    def __repr__(self) -> str:
        """Return shapes instead of pixels."""
        train, test = tuple(self.train_images.shape), tuple(self.test_images.shape)
        return f"ImageDataset({self.name!r}, train={train}, test={test}, class_names={self.class_names})"
