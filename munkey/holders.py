"""What else holds something of each row: gradients, moments of an optimiser, averages.

Deleting a row of a parameter leaves its traces in whatever was made from it. Everything here has one row for each row
of the store, and is changed together with it.

Letters: `R` rows that a parameter has room for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from munkey.neighbour_table import NeighbourTable
from munkey.rows import Removal
from treediff import EMA

__all__ = ["Holders", "grown", "reordered"]

_ADVICE = "train values with an optimiser whose state has a row for each, like Adam, AdamW, SGD or SparseAdam"


class Holders:
    """The optimisers, averages and tables of neighbours that follow the values of one store."""

    def __init__(self) -> None:
        self.optimizers: list[torch.optim.Optimizer] = []
        self.averages: list[EMA] = []
        self.tables: list[NeighbourTable] = []
        self.copies: list[object] = []  # that cannot be erased
        self.changes = 0  # how often rows came or moved

    def __deepcopy__(self, memo: object) -> Holders:
        return Holders()  # a copy of a parameter is followed by nobody

    def attach(self, values: nn.Parameter, holder: object) -> None:
        """Take in an optimiser or an average.

        Raises:
            TypeError: if it is something else.
            ValueError: if it does not follow the parameter.
        """
        if isinstance(holder, EMA):
            if not any(weight is values for weight in holder.model.parameters()):
                raise ValueError("the EMA does not follow this store's values; make it of a model that holds the store")
            self.averages += [] if holder in self.averages else [holder]
        elif isinstance(holder, torch.optim.Optimizer):
            if not any(weight is values for group in holder.param_groups for weight in group["params"]):
                raise ValueError("the optimiser does not train this store's values; pass store.values to it")
            self.optimizers += [] if holder in self.optimizers else [holder]
        else:
            raise TypeError(f"expected an optimiser of PyTorch or an EMA, found {type(holder).__name__}")

    def check(self, values: nn.Parameter) -> None:
        """Raise ValueError if a holder has something of the rows that is not one row for each."""
        for optimizer in self.optimizers:
            for name, state in optimizer.state.get(values, {}).items():
                kind = f"{type(optimizer).__name__} keeps {name!r}"
                if isinstance(state, Tensor):
                    if state.numel() > 1 and state.shape[:1] != values.shape[:1]:
                        raise ValueError(
                            f"{kind} of shape {tuple(state.shape)} for values of shape {tuple(values.shape)}: it mixes "
                            f"instances, and none could be erased from it; {_ADVICE}"
                        )
                elif not isinstance(state, int | float | None):
                    raise ValueError(
                        f"{kind}, a {type(state).__name__}, in which no instance can be found and erased; {_ADVICE}"
                    )

    def check_copies(self) -> None:
        """Raise ValueError if something holds copies that it cannot erase."""
        if self.copies:
            name = type(self.copies[0]).__name__
            raise ValueError(f"a {name} holds copies of all keys and cannot erase them; close() it first, then forget")

    def erase(self, values: nn.Parameter, removal: Removal) -> None:
        """Change everything as the store's own tensors."""
        if values.grad is not None and values.grad.is_sparse:
            values.grad = _renumbered(values.grad, removal.renumber, len(values))
        for tensor in self.rows(values):
            removal.erase(tensor)
        for table in self.tables:
            table.erase(removal)

    def rows(self, values: nn.Parameter) -> list[Tensor]:
        """All tensors with `R` rows."""
        dense = [] if values.grad is None or values.grad.is_sparse else [values.grad]
        return [state[name] for state, name in self._kept(values)] + dense

    def added(self) -> None:
        """There are new rows, which may be nearer than others, or all have moved."""
        self.changes += 1
        for table in self.tables:
            table.clear()

    @torch.no_grad()
    def rebuild(
        self, values: nn.Parameter, make: Callable[[Tensor], Tensor], renumber: Callable[[Tensor], Tensor]
    ) -> None:
        """Put other tensors in the place of the parameter's and all of these.

        Args:
            values: the parameter; it stays the same one, because optimisers know it by identity.
            make: gives a new tensor for an old one.
            renumber: gives the new numbers of rows.
        """
        self.added()
        kept, grad = list(self._kept(values)), values.grad
        values.grad = None
        for state, name in kept:
            state[name] = make(state[name])
        values.data = make(values.data)
        if grad is not None:
            values.grad = _renumbered(grad, renumber, len(values)) if grad.is_sparse else make(grad)

    def _kept(self, values: nn.Parameter) -> Iterator[tuple[dict[str, Tensor], str]]:
        """Where there is a tensor with `R` rows."""
        for optimizer in self.optimizers:
            state = optimizer.state.get(values, {})
            for name, tensor in state.items():
                if isinstance(tensor, Tensor) and tensor.shape[:1] == values.shape[:1]:
                    yield state, name
        for ema in self.averages:
            for name, weight in ema.model.named_parameters():
                if weight is values:
                    yield ema.weights, name


@torch.no_grad()
def grown(rows: Tensor, room: int) -> Tensor:
    """The same rows with zeros behind them; the old tensor is wiped, because its memory goes back unwiped."""
    larger = rows.new_zeros(room, *rows.shape[1:])
    larger[: len(rows)] = rows
    rows.detach().zero_()
    return larger


@torch.no_grad()
def reordered(rows: Tensor, order: Tensor) -> Tensor:
    """Some rows in another order; the old tensor is wiped."""
    other = rows.detach()[order]
    rows.detach().zero_()
    return other


def _renumbered(grad: Tensor, renumber: Callable[[Tensor], Tensor], room: int) -> Tensor:
    """A sparse gradient with other row numbers; rows numbered -1 go."""
    grad = grad.coalesce()
    rows = renumber(grad.indices()[0])
    kept = rows >= 0
    shape = (room, *grad.shape[1:])
    left = torch.sparse_coo_tensor(rows[kept][None], grad.values()[kept], shape, check_invariants=True)
    grad.values().zero_()
    return left
