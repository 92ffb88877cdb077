"""Policies: the choice of the leaf that a growing tree splits next."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from treediff.core.distributed import ALONE, World
from treediff.core.modes import evaluating
from treediff.core.noise import combine_seeds
from treediff.core.rows import Rows
from treediff.treevae.model import TreeVAE

__all__ = ["POLICIES", "LeafStatistics", "Policy", "Survey", "best_leaves"]


@dataclass(frozen=True, eq=False)
class LeafStatistics:
    """Statistics of leaves, from which a policy chooses the leaf to split; one entry per leaf, in the topology's order.

    Args:
        rows: number of rows that belong to the leaf (see `TreeGrowth.members`).
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


def best_leaves(policy: Policy, statistics: LeafStatistics, leaves: Sequence[int], allowed: Tensor) -> list[int]:
    """Return the allowed leaves whose score is not -inf, the best first; equal scores in the order of the leaves.

    Args:
        policy: gives a score to each leaf.
        statistics: input of the policy.
        leaves: `K` node ids, in the order of the statistics.
        allowed: `(K,)` of booleans.

    Raises:
        TypeError: if the policy does not return a tensor.
        ValueError: if the policy does not give one score to each leaf, or gives nan to an allowed leaf.
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
    order = score.sort(descending=True, stable=True).indices
    return [leaves[rank] for rank in order if score[rank] > -math.inf]


@dataclass(frozen=True)
class Survey:
    """Pass over all rows in eval mode, batch by batch; each process takes a share, and all processes get all results.

    Letters: `n` rows, `K` leaves.

    Args:
        model: the model.
        batch_size: rows in a batch.
        seeds: whole numbers that seed the latents of the bounds.
        world: the processes that share the rows.

    Examples:
        >>> model = TreeVAE.for_vectors(features=4, generator=torch.Generator().manual_seed(0))
        >>> Survey(model, batch_size=8).negative_elbo(Rows(torch.rand(20, 4))).shape
        torch.Size([20])
    """

    model: TreeVAE
    batch_size: int = 1024
    seeds: tuple[int, ...] = (0,)
    world: World = ALONE

    @torch.no_grad()
    def negative_elbo(self, data: Rows) -> Tensor:
        """Return one draw of every row's negative bound in nats, `(n,)`, on the CPU."""

        def negative(rows: Tensor) -> Tensor:
            seed = combine_seeds(*self.seeds, int(rows[0]))
            x = data[rows].to(self.model.device)
            elbo = self.model.elbo(x, generator=torch.Generator(x.device).manual_seed(seed)).elbo
            return -elbo.cpu()

        with evaluating(self.model):
            return torch.cat(self.world.map(negative, torch.arange(len(data)).split(self.batch_size)))

    def statistics(self, data: Rows, probs: Tensor, members: Tensor, *, losses: bool = True) -> LeafStatistics:
        """Return the statistics for a policy.

        Args:
            data: all rows.
            probs: `(n, K)`, `P(leaf | x)` of each row.
            members: `(n, K)`, whether each row belongs to each leaf.
            losses: whether the policy reads the losses, which take most of the time; False makes all losses 0.
        """
        belongs = members.double()
        rows = belongs.sum(0)
        entropy = torch.special.entr(probs.double()).sum(1)
        loss = self.negative_elbo(data).double() if losses else torch.zeros(len(data), dtype=torch.float64)
        mean = belongs / rows
        return LeafStatistics(rows.long(), probs.mean(0), loss @ mean, entropy @ mean)
