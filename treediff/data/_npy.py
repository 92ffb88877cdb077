"""Reader of folders with arrays in `.npy` files, whose images stay on the disk until they are indexed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from treediff.core.rows import Rows
from treediff.data._arrays import Array, Split, check_pixels, to_dataset, to_labels
from treediff.data._tools import DAMAGE
from treediff.data.dataset import ImageDataset


def holds_npy(folder: Path) -> bool:
    return (folder / "train_images.npy").is_file()


def read_npy_folder(folder: Path) -> ImageDataset:
    splits: list[Split] = []
    for part in ("train", "test"):
        path = folder / f"{part}_images.npy"
        if not path.is_file():
            found = sorted(other.name for other in folder.iterdir())[:8]
            raise FileNotFoundError(f"{folder}: expected train_images.npy and test_images.npy, found only {found}")
        images = _opened(path)
        check_pixels(images, path)
        labels = folder / f"{part}_labels.npy"
        splits.append((Rows(images), to_labels(_opened(labels), len(images), labels) if labels.is_file() else None))
    return to_dataset(folder.resolve().name, folder, splits[0], splits[1], None)


def _opened(path: Path) -> Array:
    try:
        array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except DAMAGE as error:
        raise ValueError(f"{path}: expected an array as np.save writes it, found damage: {error}") from error
    return array
