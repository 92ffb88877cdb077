"""The neighbours of stored rows, looked up once: keys are frozen, so in training they are the same in every epoch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from munkey.search.exact import Neighbours
from munkey.store.change import Change, Removed, Step, long_lived
from munkey.store.erase import Scratch
from munkey.store.follower import Follower

__all__ = ["NeighbourTables"]

_UNKNOWN = -2  # -1 says that there is no neighbour


class NeighbourTables(Follower):
    """Row numbers of the `k` nearest rows of each row, for any `k`; those of the same id are left out.

    The tables hold numbers of rows and nothing of what is in them, and are filled as they are queried. When rows go,
    the neighbours of rows that had one of them are looked up again; when rows come, those of all rows.
    """

    def __init__(self) -> None:
        self.tables: dict[int, Tensor] = {}

    def clear(self) -> None:
        """Drop all that was looked up."""
        self.tables = {}

    def steps(self, change: Change, scratch: Scratch) -> list[Step]:
        """Return the step that follows rows which go; after any other change nothing is known."""
        if not isinstance(change, Removed):
            return [self.clear]
        tables = {k: _without(change, rows) for k, rows in self.tables.items()}
        return [lambda: setattr(self, "tables", tables)]

    def get(self, k: int, rows: Tensor, used: int, search: Callable[[Tensor], Neighbours]) -> Tensor:
        """Return the row numbers `(B, k)` of the neighbours of rows `(B,)`.

        Args:
            k: how many.
            rows: which rows.
            used: number of rows in use.
            search: from row numbers to their neighbours.
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
