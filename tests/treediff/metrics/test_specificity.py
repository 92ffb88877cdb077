"""Cluster specificity against scikit-learn, slow loops and cases worked out by hand."""

from __future__ import annotations

import itertools
import math
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import mutual_info_score
from strategies import quick

from treediff.metrics import ClusterSpecificity, cluster_accuracy, cluster_specificity, leaf_purity, return_rate

LEAVES, CLASSES = [7, -3, 40, 2], 3  # in an order that is not that of the ids
Images = list[tuple[int, int]]  # leaf and class of each
images = st.lists(st.tuples(st.sampled_from(LEAVES), st.integers(0, CLASSES - 1)), min_size=1, max_size=40)


def entropy(shares: list[float]) -> float:
    return -math.fsum(p * math.log(p) for p in shares if p > 0)


def slowly(
    leaf: list[int], probs: list[list[float]], leaves: list[int], weights: list[float] | None
) -> tuple[list[list[float]], float, float, float]:
    """Histogram, mean entropy, mean purity and mutual information, leaf by leaf and class by class."""
    histogram, used = [], []
    for i, k in enumerate(leaves):
        rows = [p for found, p in zip(leaf, probs, strict=True) if found == k]
        histogram.append([math.fsum(p[c] for p in rows) / max(len(rows), 1) for c in range(len(probs[0]))])
        used.append((len(rows) if weights is None else weights[i]) if rows else 0)
    total = math.fsum(used)
    w = [x / total for x in used]
    mean_entropy = math.fsum(x * entropy(h) for x, h in zip(w, histogram, strict=True))
    mean_purity = math.fsum(x * max(h) for x, h in zip(w, histogram, strict=True))
    mixture = [math.fsum(x * h[c] for x, h in zip(w, histogram, strict=True)) for c in range(len(probs[0]))]
    return histogram, mean_entropy, mean_purity, entropy(mixture) - mean_entropy


def check(found: ClusterSpecificity, leaf: list[int], probs: list[list[float]], weights: list[float] | None) -> None:
    histogram, mean_entropy, mean_purity, information = slowly(leaf, probs, LEAVES, weights)
    assert found.counts.tolist() == [leaf.count(k) for k in LEAVES]
    np.testing.assert_allclose(found.histogram, histogram, atol=1e-12)
    np.testing.assert_allclose(found.entropy, [entropy(h) for h in histogram], atol=1e-12)
    np.testing.assert_allclose(found.purity, [max(h) for h in histogram], atol=1e-12)
    assert found.mean_entropy == pytest.approx(mean_entropy, abs=1e-12)
    assert found.mean_purity == pytest.approx(mean_purity, abs=1e-12)
    assert found.mutual_information == pytest.approx(information, abs=1e-12)
    assert found.mutual_information >= 0


# --- oracles --------------------------------------------------------------------------------------------------


@quick
@given(images, st.none() | st.lists(st.floats(0.01, 9), min_size=4, max_size=4))
def test_classes_equal_the_loop(drawn: Images, weights: list[float] | None) -> None:
    leaf, predicted = [k for k, _ in drawn], [c for _, c in drawn]
    found = cluster_specificity(leaf, predicted, leaves=LEAVES, classes=CLASSES, weights=weights)
    check(found, leaf, np.eye(CLASSES)[predicted].tolist(), weights)


@quick
@given(images, st.none() | st.lists(st.floats(0.01, 9), min_size=4, max_size=4), st.integers(0, 10**6))
def test_probabilities_equal_the_loop(drawn: Images, weights: list[float] | None, seed: int) -> None:
    leaf = [k for k, _ in drawn]
    probs = np.random.default_rng(seed).dirichlet([0.3] * CLASSES, len(leaf))
    found = cluster_specificity(leaf, probs, leaves=LEAVES, classes=CLASSES, weights=weights)
    check(found, leaf, probs.tolist(), weights)


@quick
@given(images)
def test_information_and_purity_equal_those_of_other_code(drawn: Images) -> None:
    leaf, predicted = [k for k, _ in drawn], [c for _, c in drawn]
    found = cluster_specificity(leaf, predicted, leaves=LEAVES, classes=CLASSES)
    assert found.mutual_information == pytest.approx(mutual_info_score(leaf, predicted), abs=1e-12)
    assert found.mean_purity == pytest.approx(leaf_purity(predicted, leaf), abs=1e-12)


# --- by hand --------------------------------------------------------------------------------------------------


def test_a_class_for_each_leaf_is_the_best_there_is() -> None:
    found = cluster_specificity([5, 5, 6, 7], [2, 2, 0, 1], leaves=[5, 6, 7], classes=3, weights=[1, 1, 1])
    assert found.histogram.tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0]]
    assert str(found.entropy) == "[0. 0. 0.]"  # and not -0
    assert found.mean_entropy == 0 and found.mean_purity == 1
    assert found.mutual_information == pytest.approx(math.log(3))


def test_leaves_that_all_draw_the_same_say_nothing() -> None:
    found = cluster_specificity([0, 0, 1, 1], [0, 1, 1, 0], leaves=[0, 1], classes=2)
    assert found.mean_entropy == pytest.approx(math.log(2)) and found.mean_purity == 0.5
    assert found.mutual_information == 0
    alone = cluster_specificity([4, 4], [0, 1], leaves=[4], classes=5)
    assert alone.mutual_information == 0 and alone.mean_entropy == pytest.approx(math.log(2))


@pytest.mark.parametrize("leaves", [2, 3, 4, 5])
@pytest.mark.parametrize("classes", [1, 2, 3, 4, 5, 6])
def test_independence_is_never_below_zero(leaves: int, classes: int) -> None:
    """Every leaf draws every class once; unguarded, rounding takes some of these to -2e-16."""
    leaf, predicted = zip(*itertools.product(range(leaves), range(classes)), strict=True)
    found = cluster_specificity(leaf, predicted, leaves=range(leaves), classes=classes)
    assert 0 <= found.mutual_information < 1e-14


def test_a_class_in_two_leaves_costs_nothing_and_two_in_one_leaf_do() -> None:
    shared = cluster_specificity([0, 1, 2, 2], [0, 0, 1, 1], leaves=range(3), classes=2)
    assert shared.mean_entropy == 0 and shared.mutual_information == pytest.approx(math.log(2))
    mixed = cluster_specificity([0, 0, 1, 1], [0, 1, 2, 2], leaves=range(2), classes=3)
    assert mixed.entropy == pytest.approx([math.log(2), 0]) and mixed.mean_entropy == pytest.approx(math.log(2) / 2)


def test_weights_count_leaves_and_not_images() -> None:
    """Three images of a sure leaf and two of an undecided one; the tree goes to the sure one in one of four cases."""
    settings: Any = {"leaves": [1, 2], "classes": 2}
    leaf, predicted = [1, 1, 1, 2, 2], [0, 0, 0, 0, 1]
    by_share = cluster_specificity(leaf, predicted, **settings)
    assert by_share.mean_entropy == pytest.approx(0.4 * math.log(2)) and by_share.mean_purity == pytest.approx(0.8)
    weighted = cluster_specificity(leaf, predicted, weights=[0.25, 0.75], **settings)
    assert weighted.mean_entropy == pytest.approx(0.75 * math.log(2)) and weighted.mean_purity == 0.625
    mixture = entropy([0.25 + 0.375, 0.375])
    assert weighted.mutual_information == pytest.approx(mixture - 0.75 * math.log(2))


@pytest.mark.parametrize("weights", [None, [0.5, 0.3, 0.2]])
def test_a_leaf_without_images_takes_no_part(weights: list[float] | None) -> None:
    found = cluster_specificity([1, 1, 3, 3], [0, 0, 0, 1], leaves=[1, 2, 3], classes=2, weights=weights)
    assert found.histogram.tolist() == [[1, 0], [0, 0], [0.5, 0.5]]
    assert found.counts.tolist() == [2, 0, 2] and found.entropy[1] == found.purity[1] == 0
    without = None if weights is None else [0.5, 0.2]
    same = cluster_specificity([1, 1, 3, 3], [0, 0, 0, 1], leaves=[1, 3], classes=2, weights=without)
    assert found.mean_entropy == same.mean_entropy and found.mean_purity == same.mean_purity
    assert found.mutual_information == same.mutual_information


def test_doubt_counts_with_probabilities_and_not_without() -> None:
    probs = np.array([[0.75, 0.25], [0.25, 0.75]])
    sure = cluster_specificity([0, 1], probs.argmax(1), leaves=[0, 1], classes=2)
    unsure = cluster_specificity([0, 1], probs, leaves=[0, 1], classes=2)
    assert sure.mutual_information == pytest.approx(math.log(2))
    assert unsure.mutual_information == pytest.approx(math.log(2) - entropy([0.25, 0.75]))


# --- properties and inputs ------------------------------------------------------------------------------------


@quick
@given(images, st.randoms(use_true_random=False))
def test_order_is_nothing_to_it_and_ranges_hold(drawn: Images, random: Random) -> None:
    leaf, predicted = [k for k, _ in drawn], [c for _, c in drawn]
    found = cluster_specificity(leaf, predicted, leaves=LEAVES, classes=CLASSES)
    random.shuffle(drawn)
    again = cluster_specificity([k for k, _ in drawn], [c for _, c in drawn], leaves=LEAVES[::-1], classes=CLASSES)
    assert (again.histogram[::-1] == found.histogram).all()
    assert again.mutual_information == pytest.approx(found.mutual_information, abs=1e-12)
    seen = found.counts > 0
    assert found.histogram.sum(1) == pytest.approx(seen.astype(float), abs=1e-12)
    assert (found.purity[seen] >= 1 / CLASSES).all() and 1 / CLASSES <= found.mean_purity <= 1 + 1e-12
    assert 0 <= found.mean_entropy <= math.log(CLASSES) + 1e-12
    assert 0 <= found.mutual_information <= math.log(CLASSES) + 1e-12


def test_lists_arrays_and_tensors_give_the_same() -> None:
    leaf, predicted, leaves, weights = [3, 3, 4, 4], [0, 1, 1, 1], [4, 3], [0.5, 0.5]
    probs = [[0.875, 0.125], [0.5, 0.5], [0.25, 0.75], [0.0, 1.0]]
    for given_classes in (predicted, probs):
        expected = cluster_specificity(leaf, given_classes, leaves=leaves, classes=2, weights=weights)
        for kind in (np.array, torch.tensor):
            made: Any = [kind(x) for x in (leaf, given_classes, leaves, weights)]
            found = cluster_specificity(made[0], made[1], leaves=made[2], classes=2, weights=made[3])
            np.testing.assert_allclose(found.histogram, expected.histogram, atol=1e-7)
            assert found.mutual_information == pytest.approx(expected.mutual_information, abs=1e-7)
            assert isinstance(found.mutual_information, float) and found.histogram.dtype == np.float64
    read_only, small = np.array(probs), torch.tensor(probs, requires_grad=True).bfloat16()
    read_only.setflags(write=False)
    before = read_only.copy()
    for odd in (read_only, small):
        found = cluster_specificity(np.array(leaf, np.uint64), odd, leaves=np.array(leaves, np.int8), classes=2)
        assert found.histogram[0].tolist() == pytest.approx([0.125, 0.875])
    assert (read_only == before).all()
    unsigned = cluster_specificity(leaf, np.array(predicted, np.uint64), leaves=leaves, classes=2)
    assert unsigned.histogram.tolist() == [[0, 1], [0.5, 0.5]]


def test_probabilities_that_miss_one_by_a_rounding_are_scaled() -> None:
    found = cluster_specificity([0], [[0.4996, 0.4996]], leaves=[0], classes=2)
    assert found.histogram.tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"leaf": []}, ValueError, r"leaf: expected at least one point, found an empty array"),
        ({"leaf": [3, 4, 9, 4]}, ValueError, r"ids among leaves, \[3, 4\], found 9; pass node ids, not columns: tree"),
        ({"leaf": [3, 4, -9, 4]}, ValueError, r"ids among leaves, \[3, 4\], found -9; pass"),
        ({"leaf": [3, 4]}, ValueError, r"one of each per image, found 2 leaves and 4 predictions; pass both for the"),
        ({"leaf": [3.0] * 4}, TypeError, r"leaf: expected integers, found float64"),
        (
            {"leaves": [3, 4, 3]},
            ValueError,
            r"leaves: expected every leaf once, found \[3, 4, 3\]; remove the duplicates",
        ),
        ({"leaves": []}, ValueError, r"leaves: expected at least one point, found an empty array"),
        ({"predicted": [0, 1, 2, 1]}, ValueError, r"classes from 0 to 1, found 2; is classes=2 right\?"),
        ({"predicted": [0, 1, -1, 1]}, ValueError, r"classes from 0 to 1, found -1; is"),
        ({"predicted": [0.0, 1.0, 1.0, 1.0]}, TypeError, r"predicted: expected integers, found float64"),
        (
            {"predicted": np.eye(4)},
            ValueError,
            r"probabilities of 2 classes for each of 4 images, found shape \(4, 4\)",
        ),
        ({"predicted": np.eye(2)}, ValueError, r"for each of 4 images, found shape \(2, 2\)"),
        ({"predicted": np.ones((4, 2))}, ValueError, r"sum to 1 \(within 0.001\), found .* sums from 2 to 2; take the"),
        (
            {"predicted": [[2.0, -1.0]] * 4},
            ValueError,
            r"found values from -1 to 2 and sums from 1 to 1; take the soft",
        ),
        ({"predicted": [[math.nan, 1.0]] * 4}, ValueError, r"found values from nan to nan and sums from nan to nan"),
        ({"predicted": np.ones((4, 2, 1))}, ValueError, r"predicted: expected one integer per point.*\(4, 2, 1\)"),
        ({"classes": 0}, ValueError, r"classes must be at least 1, found 0"),
        ({"classes": 2.0}, TypeError, r"classes must be a whole number, found 2.0"),
        ({"weights": [1.0]}, ValueError, r"weights: .* per leaf, \(2,\), found .* of shape \(1,\); take .exp\(\)"),
        ({"weights": [1.0, -0.5]}, ValueError, r"weights: expected one finite number of at least 0 per leaf"),
        ({"weights": [1.0, math.inf]}, ValueError, r"weights: expected one finite number of at least 0 per leaf"),
        ({"weights": [0, 0]}, ValueError, r"weights: expected a leaf with images and a weight above 0, found none; dr"),
        ({"leaf": [3] * 4, "weights": [0, 1]}, ValueError, r"weights: expected a leaf with images and a weight"),
    ],
)
def test_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"leaf": [3, 3, 4, 4], "predicted": [0, 1, 1, 1], "leaves": [3, 4], "classes": 2}
    with pytest.raises(error, match=message):
        cluster_specificity(**arguments | change)


# --- return rate ----------------------------------------------------------------------------------------------


@quick
@given(st.lists(st.tuples(st.integers(-2, 3), st.integers(-2, 3)), min_size=1, max_size=30))
def test_return_rate_equals_counting(pairs: list[tuple[int, int]]) -> None:
    drawn, back = zip(*pairs, strict=True)
    found = return_rate(drawn, back)
    assert found.overall == sum(a == b for a, b in pairs) / len(pairs)
    assert list(found.per_leaf) == sorted(set(drawn))
    for k, rate in found.per_leaf.items():
        of_leaf = [a == b for a, b in pairs if a == k]
        assert rate == sum(of_leaf) / len(of_leaf)
    assert return_rate(torch.tensor(drawn), np.array(back)) == found


def test_return_rate_matches_ids_and_not_clusters() -> None:
    assert return_rate([3, 3, 4], [4, 4, 3]).overall == 0 and cluster_accuracy([3, 3, 4], [4, 4, 3]) == 1
    assert return_rate([3, 3, 4], [3, 3, 4]).per_leaf == {3: 1.0, 4: 1.0}


@pytest.mark.parametrize(
    ("leaf", "encoded", "error", "message"),
    [
        (
            [3, 4],
            [3],
            ValueError,
            r"one of each per image, found 2 leaves and 1 encoded leaves; pass both for the same",
        ),
        ([], [], ValueError, r"leaf: expected at least one point"),
        ([3], [], ValueError, r"encoded: expected at least one point"),
        ([3], [0.5], TypeError, r"encoded: expected integers, found float64"),
    ],
)
def test_return_rate_refuses(leaf: list[int], encoded: Any, error: type[Exception], message: str) -> None:  # noqa: ANN401
    with pytest.raises(error, match=message):
        return_rate(leaf, encoded)
