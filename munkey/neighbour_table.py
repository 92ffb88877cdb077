"""The neighbours of stored rows, looked up once: keys are frozen, so in training they are the same in every epoch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from munkey.retrieval import Neighbours
from munkey.rows import Removal

__all__ = ["NeighbourTable"]

_UNKNOWN = -2  # -1 says that there is no neighbour


class NeighbourTable:
    """Row numbers of the `k` nearest rows of each row, those of its own id left out; filled as it is asked.

    It holds numbers of rows and nothing of what is in them. When rows go, it looks up the neighbours of those that had
    one of them again; when rows come, of all.

    Args:
        k: how many.
    """

    def __init__(self, k: int) -> None:
        self.k = k
        self.rows: Tensor | None = None

    def clear(self) -> None:
        """Know nothing any more."""
        self.rows = None

    @torch.no_grad()
    def erase(self, removal: Removal) -> None:
        """Follow rows that go and rows that move into their places."""
        if self.rows is None:
            return
        removal.erase(self.rows)
        rows = self.rows[: removal.after]
        moved = removal.renumber(rows)
        lost = ((rows >= 0) & (moved < 0)).any(1)
        moved[lost] = _UNKNOWN
        self.rows = torch.where(rows < 0, rows, moved)

    def get(self, rows: Tensor, room: int, search: Callable[[Tensor], Neighbours]) -> Tensor:
        """`(B, k)` row numbers of neighbours of rows `(B,)`.

        Args:
            rows: which rows.
            room: number of rows in use.
            search: from row numbers to their neighbours.
        """
        if self.rows is None:
            self.rows = torch.full((room, self.k), _UNKNOWN, dtype=torch.int64, device=rows.device)
        unknown = rows[self.rows[rows, 0] == _UNKNOWN]
        if len(unknown):
            self.rows[unknown] = search(unknown).rows
        return self.rows[rows]
