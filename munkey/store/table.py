"""The table of a store: columns with room, of which the first rows are in use.

Letters: `M` rows in use, `R` rows there is room for, `D` width of a key, `V` width of a value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from munkey.store.change import Added, Change, Moved, Removed, Step, long_lived
from munkey.store.erase import Scratch
from munkey.store.follower import Follower, Undone
from munkey.store.schema import Column, order_of

__all__ = ["Table"]

_LEAST_ROOM = 16


class Table(Follower):
    """Columns `(R, ...)` of which the first `used` rows are in use; the rest is zero.

    The column `values` is a parameter, which stays the same object through all changes, because optimisers refer to it
    by identity. The other columns are tensors.

    Args:
        schema: columns of the table.
        device: device of the columns.

    Attributes:
        used: `M`.
        changes: number of times that rows were added, removed or moved, or changed as a whole.
        moved_at: value of `changes` when a row last got another number, or a column another room.
        rewritten: whether a row was deleted or got another number since the table was made or loaded.
    """

    def __init__(self, schema: tuple[Column, ...], device: torch.device | str | None = None) -> None:
        self.schema = schema
        with long_lived():
            made = {c.name: torch.zeros(0, *c.shape, dtype=c.dtype, device=device) for c in self.schema}
            self.values = nn.Parameter(made.pop("values"))
        self._tensors = made
        self.used = self.changes = self.moved_at = 0
        self.rewritten = False

    def __getitem__(self, name: str) -> Tensor:
        """Return a column, room included, without its gradient."""
        # Not `detach()`: writes of a store must not count as training in PyTorch's count of changes.
        return self.values.data if name == "values" else self._tensors[name]

    @property
    def columns(self) -> tuple[Tensor, ...]:
        """All columns, room included, in the order of the schema."""
        return tuple(self[column.name] for column in self.schema)

    @property
    def rows(self) -> tuple[Tensor, ...]:
        """Rows in use of all columns."""
        return tuple(column[: self.used] for column in self.columns)

    @property
    def room(self) -> int:
        """Number of rows there is room for, `R`."""
        return len(self.values)

    @property
    def device(self) -> torch.device:
        """Device of the columns."""
        return self.values.device

    def order(self) -> Tensor:
        """Return the row numbers `(M,)` sorted by id and view."""
        return order_of(self["ids"][: self.used], self["views"][: self.used])

    def row_bytes(self) -> int:
        """Return the size of one row in bytes."""
        return sum(math.prod(column.shape) * self[column.name].element_size() for column in self.schema)

    # --- changes ------------------------------------------------------------------------------------------

    def more_room(self, count: int) -> Moved | None:
        """Return the change that makes room for `count` more rows; None if there is enough room."""
        stop = self.used + count
        return None if stop <= self.room else Moved(self.used, max(_LEAST_ROOM, stop, self.room + self.room // 2))

    def stage(self, write: Callable[[tuple[Tensor, ...]], None], count: int) -> Added:
        """Write new rows into the room, where the rows are unused until the returned change is carried out.

        Args:
            write: function that fills the columns `(count, ...)`.
            count: number of rows, for which there must be room.
        """
        change = Added(self.used, self.used + count)
        try:
            with long_lived():
                write(tuple(column[change.rows] for column in self.columns))
        except BaseException:
            self.undo(change)
            raise
        return change

    def check(self, change: Change) -> None:
        """Raise RuntimeError if rows have changed since the change was planned, as by a signal handler."""
        planned = change.planned_at if isinstance(change, Removed) else -1
        if planned not in (-1, self.changes) or (isinstance(change, Added) and change.start != self.used):
            raise RuntimeError("rows have changed since this change was planned; plan it again")

    def undo(self, change: Change) -> Undone:
        """Wipe staged rows."""
        if isinstance(change, Added):
            with long_lived():
                for column in self.columns:
                    column[change.rows] = 0
        return Undone.BACK

    def kept(self) -> list[Tensor]:
        """Return all columns."""
        return list(self.columns)

    def steps(self, change: Change, scratch: Scratch) -> list[Step]:
        """Return the steps that change all columns, and count the change."""
        if isinstance(change, Added):
            return [self._counter(change.stop, moved=False)]
        if isinstance(change, Removed):
            erase = [change.erase(column, scratch) for column in self.columns]
            return [*erase, self._counter(change.after, moved=True, rewritten=True)]
        if isinstance(change, Moved):
            new = [change.made(column) for column in self.columns]
            rewritten = self.rewritten or change.order is not None
            return self._exchange(new, change.count, rewritten, scratch)
        new = [self._like(rows, column) for rows, column in zip(change.columns, self.schema, strict=True)]
        return self._exchange(new, change.count, False, scratch)

    def _like(self, rows: Tensor, column: Column) -> Tensor:
        return rows.detach().to(self[column.name], copy=True)

    def _exchange(self, new: Sequence[Tensor], count: int, rewritten: bool, scratch: Scratch) -> list[Step]:
        old = self.columns
        for column in new:
            scratch.unless_kept(column)
        steps: list[Step] = [self._setter(column.name, tensor) for column, tensor in zip(self.schema, new, strict=True)]
        steps.append(self._counter(count, moved=True, rewritten=rewritten))
        return steps + [column.zero_ for column in old]

    def _setter(self, name: str, tensor: Tensor) -> Step:
        def put() -> None:
            if name == "values":
                self.values.data = tensor
            else:
                self._tensors[name] = tensor

        return put

    def _counter(self, used: int, *, moved: bool, rewritten: bool | None = None) -> Step:
        changes = self.changes + 1

        def count() -> None:
            self.used, self.changes = used, changes
            self.moved_at = changes if moved else self.moved_at
            self.rewritten = self.rewritten if rewritten is None else rewritten

        return count

    # --- as a whole ---------------------------------------------------------------------------------------

    def converted(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply a function, such as a move to a device, to all columns but the values; wipe replaced columns."""
        for name, column in self._tensors.items():
            new = fn(column)
            if new.data_ptr() != column.data_ptr():
                column.zero_()
            self._tensors[name] = new
        self.schema = tuple(replace(column, dtype=self[column.name].dtype) for column in self.schema)
        self.changes += 1
