"""Networks of a tree's nodes: one bank for each role that a node can have, in step with the tree.

This module holds no probabilities, and no networks that all nodes share, such as the encoder.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from treediff.core.groups import Groups
from treediff.core.noise import combine_seeds
from treediff.layers.grouped.bank import NodeBank
from treediff.layers.init import initialize
from treediff.tree.plan import TreePlan
from treediff.tree.topology import TreeTopology

__all__ = ["NodeBanks", "by_node", "fresh"]


class NodeBanks(nn.Module):
    """Banks of networks for a tree: for each node the networks of the roles that the node has.

    Every network is given as a template of which each node gets its own copy, see `NodeBank`. All nodes have a head,
    all but the root a transition, nodes with two children two routers, and leaves a decoder.

    Args:
        topology: the tree to start with.
        head: a node's Gaussian from features: `(B, ...)` to `(B, 2D, ...)`.
        transition: a child's prior from the parent's latent: `(B, D, ...)` to `(B, 2D, ...)`.
        posterior_router: features to the logit of going left, `(B,)`.
        prior_router: latent to the logit of going left, `(B,)`.
        decoder: a leaf's latent to the raw output that the likelihood reads.
        generator: source of the initial weights; if not given, the seed follows from the tree.
        device: of the networks; by default the device of the templates.
        dtype: of the weights.

    Raises:
        TypeError: if `topology` is no TreeTopology, or a template has a layer without a way to draw fresh weights, see
            `initialize`.
        ValueError: if a template has buffers.

    Examples:
        >>> networks = {"head": nn.Linear(4, 4), "transition": nn.Linear(2, 4), "decoder": nn.Linear(2, 3)}
        >>> routers = {"posterior_router": nn.Linear(4, 1), "prior_router": nn.Linear(2, 1)}
        >>> banks = NodeBanks(TreeTopology.balanced(1), **networks, **routers)
        >>> banks.split(1), banks.decoders.nodes
        ((3, 4), (2, 3, 4))
    """

    def __init__(
        self,
        topology: TreeTopology,
        *,
        head: nn.Module,
        transition: nn.Module,
        posterior_router: nn.Module,
        prior_router: nn.Module,
        decoder: nn.Module,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(topology, TreeTopology):
            raise TypeError(
                f"topology must be a TreeTopology, found {topology!r}; TreeTopology.balanced(0) is a single root"
            )
        self.heads = NodeBank(head, device=device, dtype=dtype)
        self.transitions = NodeBank(transition, device=device, dtype=dtype)
        self.posterior_routers = NodeBank(posterior_router, device=device, dtype=dtype)
        self.prior_routers = NodeBank(prior_router, device=device, dtype=dtype)
        self.decoders = NodeBank(decoder, device=device, dtype=dtype, block=512)
        self._plans: dict[tuple[int, ...], TreePlan] = {}
        self.become(topology, generator=generator)
        for bank in (self.transitions, self.posterior_routers, self.prior_routers, self.decoders):
            if not bank.nodes:
                fresh(bank)  # else a split would be the first to fail

    def extra_repr(self) -> str:
        """Return the tree, for `print(banks)`."""
        return f"topology={self.topology}"

    def split(
        self, leaf: int, *, warm_start: bool = False, generator: torch.Generator | None = None
    ) -> tuple[int, int]:
        """Turn a leaf into a parent of two new leaves and return their ids; see `TreeVAE.split`."""
        leaf, topology = self.topology.node(leaf), self.topology.split(leaf)
        left, right = topology.children(leaf)
        generator = self._seeded(topology) if generator is None else generator
        for child in (left, right):
            self.heads.add(child, like=leaf if warm_start else None, generator=generator)
            self.decoders.add(child, like=leaf if warm_start else None, generator=generator)
            self.transitions.add(child, generator=generator)
        self.become(topology, generator=generator)
        return left, right

    def become(self, topology: TreeTopology, *, generator: torch.Generator | None = None) -> None:
        """Give each bank exactly the nodes of another tree; nodes that both trees have keep their weights.

        Args:
            topology: the tree.
            generator: source of the weights of new nodes; if not given, the seed follows from the tree.
        """
        self.topology = topology
        generator = self._seeded(topology) if generator is None else generator
        for bank, nodes in (
            (self.heads, topology.ids),
            (self.transitions, topology.ids[1:]),
            (self.posterior_routers, topology.routed),
            (self.prior_routers, topology.routed),
            (self.decoders, topology.leaves),
        ):
            for node in set(bank.nodes) - set(nodes):
                bank.remove(node)
            for node in nodes:
                if node not in bank.nodes:
                    bank.add(node, generator=generator)
        self._plans.clear()

    def _seeded(self, topology: TreeTopology) -> torch.Generator:
        """Return a generator for the weights of new nodes; other nodes give another seed."""
        return torch.Generator(self.heads.device).manual_seed(combine_seeds(*topology.ids))

    def plan(self, nodes: Sequence[int] | None, device: torch.device) -> TreePlan:
        """Return the index tables of a traversal of `nodes`, kept until the tree changes; all nodes for None."""
        key = self.topology.ids if nodes is None else tuple(nodes)
        found = self._plans.get(key)
        if found is None or found.device != device:
            found = self._plans[key] = TreePlan(self.topology, nodes, device=device)
        return found


def fresh(bank: NodeBank) -> nn.Module:
    """Return a network like those of a bank, with fresh weights from a fixed seed.

    Raises:
        TypeError: if the template has a layer without a way to draw fresh weights, see `initialize`.
    """
    network = copy.deepcopy(bank.template).to_empty(device=bank.device)
    initialize(network, generator=torch.Generator(bank.device).manual_seed(0))
    return network


def by_node(bank: NodeBank, x: Tensor, rank: Tensor, nodes: Sequence[int]) -> Tensor:
    """Run each row through the network of its node, for rows in any order.

    Args:
        bank: the networks.
        x: `(T, ...)` rows.
        rank: `(T,)` the index of each row's node in `nodes`.
        nodes: ids.
    """
    order = rank.argsort(stable=True)
    y = bank(x[order], Groups(rank[order], len(nodes)), list(nodes))
    return y[order.argsort()]
