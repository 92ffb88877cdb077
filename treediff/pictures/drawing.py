"""The whole tree as one PNG. Tiles are set pixel by pixel; matplotlib adds lines and text."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from treediff.pictures.geometry import CLASS_LINES, Block, Panel, Placement, place
from treediff.pictures.palette import (
    EMPTY,
    GENERATED,
    GREY,
    INK,
    LINE,
    PAPER,
    REAL,
    class_colours,
    percent,
    rgb,
)
from treediff.pictures.summary import Images, NodeSummary, TreeSummary
from treediff.pictures.text import Ruler
from treediff.pictures.tiles import Pixels, fit, pixels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_tree"]

_MOST_PIXELS = 65_000  # matplotlib's renderer stops at 2**16
_SHARE = "Percentage and width of an edge: share of the images that reach the node (mean probability)."
_GENERATED = "Generated: drawn from the prior through the node."
_REAL = "Real: typical ones of the images whose most probable leaf is the node or lies below it."


def draw_tree(summary: TreeSummary, path: str | os.PathLike[str], *, dpi: int = 150) -> None:
    """Draw a whole tree into a PNG file.

    Leaves stand at the bottom, parents centred above their children. Every node shows what it generates, real images
    that belong to it, and, if the summary has labels, a bar of its classes; a leaf also names its largest classes. The
    picture grows with the tree, by 160 to 270 pixels per leaf at 150 dots per inch. The same summary gives the same
    bytes. Class names in scripts that the font DejaVu Sans lacks come out as boxes, with matplotlib's warning;
    `write_html` shows them.

    Args:
        summary: what `summarize_tree` found.
        path: the file, whose name ends in .png; one that exists is replaced.
        dpi: dots per inch; the number of pixels grows with it.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if the name does not end in .png, `dpi` is below 40, or the picture would be too large.
    """
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"draw_tree writes PNG files: expected a name that ends in .png, found {os.fspath(path)!r}")
    if dpi < 40:
        raise ValueError(f"dpi must be at least 40 for labels that can be read, found {dpi}")
    plan = place(summary, dpi)
    if max(plan.width, plan.height) > _MOST_PIXELS:
        raise ValueError(
            f"the picture of {len(summary.topology.leaves)} leaves would have {plan.width} x {plan.height} pixels, "
            f"more than {_MOST_PIXELS} to a side; choose dpi below {dpi}, or use write_html"
        )
    try:
        import matplotlib.style
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "draw_tree needs matplotlib, which is not installed; pip install 'treediff[pictures]', or use "
            "write_html, which needs nothing"
        ) from error
    with matplotlib.style.context("default", after_reset=True):
        ruler = Ruler(dpi)
        legend = _legend(summary, plan, ruler)
        size = (plan.height + legend[-1].bottom + plan.margin, plan.width)
        # The hair's breadth keeps the product with dpi from falling short of the pixel.
        figure = Figure(figsize=((size[1] + 0.01) / dpi, (size[0] + 0.01) / dpi), dpi=dpi, facecolor=PAPER)
        axes = figure.add_axes((0, 0, size[1] / (size[1] + 0.01), size[0] / (size[0] + 0.01)))
        axes.set(xlim=(0, size[1]), ylim=(size[0], 0))
        axes.set_axis_off()
        painter = _Painter(summary, plan, ruler, axes, np.full((*size, 3), rgb(PAPER), np.uint8))
        painter.everything(legend)
        figure.figimage(painter.canvas, zorder=-1)
        figure.savefig(path, format="png", dpi=dpi, metadata={"Software": None})


@dataclass(frozen=True)
class _Entry:
    """A piece of the text below the tree: where it goes, relative to the end of the leaves."""

    text: str
    colour: str | None
    left: int
    top: int
    bottom: int


def _legend(summary: TreeSummary, plan: Placement, ruler: Ruler) -> list[_Entry]:
    """The classes with their colours, as many to a line as fit, then what the picture shows."""
    x, y, line = plan.margin, plan.px(24), plan.px(26)
    entries = []
    if summary.class_names is not None:
        named = [(summary.class_names[k], c) for k, c in class_colours(summary).items()]
        if len(named) < len(summary.class_names):
            named.append(("other classes", LINE))
        for name, colour in named:
            text = ruler.shorten(name, plan.width // 2, 8)
            width = plan.px(22) + ruler.width(text, 8) + plan.px(26)
            if x > plan.margin and x + width > plan.width - plan.margin:
                x, y = plan.margin, y + line
            entries.append(_Entry(text, colour, x, y, y + line))
            x += width
        y += line + plan.px(8)
    real = any(len(node.members) for node in summary)
    for text in (_SHARE, _GENERATED, _REAL) if real else (_SHARE, _GENERATED):
        for part in ruler.wrap(text, plan.width - 2 * plan.margin, 7):
            entries.append(_Entry(part, None, plan.margin, y, y + line))
            y += plan.px(22)
    return entries


class _Painter:
    """Paints one tree: tiles and bars into a canvas of pixels, lines and text into axes that lie over it."""

    def __init__(self, summary: TreeSummary, plan: Placement, ruler: Ruler, axes: Axes, canvas: Pixels) -> None:
        self.summary, self.plan, self.ruler = summary, plan, ruler
        self.axes, self.canvas = axes, canvas
        self.colours = class_colours(summary)

    def everything(self, legend: list[_Entry]) -> None:
        """Edges first, then what stands on them."""
        plan, tree = self.plan, self.summary.topology
        leaves = len(tree.leaves)
        counted = f"{leaves} {'leaf' if leaves == 1 else 'leaves'}, {self.summary.rows:,} images"
        self.text(plan.margin, plan.margin, counted, 11, weight="bold", va="top")
        for node in self.summary:
            self.edges(node)
        for node in self.summary:
            self.block(node, plan.blocks[node.id], leaf=not tree.children(node.id))
        self.row_labels(min(plan.blocks[leaf].left for leaf in tree.leaves), plan.blocks[tree.leaves[0]])
        for entry in legend:
            top, left = plan.height + entry.top, entry.left
            if entry.colour is not None:
                self.fill(Panel(left, top, plan.px(15), plan.px(15), 1), entry.colour)
                left += plan.px(22)
            size, ink = (7, GREY) if entry.colour is None else (8, INK)
            self.text(left, top + plan.px(8), entry.text, size, color=ink, va="center")

    def edges(self, node: NodeSummary) -> None:
        """The way to each child, as wide as its share; the piece that they have in common as wide as the node's."""
        block = self.plan.blocks[node.id]
        children = self.summary.topology.children(node.id)
        if len(children) == 2:
            turn = self.plan.edges[children[0]][1][1]
            self.line(((block.x, block.bottom), (block.x, turn)), node.share)
        for child in children:
            self.line(self.plan.edges[child][-3:], self.summary[child].share)

    def block(self, node: NodeSummary, block: Block, leaf: bool) -> None:
        """One node with its heading, its images and its classes."""
        px = self.plan.px
        share, called, size = percent(node.share), f"node {node.id}", 9 if leaf else 8
        self.text(block.x, block.top + px(11), share, size, weight="bold", va="center", ha="center")
        self.text(block.x, block.top + px(29), called, 6.5, color=GREY, va="center", ha="center")
        self.tiles(block.generated, node.samples, GENERATED, spread=False)
        if block.real is not None:
            self.tiles(block.real, node.members, REAL, spread=not leaf)
        if block.labelled:
            self.row_labels(block.left, block)
        if block.bar is not None:
            self.bar(node, block.bar)
        if block.names is not None and node.count:
            self.names(node, block.names)

    def row_labels(self, right: int, block: Block) -> None:
        """What the two panels show, written left of them."""
        for panel, text, colour in ((block.generated, "generated", GENERATED), (block.real, "real", REAL)):
            if panel is not None:
                middle = panel.top + panel.height // 2
                self.text(right - self.plan.px(8), middle, text, 7, color=colour, va="center", ha="right")

    def tiles(self, panel: Panel, images: Images, colour: str, spread: bool) -> None:
        """A grid of images in a frame: the first ones, or some from all along if they are to `spread`."""
        plan = self.plan
        edge = max(1, plan.frame // 3)
        inside = Panel(panel.left + edge, panel.top + edge, panel.width - 2 * edge, panel.height - 2 * edge, 1)
        self.fill(panel, colour if len(images) else LINE)
        self.fill(inside, PAPER)
        if not len(images):
            x, y = panel.left + panel.width // 2, panel.top + panel.height // 2
            self.text(x, y, "no images", 6.5, color=GREY, va="center", ha="center")
            return
        rows = (panel.height - 2 * plan.frame + plan.gap) // (plan.tile[0] + plan.gap)
        room = min(len(images), rows * panel.columns)
        chosen = np.arange(room) * len(images) // room if spread else np.arange(room)
        for i, tile in enumerate(fit(pixels(images[chosen]), max(plan.tile))):
            row, column = divmod(i, panel.columns)
            top = panel.top + plan.frame + row * (plan.tile[0] + plan.gap)
            left = panel.left + plan.frame + column * (plan.tile[1] + plan.gap)
            self.canvas[top : top + plan.tile[0], left : left + plan.tile[1]] = tile

    def bar(self, node: NodeSummary, bar: Panel) -> None:
        """The classes of a node in the order of the legend, as long as their shares; empty without images."""
        self.fill(bar, LINE if node.count else EMPTY)
        if node.class_counts is None or not node.count:
            return
        done = 0
        for k, colour in self.colours.items():
            left, done = round(bar.width * done / node.count), done + int(node.class_counts[k])
            right = round(bar.width * done / node.count)
            self.fill(Panel(bar.left + left, bar.top, right - left, bar.height, 1), colour)

    def names(self, node: NodeSummary, room: Panel) -> None:
        """The largest classes of a leaf with their shares; the small ones only if all are small."""
        counts, names, px = node.class_counts, self.summary.class_names, self.plan.px
        if counts is None or names is None:
            return
        largest = np.argsort(-counts, kind="stable")[:CLASS_LINES]
        height, swatch = room.height // CLASS_LINES, px(10)
        for line, k in enumerate(k for k in largest if k == largest[0] or counts[k] >= 0.05 * node.count):
            y = room.top + line * height + height // 2
            share = percent(counts[k] / node.count, 0)
            width = room.width - px(16) - px(6) - self.ruler.width(share, 7)
            self.fill(Panel(room.left, y - swatch // 2, swatch, swatch, 1), self.colours.get(int(k), LINE))
            self.text(room.left + px(16), y, self.ruler.shorten(names[k], width, 7), 7, va="center")
            self.text(room.left + room.width, y, share, 7, color=GREY, va="center", ha="right")

    # --- the pen --------------------------------------------------------------------------------------------

    def fill(self, panel: Panel, colour: str) -> None:
        """A rectangle of pixels."""
        rows = slice(panel.top, panel.top + panel.height)
        self.canvas[rows, panel.left : panel.left + panel.width] = rgb(colour)

    def line(self, points: tuple[tuple[int, int], ...], share: float) -> None:
        """A line as wide as a share."""
        x, y = zip(*points, strict=True)
        width = (1.5 + 13 * share) * self.plan.scale * 72 / self.ruler.dpi
        self.axes.plot(x, y, color=LINE, linewidth=width, solid_joinstyle="round", solid_capstyle="butt")

    def text(self, x: int, y: int, text: str, size: float, **style: Any) -> None:  # noqa: ANN401
        """Text that is taken literally, dollar signs and all."""
        style = {"color": INK, **style}
        self.axes.text(x, y, text, fontsize=size, parse_math=False, **style)
