"""Topology of a tree: the children of each node. No parameters, no trainable tensors.

A `TreeTopology` is a value. Growing or pruning returns a new topology and does not change the old one. Every
node has a **permanent integer id**: splitting assigns ids never used before, and pruning retires ids
permanently. So all that is stored by id (parameters, images, notes) still belongs to the same node afterwards.

Nodes are listed in *level order*: by depth, and from left to right within a depth. A node has two children,
one child (a *pass-through*, whose other child was pruned) or no child (a *leaf*).

Letters: `N` nodes, `I` routed nodes (nodes with two children), `K` leaves.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from types import MappingProxyType
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt

__all__ = ["TreeTopology"]


@dataclass(frozen=True)
class TreeTopology:
    """Immutable binary tree with permanent node ids.

    Lists are accepted, too, and kept as tuples.

    Args:
        ids: node ids in level order; the root comes first.
        left: id of each node's left child, or None, in the same order.
        right: id of each node's right child, or None, in the same order.
        next_id: the first id that was never used.

    Raises:
        ValueError: if the three tuples do not describe one binary tree in level order.

    Examples:
        >>> tree = TreeTopology.balanced(1)
        >>> tree.leaves
        (1, 2)
        >>> tree.split(2).leaves
        (1, 3, 4)
        >>> tree.split(2).prune(1).leaves
        (3, 4)
    """

    ids: tuple[int, ...]
    left: tuple[int | None, ...]
    right: tuple[int | None, ...]
    next_id: int

    def __post_init__(self) -> None:
        for name in ("ids", "left", "right"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.ids or not len(self.ids) == len(self.left) == len(self.right):
            raise ValueError(
                "a tree needs at least a root, and one left and one right entry per node; found "
                f"{len(self.ids)} ids, {len(self.left)} left and {len(self.right)} right entries"
            )
        order = [self.ids[0]]
        children = dict(zip(self.ids, zip(self.left, self.right, strict=True), strict=True))
        for node in order:
            if len(order) > len(self.ids):
                break
            order.extend(c for c in children.get(node, ()) if c is not None)
        if tuple(order) != self.ids or len(children) != len(self.ids):
            raise ValueError(
                "nodes must form one tree, listed in level order with each id once; found ids "
                f"{list(self.ids)}, but following children from the root gives {order[: len(self.ids) + 1]}"
            )
        if min(self.ids) < 0 or self.next_id <= max(self.ids):
            raise ValueError(
                f"ids must be at least 0 and below next_id; found ids from {min(self.ids)} to "
                f"{max(self.ids)} and next_id {self.next_id}"
            )
        # Computed now: Python 3.11 takes a lock at the first use, and torch.compile cannot trace a lock.
        for name in ("index", "parents", "leaves", "routed", "levels", "_turns"):
            getattr(self, name)

    # --- making trees -------------------------------------------------------------------------------------

    @classmethod
    def balanced(cls, depth: int) -> TreeTopology:
        """Build the full binary tree with `2**depth` leaves; depth 0 is a single root, the tree of a plain VAE."""
        if depth < 0:
            raise ValueError(f"depth must be at least 0, found {depth}")
        inner, total = 2**depth - 1, 2 ** (depth + 1) - 1
        pad: tuple[None, ...] = (None,) * (total - inner)
        return cls(
            ids=tuple(range(total)),
            left=tuple(2 * i + 1 for i in range(inner)) + pad,
            right=tuple(2 * i + 2 for i in range(inner)) + pad,
            next_id=total,
        )

    @classmethod
    def chain(cls, depth: int) -> TreeTopology:
        """Build a root with one descendant per depth and no branching: the tree of a LadderVAE."""
        if depth < 0:
            raise ValueError(f"depth must be at least 0, found {depth}")
        return cls(
            ids=tuple(range(depth + 1)),
            left=(*range(1, depth + 1), None),
            right=(None,) * (depth + 1),
            next_id=depth + 1,
        )

    @classmethod
    def from_children(
        cls, children: dict[int, tuple[int | None, int | None]], *, root: int, next_id: int
    ) -> TreeTopology:
        """Build the tree below `root` from a map of node id to (left child, right child).

        Leaves may be missing from the map.
        """
        order = [root]
        for node in order:
            order.extend(c for c in children.get(node, (None, None)) if c is not None)
            if len(order) > 2 * len(children) + 1:
                raise ValueError(f"the children of {root} do not form a tree: some node is reached twice")
        pairs = [children.get(node, (None, None)) for node in order]
        return cls(tuple(order), tuple(p[0] for p in pairs), tuple(p[1] for p in pairs), next_id)

    def split(self, leaf: SupportsIndex) -> TreeTopology:
        """Give `leaf` two children with new ids; the left child is `next_id`.

        Raises:
            KeyError: if there is no such node.
            ValueError: if the node is not a leaf.
        """
        leaf = self._leaf(leaf)
        children = self._children_map()
        children[leaf] = (self.next_id, self.next_id + 1)
        return self.from_children(children, root=self.root, next_id=self.next_id + 2)

    def prune(self, leaf: SupportsIndex) -> TreeTopology:
        """Remove `leaf`, and every ancestor that then has no children.

        A parent that keeps its other child becomes a pass-through. It decides no longer, and all images that
        reach it go on to the remaining child.

        Raises:
            KeyError: if there is no such node.
            ValueError: if the node is not a leaf, or is the only leaf.
        """
        leaf = self._leaf(leaf)
        if len(self.leaves) == 1:
            raise ValueError(f"node {leaf} is the only leaf: a tree keeps at least one")
        children = self._children_map()
        gone: int | None = leaf
        while gone is not None:
            parent = self.parent(gone)
            children.pop(gone, None)
            if parent is None:
                break
            first, second = children[parent]
            children[parent] = (None if first == gone else first, None if second == gone else second)
            gone = parent if children[parent] == (None, None) else None
        return self.from_children(children, root=self.root, next_id=self.next_id)

    def contracted(self) -> TreeTopology:
        """Return the tree without pass-throughs: each is replaced by the next node below that decides, or the leaf.

        Examples:
            >>> TreeTopology.balanced(1).split(2).prune(4).contracted()
            TreeTopology(0(1 3), next_id=5)
        """

        def end(node: int) -> int:
            while len(below := self.children(node)) == 1:
                node = below[0]
            return node

        def ends(node: int) -> tuple[int | None, int | None]:
            left, right = self.children(node)
            return end(left), end(right)

        children = {node: ends(node) for node in self.routed}
        return self.from_children(children, root=end(self.root), next_id=self.next_id)

    # --- reading trees ------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, node: object) -> bool:
        return node in self.index

    def __iter__(self) -> Iterator[int]:
        return iter(self.ids)

    def __repr__(self) -> str:
        def draw(node: int) -> str:
            below = [draw(child) for child in self.children(node)]
            return f"{node}({' '.join(below)})" if below else str(node)

        return f"TreeTopology({draw(self.root)}, next_id={self.next_id})"

    @property
    def root(self) -> int:
        """Id of the root."""
        return self.ids[0]

    @cached_property
    def index(self) -> Mapping[int, int]:
        """Position of each id in level order; read-only."""
        return MappingProxyType({node: i for i, node in enumerate(self.ids)})

    @cached_property
    def leaves(self) -> tuple[int, ...]:
        """Ids of the `K` nodes without children, in level order."""
        return tuple(n for n, a, b in self._rows() if a is None and b is None)

    @cached_property
    def routed(self) -> tuple[int, ...]:
        """Ids of the `I` nodes with two children, where a router decides, in level order."""
        return tuple(n for n, a, b in self._rows() if a is not None and b is not None)

    @cached_property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """Ids by depth: `levels[h]` holds the nodes of depth `h` from left to right."""
        grouped: list[list[int]] = [[] for _ in range(self.max_depth + 1)]
        for node in self.ids:
            grouped[self.depth(node)].append(node)
        return tuple(tuple(level) for level in grouped)

    @property
    def max_depth(self) -> int:
        """Depth of the deepest node; the root has depth 0."""
        return self.depth(self.ids[-1])

    @cached_property
    def parents(self) -> Mapping[int, int | None]:
        """Parent of each node, None for the root; read-only."""
        found: dict[int, int | None] = {self.root: None}
        for node, *below in self._rows():
            found.update({child: node for child in below if child is not None})
        return MappingProxyType(found)

    def parent(self, node: SupportsIndex) -> int | None:
        """Return the id of the parent, or None for the root. Raises KeyError for an unknown node."""
        return self.parents[self.node(node)]

    def children(self, node: SupportsIndex) -> tuple[int, ...]:
        """Return ids of the children from left to right: two, one or none. Raises KeyError for an unknown node."""
        i = self.index[self.node(node)]
        return tuple(c for c in (self.left[i], self.right[i]) if c is not None)

    def depth(self, node: SupportsIndex) -> int:
        """Return the number of edges between the root and `node`. Raises KeyError for an unknown node."""
        return len(self.path(node)) - 1

    def path(self, node: SupportsIndex) -> tuple[int, ...]:
        """Return the ids from the root down to `node`, both included. Raises KeyError for an unknown node."""
        steps = [self.node(node)]
        while (above := self.parents[steps[-1]]) is not None:
            steps.append(above)
        return tuple(reversed(steps))

    def leaves_under(self, node: SupportsIndex) -> tuple[int, ...]:
        """Return the ids of the leaves under `node` (the node itself, if it is a leaf), in level order."""
        node = self.node(node)
        return tuple(leaf for leaf in self.leaves if node in self.path(leaf))

    def lowest_common_ancestor(self, first: int, second: int) -> int:
        """Return the id of the deepest node that is on both paths from the root."""
        shared = [a for a, b in zip(self.path(first), self.path(second), strict=False) if a == b]
        return shared[-1]

    def incidence(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Return the two 0/1 matrices `(N, I)` that turn decisions into paths.

        Entry `[n, i]` of the first matrix is 1 where the path to node `n` turns left at routed node `i`. The
        second matrix has a 1 where the path turns right. All callers share both matrices: do not write to them.
        """
        return self._turns

    @cached_property
    def _turns(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        column = {node: i for i, node in enumerate(self.routed)}
        turns = np.zeros((2, len(self), len(self.routed)), np.float32)
        for node, row in self.index.items():
            steps = self.path(node)
            for above, below in pairwise(steps):
                if above in column:
                    turns[self.children(above).index(below), row, column[above]] = 1
        return turns[0], turns[1]

    # --- files --------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """Return canonical JSON, from which `from_json` returns the same tree."""
        nodes = [[node, first, second] for node, first, second in self._rows()]
        return json.dumps({"next_id": self.next_id, "nodes": nodes}, separators=(",", ":"), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> TreeTopology:
        """Build a tree from the JSON of `to_json`.

        Raises:
            ValueError: if the text is not such JSON, an id in the text is not an integer, or the text does not
                describe a tree.
        """
        try:
            found = json.loads(text)
            nodes = [(_id(n), *(None if c is None else _id(c) for c in below)) for n, *below in found["nodes"]]
            ids, left, right = zip(*nodes, strict=True)
            next_id = _id(found["next_id"])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(
                'expected JSON like {"next_id":3,"nodes":[[0,1,2],[1,null,null],[2,null,null]]}, '
                f"found {text[:80]!r} ({type(error).__name__}: {error})"
            ) from None
        return cls(ids, left, right, next_id)

    # --- helpers ------------------------------------------------------------------------------------------

    def __reduce__(self) -> tuple[Callable[..., TreeTopology], tuple[object, ...]]:
        # Copied and pickled by its fields, because a read-only mapping can be neither copied nor pickled.
        return type(self), (self.ids, self.left, self.right, self.next_id)

    def _rows(self) -> Iterator[tuple[int, int | None, int | None]]:
        return zip(self.ids, self.left, self.right, strict=True)

    def _children_map(self) -> dict[int, tuple[int | None, int | None]]:
        return {node: (first, second) for node, first, second in self._rows()}

    def node(self, node: SupportsIndex) -> int:
        """Return an id as a plain number, such as of an entry of `TreeVAE.cluster(x)`.

        Raises:
            KeyError: if there is no such node.
        """
        try:
            found = operator.index(node)
        except (TypeError, ValueError, RuntimeError):  # a tensor of several numbers, or of fractions
            found = -1
        if found not in self.index or isinstance(node, bool):
            raise KeyError(f"node {node!r} is not in the tree; its nodes are {list(self.ids)}")
        return found

    def _leaf(self, node: SupportsIndex) -> int:
        found = self.node(node)
        if self.children(found):
            raise ValueError(f"node {found} is not a leaf; the leaves are {list(self.leaves)}")
        return found


def _id(found: object) -> int:
    # Not isinstance, which accepts True as an integer.
    if type(found) is not int:
        raise TypeError(f"expected integers as ids, found {found!r}")
    return found
