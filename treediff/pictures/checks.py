"""Checks of images that come as tensors, for all pictures."""

from __future__ import annotations

from torch import Tensor

from treediff.core.checks import float_advice

__all__ = ["check_images"]


def check_images(images: Tensor, name: str) -> None:
    """Raise TypeError unless images are a float tensor, and ValueError unless all values lie in [0, 1]."""
    if not isinstance(images, Tensor):
        raise TypeError(
            f"{name}: expected a float tensor in [0, 1], found {type(images).__name__}; an array: torch.as_tensor(x), "
            "a list of images: torch.stack(x)"
        )
    if not images.is_floating_point():
        advice = float_advice(images.dtype)
        raise TypeError(f"{name}: expected a float tensor in [0, 1], found {images.dtype}; convert it with {advice}")
    if not images.numel():
        return
    low, high = (float(value) for value in images.detach().aminmax())
    if not (low >= 0 and high <= 1):  # NaN is refused, too
        raise ValueError(
            f"{name}: expected values in [0, 1], found {low:.4g} to {high:.4g}; images from -1 to 1, such as those a "
            "sampler passes to its callback: ((x + 1) / 2).clamp(0, 1)"
        )
