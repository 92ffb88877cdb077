"""Reader of `.npz` files."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path

import numpy as np

from treediff.data._arrays import Array, Split, to_dataset, to_images, to_labels
from treediff.data._tools import DAMAGE
from treediff.data.dataset import ImageDataset

_NPZ_KEYS = ("train_images", "train_labels", "test_images", "test_labels", "class_names")


def read_npz(path: Path) -> ImageDataset:
    arrays = _npz_arrays(path)
    splits: list[Split] = []
    for part in ("train", "test"):
        images = to_images(arrays[f"{part}_images"], f"{path}: {part}_images")
        labels = arrays.get(f"{part}_labels")
        where = f"{path}: {part}_labels"
        splits.append((images, None if labels is None else to_labels(labels, len(images), where)))
    names = arrays.get("class_names")
    if names is not None and (names.ndim != 1 or names.dtype.kind != "U"):
        raise ValueError(
            f"{path}: class_names: expected text, shape (classes,), found {names.dtype}, shape {names.shape}"
        )
    return to_dataset(path.stem, path, splits[0], splits[1], None if names is None else names.tolist())


def _npz_arrays(path: Path) -> dict[str, Array]:
    # np.load does not close a file that it opened itself and then refused.
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError(f"{path}: expected an archive as np.savez writes it, found another kind of file")
        file.seek(0)
        arrays: dict[str, Array] = {}
        reading = "its table of contents"
        try:
            with np.load(file, allow_pickle=False) as archive:
                keys = list(archive.files)
                for reading in keys:
                    if reading in _NPZ_KEYS:
                        arrays[reading] = np.asarray(archive[reading])
        except DAMAGE as error:
            raise ValueError(
                f"{path}: expected plain arrays, found that {reading} cannot be read: {error}. Save numbers, "
                f"and text as np.array([...], dtype=str); objects (pickles) are never loaded"
            ) from error
    unread = [key for key in keys if key not in _NPZ_KEYS]
    if unread:
        warnings.warn(f"{path}: the keys {unread} are not read; the keys that are: {_NPZ_KEYS}", stacklevel=4)
    if not {"train_images", "test_images"} <= set(arrays):
        raise ValueError(f"{path}: expected the keys train_images and test_images, found {keys}")
    return arrays
