"""Equality of trees as hierarchies of their leaves."""

from __future__ import annotations

from collections.abc import Mapping

from treediff.testing._nodes import require_nodes
from treediff.tree.topology import TreeTopology

__all__ = ["same_hierarchy"]


def same_hierarchy(first: TreeTopology, second: TreeTopology, leaf_map: Mapping[int, int]) -> bool:
    """Return whether two trees are equal up to node ids, swaps of left and right, and pass-through nodes.

    Up to these changes, a tree is determined by its *clades*, the sets of leaves under its nodes, so the clades are
    compared.

    Args:
        first: a tree.
        second: another tree.
        leaf_map: the leaf of `second` that corresponds to each leaf of `first`. The answer is False unless the map
            pairs all leaves of both trees.

    Raises:
        KeyError: if the map does not hold exactly the leaves of `first`.
        ValueError: if the map leads to an id that is not a leaf of `second`.

    Examples:
        >>> tree = TreeTopology.balanced(1)
        >>> same_hierarchy(tree.split(1), tree.split(2), {3: 4, 4: 3, 2: 1})
        True
        >>> same_hierarchy(tree.split(1), tree.split(2), {3: 1, 4: 3, 2: 4})
        False
    """
    require_nodes("leaf_map", leaf_map, first.leaves)
    strange = sorted(set(leaf_map.values()) - set(second.leaves))
    if strange:
        raise ValueError(f"leaf_map must lead to leaves of the second tree, {list(second.leaves)}; found {strange}")
    mapped = {frozenset(leaf_map[leaf] for leaf in first.leaves_under(node)) for node in first}
    return len(first.leaves) == len(second.leaves) and mapped == {
        frozenset(second.leaves_under(node)) for node in second
    }
