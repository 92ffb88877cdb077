"""Which image visits which node: the ragged table that everything about a batch in a tree is read from.

A *visit* is an image at a node. With 32 leaves each of `B` images could visit 63 nodes, but a trained router sends
an image down few of them, so only the visits that happen are listed, sorted by node. Work then follows the visits.

Letters: `B` batch, `T` visits, `R` visits to routed nodes, `N` nodes, `K` leaves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from treediff.layers.grouped import Groups
from treediff.topology import TreeTopology

__all__ = ["TreePlan", "Visits", "descend"]


class TreePlan:
    """A tree, or the part of it that one traversal needs, laid out as index tables.

    A *position* is an index into `nodes`; the tables map positions to positions.

    Args:
        topology: the whole tree.
        nodes: ids to visit, closed under taking parents; all by default.
        device: where the tables live.

    Raises:
        KeyError: if a node is not in the tree.
        ValueError: if the nodes are not closed under taking parents, or there is none.

    Attributes:
        nodes: ids in level order.
        levels: positions of each depth, as ranges.
        routed: positions where a router decides, in level order.
        leaves: positions of the tree's leaves, in level order.
        rank: `(N,)` where each position stands among all nodes of the tree, in level order.
    """

    def __init__(
        self,
        topology: TreeTopology,
        nodes: Sequence[int] | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        wanted = set(topology.ids if nodes is None else nodes)
        self.topology = topology
        self.nodes = tuple(n for n in topology.ids if n in wanted)
        missing = {above for node in wanted for above in topology.path(node)} - wanted
        if missing or not wanted:
            raise ValueError(
                f"a traversal starts at the root and visits the parent of every node, found nodes {sorted(wanted)}; "
                f"add {sorted(missing or {topology.root})}"
            )
        position = {node: i for i, node in enumerate(self.nodes)}
        inside = [[position[n] for n in level if n in wanted] for level in topology.levels]
        self.levels = [range(level[0], level[-1] + 1) for level in inside if level]
        two = set(topology.routed)
        # For each position: where a left and a right turn lead; -1 is nowhere. A pass-through has only a left one.
        turns = [[-1, -1] for _ in self.nodes]
        for node, turn in zip(self.nodes, turns, strict=True):
            for side, child in enumerate(topology.children(node)):
                turn[side] = position.get(child, -1)
        self.routed = [p for p, n in enumerate(self.nodes) if n in two and max(turns[p]) >= 0]
        self.leaves = [p for p, n in enumerate(self.nodes) if not topology.children(n)]
        self.device = torch.device(device) if device is not None else torch.device("cpu")
        self._turns = turns
        self.turns = self._tensor(turns).T.contiguous()
        self.rank = self._tensor([i for i, n in enumerate(topology.ids) if n in wanted])
        self.routed_rank = self._ranks(self.routed)
        self.leaf_rank = self._ranks(self.leaves)

    @cached_property
    def leads_to(self) -> Tensor:
        """`(N, K)` whether a leaf lies at or below a position."""
        tree = self.topology
        below = [[n in tree.path(self.nodes[leaf]) for leaf in self.leaves] for n in self.nodes]
        return torch.tensor(below, device=self.device).view(len(self.nodes), len(self.leaves))

    def _tensor(self, values: Sequence[object]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def _ranks(self, positions: Sequence[int]) -> Tensor:
        """For each position its rank among `positions`; -1 for the others."""
        ranks = self._tensor([-1] * len(self.nodes))
        ranks[positions] = torch.arange(len(positions), device=self.device)
        return ranks

    def ids(self, positions: Sequence[int]) -> list[int]:
        """Node ids of some positions."""
        return [self.nodes[p] for p in positions]

    def everyone(self, positions: Sequence[int], start: int, batch: int) -> Tensor:
        """Visits to `positions` when every image visits every node: level by level, node by node, image by image."""
        first = self._tensor([p - start for p in positions])[:, None] * batch
        return (first + torch.arange(batch, device=self.device)).flatten()

    def everyone_moves(self, level: range, below: range, batch: int) -> Tensor:
        """Index into the `(2, visits)` turns of a level for each visit of the level below, all images moving."""
        source = {
            child: side * len(level) + p - level.start
            for p in level
            for side, child in enumerate(self._turns[p])
            if child >= 0
        }
        first = self._tensor([source[child] for child in below])[:, None] * batch
        return (first + torch.arange(batch, device=self.device)).flatten()


@dataclass(frozen=True)
class Visits:
    """All visits of a batch, sorted by node and, within a node, by image.

    Args:
        plan: the nodes; tables below speak in its positions.
        batch: number of images `B`.
        image: `(T,)` which image.
        node: `(T,)` at which position.
        parent: `(T,)` the visit it came from; -1 at the root.
        log_reach: `(T,)` log-probability of reaching the node, in nats.
        routed: `(R,)` the visits where a router decided.
        logits: `(R,)` what it said; positive means left.
        starts: first visit of each level, and at the end `T`.
        roulette: below this probability a visit took place by chance only, see `descend`; 0 if none did.
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
        """`(T,)` the probability of reaching the node, over that of the visit where that was left to chance.

        Sums of terms weighted by it are then right on average, and so are their gradients.
        """
        if not self.roulette:
            return self.log_reach.exp()
        return torch.exp(self.log_reach - (self.log_reach.detach() - math.log(self.roulette)).clamp_max(0))

    def groups(self) -> Groups:
        """The visits grouped by node; group = position."""
        return Groups(self.node, len(self.plan.nodes))

    def routed_groups(self) -> Groups:
        """The routed visits grouped by routed node."""
        return Groups(self.plan.routed_rank[self.node[self.routed]], len(self.plan.routed))

    def at_leaves(self) -> Tensor:
        """`(L,)` the visits at leaves of the tree."""
        if self.dense:
            return self.plan.everyone(self.plan.leaves, 0, self.batch)
        return (self.plan.leaf_rank[self.node] >= 0).nonzero().squeeze(1)

    @property
    def dense(self) -> bool:
        """Whether every image visits every node."""
        return self.starts[-1] == self.batch * len(self.plan.nodes)

    def table(self, visits: Tensor, values: Tensor, columns: Tensor, width: int, fill: float) -> Tensor:
        """Spread `values` of some visits over a `(B, width)` table; places never visited hold `fill`."""
        empty = values.new_full((self.batch, width), fill)
        return empty.index_put((self.image[visits], columns[self.node[visits]]), values)

    def along(self, leaf: Tensor) -> Visits:
        """Only the visits on each image's path to a leaf of its own; `leaf` is `(B,)`, ranks among the leaves."""
        plan = self.plan
        keep = plan.leads_to[self.node, leaf[self.image]]
        renumbered = keep.cumsum(0) - 1
        kept = keep.nonzero().squeeze(1)
        parent = self.parent[kept]
        parent = torch.where(parent < 0, parent, renumbered[parent])
        here = keep[self.routed]
        starts = [int(keep[:start].sum()) for start in self.starts]
        columns = self.image[kept], self.node[kept], parent, self.log_reach[kept]
        return Visits(
            plan, self.batch, *columns, renumbered[self.routed[here]], self.logits[here], starts, self.roulette
        )

    def turns_left(self, leaf: Tensor) -> Tensor:
        """`(R,)` whether the way from each routed visit to its image's leaf turns left."""
        left = self.plan.turns[0][self.node[self.routed]]
        # A left turn that leads out of the plan (-1) leads to no leaf.
        return self.plan.leads_to[left, leaf[self.image[self.routed]]] & (left >= 0)

    def per_image(self, values: Tensor, visits: Tensor | None = None) -> Tensor:
        """Sum the values of some visits (all, by default) over each image: to `(B,)`."""
        image = self.image if visits is None else self.image[visits]
        return values.new_zeros(self.batch).index_add(0, image, values)


def descend(
    plan: TreePlan,
    batch: int,
    route: Callable[[int, Tensor, Groups, list[int]], Tensor],
    *,
    threshold: float = 0.0,
    chance: Tensor | None = None,
    like: Tensor,
) -> Visits:
    """Send a batch down the tree, following every turn whose probability of being reached stays above `threshold`.

    Args:
        plan: the nodes to visit.
        batch: number of images.
        route: `(depth, image (R,), groups, node ids) -> logits (R,)`: what the routers of one depth say of the images
            at their nodes.
        threshold: visits reached with less probability than this are left out; 0 keeps all, and then no shape
            depends on the data.
        chance: `(B,)` uniform numbers in [0, 1): a visit reached with less probability than the threshold then takes
            place if the ratio of the two is at least the image's number, and is weighted up in return (Russian
            roulette). Without it, no gradient ever comes from what lies below the threshold, and probabilities pile up
            just above it, where they cost most.
        like: tensor whose dtype and device log-probabilities take; never less precise than float32, because many are
            added up.

    Returns:
        the visits.

    Raises:
        ValueError: if the threshold is not at least 0 and below 1.
    """
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold is a probability, at least 0 and below 1; found {threshold}")
    floor = math.log(threshold) if threshold > 0 else -math.inf
    image = torch.arange(batch, device=plan.device)
    node = torch.zeros_like(image)
    parent = torch.full_like(image, -1)
    log_reach = like.new_zeros(batch, dtype=torch.promote_types(like.dtype, torch.float32))
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = [(image, node, parent, log_reach)]
    routed_parts: list[tuple[Tensor, Tensor]] = []
    starts = [0]
    for depth, level in enumerate(plan.levels):
        deciders = [p for p in plan.routed if p in level]
        steps = _steps(plan, depth, level, deciders, image, node, log_reach, route, routed_parts, starts[-1], floor)
        if depth + 1 == len(plan.levels):
            break
        if floor == -math.inf:
            move = plan.everyone_moves(level, plan.levels[depth + 1], batch)
        else:
            child = plan.turns[:, node].flatten()
            least = floor if chance is None else floor + chance.log()[image].repeat(2)
            move = ((child >= 0) & (steps.detach() >= least)).nonzero().squeeze(1)
            move = move[child[move].argsort(stable=True)]
        starts.append(starts[-1] + len(image))
        source = move.remainder(len(image))
        node, log_reach = plan.turns[:, node].flatten()[move], steps[move]
        image, parent = image[source], source + starts[-2]
        parts.append((image, node, parent, log_reach))
    image, node, parent, log_reach = (torch.cat(column) for column in zip(*parts, strict=True))
    empty = (image[:0], log_reach[:0])
    routed, logits = (torch.cat(column) for column in zip(*(routed_parts or [empty]), strict=True))
    roulette = 0.0 if chance is None else threshold
    return Visits(plan, batch, image, node, parent, log_reach, routed, logits, [*starts, len(image)], roulette)


def _steps(
    plan: TreePlan,
    depth: int,
    level: range,
    deciders: list[int],
    image: Tensor,
    node: Tensor,
    log_reach: Tensor,
    route: Callable[[int, Tensor, Groups, list[int]], Tensor],
    routed_parts: list[tuple[Tensor, Tensor]],
    start: int,
    floor: float,
) -> Tensor:
    """Log-probability of reaching the left and the right child of every visit of a level: `(2 * visits,)`."""
    if not deciders:
        return log_reach.repeat(2)
    everywhere = len(deciders) == len(level)
    if everywhere:
        routed = torch.arange(len(image), device=image.device)
    elif floor == -math.inf:
        routed = plan.everyone(deciders, level.start, len(image) // len(level))
    else:
        routed = (plan.routed_rank[node] >= 0).nonzero().squeeze(1)
    ranks = plan.routed_rank[node if everywhere else node[routed]] - plan.routed.index(deciders[0])
    chosen = image if everywhere else image[routed]
    logits = route(depth, chosen, Groups(ranks, len(deciders)), plan.ids(deciders)).to(log_reach.dtype)
    routed_parts.append((routed + start, logits))
    turn = F.logsigmoid(torch.stack([logits, -logits]))
    if not everywhere:
        turn = log_reach.new_zeros(2, len(image)).index_copy(1, routed, turn)
    return (log_reach + turn).flatten()
