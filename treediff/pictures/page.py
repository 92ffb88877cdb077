"""HTML page of a tree to click through: one file that contains every image and loads nothing."""

from __future__ import annotations

import base64
import hashlib
import os
from html import escape
from importlib.resources import files
from pathlib import Path

import numpy as np

from treediff.pictures.palette import percent
from treediff.pictures.summary import Images, NodeSummary, TreeSummary
from treediff.pictures.svg import tree_svg
from treediff.pictures.tiles import fit, pixels, png_bytes, tile_size

__all__ = ["write_html"]

_SIDE = 72  # side of an image in the details, in CSS pixels
_LARGEST = 128  # larger images are averaged down to this
_MOST_CLASSES = 20

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'; script-src 'sha256-{digest}'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<div class="page">
<header>
<h1>{title}</h1>
<p>{facts}. Click a node, or use the keys <kbd>↑</kbd> parent, <kbd>↓</kbd> child, <kbd>←</kbd> <kbd>→</kbd> \
sibling and neighbours, <kbd>Home</kbd> root.</p>
</header>
<nav class="tree" aria-label="The tree">
{tree}
</nav>
<main>
{sections}
</main>
</div>
<script>{script}</script>
</body>
</html>
"""


def write_html(summary: TreeSummary, path: str | os.PathLike[str], *, title: str | None = None) -> None:
    """Write a page on which a tree can be clicked through node by node.

    The page is one file that loads nothing, so it opens from a disk and can be sent by mail. The tree is on the left,
    and the chosen node on the right. A node has its share of the data, generated images, real images, its classes, and
    the path to the node. Each generated image is above its refined image, if there is one. The arrow keys move through
    the tree; `page.html#node-7` opens node 7. The same summary gives the same bytes.

    Args:
        summary: a result of `summarize_tree`.
        path: the file; an existing file is replaced.
        title: the heading, a plain text; markup is escaped.
    """
    leaves = len(summary.topology.leaves)
    counted = f"{leaves} {'leaf' if leaves == 1 else 'leaves'}"
    style, script = (files(__package__).joinpath(f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    page = _PAGE.format(
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        title=escape(title if title is not None else f"A tree of {counted}"),
        style=style,
        facts=f"{counted}, {summary.rows:,} images",
        tree=tree_svg(summary, {node.id: _data_url(node.samples[0]) for node in summary}),
        sections="\n".join(_section(summary, node) for node in summary),
        script=script,
    )
    Path(path).write_text(page, encoding="utf-8", newline="\n")


def _data_url(image: Images) -> str:
    """Encode an image `(C, H, W)` as a data URL."""
    shown = pixels(image[None])
    if max(shown.shape[1:3]) > _LARGEST:
        shown = fit(shown, _LARGEST)
    return "data:image/png;base64," + base64.b64encode(png_bytes(shown[0])).decode()


def _section(summary: TreeSummary, node: NodeSummary) -> str:
    """Return the details of one node as HTML."""
    tree = summary.topology
    kind = "root" if node.parent is None else "inner" if tree.children(node.id) else "leaf"
    ways = "".join(f' data-{way}="#node-{to}"' for way, to in _neighbours(summary, node).items())
    called = {"root": "root", "inner": "inner node", "leaf": "leaf"}[kind]
    facts = {
        "depth": str(node.depth),
        "share of the data": percent(node.share),
        "images assigned": f"{node.count:,}",
        "children": " ".join(_link(child) for child in tree.children(node.id)) or "none",
    }
    rows = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items())
    parts = [
        f'<section id="node-{node.id}" class="{kind}"{ways} tabindex="-1" aria-labelledby="title-{node.id}">',
        f'<nav class="crumbs" aria-label="Path from the root"><ol>{_crumbs(tree.path(node.id))}</ol></nav>',
        f'<h2 id="title-{node.id}">Node {node.id}, {called}</h2>',
        f'<dl class="facts">{rows}</dl>',
        _generated(node),
        _tiles("real", "Real images, the typical ones", node.members, _captions(summary, node)),
        _classes(summary, node),
        "" if node.count else '<p class="hint">No image has its most probable leaf here.</p>',
        "</section>",
    ]
    return "\n".join(part for part in parts if part)


def _neighbours(summary: TreeSummary, node: NodeSummary) -> dict[str, int]:
    """Return the nodes that the arrow keys lead to: parent, first child, and the neighbours at its depth."""
    tree = summary.topology
    level = tree.levels[node.depth]
    place = level.index(node.id)
    ways = {} if node.parent is None else {"up": node.parent}
    if tree.children(node.id):
        ways["down"] = tree.children(node.id)[0]
    if place > 0:
        ways["left"] = level[place - 1]
    if place + 1 < len(level):
        ways["right"] = level[place + 1]
    return ways


def _link(node: int) -> str:
    return f'<a href="#node-{node}" aria-label="node {node}">{node}</a>'


def _crumbs(path: tuple[int, ...]) -> str:
    *above, last = path
    steps = [f"<li>{_link(node)}</li>" for node in above]
    return "".join([*steps, f'<li aria-current="page">{last}</li>'])


def _captions(summary: TreeSummary, node: NodeSummary) -> list[str]:
    captions = [f"real image, row {row}" for row in node.member_rows]
    if node.member_labels is None or summary.class_names is None:
        return captions
    names = (summary.class_names[k] for k in node.member_labels)
    return [f"{caption}: {name}" for caption, name in zip(captions, names, strict=True)]


def _generated(node: NodeSummary) -> str:
    """Return the generated images of a node, each above its refined image if there are refined samples."""
    numbers = range(1, len(node.samples) + 1)
    if node.refined is None:
        return _tiles("generated", "Generated", node.samples, [f"generated image {i}" for i in numbers])
    pairs = zip(numbers, node.samples, node.refined, strict=True)
    items = "".join(
        f'<li><div class="generated">{_img(blurry, f"image {i} by the TreeVAE")}</div>'
        f'<div class="refined">{_img(sharp, f"image {i} refined")}</div></li>'
        for i, blurry, sharp in pairs
    )
    heading = '<span class="generated">TreeVAE</span> above, <span class="refined">refined</span> below'
    return f'<div class="pairs"><h3>{heading}</h3><ul class="tiles">{items}</ul></div>'


def _tiles(kind: str, heading: str, images: Images, captions: list[str]) -> str:
    """Return a heading with images side by side below."""
    if not len(images):
        return ""
    items = "".join(f"<li>{_img(image, text)}</li>" for image, text in zip(images, captions, strict=True))
    return f'<div class="{kind}"><h3>{heading}</h3><ul class="tiles">{items}</ul></div>'


def _img(image: Images, caption: str) -> str:
    """Return an image with a caption as its alternative text and its tooltip."""
    height, width = image.shape[1:]
    tall, wide = tile_size(height, width, min(max(height, width, _SIDE), _LARGEST))
    text = escape(caption)
    return f'<img src="{_data_url(image)}" width="{wide}" height="{tall}" alt="{text}" title="{text}">'


def _classes(summary: TreeSummary, node: NodeSummary) -> str:
    """Return a table of the node's classes with bars, the largest class first."""
    counts, names = node.class_counts, summary.class_names
    if counts is None or names is None or not node.count:
        return ""
    order = [int(k) for k in np.argsort(-counts, kind="stable") if counts[k]]
    rows = [(names[k], int(counts[k])) for k in order[:_MOST_CLASSES]]
    if order[_MOST_CLASSES:]:
        rest = order[_MOST_CLASSES:]
        rows.append((f"{len(rest)} more", int(counts[rest].sum())))
    lines = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        f'<td><div class="bar" style="width:{100 * count / node.count:.1f}%"></div></td>'
        f'<td class="count">{count:,} ({percent(count / node.count)})</td></tr>'
        for name, count in rows
    )
    return f'<div class="classes"><h3>Classes</h3><table>{lines}</table></div>'
