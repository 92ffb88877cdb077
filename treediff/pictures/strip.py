"""Images in rows and columns as one PNG: how noise becomes an image, or some roots as every leaf shows them.

Letters: `R` rows, `N` columns, `B` images, `C H W` image.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor

from treediff.pictures.canvas import MOST_PIXELS, Canvas, check_name, plain_matplotlib
from treediff.pictures.checks import check_images
from treediff.pictures.text import Ruler
from treediff.pictures.tiles import fit, pixels

__all__ = ["Labels", "draw_grid", "draw_strip"]

Labels: TypeAlias = Sequence[str | float] | Tensor

_DPI = 150

# In pixels.
_TILE = 64  # smaller images are enlarged to at most this; larger ones are shown as they are
_GAP = 4
_MARGIN = 20
_LINE = 22
_TITLE_LINE = 30
_LABEL_GAP = 12
_WIDEST_ROW_LABEL = 240
_WIDEST_COLUMN_LABEL = 120
_NARROWEST_TITLE = 480  # before it is broken into lines

# In points.
_LABEL = 7
_TITLE = 10


def draw_grid(
    images: Tensor,
    path: str | os.PathLike[str],
    *,
    row_labels: Labels | None = None,
    column_labels: Labels | None = None,
    title: str | None = None,
) -> None:
    """Draw images in rows and columns into a PNG file, such as those of `DiffuseTreeVAE.generate_tree`.

    Small images are enlarged by a whole factor, larger ones are shown as they are. The same arguments give the same
    bytes.

    Args:
        images: `(R, N, C, H, W)` in [0, 1], `C` 1 or 3; rows are roots and columns leaves for `generate_tree`.
        path: the file, whose name ends in .png; one that exists is replaced.
        row_labels: one for each row, written left of it; long ones are shortened.
        column_labels: one for each column, written above it, which is at least as wide; long ones are shortened.
        title: what stands above all of it.

    Raises:
        ImportError: if matplotlib is not installed.
        TypeError: if images are no float tensor.
        ValueError: if images have another shape, leave [0, 1] or are none, if there is not one label for each row or
            column, if the name does not end in .png, or if the picture would be too large.
    """
    check_name(path, "draw_grid")
    _check(images, "images", "(rows, columns, C, H, W)")
    beside = _texts(row_labels, "row_labels", images.shape[0], "row")
    above = _texts(column_labels, "column_labels", images.shape[1], "column")
    with plain_matplotlib("draw_grid"):
        _draw(images, beside, above, title).save(path)


def draw_strip(
    frames: Tensor,
    path: str | os.PathLike[str],
    *,
    labels: Labels | None = None,
    row_labels: Labels | None = None,
    title: str | None = None,
) -> None:
    """Draw how images came about into a PNG file: a row for each image and a column for each step; see `draw_grid`.

    The steps of `LeafConditionedDDPM.sample(..., callback=log.append)` are
    `torch.stack([(told.x0 + 1) / 2 for told in log]).clamp(0, 1)`, and their times `[told.t for told in log]`.

    Args:
        frames: `(steps, B, C, H, W)` in [0, 1], `C` 1 or 3.
        path: the file, whose name ends in .png; one that exists is replaced.
        labels: one for each step, such as its time.
        row_labels: one for each image.
        title: what stands above all of it.

    Raises:
        ImportError: if matplotlib is not installed.
        TypeError: if frames are no float tensor.
        ValueError: as `draw_grid`.
    """
    check_name(path, "draw_strip")
    _check(frames, "frames", "(steps, images, C, H, W)")
    beside = _texts(row_labels, "row_labels", frames.shape[1], "image")
    above = _texts(labels, "labels", frames.shape[0], "step")
    with plain_matplotlib("draw_strip"):
        _draw(frames.swapaxes(0, 1), beside, above, title).save(path)


def _draw(images: Tensor, row_labels: list[str], column_labels: list[str], title: str | None) -> Canvas:
    """A canvas with everything on it: titles, column labels, and rows of a label and images."""
    rows, columns = images.shape[:2]
    shown = pixels(images.detach().flatten(0, 1).float().cpu().numpy())
    tiles = fit(shown, max(_TILE, *shown.shape[1:3]))
    tall, wide = tiles.shape[1:3]
    ruler = Ruler(_DPI)
    beside = [ruler.shorten(label, _WIDEST_ROW_LABEL, _LABEL) for label in row_labels]
    above = [ruler.shorten(label, max(wide, _WIDEST_COLUMN_LABEL), _LABEL) for label in column_labels]
    # Cells are large enough for an image and for its labels, so that no two labels meet.
    across = max([wide + _GAP, *(ruler.width(label, _LABEL) + _LABEL_GAP for label in above)])
    down = max(tall + _GAP, _LINE if beside else 0)
    left = _MARGIN + max((ruler.width(label, _LABEL) + _LABEL_GAP for label in beside), default=0)
    right = left + columns * across
    lines = ruler.wrap(title or "", max(right - _MARGIN, _NARROWEST_TITLE), _TITLE)
    top = _MARGIN + len(lines) * _TITLE_LINE + (_LINE if above else 0)
    width = max([right, *(_MARGIN + ruler.width(line, _TITLE) for line in lines)]) + _MARGIN
    height = top + rows * down + _MARGIN
    if max(width, height) > MOST_PIXELS:
        raise ValueError(
            f"the picture of {rows} x {columns} images would have {width} x {height} pixels, more than {MOST_PIXELS} "
            "to a side; draw fewer rows or columns"
        )
    canvas = Canvas(height, width, _DPI)
    for i, line in enumerate(lines):
        canvas.text(_MARGIN, _MARGIN + i * _TITLE_LINE, line, _TITLE, va="top")
    for j, label in enumerate(above):
        canvas.text(left + j * across + across // 2, top - _LINE // 2, label, _LABEL, va="center", ha="center")
    for i, label in enumerate(beside):
        canvas.text(left - _LABEL_GAP, top + i * down + down // 2, label, _LABEL, va="center", ha="right")
    for k, tile in enumerate(tiles):
        i, j = divmod(k, columns)
        canvas.put(tile, left + j * across + (across - wide) // 2, top + i * down + (down - tall) // 2)
    return canvas


def _check(images: Tensor, name: str, shape: str) -> None:
    check_images(images, name)
    if images.ndim != 5 or images.shape[2] not in (1, 3):
        raise ValueError(f"{name}: expected shape {shape} with C 1 or 3, found {tuple(images.shape)}")
    if not images.numel():
        raise ValueError(f"{name}: expected at least one image, found none: shape {tuple(images.shape)}")


def _texts(labels: Labels | None, name: str, count: int, kind: str) -> list[str]:
    """Labels as they are written, once it is clear that there are enough; fractions have three decimals at most."""
    if labels is None:
        return []
    if len(labels) != count:
        raise ValueError(f"{name}: expected one for each {kind}, {count}, found {len(labels)}")
    values = labels.tolist() if isinstance(labels, Tensor) else labels
    return [f"{round(value, 3):g}" if isinstance(value, float) else str(value) for value in values]
