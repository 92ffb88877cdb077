"""Gradient of the values: one row for each value, which follows the changes of the table."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from munkey.store.change import Added, Change, Moved, Removed, Step
from munkey.store.erase import Scratch
from munkey.store.follower import Follower
from munkey.store.table import Table

__all__ = ["GradientRows", "gradient_check"]


class GradientRows(Follower):
    """The gradient of the values, dense or sparse.

    Args:
        table: table of the values.
    """

    def __init__(self, table: Table) -> None:
        self._table = table

    def steps(self, change: Change, scratch: Scratch) -> list[Step]:
        """Return the steps that change the gradient like the values; rows that replace all rows have no gradient."""
        values, grad = self._table.values, self._table.values.grad
        if grad is None or isinstance(change, Added):
            return []
        if isinstance(change, Removed):
            if not grad.is_sparse:
                return [change.erase(grad, scratch)]
            return self._exchange(grad, _renumbered(grad, change.renumber, len(values)))
        if isinstance(change, Moved):
            new = _renumbered(grad, change.renumber, change.room) if grad.is_sparse else change.made(grad)
            # PyTorch refuses a gradient of another shape than its parameter, whose shape changes in between.
            return [self._dropped(), *self._exchange(grad, new)]
        return [self._dropped()]

    def _dropped(self) -> Step:
        return lambda: setattr(self._table.values, "grad", None)

    def _exchange(self, old: Tensor, new: Tensor) -> list[Step]:
        wipe = old._values().zero_ if old.is_sparse else old.zero_
        return [lambda: setattr(self._table.values, "grad", new), wipe]

    def kept(self) -> list[Tensor]:
        """Return the gradient, if it is dense."""
        grad = self._table.values.grad
        return [] if grad is None or grad.is_sparse else [grad]


def _renumbered(grad: Tensor, renumber: Callable[[Tensor], Tensor], room: int) -> Tensor:
    """Return a sparse gradient with other row numbers; rows numbered -1 are dropped."""
    summed = grad.coalesce()
    rows = renumber(summed.indices()[0])
    kept = rows >= 0
    shape = (room, *grad.shape[1:])
    left = torch.sparse_coo_tensor(rows[kept][None], summed.values()[kept], shape, check_invariants=True)
    if summed is not grad:
        summed._values().zero_()
    return left


def gradient_check(table: Table, attached: bool) -> Callable[[Tensor], None]:
    """Return a hook that refuses a gradient of rows that moved after the read."""
    read_at = table.changes

    def check(_: Tensor) -> None:
        if table.moved_at > read_at:
            raise RuntimeError(
                "rows were deleted, moved or got more room since this loss was computed, so its gradient would fall on "
                "other rows; compute the loss again"
            )
        if not attached:
            warnings.warn(
                "values of a store are trained by an optimiser that is not attached; its state of an instance would "
                "not be forgotten. Attach the optimiser: store.attach(optimizer)",
                stacklevel=2,
            )

    return check
