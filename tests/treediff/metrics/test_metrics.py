"""Clustering metrics against scipy, scikit-learn, brute force over pairs, and closed forms."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from treediff.metrics import (
    cluster_accuracy,
    dendrogram_purity,
    effective_leaves,
    leaf_perplexity,
    leaf_purity,
)

quick = settings(deadline=None, max_examples=100)
PARTITION_METRICS = [cluster_accuracy, leaf_purity]
# Ids far apart and below zero: only equality of ids may matter.
Partitions = tuple[list[int], list[int]]


@st.composite
def partitions(draw: st.DrawFn, most_points: int = 40, most_ids: int = 6) -> Partitions:
    n = draw(st.integers(1, most_points))
    classes, clusters = draw(st.integers(1, most_ids)), draw(st.integers(1, most_ids))
    labels = draw(st.lists(st.integers(0, classes - 1), min_size=n, max_size=n))
    found = draw(st.lists(st.integers(0, clusters - 1), min_size=n, max_size=n))
    return [label * 7 - 9 for label in labels], found


@st.composite
def trees(draw: st.DrawFn) -> tuple[dict[int, int | None], list[int]]:
    """A random tree with pass-through nodes and shuffled ids, as (parent, leaves)."""
    ids = draw(st.permutations(range(100, 160)))
    parent: dict[int, int | None] = {ids[0]: None}
    leaves, fresh = [ids[0]], iter(ids[1:])
    for _ in range(draw(st.integers(0, 15))):
        grown = leaves.pop(draw(st.integers(0, len(leaves) - 1)))
        children = [next(fresh) for _ in range(draw(st.sampled_from([1, 2, 2, 3])))]
        parent.update(dict.fromkeys(children, grown))
        leaves += children
    return parent, leaves


def purity_over_pairs(labels: list[int], leaves: list[int], parent: dict[int, int | None]) -> float:
    def path(node: int | None) -> list[int]:
        return [] if node is None else [node, *path(parent[node])]

    shares = []
    for i, j in itertools.combinations(range(len(labels)), 2):
        if labels[i] == labels[j]:
            above_j = path(leaves[j])
            ancestor = next(node for node in path(leaves[i]) if node in above_j)
            under = [c for c, leaf in zip(labels, leaves, strict=True) if ancestor in path(leaf)]
            shares.append(under.count(labels[i]) / len(under))
    return math.fsum(shares) / len(shares)


# --- oracles --------------------------------------------------------------------------------------------


@quick
@given(partitions(most_points=12, most_ids=4))
def test_cluster_accuracy_equals_the_best_of_all_matchings(points: Partitions) -> None:
    labels, found = points
    clusters = sorted(set(found))
    # Padding with classes that nobody has lets clusters stay unmatched.
    classes = [*set(labels), *range(1000, 1000 + len(clusters))]
    right = []
    for chosen in itertools.permutations(classes, len(clusters)):
        class_of = dict(zip(clusters, chosen, strict=True))
        right.append(sum(class_of[k] == c for c, k in zip(labels, found, strict=True)))
    assert cluster_accuracy(labels, found) == max(right) / len(labels)


@quick
@given(trees(), st.data())
def test_dendrogram_purity_equals_brute_force_over_pairs(
    tree: tuple[dict[int, int | None], list[int]], data: st.DataObject
) -> None:
    parent, tree_leaves = tree
    n = data.draw(st.integers(2, 25))
    labels = data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n).filter(lambda c: len(set(c)) < n))
    leaves = data.draw(st.lists(st.sampled_from(tree_leaves), min_size=n, max_size=n))
    expected = purity_over_pairs(labels, leaves, parent)
    assert dendrogram_purity(labels, leaves, parent) == pytest.approx(expected, abs=1e-12)


@quick
@given(partitions())
def test_leaf_purity_equals_counting(points: Partitions) -> None:
    labels, found = points
    by_leaf = [[c for c, leaf in zip(labels, found, strict=True) if leaf == k] for k in set(found)]
    assert leaf_purity(labels, found) == sum(max(map(own.count, own)) for own in by_leaf) / len(labels)


# --- closed forms ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", [cluster_accuracy, leaf_purity])
@pytest.mark.parametrize("labels", [[4], [4, 4, 4], [4, -1], [0, 1, 2, 1, 0, 5, 5]])
def test_the_same_partition_under_other_names_scores_one(metric: Callable[..., float], labels: list[int]) -> None:
    assert metric(labels, [3 - 2 * c for c in labels]) == 1.0


@pytest.mark.parametrize(("metric", "score"), [(cluster_accuracy, 0.25)])
def test_one_side_split_and_the_other_not(metric: Callable[..., float], score: float) -> None:
    assert metric([7, 7, 7, 7], [0, 1, 2, 3]) == score
    assert metric([0, 1, 2, 3], [7, 7, 7, 7]) == score


def test_unmatched_clusters_and_classes_count_as_wrong() -> None:
    assert cluster_accuracy([0, 0, 0, 1], [5, 5, 6, 7]) == 0.75
    assert cluster_accuracy([0, 0, 1, 2], [5, 5, 6, 6]) == 0.75


def test_many_classes_take_little_memory() -> None:
    """One class for each point: a table of all classes and leaves would have a billion cells."""
    labels = np.arange(31_000)
    assert leaf_purity(labels, labels) == 1.0
    assert leaf_purity(labels, labels // 2) == 0.5


def test_dendrogram_purity_of_sixty_thousand_points() -> None:
    """1.8e9 pairs: out of reach unless counts replace pairs. One class per leaf pair of a balanced tree."""
    rng = np.random.default_rng(0)
    leaves = rng.integers(31, 63, 60_000)
    parent = {0: None, **{node: (node - 1) // 2 for node in range(1, 63)}}
    assert dendrogram_purity((leaves - 1) // 2, leaves, parent) == 1.0
    one_leaf = np.full(60_000, 31)
    counts = np.bincount(leaves % 3).tolist()
    same = [math.comb(count, 2) for count in counts]
    expected = sum(pairs * count / 60_000 for pairs, count in zip(same, counts, strict=True)) / sum(same)
    assert dendrogram_purity(leaves % 3, one_leaf, parent) == pytest.approx(expected, rel=1e-12)


def test_a_single_point_class_has_no_pairs_but_dilutes() -> None:
    parent = {0: None, 1: 0, 2: 0}
    assert dendrogram_purity([0, 0, 5], [1, 1, 1], parent) == pytest.approx(2 / 3)
    assert dendrogram_purity([0, 0, 5], [1, 1, 2], parent) == 1.0


def test_dendrogram_purity_of_a_deep_tree_does_not_recurse() -> None:
    """A caterpillar of 3000 leaves; the two deepest share a parent."""
    depth = 3000
    parent: dict[int, int | None] = {0: None}
    for level in range(1, depth + 1):
        parent[level] = parent[depth + level] = level - 1
    assert dendrogram_purity([0, 0, 1], [depth, 2 * depth, depth + 1], parent) == 1.0
    assert dendrogram_purity([0, 1, 0], [depth, 2 * depth, depth + 1], parent) == pytest.approx(2 / 3)


def test_effective_leaves_counts_mean_probabilities() -> None:
    probs = torch.tensor([[0.97, 0.02, 0.01, 0.0], [0.97, 0.03, 0.0, 0.0]])
    assert effective_leaves(probs) == 2
    assert effective_leaves(probs, min_share=0.005) == 3
    assert effective_leaves(probs, min_share=0) == 4
    assert effective_leaves(probs, min_share=0.5) == 1
    assert effective_leaves(probs, min_share=1) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("leaves", [3, 10, 49, 100])
def test_a_leaf_with_exactly_the_smallest_share_counts(dtype: torch.dtype, leaves: int) -> None:
    probs = torch.full((7, leaves), 1 / leaves, dtype=dtype)
    assert effective_leaves(probs, min_share=1 / leaves) == leaves


def test_leaf_perplexity_in_closed_form() -> None:
    assert leaf_perplexity(np.eye(5)) == 1.0
    assert leaf_perplexity(np.full((3, 8), 1 / 8)) == pytest.approx(8, rel=1e-14)
    assert leaf_perplexity([[0.25, 0.75], [1.0, 0.0]]) == pytest.approx((4 / 3**0.75 + 1) / 2, rel=1e-14)


@quick
@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
        elements=st.floats(0, 30, width=32),
    )
)
def test_leaf_perplexity_lies_between_one_and_the_number_of_leaves(
    logits: np.ndarray[Any, np.dtype[np.float32]],
) -> None:
    probs = torch.from_numpy(logits).softmax(1)
    expected = torch.special.entr(probs.double()).sum(1).exp().mean()
    perplexity = leaf_perplexity(probs)
    assert 1 <= perplexity <= logits.shape[1] * (1 + 1e-15)
    assert perplexity == pytest.approx(expected.item(), rel=1e-6)


# --- inputs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", PARTITION_METRICS)
def test_lists_arrays_and_tensors_give_the_same(metric: Callable[..., Any]) -> None:
    labels, found = [0, 0, 1, 2, 2, 2, 1], [3, 3, 3, 4, 5, 4, 5]
    expected = metric(labels, found)
    for kind in (np.int8, np.uint64, np.int32):
        assert np.array_equal(metric(np.array(labels, kind), np.array(found, kind)), expected)
    for dtype in (torch.uint8, torch.int64):
        assert np.array_equal(metric(torch.tensor(labels, dtype=dtype), torch.tensor(found)), expected)
    assert isinstance(expected, float)


def test_tensors_with_gradients_and_bfloat16_are_read() -> None:
    probs = torch.tensor([[0.5, 0.5], [0.25, 0.75]], requires_grad=True)
    assert leaf_perplexity(probs) == leaf_perplexity(probs.bfloat16()) == leaf_perplexity(probs.tolist())
    assert isinstance(leaf_perplexity(probs), float)
    assert type(effective_leaves(probs)) is int
    parent = {0: None, 1: 0, 2: 0}
    assert dendrogram_purity(torch.tensor([0, 0]), torch.tensor([1, 2]), parent) == 1.0


@pytest.mark.parametrize("metric", PARTITION_METRICS)
@pytest.mark.parametrize(
    ("labels", "found", "error", "message"),
    [
        ([0, 1, 1], [0, 1], ValueError, r"one of each per point, found 3 labels and 2 \w+; pass both"),
        ([], [], ValueError, r"labels: expected at least one point, found an empty array"),
        ([[0], [1]], [0, 1], ValueError, r"labels: expected one integer per .*found shape \(2, 1\)"),
        ([0, 1], np.eye(2), ValueError, r"(clusters|leaves): expected one integer per point.*shape \(2, 2\)"),
        ([0, 1], [0.0, 1.0], TypeError, r"(clusters|leaves): expected integers, found float64; convert"),
        (torch.tensor([True, False]), [0, 1], TypeError, r"labels: expected integers, found bool; convert"),
        (["a", "b"], [0, 1], TypeError, r"labels: expected integers, found <U1.*return_inverse"),
    ],
)
def test_bad_ids(
    metric: Callable[..., Any], labels: object, found: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        metric(labels, found)


@pytest.mark.parametrize(
    ("labels", "leaves", "parent", "error", "message"),
    [
        ([0, 0], [1, 2], {0: None, 1: 0}, ValueError, r"every node up to.*none for node 2, at or above"),
        ([0, 0], [1, 1], {1: 0}, ValueError, r"none for node 0, at or above leaf 1"),
        ([0, 0], [3, 3], {3: 1, 1: 2, 2: 1}, ValueError, r"found node 1 above itself; expected None"),
        ([0, 0], [1, 1], {0: 0, 1: 0}, ValueError, r"found node 0 above itself; expected None for the root"),
        ([0, 0], [1, 2], {1: None, 2: None}, ValueError, r"expected one root, found \[1, 2\]; join them"),
        ([0, 0], [0, 1], {0: None, 1: 0}, ValueError, r"without children, found 0.*tree\.leaves\[column\]"),
        ([0, 0], [0, 1], [None, 0], TypeError, r"expected a mapping.*found list; make one with dict"),
        ([0, 1], [0, 0], {0: None}, ValueError, r"at least two points, found 2 with one each; score"),
        ([0, 1], [0], {0: None}, ValueError, r"found 2 labels and 1 leaves"),
    ],
)
def test_bad_trees(labels: list[int], leaves: list[int], parent: object, error: type[Exception], message: str) -> None:
    score: Callable[..., float] = dendrogram_purity
    with pytest.raises(error, match=message):
        score(labels, leaves, parent)


@pytest.mark.parametrize("metric", [effective_leaves, leaf_perplexity])
@pytest.mark.parametrize(
    ("probs", "error", "message"),
    [
        ([0.5, 0.5], ValueError, r"expected leaf probabilities of shape \(B, K\), found shape \(2,\)"),
        (np.zeros((0, 3)), ValueError, r"found shape \(0, 3\)"),
        ([[0.5, math.nan]], ValueError, r"expected finite probabilities, found NaN or infinity"),
        (torch.tensor([[-0.7, -0.7]]), ValueError, r"found -0\.7; take \.exp\(\) of log-probabilities"),
        ([[0.5, 0.5], [0.5, 0.4]], ValueError, r"sum to 1 over the leaves.*, found a sum of 0\.9;"),
        ([[50.0, 50.0]], ValueError, r"found a sum of 100; give all leaves"),
        ([[1j, 0]], TypeError, r"probs: expected real numbers, found complex128"),
    ],
)
def test_bad_probabilities(metric: Callable[..., float], probs: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        metric(probs)


@pytest.mark.parametrize("min_share", [-0.1, 1.5, math.nan])
def test_bad_min_share(min_share: float) -> None:
    with pytest.raises(ValueError, match=rf"min_share: expected .* in \[0, 1\], found {min_share}"):
        effective_leaves([[1.0]], min_share=min_share)
