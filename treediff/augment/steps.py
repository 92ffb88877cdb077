"""What a step is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

__all__ = ["ColorStep", "GeometricStep"]


class GeometricStep(ABC):
    """A step that moves pixels: it turns uniform numbers into one matrix per image, for `warp`."""

    draws: ClassVar[int]
    """How many uniform numbers an image needs."""

    @abstractmethod
    def matrices(self, uniform: Tensor, height: int, width: int) -> Tensor:
        """`(B, draws)` numbers in [0, 1) to `(B, 3, 3)` matrices from output to input positions."""


class ColorStep(ABC):
    """A step that changes colours and leaves pixels where they are."""

    draws: ClassVar[int]
    """How many uniform numbers an image needs."""

    @abstractmethod
    def recolor(self, images: Tensor, uniform: Tensor) -> Tensor:
        """`(B, C, H, W)` images and `(B, draws)` numbers in [0, 1) to images of the same shape."""
