"""Drawing of a tree as one PNG file: every node with generated and real images, its share and its classes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from treediff.pictures.figure import figure, montage, shorten
from treediff.pictures.layout import columns
from treediff.pictures.palette import EMPTY, GENERATED, GREY, INK, LINE, REAL, REFINED, class_colours, percent
from treediff.pictures.summary import Images, NodeSummary, TreeSummary
from treediff.pictures.tiles import fit, pixels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_tree"]

# In inches.
_TILE, _SIDE_BY_SIDE = 0.36, 4
_BLOCK = _SIDE_BY_SIDE * (_TILE + 0.03)
_COLUMN_GAP, _LEVEL_GAP, _MARGIN, _HEADING, _LABEL = 0.22, 0.3, 0.2, 0.34, 0.62
_BAR, _NAME, _CLASS_LINES = 0.09, 0.14, 3
_LEAST_WIDTH = 5.2

_SHARE = "Percentage and width of an edge: share of the images that reach the node (mean probability)."
_DRAWN = "drawn from the prior through the node."
_SHARP = "Refined: the images above after the second stage, each in the same place."
_MEMBERS = "Real: typical images whose most probable leaf is the node or lies below it."


def draw_tree(summary: TreeSummary, path: str | os.PathLike[str], *, dpi: int = 150) -> None:
    """Draw a whole tree into a PNG file.

    Leaves are at the bottom, parents centred above their children. Every node shows generated images, real images that
    belong to the node, and, if the summary has labels, a bar of classes. A leaf also names its largest classes.
    Refined samples, if the summary has any, are below the samples, each in the same place.

    The drawing grows with the tree, by about 1.8 inches for each leaf. The same summary gives the same bytes.

    Args:
        summary: a result of `summarize_tree`.
        path: the file, whose name ends in .png; an existing file is replaced.
        dpi: dots per inch; the number of pixels grows with `dpi`.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if the name does not end in .png, `dpi` is below 40, or the drawing would be too large.
    """
    if dpi < 40:
        raise ValueError(f"dpi must be at least 40 for labels that can be read, found {dpi}")
    leaves = len(summary.topology.leaves)
    width = max(_LEAST_WIDTH, _MARGIN + _LABEL + leaves * (_BLOCK + _COLUMN_GAP) + _MARGIN)
    drawing = _Drawing(summary, width)
    advice = f"; choose dpi below {dpi}, or use write_html, which needs nothing"
    with figure(path, width, drawing.height, dpi, "draw_tree", advice) as drawn:
        axes = drawn.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, width), ylim=(drawing.height, 0))
        axes.set_axis_off()
        drawing.draw(axes)


class _Drawing:
    """Places and parts of one drawing, in inches from the left upper corner.

    Args:
        summary: summary of the tree.
        width: width of the drawing.
    """

    def __init__(self, summary: TreeSummary, width: float) -> None:
        self.summary, self.colours, self.width = summary, class_colours(summary), width
        nodes = list(summary)
        self.rows = [
            (name, colour, max(-(-len(images) // _SIDE_BY_SIDE) for images in kind))
            for name, colour, kind in (
                ("TreeVAE" if nodes[0].refined is not None else "generated", GENERATED, [n.samples for n in nodes]),
                ("refined", REFINED, [n.samples[:0] if n.refined is None else n.refined for n in nodes]),
                ("real", REAL, [n.members for n in nodes]),
            )
            if any(len(images) for images in kind)
        ]
        high, wide = nodes[0].samples.shape[2:]
        self.row: float = _TILE * high / wide + 0.03
        panels = sum(rows * self.row + 0.05 for _, _, rows in self.rows)
        labels = summary.class_names is not None
        self.block: float = _HEADING + panels + (_BAR + 0.05 if labels else 0)
        self.names = _CLASS_LINES * _NAME if labels else 0.0
        self.title = _MARGIN + 0.25
        self.tree_end = self.title + (summary.topology.max_depth + 1) * (self.block + _LEVEL_GAP) + self.names
        entries = 0 if summary.class_names is None else min(len(summary.class_names), len(self.colours) + 1)
        self.per_line = max(1, int((width - 2 * _MARGIN) // 1.5))
        self.class_lines = -(-entries // self.per_line)
        self.height = self.tree_end + 0.2 * self.class_lines + 0.17 * (len(self.rows) + 1) + _MARGIN

    def draw(self, axes: Axes) -> None:
        """Draw edges first, then the nodes, then the legend."""
        leaves = len(self.summary.topology.leaves)
        counted = f"{leaves} {'leaf' if leaves == 1 else 'leaves'}, {self.summary.rows:,} images"
        axes.text(_MARGIN, _MARGIN, counted, fontsize=11, weight="bold", va="top", color=INK)
        places = columns(self.summary.topology)
        x = {node: _MARGIN + _LABEL + (at + 0.5) * (_BLOCK + _COLUMN_GAP) for node, at in places.items()}
        for node in self.summary:
            if node.parent is not None:
                self._edge(axes, node, x[node.parent], x[node.id])
        for node in self.summary:
            self._node(axes, node, x[node.id])
        self._legend(axes)

    def _top(self, depth: int) -> float:
        return self.title + depth * (self.block + _LEVEL_GAP)

    def _edge(self, axes: Axes, node: NodeSummary, above: float, below: float) -> None:
        """Draw the edge from the parent, as wide as the share of the node."""
        start, end = self._top(node.depth - 1) + self.block, self._top(node.depth)
        turn = start + 0.4 * (end - start)
        style: dict[str, Any] = {"color": LINE, "linewidth": 1 + 7 * node.share, "solid_capstyle": "butt", "zorder": 0}
        axes.plot([above, above, below, below], [start, turn, turn, end], **style)

    def _node(self, axes: Axes, node: NodeSummary, x: float) -> None:
        top, left = self._top(node.depth), x - _BLOCK / 2
        axes.text(x, top + 0.11, percent(node.share), fontsize=9, weight="bold", va="center", ha="center", color=INK)
        axes.text(x, top + 0.25, f"node {node.id}", fontsize=6.5, va="center", ha="center", color=GREY)
        y = top + _HEADING
        kinds = {"TreeVAE": node.samples, "generated": node.samples, "refined": node.refined, "real": node.members}
        for name, colour, rows in self.rows:
            high = rows * self.row
            images = kinds[name]
            self._panel(axes, images, colour, left, y, high)
            if node.parent is None or left < _MARGIN + _LABEL + _COLUMN_GAP:  # elsewhere a neighbour is in the way
                axes.text(left - 0.06, y + high / 2, name, fontsize=7, color=colour, va="center", ha="right")
            y += high + 0.05
        if node.class_counts is not None:
            self._classes(axes, node, left, y)

    def _panel(self, axes: Axes, images: Images | None, colour: str, left: float, top: float, high: float) -> None:
        """Draw images in a frame."""
        from matplotlib.patches import Rectangle

        empty = images is None or not len(images)
        axes.add_patch(Rectangle((left, top), _BLOCK, high, fill=False, edgecolor=LINE if empty else colour, lw=1.2))
        if images is None or not len(images):
            axes.text(
                left + _BLOCK / 2, top + high / 2, "no images", fontsize=6.5, va="center", ha="center", color=GREY
            )
            return
        shown = fit(pixels(images), max(64, *images.shape[2:]))
        tiles = montage(shown, _SIDE_BY_SIDE, gap=max(1, round(0.03 / _TILE * max(shown.shape[1:3]))))
        wide = _BLOCK - 0.03
        scale = wide / tiles.shape[1]
        extent = (left + 0.015, left + 0.015 + wide, top + 0.015 + scale * tiles.shape[0], top + 0.015)
        axes.imshow(tiles, extent=extent, interpolation="nearest", aspect="auto")
        axes.set(xlim=(0, self.width), ylim=(self.height, 0))

    def _classes(self, axes: Axes, node: NodeSummary, left: float, top: float) -> None:
        """Draw the bar of classes, and below a leaf the names of its largest classes."""
        from matplotlib.patches import Rectangle

        counts, names = node.class_counts, self.summary.class_names
        axes.add_patch(Rectangle((left, top), _BLOCK, _BAR, facecolor=LINE if node.count else EMPTY))
        if counts is None or names is None or not node.count:
            return
        at = left
        for k, colour in self.colours.items():
            wide = _BLOCK * counts[k] / node.count
            axes.add_patch(Rectangle((at, top), wide, _BAR, facecolor=colour))
            at += wide
        if self.summary.topology.children(node.id):
            return
        largest = np.argsort(-counts, kind="stable")[:_CLASS_LINES]
        shown = [k for k in largest if k == largest[0] or counts[k] >= 0.05 * node.count]
        for line, k in enumerate(shown):
            y = top + _BAR + 0.1 + line * _NAME
            axes.add_patch(Rectangle((left, y - 0.035), 0.07, 0.07, facecolor=self.colours.get(int(k), LINE)))
            text: dict[str, Any] = {"fontsize": 6.5, "va": "center", "parse_math": False}
            axes.text(left + 0.11, y, shorten(names[k], 19), color=INK, **text)
            axes.text(left + _BLOCK, y, percent(counts[k] / node.count, 0), color=GREY, ha="right", **text)

    def _legend(self, axes: Axes) -> None:
        """Write the classes with their colours, then the meaning of the rows."""
        from matplotlib.patches import Rectangle

        y = self.tree_end + 0.05
        if self.summary.class_names is not None:
            named = [(self.summary.class_names[k], colour) for k, colour in self.colours.items()]
            if len(named) < len(self.summary.class_names):
                named.append(("other classes", LINE))
            for i, (name, colour) in enumerate(named):
                x, down = _MARGIN + 1.5 * (i % self.per_line), y + 0.2 * (i // self.per_line)
                axes.add_patch(Rectangle((x, down - 0.05), 0.1, 0.1, facecolor=colour))
                axes.text(x + 0.15, down, shorten(name, 20), fontsize=8, va="center", color=INK, parse_math=False)
            y += 0.2 * self.class_lines
        notes = {
            "generated": f"Generated: {_DRAWN}",
            "TreeVAE": f"TreeVAE: {_DRAWN}",
            "refined": _SHARP,
            "real": _MEMBERS,
        }
        for text, colour in [(_SHARE, GREY), *((notes[name], colour) for name, colour, _ in self.rows)]:
            axes.text(_MARGIN, y + 0.05, text, fontsize=7, va="center", color=colour)
            y += 0.17
