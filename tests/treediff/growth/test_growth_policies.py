"""Which leaf is split: each policy against numbers worked out leaf by leaf and row by row."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from growing import blobs, growth_of, reach, small, train
from torch import Tensor

from treediff import LeafStatistics, TreeGrowth, TreeTopology, TreeVAE
from treediff.core.noise import combine_seeds

POLICIES = ("largest", "highest_loss", "highest_entropy")
FOUR = TreeTopology.balanced(2)


@torch.no_grad()
def by_hand(growth: TreeGrowth, x: Tensor) -> dict[str, list[float]]:
    """Rows, share, loss and entropy of each leaf, with plain loops; the noise is that of the growth."""
    model = growth.model
    probs = [reach(model, x, leaf).tolist() for leaf in model.topology.leaves]
    shares = [sum(column) / len(x) for column in probs]
    least = min(1 / max(1, sum(share >= growth.min_share for share in shares)), 0.5)
    elbo: list[float] = []
    for start in range(0, len(x), growth.batch_size):
        seed = combine_seeds(growth.seed, len(growth.history), -2, start)
        part = x[start : start + growth.batch_size]
        elbo += model.elbo(part, generator=torch.Generator().manual_seed(seed)).elbo.tolist()
    entropy = [-sum(p * math.log(p) for p in row if p > 0) for row in zip(*probs, strict=True)]
    found: dict[str, list[float]] = {"rows": [], "share": shares, "loss": [], "entropy": []}
    for column in probs:
        members = [i for i, p in enumerate(column) if p >= least]
        found["rows"].append(len(members))
        for name, values in (("loss", [-value for value in elbo]), ("entropy", entropy)):
            found[name].append(sum(values[i] for i in members) / len(members) if members else math.nan)
    return found


def data() -> Tensor:
    """Clusters of different sizes; the second is small and wide, so that it is expensive."""
    x = blobs(90, 30, 60, 40, dtype=torch.float64)
    far = (x[:, 0] > 0) & (x[:, 1] < 0)
    return torch.where(far[:, None], 2 * x, x)


def four(seed: int = 0) -> TreeVAE:
    return small(FOUR, seed=seed, width=32, dtype=torch.float64)


@pytest.mark.parametrize(("min_share", "batch_size"), [(0.0, 1024), (0.1, 50)])
def test_the_statistics_are_those_of_the_loop(min_share: float, batch_size: int) -> None:
    x, calls = data(), []

    def policy(leaves: LeafStatistics) -> Tensor:
        expected = by_hand(growth, x)
        assert leaves.rows.tolist() == expected["rows"]
        assert not leaves.rows.is_floating_point()
        for name in ("share", "loss", "entropy"):
            found, wanted = getattr(leaves, name).double(), torch.tensor(expected[name], dtype=torch.float64)
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9, equal_nan=True, msg=name)
        calls.append(min(expected["rows"]))
        return leaves.share

    growth = growth_of(four(), policy=policy, max_leaves=7, min_share=min_share, batch_size=batch_size)
    for stage in growth.stages(x):
        train(stage, x)
    assert len(calls) >= 3


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_splits_the_leaf_that_it_names(policy: str) -> None:
    x, growth, choice = data(), growth_of(four(), policy=policy, max_leaves=7, intermediate_every=99), None
    splits = 0
    for stage in growth.stages(x):
        if stage.kind == "settle":
            assert stage.splits == (choice,)
            splits += 1
        train(stage, x)
        tree, deepest = growth.model.topology, len(growth.model.bottom_up)
        statistics = by_hand(growth, x)
        score = statistics[{"largest": "rows"}.get(policy, policy.removeprefix("highest_"))]
        room = [k for k, leaf in enumerate(tree.leaves) if tree.depth(leaf) < deepest]
        room = [k for k in room if statistics["rows"][k] >= growth.min_rows]
        choice = tree.leaves[max(room, key=lambda k: score[k])]
    assert splits == 3


def first_split(policy: Any) -> int | None:  # noqa: ANN401
    growth = growth_of(four(), policy=policy, max_leaves=5, initial_epochs=6)
    for stage in growth.stages(data()):
        if stage.kind == "settle":
            return stage.splits[0]
        train(stage, data())
    return None


def test_policies_differ() -> None:
    assert first_split("largest") != first_split("highest_loss")


@pytest.mark.parametrize("rank", range(4))
def test_a_function_may_choose_any_leaf(rank: int) -> None:
    assert first_split(lambda leaves: torch.arange(len(leaves.rows)) == rank) == FOUR.leaves[rank]


def test_a_function_may_forbid_all() -> None:
    assert first_split(lambda leaves: torch.full(leaves.rows.shape, -math.inf)) is None


@pytest.mark.parametrize(
    ("policy", "error", "message"),
    [
        (lambda leaves: 3.0, TypeError, "a policy returns a tensor with a score for each leaf, found 3.0"),
        (lambda leaves: leaves.rows[:3], ValueError, "one score for each of the 4 leaves, found shape (3,)"),
        (lambda leaves: leaves.loss * math.nan, ValueError, "a policy gave nan to leaf 3, which has rows"),
    ],
)
def test_bad_scores_are_an_error(policy: Any, error: type[Exception], message: str) -> None:  # noqa: ANN401
    with pytest.raises(error, match=re.escape(message)):
        first_split(policy)
