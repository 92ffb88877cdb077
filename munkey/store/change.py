"""Changes of a table of rows, as values: rows were added, removed, moved, or replaced by others.

A change is made before anything happens, and holds all that its followers need to carry it out. Its work is a list of
*steps*. Every step can be repeated: whatever interrupts one, running it again gives what running it once gives. So an
interrupted change is finished from the step that was interrupted.

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
    """Make tensors that outlive the call, without gradients, wherever the caller is; also a decorator.

    A tensor that is made in inference mode cannot be changed outside of it. So whatever a store keeps is made here.

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
    """New rows behind those in use; the table holds them in its room already.

    Args:
        start: number of the first new row, and number of rows until now.
        stop: number of rows from then on.
    """

    start: int
    stop: int

    @property
    def rows(self) -> slice:
        """The new rows."""
        return slice(self.start, self.stop)


@dataclass(frozen=True, eq=False)
class Removed:
    """Rows that go; the last rows that stay move into the holes.

    Args:
        ids: whose rows go.
        before: number of rows until now.
        after: number of rows from then on.
        holes: `(n,)` rows below `after` that go, in ascending order.
        movers: `(n,)` rows from `after` on that stay, in ascending order; each moves into the hole of its place.
        gone: all rows that go, in ascending order.
        receipt: evidence for a log; None if there is nothing to note, as when an addition is taken back.
        planned_at: how often the table had changed when this was planned; -1 if that does not matter.
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
        """Plan the removal of rows, without repetition, from the first `before`."""
        gone = np.sort(np.asarray(rows, np.int64))
        after = before - len(gone)
        split = int(gone.searchsorted(after))
        stays = np.ones(before - after, bool)
        stays[gone[split:] - after] = False
        movers = after + stays.nonzero()[0]
        holes, moving, every = (torch.from_numpy(numbers).to(device) for numbers in (gone[:split], movers, gone))
        return cls(ids, before, after, holes, moving, every, planned_at=planned_at)

    def erase(self, rows: Tensor, scratch: Scratch) -> Step:
        """Return the step that overwrites what goes in a tensor `(R, ...)`, with what moves or with zero."""
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
        """Do the same for rows `(R,)` of bytes, in a small part of the time if few of them go."""
        holes, movers = self._places
        tail, moving = rows[self.after : self.before].view(np.uint8), rows.take(movers)
        scratch(torch.from_numpy(moving.view(np.uint8)))

        def overwrite() -> None:
            rows.put(holes, moving)
            tail.fill(0)

        return overwrite

    def renumber(self, rows: Tensor) -> Tensor:
        """Return the new numbers of rows; -1 for those that go."""
        moved = rows.clone()
        moved[torch.isin(rows, self.gone)] = -1
        if len(self.movers):
            place = torch.searchsorted(self.movers, rows).clamp_max(len(self.movers) - 1)
            found = self.movers[place] == rows
            moved[found] = self.holes[place[found]]
        return moved


@dataclass(frozen=True, eq=False)
class Moved:
    """The same rows in tensors with another room, in another order or in the same one.

    Args:
        count: number of rows.
        room: `R` from then on.
        order: `(M,)` the present number of each row in its new place; None if rows stay where they are.
    """

    count: int
    room: int
    order: Tensor | None = None

    def made(self, rows: Tensor) -> Tensor:
        """Return the new tensor `(R, ...)` for an old one."""
        other = rows.new_zeros(self.room, *rows.shape[1:])
        if self.order is None:
            other[: self.count] = rows[: self.count]
        else:  # without a copy on the way
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
    """Other rows in place of all, as when a state is loaded.

    Args:
        columns: of the new rows, each `(M, ...)`, in the order of the schema.
    """

    columns: Sequence[Tensor]

    @property
    def count(self) -> int:
        """Number of rows from then on."""
        return len(self.columns[0])


def _in_bytes(rows: Tensor) -> NDArray[np.void]:
    """Return the same memory as one element of bytes for each row of a contiguous tensor on a CPU."""
    array = rows.detach().view(torch.uint8).numpy().reshape(-1)
    return array.view(np.dtype((np.void, array.size // rows.shape[0])))


Change = Added | Removed | Moved | Replaced
