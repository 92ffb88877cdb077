"""PNG files by matplotlib: one figure, with the same bytes for the same content under any style of the user."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from treediff.pictures.palette import PAPER, rgb
from treediff.pictures.tiles import Pixels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["figure", "montage", "save", "shorten"]

_MOST_PIXELS = 65_000  # matplotlib's renderer stops at 2**16


@contextmanager
def figure(
    path: str | os.PathLike[str], width: float, height: float, dpi: int, caller: str, otherwise: str = ""
) -> Iterator[Figure]:
    """Yield a white figure, written to a PNG file when the context ends without an error.

    Args:
        path: the file, whose name ends in .png.
        width: width of the figure in inches.
        height: height of the figure in inches.
        dpi: dots per inch.
        caller: name of the function that draws, for messages.
        otherwise: further advice for messages.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if the name does not end in .png, or the figure would be too large.
    """
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"{caller} writes PNG files: expected a name that ends in .png, found {os.fspath(path)!r}")
    if max(width, height) * dpi > _MOST_PIXELS:
        raise ValueError(
            f"{caller} would draw {round(width * dpi)} x {round(height * dpi)} pixels, more than {_MOST_PIXELS} to a "
            f"side{otherwise or '; draw fewer rows or columns'}"
        )
    try:
        import matplotlib.style
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"{caller} needs matplotlib, which is not installed; pip install 'treediff[pictures]'{otherwise}"
        ) from error
    with matplotlib.style.context("default", after_reset=True):
        drawn = Figure(figsize=(width, height), dpi=dpi, facecolor=PAPER)
        yield drawn
        save(drawn, path)


def save(drawn: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure to a PNG file, without the version of matplotlib in its metadata."""
    drawn.savefig(path, format="png", metadata={"Software": None})


def montage(images: Pixels, columns: int, gap: int, colour: str = PAPER) -> Pixels:
    """Return one image `(height, width, 3)` of images `(n, H, W, C)` side by side in rows of `columns`.

    Examples:
        >>> montage(np.zeros((3, 4, 5, 1), np.uint8), columns=2, gap=1).shape
        (9, 11, 3)
    """
    n, tall, wide, _ = images.shape
    rows = -(-n // columns)
    whole = np.full((rows * (tall + gap) - gap, columns * (wide + gap) - gap, 3), rgb(colour), np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (tall + gap), (i % columns) * (wide + gap)
        whole[top : top + tall, left : left + wide] = image
    return whole


def shorten(text: str, letters: int) -> str:
    """Return a text on one line, shortened to at most `letters` letters.

    Examples:
        >>> shorten("a long name of a class", 12)
        'a long name…'
    """
    text = " ".join(text.split())
    return text if len(text) <= letters else text[: letters - 1].rstrip() + "…"
