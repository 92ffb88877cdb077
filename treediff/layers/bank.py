"""One network per node: stored by node, computed together.

Letters: `T` rows, `G` groups (the nodes asked for), `P` numbers in one node's weights.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from treediff.layers.grouped import Groups, grouped_call
from treediff.layers.init import initialize

__all__ = ["NodeBank"]

# Every weight starts on a multiple of this, so that views into packed weights stay aligned for grouped products.
_ALIGNMENT = 8


class NodeBank(nn.Module):
    """Copies of a template network, one per node id, each stored as one flat parameter named by the id.

    The parameter of a node is the only truth about it: freezing a node is `requires_grad`, adding a node touches
    no other, and a file lists weights by stable id. `forward` stacks the nodes asked for and computes all their
    rows in one `grouped_call`.

    Args:
        template: the network that every node gets a copy of; it maps `(rows, ...)` to `(rows, ...)`, row by row.
            Its own weights are not used, so it may live on the meta device.
        device: where weights of new nodes live; the template's, unless that is meta.
        dtype: what they are stored as.

    Raises:
        ValueError: if the template has buffers, such as the running statistics of a batch norm, which would
            couple the rows of a batch.

    Examples:
        >>> bank = NodeBank(nn.Linear(4, 2))
        >>> bank.add(0), bank.add(7)
        (None, None)
        >>> rows = torch.ones(3, 4)
        >>> bank(rows, Groups(torch.tensor([0, 0, 1]), count=2), nodes=[0, 7]).shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        template: nn.Module,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        names = [name for name, _ in template.named_buffers()]
        if names:
            raise ValueError(
                f"a per-node network must not keep buffers, found {names}; use LayerNorm or GroupNorm in place "
                "of a norm over the batch"
            )
        parameters = dict(template.named_parameters())
        reference = next((p for p in parameters.values() if not p.is_meta), torch.empty(0, dtype=dtype))
        self._factory: dict[str, Any] = {"device": device or reference.device, "dtype": dtype or reference.dtype}
        self._shapes = {name: p.shape for name, p in parameters.items()}
        self._sizes = [p.numel() + -p.numel() % _ALIGNMENT for p in parameters.values()]
        # In a tuple, so that the template's own weights are not registered as this module's.
        self._template = (template.to("meta"),)
        self._packed: tuple[tuple[int, ...], tuple[int, ...], Tensor] | None = None

    @property
    def template(self) -> nn.Module:
        """The structure of one node's network, without weights."""
        return self._template[0]

    @property
    def nodes(self) -> tuple[int, ...]:
        """Ids of the nodes that have weights here, in the order in which they were added."""
        return tuple(int(name) for name in self._parameters)

    def extra_repr(self) -> str:
        """Nodes and numbers per node; then the template."""
        return f"nodes={list(self.nodes)}, parameters_per_node={sum(self._sizes)},\ntemplate={self.template}"

    # --- nodes come and go --------------------------------------------------------------------------------

    def add(
        self, node: int, *, like: int | None = None, generator: torch.Generator | None = None
    ) -> None:
        """Give `node` weights of its own: fresh ones, or a copy of those of the node `like`.

        Raises:
            ValueError: if the node has weights already.
            KeyError: if there is no node `like`.
        """
        if str(node) in self._parameters:
            raise ValueError(f"node {node} has weights already; remove it first to start afresh")
        flat = self._fresh(generator) if like is None else self.weights_of(like).detach().clone()
        self.register_parameter(str(node), nn.Parameter(flat))

    def remove(self, node: int) -> None:
        """Drop the weights of `node`. Raises KeyError if it has none."""
        self.weights_of(node)
        delattr(self, str(node))
        self._packed = None

    def weights_of(self, node: int) -> nn.Parameter:
        """The flat parameter `(P,)` of one node. Raises KeyError if it has none."""
        found = self._parameters.get(str(node))
        if found is None:
            raise KeyError(f"node {node!r} has no weights here; those that have are {list(self.nodes)}")
        return found

    def named_weights(self, node: int) -> dict[str, Tensor]:
        """One node's weights as views by the template's names; writing into them changes the node."""
        return {name: w[0] for name, w in self._views(self.weights_of(node)[None]).items()}

    def module(self, node: int) -> nn.Module:
        """The network of one node as a module of its own; a copy, which `assign` writes back."""
        module = copy.deepcopy(self.template).to_empty(device=self._factory["device"])
        module.load_state_dict(self.named_weights(node))
        return module

    @torch.no_grad()
    def assign(self, node: int, module: nn.Module) -> None:
        """Overwrite one node's weights with those of a module built like the template."""
        views = self.named_weights(node)
        for name, parameter in module.named_parameters():
            views[name].copy_(parameter)

    def _fresh(self, generator: torch.Generator | None) -> Tensor:
        module = copy.deepcopy(self.template).to_empty(device=self._factory["device"])
        initialize(module, generator=generator)
        flat = torch.zeros(sum(self._sizes), **self._factory)
        views = self._views(flat[None])
        for name, parameter in module.named_parameters():
            views[name][0].copy_(parameter.detach())
        return flat

    # --- computing ----------------------------------------------------------------------------------------

    def forward(self, x: Tensor, groups: Groups, nodes: Sequence[int]) -> Tensor:
        """Apply to each row the network of its node.

        Args:
            x: `(T, ...)`, rows sorted by group.
            groups: the groups of the rows; group `g` is `nodes[g]`.
            nodes: ids, one per group.

        Returns:
            `(T, ...)`.
        """
        return grouped_call(self.template, self._views(self.packed(nodes)), x, groups)

    def packed(self, nodes: Sequence[int]) -> Tensor:
        """The flat weights of several nodes, stacked: `(G, P)`. Kept between calls in eval mode without gradients."""
        weights = [self.weights_of(node) for node in nodes]
        if self.training or torch.is_grad_enabled():
            self._packed = None
            return torch.stack(weights)
        # Every in-place change of a tensor raises its version, so a stale copy is never used.
        key = tuple(nodes), tuple(w._version for w in weights)
        if self._packed is None or self._packed[:2] != key or self._packed[2].device != weights[0].device:
            self._packed = (*key, torch.stack(weights))
        return self._packed[2]

    def _views(self, flat: Tensor) -> dict[str, Tensor]:
        pieces = flat.split(self._sizes, dim=1)
        return {
            name: piece[:, : math.prod(shape)].view(len(flat), *shape)
            if math.prod(shape) != piece.shape[1]
            else piece.view(len(flat), *shape)
            for (name, shape), piece in zip(self._shapes.items(), pieces, strict=True)
        }

    def _apply(self, fn: object, recurse: bool = True) -> NodeBank:
        self._packed = None
        super()._apply(fn, recurse)  # type: ignore[arg-type, no-untyped-call]
        for parameter in self._parameters.values():
            if parameter is not None:
                self._factory = {"device": parameter.device, "dtype": parameter.dtype}
        return self
