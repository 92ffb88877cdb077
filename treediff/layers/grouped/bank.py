"""Bank of networks, one per node: stored by node, computed together.

Letters: `T` rows, `G` groups (the queried nodes), `P` numbers in one node's weights.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from treediff.core.groups import Groups, check_rows
from treediff.core.modes import lasting
from treediff.layers.grouped.call import apply_layers, layers_of
from treediff.layers.init import initialize

__all__ = ["NodeBank"]

# Every weight starts on a multiple of this, so that views into packed weights stay aligned for grouped
# matmuls.
_ALIGNMENT = 8
_PATIENCE, _COMPARED = 50, 64  # gradients until a warning, and dimensions that are compared before


class NodeBank(nn.Module):
    """Bank of copies of a template network, one per node id, each stored as one flat parameter named by the id.

    The parameter of a node is the only place of its weights. So `requires_grad` freezes a node, adding a node
    changes no other node, and a file lists weights by permanent id. `forward` stacks the queried nodes and computes
    all their rows in one `grouped_call`.

    Args:
        template: the network that every node gets a copy of; the network maps `(rows, ...)` to `(rows, ...)`, row
            by row. The template is copied without its weights, so it may be on the meta device.
        device: of the weights of new nodes; the template's device by default, unless that is meta.
        dtype: of the weights; the template's dtype by default.
        block: on a CPU, the approximate number of rows to compute at a time. It is for networks whose activations are
            many times their input: activations that do not fit into a cache take longer. All rows at once if not given.

    Raises:
        ValueError: if the template has buffers, such as the running statistics of a batch norm, which would
            couple the rows of a batch; or if the template uses one weight in two places.

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
        block: int | None = None,
    ) -> None:
        super().__init__()
        self.block = block
        names = [name for name, _ in template.named_buffers()]
        if names:
            raise ValueError(
                f"a per-node network must not keep buffers, found {names}; use LayerNorm or GroupNorm in "
                "place of a norm over the batch"
            )
        parameters = dict(template.named_parameters(remove_duplicate=False))
        shared = sorted(parameters.keys() - dict(template.named_parameters()).keys())
        if shared:
            raise ValueError(
                f"a per-node network must not use one weight in two places, found {shared} used before under "
                "another name; give each layer its own"
            )
        found = next((p for p in parameters.values() if not p.is_meta), torch.empty(0))
        stored = dtype or next((p.dtype for p in parameters.values()), found.dtype)
        self._factory: dict[str, Any] = {"device": torch.device(device or found.device), "dtype": stored}
        self._names = tuple(parameters)
        # Shape of each weight, and its padded length.
        self._sizes = [(p.shape, p.numel() + -p.numel() % _ALIGNMENT) for p in parameters.values()]
        # In a tuple, so that the template's own weights are not registered as this module's.
        self._template = (copy.deepcopy(template).to("meta", stored).train(),)
        self._layers = layers_of(self.template)

    @property
    def template(self) -> nn.Module:
        """Structure of one node's network, without weights."""
        return self._template[0]

    @property
    def device(self) -> torch.device:
        """Device of the weights of new nodes."""
        return torch.device(self._factory["device"])

    @property
    def nodes(self) -> tuple[int, ...]:
        """Ids of the nodes that have weights here, in the order in which the nodes were added."""
        return tuple(int(name) for name in self._parameters)

    def extra_repr(self) -> str:
        """Return the nodes, the numbers per node, and the template, for `print(bank)`."""
        size = sum(shape.numel() for shape, _ in self._sizes)
        return f"nodes={list(self.nodes)}, parameters_per_node={size},\ntemplate={self.template}"

    def train(self, mode: bool = True) -> NodeBank:
        """Set the mode as for any module, also of the template, which may contain a dropout."""
        self.template.train(mode)
        return super().train(mode)

    # --- nodes are added and removed ----------------------------------------------------------------------

    @lasting()
    def add(self, node: int, *, like: int | None = None, generator: torch.Generator | None = None) -> None:
        """Give `node` weights of its own: fresh weights, or a copy of the weights of the node `like`.

        Raises:
            ValueError: if the node has weights already.
            KeyError: if there is no node `like`.
            TypeError: if the template has a layer without a way to draw fresh weights, see `initialize`.
        """
        if str(node) in self._parameters:
            raise ValueError(f"node {node} has weights already; remove it first to start afresh")
        flat = self._fresh(generator) if like is None else self.weights_of(like).detach().clone()
        weights = nn.Parameter(flat)
        if self._parameters:  # else the model is being built
            _watch(weights, node)
        self.register_parameter(str(node), weights)

    def remove(self, node: int) -> None:
        """Delete the weights of `node`.

        Raises:
            KeyError: if the node has no weights.
        """
        self.weights_of(node)
        delattr(self, str(node))

    def weights_of(self, node: int) -> nn.Parameter:
        """Return the flat parameter `(P,)` of one node.

        Raises:
            KeyError: if the node has no weights.
        """
        found = self._parameters.get(str(node))
        if found is None:
            raise KeyError(f"node {node!r} has no weights here; the nodes with weights are {list(self.nodes)}")
        return found

    def named_weights(self, node: int) -> dict[str, Tensor]:
        """Return one node's weights as views by the template's names; writing into the views changes the node.

        Raises:
            KeyError: if the node has no weights.
        """
        return {name: w[0] for name, w in self._views(self.weights_of(node)[None]).items()}

    @lasting()
    def module(self, node: int) -> nn.Module:
        """Return the network of one node as a separate module: a copy, which `assign` writes back.

        Raises:
            KeyError: if the node has no weights.
        """
        weights = self.named_weights(node)
        module = copy.deepcopy(self.template).to_empty(device=self._factory["device"])
        module.load_state_dict(weights)
        return module

    @torch.no_grad()
    def assign(self, node: int, module: nn.Module) -> None:
        """Overwrite one node's weights with the weights of a module built like the template.

        Raises:
            KeyError: if the node has no weights.
            ValueError: if the module is not built like the template; nothing is changed then.
        """
        views = self.named_weights(node)
        given = dict(module.named_parameters())
        for name in sorted(views.keys() | given.keys()):
            want, got = (tuple(own[name].shape) if name in own else None for own in (views, given))
            if want != got:
                raise ValueError(
                    f"the module is not built like the template: {name!r} should have shape {want}, found "
                    f"{got} (None is no such weight)"
                )
        for name, parameter in given.items():
            views[name].copy_(parameter)

    def _fresh(self, generator: torch.Generator | None) -> Tensor:
        module = copy.deepcopy(self.template).to_empty(device=self._factory["device"])
        initialize(module, generator=generator)
        flat = torch.zeros(sum(size for _, size in self._sizes), **self._factory)
        views = self._views(flat[None])
        for name, parameter in module.named_parameters():
            views[name][0].copy_(parameter.detach())
        return flat

    if TYPE_CHECKING:

        def __call__(self, x: Tensor, groups: Groups, nodes: Sequence[int]) -> Tensor:
            """Run `forward`; declared for type checkers."""

    # --- computing ----------------------------------------------------------------------------------------

    def forward(self, x: Tensor, groups: Groups, nodes: Sequence[int]) -> Tensor:
        """Apply to each row the network of its node.

        Args:
            x: `(T, ...)`, rows sorted by group.
            groups: the groups of the rows; group `g` is `nodes[g]`.
            nodes: ids, one per group.

        Returns:
            `(T, ...)`.

        Raises:
            KeyError: if a node has no weights.
            ValueError: if `nodes` is empty, or rows, groups and nodes do not belong together.
        """
        check_rows(x, len(nodes), groups)
        # Reading the sizes of groups would stop an accelerator's stream.
        if self.block is None or len(x) <= 2 * self.block or x.device.type != "cpu" or torch.compiler.is_compiling():
            return apply_layers(self._layers, self._stacked(nodes), x, groups)
        results, start, group = [], 0, 0
        for rows, count in blocks_of(groups.sizes, self.block):
            own = Groups(groups.index[start : start + rows] - group, count)
            weights = self._stacked(nodes[group : group + count])
            results.append(apply_layers(self._layers, weights, x[start : start + rows], own))
            start, group = start + rows, group + count
        return torch.cat(results)

    def _stacked(self, nodes: Sequence[int]) -> dict[str, Tensor]:
        """Return the weights of several nodes by the template's names, each with a leading axis `G`."""
        if not nodes:
            raise ValueError("expected at least one node; without one there is no network to apply")
        return self._views(torch.stack([self.weights_of(node) for node in nodes]))

    def _views(self, flat: Tensor) -> dict[str, Tensor]:
        return dict(zip(self._names, _part(flat, self._sizes), strict=True))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NodeBank:
        """Convert the bank, for `.to`, `.double` and similar methods; nodes that are added later follow."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved = fn(torch.empty(0, **self._factory))
        self._factory = {"device": moved.device, "dtype": moved.dtype}
        self.template.to(moved.dtype)
        return self


def _watch(weights: nn.Parameter, node: int) -> None:
    """Warn if the weights of a new node get gradients and never change: their optimiser was built before the node."""
    start, left = weights.detach().clone(), _PATIENCE

    def check(found: Tensor) -> None:
        nonlocal left
        left -= 1
        if left and torch.equal(found[:_COMPARED], start[:_COMPARED]):
            return
        handle.remove()
        if not left and torch.equal(found, start):
            warnings.warn(
                f"the weights of node {node} had {_PATIENCE} gradients and did not change; an optimiser that was built "
                "before the node was added does not train it: build the optimiser again after a split",
                stacklevel=2,
            )

    handle = weights.register_post_accumulate_grad_hook(check)


def blocks_of(sizes: Sequence[int], rows: int) -> list[tuple[int, int]]:
    """Return rows and number of groups of each block: as many whole groups as fit into `rows`, or one."""
    blocks: list[tuple[int, int]] = []
    for size in sizes:
        if blocks and blocks[-1][0] + size <= rows:
            blocks[-1] = (blocks[-1][0] + size, blocks[-1][1] + 1)
        else:
            blocks.append((size, 1))
    return blocks


def _part(flat: Tensor, sizes: list[tuple[torch.Size, int]]) -> tuple[Tensor, ...]:
    """Split flat weights `(G, P)` into views of consecutive shapes, each `(G, ...)`."""
    pieces = flat.split([size for _, size in sizes], 1)
    return tuple(
        (piece if size == shape.numel() else piece[:, : shape.numel()]).view(len(flat), *shape)
        for piece, (shape, size) in zip(pieces, sizes, strict=True)
    )
