"""The .npz reader: what comes out equals what was written, and what does not fit is refused by name."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from datafiles import assert_equal_data, example, from_torch, quick, write_npz
from hypothesis import given
from hypothesis import strategies as st

from treediff.data import load_dataset


@pytest.mark.parametrize("channels", [(), (1,), (3,)])
def test_npz_gives_back_what_was_written(tmp_path: Path, channels: tuple[int, ...]) -> None:
    arrays = example(channels)
    names = {"class_names": np.array(["a", "b", "c"])}
    path = write_npz(tmp_path / "mine.npz", {**arrays, **names, "val_images": np.zeros(1)})
    with pytest.warns(UserWarning, match=r"the keys \['val_images'\] are not read; the keys that are:"):
        found = load_dataset(path)
    assert found.train_images.shape == (6, *(channels or (1,)), 5, 4)
    assert (found.name, found.class_names) == ("mine", ("a", "b", "c"))
    assert_equal_data(found, arrays)
    assert repr(found).startswith("ImageDataset('mine', train=(6, ")


def test_npz_labels_may_be_columns_or_absent(tmp_path: Path) -> None:
    arrays = example()
    columns = {key: array[:, None] if "labels" in key else array for key, array in arrays.items()}
    assert_equal_data(load_dataset(write_npz(tmp_path / "a.npz", columns)), arrays)
    bare = load_dataset(write_npz(tmp_path / "b.npz", {k: v for k, v in arrays.items() if "images" in k}))
    assert bare.train_labels is None and bare.test_labels is None and bare.class_names is None


def test_npz_float_images_and_features_are_kept(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = {"train_images": rng.random((3, 5, 4, 3)), "test_images": rng.random((2, 5, 4, 3))}
    found = load_dataset(str(write_npz(tmp_path / "images.npz", images)))
    assert np.array_equal(found.train_images[:].permute(0, 2, 3, 1), images["train_images"].astype(np.float32))
    table = {"train_images": rng.normal(0, 9, (3, 7)), "test_images": rng.normal(0, 9, (2, 7)).astype(">f4")}
    features = load_dataset(write_npz(tmp_path / "table.npz", table))
    assert features.test_images[:].dtype == torch.float32
    assert np.array_equal(features.train_images[:], table["train_images"].astype(np.float32))
    assert np.array_equal(features.test_images[:], table["test_images"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test_images": None}, r"expected the keys train_images and test_images, found \['train_images', "),
        ({"train_images": np.zeros((6, 5, 4, 4), np.uint8)}, r"C of 1 \(grey\) or 3 .*lay transparent parts on white"),
        ({"train_images": np.zeros((6, 5, 4, 2), np.uint8)}, r"C of 1 \(grey\) or 3 .*lay transparent parts on white"),
        ({"train_images": np.zeros((6, 3, 32, 32), np.uint8)}, r"channels last.*\(6, 3, 32, 32\); \.tr"),
        ({"train_images": np.zeros(6, np.uint8)}, r"train_images: expected at least one row.*\(6,\)"),
        ({"test_images": np.zeros((0, 5, 4), np.uint8)}, r"test_images: .*found shape \(0, 5, 4\)"),
        ({"train_images": np.zeros((6, 20), np.uint8)}, r"found uint8 of shape \(6, 20\); give flat"),
        ({"train_images": np.zeros((6, 5, 4), np.int64)}, r"expected bool, uint8, uint16 or float images, found int64"),
        ({"train_images": np.full((6, 5, 4), 255.0)}, r"expected pixels in \[0, 1\].*, found 255 to"),
        ({"train_images": np.full((6, 5, 4), -0.1)}, r"found -0\.1 to -0\.1; rescale"),
        ({"train_images": np.full((6, 5, 4), np.nan)}, r"found nan to nan"),
        ({"train_images": np.full((6, 9), np.inf)}, r"expected finite features, found inf to inf"),
        ({"train_images": np.full((6, 9), 1e60)}, r"expected finite features, found 1e\+60 to 1e\+60"),
        ({"test_images": np.zeros((2, 9, 9), np.uint8)}, r"found \(1, 5, 4\) and for test \(1, 9, 9\)"),
        ({"train_labels": np.zeros(5, int)}, r"train_labels: expected 6 labels, .*found shape \(5,\)"),
        ({"train_labels": np.zeros((6, 2), int)}, r"expected 6 labels.*found shape \(6, 2\)"),
        ({"test_labels": np.zeros(2)}, r"test_labels: expected integer labels, found float64; convert"),
        ({"test_labels": np.array([0, -1])}, r"expected labels that count from 0, found -1"),
        ({"test_labels": np.array([0, 2**64 - 1], np.uint64)}, r"labels that count from 0, found -1"),
        ({"class_names": np.array(["a", "b"])}, r"expected labels below 2 \(class names\), found 2"),
        ({"class_names": np.array([1, 2, 3])}, r"class_names: expected text.*found int64, shape \(3,\)"),
        ({"class_names": np.array([["a"]])}, r"class_names: expected text.*found <U1, shape \(1, 1\)"),
        ({"train_labels": np.array([{}] * 6)}, r"that train_labels cannot be read: Object.*never load"),
    ],
)
def test_bad_npz(tmp_path: Path, change: dict[str, npt.NDArray[Any] | None], message: str) -> None:
    arrays = {key: array for key, array in {**example(), **change}.items() if array is not None}
    path = write_npz(tmp_path / "mine.npz", arrays)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: .*{message}"):
        load_dataset(path)


def test_pickles_are_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "evil.npz"
    path.write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(ValueError, match=r"evil\.npz: expected an archive as np\.savez .* another kind"):
        load_dataset(path)


@quick
@given(st.data())
@pytest.mark.filterwarnings("ignore:.* are not read:UserWarning")
def test_a_damaged_npz_is_refused_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    stream = io.BytesIO()
    np.savez_compressed(stream, allow_pickle=False, **example())
    content = bytearray(stream.getvalue())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[at] ^= data.draw(st.integers(1, 255))
    else:
        del content[at:]
    path = tmp_path / "damaged.npz"
    path.write_bytes(content)
    try:
        found = load_dataset(path)
    except ValueError as error:
        assert str(error).startswith(str(path))
    else:
        # The checksum has let it pass: only an unused field or a dropped optional key can differ.
        assert np.array_equal(from_torch(found.train_images[:])[..., 0], example()["train_images"])


# --- what says what white is, and what does not ----------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "most"), [("bool", 1), ("u1", 255), ("<u2", 65535), (">u2", 65535)])
def test_pixels_that_say_what_white_is(tmp_path: Path, dtype: str, most: int) -> None:
    whole = np.linspace(0, most, 6 * 5 * 4).round().reshape(6, 5, 4)
    arrays = {"train_images": whole.astype(dtype), "test_images": whole[:2].astype(dtype)}
    found = load_dataset(write_npz(tmp_path / "mine.npz", arrays))
    assert np.allclose(found.train_images[:][:, 0], whole / most, atol=1e-6)
    assert found.train_images[:].max() == 1 and len(found.train_images[:].unique()) == len(np.unique(whole))


ADVICE = r"; divide by it: images / 255 for pixels from 0 to 255, \(images \+ 1\) / 2 for those from -1 to 1"


@pytest.mark.parametrize("dtype", ["i1", "i2", "i4", "i8", "u4", "u8", "f4"])
@pytest.mark.parametrize("low", [0, -1])
def test_the_advice_for_other_pixels_gives_the_picture(tmp_path: Path, dtype: str, low: int) -> None:
    if low and dtype[0] == "u":
        return
    most = 1 if low else (127 if dtype == "i1" else 255)
    pixels = np.linspace(low, most, 120).round().reshape(6, 5, 4)
    arrays = {"train_images": pixels.astype(dtype), "test_images": pixels[:2].astype(dtype)}
    message = "rescale them: images / 255" if dtype == "f4" else f"from {low} to {most}, with an unknown .*{ADVICE}"
    with pytest.raises(ValueError, match=message):
        load_dataset(write_npz(tmp_path / "mine.npz", arrays))
    rescaled = {name: (images + 1) / 2 if low else images / 255 for name, images in arrays.items()}
    found = load_dataset(write_npz(tmp_path / "mine.npz", rescaled))
    assert np.allclose(found.train_images[:][:, 0], (pixels + 1) / 2 if low else pixels / 255, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bool", "u1", "u2", "i8"])
def test_the_advice_for_flat_numbers(tmp_path: Path, dtype: str) -> None:
    flat = {"train_images": np.arange(120).reshape(6, 20).astype(dtype), "test_images": np.ones((2, 20), dtype)}
    message = r"give flat pixels as images, with \.reshape\(n, H, W\), and features as \.astype\(np\.float32\)"
    with pytest.raises(ValueError, match=message):
        load_dataset(write_npz(tmp_path / "mine.npz", flat))
    features = {name: rows.astype(np.float32) for name, rows in flat.items()}
    found = load_dataset(write_npz(tmp_path / "mine.npz", features))
    assert np.array_equal(found.train_images[:], flat["train_images"].astype(np.float32))
    if dtype != "i8":
        pixels = {name: rows.reshape(len(rows), 5, 4) for name, rows in flat.items()}
        shown = load_dataset(write_npz(tmp_path / "mine.npz", pixels)).train_images[:]
        most = {"bool": 1, "u1": 255, "u2": 65535}[dtype]
        assert np.allclose(shown[:, 0], pixels["train_images"].astype(float) / most)


@pytest.mark.parametrize("dtype", ["c8", "U3", "M8[s]"])
def test_what_is_no_real_number(tmp_path: Path, dtype: str) -> None:
    arrays = {"train_images": np.zeros((6, 5, 4), dtype), "test_images": np.zeros((2, 5, 4), dtype)}
    with pytest.raises(ValueError, match="train_images: expected real numbers, found "):
        load_dataset(write_npz(tmp_path / "mine.npz", arrays))
