"""Which leaf a growing tree splits next."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["POLICIES", "LeafStatistics", "Policy", "best_leaf"]


@dataclass(frozen=True, eq=False)
class LeafStatistics:
    """What a policy may look at when it chooses the leaf to split; one entry per leaf, in the topology's order.

    Args:
        rows: how many rows belong to the leaf (see `TreeGrowth.members`).
        share: mean probability of the leaf over all rows.
        loss: mean negative ELBO of the leaf's rows, in nats; nan without rows.
        entropy: mean entropy of `P(leaf | x)` over the leaf's rows, in nats; nan without rows.
    """

    rows: Tensor
    share: Tensor
    loss: Tensor
    entropy: Tensor


Policy = Callable[[LeafStatistics], Tensor]

POLICIES: dict[str, Policy] = {
    "largest": lambda leaves: leaves.rows.double(),
    "highest_loss": lambda leaves: leaves.loss.double(),
    "highest_entropy": lambda leaves: leaves.entropy.double(),
}


def best_leaf(policy: Policy, statistics: LeafStatistics, leaves: Sequence[int], allowed: Tensor) -> int | None:
    """The leaf with the best score among those that are allowed; None if there is none.

    Args:
        policy: gives a score to each leaf.
        statistics: what it looks at.
        leaves: `K` node ids, in the order of the statistics.
        allowed: `(K,)` of booleans.

    Raises:
        TypeError: if the policy returns no tensor.
        ValueError: if it does not give one score to each leaf, or gives nan to one that is allowed.
    """
    score = policy(statistics)
    if not isinstance(score, Tensor):
        raise TypeError(f"a policy returns a tensor with a score for each leaf, found {score!r}")
    if score.shape != statistics.rows.shape:
        raise ValueError(
            f"a policy returns one score for each of the {len(statistics.rows)} leaves, found shape "
            f"{tuple(score.shape)}"
        )
    score = torch.where(allowed, score.cpu().double(), -math.inf)
    if score.isnan().any():
        bad = leaves[int(score.isnan().long().argmax())]
        raise ValueError(f"a policy gave nan to leaf {bad}, which has rows; give -inf to leaves not to be split")
    best = int(score.argmax())
    return leaves[best] if score[best] > -math.inf else None
