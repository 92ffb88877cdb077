"""Drawing of a tree in the HTML page: thumbnails that are links, joined by edges as wide as the child's share."""

from __future__ import annotations

from collections.abc import Mapping

from treediff.pictures.layout import columns
from treediff.pictures.palette import percent
from treediff.pictures.summary import NodeSummary, TreeSummary

__all__ = ["tree_svg"]

# In CSS pixels.
_THUMBNAIL = 44
_COLUMN = 54
_LEVEL = 104
_MARGIN = 10
_TEXT = 30  # two lines under a thumbnail
_LEAST_COLUMN = 48  # a tree that is wider than its pane shrinks to this before it scrolls


def tree_svg(summary: TreeSummary, thumbnails: Mapping[int, str]) -> str:
    """Return an `<svg>` of the tree; `thumbnails` holds the address of an image for each node."""
    tree = summary.topology
    leaves = len(tree.leaves)
    width = leaves * _COLUMN + 2 * _MARGIN
    height = tree.max_depth * _LEVEL + _THUMBNAIL + _TEXT + 2 * _MARGIN
    at = columns(tree)
    places = {n.id: (_MARGIN + (at[n.id] + 0.5) * _COLUMN, _MARGIN + n.depth * _LEVEL) for n in summary}
    edges = [_edge(places[n.parent], places[n.id], n.share) for n in summary if n.parent is not None]
    nodes = [_node(n, *places[n.id], thumbnails[n.id]) for n in summary]
    # The role is needed because screen readers may skip the links inside a picture.
    # The size is in the style, not in attributes, so that the drawing shrinks with its pane and keeps its shape.
    size = f"width:{width}px;max-width:max(100%,{leaves * _LEAST_COLUMN}px)"
    return "\n".join([f'<svg role="group" viewBox="0 0 {width} {height}" style="{size}">', *edges, *nodes, "</svg>"])


def _edge(above: tuple[float, float], below: tuple[float, float], share: float) -> str:
    """Return a curve from the text under the parent to the top of the child."""
    (x0, y0), (x1, y1) = above, below
    y0 += _THUMBNAIL + _TEXT
    middle = (y0 + y1) / 2
    return (
        f'<path class="edge" stroke-width="{1 + 7 * share:.2f}" '
        f'd="M{x0:g} {y0:g}C{x0:g} {middle:g} {x1:g} {middle:g} {x1:g} {y1:g}"/>'
    )


def _node(node: NodeSummary, x: float, y: float, thumbnail: str) -> str:
    side, left, share = _THUMBNAIL, x - _THUMBNAIL / 2, percent(node.share)
    label = f"node {node.id}, {share} of the data"
    return (
        f'<a href="#node-{node.id}" aria-label="{label}"><title>{label}</title>'
        f'<rect class="frame" x="{left - 2:g}" y="{y - 2:g}" width="{side + 4}" height="{side + 4}" rx="4"/>'
        f'<image href="{thumbnail}" x="{left:g}" y="{y:g}" width="{side}" height="{side}"/>'
        f'<text x="{x:g}" y="{y + side + 14}">{node.id}</text>'
        f'<text x="{x:g}" y="{y + side + 27}">{share}</text></a>'
    )
