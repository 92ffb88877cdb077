"""Neighbours of stored rows, searched once: keys are frozen, so neighbours are the same in every epoch of training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from munkey.search.exact import Neighbours
from munkey.store.change import Change, Removed, Step, long_lived
from munkey.store.erase import Scratch
from munkey.store.follower import Follower

__all__ = ["NeighbourTables"]

_UNKNOWN = -2  # -1 means that there is no neighbour


class NeighbourTables(Follower):
    """Row numbers of the `k` nearest rows of each row, for any `k`; rows of the same id are left out.

    The tables hold row numbers, no content of rows, and are filled as they are queried. After rows were removed, only
    rows with a removed neighbour are searched again. After rows were added, all rows are searched again.
    """

    def __init__(self) -> None:
        self.tables: dict[int, Tensor] = {}

    def clear(self) -> None:
        """Drop all tables."""
        self.tables = {}

    def steps(self, change: Change, scratch: Scratch) -> list[Step]:
        """Return the step that updates the tables after a removal; any other change drops the tables."""
        if not isinstance(change, Removed):
            return [self.clear]
        tables = {k: _without(change, rows) for k, rows in self.tables.items()}
        return [lambda: setattr(self, "tables", tables)]

    def get(self, k: int, rows: Tensor, used: int, search: Callable[[Tensor], Neighbours]) -> Tensor:
        """Return the row numbers `(B, k)` of the neighbours of rows `(B,)`.

        Args:
            k: number of neighbours.
            rows: row numbers.
            used: number of rows in use.
            search: function from row numbers to neighbours.
        """
        if k not in self.tables:
            with long_lived():
                self.tables[k] = torch.full((used, k), _UNKNOWN, dtype=torch.int64, device=rows.device)
        table = self.tables[k]
        unknown = rows[table[rows, 0] == _UNKNOWN]
        if len(unknown):
            with long_lived():
                table[unknown] = search(unknown).rows
        return table[rows]


def _without(change: Removed, table: Tensor) -> Tensor:
    rows = table.clone()
    rows[change.holes] = table[change.movers]
    rows = rows[: change.after].clone()
    moved = change.renumber(rows)
    lost = ((rows >= 0) & (moved < 0)).any(1)
    moved[lost] = _UNKNOWN
    return torch.where(rows < 0, rows, moved)
