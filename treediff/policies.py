"""Which leaf a growing tree splits next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

__all__ = ["POLICIES", "LeafStatistics", "Policy"]


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
