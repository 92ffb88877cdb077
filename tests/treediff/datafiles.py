"""Small data sets in every kind of file, and the comparison with what is read back."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import HealthCheck, settings
from PIL import Image

from treediff.data import ImageDataset

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
        images, labels = getattr(found, f"{part}_images")[:], getattr(found, f"{part}_labels")
        pixels = arrays[f"{part}_images"]
        assert images.dtype == torch.float32 and labels.dtype == torch.int64
        assert images.is_contiguous()
        assert torch.equal(images, torch.from_numpy(from_torch(images)).permute(0, 3, 1, 2) / 255)
        assert np.array_equal(from_torch(images), pixels.reshape(*pixels.shape[:3], -1))
        assert labels.tolist() == arrays[f"{part}_labels"].ravel().tolist()
