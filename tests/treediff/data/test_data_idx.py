"""The IDX reader: what comes out equals what was written, and what does not fit is refused by name."""

from __future__ import annotations

import gzip
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from datafiles import assert_equal_data, example, from_torch, idx_bytes, quick, write_idx, write_npz
from hypothesis import given
from hypothesis import strategies as st

from treediff.data import load_dataset


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("dot", ["-", "."])
def test_idx_gives_back_what_was_written(tmp_path: Path, dot: str, gz: bool) -> None:
    found = load_dataset(write_idx(tmp_path / "mine", example(), dot, gz))
    assert_equal_data(found, example())
    assert (found.name, found.class_names) == ("mine", None)


IMAGES, LABELS = "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (IMAGES, idx_bytes(np.zeros(6, np.uint8)), r"IDX magic number 0x0803.*, found 0x0801; is this"),
        (LABELS, idx_bytes(np.zeros((2, 5, 4), np.uint8)), r"0x0801 \(uint8, 1-D\), found 0x0803"),
        (IMAGES, b"", r"magic number 0x0803 .*found 0x0000"),
        (IMAGES, idx_bytes(example()["train_images"])[:-1], r"136 bytes for shape .*, found 135; the file"),
        (IMAGES, idx_bytes(example()["train_images"]) + b"0", r"shape \(6, 5, 4\), found 137; the file"),
        (IMAGES, idx_bytes(example()["train_images"])[:10], r"bytes for shape .*, found 10; the file is cut"),
        (IMAGES, idx_bytes(np.zeros((0, 5, 4), np.uint8)), r"at least one row.*found shape \(0, 5, 4\)"),
        (LABELS, idx_bytes(np.zeros(3, np.uint8)), r"expected 2 labels, one per image, found shape \(3,\)"),
    ],
)
def test_bad_idx(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = write_idx(tmp_path, example()) / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: .*{message}"):
        load_dataset(tmp_path)


@quick
@given(st.data())
def test_damaged_gzip_is_refused_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    path = write_idx(tmp_path, example(), gz=True) / f"{IMAGES}.gz"
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[at] ^= data.draw(st.integers(1, 255))
    else:
        del content[at:]
    path.write_bytes(content)
    try:
        found = load_dataset(tmp_path)
    except ValueError as error:
        assert str(error).startswith(str(path))
    else:
        assert_equal_data(found, example())


@pytest.mark.parametrize("content", [b"not gzip at all", gzip.compress(bytes(99), mtime=0)[:-9]])
def test_bad_gzip(tmp_path: Path, content: bytes) -> None:
    path = write_idx(tmp_path, example(), gz=True) / f"{IMAGES}.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: expected a gzip file, found dam.*fetch"):
        load_dataset(tmp_path)


def test_a_missing_idx_file(tmp_path: Path) -> None:
    (write_idx(tmp_path, example()) / LABELS).unlink()
    message = rf"one of them {LABELS} or {LABELS}\.gz or .*, found only \['t10k-images-.*can come in"
    with pytest.raises(FileNotFoundError, match=message):
        load_dataset(tmp_path)


def test_what_an_idx_file_of_another_dtype_holds_is_said_and_can_come_as_npz(tmp_path: Path) -> None:
    arrays = example()
    folder, path = write_idx(tmp_path / "idx", arrays), tmp_path / "mine.npz"
    floats = (arrays["train_images"] / 255).astype(">f4")
    header = struct.pack(">4I", 0xD03, *floats.shape)
    (folder / "train-images-idx3-ubyte").write_bytes(header + floats.tobytes())
    message = "found 0x0d03; it holds float32, which can come in an .npz file"
    with pytest.raises(ValueError, match=re.escape(message)):
        load_dataset(folder)
    found = load_dataset(write_npz(path, {**arrays, "train_images": floats}))
    assert np.array_equal(from_torch(found.train_images[:])[..., 0], arrays["train_images"])
