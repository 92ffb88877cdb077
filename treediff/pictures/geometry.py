"""Where everything in the drawing of a tree goes, in pixels; nothing is painted here.

A node is a *block*: two lines of text, a *panel* of generated images, one of the same images refined, one of real
images, a bar of classes, and for a leaf the names of its classes. Blocks of one depth stand on one line, leaves at the
bottom. A block keeps to the columns of the leaves below it, so no two blocks meet, and no edge crosses one.
"""

from __future__ import annotations

from dataclasses import dataclass

from treediff.pictures.layout import columns, spans
from treediff.pictures.summary import NodeSummary, TreeSummary
from treediff.pictures.tiles import tile_size

__all__ = ["CLASS_LINES", "Block", "Panel", "Placement", "place"]

CLASS_LINES = 3

# In pixels at 150 dots per inch.
_TILE = 64
_TILE_GAP = 3
_FRAME = 4
_COLUMN_GAP = 26
_PANEL_GAP = 6
_LEVEL_GAP = 44
_MARGIN = 28
_ROW_LABEL = 84
_TITLE = 44
_HEADING = 40
_BAR = 11
_LINE = 19
_NAMES = 148
_LEAST_COLUMN = 132
_LEAST_WIDTH = 700


@dataclass(frozen=True)
class Panel:
    """A grid of tiles: its left upper corner, its size in pixels, and how many columns it has."""

    left: int
    top: int
    width: int
    height: int
    columns: int


@dataclass(frozen=True)
class Block:
    """One node: its centre, its extent, and its parts from top to bottom; parts left out are None.

    `names` is the room for the names of a leaf's classes. `labelled` says whether there is room left of the panels
    to say what they show.
    """

    node: int
    x: int
    left: int
    right: int
    top: int
    bottom: int
    generated: Panel
    refined: Panel | None
    real: Panel | None
    bar: Panel | None
    names: Panel | None
    labelled: bool


@dataclass(frozen=True)
class Placement:
    """The whole drawing down to the end of the leaves, with blocks by node and edges by child.

    `tile` is the height and width of an image; `gap` lies between two of them, `frame` around a panel of them.
    """

    width: int
    height: int
    scale: float
    tile: tuple[int, int]
    gap: int
    frame: int
    margin: int
    blocks: dict[int, Block]
    edges: dict[int, tuple[tuple[int, int], ...]]

    def px(self, at_150: float) -> int:
        """A length given in pixels at 150 dots per inch, in pixels here."""
        return max(1, round(at_150 * self.scale))


class _Rulers:
    """Lengths that all blocks share."""

    def __init__(self, summary: TreeSummary, dpi: int) -> None:
        self.scale = dpi / 150
        leaves = len(summary.topology.leaves)
        self.across, self.most_rows = (4, 2) if leaves <= 4 else (3, 2) if leaves <= 12 else (2, 3)
        height, width = summary.nodes[0].samples.shape[2:]
        self.tile = tile_size(height, width, self.px(_TILE))
        self.gap, self.frame = self.px(_TILE_GAP), self.px(_FRAME)
        self.reals = any(len(node.members) for node in summary)
        self.refined = any(node.refined is not None for node in summary)
        self.classes = summary.class_names is not None
        self.column = max(self.panel_width(self.across), self.px(_LEAST_COLUMN)) + self.px(_COLUMN_GAP)

    def px(self, at_150: float) -> int:
        return max(1, round(at_150 * self.scale))

    def panel_width(self, across: int) -> int:
        return across * (self.tile[1] + self.gap) - self.gap + 2 * self.frame

    def panel_height(self, rows: int) -> int:
        return rows * (self.tile[0] + self.gap) - self.gap + 2 * self.frame

    def fitting(self, width: int) -> int:
        """How many tiles stand side by side in a width."""
        return max(1, (width - 2 * self.frame + self.gap) // (self.tile[1] + self.gap))

    def block_height(self, rows: int, leaf: bool) -> int:
        parts = [self.panel_height(rows)] * (1 + self.refined + self.reals)
        if self.classes:
            parts.append(self.px(_BAR))
            parts.extend([CLASS_LINES * self.px(_LINE)] if leaf else [])
        return self.px(_HEADING) + sum(parts) + (len(parts) - 1) * self.px(_PANEL_GAP)


def place(summary: TreeSummary, dpi: int) -> Placement:
    """Find the place of every block and edge."""
    tree, rulers = summary.topology, _Rulers(summary, dpi)
    margin = rulers.px(_MARGIN)
    wanted = margin * 2 + rulers.px(_ROW_LABEL) + rulers.column * len(tree.leaves)
    width = max(wanted, rulers.px(_LEAST_WIDTH))
    first = (width - wanted) // 2 + margin + rulers.px(_ROW_LABEL)
    inner_height = rulers.block_height(1, leaf=False)
    step = inner_height + rulers.px(_LEVEL_GAP)
    deepest = max((tree.depth(node) + 1 for node in tree.ids if tree.children(node)), default=0)
    leaf_rows = min(rulers.most_rows, -(-max(_shown(node) for node in summary) // rulers.across))
    at, reach = columns(tree), spans(tree)
    blocks = {}
    for node in summary:
        leaf = not tree.children(node.id)
        x = first + round((at[node.id] + 0.5) * rulers.column)
        top = rulers.px(_TITLE) + margin + step * (deepest if leaf else node.depth)
        begin, end = (first + rulers.column * (edge + side) for side, edge in enumerate(reach[node.id]))
        room = 2 * min(x - begin, end - x) - rulers.px(_COLUMN_GAP)
        blocks[node.id] = _block(rulers, node, x, top, rulers.column if leaf else room, leaf_rows if leaf else 1, leaf)
    height = rulers.px(_TITLE) + margin + step * deepest + rulers.block_height(leaf_rows, leaf=True)
    edges = {
        node.id: _edge(blocks[node.parent], blocks[node.id], rulers.px(_LEVEL_GAP))
        for node in summary
        if node.parent is not None
    }
    return Placement(width, height, rulers.scale, rulers.tile, rulers.gap, rulers.frame, margin, blocks, edges)


def _shown(node: NodeSummary) -> int:
    return max(len(node.samples), len(node.members))


def _block(rulers: _Rulers, node: NodeSummary, x: int, top: int, room: int, rows: int, leaf: bool) -> Block:
    """Lay out one node; an inner node shows as many tiles as there is room for, in one row."""
    across, labelled = rulers.across, False
    if not leaf:
        beside = rulers.fitting(room - 2 * rulers.px(_ROW_LABEL))
        labelled = beside >= rulers.across
        across = min(beside if labelled else rulers.fitting(room), max(_shown(node), rulers.across))
    height, gap = rulers.panel_height(rows), rulers.px(_PANEL_GAP)
    width = rulers.panel_width(across)
    left, y = x - width // 2, top + rulers.px(_HEADING)
    generated, refined, real, bar, names = Panel(left, y, width, height, across), None, None, None, None
    y += height + gap
    if rulers.refined:
        refined = Panel(left, y, width, height, across)
        y += height + gap
    if rulers.reals:
        real = Panel(left, y, width, height, across)
        y += height + gap
    if rulers.classes:
        bar = Panel(left, y, width, rulers.px(_BAR), 1)
        y += rulers.px(_BAR) + gap
        if leaf:
            wide = max(width, min(rulers.px(_NAMES), rulers.column - rulers.px(_FRAME)))
            names = Panel(x - wide // 2, y, wide, CLASS_LINES * rulers.px(_LINE), 1)
    bottom = top + rulers.block_height(rows, leaf)
    return Block(node.id, x, left, left + width, top, bottom, generated, refined, real, bar, names, labelled)


def _edge(above: Block, below: Block, level_gap: int) -> tuple[tuple[int, int], ...]:
    """From the bottom of a parent down, across, and down to the top of its child."""
    turn = above.bottom + level_gap // 2
    if above.x == below.x:
        return (above.x, above.bottom), (below.x, below.top)
    return (above.x, above.bottom), (above.x, turn), (below.x, turn), (below.x, below.top)
