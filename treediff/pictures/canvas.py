"""A canvas for PNG files: pixels that are set one by one, and matplotlib's lines and text over them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from treediff.pictures.geometry import Panel
from treediff.pictures.palette import INK, LINE, PAPER, rgb
from treediff.pictures.tiles import Pixels

__all__ = ["MOST_PIXELS", "Canvas", "check_name", "plain_matplotlib"]

MOST_PIXELS = 65_000  # matplotlib's renderer stops at 2**16


def check_name(path: str | os.PathLike[str], caller: str) -> None:
    """Raise ValueError unless the file's name ends in .png."""
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"{caller} writes PNG files: expected a name that ends in .png, found {os.fspath(path)!r}")


@contextmanager
def plain_matplotlib(caller: str, otherwise: str = "") -> Iterator[None]:
    """Matplotlib as it comes, whatever style the user has set; rulers and canvases are made and used inside.

    Raises:
        ImportError: if matplotlib is not installed; `otherwise` says what else would help.
    """
    try:
        import matplotlib.style
    except ImportError as error:
        raise ImportError(
            f"{caller} needs matplotlib, which is not installed; pip install 'treediff[pictures]'{otherwise}"
        ) from error
    with matplotlib.style.context("default", after_reset=True):
        yield


class Canvas:
    """A white picture to draw on; places are in pixels from the left upper corner.

    Args:
        height: in pixels.
        width: in pixels.
        dpi: dots per inch, for text, whose size is in points.
    """

    def __init__(self, height: int, width: int, dpi: int) -> None:
        from matplotlib.figure import Figure

        self.dpi = dpi
        self.pixels: Pixels = np.full((height, width, 3), rgb(PAPER), np.uint8)
        # The hair's breadth keeps the product with dpi from falling short of the pixel.
        tall, wide = height + 0.01, width + 0.01
        self.figure = Figure(figsize=(wide / dpi, tall / dpi), dpi=dpi, facecolor=PAPER)
        self.axes = self.figure.add_axes((0, 0, width / wide, height / tall))
        self.axes.set(xlim=(0, width), ylim=(height, 0))
        self.axes.set_axis_off()

    def fill(self, panel: Panel, colour: str) -> None:
        """A rectangle of pixels."""
        rows = slice(panel.top, panel.top + panel.height)
        self.pixels[rows, panel.left : panel.left + panel.width] = rgb(colour)

    def put(self, tile: Pixels, left: int, top: int) -> None:
        """An image `(H, W, C)`, pixel by pixel."""
        self.pixels[top : top + tile.shape[0], left : left + tile.shape[1]] = tile

    def line(self, points: tuple[tuple[int, int], ...], width: float) -> None:
        """A line of a width in pixels."""
        x, y = zip(*points, strict=True)
        points_wide = width * 72 / self.dpi
        self.axes.plot(x, y, color=LINE, linewidth=points_wide, solid_joinstyle="round", solid_capstyle="butt")

    def text(self, x: int, y: int, text: str, size: float, **style: Any) -> None:  # noqa: ANN401
        """Text that is taken literally, dollar signs and all."""
        style = {"color": INK, **style}
        self.axes.text(x, y, text, fontsize=size, parse_math=False, **style)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the PNG file; the same drawing gives the same bytes."""
        self.figure.figimage(self.pixels, zorder=-1)
        self.figure.savefig(path, format="png", dpi=self.dpi, metadata={"Software": None})
