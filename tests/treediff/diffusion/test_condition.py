"""Where images belong: tables of the tree against loops over it, and what is forgotten or made noisy."""

from __future__ import annotations

import copy
import re
from collections import Counter
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import GROWN, PRUNED
from pairs import conditions, images
from strategies import quick, topologies
from torch import Tensor
from worlds import seeded, world

from treediff import TreeCondition, TreeTopology
from treediff.diffusion import NodeIndex

NO_ZERO = TreeTopology.from_children({7: (8, 2), 2: (None, 5), 5: (9, 3)}, root=7, next_id=11)  # no node 0
PARTS = ("z", "image", "weights", "known", "noise_level")


def slow_path(tree: TreeTopology, node: int) -> list[int]:
    """By looking for parents among all nodes."""
    path = [node]
    while above := [n for n in tree.ids if path[0] in tree.children(n)]:
        path = [above[0], *path]
    return path


def check_tables(tree: TreeTopology) -> None:
    index = NodeIndex(tree)
    longest = max(len(slow_path(tree, node)) for node in tree.ids)
    assert index.paths.shape == (len(tree), longest)
    for rank, node in enumerate(tree.ids):
        path = slow_path(tree, node)
        assert index.paths[rank].tolist() == path + [-1] * (longest - len(path))
        assert index.depth[rank] == len(path) - 1
        parent = path[-2] if len(path) > 1 else node
        others = [child for child in tree.children(parent) if child != node and node != parent]
        assert index.parent[rank] == parent
        assert index.sibling[rank] == (others[0] if others else parent)
        assert index.rank_of(torch.tensor([node])).tolist() == [rank]
    assert [tree.ids[rank] for rank in index.leaves.tolist()] == [n for n in tree.ids if not tree.children(n)]


# --- tables -------------------------------------------------------------------------------------------------


@quick
@given(topologies())
def test_tables_agree_with_the_tree(tree: TreeTopology) -> None:
    check_tables(tree)


@pytest.mark.parametrize("tree", [NO_ZERO, TreeTopology.balanced(0), TreeTopology.chain(3)])
def test_tables_of_special_trees(tree: TreeTopology) -> None:
    check_tables(tree)


@quick
@given(topologies(), st.integers(0, 2**32))
def test_ranks_of_many_nodes_in_any_order(tree: TreeTopology, seed: int) -> None:
    rank = torch.randint(len(tree), (20,), generator=seeded(seed))
    assert torch.equal(NodeIndex(tree).rank_of(torch.tensor(tree.ids)[rank]), rank)


@pytest.mark.parametrize("wrong", [-1, -2, 3, 5, 9, 10**12])  # 3 and 5 were pruned, 9 would be next
def test_a_node_must_be_in_the_tree(wrong: int) -> None:
    message = f"there is no node {wrong} in the tree; its nodes are {list(PRUNED.ids)}"
    with pytest.raises(KeyError, match=re.escape(message)):
        NodeIndex(PRUNED).rank_of(torch.tensor([0, wrong, 4]))


def test_tables_are_no_weights() -> None:
    index = NodeIndex(GROWN)
    assert not index.state_dict() and not list(index.parameters())
    assert repr(index) == f"NodeIndex({GROWN!r})"
    with torch.device("meta"):
        assert torch.equal(NodeIndex(GROWN).paths, index.paths)
    assert index.double().paths.dtype == torch.int64
    assert torch.equal(copy.deepcopy(index).sibling, index.sibling)
    assert index.rank_of(torch.zeros(0, dtype=torch.int64)).shape == (0,)


# --- coarser ------------------------------------------------------------------------------------------------


def places(tree: TreeTopology, node: int, level: Tensor) -> list[int]:
    at, everywhere = TreeCondition.at(node, len(level)), torch.ones(len(level), dtype=torch.bool)
    found: list[int] = at.coarser(NodeIndex(tree), everywhere, level).node.tolist()
    return found


@quick
@given(topologies(), st.integers(0, 63))
def test_every_depth_is_drawn_equally_often(tree: TreeTopology, number: int) -> None:
    """With levels spread evenly, each node above comes up as often as any other, and the node itself for the rest."""
    node = tree.ids[number % len(tree)]
    depths, each = tree.max_depth + 1, 7
    level = (torch.arange(depths * each) + 0.5) / (depths * each)
    found, above = Counter(places(tree, node, level)), slow_path(tree, node)[:-1]
    assert found == {**dict.fromkeys(above, each), node: each * (depths - len(above))}


def test_a_node_is_learned_as_the_mixture_of_its_leaves() -> None:
    """Leaves lie at depths 1, 2, 3 and 3; under each node they count by their own probabilities."""
    tree, prior = GROWN, {leaf: Fraction(1 + i, 10) for i, leaf in enumerate(GROWN.leaves)}
    level = (torch.arange(60) + 0.5) / 60
    mass: Counter[tuple[int, int]] = Counter()
    for leaf in tree.leaves:
        for node in places(tree, leaf, level):
            mass[node, leaf] += prior[leaf]  # type: ignore[assignment]
    for node in tree.ids:
        under = tree.leaves_under(node)
        total = sum(mass[node, leaf] for leaf in tree.leaves)
        assert total == sum(mass[node, leaf] for leaf in under)
        for leaf in under:
            assert mass[node, leaf] / total == prior[leaf] / sum(prior[other] for other in under)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("depth", [0, 1, 2, 4, 6, 12])
def test_the_ends_of_the_levels(dtype: torch.dtype, depth: int) -> None:
    tree = TreeTopology.chain(depth)
    ends = torch.tensor([0.0, 1 - torch.finfo(dtype).eps / 2], dtype=dtype)
    assert ends[1] < 1 and places(tree, depth, ends) == [0, depth]


def test_details_are_forgotten_where_it_is_said() -> None:
    condition, index = conditions(n=4), NodeIndex(GROWN)
    where, level = torch.tensor([True, False, True, False]), torch.tensor([0.0, 0.0, 0.999, 0.5])
    found = condition.coarser(index, where, level)
    assert found.node.tolist() == [0, condition.node[1], condition.node[2], condition.node[3]]
    assert found.is_known().tolist() == [False, True, False, True]
    assert condition.is_known().all() and found.image is condition.image and found.z is condition.z
    again = found.coarser(index, ~where, level)  # what was forgotten does not come back
    assert not again.is_known().any()
    assert not TreeCondition.at(GROWN.leaves).coarser(index, where, level).is_known().any()


def test_an_unknown_node_cannot_be_left() -> None:
    with pytest.raises(KeyError, match="there is no node 77 in the tree"):
        TreeCondition.at(77).coarser(NodeIndex(GROWN), torch.tensor([True]), torch.tensor([0.5]))


# --- noised -------------------------------------------------------------------------------------------------


def test_noise_has_the_mean_and_the_variance_that_are_documented() -> None:
    """It is affine in the noise: half the sum of two opposite draws is the mean, half the difference the deviation."""
    condition = conditions(n=5, dtype=torch.float64)
    level = torch.tensor([0.0, 0.3, 0.6, 0.8, 1.0], dtype=torch.float64)
    noise = torch.randn(5, 1, 8, 8, generator=seeded(), dtype=torch.float64)
    plus, minus = (2 * condition.noised(level, sign * noise).require_image() - 1 for sign in (1, -1))
    clean = 2 * condition.require_image() - 1
    for i, size in enumerate(level.tolist()):
        torch.testing.assert_close((plus + minus)[i] / 2, (1 - size**2) ** 0.5 * clean[i])
        torch.testing.assert_close((plus - minus)[i] / 2, size * noise[i])
    assert condition.noised(level, noise).noise_level is level
    torch.testing.assert_close(condition.noised(level, noise)[:1].require_image(), condition[:1].require_image())


def test_noise_leaves_the_variance_of_whitened_images() -> None:
    clean = torch.randn(4000, 1, 5, 5, generator=seeded(1), dtype=torch.float64)
    condition = TreeCondition(torch.zeros(4000, dtype=torch.int64), image=(clean + 1) / 2)
    noise = torch.randn(4000, 1, 5, 5, generator=seeded(2), dtype=torch.float64)
    noisy = 2 * condition.noised(torch.full((4000,), 0.7), noise).require_image() - 1
    assert float(noisy.var()) == pytest.approx(1, abs=0.02)
    assert float((noisy * clean).mean()) == pytest.approx(0.51**0.5, abs=0.02)


# --- rows and errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [slice(1, 3), torch.tensor([3, 0, 3]), torch.tensor([True, False, False, True])])
def test_rows_are_taken_from_every_part(rows: Tensor | slice) -> None:
    known, level = torch.tensor([True, False, True, True]), torch.rand(4, generator=seeded())
    full = conditions(n=4)
    whole = TreeCondition(full.node, full.z, full.image, full.weights, known, level)
    found = whole[rows]
    for name in ("node", *PARTS):
        assert torch.equal(getattr(found, name), getattr(whole, name)[rows])
    assert len(found) == len(whole.node[rows]) and len(whole) == 4
    assert TreeCondition.at([1, 2, 3, 4])[rows].z is None


def test_what_is_known() -> None:
    assert not TreeCondition.at(1, 2).is_known().any()
    for name in ("z", "image", "weights"):
        parts: dict[str, Tensor] = {name: torch.zeros(2, 1)}
        assert TreeCondition(torch.tensor([1, 2]), **parts).is_known().tolist() == [True, True]
    told = torch.tensor([False, True])
    assert TreeCondition(torch.tensor([1, 2]), z=torch.zeros(2, 1), known=told).is_known() is told


def test_places_alone() -> None:
    assert TreeCondition.at(3, 2).node.tolist() == [3, 3]
    assert TreeCondition.at([3, 1]).node.tolist() == [3, 1]
    assert TreeCondition.at(torch.tensor([3, 1], dtype=torch.int32)).node.dtype == torch.int64
    for empty in (TreeCondition.at([]), TreeCondition.at(3, 0), TreeCondition.at(torch.zeros(0))):
        assert len(empty) == 0 and empty.node.dtype == torch.int64
    assert TreeCondition.at(3, 2, device="meta").node.is_meta
    assert len(TreeCondition.at(3)) == 1 and len(TreeCondition.at([3, 1], 2)) == 2
    with pytest.raises(ValueError, match="a list has a node for each image, found 2 nodes and n=5; leave n out"):
        TreeCondition.at([3, 1], 5)


def test_conditions_are_compared_as_objects() -> None:
    """Whether tensors are equal is a question for each of their numbers."""
    one, other = TreeCondition.at([1, 2]), TreeCondition.at([1, 2])
    assert one == one and one != other and len({one, other}) == 2


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tables_survive_where_weights_do_not(device: str) -> None:
    """A model is built on the meta device and made real with `to_empty`, which leaves tensors as memory holds them."""
    index = NodeIndex(GROWN, device)
    tables = {name: table.clone() for name, table in index.named_buffers()}
    for moved in (index.to("meta"), index.to_empty(device="cpu"), index.half()):
        assert moved is index and dict(index.named_buffers()).keys() == tables.keys()
        assert all(torch.equal(table, tables[name]) for name, table in index.named_buffers())
        assert not index.state_dict()


@pytest.mark.parametrize("node", [1.5, [0.0, 1.0], torch.tensor([1.0])])
def test_a_place_is_a_whole_number(node: Any) -> None:  # noqa: ANN401
    """And is not rounded to one."""
    with pytest.raises(TypeError, match=r"node must be \(B,\) int64 node ids, found torch.float32"):
        TreeCondition.at(node)


@pytest.mark.parametrize(
    ("node", "found"),
    [
        ([1, 2], "list of shape ()"),
        (3, "int of shape ()"),
        (torch.tensor([1.0]), "torch.float32 of shape (1,)"),
        (torch.tensor([1], dtype=torch.int32), "torch.int32 of shape (1,)"),
        (torch.tensor(1), "torch.int64 of shape ()"),
        (torch.tensor([[1]]), "torch.int64 of shape (1, 1)"),
    ],
)
def test_node_ids_have_one_form(node: Any, found: str) -> None:  # noqa: ANN401
    message = (
        f"node must be (B,) int64 node ids, found {found}; TreeCondition.at(node, n) builds a condition for n images"
    )
    with pytest.raises(TypeError, match=re.escape(message)):
        TreeCondition(node)


@pytest.mark.parametrize("name", PARTS)
def test_every_part_has_a_row_for_each_node(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must have a row for each of the 2 nodes, found 3"):
        TreeCondition(torch.tensor([1, 2]), **{name: torch.zeros(3, 1)})


def test_an_image_that_is_needed() -> None:
    message = "this condition has no image; make one with a TreeVAE, or pass image="
    with pytest.raises(ValueError, match=message):
        TreeCondition.at(1).require_image()
    with pytest.raises(ValueError, match=message):
        TreeCondition.at(1).noised(torch.zeros(1), torch.zeros(1, 1, 8, 8))
    x = images(1)
    assert TreeCondition(torch.tensor([1]), image=x).require_image() is x


def test_the_worlds_of_these_tests_are_uneven() -> None:
    """Or the tests of mixtures would say little."""
    assert len({GROWN.depth(leaf) for leaf in GROWN.leaves}) > 1
    assert len({round(float(p), 6) for p in world(GROWN).log_prior()}) == len(GROWN.leaves)
