"""TreeTopology against a slow and obvious tree: a dict of parents."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import pickle
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from strategies import STARTS, Step, follow, histories, quick, topologies
from torch import Tensor

from treediff.tree.topology import TreeTopology


class Reference:
    """A tree as two dicts: who is above, and on which side one hangs. Nothing is stored in any order."""

    def __init__(self, tree: TreeTopology) -> None:
        self.above: dict[int, int] = {}
        self.side: dict[int, int] = {}
        self.nodes = set(tree.ids)
        self.next_id = tree.next_id
        for node, *below in zip(tree.ids, tree.left, tree.right, strict=True):
            for side, child in enumerate(below):
                if child is not None:
                    self.above[child], self.side[child] = node, side

    def path(self, node: int) -> list[int]:
        """From the root to the node."""
        return [*self.path(self.above[node]), node] if node in self.above else [node]

    def turns(self, node: int) -> list[int]:
        """The sides taken on the way."""
        return [self.side[step] for step in self.path(node) if step in self.side]

    def order(self) -> list[int]:
        """By depth, then by turns, left before right."""
        return sorted(self.nodes, key=lambda node: (len(self.turns(node)), self.turns(node)))

    def children(self, node: int) -> list[int]:
        """From left to right."""
        return [child for child in self.order() if self.above.get(child) == node]

    def leaves(self) -> list[int]:
        """Nobody's parent."""
        return [node for node in self.order() if node not in self.above.values()]

    def split(self, leaf: int) -> None:
        """Two new nodes."""
        for side in (0, 1):
            self.nodes.add(self.next_id)
            self.above[self.next_id], self.side[self.next_id] = leaf, side
            self.next_id += 1

    def prune(self, leaf: int) -> None:
        """Only what leads to one of the other leaves stays."""
        self.nodes = {node for other in self.leaves() if other != leaf for node in self.path(other)}
        self.above = {node: above for node, above in self.above.items() if node in self.nodes}
        self.side = {node: side for node, side in self.side.items() if node in self.nodes}


def assert_same(tree: TreeTopology, slow: Reference) -> None:
    order = slow.order()
    assert list(tree.ids) == list(tree) == order
    assert tree.next_id == slow.next_id
    assert len(tree) == len(order)
    assert tree.root == order[0]
    assert list(tree.leaves) == slow.leaves()
    assert list(tree.routed) == [node for node in order if len(slow.children(node)) == 2]
    assert tree.index == {node: order.index(node) for node in order}
    for node in order:
        assert list(tree.path(node)) == slow.path(node)
        assert tree.depth(node) == len(slow.turns(node))
        assert tree.parent(node) == slow.above.get(node)
        assert list(tree.children(node)) == slow.children(node)
        assert list(tree.leaves_under(node)) == [leaf for leaf in slow.leaves() if node in slow.path(leaf)]
    depths = [len(slow.turns(node)) for node in order]
    assert tree.max_depth == max(depths)
    assert tree.levels == tuple(
        tuple(node for node, depth in zip(order, depths, strict=True) if depth == h) for h in range(max(depths) + 1)
    )


@quick
@given(histories())
def test_growing_and_pruning_agree_with_the_reference_after_every_step(history: list[Step]) -> None:
    for tree in STARTS:
        slow, ever = Reference(tree), set(tree.ids)
        for step in history:
            before, old = slow.leaves(), set(tree.ids)
            leaf = before[step[1] % len(before)]
            if step[0] == "split":
                slow.split(leaf)
            elif len(before) > 1:
                slow.prune(leaf)
            tree = follow(tree, [step])
            assert_same(tree, slow)
            fresh = set(tree.ids) - old
            assert not fresh & ever, "an id was used twice"
            assert len(fresh) == (2 if step[0] == "split" else 0)
            ever |= fresh


@quick
@given(topologies())
def test_incidence_holds_the_turns_of_every_path(tree: TreeTopology) -> None:
    slow = Reference(tree)
    expected = np.zeros((2, len(tree), len(tree.routed)), np.float32)
    for node in tree:
        for step in slow.path(node)[1:]:
            if slow.above[step] in tree.routed:
                row, column = tree.ids.index(node), tree.routed.index(slow.above[step])
                expected[slow.side[step], row, column] = 1
    for found, turns in zip(tree.incidence(), expected, strict=True):
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, turns)


@quick
@given(topologies(max_steps=8))
def test_lowest_common_ancestor_is_the_deepest_shared_node(tree: TreeTopology) -> None:
    slow = Reference(tree)
    for first, second in itertools.product(tree, repeat=2):
        shared = set(slow.path(first)) & set(slow.path(second))
        assert tree.lowest_common_ancestor(first, second) == max(shared, key=lambda node: len(slow.path(node)))


@quick
@given(topologies())
def test_json_gives_the_same_tree_and_the_same_bytes(tree: TreeTopology) -> None:
    text = tree.to_json()
    again = TreeTopology.from_json(text)
    assert again == tree
    assert hash(again) == hash(tree)
    assert again.to_json().encode() == text.encode()
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))


def test_json_is_what_the_files_hold() -> None:
    text = '{"next_id":5,"nodes":[[0,1,2],[1,null,4],[2,null,null],[4,null,null]]}'
    assert TreeTopology.balanced(1).split(1).prune(3).to_json() == text


def test_json_tells_a_left_from_a_right_only_child() -> None:
    grown = TreeTopology.balanced(1).split(1)
    assert TreeTopology.from_json(grown.prune(3).to_json()).left == (1, None, None, None)
    assert TreeTopology.from_json(grown.prune(4).to_json()).right == (2, None, None, None)


@quick
@given(topologies())
def test_trees_are_values(tree: TreeTopology) -> None:
    text = tree.to_json()
    tree.split(tree.leaves[0])
    if len(tree.leaves) > 1:
        tree.prune(tree.leaves[-1])
    assert tree.to_json() == text
    assert copy.deepcopy(tree) == pickle.loads(pickle.dumps(tree)) == tree
    assert tree != tree.split(tree.leaves[0])
    for field in dataclasses.fields(tree):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(tree, field.name, getattr(tree, field.name))


def test_pruning_leaves_a_pass_through_and_cascades() -> None:
    grown = TreeTopology.balanced(1).split(1)  # 0(1(3 4) 2)
    once = grown.prune(3)
    assert once.children(1) == (4,)
    assert once.routed == (0,)
    assert once.leaves == (2, 4)
    twice = once.prune(4)
    assert twice.ids == (0, 2)
    assert twice.leaves == (2,)
    assert twice.routed == ()
    assert grown.prune(2).routed == (1,)
    assert twice.split(2).ids == (0, 2, 5, 6)


def test_pruning_cascades_through_a_chain_of_pass_throughs() -> None:
    tree = TreeTopology.balanced(1).split(2).split(4).prune(3).prune(5)  # 0(1 2(4(6)))
    assert tree.ids == (0, 1, 2, 4, 6)
    assert tree.prune(6).ids == (0, 1)


@pytest.mark.parametrize("depth", range(5))
def test_balanced(depth: int) -> None:
    tree = TreeTopology.balanced(depth)
    assert len(tree.leaves) == 2**depth
    assert len(tree) == tree.next_id == 2 ** (depth + 1) - 1
    assert {tree.depth(leaf) for leaf in tree.leaves} == {depth}
    assert [len(level) for level in tree.levels] == [2**h for h in range(depth + 1)]
    grown = TreeTopology.balanced(0)
    for leaf in range(2**depth - 1):
        grown = grown.split(leaf)
    assert grown == tree


@pytest.mark.parametrize("depth", range(4))
def test_chain(depth: int) -> None:
    tree = TreeTopology.chain(depth)
    assert tree.leaves == (depth,)
    assert tree.path(depth) == tree.ids == tuple(range(depth + 1))
    assert tree.routed == ()
    assert tree.next_id == depth + 1


def test_lists_are_kept_as_tuples() -> None:
    ids: Any = [0, 1, 2]
    left: Any = [1, None, None]
    found = TreeTopology(ids, left, (2, None, None), 3)
    assert found == TreeTopology.balanced(1) and hash(found) == hash(TreeTopology.balanced(1))
    assert (found.ids, found.left) == ((0, 1, 2), (1, None, None))
    ids.append(3)
    assert len(found) == 3


@pytest.mark.parametrize("name", ["index", "parents"])
def test_mappings_are_read_only_in_copies_too(name: str) -> None:
    tree = TreeTopology.balanced(1)
    for each in (tree, tree.split(1), copy.copy(tree), copy.deepcopy(tree), pickle.loads(pickle.dumps(tree))):
        mapping: Any = getattr(each, name)
        assert mapping[0] == {"index": 0, "parents": None}[name]
        with pytest.raises(TypeError, match="does not support item assignment"):
            mapping[0] = 7


def test_lookups_compile_into_one_graph() -> None:
    tree = TreeTopology.balanced(2)

    def run(x: Tensor) -> Tensor:
        rows = [tree.index[leaf] + (tree.parents[leaf] or 0) for leaf in tree.leaves]
        return x * torch.tensor(rows)

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    assert compiled(torch.ones(4)).tolist() == run(torch.ones(4)).tolist() == [4, 5, 7, 8]


def test_from_children_needs_no_entry_for_leaves() -> None:
    assert TreeTopology.from_children({0: (1, 2)}, root=0, next_id=3) == TreeTopology.balanced(1)


def test_repr_draws_the_tree() -> None:
    assert repr(TreeTopology.balanced(1).split(1).prune(3)) == "TreeTopology(0(1(4) 2), next_id=5)"


def test_membership() -> None:
    tree = TreeTopology.balanced(1).prune(1)
    assert 2 in tree
    assert 1 not in tree
    assert "2" not in tree


PAIR = TreeTopology.balanced(1)
# JSON, and how Python shows it.
JSON_BUT_NO_ID = {"1.0": "1.0", "1.5": "1.5", '"1"': "'1'", "true": "True", "[1]": "[1]"}
ONE_TREE = "nodes must form one tree, listed in level order with each id once; found ids "


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: TreeTopology((), (), (), 0),
            "a tree needs at least a root, and one left and one right entry",
        ),
        (lambda: TreeTopology((0, 1), (1,), (None,), 2), "found 2 ids, 1 left and 1 right entries"),
        (lambda: TreeTopology((0, 2, 1), (1, None, None), (2, None, None), 3), f"{ONE_TREE}[0, 2, 1]"),
        (lambda: TreeTopology((0, 1, 1), (1, None, None), (1, None, None), 3), f"{ONE_TREE}[0, 1, 1]"),
        (
            lambda: TreeTopology((0, 1), (None, None), (None, None), 2),
            "following children from the root gives [0]",
        ),
        (lambda: TreeTopology((0, 1), (1, 0), (None, None), 2), "gives [0, 1, 0]"),
        (lambda: TreeTopology((0,), (1,), (None,), 2), f"{ONE_TREE}[0]"),
        (
            lambda: TreeTopology((-1,), (None,), (None,), 0),
            "ids must be at least 0 and below next_id; found ids from -1",
        ),
        (lambda: TreeTopology((0,), (None,), (None,), 0), "to 0 and next_id 0"),
        (lambda: TreeTopology.balanced(-1), "depth must be at least 0, found -1"),
        (lambda: TreeTopology.chain(-2), "depth must be at least 0, found -2"),
        (
            lambda: TreeTopology.from_children({0: (0, None)}, root=0, next_id=1),
            "the children of 0 do not form a tree: some node is reached twice",
        ),
        (
            lambda: TreeTopology.from_children({0: (1, 2), 1: (3, 4), 2: (3, 4), 3: (5, 6)}, root=0, next_id=7),
            "some node is reached twice",
        ),
        (
            lambda: TreeTopology.from_children({0: (1, 2), 1: (3, 4), 2: (3, 4)}, root=0, next_id=5),
            f"{ONE_TREE}[0, 1, 2, 3, 4, 3, 4]",
        ),
        (lambda: PAIR.split(0), "node 0 is not a leaf; the leaves are [1, 2]"),
        (lambda: PAIR.prune(0), "node 0 is not a leaf; the leaves are [1, 2]"),
        (lambda: PAIR.prune(1).prune(2), "node 2 is the only leaf: a tree keeps at least one"),
        (lambda: TreeTopology.from_json("[1"), "expected JSON like"),
        (lambda: TreeTopology.from_json("{}"), "found '{}' (KeyError: 'nodes')"),
        (lambda: TreeTopology.from_json('{"next_id":1,"nodes":[]}'), "expected JSON like"),
        (lambda: TreeTopology.from_json('{"next_id":1,"nodes":3}'), "(TypeError: "),
        (lambda: TreeTopology.from_json('{"next_id":1,"nodes":[[0,1,null]]}'), f"{ONE_TREE}[0]"),
        (lambda: TreeTopology.from_json('{"next_id":null,"nodes":[[0,null,null]]}'), "as ids, found None"),
        (lambda: TreeTopology.from_json('{"next_id":1,"nodes":[[null,null,null]]}'), "as ids, found None"),
        *[
            (partial(TreeTopology.from_json, text), f"(TypeError: expected integers as ids, found {found})")
            for value, found in JSON_BUT_NO_ID.items()
            for text in (
                f'{{"next_id":{value},"nodes":[[0,null,null]]}}',
                f'{{"next_id":2,"nodes":[[{value},null,null]]}}',
                f'{{"next_id":2,"nodes":[[0,{value},null],[1,null,null]]}}',
                f'{{"next_id":2,"nodes":[[0,null,{value}],[1,null,null]]}}',
            )
        ],
    ],
)
def test_errors_teach(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    "look",
    [
        PAIR.split,
        PAIR.prune,
        PAIR.parent,
        PAIR.children,
        PAIR.depth,
        PAIR.path,
        PAIR.leaves_under,
        lambda node: PAIR.lowest_common_ancestor(1, node),
        lambda node: PAIR.lowest_common_ancestor(node, 1),
    ],
)
@pytest.mark.parametrize("node", [7, -1, None, [1]])
def test_unknown_nodes_are_named(look: Callable[[object], object], node: object) -> None:
    with pytest.raises(KeyError, match=re.escape(f"node {node!r} is not in the tree; its nodes are [0, 1, 2]")):
        look(node)


@given(topologies())
def test_a_contracted_tree_has_the_leaves_and_decisions_of_the_tree(tree: TreeTopology) -> None:
    found = tree.contracted()
    assert sorted(found.leaves) == sorted(tree.leaves) and set(found.routed) == set(tree.routed)
    assert all(len(found.children(node)) != 1 for node in found) and set(found) <= set(tree)
    for node in found:
        assert sorted(found.leaves_under(node)) == sorted(tree.leaves_under(node))
    for node in found.routed:
        for side, child in zip(tree.children(node), found.children(node), strict=True):
            assert sorted(tree.leaves_under(side)) == sorted(found.leaves_under(child))
