"""Checks of arrays as read from a source, and their conversion to an `ImageDataset`; every reader ends here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from treediff.core.checks import WHITE
from treediff.core.rows import Rows
from treediff.data.dataset import ImageDataset

Array: TypeAlias = npt.NDArray[Any]
Split: TypeAlias = tuple[Rows, torch.Tensor | None]


_PIXELS = {str(dtype).removeprefix("torch.") for dtype in WHITE}
_RESCALE = "images / 255 for pixels from 0 to 255, (images + 1) / 2 for those from -1 to 1"


def check_pixels(array: Array, where: object) -> bool:
    """Raise ValueError unless shape and dtype are those of pixels with channels last, or of float features.

    The range of bool, uint8 and uint16 is known; the range of other integers is not, so such pixels are refused.

    Returns:
        whether these are pixels of whole numbers, whose values need no check.
    """
    is_image = array.ndim in (3, 4)
    if array.ndim not in (2, 3, 4) or array.size == 0:
        raise ValueError(
            f"{where}: expected at least one row of images, (n, H, W) or (n, H, W, C), or features, (n, F); "
            f"found shape {array.shape}"
        )
    if array.ndim == 4 and array.shape[3] not in (1, 3):
        advice = ".transpose(0, 2, 3, 1) moves channels last"
        if array.shape[3] in (2, 4):
            advice = "lay transparent parts on white: x = x / 255; x[..., :-1] * x[..., -1:] + 1 - x[..., -1:]"
        raise ValueError(
            f"{where}: expected channels last, (n, H, W, C) with C of 1 (grey) or 3 (colour), found shape "
            f"{array.shape}; {advice}"
        )
    whole = is_image and array.dtype.name in _PIXELS
    if array.dtype.kind != "f" and not whole:
        raise ValueError(f"{where}: {_refusal(array, is_image)}")
    return whole


def to_images(array: Array, where: object) -> Rows:
    """Return pixels with channels last, or float features, as rows; floating-point numbers are checked."""
    if check_pixels(array, where):
        return Rows(array)
    is_image = array.ndim in (3, 4)
    if is_image:
        array = np.moveaxis(array.reshape(*array.shape[:3], -1), 3, 1)
    # A float64 beyond float32 becomes infinite, and is reported below.
    with np.errstate(over="ignore"):
        values = array.astype(np.float32, order="C")
    if not np.isfinite(values).all() or (is_image and (values.min() < 0 or values.max() > 1)):
        limits = "pixels in [0, 1] (or bool, uint8, uint16)" if is_image else "finite features"
        advice = f"rescale them: {_RESCALE}" if is_image else "leave out or fill in such rows"
        raise ValueError(f"{where}: expected {limits}, found {array.min():.4g} to {array.max():.4g}; {advice}")
    return Rows(torch.from_numpy(values))


def _refusal(array: Array, is_image: bool) -> str:
    """Return the reason why an array that is not float is refused, and advice."""
    found = f"found {array.dtype} of shape {array.shape}"
    if array.dtype.kind not in "biu":
        return f"expected real numbers, {found}"
    if is_image:
        return (
            f"expected bool, uint8, uint16 or float images, {found}, from {array.min()} to {array.max()}, with an "
            f"unknown value of white; divide by it: {_RESCALE}"
        )
    return (
        f"expected float features, {found}; give flat pixels as images, with .reshape(n, H, W), and features as "
        ".astype(np.float32)"
    )


def to_labels(array: Array, rows: int, where: object) -> torch.Tensor:
    if array.shape not in ((rows,), (rows, 1)):
        raise ValueError(f"{where}: expected {rows} labels, one per image, found shape {array.shape}")
    if array.dtype.kind not in "iu":
        raise ValueError(f"{where}: expected integer labels, found {array.dtype}; convert with .astype(int)")
    labels = array.astype(np.int64).reshape(rows)
    if labels.min() < 0:
        raise ValueError(f"{where}: expected labels that count from 0, found {labels.min()}")
    return torch.from_numpy(labels)


def to_dataset(name: str, where: object, train: Split, test: Split, class_names: Sequence[str] | None) -> ImageDataset:
    if train[0].shape[1:] != test[0].shape[1:]:
        shapes = [tuple(split[0].shape[1:]) for split in (train, test)]
        raise ValueError(f"{where}: expected one shape, found {shapes[0]} and for test {shapes[1]}")
    largest = max((int(labels.max()) for _, labels in (train, test) if labels is not None), default=-1)
    if class_names is not None and largest >= len(class_names):
        raise ValueError(f"{where}: expected labels below {len(class_names)} (class names), found {largest}")
    return ImageDataset(name, *train, *test, None if class_names is None else tuple(class_names))
