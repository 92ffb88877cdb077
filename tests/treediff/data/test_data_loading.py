"""load_dataset: which reader a source goes to, and what is no source."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from datafiles import assert_equal_data, example, write_idx, write_npz, write_pictures

from treediff.data import load_dataset


def test_a_path_called_like_a_data_set_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_idx(tmp_path / "digits", example())
    assert_equal_data(load_dataset(Path("digits")), example())
    assert_equal_data(load_dataset("./digits"), example())
    monkeypatch.setenv("HOME", str(tmp_path))
    assert_equal_data(load_dataset("~/digits"), example())


def test_any_path_object_is_a_source(tmp_path: Path) -> None:
    class Where(os.PathLike[str]):
        def __fspath__(self) -> str:
            return str(write_idx(tmp_path, example()))

    assert_equal_data(load_dataset(Where()), example())


def test_sources_that_are_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^nowhere: expected 'digits', 'mnist', .*found nothing"):
        load_dataset("nowhere")
    (tmp_path / "a.csv").touch()
    with pytest.raises(ValueError, match=r"a\.csv: expected an \.npz file or a folder, found another kind"):
        load_dataset(tmp_path / "a.csv")
    wrong: Any = 3
    with pytest.raises(TypeError, match=r"source: expected a name or a path, found int"):
        load_dataset(wrong)


def test_size_needs_pictures(tmp_path: Path) -> None:
    for source in ("digits", write_npz(tmp_path / "a.npz", example()), write_idx(tmp_path / "b", example())):
        with pytest.raises(ValueError, match=r"size: expected a folder of images.*; leave size out"):
            load_dataset(source, size=8)


@pytest.mark.parametrize(("module", "extra"), [("PIL.Image", "read by Pillow"), ("sklearn.datasets", "scikit-learn")])
def test_missing_extras_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, extra: str) -> None:
    source, name = (write_pictures(tmp_path), "pictures") if "PIL" in module else ("digits", "examples")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{extra}.*not installed; pip install 'treediff\[{name}\]'"):
        load_dataset(source)
