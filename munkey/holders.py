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
        self.moved = False  # whether a row has another number than it once had

    def __deepcopy__(self, memo: object) -> Holders:
        return Holders()  # a copy of a parameter is followed by nobody

    def attach(self, values: nn.Parameter, holder: object, stepped: Callable[..., None]) -> None:
        """Take in an optimiser, which calls `stepped` after each step, or an average.

        Raises:
            TypeError: if it is something else.
            ValueError: if it does not follow the parameter, or has not followed it so far.
        """
        if isinstance(holder, EMA):
            self._check_average(values, holder)
            self.averages += [] if holder in self.averages else [holder]
        elif isinstance(holder, torch.optim.Optimizer):
            if not any(weight is values for group in holder.param_groups for weight in group["params"]):
                raise ValueError("the optimiser does not train this store's values; pass store.values to it")
            if holder in self.optimizers:
                return
            if self.moved and holder.state.get(values):
                raise ValueError(
                    "rows have moved since this optimiser's first step, and it did not follow; attach an optimiser "
                    "before that, or right after store and optimiser were loaded"
                )
            self.optimizers.append(holder)
            holder.register_step_post_hook(stepped)
        else:
            raise TypeError(f"expected an optimiser of PyTorch or an EMA, found {type(holder).__name__}")

    @staticmethod
    def _check_average(values: nn.Parameter, ema: EMA) -> None:
        names = [name for name, weight in ema.model.named_parameters() if weight is values]
        if not names:
            raise ValueError("the EMA does not follow this store's values; make it of a model that holds the store")
        found = ema.weights.get(names[0])
        if found is None or found.shape != values.shape:
            rows = "none" if found is None else len(found)
            raise ValueError(
                f"the EMA has an average of {rows} of {len(values)} rows: the store joined the model, or grew, since "
                "it was made; make it anew"
            )

    def detach(self, holder: object) -> None:
        """Leave out an optimiser or an average, which keeps what it has."""
        for held in (self.optimizers, self.averages):
            if holder in held:
                held.remove(holder)  # type: ignore[arg-type]

    def followed(self, values: nn.Parameter) -> bool:
        """Whether something has a row for each row there is."""
        return bool(self.averages) or any(optimizer.state.get(values) for optimizer in self.optimizers)

    # --- whether all can be erased ------------------------------------------------------------------------

    def check(self, values: nn.Parameter) -> None:
        """Raise ValueError if an optimiser has something of the rows that is not one row for each."""
        for optimizer in self.optimizers:
            for weight, states in optimizer.state.items():
                for name, state in states.items():
                    problem = _problem(state, values if weight is values else None)
                    if problem:
                        raise ValueError(
                            f"{type(optimizer).__name__} keeps {name!r}{problem}, in which no instance can be found "
                            f"and erased; {_ADVICE}"
                        )

    def check_copies(self) -> None:
        """Raise ValueError if something holds copies that it cannot erase."""
        if self.copies:
            name = type(self.copies[0]).__name__
            raise ValueError(f"a {name} holds copies of all keys and cannot erase them; close() it first, then forget")

    def check_still(self) -> None:
        """Raise ValueError while values are those of an average, and their own are elsewhere."""
        if any(ema.own is not None for ema in self.averages):
            raise ValueError("the values are those of an EMA at present; leave `with ema.average()` first")

    # --- changes ------------------------------------------------------------------------------------------

    def erase(self, values: nn.Parameter, removal: Removal) -> None:
        """Change everything as the store's own tensors."""
        if values.grad is not None and values.grad.is_sparse:
            values.grad = _renumbered(values.grad, removal.renumber, len(values))
        for tensor in self.rows(values):
            removal.erase(tensor)
        for table in self.tables:
            table.erase(removal)
        self.moved |= bool(len(removal.movers))

    def rows(self, values: nn.Parameter) -> list[Tensor]:
        """All tensors with `R` rows."""
        dense = [] if values.grad is None or values.grad.is_sparse else [values.grad]
        return [state[name] for state, name in self._kept(values)] + dense

    @torch.no_grad()
    def added(self, values: nn.Parameter, rows: slice) -> None:
        """There are new rows, which may be nearer than others."""
        for average, name in self._averages(values):
            average[name][rows] = values[rows]
        self.changed()

    def changed(self) -> None:
        """Who is near whom has to be looked up again."""
        self.changes += 1
        for table in self.tables:
            table.clear()

    @torch.no_grad()
    def rebuild(
        self, values: nn.Parameter, make: Callable[[Tensor], Tensor], renumber: Callable[[Tensor], Tensor]
    ) -> list[Tensor]:
        """Put other tensors in the place of the parameter's and all of these.

        Args:
            values: the parameter; it stays the same one, because optimisers know it by identity.
            make: gives a new tensor for an old one.
            renumber: gives the new numbers of rows.

        Returns:
            those that were there before.
        """
        self.changed()
        kept, grad, data = list(self._kept(values)), values.grad, values.data
        old = [state[name] for state, name in kept] + [data]
        new = [make(tensor) for tensor in old]
        values.grad = None
        values.data = new.pop()
        for (state, name), tensor in zip(kept, new, strict=True):
            state[name] = tensor
        if grad is not None and grad.is_sparse:
            values.grad = _renumbered(grad, renumber, len(values))
        elif grad is not None:
            values.grad = make(grad)
            old.append(grad)
        return old

    def _kept(self, values: nn.Parameter) -> Iterator[tuple[dict[str, Tensor], str]]:
        """Where there is a tensor with `R` rows."""
        for optimizer in self.optimizers:
            state = optimizer.state.get(values, {})
            for name, tensor in state.items():
                if isinstance(tensor, Tensor) and tensor.ndim and tensor.shape[:1] == values.shape[:1]:
                    yield state, name
        yield from self._averages(values)

    def _averages(self, values: nn.Parameter) -> Iterator[tuple[dict[str, Tensor], str]]:
        for ema in self.averages:
            for name, weight in ema.model.named_parameters():
                if weight is values:
                    yield ema.weights, name


def _problem(state: object, values: Tensor | None) -> str | None:
    """Why nothing could be erased from an optimiser's state of the values, or of another weight if these are None."""
    if not isinstance(state, Tensor):
        return None if isinstance(state, int | float | None) else f", a {type(state).__name__}"
    if values is None or state.numel() <= 1:
        return None
    if state.layout != torch.strided:
        return ", a sparse tensor"
    wide = (*values.shape[1:], *([1] * state.ndim))
    if state.shape[:1] == values.shape[:1] and all(
        size in (1, full) for size, full in zip(state.shape[1:], wide, strict=False)
    ):
        return None
    return f" of shape {tuple(state.shape)} for values of shape {tuple(values.shape)}"


@torch.no_grad()
def grown(rows: Tensor, room: int) -> Tensor:
    """The same rows with zeros behind them."""
    larger = rows.new_zeros(room, *rows.shape[1:])
    larger[: len(rows)] = rows
    return larger


@torch.no_grad()
def reordered(rows: Tensor, order: Tensor) -> Tensor:
    """Some rows in another order."""
    return rows.detach()[order]


@torch.no_grad()
def _renumbered(grad: Tensor, renumber: Callable[[Tensor], Tensor], room: int) -> Tensor:
    """A sparse gradient with other row numbers; rows numbered -1 go."""
    summed = grad.coalesce()
    rows = renumber(summed.indices()[0])
    kept = rows >= 0
    shape = (room, *grad.shape[1:])
    left = torch.sparse_coo_tensor(rows[kept][None], summed.values()[kept], shape, check_invariants=True)
    for other in (grad, summed):
        other._values().zero_()
    return left
