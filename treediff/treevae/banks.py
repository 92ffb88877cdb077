"""The networks of a tree of latent variables, and how they come and go as the tree grows.

Nothing here knows of probability: `TreeNetworks` holds the tree, the shared ladder and one bank of networks for each
role that a node can play, keeps them in step, and reads and writes files.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from treediff.core.checks import check_batch
from treediff.core.hub import Pretrained
from treediff.core.io import (
    described_by,
    dtype_name,
    dtype_named,
    load_into,
    read_header,
    require_config,
    require_topology,
    save_model,
)
from treediff.core.modes import lasting
from treediff.layers.grouped.bank import NodeBank
from treediff.layers.likelihood import Likelihood
from treediff.tree.plan import TreePlan
from treediff.tree.topology import TreeTopology

__all__ = ["TreeNetworks"]


class TreeNetworks(Pretrained, nn.Module):
    """A tree, and for each of its nodes the networks of the roles that the node plays.

    Every per-node part is a template of which each node gets its own copy, see `NodeBank`: all nodes have a head, all
    but the root a transition, nodes with two children two routers, and leaves a decoder.

    Args:
        topology: the tree to start with.
        encoder: observations to the features of the deepest level.
        bottom_up: blocks that lead up the ladder; `len(bottom_up)` is the greatest depth the tree may have.
        head: a node's Gaussian from features: `(B, ...)` to `(B, 2D, ...)`.
        transition: a child's prior from the parent's latent: `(B, D, ...)` to `(B, 2D, ...)`.
        posterior_router: features to the logit of going left, `(B,)`.
        prior_router: latent to the logit of going left, `(B,)`.
        decoder: a leaf's latent to the raw output that the likelihood reads.
        likelihood: how outputs and observations compare.
        latent: shape of one latent, `(D,)` or `(D, h, w)`.
        inputs: shape of one observation.
        generator: where initial weights of the node networks come from.
        device: where the node networks live; where the templates are, by default.
        dtype: what the node networks are stored as.

    Raises:
        ValueError: if the tree is deeper than the ladder, or a template keeps buffers.
    """

    def __init__(
        self,
        *,
        topology: TreeTopology,
        encoder: nn.Module,
        bottom_up: Sequence[nn.Module],
        head: nn.Module,
        transition: nn.Module,
        posterior_router: nn.Module,
        prior_router: nn.Module,
        decoder: nn.Module,
        likelihood: Likelihood,
        latent: tuple[int, ...],
        inputs: tuple[int, ...],
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(topology, TreeTopology):
            raise TypeError(
                f"topology must be a TreeTopology, found {topology!r}; TreeTopology.balanced(0) is a lone root"
            )
        self.latent = tuple(latent)
        self.inputs = tuple(inputs)
        self.encoder = encoder
        self.bottom_up = nn.ModuleList(bottom_up)
        self.heads = NodeBank(head, device=device, dtype=dtype)
        self.transitions = NodeBank(transition, device=device, dtype=dtype)
        self.posterior_routers = NodeBank(posterior_router, device=device, dtype=dtype)
        self.prior_routers = NodeBank(prior_router, device=device, dtype=dtype)
        self.decoders = NodeBank(decoder, device=device, dtype=dtype, block=512)
        self.likelihood = likelihood
        self.config: dict[str, Any] | None = None
        self._plans: dict[tuple[int, ...], TreePlan] = {}
        self.topology = topology
        self._require_depth(topology)
        self._grow_banks(generator)

    # --- the tree changes ---------------------------------------------------------------------------------

    def split(
        self, leaf: int, *, warm_start: bool = False, generator: torch.Generator | None = None
    ) -> tuple[int, int]:
        """Turn a leaf into a parent of two new leaves, whose ids are returned.

        The leaf's decoder goes; with `warm_start` the children begin with copies of it and of the leaf's head, else
        with fresh weights. Transitions and routers are always fresh. No other node is touched.

        Raises:
            KeyError: if there is no such node.
            ValueError: if it is not a leaf, or lies at the greatest depth.
        """
        topology = self.topology.split(leaf)
        self._require_depth(topology)
        children = topology.children(leaf)
        self.topology = topology
        for child in children:
            self.heads.add(child, like=leaf if warm_start else None, generator=generator)
            self.decoders.add(child, like=leaf if warm_start else None, generator=generator)
            self.transitions.add(child, generator=generator)
        self._grow_banks(generator)
        left, right = children
        return left, right

    def prune(self, leaf: int) -> None:
        """Remove a leaf, and ancestors left without children; a parent with one child left decides nothing any more.

        Probability that went to the leaf goes to its sibling.

        Raises:
            KeyError: if there is no such node.
            ValueError: if it is not a leaf, or the only one.
        """
        self.topology = self.topology.prune(leaf)
        self._grow_banks(None)

    def become(self, topology: TreeTopology) -> None:
        """Take on another tree, such as that of weights to be loaded; nodes that are new have weights of no meaning.

        Raises:
            ValueError: if it is deeper than the ladder.
        """
        self._require_depth(topology)
        self.topology = topology
        self._grow_banks(torch.Generator(self.device).manual_seed(0))

    def _grow_banks(self, generator: torch.Generator | None) -> None:
        """Give each bank exactly the nodes that the tree asks of it."""
        tree = self.topology
        for bank, nodes in (
            (self.heads, tree.ids),
            (self.transitions, tree.ids[1:]),
            (self.posterior_routers, tree.routed),
            (self.prior_routers, tree.routed),
            (self.decoders, tree.leaves),
        ):
            for node in set(bank.nodes) - set(nodes):
                bank.remove(node)
            for node in nodes:
                if node not in bank.nodes:
                    bank.add(node, generator=generator)
        self._plans.clear()

    def plan(self, nodes: Sequence[int] | None, device: torch.device) -> TreePlan:
        """The layout of a traversal of `nodes`, kept until the tree changes."""
        key = self.topology.ids if nodes is None else tuple(nodes)
        found = self._plans.get(key)
        if found is None or found.device != device:
            found = self._plans[key] = TreePlan(self.topology, nodes, device=device)
        return found

    # --- files --------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights, tree and configuration to one safetensors file; see `treediff.core.io`."""
        save_model(self, path, self.header())

    def header(self) -> dict[str, Any]:
        """What a file says of the model besides its weights."""
        topology = json.loads(self.topology.to_json())
        return {"config": self.config, "topology": topology, "dtype": dtype_name(self.dtype)}

    @classmethod
    @lasting()
    def load(cls, path: str | os.PathLike[str], *, model: Self | None = None) -> Self:
        """Read what `save` wrote; every tensor is bit-equal.

        Args:
            path: the file.
            model: a model to fill, for one built from parts of your own; its tree is replaced by the file's. It stays
                as it was if the file does not fit.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is damaged, foreign, of another version, or does not fit; or if it was saved from a
                model built from parts and none is given.
        """
        header = read_header(path, cls.__name__)
        if model is None:
            model = cls.from_header(header, path)
        else:
            topology = require_topology(header, path)
            trial = copy.deepcopy(model)
            trial.become(topology)
            load_into(trial, path)
            model.become(topology)
        load_into(model, path)
        return model

    @classmethod
    def from_header(cls, header: Mapping[str, Any], path: str | os.PathLike[str]) -> Self:
        """The model that a file's header describes, without its weights; the path is for messages.

        Raises:
            ValueError: if it was built from parts, which no header describes, or the header is damaged.
        """
        config = require_config(header, path)
        topology, dtype = require_topology(header, path), dtype_named(header.get("dtype"), path)
        with described_by(path, config):
            model = cls.from_config(config).to(dtype)
            model.become(topology)
        return model

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The untrained model that `config` describes; for subclasses that set one."""
        raise ValueError(f"{cls.__name__} keeps no configuration; build the model and pass it as model=")

    # --- checks -------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are stored as."""
        return next(self.parameters()).dtype

    def extra_repr(self) -> str:
        """The tree and the shapes."""
        return f"topology={self.topology}, inputs={self.inputs}, latent={self.latent}"

    def _leaf_ranks(self, leaf: Tensor, batch: int, leaves: Sequence[int]) -> Tensor:
        """Node ids of leaves, one per image, to their ranks among the `leaves` that a traversal reaches."""
        if leaf.is_floating_point() or leaf.is_complex() or leaf.dtype == torch.bool:
            raise TypeError(f"leaf must hold node ids, which are integers, found {leaf.dtype}")
        if leaf.shape != (batch,):
            raise ValueError(f"leaf must be one id for each of the {batch} images, found shape {tuple(leaf.shape)}")
        if not leaves:
            raise ValueError("the nodes to visit hold no leaf, so no path can end at one; add leaves to nodes")
        matches = leaf[:, None] == torch.tensor(leaves, dtype=torch.int64, device=leaf.device)
        if not bool(matches.any(1).all()):
            wrong = leaf[~matches.any(1)][0].item()
            among = "of the tree" if len(leaves) == len(self.topology.leaves) else "among the nodes to visit"
            raise KeyError(f"node {wrong} is not a leaf {among}; the leaves are {list(leaves)}")
        return matches.to(torch.int64).argmax(1)

    def _require_depth(self, topology: TreeTopology) -> None:
        if topology.max_depth > len(self.bottom_up):
            raise ValueError(
                f"a tree of depth {topology.max_depth} needs as many bottom-up blocks, this model has "
                f"{len(self.bottom_up)}; build it with a greater max_depth"
            )

    def check(self, x: Tensor) -> None:
        """Raise unless `x` suits the model; values are looked at on a CPU only.

        Raises:
            TypeError: if `x` is no tensor, not floating point, or of another dtype than the weights (which autocast
                allows).
            ValueError: if it has another shape, is not finite, or leaves the range of the data.
        """
        check_batch(x, self.inputs, self.dtype, self.likelihood.data_range, "observations")
