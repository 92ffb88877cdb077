"""Entry point to all readers."""

from __future__ import annotations

import os
from pathlib import Path

from treediff.data._idx import holds_idx, read_idx_folder
from treediff.data._named import DATASET_NAMES, read_named
from treediff.data._npy import holds_npy, read_npy_folder
from treediff.data._npz import read_npz
from treediff.data._pictures import read_pictures
from treediff.data.dataset import ImageDataset

__all__ = ["load_dataset"]


def load_dataset(
    source: str | os.PathLike[str], *, size: int | tuple[int, int] | None = None, split_seed: int = 0
) -> ImageDataset:
    """Read a data set from a name, a file or a folder.

    Args:
        source: one of

            * `"digits"`: scikit-learn's 8x8 digits, 1500 to train on and a fixed, stratified 297 to test on;
            * `"mnist"`, `"fashion-mnist"`: IDX files in the folder of that name inside `$TREEDIFF_DATA`, else
              (Fashion-MNIST) the files of the Debian package `dataset-fashion-mnist`. `"./mnist"` is a folder;
            * an `.npz` file with `train_images` and `test_images`: bool, uint8 (over 255), uint16 (over 65535) or
              float in [0, 1], `(n, H, W)` or `(n, H, W, C)`, or float features `(n, F)`. Optional are
              `train_labels`, `test_labels` (integers, `(n,)` or `(n, 1)`) and `class_names`. A warning names
              keys that are not read;
            * a folder of the same arrays in files, `train_images.npy`, `test_images.npy` and perhaps labels. The images
              stay in the files until they are indexed, so they may be larger than memory;
            * a folder of the four IDX files, plain or gzip (`train-images-idx3-ubyte`, ...);
            * a folder of images in one sub-folder per class, or two such folders, `train` and `test`. Without the
              two, a hash of class and file name assigns about one image in 7 to the test split.
        size: height and width, or one number for both. Images in a folder are resized to `size` (bilinear, the
            aspect ratio is not kept). All are converted to grey, or to RGB of 8 bits if one image has colour.
            Without `size` all images must have one size and one mode: 1, L, I;16 (grey of 16 bits) or RGB, with or
            without transparency. Of colours of 16 bits Pillow reads the upper 8. Images are turned upright (EXIF),
            and transparent parts are laid on white, with a warning.
        split_seed: seed of the hash that assigns images to the test split; other sources do not use it.

    Returns:
        An `ImageDataset`; rows and splits are the same in every call and on every machine.

    Raises:
        TypeError: if `source` is neither text nor a path.
        FileNotFoundError: if nothing is there, or an IDX file is missing; the message tells how to get the file.
        ValueError: if a file is damaged or does not fit the rules above, or `size` has no meaning for the source.
        ImportError: if Pillow (images) or scikit-learn (digits) is missing; the message names the extra to install.

    Source: the IDX format is described in LeCun, Cortes and Burges, "The MNIST database of handwritten digits".

    Examples:
        >>> load_dataset("digits").train_images.shape
        torch.Size([1500, 1, 8, 8])
    """
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"source: expected a name or a path, found {type(source).__name__}")
    path = Path(source).expanduser()
    named = source in DATASET_NAMES
    arrays = not named and path.is_dir() and holds_npy(path)
    pictures = not named and path.is_dir() and not arrays and not holds_idx(path)
    if size is not None and not pictures:
        raise ValueError(f"size: expected a folder of images to resize, found {source}; leave size out")
    if named:
        return read_named(str(source))
    if pictures:
        return read_pictures(path, size, split_seed)
    if arrays:
        return read_npy_folder(path)
    if path.is_dir():
        return read_idx_folder(path, path.resolve().name, None)
    if not path.exists():
        raise FileNotFoundError(
            f"{source}: expected 'digits', 'mnist', 'fashion-mnist', an .npz file or a folder, found nothing"
        )
    if path.suffix != ".npz":
        raise ValueError(f"{path}: expected an .npz file or a folder, found another kind of file")
    return read_npz(path)
