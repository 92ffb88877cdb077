"""Summary of a tree for pictures, as plain arrays: shares, samples, real images and classes of every node.

Letters: `C H W` image, `S` samples, `M` members, `Y` classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from treediff.tree.topology import TreeTopology

__all__ = ["Images", "Ints", "NodeSummary", "TreeSummary"]

Images: TypeAlias = npt.NDArray[np.float32]
Ints: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class NodeSummary:
    """One node of a tree, as plain arrays.

    Args:
        id: the node's id.
        parent: id of the node's parent; None for the root.
        depth: edges between the root and the node.
        share: mean probability with which a row of the data reaches the node, from 0 to 1.
        count: rows whose most probable leaf is the node or lies below it.
        samples: `(S, C, H, W)` images drawn from the prior through the node, in [0, 1].
        members: `(M, C, H, W)` real images that are typical of the node, the most typical of a leaf first.
        member_rows: `(M,)` row numbers of the members in the data.
        member_labels: `(M,)` classes of the members; None without labels.
        class_counts: `(Y,)` number of rows of each class among the `count` rows; None without labels.
        refined: `(S, C, H, W)` the samples after a second stage, in [0, 1], in the order of `samples`; None without a
            second stage.
    """

    id: int
    parent: int | None
    depth: int
    share: float
    count: int
    samples: Images
    members: Images
    member_rows: Ints
    member_labels: Ints | None
    class_counts: Ints | None
    refined: Images | None = None

    def __repr__(self) -> str:
        return f"NodeSummary(id={self.id}, depth={self.depth}, share={self.share:.3f}, count={self.count})"


@dataclass(frozen=True, eq=False)
class TreeSummary:
    """Summary of a tree with everything that its pictures show; made by `summarize_tree`, indexed by node id.

    Args:
        topology: the tree.
        nodes: its nodes in level order.
        rows: number of images that were summarized.
        class_names: names of the `Y` classes; None without labels.
    """

    topology: TreeTopology
    nodes: tuple[NodeSummary, ...]
    rows: int
    class_names: tuple[str, ...] | None

    def __getitem__(self, node: int) -> NodeSummary:
        if node not in self.topology:
            raise KeyError(f"node {node!r} is not in the tree; its nodes are {list(self.topology.ids)}")
        return self.nodes[self.topology.index[node]]

    def __iter__(self) -> Iterator[NodeSummary]:
        return iter(self.nodes)

    def __len__(self) -> int:
        return len(self.nodes)

    def __repr__(self) -> str:
        leaves, shape = len(self.topology.leaves), self.nodes[0].samples.shape[1:]
        return f"TreeSummary({len(self)} nodes, {leaves} leaves, {self.rows} images of {shape})"
