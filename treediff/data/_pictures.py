"""Reader of folders of images, one sub-folder per class."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import torch

from treediff.data._arrays import Array, Split, to_dataset, to_images
from treediff.data._tools import import_optional, stable_hash
from treediff.data.dataset import ImageDataset

ClassFile: TypeAlias = tuple[str, Path]

_PICTURE_SUFFIXES = (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_TEST_ONE_IN = 7
_DEEP = "I;16"


def read_pictures(folder: Path, size: int | tuple[int, int] | None, seed: int) -> ImageDataset:
    pillow = import_optional("PIL.Image", "images are read by Pillow", "pictures")
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
    paths = [file for _, file in (*train, *test)]
    mode = _common_mode(pillow, paths, convert=box is not None)
    clear = sum(_is_clear(pillow, file) for file in paths)
    if clear:
        warnings.warn(f"{folder}: {clear} images have transparent parts, which are shown on white", stacklevel=4)
    splits: list[Split] = []
    for part in (train, test):
        pixels = np.stack([_read_picture(pillow, file, mode, box) for _, file in part])
        labels = torch.tensor([names.index(class_name) for class_name, _ in part])
        splits.append((to_images(pixels, folder), labels))
    return to_dataset(folder.resolve().name, folder, splits[0], splits[1], names)


def _width_height(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"size: expected a height and a width of at least 1, found {size}")
    return pair[1], pair[0]


def _hold_out(folder: Path, files: Sequence[ClassFile], seed: int) -> tuple[list[ClassFile], list[ClassFile]]:
    """Split by a hash of names, so that an image stays in its split when other images are added or removed."""
    train: list[ClassFile] = []
    test: list[ClassFile] = []
    for class_name, file in files:
        is_test = stable_hash(f"{seed}/{class_name}/{file.name}") % _TEST_ONE_IN == 0
        (test if is_test else train).append((class_name, file))
    if not train or not test:
        raise ValueError(
            f"{folder}: expected enough images to hold out one in {_TEST_ONE_IN}, found {len(files)}, all "
            f"on one side; add images, change split_seed, or make folders train/ and test/"
        )
    return train, test


def _class_files(folder: Path) -> list[ClassFile]:
    found: list[ClassFile] = []
    passed: list[Path] = []
    for below in sorted(folder.iterdir(), key=lambda path: path.name):
        if below.is_dir() and not below.name.startswith("."):
            names = sorted(file.name for file in below.iterdir() if not file.name.startswith("."))
            files = [below / name for name in names if name.lower().endswith(_PICTURE_SUFFIXES)]
            passed += [below / name for name in names if not name.lower().endswith(_PICTURE_SUFFIXES)]
        elif not below.name.startswith("."):
            passed.append(below)
        if below.is_dir() and not below.name.startswith("."):
            if not files:
                raise ValueError(
                    f"{below}: expected images of one class ({', '.join(_PICTURE_SUFFIXES)}), found none; "
                    f"folders train/ and test/ are understood as a pair"
                )
            found += [(below.name, file) for file in files]
    if not found:
        raise ValueError(
            f"{folder}: expected the four IDX files, or one sub-folder of images per class (just one if "
            f"there are no classes), found no sub-folder"
        )
    if passed:
        warnings.warn(
            f"{folder}: passed over {len(passed)} files or folders that are no images of a class, such as "
            f"{passed[0]}; images lie in the folder of their class and end in {', '.join(_PICTURE_SUFFIXES)}",
            stacklevel=5,
        )
    return found


@contextmanager
def _opened(pillow: ModuleType, path: Path) -> Iterator[Any]:
    try:
        with pillow.open(path) as picture:
            yield picture
    except (OSError, SyntaxError, ValueError, EOFError, pillow.DecompressionBombError) as error:
        raise ValueError(f"{path}: expected an image that Pillow can read, found: {error}") from error


def _common_mode(pillow: ModuleType, files: Sequence[Path], *, convert: bool) -> str:
    """Return the mode that all images have or, with `convert`, the mode that all images are converted to."""
    formats: dict[tuple[str, tuple[int, int]], Path] = {}
    for file in files:
        with _opened(pillow, file) as picture:
            formats.setdefault((_mode_of(picture), _upright(picture).size), file)
    if not convert and len(formats) > 1:
        (this, first), (that, other) = list(formats.items())[:2]
        raise ValueError(
            f"{other}: expected mode and (width, height) of {first}, {this}, found {that}; give "
            f"size=(height, width) to make all alike"
        )
    understood = ("1", "L", _DEEP, "P", "RGB", "RGBA", "LA") if convert else ("1", "L", _DEEP, "RGB", "RGBA", "LA")
    for (mode, _), file in formats.items():
        if mode not in understood:
            raise ValueError(f"{file}: expected mode {'/'.join(understood)}, found {mode}; {_advice(mode)}")
    modes = {mode for mode, _ in formats}
    if not convert:
        return {"RGBA": "RGB", "LA": "L"}.get(mode := modes.pop(), mode)
    if not modes <= {"1", "L", "LA", _DEEP}:
        return "RGB"
    return _DEEP if _DEEP in modes else "L"


def _mode_of(picture: Any) -> str:  # noqa: ANN401
    """Return Pillow's mode, with one name for grey of 16 bits in any order of bytes."""
    deep = picture.mode.startswith(_DEEP) or (picture.mode == "I" and picture.format == "PPM")
    return _DEEP if deep else str(picture.mode)


def _advice(mode: str) -> str:
    """Return advice on saving an image of a mode that is not read, with nothing lost that can be kept."""
    if mode in ("I", "F"):
        return (
            "its value of white is unknown; save it as grey of 16 bits: x = np.asarray(picture, np.float64), "
            "Image.fromarray((65535 * (x - x.min()) / np.ptp(x)).round().astype(np.uint16)).save('new.png'), with the "
            "same two numbers for all images"
        )
    if mode == "LAB":
        return "save it as RGB with PIL.ImageCms, which interprets its colours"
    return f"save it with picture.convert({'RGB' if mode in ('CMYK', 'HSV', 'YCbCr') else 'RGBA'!r}).save('new.png')"


def _upright(picture: Any) -> Any:  # noqa: ANN401
    """Return an image turned as its camera was held."""
    from PIL import ImageOps

    ImageOps.exif_transpose(picture, in_place=True)  # keeps the format, which `_mode_of` reads
    return picture


def _is_clear(pillow: ModuleType, file: Path) -> bool:
    """Return whether an image has transparent parts."""
    with _opened(pillow, file) as picture:
        if picture.mode not in ("RGBA", "LA") and "transparency" not in picture.info:
            return False
        low, _ = picture.convert("RGBA").getchannel("A").getextrema()
        return bool(low < 255)


def _on_white(pillow: ModuleType, picture: Any) -> Any:  # noqa: ANN401
    """Return an image with its transparent parts on white."""
    if picture.mode not in ("RGBA", "LA") and "transparency" not in picture.info:
        return picture
    clear = picture.convert("RGBA")
    whole = pillow.new("RGBA", clear.size, "white")
    whole.alpha_composite(clear)
    return whole.convert("L" if picture.mode == "LA" else "RGB")


def _read_picture(pillow: ModuleType, file: Path, mode: str, box: tuple[int, int] | None) -> Array:
    with _opened(pillow, file) as picture:
        picture = _upright(picture)
        if _mode_of(picture) == _DEEP or mode == _DEEP:
            return _read_deep(pillow, picture, mode, box)
        picture = _on_white(pillow, picture)
        if box is not None:
            picture = picture.convert(mode).resize(box, pillow.Resampling.BILINEAR)
        return np.asarray(picture)


def _read_deep(pillow: ModuleType, picture: Any, mode: str, box: tuple[int, int] | None) -> Array:  # noqa: ANN401
    """Read grey of 16 or, among such images, 8 bits; Pillow's conversions to other modes clip all but dark greys."""
    if _mode_of(picture) == _DEEP:
        grey = np.asarray(picture).astype(np.uint16)
    else:
        grey = np.asarray(picture.convert("L")).astype(np.uint16) * 257  # 255 * 257 = 65535
    if box is None:
        return grey
    wide = pillow.fromarray(grey.astype(np.float32)).resize(box, pillow.Resampling.BILINEAR)
    pixels: Array = np.asarray(wide).clip(0, 65535) / np.float32(65535)
    return pixels if mode == _DEEP else np.stack([(pixels * 255).round().astype(np.uint8)] * 3, -1)
