"""Folders of `.npy` files: the same rows as an `.npz` file, which stay on the disk until they are indexed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from datafiles import assert_equal_data, example, write_npz

from treediff.data import load_dataset


def write(folder: Path) -> Path:
    folder.mkdir()
    for name, array in example().items():
        np.save(folder / f"{name}.npy", array)
    return folder


def test_a_folder_gives_what_an_npz_file_gives(tmp_path: Path) -> None:
    found = load_dataset(write(tmp_path / "mine"))
    assert_equal_data(found, example())
    whole = load_dataset(write_npz(tmp_path / "mine.npz", example()))
    assert torch.equal(found.test_images[:], whole.test_images[:]) and found.name == "mine"
    assert isinstance(found.train_images.data, np.memmap)


def test_labels_may_be_missing_and_features_are_features(tmp_path: Path) -> None:
    for part in ("train", "test"):
        np.save(tmp_path / f"{part}_images.npy", np.eye(4, dtype=np.float32))
    found = load_dataset(tmp_path)
    assert found.train_labels is None and torch.equal(found.train_images[:], torch.eye(4))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "mine")
    np.save(folder / "test_labels.npy", np.zeros(9, np.int64))
    with pytest.raises(ValueError, match=r"expected \d labels, one per image, found shape"):
        load_dataset(folder)
    np.save(folder / "test_images.npy", np.zeros((3, 5, 4), np.int32))
    with pytest.raises(ValueError, match="with an unknown value of white"):
        load_dataset(folder)
    (folder / "test_images.npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match=r"expected an array as np.save writes it, found damage"):
        load_dataset(folder)
    (folder / "test_images.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected train_images.npy and test_images.npy, found only"):
        load_dataset(folder)
