"""Probabilities of leaves for all rows, kept from one split to the next."""

from __future__ import annotations

import torch
from torch import Tensor

from treediff.core.distributed import ALONE, World
from treediff.core.io import digest_of
from treediff.core.modes import evaluating
from treediff.core.rows import Rows
from treediff.tree.topology import TreeTopology
from treediff.treevae.model import TreeVAE
from treediff.treevae.posterior import leaf_log_probs_of

__all__ = ["LeafProbabilities"]

# Rows that reach a leaf with less probability are not read when the leaf is split; they go to both sides alike.
_FAINT = 1e-4


class LeafProbabilities:
    """`P(leaf | x)` of all rows of a data set, which is computed again only where the model has changed.

    A split changes the column of one leaf, and only rows that reach this leaf are read again. Growth to many leaves
    then reads each row about as often as its leaf is deep. Pruning gives the probability of a leaf to its sibling, and
    reads only rows that hardly reach the sibling. Once weights of the encoder, the ladder or an older router
    have changed, all rows are read.

    Args:
        model: the model, which may grow.
        batch_size: rows in a batch.
        world: the processes that share the rows.

    Examples:
        >>> model = TreeVAE.for_vectors(features=4, generator=torch.Generator().manual_seed(0))
        >>> probs, data = LeafProbabilities(model), Rows(torch.rand(20, 4))
        >>> probs(data).shape, model.split(0), probs(data).shape
        (torch.Size([20, 1]), (1, 2), torch.Size([20, 2]))
    """

    def __init__(self, model: TreeVAE, batch_size: int = 1024, world: World = ALONE) -> None:
        self.model, self.batch_size, self.world = model, batch_size, world
        self._tree, self._columns = model.topology, dict[int, Tensor]()
        self._data: object = None
        self._shared, self._routers = "", dict[int, str]()

    def __call__(self, data: Rows) -> Tensor:
        """Return the probabilities `(n, K)`, on the CPU, in the order of the topology's leaves."""
        tree, shared, routers = self.model.topology, *self._digests()
        if not self._follows(data, tree, shared, routers):
            table = self._of(data, torch.arange(len(data)))
            self._columns = dict(zip(tree.leaves, table.unbind(1), strict=True))
        else:
            gone = sorted(set(self._tree.leaves) - set(tree.ids), key=self._tree.depth, reverse=True)
            for leaf in gone:
                self._prune(data, leaf)
            for leaf in set(self._columns) - set(tree.leaves):
                self._split(data, leaf)
        self._data, self._tree, self._shared, self._routers = data, tree, shared, routers
        return torch.stack([self._columns[leaf] for leaf in tree.leaves], 1)

    def reach(self, data: Rows, *nodes: int) -> Tensor:
        """Return `P(node | x)` of every row and some nodes, `(n, nodes)`; raise KeyError if there is no such node."""
        tree = self.model.topology
        columns = [[tree.leaves.index(leaf) for leaf in tree.leaves_under(node)] for node in nodes]
        probs = self(data)
        return torch.stack([probs[:, below].sum(1) for below in columns], 1)

    def _digests(self) -> tuple[str, dict[int, str]]:
        """Return digests of the weights that all rows pass, and of those of each router."""
        # An optimiser may write weights without a trace in their version counter, so the bytes themselves are compared.
        model, bank = self.model, self.model.banks.posterior_routers
        shared = model.encoder.state_dict(prefix="encoder.") | model.bottom_up.state_dict(prefix="ladder.")
        return digest_of(shared), {node: digest_of({"": bank.weights_of(node)}) for node in model.topology.routed}

    def _follows(self, data: object, tree: TreeTopology, shared: str, routers: dict[int, str]) -> bool:
        """Return whether nothing has changed since the last call but that leaves were split, or pruned."""
        if data is not self._data or shared != self._shared or not self._columns:
            return False
        if any(routers.get(node, digest) != digest for node, digest in self._routers.items()):
            return False
        old = set(self._tree.leaves)
        return old <= set(tree.ids) or set(tree.leaves) <= old

    def _split(self, data: Rows, leaf: int) -> None:
        """Replace the column of a leaf that was split by the columns of the leaves below."""
        whole, below = self._columns.pop(leaf), self.model.topology.leaves_under(leaf)
        self._columns |= dict.fromkeys(below, whole / len(below))
        self._read(data, leaf, whole >= _FAINT)

    def _prune(self, data: Rows, leaf: int) -> None:
        """Give the column of a leaf that was pruned to the leaves that are left beside it."""
        lost = self._columns.pop(leaf)
        node = next(node for node in reversed(self._tree.path(leaf)) if node in self.model.topology)
        below = [other for other in self.model.topology.leaves_under(node) if other in self._columns]
        kept = torch.stack([self._columns[other] for other in below]).sum(0)
        whole, scale = kept + lost, 1 + lost / kept.clamp_min(torch.finfo(kept.dtype).tiny)
        for other in below:
            self._columns[other] = whole if len(below) == 1 else self._columns[other] * scale
        if len(below) > 1:
            self._read(data, node, (kept < _FAINT) & (whole >= _FAINT))

    def _read(self, data: Rows, node: int, where: Tensor) -> None:
        """Compute the columns of all leaves below a node again, for some rows."""
        tree, rows = self.model.topology, where.nonzero().squeeze(1)
        if not len(rows):
            return
        path, below = set(tree.path(node)), tree.leaves_under(node)
        table = self._of(data, rows, tuple(n for n in tree.ids if n in path or node in tree.path(n)))
        for leaf, column in zip(below, table.unbind(1), strict=True):
            self._columns[leaf] = self._columns[leaf].index_copy(0, rows, column)

    @torch.no_grad()
    def _of(self, data: Rows, rows: Tensor, nodes: tuple[int, ...] | None = None) -> Tensor:
        """Return the probabilities `(B, K)` of the leaves among some nodes, for some rows."""

        def probs(picked: Tensor) -> Tensor:
            x = data[picked].to(self.model.device)
            self.model.check(x)
            return leaf_log_probs_of(self.model.route(self.model.features(x), nodes=nodes)).exp().cpu()

        with evaluating(self.model):
            return torch.cat(self.world.map(probs, rows.split(self.batch_size)))
