"""Changes of a table of rows, as values: rows were added, removed, moved, or replaced by other rows.

A change is built before anything in memory changes, and holds all that its followers need to carry out the change. The
work of a change is a list of *steps*. Every step is idempotent: running it again after an interruption gives the same
result as running it once. So an interrupted change is finished from the interrupted step.

Letters: `M` rows in use, `R` rows there is room for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from munkey.store.erase import Scratch
from munkey.store.receipts import Receipt
from treediff.core.modes import lasting

__all__ = ["Added", "Change", "Moved", "Removed", "Replaced", "Step", "long_lived"]

Step = Callable[[], object]


@contextmanager
def long_lived() -> Iterator[None]:
    """Make tensors that outlive the call, without gradients, in any mode of the caller; also a decorator.

    A tensor that is made in inference mode cannot be changed outside of that mode. So every tensor that a store keeps
    is made in this context.

    Examples:
        >>> with torch.inference_mode(), long_lived():
        ...     kept = torch.zeros(2)
        >>> kept.is_inference()
        False
    """
    with lasting(), torch.no_grad():
        yield


@dataclass(frozen=True, eq=False)
class Added:
    """New rows behind the rows in use, which are already written into the room of the table.

    Args:
        start: number of the first new row, which is the number of rows before the change.
        stop: number of rows after the change.
    """

    start: int
    stop: int

    @property
    def rows(self) -> slice:
        """Slice of the new rows."""
        return slice(self.start, self.stop)


@dataclass(frozen=True, eq=False)
class Removed:
    """Rows that are removed; the last remaining rows move into the holes.

    Args:
        ids: owners of the removed rows.
        before: number of rows before the change.
        after: number of rows after the change.
        holes: `(n,)` removed rows below `after`, in ascending order.
        movers: `(n,)` remaining rows from `after` on, in ascending order; the i-th mover fills the i-th hole.
        gone: all removed rows, in ascending order.
        receipt: evidence for a log; None if there is nothing to log, as when an addition is taken back.
        planned_at: number of changes of the table when the removal was planned; -1 if the number does not matter.
    """

    ids: Sequence[int]
    before: int
    after: int
    holes: Tensor
    movers: Tensor
    gone: Tensor
    receipt: Receipt | None = None
    planned_at: int = -1

    @classmethod
    def of(
        cls,
        ids: Sequence[int],
        rows: Sequence[int],
        before: int,
        device: torch.device | str | None = None,
        planned_at: int = -1,
    ) -> Removed:
        """Plan the removal of distinct rows from the first `before` rows."""
        gone = np.sort(np.asarray(rows, np.int64))
        after = before - len(gone)
        split = int(gone.searchsorted(after))
        stays = np.ones(before - after, bool)
        stays[gone[split:] - after] = False
        movers = after + stays.nonzero()[0]
        holes, moving, every = (torch.from_numpy(numbers).to(device) for numbers in (gone[:split], movers, gone))
        return cls(ids, before, after, holes, moving, every, planned_at=planned_at)

    def erase(self, rows: Tensor, scratch: Scratch) -> Step:
        """Return the step that overwrites the removed rows of a tensor `(R, ...)` with moving rows or zeros."""
        if rows.device.type == "cpu" and rows.is_contiguous() and rows.numel():
            return self._erase_bytes(_in_bytes(rows), scratch)
        holes = self.holes.to(rows.device)
        moving = scratch(rows.index_select(0, self.movers.to(rows.device)))

        def overwrite() -> None:
            rows[holes] = moving
            rows[self.after : self.before] = 0

        return overwrite

    @cached_property
    def _places(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Holes and movers as arrays."""
        return self.holes.numpy(force=True), self.movers.numpy(force=True)

    def _erase_bytes(self, rows: NDArray[np.void], scratch: Scratch) -> Step:
        """Return the step of `erase` for rows `(R,)` of bytes, which is much faster if few rows are removed."""
        holes, movers = self._places
        tail, moving = rows[self.after : self.before].view(np.uint8), rows.take(movers)
        scratch(torch.from_numpy(moving.view(np.uint8)))

        def overwrite() -> None:
            rows.put(holes, moving)
            tail.fill(0)

        return overwrite

    def renumber(self, rows: Tensor) -> Tensor:
        """Return the new numbers of rows; -1 for removed rows."""
        moved = rows.clone()
        moved[torch.isin(rows, self.gone)] = -1
        if len(self.movers):
            place = torch.searchsorted(self.movers, rows).clamp_max(len(self.movers) - 1)
            found = self.movers[place] == rows
            moved[found] = self.holes[place[found]]
        return moved


@dataclass(frozen=True, eq=False)
class Moved:
    """Rows that move to tensors with another room, in another order or in the same order.

    Args:
        count: number of rows.
        room: `R` after the change.
        order: `(M,)` the present row number for each new place; None if rows keep their numbers.
    """

    count: int
    room: int
    order: Tensor | None = None

    def made(self, rows: Tensor) -> Tensor:
        """Return the new tensor `(R, ...)` for an old tensor."""
        other = rows.new_zeros(self.room, *rows.shape[1:])
        if self.order is None:
            other[: self.count] = rows[: self.count]
        else:  # without an intermediate copy
            torch.index_select(rows, 0, self.order.to(rows.device), out=other[: self.count])
        return other

    def renumber(self, rows: Tensor) -> Tensor:
        """Return the new numbers of rows."""
        if self.order is None:
            return rows
        place = torch.empty_like(self.order)
        place[self.order] = torch.arange(self.count, device=place.device)
        return place[rows]


@dataclass(frozen=True, eq=False)
class Replaced:
    """Other rows in place of all rows, as when a state is loaded.

    Args:
        columns: columns of the new rows, each `(M, ...)`, in the order of the schema.
    """

    columns: Sequence[Tensor]

    @property
    def count(self) -> int:
        """Number of rows after the change."""
        return len(self.columns[0])


def _in_bytes(rows: Tensor) -> NDArray[np.void]:
    """Return a view of a contiguous CPU tensor with one element of bytes for each row."""
    array = rows.detach().view(torch.uint8).numpy().reshape(-1)
    return array.view(np.dtype((np.void, array.size // rows.shape[0])))


Change = Added | Removed | Moved | Replaced
