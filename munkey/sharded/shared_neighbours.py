"""Neighbours of the rows of this rank among the rows of all ranks, searched once."""

from __future__ import annotations

import torch
from torch import Tensor

from munkey.store.change import Change, Step, long_lived
from munkey.store.erase import Scratch, wipe
from munkey.store.follower import Follower

__all__ = ["SharedNeighbours"]

_UNKNOWN = -2  # -1 means that there is no neighbour


class SharedNeighbours(Follower):
    """Row numbers for all ranks, and scores, of the `k` nearest rows of each row of this rank, for any `k`."""

    def __init__(self) -> None:
        self._tables: dict[int, tuple[Tensor, Tensor]] = {}

    def clear(self) -> None:
        """Overwrite the scores, and drop all tables."""
        old, self._tables = self._tables, {}
        for _, scores in old.values():
            wipe(scores)

    def steps(self, change: Change, scratch: Scratch) -> list[Step]:
        """Return the step that drops all tables: a change on one rank may change neighbours on all ranks."""
        return [self.clear]

    def get(self, k: int, rows: Tensor, used: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the tables of numbers and scores, `(M, k)` each, and the given rows whose entries are unknown."""
        if k not in self._tables:
            with long_lived():
                self._tables[k] = torch.full((used, k), _UNKNOWN), torch.zeros(used, k, dtype=torch.float64)
        near, scores = self._tables[k]
        wanted = rows.unique()
        return near, scores, wanted[near[wanted, 0] == _UNKNOWN]
