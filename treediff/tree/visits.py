"""Visits of images to nodes: one ragged table holds all that is computed for a batch in a tree.

A *visit* is an image at a node. With 32 leaves each of `B` images could visit 63 nodes, but a trained router sends
an image to few of them. So only the visits that take place are listed, sorted by node, and the cost grows with the
number of visits.

Letters: `B` batch, `T` visits, `R` visits to routed nodes, `N` nodes, `K` leaves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from treediff.core.groups import Groups
from treediff.tree.plan import TreePlan

__all__ = ["Visits", "descend"]


@dataclass(frozen=True, eq=False)
class Visits:
    """Visits of a batch, sorted by node and, within a node, by image.

    Args:
        plan: the nodes; the tables below hold positions of this plan.
        batch: number of images `B`.
        image: `(T,)` index of the image.
        node: `(T,)` position of the node.
        parent: `(T,)` index of the image's visit to the parent node; -1 at the root.
        log_reach: `(T,)` log-probability of reaching the node, in nats.
        routed: `(R,)` the visits where a router decided.
        logits: `(R,)` the router's logits; positive means left.
        starts: first visit of each level, and at the end `T`.
        roulette: below this probability a visit took place by chance only, see `descend`; 0 without roulette.
    """

    plan: TreePlan
    batch: int
    image: Tensor
    node: Tensor
    parent: Tensor
    log_reach: Tensor
    routed: Tensor
    logits: Tensor
    starts: list[int]
    roulette: float = 0.0

    def reach(self) -> Tensor:
        """Return `(T,)` the probability of reaching the node, divided by the visit's probability under roulette.

        Sums of terms with these weights are unbiased, and so are their gradients.
        """
        if not self.roulette:
            return self.log_reach.exp()
        return torch.exp(self.log_reach - (self.log_reach.detach() - math.log(self.roulette)).clamp_max(0))

    def groups(self) -> Groups:
        """Return the groups of the visits by node; group = position."""
        return Groups(self.node, len(self.plan.nodes))

    def routed_groups(self) -> Groups:
        """Return the groups of the routed visits by routed node."""
        return Groups(self.plan.routed_rank[self.node[self.routed]], len(self.plan.routed))

    def at_leaves(self) -> Tensor:
        """Return `(L,)` the visits at leaves of the tree."""
        if self.dense:
            return self.plan.everyone(self.plan.leaves, self.batch)
        return (self.plan.leaf_rank[self.node] >= 0).nonzero().squeeze(1)

    @property
    def dense(self) -> bool:
        """True if every image visits every node."""
        return self.starts[-1] == self.batch * len(self.plan.nodes)

    def table(self, visits: Tensor, values: Tensor, columns: Tensor, width: int, fill: float) -> Tensor:
        """Spread `values` of some visits over a `(B, width)` table; places never visited hold `fill`."""
        empty = values.new_full((self.batch, width), fill)
        return empty.index_put((self.image[visits], columns[self.node[visits]]), values)

    def along(self, leaf: Tensor) -> Visits:
        """Keep only the visits on each image's path to its own leaf; `leaf` is `(B,)`, ranks among the leaves."""
        plan = self.plan
        keep = plan.leads_to[self.node, leaf[self.image]]
        before = F.pad(keep.cumsum(0), (1, 0))
        kept = keep.nonzero().squeeze(1)
        parent = self.parent[kept]
        parent = torch.where(parent < 0, parent, before[parent])
        here = keep[self.routed].nonzero().squeeze(1)
        columns = self.image[kept], self.node[kept], parent, self.log_reach[kept]
        decisions = before[self.routed[here]], self.logits[here]
        return Visits(plan, self.batch, *columns, *decisions, before[self.starts].tolist(), self.roulette)

    def repeated(self, times: int) -> Visits:
        """Return the visits of a batch that repeats each image `times` times in a row; all must visit every node."""
        plan, batch = self.plan, self.batch * times
        log_reach, logits = (
            values.view(len(positions), self.batch).repeat_interleave(times, 1).flatten()
            for values, positions in ((self.log_reach, plan.nodes), (self.logits, plan.routed))
        )
        image, node, parent, starts = _everywhere(plan, batch)
        routed = plan.everyone(plan.routed, batch)
        return Visits(plan, batch, image, node, parent, log_reach, routed, logits, starts)

    def turns_left(self, leaf: Tensor) -> Tensor:
        """Return `(R,)` whether the path from each routed visit to its image's leaf turns left."""
        left = self.plan.turns[0][self.node[self.routed]]
        # A left turn that leads out of the plan (-1) leads to no leaf.
        return self.plan.leads_to[left, leaf[self.image[self.routed]]] & (left >= 0)

    def per_image(self, values: Tensor, visits: Tensor | None = None) -> Tensor:
        """Sum the values of some visits (all, by default) over each image: to `(B,)`."""
        image = self.image if visits is None else self.image[visits]
        return values.new_zeros(self.batch).index_add(0, image, values)


Route = Callable[[Tensor, Tensor, Groups, list[int]], Tensor]


def descend(
    plan: TreePlan,
    batch: int,
    route: Route,
    *,
    threshold: float = 0.0,
    chance: Tensor | None = None,
    leaf: Tensor | None = None,
    like: Tensor,
) -> Visits:
    """Send a batch down the tree, following every turn whose probability of being reached stays above `threshold`.

    The visits are found a few levels at a time without gradients; then all decisions are computed at once, with
    gradients.

    Args:
        plan: the nodes to visit.
        batch: number of images.
        route: `(image (R,), node (R,), groups, node ids) -> logits (R,)`: the routers' logits for some images at their
            nodes, which are positions.
        threshold: visits reached with less probability than the threshold are left out; 0 keeps all visits, and then no
            shape depends on the data.
        chance: `(B,)` uniform numbers in [0, 1). A visit reached with less probability than the threshold then takes
            place if the ratio of the two is at least the image's number. The weight of such a visit is increased in
            return (Russian roulette). Without roulette, no gradient ever comes from visits below the threshold, and
            probabilities pile up just above the threshold, where they cost most.
        leaf: `(B,)` ranks among the plan's leaves: each image visits only the path to its own leaf.
        like: tensor whose dtype and device log-probabilities take; never less precise than float32, because many
            log-probabilities are added up.

    Returns:
        the visits.

    Raises:
        ValueError: if the threshold is not at least 0 and below 1.
    """
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold is a probability, at least 0 and below 1; found {threshold}")
    dtype = torch.promote_types(like.dtype, torch.float32)
    keep = None if leaf is None else plan.leads_to[:, leaf]
    if threshold:
        least = like.new_full((batch,), math.log(threshold), dtype=dtype)
        if chance is not None:
            least = least + chance.log()
        reached = _reached(plan, least, route)
        keep = reached if keep is None else keep & reached
    if keep is None:
        image, node, parent, starts = _everywhere(plan, batch)
        routed = plan.everyone(plan.routed, batch)
    else:
        image, node, parent, starts = _listed(plan, keep)
        routed = (plan.routed_rank[node] >= 0).nonzero().squeeze(1)
    decisions, logits = _undecided(plan, batch, like, dtype), like.new_zeros(0, dtype=dtype)
    if plan.routed:
        where, who = node[routed], image[routed]
        rank = plan.routed_rank[where]
        logits = route(who, where, Groups(rank, len(plan.routed)), plan.ids(plan.routed)).to(dtype)
        decisions = decisions.index_put((rank, who), logits)
    reach = _sums_of_paths(_turns(plan, decisions, slice(None)), plan)
    log_reach = reach.flatten().index_select(0, node * batch + image)
    roulette = 0.0 if chance is None else threshold
    return Visits(plan, batch, image, node, parent, log_reach, routed, logits, starts, roulette)


def _everywhere(plan: TreePlan, batch: int) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Return image, node and parent of the visits of all images to all nodes, and the starts of levels."""
    node = torch.arange(len(plan.nodes), device=plan.device).repeat_interleave(batch)
    image = torch.arange(batch, device=plan.device).repeat(len(plan.nodes))
    parent = torch.where(node == 0, -1, plan.parent[node] * batch + image)
    return image, node, parent, [batch * n for n in (*(level.start for level in plan.levels), len(plan.nodes))]


def _listed(plan: TreePlan, keep: Tensor) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Return the result of `_everywhere` for the visits in `keep`, `(N, B)`, which also keeps the parents of nodes."""
    node, image = keep.nonzero(as_tuple=True)
    visits = keep.flatten().cumsum(0)
    parent = torch.where(node == 0, -1, visits[plan.parent[node] * keep.shape[1] + image] - 1)
    return image, node, parent, [0, *(keep.sum(1).cumsum(0)[[level.stop - 1 for level in plan.levels]].tolist())]


@torch.no_grad()
def _reached(plan: TreePlan, least: Tensor, route: Route) -> Tensor:
    """Return `(N, B)` whether the log-probability of a node is at least the image's `least`."""
    reach = [least.new_zeros(1, len(least))]
    decisions = _undecided(plan, len(least), least, least.dtype)
    for band in plan.bands:
        if band.ids:
            rank, image = (reach[-1][band.above] >= least).nonzero(as_tuple=True)
            node = plan.positions[rank + band.first]
            logits = route(image, node, Groups(rank, len(band.ids)), band.ids)
            decisions[rank + band.first, image] = logits.to(decisions.dtype)
        for level, below in band.steps:
            nodes = slice(below.start, below.stop)
            reach.append(reach[-1][plan.parent[nodes] - level.start] + _turns(plan, decisions, nodes))
    return torch.cat(reach) >= least


def _undecided(plan: TreePlan, batch: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `(I + 1, B)` logits 0 of all decisions, and a last row inf for nodes that pass all images on."""
    decisions = like.new_zeros(len(plan.routed) + 1, batch, dtype=dtype)
    decisions[-1] = math.inf
    return decisions


def _turns(plan: TreePlan, decisions: Tensor, nodes: slice) -> Tensor:
    """Return `(n, B)` log-probability of the turn that leads to each of some nodes; 0 for the root."""
    return F.logsigmoid(decisions[plan.decider[nodes]] * plan.side[nodes])


def _sums_of_paths(values: Tensor, plan: TreePlan) -> Tensor:
    """Sum the rows `(N, B)` of all nodes on the way from the root to each node."""
    # Each round doubles the part of a path that its sum covers: three rounds for a tree of depth 8. The root adds 0.
    above = plan.parent.clamp_min(0)
    for _ in range((len(plan.levels) - 2).bit_length() if len(plan.levels) > 1 else 0):
        values = values + values[above]
        above = above[above]
    return values
