"""The whole tree as one PNG. Tiles are set pixel by pixel; matplotlib adds lines and text."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from treediff.pictures.canvas import MOST_PIXELS, Canvas, check_name, plain_matplotlib
from treediff.pictures.geometry import CLASS_LINES, Block, Panel, Placement, place
from treediff.pictures.palette import (
    EMPTY,
    GENERATED,
    GREY,
    INK,
    LINE,
    PAPER,
    REAL,
    REFINED,
    class_colours,
    percent,
)
from treediff.pictures.summary import Images, NodeSummary, TreeSummary
from treediff.pictures.text import Ruler
from treediff.pictures.tiles import fit, pixels

__all__ = ["draw_tree"]

_SHARE = "Percentage and width of an edge: share of the images that reach the node (mean probability)."
_GENERATED = "Generated: drawn from the prior through the node."
_BLURRY = "TreeVAE: drawn from the prior through the node."
_SHARP = "Refined: the images above once more, after the second stage, each in the same place."
_REAL = "Real: typical ones of the images whose most probable leaf is the node or lies below it."


def draw_tree(summary: TreeSummary, path: str | os.PathLike[str], *, dpi: int = 150) -> None:
    """Draw a whole tree into a PNG file.

    Leaves stand at the bottom, parents centred above their children. Every node shows what it generates, real images
    that belong to it, and, if the summary has labels, a bar of its classes; a leaf also names its largest classes. If
    the summary has refined samples, they stand below the blurry ones, each at the place of the one it was made from.

    The picture grows with the tree, by 160 to 270 pixels per leaf at 150 dots per inch. The same summary gives the same
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
    check_name(path, "draw_tree")
    if dpi < 40:
        raise ValueError(f"dpi must be at least 40 for labels that can be read, found {dpi}")
    plan = place(summary, dpi)
    if max(plan.width, plan.height) > MOST_PIXELS:
        raise ValueError(
            f"the picture of {len(summary.topology.leaves)} leaves would have {plan.width} x {plan.height} pixels, "
            f"more than {MOST_PIXELS} to a side; choose dpi below {dpi}, or use write_html"
        )
    with plain_matplotlib("draw_tree", ", or use write_html, which needs nothing"):
        ruler = Ruler(dpi)
        legend = _legend(summary, plan, ruler)
        canvas = Canvas(plan.height + legend[-1].bottom + plan.margin, plan.width, dpi)
        _Painter(summary, plan, ruler, canvas).everything(legend)
        canvas.save(path)


@dataclass(frozen=True)
class _Entry:
    """A piece of the text below the tree: where it goes, relative to the end of the leaves."""

    text: str
    size: float
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
            entries.append(_Entry(text, 8, colour, x, y, y + line))
            x += width
        y += line + plan.px(8)
    for text, frame in _notes(summary):
        x = plan.margin if frame is None else plan.margin + plan.px(22)
        for i, part in enumerate(ruler.wrap(text, plan.width - plan.margin - x, 7)):
            swatch = i == 0 and frame is not None
            entries.append(_Entry(part, 7, frame if swatch else None, plan.margin if swatch else x, y, y + line))
            y += plan.px(22)
    return entries


def _notes(summary: TreeSummary) -> list[tuple[str, str | None]]:
    """What the picture shows; with refined samples, whose rows not every node has room to name, also the frames."""
    real = any(len(node.members) for node in summary)
    if all(node.refined is None for node in summary):
        return [(text, None) for text in (_SHARE, _GENERATED, *([_REAL] if real else []))]
    return [(_SHARE, None), (_BLURRY, GENERATED), (_SHARP, REFINED), *([(_REAL, REAL)] if real else [])]


class _Painter:
    """Paints one tree on a canvas."""

    def __init__(self, summary: TreeSummary, plan: Placement, ruler: Ruler, canvas: Canvas) -> None:
        self.summary, self.plan, self.ruler, self.canvas = summary, plan, ruler, canvas
        self.colours = class_colours(summary)

    def everything(self, legend: list[_Entry]) -> None:
        """Edges first, then what stands on them."""
        plan, tree = self.plan, self.summary.topology
        leaves = len(tree.leaves)
        counted = f"{leaves} {'leaf' if leaves == 1 else 'leaves'}, {self.summary.rows:,} images"
        self.canvas.text(plan.margin, plan.margin, counted, 11, weight="bold", va="top")
        for node in self.summary:
            self.edges(node)
        for node in self.summary:
            self.block(node, plan.blocks[node.id], leaf=not tree.children(node.id))
        self.row_labels(min(plan.blocks[leaf].left for leaf in tree.leaves), plan.blocks[tree.leaves[0]])
        for entry in legend:
            top, left = plan.height + entry.top, entry.left
            if entry.colour is not None:
                self.canvas.fill(Panel(left, top, plan.px(15), plan.px(15), 1), entry.colour)
                left += plan.px(22)
            ink = GREY if entry.size == 7 else INK
            self.canvas.text(left, top + plan.px(8), entry.text, entry.size, color=ink, va="center")

    def edges(self, node: NodeSummary) -> None:
        """The way to each child, as wide as its share; the piece that they have in common as wide as the node's."""
        block = self.plan.blocks[node.id]
        children = self.summary.topology.children(node.id)
        if len(children) == 2:
            turn = self.plan.edges[children[0]][1][1]
            self.canvas.line(((block.x, block.bottom), (block.x, turn)), self.width(node.share))
        for child in children:
            self.canvas.line(self.plan.edges[child][-3:], self.width(self.summary[child].share))

    def width(self, share: float) -> float:
        """How wide the edge to a node is."""
        return (1.5 + 13 * share) * self.plan.scale

    def block(self, node: NodeSummary, block: Block, leaf: bool) -> None:
        """One node with its heading, its images and its classes."""
        px = self.plan.px
        share, called, size = percent(node.share), f"node {node.id}", 9 if leaf else 8
        self.canvas.text(block.x, block.top + px(11), share, size, weight="bold", va="center", ha="center")
        self.canvas.text(block.x, block.top + px(29), called, 6.5, color=GREY, va="center", ha="center")
        self.tiles(block.generated, node.samples, GENERATED, spread=False)
        if block.refined is not None:
            refined = node.samples[:0] if node.refined is None else node.refined
            self.tiles(block.refined, refined, REFINED, spread=False)
        if block.real is not None:
            self.tiles(block.real, node.members, REAL, spread=not leaf)
        if block.labelled:
            self.row_labels(block.left, block)
        if block.bar is not None:
            self.bar(node, block.bar)
        if block.names is not None and node.count:
            self.names(node, block.names)

    def row_labels(self, right: int, block: Block) -> None:
        """What the panels show, written left of them."""
        drawn = "generated" if block.refined is None else "TreeVAE"
        for panel, text, colour in (
            (block.generated, drawn, GENERATED),
            (block.refined, "refined", REFINED),
            (block.real, "real", REAL),
        ):
            if panel is not None:
                middle = panel.top + panel.height // 2
                self.canvas.text(right - self.plan.px(8), middle, text, 7, color=colour, va="center", ha="right")

    def tiles(self, panel: Panel, images: Images, colour: str, spread: bool) -> None:
        """A grid of images in a frame: the first ones, or some from all along if they are to `spread`."""
        plan = self.plan
        edge = max(1, plan.frame // 3)
        inside = Panel(panel.left + edge, panel.top + edge, panel.width - 2 * edge, panel.height - 2 * edge, 1)
        self.canvas.fill(panel, colour if len(images) else LINE)
        self.canvas.fill(inside, PAPER)
        if not len(images):
            x, y = panel.left + panel.width // 2, panel.top + panel.height // 2
            self.canvas.text(x, y, "no images", 6.5, color=GREY, va="center", ha="center")
            return
        rows = (panel.height - 2 * plan.frame + plan.gap) // (plan.tile[0] + plan.gap)
        room = min(len(images), rows * panel.columns)
        chosen = np.arange(room) * len(images) // room if spread else np.arange(room)
        for i, tile in enumerate(fit(pixels(images[chosen]), max(plan.tile))):
            row, column = divmod(i, panel.columns)
            top = panel.top + plan.frame + row * (plan.tile[0] + plan.gap)
            left = panel.left + plan.frame + column * (plan.tile[1] + plan.gap)
            self.canvas.put(tile, left, top)

    def bar(self, node: NodeSummary, bar: Panel) -> None:
        """The classes of a node in the order of the legend, as long as their shares; empty without images."""
        self.canvas.fill(bar, LINE if node.count else EMPTY)
        if node.class_counts is None or not node.count:
            return
        done = 0
        for k, colour in self.colours.items():
            left, done = round(bar.width * done / node.count), done + int(node.class_counts[k])
            right = round(bar.width * done / node.count)
            self.canvas.fill(Panel(bar.left + left, bar.top, right - left, bar.height, 1), colour)

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
            self.canvas.fill(Panel(room.left, y - swatch // 2, swatch, swatch, 1), self.colours.get(int(k), LINE))
            self.canvas.text(room.left + px(16), y, self.ruler.shorten(names[k], width, 7), 7, va="center")
            self.canvas.text(room.left + room.width, y, share, 7, color=GREY, va="center", ha="right")
