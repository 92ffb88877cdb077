"""Pictures of a tree: generated images, typical real images and the share of the data of every node.

`summarize_tree` passes over the model and the data once. `draw_tree` draws the summary as a PNG file and needs
`treediff[pictures]`; `write_html` writes a page to click through and needs nothing. `draw_strip` and `draw_grid` draw
images in rows and columns as a PNG file: the steps of a sampler, or the same roots decoded by every leaf.
"""

from treediff.pictures.grid import draw_grid, draw_strip
from treediff.pictures.page import write_html
from treediff.pictures.summarize import summarize_tree
from treediff.pictures.summary import NodeSummary, TreeSummary
from treediff.pictures.tree import draw_tree

__all__ = ["NodeSummary", "TreeSummary", "draw_grid", "draw_strip", "draw_tree", "summarize_tree", "write_html"]
