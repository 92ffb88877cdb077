"""same_hierarchy against nested sets."""

from __future__ import annotations

import re
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import quick, topologies

from treediff.testing import same_hierarchy
from treediff.tree.topology import TreeTopology


def shape_of(tree: TreeTopology, node: int, names: dict[int, int]) -> Any:  # noqa: ANN401
    """Nested frozensets, a single child standing for its parent: equal if and only if the hierarchies are."""
    below = [shape_of(tree, child, names) for child in tree.children(node)]
    return names[node] if not below else below[0] if len(below) == 1 else frozenset(below)


def mirrored(tree: TreeTopology, flips: int, shift: int) -> TreeTopology:
    """The same hierarchy under other ids, with some left and right swapped."""
    children: dict[int, tuple[int | None, int | None]] = {}
    for i, (node, left, right) in enumerate(zip(tree.ids, tree.left, tree.right, strict=True)):
        pair = [None if child is None else child + shift for child in (left, right)]
        children[node + shift] = (pair[1], pair[0]) if flips >> i & 1 else (pair[0], pair[1])
    return TreeTopology.from_children(children, root=tree.root + shift, next_id=tree.next_id + shift)


@quick
@given(topologies(), st.integers(0, 2**40), st.integers(0, 9), st.randoms(use_true_random=False))
def test_same_hierarchy_sees_through_names_and_swaps(
    tree: TreeTopology, flips: int, shift: int, random: Random
) -> None:
    other = mirrored(tree, flips, shift)
    assert same_hierarchy(tree, other, {leaf: leaf + shift for leaf in tree.leaves})
    shuffled = list(other.leaves)
    random.shuffle(shuffled)
    leaf_map = dict(zip(tree.leaves, shuffled, strict=True))
    expected = shape_of(tree, tree.root, leaf_map) == shape_of(other, other.root, {n: n for n in other})
    assert same_hierarchy(tree, other, leaf_map) == expected


def test_same_hierarchy_contracts_pass_throughs() -> None:
    short = TreeTopology.balanced(1)
    assert same_hierarchy(short.split(1).prune(3), short, {4: 1, 2: 2})
    assert same_hierarchy(TreeTopology.chain(3), TreeTopology.balanced(0), {3: 0})


def test_same_hierarchy_needs_every_leaf_to_have_its_own_partner() -> None:
    short, long = TreeTopology.balanced(1), TreeTopology.balanced(1).split(2)
    assert not same_hierarchy(short, long, {1: 1, 2: 3})
    assert not same_hierarchy(long, short, {1: 1, 3: 2, 4: 2})
    assert not same_hierarchy(short, short, {1: 1, 2: 1})


def test_errors_teach() -> None:
    pair = TreeTopology.balanced(1)
    message = "leaf_map needs one entry for each of the nodes [1, 2]"
    with pytest.raises(KeyError, match=re.escape(message)):
        same_hierarchy(pair, pair, {1: 2})
    message = "leaf_map must lead to leaves of the second tree, [1, 2]; found [0]"
    with pytest.raises(ValueError, match=re.escape(message)):
        same_hierarchy(pair, pair, {1: 2, 2: 0})
