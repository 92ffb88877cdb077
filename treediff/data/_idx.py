"""Reader of folders with the four IDX files of MNIST and similar data sets."""

from __future__ import annotations

import gzip
import math
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from treediff.data._arrays import Array, Split, to_dataset, to_images, to_labels
from treediff.data._tools import DAMAGE
from treediff.data.dataset import ImageDataset

_IDX_KINDS = {0x09: "int8", 0x0B: "int16", 0x0C: "int32", 0x0D: "float32", 0x0E: "float64"}
_IDX_DIMENSIONS = {"images": 3, "labels": 1}


def holds_idx(folder: Path) -> bool:
    parts = ("train", "t10k")
    names = [name for part in parts for kind in _IDX_DIMENSIONS for name in _idx_names(part, kind)]
    return any((folder / name).is_file() for name in names)


def read_idx_folder(folder: Path, name: str, class_names: Sequence[str] | None) -> ImageDataset:
    splits: list[Split] = []
    for part in ("train", "t10k"):
        images_path, labels_path = _find_idx(folder, part, "images"), _find_idx(folder, part, "labels")
        images = to_images(_read_idx(images_path, 3), images_path)
        splits.append((images, to_labels(_read_idx(labels_path, 1), len(images), labels_path)))
    return to_dataset(name, folder, splits[0], splits[1], class_names)


def _idx_names(part: str, kind: str) -> list[str]:
    dimensions = _IDX_DIMENSIONS[kind]
    return [f"{part}-{kind}{dot}idx{dimensions}-ubyte{gz}" for dot in "-." for gz in ("", ".gz")]


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
    except DAMAGE as error:
        raise ValueError(f"{path}: expected a gzip file, found damage: {error}; fetch it again") from error
    start = 4 + 4 * dimensions
    magic = 0x800 + dimensions
    found, *shape = struct.unpack(f">{1 + dimensions}I", data[:start].ljust(start, b"\0"))
    if found != magic:
        kind = _IDX_KINDS.get(found >> 8)
        advice = "is this the right file?" if kind is None else f"it holds {kind}, which can come in an .npz file"
        raise ValueError(
            f"{path}: expected IDX magic number {magic:#06x} (uint8, {dimensions}-D), found {found:#06x}; {advice}"
        )
    if len(data) != start + math.prod(shape):
        raise ValueError(
            f"{path}: expected {start + math.prod(shape)} bytes for shape {tuple(shape)}, found {len(data)}; "
            f"the file is cut or damaged, fetch it again"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
