"""Pictures of a tree: what every node generates, which real images belong to it, and its share of the data.

`summarize_tree` looks at the model and the data once. `draw_tree` makes a PNG of the result (it needs
`treediff[pictures]`), `write_html` a page to click through (it needs nothing). `draw_strip` and `draw_grid` make a PNG
of images in rows and columns: the steps of a sampler, or the same roots in every leaf.
"""

from treediff.pictures.grid import draw_grid, draw_strip
from treediff.pictures.page import write_html
from treediff.pictures.summarize import summarize_tree
from treediff.pictures.summary import NodeSummary, TreeSummary
from treediff.pictures.tree import draw_tree

__all__ = ["NodeSummary", "TreeSummary", "draw_grid", "draw_strip", "draw_tree", "summarize_tree", "write_html"]
