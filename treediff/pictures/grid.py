"""Images in rows and columns as one PNG file: the steps of a sampler, or some roots decoded by every leaf.

Letters: `R` rows, `N` columns, `B` images, `C H W` image.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from treediff.pictures.checks import check_images
from treediff.pictures.figure import figure, montage, shorten
from treediff.pictures.palette import INK
from treediff.pictures.tiles import fit, pixels, tile_size

__all__ = ["Labels", "draw_grid", "draw_strip"]

Labels: TypeAlias = Sequence[str | float] | Tensor

_DPI, _TILE, _GAP = 150, 64, 4  # in pixels; smaller images are enlarged to at most a tile
_MARGIN, _LETTER, _TITLE = 0.15, 0.062, 0.3  # in inches; _LETTER is the width of a letter of a label
_LETTERS = 26


def draw_grid(
    images: Tensor,
    path: str | os.PathLike[str],
    *,
    row_labels: Labels | None = None,
    column_labels: Labels | None = None,
    title: str | None = None,
) -> None:
    """Draw images in rows and columns into a PNG file, such as the images of `DiffuseTreeVAE.generate_tree`.

    Small images are enlarged by a whole factor; larger images keep their pixels. The same arguments give the same
    bytes.

    Args:
        images: `(R, N, C, H, W)` in [0, 1], `C` 1 or 3; for `generate_tree` rows are roots and columns are leaves.
        path: the file, whose name ends in .png; an existing file is replaced.
        row_labels: one label for each row, left of the row; long labels are shortened.
        column_labels: one label for each column, above the column; long labels are slanted and shortened.
        title: text above the grid.

    Raises:
        ImportError: if matplotlib is not installed.
        TypeError: if images are not a float tensor.
        ValueError: if images have another shape, leave [0, 1] or are empty, or there is not one label for each row or
            column. Also if the name does not end in .png, or the drawing would be too large.
    """
    _check(images, "images", "(rows, columns, C, H, W)")
    beside = _texts(row_labels, "row_labels", images.shape[0], "row")
    above = _texts(column_labels, "column_labels", images.shape[1], "column")
    _draw(images, path, beside, above, title, "draw_grid")


def draw_strip(
    frames: Tensor,
    path: str | os.PathLike[str],
    *,
    labels: Labels | None = None,
    row_labels: Labels | None = None,
    title: str | None = None,
) -> None:
    """Draw the steps of a sampler into a PNG file: a row for each image and a column for each step; see `draw_grid`.

    The steps of `LeafConditionedDDPM.sample(..., callback=log.append)` are
    `torch.stack([(step.x0 + 1) / 2 for step in log]).clamp(0, 1)`, and their times `[step.t for step in log]`.

    Args:
        frames: `(steps, B, C, H, W)` in [0, 1], `C` 1 or 3.
        path: the file, whose name ends in .png; an existing file is replaced.
        labels: one label for each step, such as its time.
        row_labels: one label for each image.
        title: text above the strip.

    Raises:
        ImportError: if matplotlib is not installed.
        TypeError: if frames are not a float tensor.
        ValueError: as for `draw_grid`.
    """
    _check(frames, "frames", "(steps, images, C, H, W)")
    beside = _texts(row_labels, "row_labels", frames.shape[1], "image")
    above = _texts(labels, "labels", frames.shape[0], "step")
    _draw(frames.swapaxes(0, 1), path, beside, above, title, "draw_strip")


def _draw(
    images: Tensor,
    path: str | os.PathLike[str],
    row_labels: list[str],
    column_labels: list[str],
    title: str | None,
    caller: str,
) -> None:
    """Draw all images as one image, with the labels of rows and columns as labels of the axes."""
    rows, columns = images.shape[:2]
    beside, above = ([shorten(label, _LETTERS) for label in labels] for labels in (row_labels, column_labels))
    tall, wide = (size + _GAP for size in tile_size(images.shape[3], images.shape[4], max(_TILE, *images.shape[3:])))
    slanted = any(len(label) * _LETTER > wide / _DPI for label in above)
    letters = max(map(len, above), default=0)
    left = _MARGIN + (0.08 + _LETTER * max(map(len, beside)) if beside else 0)
    top = _MARGIN + (_TITLE if title else 0)
    top += 0 if not above else 0.1 + 0.7 * _LETTER * letters if slanted else 0.2
    right = _MARGIN + (0.7 * _LETTER * letters if slanted else 0)
    high, across = (rows * tall - _GAP) / _DPI, (columns * wide - _GAP) / _DPI
    width = max(left + across + right, 2 * _MARGIN + 1.3 * _LETTER * len(title or ""))
    height = top + high + _MARGIN
    with figure(path, width, height, _DPI, caller) as drawn:
        axes = drawn.add_axes((left / width, _MARGIN / height, across / width, high / height))
        shown = pixels(images.detach().flatten(0, 1).float().cpu().numpy())
        whole = montage(fit(shown, max(_TILE, *images.shape[3:])), columns, _GAP)
        axes.imshow(whole, interpolation="nearest", aspect="auto")
        axes.set_frame_on(False)
        axes.tick_params(
            length=0, labelsize=7, labelcolor=INK, top=True, labeltop=True, bottom=False, labelbottom=False
        )
        axes.set_xticks(np.arange(columns if above else 0) * wide + (wide - _GAP) / 2)
        style: dict[str, Any] = {"rotation": 45, "ha": "left"} if slanted else {}
        axes.set_xticklabels(above, parse_math=False, **style)
        axes.set_yticks(np.arange(rows if beside else 0) * tall + (tall - _GAP) / 2)
        axes.set_yticklabels(beside, parse_math=False)
        if title:
            at = 1 - _MARGIN / height
            drawn.text(_MARGIN / width, at, title, fontsize=10, color=INK, va="top", parse_math=False)


def _check(images: Tensor, name: str, shape: str) -> None:
    check_images(images, name)
    if images.ndim != 5 or images.shape[2] not in (1, 3):
        raise ValueError(f"{name}: expected shape {shape} with C 1 or 3, found {tuple(images.shape)}")
    if not images.numel():
        raise ValueError(f"{name}: expected at least one image, found none: shape {tuple(images.shape)}")


def _texts(labels: Labels | None, name: str, count: int, kind: str) -> list[str]:
    """Return labels as texts; fractions have at most three decimals."""
    if labels is None:
        return []
    if len(labels) != count:
        raise ValueError(f"{name}: expected one for each {kind}, {count}, found {len(labels)}")
    values = labels.tolist() if isinstance(labels, Tensor) else labels
    return [f"{round(value, 3):g}" if isinstance(value, float) else str(value) for value in values]
