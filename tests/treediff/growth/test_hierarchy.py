"""Hierarchies of flat clusterings, against the algorithm written out with loops, and against scipy."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.cluster.hierarchy import linkage, to_tree
from torch import Tensor
from worlds import seeded

from treediff import TreeTopology
from treediff.growth import logits_to_hierarchy, topology_of_merges
from treediff.metrics import dendrogram_purity


def by_hand(logits: Tensor) -> set[frozenset[int]]:
    """The clusters below each node of L2H, with loops over rows and clusters."""
    rows = [[math.exp(x) for x in row] for row in logits.double().tolist()]
    width = len(rows[0])
    own = [row.index(max(row)) for row in rows]
    score = []
    for c in range(width):
        certain = [max(row) / sum(row) for row, cluster in zip(rows, own, strict=True) if cluster == c]
        score.append(sum(certain) / len(certain) if certain else 0.0)
    groups = [frozenset({c}) for c in range(width)]
    found = set(groups)
    while len(groups) > 1:
        least = min(groups, key=lambda group: sum(score[c] for c in group))
        gained = [0.0] * width
        for row, cluster in zip(rows, own, strict=True):
            if cluster in least:
                rest = {c: row[c] for c in range(width) if c not in least}
                best = max(rest, key=rest.__getitem__)
                gained[best] += rest[best] / sum(rest.values())
        others = [group for group in groups if group != least]
        near = max(others, key=lambda group: sum(gained[c] for c in group) / len(group))
        groups = [group for group in others if group != near] + [least | near]
        found.add(least | near)
    return found


def below(tree: TreeTopology) -> set[frozenset[int]]:
    return {frozenset(tree.leaves_under(node)) for node in tree.ids}


@given(st.integers(1, 8), st.integers(1, 40), st.integers(0, 10_000))
def test_it_is_the_algorithm_of_the_paper(clusters: int, rows: int, seed: int) -> None:
    logits = 2 * torch.randn(rows, clusters, generator=seeded(seed), dtype=torch.float64)
    empty = clusters - logits.argmax(1).unique().numel()
    tree = logits_to_hierarchy(logits)
    assert sorted(tree.leaves) == list(range(clusters))
    if empty < 2:  # two clusters without rows have equal scores, of which either may be the least
        assert below(tree) == by_hand(logits)


def test_it_finds_groups_of_groups() -> None:
    centres = torch.tensor([0.0, 1.0, 10.0, 11.0, 30.0])
    which = torch.arange(5).repeat_interleave(40)
    x = centres[which] + 0.3 * torch.randn(200, generator=seeded(0))
    tree = logits_to_hierarchy(-(x[:, None] - centres).square())
    assert {frozenset({0, 1}), frozenset({2, 3})} <= below(tree)
    assert dendrogram_purity(which // 2, which, tree.parents) == 1


@pytest.mark.parametrize("count", [1, 2, 7])
def test_merges_are_those_of_scipy(count: int) -> None:
    points = torch.randn(count, 2, generator=seeded(1)).numpy()
    merges = linkage(points, "ward") if count > 1 else []
    tree = topology_of_merges([(int(row[0]), int(row[1])) for row in merges])
    assert sorted(tree.leaves) == list(range(count))
    if count > 1:
        _, nodes = to_tree(merges, rd=True)
        for node in nodes:
            assert sorted(tree.leaves_under(node.id)) == sorted(node.pre_order())


@pytest.mark.parametrize("merges", [[(0, 0)], [(0, 3)], [(0, 1), (0, 2)]])
def test_merges_of_what_is_not_there_are_refused(merges: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match=r"merge \d joins .*, expected two of the clusters"):
        topology_of_merges(merges)


@pytest.mark.parametrize(
    ("logits", "error", "message"),
    [
        ([[0.0]], TypeError, "expected logits as a float tensor"),
        (torch.zeros(2, 2, dtype=torch.int64), TypeError, "expected logits as a float tensor .* found torch.int64"),
        (torch.zeros(0, 2), ValueError, "expected finite logits .* of at least one row, found shape"),
        (torch.zeros(2), ValueError, "expected finite logits"),
        (torch.tensor([[math.inf, 0.0]]), ValueError, "expected finite logits"),
    ],
)
def test_what_are_no_logits_is_refused(logits: Any, error: type[Exception], message: str) -> None:  # noqa: ANN401
    with pytest.raises(error, match=message):
        logits_to_hierarchy(logits)
