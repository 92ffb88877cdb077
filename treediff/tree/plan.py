"""Plans of traversals: index tables of all or some nodes of a tree.

Letters: `B` batch, `N` nodes, `I` nodes with two children, `K` leaves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from treediff.tree.topology import TreeTopology

__all__ = ["TreePlan"]

# Levels whose routers run together in the search for visits. Bands need a third as many synchronisations to find the
# visits, for a few superfluous rows.
_BAND = 3


class Band(NamedTuple):
    """Band of consecutive levels of a tree.

    Attributes:
        ids: ids of the deciding nodes in the band.
        first: rank of the first of these nodes among all deciding nodes.
        above: for each of these nodes, the index of its ancestor in the band's first level within that level.
        steps: pairs of each level of the band and the level below.
    """

    ids: list[int]
    first: int
    above: Tensor
    steps: list[tuple[range, range]]


class TreePlan:
    """Plan of a traversal: a tree, or the part that the traversal needs, as index tables.

    A *position* is an index into `nodes`; the tables map positions to positions.

    Args:
        topology: the whole tree.
        nodes: ids to visit, closed under taking parents; all by default.
        device: of the tables.

    Raises:
        KeyError: if a node is not in the tree.
        ValueError: if the nodes are not closed under taking parents, or there are no nodes.

    Attributes:
        nodes: ids in level order.
        levels: positions of each depth, as ranges.
        routed: positions where a router decides, in level order.
        leaves: positions of the tree's leaves, in level order.
        rank: `(N,)` rank of each position among all nodes of the tree, in level order.
        positions: `(I,)` the same as `routed`, as a tensor.
        depth: `(N,)` steps from the root.
        parent: `(N,)` the position above; -1 at the root.
        side: `(N, 1)` 1 after a left turn and at the root, -1 after a right turn.
        decider: `(N,)` rank among `routed` of the node above; -1 if that node does not decide.
        bands: the levels in bands of a few levels.
        turns: `(2, N)` positions after a left and a right turn; -1 if there is no such position.
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
        # A pass-through has only a left turn, whatever the side of its child.
        turns = [[-1, -1] for _ in self.nodes]
        for node, turn in zip(self.nodes, turns, strict=True):
            for side, child in enumerate(topology.children(node)):
                turn[side] = position.get(child, -1)
        self.routed = [p for p, n in enumerate(self.nodes) if n in two and max(turns[p]) >= 0]
        self.leaves = [p for p, n in enumerate(self.nodes) if not topology.children(n)]
        self.device = torch.device(device) if device is not None else torch.device("cpu")
        # All tables are kept, and a tensor made in inference mode can never be used in training afterwards.
        with torch.inference_mode(False):
            self.turns = self._tensor(turns).T.contiguous()
            self.rank = self._tensor([i for i, n in enumerate(topology.ids) if n in wanted])
            self.positions = self._tensor(self.routed)
            self.depth = self._tensor([depth for depth, level in enumerate(self.levels) for _ in level])
            self.routed_rank = self._ranks(self.routed)
            routed_rank = self.routed_rank.tolist()
            self.leaf_rank = self._ranks(self.leaves)
            right = {turn[1] for turn in turns}
            self.side = torch.tensor(
                [[-1.0 if p in right else 1.0] for p in range(len(self.nodes))], device=self.device
            )
            above = {child: p for p, turn in enumerate(turns) for child in turn if child >= 0}
            self.parent = self._tensor([above.get(p, -1) for p in range(len(self.nodes))])
            self.bands = [self._band(top, above) for top in range(0, len(self.levels) - 1, _BAND)]
            self.decider = self._tensor([routed_rank[above[p]] if p in above else -1 for p in range(len(self.nodes))])

    def _band(self, top: int, parents: Mapping[int, int]) -> Band:
        start, steps = self.levels[top].start, list(pairwise(self.levels[top : top + _BAND + 1]))
        deciders = [p for p in self.routed if start <= p < steps[-1][1].start]
        above = list(deciders)
        while max(above, default=0) >= steps[0][1].start:
            above = [p if p < steps[0][1].start else parents[p] for p in above]
        first = self.routed.index(deciders[0]) if deciders else 0
        return Band(self.ids(deciders), first, self._tensor([p - start for p in above]), steps)

    @cached_property
    def leads_to(self) -> Tensor:
        """`(N, K)` booleans: True where the leaf is at or below the position."""
        tree = self.topology
        below = [[n in tree.path(self.nodes[leaf]) for leaf in self.leaves] for n in self.nodes]
        with torch.inference_mode(False):
            return torch.tensor(below, device=self.device).view(len(self.nodes), len(self.leaves))

    def along(self, values: Tensor) -> Tensor:
        """Return values of all nodes `(N, B, ...)` along the path to each leaf: `(B, K, S + 1, ...)`, 0 past it."""
        paths = [self.topology.path(self.nodes[leaf]) for leaf in self.leaves]
        steps = self._tensor([[*map(self.nodes.index, path), *[-1] * (len(self.levels) - len(path))] for path in paths])
        there = (steps >= 0).view(*steps.shape, *[1] * (values.ndim - 1))
        return torch.where(there, values[steps], 0).movedim(2, 0)

    def _tensor(self, values: Sequence[object]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def _ranks(self, positions: Sequence[int]) -> Tensor:
        """Return for each position its rank among `positions`, and -1 for all other positions."""
        ranks = self._tensor([-1] * len(self.nodes))
        ranks[positions] = torch.arange(len(positions), device=self.device)
        return ranks

    def ids(self, positions: Sequence[int]) -> list[int]:
        """Return the node ids of some positions."""
        return [self.nodes[p] for p in positions]

    def leaf_ranks(self, leaf: Tensor, batch: int) -> Tensor:
        """Return the rank of each image's leaf among the leaves that the traversal reaches, `(B,)`.

        Args:
            leaf: `(B,)` node ids.
            batch: number of images.

        Raises:
            KeyError: if an id is not the id of a leaf to visit.
            TypeError: if ids are not integers.
            ValueError: if there is not one id for each image, or no leaf to visit.
        """
        if leaf.is_floating_point() or leaf.is_complex() or leaf.dtype == torch.bool:
            raise TypeError(f"leaf must hold node ids, which are integers, found {leaf.dtype}")
        if leaf.shape != (batch,):
            raise ValueError(f"leaf must be one id for each of the {batch} images, found shape {tuple(leaf.shape)}")
        leaves = self.ids(self.leaves)
        if not leaves:
            raise ValueError("the nodes to visit hold no leaf, so no path can end at one; add leaves to nodes")
        matches = leaf[:, None] == torch.tensor(leaves, dtype=torch.int64, device=leaf.device)
        if not bool(matches.any(1).all()):
            wrong = leaf[~matches.any(1)][0].item()
            among = "of the tree" if len(leaves) == len(self.topology.leaves) else "among the nodes to visit"
            raise KeyError(f"node {wrong} is not a leaf {among}; the leaves are {leaves}")
        return matches.to(torch.int64).argmax(1)

    def everyone(self, positions: Sequence[int], batch: int) -> Tensor:
        """Return the visits to `positions` if every image visits every node: node by node, image by image."""
        return (self._tensor(positions)[:, None] * batch + torch.arange(batch, device=self.device)).flatten()

    def ladder_rows(self, image: Tensor, node: Tensor, batch: int) -> Tensor:
        """Return the rows of some images at some nodes in a table per depth and image, `(depths, B, ...)` flattened."""
        return self.depth[node] * batch + image
