"""Neighbours of stored rows, searched once: keys are frozen, so neighbours are the same in every epoch of training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from munkey.search.exact import Neighbours
from munkey.store.change import Change, Removed, Step, long_lived
from munkey.store.erase import Scratch, wipe
from munkey.store.follower import Follower

__all__ = ["NeighbourTables"]

_UNKNOWN = -2  # -1 means that there is no neighbour
_Tables = dict[int, tuple[Tensor, Tensor]]


class NeighbourTables(Follower):
    """Row numbers and scores of the `k` nearest rows of each row, for any `k`; rows of the same id are left out.

    The tables are of one search, the last one, and are filled as they are queried. After rows were removed, only rows
    with a removed neighbour are searched again. After rows were added, all rows are searched again.
    """

    def __init__(self) -> None:
        self.tables: _Tables = {}
        self._search: object = None

    def clear(self) -> None:
        """Overwrite the scores, and drop all tables."""
        self._replace(self.tables, {})

    def _replace(self, old: _Tables, new: _Tables) -> None:
        self.tables = new
        for _, scores in old.values():
            wipe(scores)

    def steps(self, change: Change, scratch: Scratch) -> list[Step]:
        """Return the step that updates the tables after a removal; any other change drops the tables."""
        old, new = self.tables, _Tables()
        if isinstance(change, Removed):
            new = {k: _without(change, scratch, *table) for k, table in old.items()}
        return [lambda: self._replace(old, new)]

    def get(
        self, search: object, k: int, rows: Tensor, used: int, find: Callable[[Tensor], Neighbours]
    ) -> tuple[Tensor, Tensor]:
        """Return row numbers and scores `(B, k)` of the neighbours of rows `(B,)`.

        Args:
            search: the search that `find` calls; tables of another search are dropped.
            k: number of neighbours.
            rows: row numbers.
            used: number of rows in use.
            find: function from row numbers to neighbours.
        """
        if search is not self._search:
            self.clear()
            self._search = search
        if k not in self.tables:
            with long_lived():
                near = torch.full((used, k), _UNKNOWN, dtype=torch.int64, device=rows.device)
                self.tables[k] = near, torch.zeros(used, k, dtype=torch.float64, device=rows.device)
        near, scores = self.tables[k]
        unknown = rows[near[rows, 0] == _UNKNOWN]
        if len(unknown):
            with long_lived():
                found = find(unknown)
                scores[unknown], near[unknown] = found.scores.to(scores), found.rows
        return near[rows], scores[rows]


def _without(change: Removed, scratch: Scratch, near: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    order = torch.arange(change.after, device=near.device)
    order[change.holes] = change.movers
    rows, scores = near[order], scratch.unless_kept(scores[order])
    moved = change.renumber(rows)
    lost = ((rows >= 0) & (moved < 0)).any(1)
    moved[lost], scores[lost] = _UNKNOWN, 0
    return torch.where(rows < 0, rows, moved), scores
